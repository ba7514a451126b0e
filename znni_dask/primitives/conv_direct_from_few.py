"""Direct convolution of few channels into blocks of channels: first layers with small kernels.

Sums are so short that the answer is written as fast as memory takes it. The volume is taken as it
is; where padding reaches, it is first copied with zeros around it: beside the answer it is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.geometry import Size, ceil_divide, round_up, triple, volume
from znni_dask.kernels import from_few
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import allocate, allocated_bytes
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Problem, direct_flops
from znni_dask.primitives.planes import OfPlanes, Planes
from znni_dask.primitives.work import STREAMED, Rate, Work

SUMS = Rate("direct from few channels", 2.2e11)  # operations
MOST_CHANNELS = 4
MOST_TAPS = 25  # of a plane, which are straight-line code
ROWS_TOGETHER = 16  # of one block of channels; what they read is still near for the next


class Prepared(NamedTuple):
    """Of every output block the weights of each channel and tap, and the biases."""

    weights: Array
    biases: Array


@final
class ConvDirectFromFew(OfPlanes):
    """Direct convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct from few channels"
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = (
        f"at most {MOST_CHANNELS} channels and {MOST_TAPS} taps of a plane, no groups or whole "
        "window"
    )

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        few = conv.in_channels <= MOST_CHANNELS and prod(conv.kernel[1:]) <= MOST_TAPS
        return few and conv.groups == 1 and not conv.whole

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.PLAIN, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        wasted = round_up(problem.output[1], LANES) / problem.output[1]
        moved = Form.PLAIN.nbytes(problem.inputs[0]) + Form.BLOCKED.nbytes(problem.output)
        return Work({SUMS: wasted * self.flops(problem)}, {STREAMED: moved})

    def is_compiled(self, layer: Layer) -> bool:
        return from_few.from_few_kept(_shape(cast("Conv", layer)))

    def prepared_bytes(self, layer: Layer) -> int:
        return sum(map(allocated_bytes, _prepared_bytes(cast("Conv", layer))))

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Memory of what taps reach, padded, and of where planes lie."""
        batch, channels, read, *_ = problem.inputs[0]
        tables = 2 * 8 * batch * (read + problem.output[2])
        return ITEM_BYTES * batch * channels * volume(_reached(problem)) + tables

    def prepare(self, layer: Layer, weights: Weights) -> Prepared:
        """The weights in the order in which they are read."""
        conv = cast("Conv", layer)
        kept, biases = (allocate(n).view(np.float32) for n in _prepared_bytes(conv))
        kept[:], biases[:] = 0, 0
        kernels = kept.reshape(-1, conv.in_channels, *conv.kernel, LANES)
        for first in range(0, conv.out_channels, LANES):
            some = weights["weight"][first : first + LANES]
            kernels[first // LANES, ..., : len(some)] = np.moveaxis(some, 0, -1)
        if conv.bias:
            biases[: conv.out_channels] = weights["bias"]
        return Prepared(kept, biases)

    def apply(
        self, prepared: Prepared, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        if not _inside(problem):
            super().apply(prepared, problem, inputs, out, team)
            return
        x, first = inputs[0], problem.offsets[0]
        begin = sum(n * step for n, step in zip(first, x.strides[2:], strict=True))
        _convolve(prepared, problem, x.ctypes.data + begin, x.strides, Planes.of(out), team)

    def apply_planes(
        self,
        prepared: Prepared,
        problem: Problem,
        inputs: Sequence[Planes],
        out: Planes,
        team: Team,
    ) -> None:
        x = _padded(problem, inputs[0], team)
        _convolve(prepared, problem, x.ctypes.data, x.strides, out, team)


def _convolve(
    prepared: Prepared,
    problem: Problem,
    source: int,
    strides: Sequence[int],
    out: Planes,
    team: Team,
) -> None:
    """Convolve what lies at ``source`` (batch, channel, z, y, x), all that taps reach."""
    conv, (batch, blocks, planes, rows, width, _) = cast("Conv", problem.layer), out.shape
    batch_bytes, channel_bytes, *others = strides
    steps = [stride * step for stride, step in zip(others, conv.stride, strict=True)]
    taps = [stride * step for stride, step in zip(others, conv.dilation, strict=True)]
    made = np.ascontiguousarray(out.addresses)
    told = (
        *(conv.in_channels, channel_bytes, conv.kernel[0], taps[0], taps[1]),
        *(batch_bytes, steps[0], steps[1], out.step_bytes),
        *(blocks, planes, rows, width, ROWS_TOGETHER, int(conv.relu)),
    )
    addresses = source, *(array.ctypes.data for array in (*prepared, made))
    items = batch * planes * ceil_divide(rows, ROWS_TOGETHER) * blocks
    library = from_few.from_few_library(_shape(conv))
    team.run(library[from_few.CONVOLVE], (*addresses, *told), items)


def _shape(conv: Conv) -> from_few.Shape:
    """What its compiled functions are made for."""
    return from_few.Shape(conv.kernel[1], conv.kernel[2], conv.stride[2], conv.dilation[2])


def _prepared_bytes(conv: Conv) -> tuple[int, int]:
    """Memory of the weights and of the biases."""
    bias_bytes = ceil_divide(conv.out_channels, LANES) * VECTOR_BYTES
    return bias_bytes * conv.in_channels * volume(conv.kernel), bias_bytes


def _reached(problem: Problem) -> Size:
    """How far the taps of all outputs reach, from the first tap of the first on."""
    conv = cast("Conv", problem.layer)
    axes = zip(problem.output[2:], conv.stride, conv.kernel, conv.dilation, strict=True)
    return triple((made - 1) * s + (taps - 1) * d + 1 for made, s, taps, d in axes)


def _inside(problem: Problem) -> bool:
    """Whether no tap of any output reaches padding."""
    axes = zip(problem.offsets[0], _reached(problem), problem.inputs[0][2:], strict=True)
    return all(first >= 0 and first + reached <= there for first, reached, there in axes)


def _padded(problem: Problem, x: Planes, team: Team) -> Array:
    """What the taps reach, padding as zeros."""
    batch, channels, *there = x.shape
    size = _reached(problem)
    shape = (batch, channels, *size)
    out = team.scratch(ITEM_BYTES * prod(shape)).view(np.float32).reshape(shape)
    pages = np.ascontiguousarray(x.addresses)
    told = (*there, *problem.offsets[0], *size, channels, x.step_bytes)
    places = pages.ctypes.data, out.ctypes.data
    library = from_few.from_few_library(_shape(cast("Conv", problem.layer)))
    team.run(library[from_few.PAD], (*places, *told), batch * channels * size[0])
    return out
