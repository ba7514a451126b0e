"""Direct convolution into blocks of channels, row by row, sums in registers.

For what transforms are not for: few input channels, kernels of one voxel, strides. The input may
be in either form.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar, NamedTuple, cast, final

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size, ceil_divide, volume
from znni_dask.kernels import rows
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import allocate, allocated_bytes
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem

_ITEMS = 256  # rows of outputs whose tables are made at once


class Prepared(NamedTuple):
    """Weights of every group of output blocks, for either form of the input; biases in blocks."""

    weights: dict[Form, list[Array]]
    biases: Array


@final
class ConvDirectBlocked(Primitive):
    """Direct convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct blocked"
    layer: ClassVar[type[Layer]] = Conv

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        conv = cast("Conv", layer)
        if conv.groups != 1 or conv.whole:
            return f"{self.name} takes no groups or whole window, not {conv.summary}"
        return None

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        batch, _, z, y, x = problem.output
        return int(2 * problem.layer.multiply_adds() * batch * z * y * x)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        made = sum(_parts(conv)) * LANES
        weights = made * conv.in_channels * volume(conv.kernel) * ITEM_BYTES
        return 3 * allocated_bytes(weights) + ITEM_BYTES * made  # for either form, and while made

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        conv = _conv(problem)
        rows_of_item = conv.in_channels * conv.kernel[0] * conv.kernel[1]
        tables = threads * _ITEMS * (rows_of_item + 8) * 8 * 4  # and what they are made of
        return tables + _Padded.of(problem, Form.BLOCKED).nbytes

    def prepare(self, layer: Layer, weights: Weights) -> Prepared:
        """Weights in the order in which they are read."""
        conv = cast("Conv", layer)
        parts = _parts(conv)
        channels, (kz, ky, kx) = conv.in_channels, conv.kernel
        padded = np.zeros((sum(parts) * LANES, channels, kz, ky, kx), np.float32)
        padded[: conv.out_channels] = weights["weight"]
        biases = allocate(padded.shape[0] * ITEM_BYTES).view(np.float32)
        biases[:] = 0
        if conv.bias:
            biases[: conv.out_channels] = weights["bias"]
        found: dict[Form, list[Array]] = {Form.PLAIN: [], Form.BLOCKED: []}
        for form, ordered in found.items():
            wide = 1 if form is Form.PLAIN else LANES
            begin = 0
            for blocks in parts:
                part = padded[begin : begin + blocks * LANES]
                begin += blocks * LANES
                pieces = [
                    # (output, channel, z, y, x) → z, y, x, channel, output
                    np.ravel(part[:, first : first + wide].transpose(2, 3, 4, 1, 0))
                    for first in range(0, channels, wide)
                ]
                kept = allocate(part.nbytes).view(np.float32)
                np.concatenate(pieces, out=kept)
                ordered.append(kept)
        return Prepared(found, biases)

    def apply(
        self, prepared: Prepared, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        conv = _conv(problem)
        form = Form.PLAIN if inputs[0].ndim == 5 else Form.BLOCKED
        padded = _Padded.of(problem, form)
        x, offset, zeros = padded.fill(inputs[0], team)
        numbers = _row_numbers(conv, form)
        item_bytes = ITEM_BYTES if form is Form.PLAIN else VECTOR_BYTES
        fixed = (*numbers, conv.kernel[2], conv.dilation[2] * item_bytes)
        shape = (problem.output[0], *problem.output[2:4])
        batch_stride, block_stride, z_stride, y_stride = out.strides[:4]
        tail = (conv.stride[2] * item_bytes, problem.output[4], block_stride)

        def work(first: int, last: int) -> None:
            for begin in range(first, last, _ITEMS):
                items = np.arange(begin, min(begin + _ITEMS, last))
                batch, z, y = np.unravel_index(items, shape)
                table = _input_rows(conv, x, offset, zeros, (batch, z, y))
                places = out.ctypes.data + batch * batch_stride + z * z_stride + y * y_stride
                block = 0
                for weights, blocks in zip(prepared.weights[form], _parts(conv), strict=True):
                    there = places + block * block_stride
                    rows.rows_library(blocks, conv.relu)[rows.CONVOLVE](
                        *(a.ctypes.data for a in (table, there, weights)),
                        prepared.biases[block * LANES :].ctypes.data,
                        *(*fixed, *tail, 0, len(items)),
                    )
                    block += blocks

        team.share(work, prod(shape))


class _Padded(NamedTuple):
    """The input with its padding along x, where there is any, and a row of zeros for padding
    along y and z: how many voxels the rows have that outputs read."""

    shape: tuple[int, ...]
    needed: bool
    offset: Size

    @classmethod
    def of(cls, problem: Problem, form: Form) -> _Padded:
        conv = _conv(problem)
        oz, oy, ox = problem.offsets[0]
        width = problem.inputs[0][4]
        length = (problem.output[4] - 1) * conv.stride[2] + conv.window(2).extent
        inside = ox >= 0 and ox + length <= width
        batch, channels, z, y, _ = problem.inputs[0]
        shape = form.stored((batch, channels, z, y, length))
        return cls(shape, not inside, (oz, oy, ox))

    @property
    def row_bytes(self) -> int:
        """A row of zeros."""
        return ITEM_BYTES * prod(self.shape[4:])

    @property
    def nbytes(self) -> int:
        """Scratch memory."""
        return self.row_bytes + (ITEM_BYTES * prod(self.shape) if self.needed else 0)

    def fill(self, x: Array, team: Team) -> tuple[Array, Size, Array]:
        """The input to read, where its first tap lies, and the row of zeros."""
        memory = team.scratch(self.nbytes).view(np.float32)
        zeros = memory[: prod(self.shape[4:])]
        zeros[:] = 0
        if not self.needed:
            return x, self.offset, zeros
        padded = memory[zeros.size :].reshape(self.shape)
        oz, oy, ox = self.offset
        low, width = max(0, -ox), x.shape[4]
        count = max(0, min(width - max(ox, 0), self.shape[4] - low))

        def work(first: int, last: int) -> None:
            for item in range(first, last):
                at = divmod(item, x.shape[1])
                padded[at][:, :, :low] = 0
                padded[at][:, :, low : low + count] = x[at][:, :, max(ox, 0) : max(ox, 0) + count]
                padded[at][:, :, low + count :] = 0

        team.share(work, x.shape[0] * x.shape[1])
        return padded, (oz, oy, 0), zeros


def _input_rows(
    conv: Conv,
    x: Array,
    offset: Size,
    zeros: Array,
    items: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]],
) -> NDArray[np.int64]:
    """For every item (batch, z, y of the output) the addresses of the rows that it reads:
    channel or block of them, tap along z, tap along y."""
    batch, z, y = items
    iz = z[:, None] * conv.stride[0] + np.arange(conv.kernel[0]) * conv.dilation[0] + offset[0]
    iy = y[:, None] * conv.stride[1] + np.arange(conv.kernel[1]) * conv.dilation[1] + offset[1]
    batch_stride, block_stride, z_stride, y_stride, x_stride = x.strides[:5]
    inside = ((iz >= 0) & (iz < x.shape[2]))[:, :, None] & ((iy >= 0) & (iy < x.shape[3]))[:, None]
    plane = (iz * z_stride)[:, :, None] + (iy * y_stride)[:, None]
    start = x.ctypes.data + offset[2] * x_stride + batch * batch_stride
    blocks = np.arange(x.shape[1]) * block_stride
    place = start[:, None, None, None] + blocks[:, None, None] + plane[:, None]
    return np.where(inside[:, None], place, zeros.ctypes.data).astype(np.int64)


def _row_numbers(conv: Conv, form: Form) -> tuple[int, int, int, int]:
    """Rows of whole blocks and their channels, rows of the last block and theirs."""
    lines = conv.kernel[0] * conv.kernel[1]
    if form is Form.PLAIN:
        return conv.in_channels * lines, 1, 0, 1
    full, rest = divmod(conv.in_channels, LANES)
    return full * lines, LANES, lines if rest else 0, max(rest, 1)


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)


def _parts(conv: Conv) -> list[int]:
    """Output blocks, in parts that are computed at once, as equal as may be."""
    blocks = ceil_divide(conv.out_channels, LANES)
    parts = ceil_divide(blocks, rows.most_blocks())
    return [blocks * (i + 1) // parts - blocks * i // parts for i in range(parts)]
