"""The grid in which a volume is decoded and kept: its storage chunks, small ones several together.

A cell is a whole number of chunks, so that no chunk is decoded for two cells, and holds about a
mebibyte at least, so that looking after cells costs little beside decoding them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import lt

from znni_dask.geometry import Box, Size, ceil_divide, multiply, tiles, triple, turned, volume

_CELL_BYTES = 1 << 20
_FETCHED_BYTES = 16 << 20  # read at once, where cells are not large
_FETCHED_CELLS = 4


@dataclass(frozen=True)
class Cells:
    """Cells of ``size`` voxels (z, y, x), of chunks of ``chunk``, over a volume of ``whole``.

    ``voxel_bytes`` is what a voxel takes as stored, all its channels together.
    """

    chunk: Size
    size: Size
    whole: Size
    voxel_bytes: int

    @classmethod
    def of(cls, chunk: Size, whole: Size, voxel_bytes: int) -> Cells:
        """The cells of a volume that is stored in chunks."""
        chunk = triple(map(min, chunk, whole))
        cells = cls(chunk, chunk, whole, voxel_bytes)
        while cells.bytes < _CELL_BYTES and any(map(lt, cells.size, whole)):
            short = min(
                (a for a in range(3) if cells.size[a] < whole[a]), key=cells.size.__getitem__
            )
            size = (n * 2 if axis == short else n for axis, n in enumerate(cells.size))
            cells = cls(chunk, triple(size), whole, voxel_bytes)
        return cells

    def turned(self, axis: int) -> Cells:
        """The same where axes 0 and ``axis`` are swapped."""
        chunk, size, whole = (turned(n, axis) for n in (self.chunk, self.size, self.whole))
        return Cells(chunk, size, whole, self.voxel_bytes)

    @property
    def bytes(self) -> int:
        """Bytes of the largest cell."""
        return self.voxel_bytes * volume(triple(map(min, self.size, self.whole)))

    @property
    def chunks_each(self) -> int:
        """Chunks of a whole cell."""
        return volume(triple(s // c for s, c in zip(self.size, self.chunk, strict=True)))

    @property
    def fetched(self) -> int:
        """Cells that are read at once."""
        return max(_FETCHED_BYTES // self.bytes, _FETCHED_CELLS)

    def touched(self, box: Box) -> Box:
        """The cells that hold voxels of a box, counted in cells."""
        return Box(
            triple(a // s for a, s in zip(box.start, self.size, strict=True)),
            triple(ceil_divide(b, s) for b, s in zip(box.stop, self.size, strict=True)),
        )

    def voxels_of(self, cells: Box) -> Box:
        """The voxels of a box of cells."""
        inside = Box(multiply(cells.start, self.size), multiply(cells.stop, self.size))
        return inside.clipped(self.whole)

    def groups(self, cells: Box) -> Iterator[Box]:
        """A box of cells in parts, each of no more than are read at once."""
        left, group = self.fetched, [1, 1, 1]
        for axis in (2, 1, 0):
            group[axis] = min(cells.size[axis], left)
            left = max(left // group[axis], 1)
        for part in tiles(cells.size, triple(group)):
            yield part.shifted(cells.start)


def joined(cells: Iterable[Size]) -> list[Box]:
    """Cells as few boxes that hold each once.

    >>> [str(box) for box in joined([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (2, 1, 1)])]
    ['0:1, 0:2, 0:2', '2:3, 1:2, 1:2']
    """
    boxes = [Box(cell, triple(i + 1 for i in cell)) for cell in sorted(cells)]
    for axis in (2, 1, 0):
        boxes = _joined_along(axis, boxes)
    return sorted(boxes, key=lambda b: b.start)


def _joined_along(axis: int, boxes: list[Box]) -> list[Box]:
    """Boxes of one shape that follow one another along an axis, made one."""

    def across(box: Box) -> tuple[tuple[int, int], ...]:
        return tuple((box.start[i], box.stop[i]) for i in range(3) if i != axis)

    found: list[Box] = []
    for box in sorted(boxes, key=lambda b: (across(b), b.start[axis])):
        last = found[-1] if found else None
        if last and across(last) == across(box) and last.stop[axis] == box.start[axis]:
            found[-1] = Box(last.start, box.stop)
        else:
            found.append(box)
    return found
