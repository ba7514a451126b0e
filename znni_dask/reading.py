"""What the blocks of a run read of the volume, and in which order they share it best.

Arithmetic on whole numbers only. What a block reads is a box whose sides depend on one axis each,
so everything that counts is a sum along an axis, and totals are products of three. Blocks are made
column by column; within a column every chunk is decoded once, if there is memory for what later
blocks of the column read again. Columns across the whole volume decode every chunk once; narrow
ones decode more and keep less. Where blocks behind one another along an axis are made in one go,
these are the columns along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, permutations, product
from math import prod
from typing import Protocol

from znni_dask.geometry import Box, Size, add, ceil_divide, multiply, triple, volume
from znni_dask.network.field_of_view import Interval
from znni_dask.patches import source_box
from znni_dask.plan import Reading
from znni_dask.storage.cells import Cells

_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of columns, in blocks


class Laid(Protocol):
    """How an answer lies over a volume: `patches.Layout`, `windows.WindowGrid`."""

    @property
    def size(self) -> Size:
        """Size of the volume."""

    @property
    def boundary(self) -> str:
        """How the volume is extended."""

    @property
    def output_size(self) -> Size:
        """Size of the answer."""

    def reach(self, axis: int, start: int, stop: int) -> Interval:
        """The stretch of the volume behind outputs ``[start, stop)`` along an axis."""


@dataclass(frozen=True)
class Order:
    """The order of ``blocks`` blocks (z, y, x): every block's turn, counted from 0.

    >>> order = Order((1, 2, 4), axes=(0, 2, 1), column=(1, 2, 3))
    >>> [place[1:] for place in order]
    [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    >>> all(order.turn(place) == turn for turn, place in enumerate(order))
    True
    """

    blocks: Size
    axes: Size
    column: Size

    def __iter__(self) -> Iterator[Size]:
        firsts = [range(0, self.blocks[axis], self.column[axis]) for axis in self.axes]
        for corner in product(*firsts):
            within = [
                range(first, min(first + self.column[axis], self.blocks[axis]))
                for first, axis in zip(corner, self.axes, strict=True)
            ]
            for place in product(*within):
                yield self._back(place)

    def turn(self, place: Size) -> int:
        """When a block is made."""
        firsts = [place[a] // self.column[a] * self.column[a] for a in self.axes]
        widths = [
            min(self.column[a], self.blocks[a] - first)
            for a, first in zip(self.axes, firsts, strict=True)
        ]
        before, inside, across, beyond = 0, 0, 1, volume(self.blocks)
        for axis, first, width in zip(self.axes, firsts, widths, strict=True):
            beyond //= self.blocks[axis]
            before += across * first * beyond
            across *= width
            inside = inside * width + place[axis] - first
        return before + inside

    def _back(self, place: tuple[int, ...]) -> Size:
        z, y, x = (place[self.axes.index(axis)] for axis in range(3))
        return z, y, x


@dataclass(frozen=True)
class _Columns:
    """Columns of ``width`` blocks along an axis. In voxels along it: what all of them decode
    together, the most that one does and that a block does, and what neighbouring blocks share."""

    width: int
    decoded: int
    widest: int
    block: int
    lap: int


@dataclass(frozen=True, eq=False)
class Reads:
    """What blocks of a size read, along every axis: those of the answer that touch ``within``, all
    where that is None. ``cells`` as of the volume, None without. Of ``in_column`` blocks behind one
    another along ``axis`` all but the first read only what comes new."""

    laid: Laid
    block: Size
    cells: Cells | None
    within: Box | None = None
    in_column: int = 1
    axis: int = 0

    @cached_property
    def _numbers(self) -> list[range]:
        """Along every axis the blocks, counted from the answer's first."""
        within = self.within or Box((0, 0, 0), self.laid.output_size)
        return [
            range(a // b, ceil_divide(e, b))
            for a, e, b in zip(within.start, within.stop, self.block, strict=True)
        ]

    @property
    def blocks(self) -> Size:
        """Number of blocks along every axis."""
        return triple(map(len, self._numbers))

    def order(self, reading: Reading) -> Order:
        """The order that a plan says."""
        return Order(self.blocks, reading.axes, reading.column)

    def box(self, place: Size) -> Box:
        """A block, in voxels of the answer."""
        first = triple(numbers.start for numbers in self._numbers)
        start = multiply(add(first, place), self.block)
        stop = (a + b for a, b in zip(start, self.block, strict=True))
        return Box(start, triple(stop)).clipped(self.laid.output_size)

    def column(self, block: Box) -> Box:
        """The column of a block: the blocks that are made in one go, as one."""
        first, last = list(self.place(block)), list(self.place(block))
        first[self.axis] -= first[self.axis] % self.in_column
        last[self.axis] = min(first[self.axis] + self.in_column, self.blocks[self.axis]) - 1
        return Box(self.box(triple(first)).start, self.box(triple(last)).stop)

    def place(self, block: Box) -> Size:
        """Which block a box of the answer is."""
        found = zip(block.start, self.block, self._numbers, strict=True)
        return triple(a // b - numbers.start for a, b, numbers in found)

    @cached_property
    def spans(self) -> list[list[Interval]]:
        """Along every axis the voxels of the volume that each block reads."""
        return [
            [self._span(axis, i * b, min((i + 1) * b, n)) for i in self._numbers[axis]]
            for axis, (n, b) in enumerate(zip(self.laid.output_size, self.block, strict=True))
        ]

    def _span(self, axis: int, start: int, stop: int) -> Interval:
        first, last = self.laid.reach(axis, start, stop)
        number = start // self.block[axis] - self._numbers[axis].start
        if axis == self.axis and number % self.in_column:
            first = max(first, self.laid.reach(axis, start - self.block[axis], start)[1])
        n = self.laid.size[axis]
        inside = source_box(Box((first, 0, 0), (last, 1, 1)), (n, 1, 1), self.laid.boundary)
        return (inside.start[0], inside.stop[0]) if inside else (0, 0)

    def needed_voxels(self, place: Size, region: Box) -> int:
        """The voxels of a block's ``region`` that no block before it reads along any axis: over
        all blocks every voxel that is needed counts once."""
        read = source_box(region, self.laid.size, self.laid.boundary)
        own = [self._owned[axis][i] for axis, i in enumerate(place)]
        box = Box(triple(a for a, _ in own), triple(b for _, b in own))
        shared = read and box.shared(read)
        return shared.voxels if shared else 0

    @cached_property
    def _owned(self) -> list[list[Interval]]:
        """Along every axis the part of each block's stretch that is no block's before it."""
        found = []
        for spans in self.spans:
            high, own = 0, []
            for start, stop in spans:
                own.append((max(start, high), max(stop, start, high)))
                high = max(high, stop)
            found.append(own)
        return found

    def users(self, cell: Size) -> Iterator[Size]:
        """The blocks that read a cell."""
        along = [self._users[axis].get(i, []) for axis, i in enumerate(cell)]
        return map(triple, product(*along))

    @cached_property
    def _users(self) -> list[dict[int, list[int]]]:
        found: list[dict[int, list[int]]] = []
        assert self.cells is not None
        for axis, spans in enumerate(self.spans):
            users: dict[int, list[int]] = {}
            for block, span in enumerate(spans):
                for cell in _touched(span, self.cells.size[axis]):
                    users.setdefault(cell, []).append(block)
            found.append(users)
        return found

    def best(self, capacity_bytes: float) -> Reading:
        """The order that decodes least with so much memory for what is kept; of those that are
        alike in that the one that keeps least. Directly, where keeping does not help."""
        column = triple(self._widths(axis)[-1] for axis in range(3))
        direct = Reading(self._orders[0], column, 0, self._amplification(self._directly))
        if self.cells is None or capacity_bytes < self.cells.bytes:
            return direct
        found = [direct]
        for axes in self._orders:
            slowest, choices = axes[0], list(self._columns)
            # a column is as long as the volume, or made slab by slab
            choices[slowest] = [choices[slowest][0], choices[slowest][-1]]
            for columns in product(*choices):
                kept = self._kept_bytes(axes, columns)
                if kept <= capacity_bytes:
                    amplification = self._amplification([c.decoded for c in columns])
                    width = triple(c.width for c in columns)
                    found.append(Reading(axes, width, kept, amplification))
        return min(found, key=lambda r: (round(r.amplification, 2), r.cache_bytes))

    @property
    def _orders(self) -> list[Size]:
        """The axes from slowest to fastest, in which blocks may be made."""
        orders = map(triple, permutations(range(3)))
        return [axes for axes in orders if self.in_column == 1 or axes[-1] == self.axis]

    def _amplification(self, decoded: Sequence[int]) -> float:
        """Voxels decoded over voxels needed."""
        needed = (sum(stop - start for start, stop in own) for own in self._owned)
        return prod(d / n for d, n in zip(decoded, needed, strict=True))

    def _kept_bytes(self, axes: Sequence[int], columns: Sequence[_Columns]) -> int:
        """The most that is kept at a time where each column decodes nothing twice: of the slab
        before what the next one reads, of the row before, of the block before."""
        slow, middle, fast = axes
        laps = [c.lap if c.width > 1 else 0 for c in columns]
        block = [c.block for c in columns]
        voxels = (
            laps[slow] * columns[middle].widest * columns[fast].widest
            + block[slow] * laps[middle] * columns[fast].widest
            + block[slow] * block[middle] * laps[fast]
        )
        assert self.cells is not None
        return voxels * self.cells.voxel_bytes

    @cached_property
    def _directly(self) -> list[int]:
        """Along every axis the voxels that all blocks decode, each for itself."""
        chunks = self.cells.chunk if self.cells else (1, 1, 1)
        return [
            sum(_extent(span, chunk, n) for span in spans)
            for spans, chunk, n in zip(self.spans, chunks, self.laid.size, strict=True)
        ]

    @cached_property
    def _columns(self) -> list[list[_Columns]]:
        """Along every axis the columns there may be, from narrow to wide."""
        assert self.cells is not None
        axes = enumerate(zip(self.spans, self.cells.size, self.laid.size, strict=True))
        return [
            [_columns(spans, width, size, n) for width in self._widths(axis)]
            for axis, (spans, size, n) in axes
        ]

    def _widths(self, axis: int) -> list[int]:
        """Of columns along an axis, in blocks."""
        if axis == self.axis and self.in_column > 1:
            return [self.in_column]
        count = self.blocks[axis]
        return [*(width for width in _WIDTHS if width < count), count]


def _columns(spans: Sequence[Interval], width: int, cell: int, n: int) -> _Columns:
    columns = [spans[i : i + width] for i in range(0, len(spans), width)]
    decoded = [_extent((c[0][0], c[-1][1]), cell, n) for c in columns]
    return _Columns(
        width=width,
        decoded=sum(decoded),
        widest=max(decoded),
        block=max(_extent(span, cell, n) for span in spans),
        lap=max((_shared(a, b, cell) for a, b in pairwise(spans)), default=0),
    )


def _touched(span: Interval, cell: int) -> range:
    """The cells along an axis that hold voxels of a stretch."""
    start, stop = span
    return range(start // cell, ceil_divide(stop, cell)) if start < stop else range(0)


def _shared(before: Interval, after: Interval, cell: int) -> int:
    """The voxels of cells that hold voxels of both stretches."""
    return max(_touched(before, cell).stop - _touched(after, cell).start, 0) * cell


def _extent(span: Interval, cell: int, n: int) -> int:
    """The voxels of those cells."""
    touched = _touched(span, cell)
    return min(touched.stop * cell, n) - touched.start * cell if touched else 0
