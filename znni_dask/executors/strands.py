"""Where the planes of a column lie: in pages that are allocated once and taken and given back, so
that what is kept is never moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.columns import Column, Part, Strand, Turn
from znni_dask.geometry import Box, Size, add
from znni_dask.kernels.memory import floats, odd_lines
from znni_dask.network.field_of_view import Interval
from znni_dask.pages import Pages, shape_of
from znni_dask.primitives.base import Problem, Shape
from znni_dask.schedule import Stored

Numbers = NDArray[np.int64]


class Pool:
    """Pages of every size that are free, by their ``names``: whatever tells where one is."""

    def __init__(self, pages: Pages, names: Sequence[Numbers]) -> None:
        self._sizes, self._all = pages.sizes, names
        self.free_all()

    def free_all(self) -> None:
        """All pages are free."""
        self._free = [names.copy() for names in self._all]
        self._left = [len(names) for names in self._all]

    def take(self, array: Stored, count: int) -> Numbers:
        """Names of so many pages for an array."""
        which = self._sizes[array]
        self._left[which] = left = self._left[which] - count
        assert left >= 0, "more pages are held than were counted"
        return self._free[which][left : left + count].copy()

    def give_back(self, array: Stored, names: Numbers) -> None:
        """Pages of an array that are free again."""
        which = self._sizes[array]
        left = self._left[which]
        self._free[which][left : left + names.size] = names.reshape(-1)
        self._left[which] = left + names.size


class Strands:
    """The arrays of one pass over a column, the volume moved by ``offset``: in which page of a
    ``pool`` every plane of a strand lies. In ``copies`` there is room for some in one piece."""

    def __init__(self, column: Column, offset: Size, pool: Pool, copies: Any) -> None:
        self.column, self.offset = column, offset
        self._pool, self._copies = pool, copies
        self._tables: dict[Strand, Numbers] = {}

    def problem(self, turn: Turn) -> Problem:
        """What a turn computes."""
        assert turn.operation is not None
        reads = [part.planes for part in turn.reads]
        return self.column.problem(turn.operation, turn.makes[0].planes, reads)

    def begin(self, part: Part) -> None:
        """Take pages for planes that are made."""
        strand, (start, stop) = part
        if strand not in self._tables:
            box, (samples, *_) = self.column.boxes[strand.array.name], self.shape(part)
            self._tables[strand] = np.zeros((samples, box.size[0]), np.int64)
        table, first = self._tables[strand], self.first(strand)
        pages = self._pool.take(strand.array, len(table) * (stop - start))
        table[:, start - first : stop - first] = pages.reshape(len(table), -1)

    def free(self, parts: tuple[Part, ...]) -> None:
        """Give back the pages of planes that nobody reads again."""
        for part in parts:
            self._pool.give_back(part.strand.array, self._pages(part))

    def in_one_piece(self, parts: Sequence[Part], makes: int) -> list[Any]:
        """Memory for copies of some planes, the last of so many branches."""
        found, begin = [], 0
        for number, part in enumerate(parts):
            branches = makes if number == len(parts) - 1 else 1
            form, shape = part.strand.array.form, self.shape(part, branches)
            found.append(floats(self._copies[begin:], form.stored(shape)))
            begin += odd_lines(form.nbytes(shape))
        return found

    def pages(self, parts: Sequence[Part]) -> Numbers:
        """The pages (sample, plane) of planes of one branch after the other."""
        return np.concatenate([self._pages(part) for part in parts])

    def stored(self, parts: Sequence[Part]) -> tuple[int, ...]:
        """The shape of these planes in memory."""
        return parts[0].strand.array.form.stored(self.shape(parts[0], len(parts)))

    def planes_of_volume(self, part: Part) -> Interval:
        """Those that a part of the input is, counted from the column's first."""
        first = self.first(part.strand) - self.offset[0]
        start, stop = part.planes
        return start - first, stop - first

    def given_box(self, part: Part) -> Box:
        """The box of the answer that planes of fragments of it are."""
        column, (strand, planes) = self.column, part
        spacing, output = column.schedules.layout.fragments[0], column.output
        start, stop = (
            min(output.start[0] + (plane - self.first(strand)) * spacing, output.stop[0])
            for plane in planes
        )
        return Box((start, *output.start[1:]), (stop, *output.stop[1:]))

    def numbers(self, branch: int) -> dict[Size, int]:
        """The number of the fragment, of those of a branch, for every place in the answer."""
        places = self.column.positions(branch)
        return {add(place, self.offset): i for i, place in enumerate(places)}

    def first(self, strand: Strand) -> int:
        """The first plane of a strand."""
        return self.column.boxes[strand.array.name].start[0]

    def shape(self, part: Part, branches: int = 1) -> Shape:
        """The shape of such planes of so many branches."""
        start, stop = part.planes
        return shape_of(self.column, part.strand.array, stop - start, branches)

    def _pages(self, part: Part) -> Numbers:
        first = self.first(part.strand)
        start, stop = (plane - first for plane in part.planes)
        return self._tables[part.strand][:, start:stop]
