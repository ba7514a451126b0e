"""Convolution of tiles by Fourier transforms: the compiled stages for one size of tile.

Overlap-save: a tile of (nz, ny, nx) voxels gives (nz - kz + 1, ny - ky + 1, nx - kx + 1) outputs.
Tiles stand in *stacks* along z; those of a stack share their planes. The stages go over ranges of
items that any thread may take, with a buffer of its own:

0. `KERNELS`, once: the spectra of the kernels.
1. `PLANES`: the transforms of planes, along x and y.
2. `COLUMNS`: frequency by frequency of the plane: transforms along z, products with the kernels'
   spectra, transforms back. What it computes stays in the second-level cache.
3. `RESTORE`: transforms of planes back, with bias and activation.

=========  =======================================================  ==========================
array      from outside in                                          elements
=========  =======================================================  ==========================
blocks     plane (by address), y, x                                 16 channels
spectra    frequency of the plane, stack, channel block, plane      pairs of 16 channels
kernels    frequency of the plane and of z, output block, channel   pairs of 16 output channels
answers    stack, output block, plane, frequency of the plane       pairs of 16 output channels
=========  =======================================================  ==========================

A pair is 16 real and 16 imaginary parts. Frequencies of a plane are ordered x, y, so that
`RESTORE`, which begins along y, reads what lies in one stretch. Planes are found through tables of
addresses, so that they may lie anywhere. For every stack five numbers say which rows and columns of
the tile lie inside the plane (first, end, first, end) and where the tile begins in it, in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from llvmlite import ir

from znni_dask.geometry import Size, ceil_divide, triple, volume
from znni_dask.kernels import codelets
from znni_dask.kernels.code import (
    FLOAT_BYTES,
    LANES,
    VECTOR_BYTES,
    Address,
    Function,
    Integer,
    Number,
)
from znni_dask.kernels.compiled import Library, host, is_kept, kept_library
from znni_dask.kernels.complex_product import PAIR_BYTES, TRIPLE_BYTES, Ahead, Product
from znni_dask.kernels.lines import complex_line, gathered_line, real_line, restored_line

STACK_NUMBERS = 5
STACK_BYTES = 8 * STACK_NUMBERS
KERNELS, PLANES, COLUMNS, RESTORE = "kernels", "planes", "columns", "restore"
_KERNELS_AT_ONCE, _KERNELS_BYTES = 8, 640 << 10  # the latter stay in a second-level cache
_PARTS = 8  # of spectra that are remade: each needs the transforms along x again, a small share
_STRIDES = ("block_stride", "row_stride", "stride")


@dataclass(frozen=True)
class Tile:
    """Size of a tile and of the kernel, (z, y, x)."""

    size: Size
    kernel: Size

    @property
    def made(self) -> Size:
        """Outputs of a tile."""
        return triple(n - k + 1 for n, k in zip(self.size, self.kernel, strict=True))

    @property
    def half(self) -> int:
        """Frequencies along x: the others are their conjugates."""
        return self.size[2] // 2 + 1

    @property
    def columns(self) -> int:
        """Frequencies of a plane."""
        return self.size[1] * self.half

    @property
    def kernels_at_once(self) -> int:
        """Channels whose kernels are transformed together: as many as the second-level cache
        holds."""
        return max(1, min(_KERNELS_AT_ONCE, _KERNELS_BYTES // self._kernel_bytes))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Of the frequencies along x as many as kernels' spectra are remade for at once."""
        step = ceil_divide(self.half, _PARTS)
        return [(i, min(i + step, self.half)) for i in range(0, self.half, step)]

    def groups(self, channels: int) -> int:
        """Items of `KERNELS` for an output block."""
        return ceil_divide(channels, self.kernels_at_once)

    @property
    def kernels_buffer_bytes(self) -> int:
        """Memory that a thread needs for `KERNELS`."""
        return self.kernels_at_once * self._kernel_bytes

    @property
    def _kernel_bytes(self) -> int:
        """Of one kernel transformed along x, and of one of its frequencies along y, too."""
        kz, ky, _ = self.kernel
        return (self.half * (kz * ky | 1) + kz * self.size[1]) * PAIR_BYTES

    @property
    def plane_buffer_bytes(self) -> int:
        """Memory that a thread needs for `PLANES` or `RESTORE`: a plane's spectrum and a row."""
        return self.columns * PAIR_BYTES + self.size[2] * VECTOR_BYTES

    def refusal(self) -> str | None:
        """Why there are no such tiles; None where there are."""
        if min(self.made) < 1:
            return f"tiles of {self.size} are smaller than the kernel, {self.kernel}"
        if self.size[2] % 2:
            return f"tiles have an even length along x, not {self.size[2]}"
        return next((r for n in self.size if (r := codelets.refusal(n))), None)


@cache
def stages(tile: Tile, relu: bool) -> Library:
    """The compiled stages for a tile, with or without ReLU after them."""
    return kept_library(stages_module, tile, relu, host().wide)


def stages_kept(tile: Tile, relu: bool) -> bool:
    """Whether they are compiled already."""
    return is_kept(stages_module, tile, relu, host().wide)


def stages_module(tile: Tile, relu: bool, wide: bool) -> ir.Module:
    """The stages as they are written; ``wide`` for processors with 32 long registers."""
    module = ir.Module(f"tile {tile.size} kernel {tile.kernel} relu {relu}")
    _write_kernels(module, tile)
    _write_planes(module, tile)
    _write_columns(module, tile, Product(module, wide))
    _write_restore(module, tile, relu)
    return module


def _write_kernels(module: ir.Module, tile: Tile) -> None:
    """Spectra of kernels, conjugate: a network's convolution is a correlation.

    Items are `kernels_at_once` channels of an output block, or what is left of them, of whose
    spectra the frequencies along x from ``begin`` to ``end`` are made; ``weights`` are those of the
    network, (output channel, channel, z, y, x), of whole output blocks. What several channels
    together write are stretches of memory, which it takes faster than pairs.
    """
    (nz, ny, nx), (kz, ky, kx), half = tile.size, tile.kernel, tile.half
    along_x = gathered_line(module, nx, kx, scale=1 / volume(tile.size))
    along_y = complex_line(module, ny, ky, ny, inverse=True)
    along_z = complex_line(module, nz, kz, nz, inverse=True, streamed=True)
    code = Function(
        module,
        KERNELS,
        ("buffer", "weights", "kernels"),
        ("channels", "blocks", "begin", "end", "first", "last"),
    )
    (buffer, weights, kernels), numbers = code.addresses, code.numbers
    channels, blocks, begin, end, first, last = numbers
    row_bytes, line_bytes = (kz * ky | 1) * PAIR_BYTES, kz * ny * PAIR_BYTES
    taps_bytes = volume(tile.kernel) * FLOAT_BYTES
    rows_bytes, spread = half * row_bytes, blocks * channels * PAIR_BYTES
    lines, at_once = buffer + tile.kernels_at_once * rows_bytes, tile.kernels_at_once
    groups = (channels + (at_once - 1)) // at_once
    with code.loop(first, last) as item:
        some = item % groups * at_once
        count = (channels - some).at_most(at_once)
        taps = weights + (item // groups * (LANES * channels) + some) * taps_bytes
        target = kernels + (item // groups * channels + some) * PAIR_BYTES
        with code.loop(0, count) as channel, code.loop(0, kz * ky) as row:
            source = taps + channel * taps_bytes + row * (kx * FLOAT_BYTES)
            to = buffer + channel * rows_bytes + row * PAIR_BYTES
            code.call(along_x, source, to, channels * taps_bytes, row_bytes)
        with code.loop(begin, end) as q:
            with code.loop(0, count) as channel, code.loop(0, kz) as z:
                source = buffer + channel * rows_bytes + q * row_bytes + z * (ky * PAIR_BYTES)
                to = lines + channel * line_bytes + z * (ny * PAIR_BYTES)
                code.call(along_y, source, to, PAIR_BYTES, PAIR_BYTES)
            with code.loop(0, ny) as y, code.loop(0, count) as channel:
                source = lines + channel * line_bytes + y * PAIR_BYTES
                to = target + ((q - begin) * ny + y) * nz * spread + channel * PAIR_BYTES
                code.call(along_z, source, to, ny * PAIR_BYTES, spread)
    code.finish()


def _write_planes(module: ir.Module, tile: Tile) -> None:
    """Spectra of planes. Items are (stack, channel block, plane); ``table`` holds for every
    (stack, plane) its address, 0 where it is all padding."""
    (_, ny, nx), half, columns = tile.size, tile.half, tile.columns
    along_x = real_line(module, nx, nx)
    along_y = complex_line(module, ny, ny, ny, streamed=True)
    code = Function(
        module,
        PLANES,
        ("buffer", "table", "stacks", "spectra"),
        ("blocks", "planes", *_STRIDES, "column_stride", "first", "last"),
    )
    buffer, table, stacks, spectra = code.addresses
    blocks, planes, block_stride, row_stride, stride, column_stride, first, last = code.numbers
    row_bytes, padded = half * PAIR_BYTES, buffer + columns * PAIR_BYTES
    with code.loop(first, last) as item:
        target = spectra + item * PAIR_BYTES
        stack, block = item // (blocks * planes), item // planes % blocks
        place = Place.of(table, stacks, stack, item % planes, planes)
        with code.when(place.address.equals(0)), code.loop(0, columns) as q:
            for shift in (0, VECTOR_BYTES):
                (target + q * column_stride).store(code.vector(), shift)
        with code.when(place.address.differs(0)):
            corner = place.corner + block * block_stride
            for rows in ((0, place.top), (place.bottom, ny)):
                with code.loop(*rows) as y:
                    _clear(code, buffer + y * row_bytes, 2 * half)
            with code.when(place.width.equals(nx)), code.loop(place.top, place.bottom) as y:
                row, to = corner + y * row_stride, buffer + y * row_bytes
                code.call(along_x, row, to, stride, PAIR_BYTES)
            with code.when(place.width < nx):
                _clear(code, padded, nx)
                with code.loop(place.top, place.bottom) as y:
                    row, to = corner + y * row_stride, buffer + y * row_bytes
                    with code.loop(place.left, place.right) as x:
                        padded.store((row + x * stride).load(), x * VECTOR_BYTES)
                    code.call(along_x, padded, to, VECTOR_BYTES, PAIR_BYTES)
            with code.loop(0, half) as q:
                line, to = buffer + q * PAIR_BYTES, target + q * ny * column_stride
                code.call(along_y, line, to, row_bytes, column_stride)
    code.finish()


def _write_columns(module: ir.Module, tile: Tile, product: Product) -> None:
    """From spectra to answers. Items are frequencies of the plane. The thread's buffer holds what
    goes into the products and what comes out: frequency of z, tile (stack by stack), channel
    block. What comes out of a frequency of z takes the place of what went into the one before, so
    that little more than one of both must stay in the cache."""
    nz, made = tile.size[0], tile.made[0]
    there = complex_line(module, nz, nz, nz, sums=True)
    back = complex_line(module, nz, nz, made, inverse=True, streamed=True)
    code = Function(
        module,
        COLUMNS,
        ("buffer", "spectra", "kernels", "answers"),
        (
            *("stacks", "tiles", "blocks", "channels", "made_blocks", "planes"),
            *("column_stride", "slot_stride", "answer_stride"),
            *("first", "last"),
        ),
    )
    after, spectra, kernels, answers = code.addresses
    stacks, tiles, blocks, channels, made_blocks, planes, *numbers = code.numbers
    column_stride, slot_stride, answer_stride, first, last = numbers
    rows, row_bytes = stacks * tiles, blocks * TRIPLE_BYTES
    made_row_bytes, before = made_blocks * PAIR_BYTES, after + slot_stride
    with code.loop(first, last) as q:
        source = spectra + q * column_stride
        with _each_tile(code, stacks, blocks, tiles) as (line, row, block, t):
            begin = source + (line * planes + t * made) * PAIR_BYTES
            to = before + row * row_bytes + block * TRIPLE_BYTES
            code.call(there, begin, to, PAIR_BYTES, slot_stride)
        kernel_bytes, turns = channels * PAIR_BYTES, product.turns(rows, made_blocks)
        soon = kernel_bytes * (product.blocks_at_once + 1)
        kernel_lines, column_lines = (
            n // VECTOR_BYTES // turns + 1
            for n in (kernel_bytes * made_blocks, column_stride // nz)
        )
        with code.loop(0, nz) as z:
            kernel = kernels + (q * nz + z) * made_blocks * kernel_bytes
            column = source + column_stride + z * turns * column_lines * VECTOR_BYTES
            product.write(
                code,
                (before + z * slot_stride, kernel, after + z * slot_stride),
                rows,
                made_blocks,
                (row_bytes, made_row_bytes),
                channels,
                (Ahead(kernel + soon, kernel_lines), Ahead(column, column_lines)),
            )
        with _each_tile(code, stacks, made_blocks, tiles) as (line, row, block, t):
            begin = after + row * made_row_bytes + block * PAIR_BYTES
            to = answers + (line * tiles + t) * made * answer_stride + q * PAIR_BYTES
            code.call(back, begin, to, slot_stride, answer_stride)
    code.finish()


def _write_restore(module: ir.Module, tile: Tile, relu: bool) -> None:
    """Planes from answers. Items are (stack, output block, plane); ``table`` holds for every
    (stack, plane) where it goes, 0 where it is not wanted. While one is computed the next is
    fetched, little by little: a burst would not be taken."""
    (_, ny, nx), (_, my, mx), half = tile.size, tile.made, tile.half
    along_y = complex_line(module, ny, ny, my, inverse=True)
    along_x, along_x_aside = (
        restored_line(module, nx, mx, relu=relu, streamed=streamed) for streamed in (True, False)
    )
    code = Function(
        module,
        RESTORE,
        ("buffer", "table", "stacks", "answers", "biases"),
        ("blocks", "planes", *_STRIDES, "answer_stride", "first", "last"),
    )
    buffer, table, stacks, answers, biases = code.addresses
    blocks, planes, block_stride, row_stride, stride, answer_stride, first, last = code.numbers
    row_bytes, aside = half * PAIR_BYTES, buffer + tile.columns * PAIR_BYTES
    share = 2 * tile.columns // (half + my) + 1  # of the next plane's cache lines, with every line
    with code.loop(first, last) as item:
        stack, block = item // (blocks * planes), item // planes % blocks
        place = Place.of(table, stacks, stack, item % planes, planes)
        with code.when(place.address.differs(0)):
            corner = place.corner + block * block_stride
            bias = biases + block * VECTOR_BYTES
            source = answers + item * answer_stride
            ahead = Ahead(source + answer_stride, code.number(share))
            with code.loop(0, half) as q:
                line, to = source + q * (ny * PAIR_BYTES), buffer + q * PAIR_BYTES
                ahead.fetch(code, q)
                code.call(along_y, line, to, PAIR_BYTES, row_bytes)
            with code.when(place.width.equals(mx)), code.loop(place.top, place.bottom) as y:
                row = corner + y * row_stride
                ahead.fetch(code, y + half)
                code.call(along_x, buffer + y * row_bytes, row, bias, stride)
            with code.when(place.width < mx), code.loop(place.top, place.bottom) as y:
                row = corner + y * row_stride
                code.call(along_x_aside, buffer + y * row_bytes, aside, bias, VECTOR_BYTES)
                with code.loop(place.left, place.right) as x:
                    (row + x * stride).store(aside.load(x * VECTOR_BYTES), streamed=True)
    code.finish()


class Place(NamedTuple):
    """Where a plane of a stack lies, and what of it counts."""

    address: Number
    corner: Address
    top: Number
    bottom: Number
    left: Number
    right: Number

    @classmethod
    def of(
        cls, table: Address, stacks: Address, stack: Number, plane: Number, planes: Number
    ) -> Place:
        """As the tables tell, of stacks of so many planes."""
        entry = (stack * planes + plane) * 8
        told = stacks + stack * STACK_BYTES
        top, bottom, left, right, begin = (told.number(8 * i) for i in range(STACK_NUMBERS))
        address, corner = table.number(entry), table.address(entry) + begin
        return cls(address, corner, top, bottom, left, right)

    @property
    def width(self) -> Number:
        """Voxels of a row that count."""
        return self.right - self.left

    @property
    def height(self) -> Number:
        """Rows that count."""
        return self.bottom - self.top


@contextmanager
def _each_tile(
    code: Function, stacks: Number, blocks: Number, tiles: Number
) -> Iterator[tuple[Number, Number, Number, Number]]:
    """All tiles of all stacks and channel blocks: the line of tiles that they are in, their row of
    a matrix, the block, the tile of its stack."""
    with code.loop(0, stacks) as stack, code.loop(0, blocks) as block, code.loop(0, tiles) as t:
        yield stack * blocks + block, stack * tiles + t, block, t


def _clear(code: Function, target: Address, vectors: Integer) -> None:
    with code.loop(0, vectors) as i:
        target.store(code.vector(), i * VECTOR_BYTES)
