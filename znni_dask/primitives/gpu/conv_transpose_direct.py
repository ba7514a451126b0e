"""Transposed convolution: the product of every input voxel with all taps, each added to where it
belongs. Piece by piece of the input, so that products take bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import Box, Size, triple, volume
from znni_dask.network.layers import ConvTranspose, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, DevicePrimitive, Problem, direct_flops
from znni_dask.primitives.conv_transpose_direct import offsets_of_output
from znni_dask.primitives.gpu.pieces import BUFFERS_BYTES, piece_count, piece_of, pieces, reached
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY, PRODUCTS
from znni_dask.primitives.work import Work

PIECE_BYTES = 64 << 20  # of what is computed at once


@final
class GpuConvTransposeDirect(DevicePrimitive):
    """Transposed convolution on the GPU."""

    name: ClassVar[str] = "direct transposed"
    layer: ClassVar[type[Layer]] = ConvTranspose

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        """Products of all inputs; they are written, read and added."""
        conv, (batch, channels, *size) = _conv(problem), problem.inputs[0]
        voxels, taps = batch * prod(size), volume(conv.kernel)
        products = 2 * voxels * taps * conv.out_channels * channels // conv.groups
        moved = voxels * (3 * channels + 4 * taps * conv.out_channels) + prod(problem.output)
        launches = batch * piece_count(triple(size), _piece_voxels(conv)) * (taps + 2)
        return Work({PRODUCTS: products, MEMORY: ITEM_BYTES * moved, LAUNCHES: launches})

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """A piece of the input, and its products."""
        return _scratch_bytes(problem) + BUFFERS_BYTES

    def placed(self, layer: Layer, weights: Weights, device: Device) -> tuple[Any, Any]:
        """Matrices (group, tap and output, channel), and the biases."""
        conv = cast("ConvTranspose", layer)
        fan_in = conv.in_channels // conv.groups
        apart = weights["weight"].reshape(
            conv.groups, fan_in, conv.out_channels // conv.groups, volume(conv.kernel)
        )
        matrix = apart.transpose(0, 3, 2, 1).reshape(conv.groups, -1, fan_in)
        bias = device.put(weights["bias"].reshape(-1, 1, 1, 1)) if conv.bias else None
        return device.put(matrix), bias

    def apply(
        self,
        prepared: tuple[Any, Any],
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        matrix, bias = prepared
        conv, x, xp = _conv(problem), inputs[0], team.xp
        out[...] = 0 if bias is None else bias
        memory = team.scratch(_scratch_bytes(problem)).view(np.float32)
        for box in pieces(triple(x.shape[2:]), _piece_voxels(conv)):
            read = conv.in_channels * box.voxels
            columns = memory[:read].reshape(conv.groups, -1, box.voxels)
            made = memory[read : read + matrix.shape[1] * conv.groups * box.voxels]
            products = made.reshape(conv.groups, matrix.shape[1], box.voxels)
            for source, target in zip(x, out, strict=True):
                columns.reshape(-1, *box.size)[...] = source[(slice(None), *box.slices)]
                xp.matmul(matrix, columns, out=products)
                _add(problem, products, box, target, xp)


def _add(problem: Problem, products: Any, box: Box, out: Any, xp: Any) -> None:
    """Products (group, tap and output, voxel of a box of inputs) to a sample's output."""
    conv = _conv(problem)
    taps = products.reshape(conv.groups, volume(conv.kernel), -1, *box.size)
    made = out.reshape(conv.groups, -1, *out.shape[1:])
    for number, tap in enumerate(np.ndindex(conv.kernel)):
        inputs, outputs = _meeting(problem, triple(tap), box)
        there = made[(slice(None), slice(None), *outputs)]
        here = taps[(slice(None), number, slice(None), *inputs)]
        if there.size:
            xp.add(there, here, out=there)


def _meeting(problem: Problem, tap: Size, box: Box) -> tuple[list[slice], list[slice]]:
    """Voxels of a box of inputs whose product with a tap is part of an output, and which these
    are."""
    conv, inputs, outputs = _conv(problem), [], []
    offset = offsets_of_output(problem)
    for axis in range(3):
        up = conv.stride[axis]
        first = box.start[axis] * up + tap[axis] * conv.dilation[axis] - offset[axis]
        here, there = reached(first, up, box.size[axis], problem.output[2 + axis])
        inputs.append(here)
        outputs.append(there)
    return inputs, outputs


def _scratch_bytes(problem: Problem) -> int:
    piece = volume(piece_of(triple(problem.inputs[0][2:]), _piece_voxels(_conv(problem))))
    return ITEM_BYTES * piece * _values_of_voxel(_conv(problem))


def _values_of_voxel(conv: ConvTranspose) -> int:
    """Numbers that are there at once for a voxel of the input."""
    return conv.in_channels + volume(conv.kernel) * conv.out_channels


def _piece_voxels(conv: ConvTranspose) -> int:
    return max(1, PIECE_BYTES // (ITEM_BYTES * _values_of_voxel(conv)))


def _conv(problem: Problem) -> ConvTranspose:
    return cast("ConvTranspose", problem.layer)
