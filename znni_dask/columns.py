"""A column of the answer, made along z: which planes of every array are made when, and kept until
when.

A column is a cross-section (y, x) of the answer. It is made slab by slab, and nothing is computed
twice along z: of every array those planes are kept that what is made of it will read again, as in
step-by-step inference along time (Jiang et al. 2023, section 4). Planes are made when they are
asked for, some at a time: an array's *granule*. So layers at full resolution work in thin slabs,
and deep ones, whose planes are far apart, in as many planes as make them fast.

The fragments of the first layer that makes some are *branches*: no layer after it reads more than
one. They are made one after another, so that of all but one only what is kept takes memory.

Arithmetic on shapes only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

from znni_dask.geometry import Box, Size
from znni_dask.network.field_of_view import Interval, demand
from znni_dask.network.network import Network
from znni_dask.patches import Layout
from znni_dask.primitives.base import Form, Problem
from znni_dask.primitives.forms import FormChange
from znni_dask.schedule import Operation, Schedules, Stored


class Strand(NamedTuple):
    """An array of one branch; those before branches part are of branch 0."""

    array: Stored
    branch: int


class Part(NamedTuple):
    """Some planes of a strand."""

    strand: Strand
    planes: Interval


@dataclass(frozen=True)
class Turn:
    """One operation on some planes: it reads parts of strands, makes others (several where branches
    part), after which the planes ``freed`` are read no more. Planes of the volume are made by no
    operation, and planes of the answer, which are ``given``, are made into no array."""

    operation: Operation | None
    problem: Problem | None
    reads: tuple[Part, ...]
    makes: tuple[Part, ...]
    freed: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Column:
    """The column that makes ``output``, of every layer the box in ``boxes``, in its own grid.

    ``granules`` are of layers: planes that are made at once, 1 where nothing is said; that of the
    network's output is the thickness of a slab. With ``apart`` branches are made one by one.
    """

    schedules: Schedules
    output: Box
    boxes: Mapping[str, Box]
    granules: Mapping[str, int]
    apart: bool = True

    @classmethod
    def of(
        cls, schedules: Schedules, output: Box, granules: Mapping[str, int], apart: bool = True
    ) -> Column:
        """The column that makes ``output``."""
        return cls(schedules, output, schedules.patch(output).boxes, granules, apart)

    def turns(self) -> Iterator[Turn]:
        """What is done, in order."""
        return _Progress(self).turns()

    @property
    def network(self) -> Network:
        """The network."""
        return self.schedules.layout.network

    @cached_property
    def input(self) -> Box:
        """The box of the volume that is read; it may reach beyond the volume."""
        return self.schedules.patch(self.output).input

    @cached_property
    def source(self) -> Stored:
        """The array that the volume is read into."""
        return Stored(self.network.input.name, Form.PLAIN)

    @cached_property
    def answer(self) -> Stored:
        """The array that is the answer."""
        return Stored(self.network.output, Form.PLAIN)

    @cached_property
    def parting(self) -> frozenset[str]:
        """The layers that make the branches: those that make fragments first. None where branches
        are not made one by one, or several such layers make others."""
        behind: set[str] = set()
        found: list[str] = []
        for node in self.network:
            if behind & set(node.inputs):
                behind.add(node.name)
            elif node.name in self.schedules.fragmented:
                behind.add(node.name)
                found.append(node.name)
        alike = len({self.schedules.positions[name] for name in found}) == 1
        return frozenset(found if self.apart and alike else ())

    @cached_property
    def branches(self) -> int:
        """How many branches there are."""
        return max((len(self.schedules.positions[name]) for name in self.parting), default=1)

    @cached_property
    def parted(self) -> frozenset[str]:
        """The layers of which every branch has its own."""
        found = set(self.parting)
        for node in self.network:
            if found & set(node.inputs):
                found.add(node.name)
        return frozenset(found)

    def share(self, name: str) -> int:
        """Of how many branches one has a layer's samples."""
        return self.branches if name in self.parted else 1

    def positions(self, branch: int) -> tuple[Size, ...]:
        """Where the fragments of the answer belong that a branch makes."""
        return self.schedules.positions[self.network.output][branch :: self.branches]

    def strands(self, array: Stored) -> list[Strand]:
        """An array of all its branches."""
        return [Strand(array, branch) for branch in range(self.share(array.name))]

    def window_of(self, operation: Operation, number: int, planes: Interval) -> Interval:
        """Planes of an input that an operation reads for these planes of its output."""
        if isinstance(operation.primitive, FormChange):
            return planes
        window, name = operation.node.layer.window(0), operation.inputs[number].name
        bounds = cast("Layout", self.schedules.layout).bounds[0]
        if bounds is not None:
            return window.within(*planes, bounds[name])
        start, stop = window.needs(*planes)
        fragmented = operation.node.name in self.schedules.fragmented
        return start, stop + (window.stride - 1) * fragmented

    def problem(self, operation: Operation, planes: Interval, reads: Sequence[Interval]) -> Problem:
        """An operation that makes some planes of those that it reads."""
        names = [array.name for array in operation.inputs]
        made = _with(self.boxes[operation.node.name], planes)
        boxes = [_with(self.boxes[name], some) for name, some in zip(names, reads, strict=True)]
        whole = self.schedules.layout.whole(names[0], self.boxes)
        branches = self.share(names[0])  # where branches part all are made at once
        return self.schedules.problem(operation, made, boxes, whole, branches)


def _with(box: Box, planes: Interval) -> Box:
    """A box of other planes."""
    return Box((planes[0], *box.start[1:]), (planes[1], *box.stop[1:]))


class _Progress:
    """How far every strand of a column is made, and from where on it is kept."""

    def __init__(self, column: Column) -> None:
        self._column = column
        operations = column.schedules.operations
        self._makers = {operation.output: operation for operation in operations}
        self._readers: defaultdict[Stored, list[tuple[Operation, int]]] = defaultdict(list)
        for operation in operations:
            for number, array in enumerate(operation.inputs):
                self._readers[array].append((operation, number))
        arrays = (column.source, *self._makers)
        strands = [strand for array in arrays for strand in column.strands(array)]
        self._made = {strand: self._whole(strand)[0] for strand in strands}
        self._kept = dict(self._made)
        self._forms: defaultdict[str, list[Stored]] = defaultdict(list)
        for array in arrays:
            self._forms[array.name].append(array)
        self._slab = self._stops(self._whole(Strand(column.answer, 0))[0])
        self._given = {strand: self._whole(strand)[0] for strand in column.strands(column.answer)}

    def turns(self) -> Iterator[Turn]:
        """Make and give slab after slab of all branches."""
        for stops in self._before():
            for strand in self._given:
                for name in stops:
                    for array in self._forms[name]:
                        yield from self._pull(Strand(array, strand.branch), stops[name])
        while any(given < self._whole(strand)[1] for strand, given in self._given.items()):
            for strand, given in self._given.items():
                planes = self._next(strand, given)
                yield from self._pull(strand, planes[1])
                self._given[strand] = planes[1]
                reads = (Part(strand, planes),)
                yield Turn(None, None, reads, (), self._freed(reads))

    def _before(self) -> Iterator[dict[str, int]]:
        """Where layers of branches stop in slabs before the first, of which nothing is given: lest
        one branch needs all that lies behind its first slab before the next is begun."""
        column = self._column
        step = column.granules.get(column.network.output, 1)
        found: list[dict[str, int]] = []
        stop = column.boxes[column.network.output].start[0]
        while column.parting:
            stops = self._stops(stop)
            if all(stops[name] <= column.boxes[name].start[0] for name in column.parting):
                break
            found.append({name: end for name, end in stops.items() if name in column.parted})
            stop -= step
        return reversed(found)

    def _stops(self, stop: int) -> dict[str, int]:
        """Where layers stop behind planes of the answer up to ``stop``, had they no ends."""
        column = self._column
        behind = demand(column.network, 0, (stop - 1, stop), fragmented=column.schedules.fragmented)
        return {node.name: behind[node.name][1] for node in column.network if node.name in behind}

    def _pull(self, strand: Strand, stop: int) -> Iterator[Turn]:
        """Make a strand up to ``stop``, and before it all that is read for it."""
        asked = [(strand, min(stop, self._whole(strand)[1]))]
        while asked:
            strand, stop = asked[-1]
            planes = self._next(strand, self._made[strand])
            reads = self._reads(strand, planes)
            if self._made[strand] >= stop:
                asked.pop()
                continue
            missing = [part for part in reads if self._made[part.strand] < part.planes[1]]
            if missing:
                asked.append((missing[0].strand, missing[0].planes[1]))
            else:
                yield self._turn(strand, planes, reads)

    def _turn(self, strand: Strand, planes: Interval, reads: tuple[Part, ...]) -> Turn:
        column, array = self._column, strand.array
        makes = column.strands(array) if array.name in column.parting else [strand]
        for one in makes:
            self._made[one] = planes[1]
        operation = self._makers.get(array)
        problem = None
        if operation is not None:
            problem = column.problem(operation, planes, [part.planes for part in reads])
        parts = tuple(Part(one, planes) for one in makes)
        return Turn(operation, problem, reads, parts, self._freed((*reads, *parts)))

    def _next(self, strand: Strand, start: int) -> Interval:
        """The planes from ``start`` on that are made at once. They end where those do that slabs of
        the answer need, lest every layer runs ahead of the next."""
        step, stop = self._column.granules.get(strand.array.name, 1), self._slab[strand.array.name]
        return start, min(start + step - (start - stop) % step, self._whole(strand)[1])

    def _reads(self, strand: Strand, planes: Interval) -> tuple[Part, ...]:
        """What is read for some planes of a strand."""
        operation = self._makers.get(strand.array)
        if operation is None:
            return ()
        return tuple(
            Part(
                Strand(array, min(strand.branch, self._column.share(array.name) - 1)),
                self._column.window_of(operation, number, planes),
            )
            for number, array in enumerate(operation.inputs)
        )

    def _freed(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The planes of these strands that are kept, and nobody reads again."""
        found = []
        for strand in dict.fromkeys(part.strand for part in parts):
            start, stop = self._kept[strand], min(self._needed(strand), self._made[strand])
            if start < stop:
                self._kept[strand] = stop
                found.append(Part(strand, (start, stop)))
        return tuple(found)

    def _needed(self, strand: Strand) -> int:
        """The first plane of a strand that is still to be read."""
        first = end = self._whole(strand)[1]
        for operation, number in self._readers[strand.array]:
            made = self._made[self._read_by(strand, operation.output)]
            stop = self._whole(Strand(operation.output, 0))[1]
            if made < stop:
                first = min(first, self._column.window_of(operation, number, (made, stop))[0])
        return min(first, self._given.get(strand, end))

    def _read_by(self, strand: Strand, output: Stored) -> Strand:
        """The strand of an output that is made of this one; where branches part, all are alike."""
        return Strand(output, min(strand.branch, self._column.share(output.name) - 1))

    def _whole(self, strand: Strand) -> Interval:
        """All planes of a strand."""
        box = self._column.boxes[strand.array.name]
        return box.start[0], box.stop[0]
