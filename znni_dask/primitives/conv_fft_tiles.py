"""Convolution by Fourier transforms of small tiles, whose product stays in the caches.

Overlap-save with tiles of some 8 to 48 voxels along each axis (Zlateski et al. 2016, section
IV.B, have one tile as large as the image). Tiles stand in stacks along z, and stacks are computed
in batches: as many tiles at once as make the products with the kernels' spectra fast. A dilated
convolution is one of every `dilation`-th voxel, for each offset; one with a stride is one without
of more channels (`primitives.phases`).

The kernels' spectra, up to a gigabyte a layer, are prepared once and kept, or made anew for every
batch, for some frequencies at a time: slower, within a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.geometry import Size, ceil_divide, round_up, triple, volume
from znni_dask.kernels import tiles
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.codelets import operations
from znni_dask.kernels.complex_product import PAIR_BYTES, TRIPLE_BYTES
from znni_dask.kernels.memory import Bytes, allocate, allocated_bytes, odd_lines
from znni_dask.kernels.team import Each, Team
from znni_dask.kernels.tiles import Tile
from znni_dask.network.layers import ONES, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import Array, Form, Problem
from znni_dask.primitives.phases import (
    problem_without_stride,
    split_input,
    split_weights,
    without_stride,
)
from znni_dask.primitives.planes import OfPlanes, Planes
from znni_dask.primitives.stacks import Stacks, stacks_of
from znni_dask.primitives.work import MEMORY, Rate, Work

TRANSFORMS = Rate("transforms of tiles", 8e10)  # operations
PRODUCTS = Rate("products of transforms", 2.6e11)  # operations
_NAME, _REMADE = "tiled fft ", ", spectra remade"
TILES_AT_ONCE = 64  # rows of the matrices that are multiplied


class Prepared(NamedTuple):
    """What is prepared: spectra of the kernels, or where they are remade their taps (output
    channel, channel, z, y, x), of whole blocks; biases in blocks."""

    kernels: Bytes
    biases: Array


@final
@dataclass(frozen=True)
class ConvTiledFFT(OfPlanes):
    """Convolution in tiles of ``tile`` voxels (z, y, x) on the CPU; the tile is part of its name,
    and whether the kernels' spectra are ``remade`` for every batch.

    Takes any kernel, stride, dilation and padding; no groups.
    """

    tile: Size
    remade: bool = False
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = "no groups or whole window"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Like ``tiled fft 16·24·24`` or ``tiled fft 16·24·24, spectra remade``."""
        return f"{_NAME}{'·'.join(map(str, self.tile))}{_REMADE if self.remade else ''}"

    @classmethod
    def of(cls, name: str) -> ConvTiledFFT | None:
        """The primitive of a name; None where it is another's."""
        lengths = name.removeprefix(_NAME).removesuffix(_REMADE).split("·")
        if not name.startswith(_NAME) or len(lengths) != 3 or not all(map(str.isdecimal, lengths)):
            return None
        return cls(triple(int(length) for length in lengths), name.endswith(_REMADE))

    @property
    def family(self) -> str:
        """All of them."""
        return _NAME.strip()

    def features(self, problem: Problem) -> tuple[float, ...]:
        return *super().features(problem), log2(volume(self.tile))

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.groups == 1 and not conv.whole

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        return Tile(self.tile, without_stride(cast("Conv", layer)).kernel).refusal()

    def takes_planes(self, layer: Layer, form: Form) -> bool:
        return cast("Conv", layer).stride == ONES

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.BLOCKED if cast("Conv", layer).stride == ONES else None, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        return self.work(problem, threads=1).amount(TRANSFORMS, PRODUCTS)

    def work(self, problem: Problem, threads: int) -> Work:
        """Operations of transforms (half as many of real numbers) and of products (8), and what
        goes to and from memory."""
        split = _split_bytes(problem)
        problem = problem_without_stride(problem)
        conv, tile, stacks = _conv(problem), self._tile(problem), self._stacks(problem)
        blocks, made_blocks = _blocks(conv)
        line = [operations(n) for n in tile.size]
        plane = tile.size[1] * line[2] / 2 + tile.half * line[1]
        column = tile.columns * line[0]
        rows = stacks.count * stacks.tiles
        read, made = stacks.count * blocks * stacks.planes, rows * made_blocks * tile.made[0]
        lines = rows * (blocks + made_blocks)
        transforms = LANES * ((read + made) * plane + lines * column)
        products = 8 * rows * tile.columns * tile.size[0] * conv.in_channels * LANES * made_blocks
        spectrum, real = tile.columns * PAIR_BYTES, tile.size[1] * tile.size[2] * VECTOR_BYTES
        batches = ceil_divide(stacks.count, stacks.batch)
        kernels = self._kernels_bytes(conv)
        traffic = (read + made) * (2 * spectrum + real) + batches * kernels + 2 * split
        if self.remade:
            kz, ky, _ = conv.kernel
            along_x = len(tile.parts) * kz * ky * line[2] / 2
            pruned = along_x + kz * tile.half * line[1] + column
            transforms += batches * made_blocks * conv.in_channels * LANES * pruned
            traffic += batches * kernels
        return Work({TRANSFORMS: transforms, PRODUCTS: products, MEMORY: traffic})

    def is_compiled(self, layer: Layer) -> bool:
        conv = without_stride(cast("Conv", layer))
        return tiles.stages_kept(Tile(self.tile, conv.kernel), conv.relu)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = without_stride(cast("Conv", layer))
        _, made_blocks = _blocks(conv)
        taps = allocated_bytes(made_blocks * conv.in_channels * volume(conv.kernel) * VECTOR_BYTES)
        biases = allocated_bytes(made_blocks * VECTOR_BYTES)
        if self.remade:
            return taps + biases
        buffer = allocated_bytes(Tile(self.tile, conv.kernel).kernels_buffer_bytes)
        return allocated_bytes(self._kernels_bytes(conv)) + biases + taps + buffer

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        split = _split_bytes(problem)
        problem = problem_without_stride(problem)
        need = self._need(_conv(problem), self._stacks(problem), threads)
        return split + need.nbytes + need.table_bytes

    def prepare(self, layer: Layer, weights: Weights) -> Prepared:
        """Spectra of the kernels, where they are kept. One thread takes little longer than to write
        as many bytes."""
        conv = without_stride(cast("Conv", layer))
        tile = Tile(self.tile, conv.kernel)
        _, made_blocks = _blocks(conv)
        taps = _taps(cast("Conv", layer), weights["weight"])
        biases = allocate(made_blocks * VECTOR_BYTES).view(np.float32)
        biases[:] = 0
        if conv.bias:
            biases[: conv.out_channels] = weights["bias"]
        if self.remade:
            return Prepared(taps.reshape(-1).view(np.uint8), biases)
        kernels = allocate(self._kernels_bytes(conv))
        buffer = allocate(tile.kernels_buffer_bytes)
        tiles.stages(tile, conv.relu)[tiles.KERNELS](
            *(array.ctypes.data for array in (buffer, taps, kernels)),
            *(conv.in_channels, made_blocks, 0, tile.half),
            *(0, made_blocks * tile.groups(conv.in_channels)),
        )
        return Prepared(kernels, biases)

    def apply(
        self, prepared: Prepared, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        x, split = inputs[0], _split_bytes(problem)
        if split:
            dense = problem_without_stride(problem)
            need = self._need(_conv(dense), self._stacks(dense), team.threads)
            scratch, shape = team.scratch(split + need.nbytes), dense.inputs[0]
            x = scratch[:split].view(np.float32).reshape(Form.BLOCKED.stored(shape))
            split_input(problem, inputs[0], x, team)
        self.apply_planes(prepared, problem, [Planes.of(x)], Planes.of(out), team)

    def apply_planes(
        self,
        prepared: Prepared,
        problem: Problem,
        inputs: Sequence[Planes],
        out: Planes,
        team: Team,
    ) -> None:
        """Of a strided problem the input is that without stride, at the beginning of the scratch
        memory."""
        (x,), split = inputs, _split_bytes(problem)
        problem = problem_without_stride(problem)
        conv, tile, stacks = _conv(problem), self._tile(problem), self._stacks(problem)
        blocks, made_blocks = _blocks(conv)
        need = self._need(conv, stacks, team.threads)
        scratch = team.scratch(split + need.nbytes)
        spectra, answers, remade, buffers = need.places(scratch[split:].ctypes.data)
        own = Each(buffers, need.thread_bytes)
        kernels, lines = (
            prepared.kernels.ctypes.data,
            tile.size[1],
        )  # columns of a frequency along x
        parts = tile.parts if self.remade else [(0, tile.half)]
        compiled = tiles.stages(tile, conv.relu)

        def share(stage: str, items: int, *fixed: int) -> None:
            team.run(compiled[stage], (own, *fixed), items)

        for here, there in zip(stacks.of_input(x), stacks.of_output(out), strict=True):
            share(
                tiles.PLANES,
                here.stacked * blocks * stacks.planes,
                *(*here.addresses, spectra, blocks, stacks.planes),
                *(*here.strides, need.column_stride),
            )
            for begin, end in parts:
                if self.remade:
                    items = made_blocks * tile.groups(conv.in_channels)
                    fixed = (kernels, remade, conv.in_channels, made_blocks, begin, end)
                    share(tiles.KERNELS, items, *fixed)
                share(
                    tiles.COLUMNS,
                    (end - begin) * lines,
                    spectra + begin * lines * need.column_stride,
                    remade if self.remade else kernels,
                    answers + begin * lines * PAIR_BYTES,
                    *(here.stacked, stacks.tiles, blocks, conv.in_channels, made_blocks),
                    *(stacks.planes, need.column_stride, need.slot_stride, need.answer_stride),
                )
            share(
                tiles.RESTORE,
                here.stacked * made_blocks * stacks.planes_made,
                *(*there.addresses, answers, prepared.biases.ctypes.data),
                *(made_blocks, stacks.planes_made, *there.strides, need.answer_stride),
            )

    def _tile(self, problem: Problem) -> Tile:
        return Tile(self.tile, _conv(problem).kernel)

    def _stacks(self, problem: Problem) -> Stacks:
        conv = _conv(problem)
        return stacks_of(problem, self._tile(problem), conv.dilation, TILES_AT_ONCE)

    def _need(self, conv: Conv, stacks: Stacks, threads: int) -> _Workspace:
        return _Workspace.of(conv, stacks, threads, self._remade_bytes(conv))

    def _remade_bytes(self, conv: Conv) -> int:
        """Spectra of the kernels for some frequencies."""
        if not self.remade:
            return 0
        tile = Tile(self.tile, conv.kernel)
        part = max(end - begin for begin, end in tile.parts)
        return part * self._kernels_bytes(conv) // tile.half

    def _kernels_bytes(self, conv: Conv) -> int:
        """Spectra of all kernels."""
        columns, (_, made_blocks) = Tile(self.tile, conv.kernel).columns, _blocks(conv)
        return columns * self.tile[0] * made_blocks * conv.in_channels * PAIR_BYTES


@dataclass(frozen=True)
class _Workspace:
    """What a batch of stacks is computed in, and the strides there. Strides are odd numbers of
    cache lines, lest what is read together falls on the same lines of a cache."""

    column_stride: int
    answer_stride: int
    slot_stride: int
    spectra_bytes: int
    answers_bytes: int
    remade_bytes: int
    thread_bytes: int
    threads: int
    table_bytes: int

    @classmethod
    def of(cls, conv: Conv, stacks: Stacks, threads: int, remade_bytes: int) -> _Workspace:
        """With ``remade_bytes`` for spectra of kernels."""
        tile, (blocks, made_blocks) = stacks.tile, _blocks(conv)
        rows = stacks.batch * stacks.tiles
        column_stride = odd_lines(stacks.batch * blocks * stacks.planes * PAIR_BYTES)
        answer_stride = odd_lines(tile.columns * PAIR_BYTES)
        slot = odd_lines(rows * max(blocks * TRIPLE_BYTES, made_blocks * PAIR_BYTES))
        thread_bytes = max(tile.plane_buffer_bytes, (tile.size[0] + 1) * slot)
        if remade_bytes:
            thread_bytes = max(thread_bytes, tile.kernels_buffer_bytes)
        return cls(
            column_stride=column_stride,
            answer_stride=answer_stride,
            slot_stride=slot,
            spectra_bytes=tile.columns * column_stride,
            answers_bytes=stacks.batch * made_blocks * stacks.planes_made * answer_stride,
            remade_bytes=remade_bytes,
            thread_bytes=round_up(thread_bytes, VECTOR_BYTES),
            threads=threads,
            table_bytes=stacks.table_bytes,
        )

    @property
    def nbytes(self) -> int:
        """Scratch memory."""
        return self._shared_bytes + self.threads * self.thread_bytes

    @property
    def _shared_bytes(self) -> int:
        return self.spectra_bytes + self.answers_bytes + self.remade_bytes

    def places(self, start: int) -> list[int]:
        """Where spectra, answers, remade spectra of kernels and the threads' buffers lie, from the
        address ``start`` on."""
        answers = start + self.spectra_bytes
        return [start, answers, answers + self.answers_bytes, start + self._shared_bytes]


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)


def _split_bytes(problem: Problem) -> int:
    """Memory of the phases of a strided problem's input."""
    if _conv(problem).stride == ONES:
        return 0
    return Form.BLOCKED.nbytes(problem_without_stride(problem).inputs[0])


def _blocks(conv: Conv) -> tuple[int, int]:
    """Blocks of input and of output channels."""
    return ceil_divide(conv.in_channels, LANES), ceil_divide(conv.out_channels, LANES)


def _taps(conv: Conv, weight: Array) -> Array:
    """Weights of the convolution without stride, of whole blocks of output channels."""
    dense, (_, made_blocks) = without_stride(conv), _blocks(conv)
    if dense is conv and conv.out_channels == made_blocks * LANES:
        return np.require(weight, np.float32, ("C", "A"))
    taps = np.zeros((made_blocks * LANES, dense.in_channels, *dense.kernel), np.float32)
    split_weights(conv, weight, taps[: conv.out_channels])
    return taps
