"""Direct convolution as products of matrices: some taps at a time, piece by piece of the output.

What these taps see of a piece is copied together as a matrix, zero where it is padding; its product
with the kernels' part is added to the output. Never is more there than a bounded number of bytes,
so it takes the least memory of all and any layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import Box, Size, ceil_divide, triple, volume
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, DevicePrimitive, Problem, direct_flops
from znni_dask.primitives.gpu.pieces import piece_count, piece_of, pieces, reached
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY, PRODUCTS
from znni_dask.primitives.work import Work

PIECE_BYTES = 64 << 20  # of what is computed at once
SUMMED = 512  # products of a sum that a product of matrices makes at least, if there are so many


@final
class GpuConvDirect(DevicePrimitive):
    """Direct convolution on the GPU, any stride, dilation, groups and padding."""

    name: ClassVar[str] = "direct"
    layer: ClassVar[type[Layer]] = Conv

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        """Products; what taps see, twice read and once written, and what is made of it, in every
        turn twice read and written."""
        conv, made = _conv(problem), prod(problem.output)
        turns, seen = _Turns.of(conv), made // problem.output[1] * conv.in_channels
        moved = ITEM_BYTES * (3 * seen * turns.taps + 4 * made * turns.count)
        parts = piece_count(triple(problem.output[2:]), _piece_voxels(conv)) * problem.output[0]
        launches = parts * (turns.taps + 3 * turns.count)
        return Work({PRODUCTS: self.flops(problem), MEMORY: moved, LAUNCHES: launches})

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Of a piece: what some taps see, and what is made of it."""
        piece = volume(piece_of(triple(problem.output[2:]), _piece_voxels(_conv(problem))))
        return ITEM_BYTES * piece * _values_of_voxel(_conv(problem))

    def placed(self, layer: Layer, weights: Weights, device: Device) -> tuple[Any, list[Any]]:
        """The biases, and the matrices of all turns: (group, output, tap and channel)."""
        conv = cast("Conv", layer)
        turns = _Turns.of(conv)
        channels = (conv.groups, conv.out_channels // conv.groups)
        apart = weights["weight"].reshape(*channels, -1, turns.taps).swapaxes(2, 3)
        parts = [apart[:, :, taps].ravel() for taps in turns.slices]
        whole, ends = device.put(np.concatenate(parts)), np.cumsum([part.size for part in parts])
        matrices = [
            whole[end - part.size : end].reshape(*channels, -1)
            for part, end in zip(parts, ends.tolist(), strict=True)
        ]
        bias = device.put(weights["bias"].reshape(-1, 1, 1, 1)) if conv.bias else None
        return bias, matrices

    def apply(
        self,
        prepared: tuple[Any, list[Any]],
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        memory = team.scratch(self.workspace_bytes(problem, 1)).view(np.float32)
        for box in pieces(triple(problem.output[2:]), _piece_voxels(_conv(problem))):
            for sample in range(len(out)):
                made = out[(sample, slice(None), *box.slices)]
                _make(prepared, problem, inputs[0][sample], made, box, memory, team.xp)


def _make(
    prepared: tuple[Any, list[Any]],
    problem: Problem,
    x: Any,
    made: Any,
    box: Box,
    memory: Any,
    xp: Any,
) -> None:
    """A piece of a sample's output."""
    bias, matrices = prepared
    conv = _conv(problem)
    x = x.reshape(conv.groups, -1, *x.shape[1:])
    taps = iter(np.ndindex(conv.kernel))
    for turn, matrix in enumerate(matrices):
        seen = conv.in_channels * box.voxels * matrix.shape[2] // x.shape[1]
        columns = memory[:seen].reshape(conv.groups, -1, x.shape[1], *box.size)
        for number, tap in enumerate(islice(taps, columns.shape[1])):
            _look(problem, x, triple(tap), box, columns[:, number])
        product = memory[seen : seen + conv.out_channels * box.voxels]
        product = product.reshape(conv.groups, -1, box.voxels)
        xp.matmul(matrix, columns.reshape(conv.groups, -1, box.voxels), out=product)
        product = product.reshape(made.shape)
        if turn:
            xp.add(made, product, out=made)
        elif bias is None:
            made[...] = product
        else:
            xp.add(product, bias, out=made)
    if conv.relu:
        xp.maximum(made, 0, out=made)


def _look(problem: Problem, x: Any, tap: Size, box: Box, seen: Any) -> None:
    """What a tap sees of the input (group, channel, z, y, x) for a box of outputs."""
    conv, here, there = _conv(problem), [], []
    for axis in range(3):
        stride = conv.stride[axis]
        first = problem.offsets[0][axis] + box.start[axis] * stride
        first += tap[axis] * conv.dilation[axis]
        outputs, places = reached(first, stride, box.size[axis], x.shape[2 + axis])
        here.append(outputs)
        there.append(places)
    if any(s.stop - s.start < n for s, n in zip(here, box.size, strict=True)):
        seen[...] = 0
    seen[(slice(None), slice(None), *here)] = x[(slice(None), slice(None), *there)]


@dataclass(frozen=True)
class _Turns:
    """Of ``taps`` so many ``at_once``."""

    taps: int
    at_once: int

    @classmethod
    def of(cls, conv: Conv) -> _Turns:
        taps = volume(conv.kernel)
        return cls(taps, min(taps, ceil_divide(SUMMED, conv.in_channels // conv.groups)))

    @property
    def count(self) -> int:
        """How often."""
        return ceil_divide(self.taps, self.at_once)

    @property
    def slices(self) -> list[slice]:
        """Taps of every turn."""
        firsts = range(0, self.taps, self.at_once)
        return [slice(first, min(first + self.at_once, self.taps)) for first in firsts]


def _values_of_voxel(conv: Conv) -> int:
    """Numbers that are there at once for a voxel of the output."""
    return _Turns.of(conv).at_once * conv.in_channels + conv.out_channels


def _piece_voxels(conv: Conv) -> int:
    return max(1, PIECE_BYTES // (ITEM_BYTES * _values_of_voxel(conv)))


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)
