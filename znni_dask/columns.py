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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import NamedTuple, cast

from znni_dask.geometry import Box, Size
from znni_dask.network.field_of_view import Interval, demand
from znni_dask.network.network import Network
from znni_dask.network.window import SAME, Window
from znni_dask.patches import Layout
from znni_dask.primitives.base import Form, Problem
from znni_dask.primitives.forms import FormChange
from znni_dask.schedule import Arrangement, Operation, Schedules, Stored


class Strand(NamedTuple):
    """An array of one branch; those before branches part are of branch 0."""

    array: Stored
    branch: int


_Planes = tuple[int, int, Interval]  # of an array, by its number, of a branch of it


class Part(NamedTuple):
    """Some planes of a strand."""

    strand: Strand
    planes: Interval


@dataclass(frozen=True)
class Turn:
    """One operation on some planes: it reads parts of strands, makes others (several where branches
    part), after which the planes ``freed`` are read no more. No operation makes planes of the
    volume, which are loaded, nor reads those of the answer that are given: these make nothing."""

    operation: Operation | None
    reads: tuple[Part, ...]
    makes: tuple[Part, ...]
    freed: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Branches:
    """What becomes of the fragments that are made first: no layer reads more than one of them."""

    schedules: Schedules

    @cached_property
    def parting(self) -> frozenset[str]:
        """The layers that make the branches: those that make fragments first. None where several
        such layers make different ones."""
        fragmented = frozenset().union(*self.schedules.fragmented)
        behind: set[str] = set()
        found: list[str] = []
        for node in self.schedules.layout.network:
            if behind & set(node.inputs):
                behind.add(node.name)
            elif node.name in fragmented:
                behind.add(node.name)
                found.append(node.name)
        alike = len({self.schedules.positions[name] for name in found}) == 1
        return frozenset(found if alike else ())

    @cached_property
    def count(self) -> int:
        """How many branches there are."""
        return max((len(self.schedules.positions[name]) for name in self.parting), default=1)

    @cached_property
    def parted(self) -> frozenset[str]:
        """The layers of which every branch has its own."""
        found = set(self.parting)
        for node in self.schedules.layout.network:
            if found & set(node.inputs):
                found.add(node.name)
        return frozenset(found)

    def share(self, name: str) -> int:
        """Of how many branches one has a layer's samples."""
        return self.count if name in self.parted else 1


@dataclass(frozen=True, eq=False)
class Column:
    """The column that makes ``output``, of every layer the box in ``boxes``, in its own grid.

    ``granules`` are of layers: planes that are made at once, 1 where nothing is said; that of the
    network's output is the thickness of a slab. Where strided layers leave offsets out, the column
    is made in passes, which are alike: one for every move of the input, ``offsets``.
    """

    schedules: Schedules
    output: Box
    boxes: Mapping[str, Box]
    granules: Mapping[str, int]
    offsets: tuple[Size, ...]

    @classmethod
    def of(cls, schedules: Schedules, output: Box, granules: Mapping[str, int]) -> Column:
        """The column that makes ``output``."""
        boxes, offsets = schedules.patch(output).boxes, schedules.offsets(output.size)
        return cls(schedules, output, boxes, granules, offsets)

    def turns(self) -> Iterator[Turn]:
        """What is done, in order."""
        return _Progress(self).turns()

    @property
    def thickness(self) -> int:
        """Of a slab, in voxels of the answer."""
        return thickness_of(self.schedules.layout, self.granules)

    @property
    def period(self) -> int:
        """How far apart slabs are that are alike, in voxels of the answer."""
        return period_of(self.schedules.layout, self.granules)

    @property
    def network(self) -> Network:
        """The network."""
        return self.schedules.layout.network

    @cached_property
    def input(self) -> Box:
        """The box of the volume that is read; it may reach beyond the volume."""
        return self.schedules.layout.patch(self.output).input

    @cached_property
    def source(self) -> Stored:
        """The array that the volume is read into."""
        return Stored(self.network.input.name, Form.PLAIN)

    @cached_property
    def answer(self) -> Stored:
        """The array that is the answer."""
        return Stored(self.network.output, Form.PLAIN)

    @cached_property
    def branches(self) -> Branches:
        """The branches that fragments are made in."""
        return Branches(self.schedules)

    def positions(self, branch: int) -> tuple[Size, ...]:
        """Where the fragments of the answer belong that a branch makes, in the first pass."""
        return self.schedules.positions[self.network.output][branch :: self.branches.count]

    def strands(self, array: Stored) -> list[Strand]:
        """An array of all its branches."""
        return [Strand(array, branch) for branch in range(self.branches.share(array.name))]

    def problem(self, operation: Operation, planes: Interval, reads: Sequence[Interval]) -> Problem:
        """An operation that makes some planes of those that it reads."""
        names = [array.name for array in operation.inputs]
        made = _with(self.boxes[operation.node.name], planes)
        boxes = [_with(self.boxes[name], some) for name, some in zip(names, reads, strict=True)]
        whole = self.schedules.layout.whole(names[0], self.boxes)
        branches = self.branches.share(names[0])  # where branches part all are made at once
        return self.schedules.problem(operation, made, boxes, whole, branches)


def thickness_of(layout: Arrangement, granules: Mapping[str, int]) -> int:
    """Of slabs, in voxels of the answer, where a column is as long."""
    return granules.get(layout.network.output, 1) * layout.fragments[0]


def period_of(layout: Arrangement, granules: Mapping[str, int]) -> int:
    """After how many voxels of the answer the planes of all layers are made as they were before."""
    network = layout.network
    finest = network.spacing[network.output][0] / layout.fragments[0]  # of a voxel
    planes = (granules.get(n.name, 1) * network.spacing[n.name][0] / finest for n in network)
    return lcm(*(Fraction(some).numerator for some in planes))


def _with(box: Box, planes: Interval) -> Box:
    """A box of other planes."""
    return Box((planes[0], *box.start[1:]), (planes[1], *box.stop[1:]))


@dataclass(frozen=True)
class _Read:
    """What is read of an array, by its number, for planes of another."""

    array: int
    window: Window
    further: int
    bounds: Interval | None

    def of(self, planes: Interval) -> Interval:
        """The planes read for these."""
        if self.bounds is not None:
            return self.window.within(*planes, self.bounds)
        start, stop = self.window.needs(*planes)
        return start, stop + self.further


@dataclass(eq=False)
class _Array:
    """An array along z: its planes, those that are made at once, and where such end; how far every
    branch of it is made, and from where on it is kept."""

    stored: Stored
    operation: Operation | None
    reads: tuple[_Read, ...]
    start: int
    stop: int
    granule: int
    end: int
    made: list[int]
    kept: list[int]
    parts: bool
    readers: list[tuple[int, _Read]] = field(default_factory=list)

    def following(self, start: int) -> Interval:
        """The planes from ``start`` on that are made at once. They end where those do that slabs of
        the answer need, lest every layer runs ahead of the next."""
        return start, min(start + self.granule - (start - self.end) % self.granule, self.stop)


class _Progress:
    """How far all arrays of a column are made."""

    def __init__(self, column: Column) -> None:
        self._column = column
        operations = column.schedules.operations
        stored = [column.source, *(operation.output for operation in operations)]
        self._numbers = {array: number for number, array in enumerate(stored)}
        ends = self._ends(column.boxes[column.answer.name].start[0])
        self._arrays = [
            self._array(array, operation, ends)
            for array, operation in zip(stored, (None, *operations), strict=True)
        ]
        for number, array in enumerate(self._arrays):
            for read in array.reads:
                self._arrays[read.array].readers.append((number, read))
        self._answer = self._numbers[column.answer]
        answer = self._arrays[self._answer]
        self._given = [answer.start] * len(answer.made)

    def _array(
        self, stored: Stored, operation: Operation | None, ends: Mapping[str, int]
    ) -> _Array:
        column, name = self._column, stored.name
        start, stop = column.boxes[name].start[0], column.boxes[name].stop[0]
        branches = column.branches
        return _Array(
            stored,
            operation,
            () if operation is None else tuple(self._reads(operation)),
            start,
            stop,
            column.granules.get(name, 1),
            ends[name],
            [start] * branches.share(name),
            [start] * branches.share(name),
            name in branches.parting
            and not isinstance(operation and operation.primitive, FormChange),
        )

    def _reads(self, operation: Operation) -> Iterator[_Read]:
        """What an operation reads."""
        layout, name = cast("Layout", self._column.schedules.layout), operation.node.name
        window, further = operation.node.layer.window(0), 0
        if isinstance(operation.primitive, FormChange):
            window = SAME
        elif name in self._column.schedules.fragmented[0]:
            further = window.stride - 1
        bounds = layout.bounds[0]
        for array in operation.inputs:
            there = None if bounds is None else bounds[array.name]
            yield _Read(self._numbers[array], window, further, there)

    def turns(self) -> Iterator[Turn]:
        """Make and give slab after slab of all branches."""
        answer = self._arrays[self._answer]
        for ends in self._before():
            for branch in range(len(self._given)):
                for number, end in ends:
                    yield from self._pull(number, branch, end)
        while min(self._given) < answer.stop:
            for branch, given in enumerate(self._given):
                planes = answer.following(given)
                yield from self._pull(self._answer, branch, planes[1])
                self._given[branch] = planes[1]
                reads = [(self._answer, branch, planes)]
                yield Turn(None, self._parts(reads), (), self._freed(reads))

    def _before(self) -> Iterator[list[tuple[int, int]]]:
        """Where arrays of branches end in slabs before the first, of which nothing is given: lest
        one branch needs all that lies behind its first slab before the next is begun."""
        branches, answer = self._column.branches, self._arrays[self._answer]
        found: list[list[tuple[int, int]]] = []
        end = answer.start
        while branches.parting:
            ends = self._ends(end)
            if all(ends[name] <= self._column.boxes[name].start[0] for name in branches.parting):
                break
            found.append(
                [
                    (number, ends[array.stored.name])
                    for number, array in enumerate(self._arrays)
                    if array.stored.name in branches.parted
                ]
            )
            end -= answer.granule
        return reversed(found)

    def _ends(self, end: int) -> dict[str, int]:
        """Where layers end behind planes of the answer up to ``end``, had they no ends."""
        column = self._column
        fragmented = column.schedules.fragmented[0]
        behind = demand(column.network, 0, (end - 1, end), fragmented=fragmented)
        return {name: stop for name, (_, stop) in behind.items()}

    def _pull(self, number: int, branch: int, stop: int) -> Iterator[Turn]:
        """Make an array up to ``stop``, and before it all that is read for it."""
        asked = [(number, branch, min(stop, self._arrays[number].stop))]
        while asked:
            number, branch, stop = asked[-1]
            array = self._arrays[number]
            if array.made[branch] >= stop:
                asked.pop()
                continue
            planes = array.following(array.made[branch])
            reads = []
            for read in array.reads:
                there = min(branch, len(self._arrays[read.array].made) - 1)
                reads.append((read.array, there, read.of(planes)))
            for source, there, (_, end) in reads:
                if self._arrays[source].made[there] < end:
                    asked.append((source, there, end))
                    break
            else:
                yield self._turn(number, branch, planes, reads)

    def _turn(self, number: int, branch: int, planes: Interval, reads: list[_Planes]) -> Turn:
        array = self._arrays[number]
        makes = [
            (number, one, planes) for one in (range(len(array.made)) if array.parts else [branch])
        ]
        for _, one, _ in makes:
            array.made[one] = planes[1]
        freed = self._freed([*reads, *makes])
        return Turn(array.operation, self._parts(reads), self._parts(makes), freed)

    def _parts(self, some: Iterable[_Planes]) -> tuple[Part, ...]:
        return tuple(
            Part(Strand(self._arrays[number].stored, branch), planes)
            for number, branch, planes in some
        )

    def _freed(self, some: Sequence[_Planes]) -> tuple[Part, ...]:
        """The planes of these that are kept, and nobody reads again."""
        found = []
        for number, branch in dict.fromkeys((number, branch) for number, branch, _ in some):
            array = self._arrays[number]
            start, stop = array.kept[branch], min(self._needed(number, branch), array.made[branch])
            if start < stop:
                array.kept[branch] = stop
                found.append((number, branch, (start, stop)))
        return self._parts(found)

    def _needed(self, number: int, branch: int) -> int:
        """The first plane of a branch of an array that is still to be read."""
        first = self._arrays[number].stop
        for reader, read in self._arrays[number].readers:
            output = self._arrays[reader]
            made = output.made[min(branch, len(output.made) - 1)]  # parted, all are alike
            if made < output.stop:
                first = min(first, read.of((made, output.stop))[0])
        return min(first, self._given[branch]) if number == self._answer else first
