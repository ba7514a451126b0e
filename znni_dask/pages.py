"""What a column takes: how often each operation is done on how many planes, and pages, one for
every plane of a sample.

Pages of about one size are shared by all arrays of such planes, so that what is read no more makes
room for what comes next. Arithmetic on shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.columns import Column, Turn, period_of
from znni_dask.cut import Cut
from znni_dask.geometry import Box, Size, ceil_divide
from znni_dask.kernels.memory import allocated_bytes, odd_lines
from znni_dask.network.field_of_view import Interval
from znni_dask.patches import Layout, spans
from znni_dask.primitives.base import ITEM_BYTES, Form, Primitive, Problem, Shape
from znni_dask.primitives.offloaded import Offloading, offloading
from znni_dask.primitives.planes import takes_planes
from znni_dask.schedule import Schedules, Step, Stored

STEADY = 4  # periods, of which one in the middle is like all that would follow
_ADDRESS_BYTES = 8
_ALIKE = 0.8  # of the largest page that is shared


_Kind = tuple[Stored, int, tuple[int, ...]]  # what is made, and how many planes of how many


class Task(NamedTuple):
    """An operation, by its number, on so many planes, done so often; one of the places where it
    is."""

    number: int
    planes: Interval
    reads: tuple[Interval, ...]
    times: float


@dataclass(frozen=True)
class Pages:
    """So many pages of so many bytes, of several sizes; and which every array takes."""

    nbytes: tuple[int, ...]
    counts: tuple[int, ...]
    sizes: Mapping[Stored, int]

    @property
    def held_bytes(self) -> int:
        """What they hold."""
        return sum(count * n for count, n in zip(self.counts, self.nbytes, strict=True))

    @property
    def all_bytes(self) -> int:
        """What the host takes for all of them."""
        both = zip(self.counts, self.nbytes, strict=True)
        return sum(allocated_bytes(count * nbytes) for count, nbytes in both)


@dataclass(frozen=True)
class ColumnMemory:
    """What columns take: pages; arrays in one piece, for what does not take planes that lie
    anywhere; what primitives compute in; a slab of the answer, or all of it where it is made in
    several passes; and tables of where planes lie. What a device that is ``lent`` needs is beside
    that. Planes that are loaded at once take ``loaded_bytes``; of what primitives compute in
    ``beside_bytes`` are beside the scratch memory of a device."""

    pages: Pages
    copies_bytes: int
    workspace_bytes: int
    slab_bytes: int
    table_bytes: int
    lent: Offloading | None
    loaded_bytes: int
    beside_bytes: int

    @property
    def all_bytes(self) -> int:
        """All of it, but for what a device needs."""
        parts = (self.copies_bytes, self.workspace_bytes, self.slab_bytes)
        return self.pages.all_bytes + sum(map(allocated_bytes, parts)) + self.table_bytes


@dataclass(frozen=True, eq=False)
class Program:
    """What is done along z, whatever the cross-section of a column.

    ``held`` are for every turn the planes of samples of each of ``arrays`` that are kept while it
    is done, ``loaded`` the planes of the volume that are read at once at most, ``given`` those of
    the answer that are given, ``planes`` those of the answer in all. For a period in the middle
    every task is done ``steady`` times.
    """

    tasks: tuple[Task, ...]
    steady: tuple[float, ...]
    arrays: tuple[Stored, ...]
    held: NDArray[np.int64]
    loaded: int
    given: int
    planes: int

    @classmethod
    def of(cls, column: Column) -> Program:
        """That of a column."""
        operations = column.schedules.operations
        arrays = (column.source, *(operation.output for operation in operations))
        numbers = {array: number for number, array in enumerate(arrays)}
        samples = [shape_of(column, array, 1, 1)[0] for array in arrays]
        passes = column.schedules.repeats
        first: dict[_Kind, Turn] = {}
        times: Counter[_Kind] = Counter()
        slabs: list[Counter[_Kind]] = []
        now, held, loaded, given = [0] * len(arrays), [], 0, 0
        for turn in column.turns():
            for part in turn.makes:
                number = numbers[part.strand.array]
                now[number] += samples[number] * _length(part.planes)
            held.append(now.copy())
            for part in turn.freed:
                number = numbers[part.strand.array]
                now[number] -= samples[number] * _length(part.planes)
            if turn.operation is not None:
                reads = tuple(_length(part.planes) for part in turn.reads)
                kind = turn.operation.output, _length(turn.makes[0].planes), reads
                first.setdefault(kind, turn)
                times[kind] += passes
            elif turn.makes:
                loaded = max(loaded, _length(turn.makes[0].planes))
            else:
                given = max(given, _length(turn.reads[0].planes))
                slabs.append(times.copy())
        after = slabs[column.branches.count - 1 :: column.branches.count]  # all branches of each
        alike = ceil_divide(column.period, column.thickness)  # slabs after which all is as before
        steady: Counter[_Kind] = Counter()
        if len(after) >= STEADY * alike:
            steady = after[-1 - alike] - after[-1 - 2 * alike]
        return cls(
            tuple(
                Task(
                    operations.index(turn.operation),
                    turn.makes[0].planes,
                    tuple(part.planes for part in turn.reads),
                    times[kind],
                )
                for kind, turn in first.items()
                if turn.operation is not None
            ),
            tuple(steady[kind] for kind in first),
            arrays,
            np.array(held),
            loaded,
            given,
            column.output.size[0],
        )

    def extended(self, periods: float, planes: int) -> Program:
        """That of a column of so many periods, and planes, more."""
        both = zip(self.tasks, self.steady, strict=True)
        tasks = tuple(task._replace(times=task.times + periods * more) for task, more in both)
        return replace(self, tasks=tasks, planes=self.planes + planes)

    def steps(self, column: Column) -> Iterator[tuple[Task, Step]]:
        """The tasks in a column along the same stretch of z."""
        for task in self.tasks:
            operation = column.schedules.operations[task.number]
            yield task, Step(operation, column.problem(operation, task.planes, task.reads))


def memory_of(column: Column, threads: int, program: Program | None = None) -> ColumnMemory:
    """The memory of a column, whose boxes are the largest there are."""
    program = program or Program.of(column)
    nbytes = [page_bytes(column, array) for array in program.arrays]
    sizes: dict[Stored, int] = {}
    largest: list[int] = []
    for number in sorted(range(len(nbytes)), key=lambda i: -nbytes[i]):
        if not largest or nbytes[number] < _ALIKE * largest[-1]:
            largest.append(nbytes[number])
        sizes[program.arrays[number]] = len(largest) - 1
    which = np.array([sizes[array] for array in program.arrays])
    counts = [int(program.held[:, which == n].sum(axis=1).max()) for n in range(len(largest))]
    ends = (column.source, program.loaded), (column.answer, program.given)
    copies = max(array.form.nbytes(shape_of(column, array, n, 1)) for array, n in ends)
    workspace = beside = 0
    for _, step in program.steps(column):
        forms = step.operation.inputs[0].form, step.operation.output.form
        own = step.primitive.workspace_bytes(step.problem, threads)
        workspace, beside = max(workspace, own), max(beside, own * step.primitive.beside)
        copies = max(copies, copied_bytes(step.primitive, step.problem, forms))
    _, y, x = column.output.size
    spacing = column.schedules.layout.fragments[0]
    # what the first of several passes make waits for the last
    planes = program.given * spacing if len(column.offsets) == 1 else program.planes
    slab = column.network.out_channels * planes * y * x * ITEM_BYTES
    pages = Pages(tuple(largest), tuple(counts), sizes)
    lent = offloading((step.primitive, step.problem) for _, step in program.steps(column))
    tables = _table_bytes(column, program)
    loaded = column.source.form.nbytes(shape_of(column, column.source, program.loaded, 1))
    return ColumnMemory(pages, copies, workspace, slab, tables, lent, loaded, beside)


def _table_bytes(column: Column, program: Program) -> int:
    """Memory of addresses of all planes of a column as long as the program says."""
    schedules, spacing = column.schedules, column.network.spacing
    finest = spacing[column.network.output][0] / schedules.layout.fragments[0]
    more = (program.planes - column.output.size[0]) * finest  # voxels of the volume
    return sum(
        _ADDRESS_BYTES
        * len(schedules.positions[array.name])
        * (column.boxes[array.name].size[0] + ceil(more / spacing[array.name][0]))
        for array in program.arrays
    )


def copied_bytes(
    primitive: Primitive, problem: Problem, forms: tuple[Form, Form] | None = None
) -> int:
    """Memory of copies in one piece of what a primitive reads and makes, if it takes no planes that
    lie anywhere; in the larger form where none are told and either would do."""
    if forms is None:
        takes, makes = primitive.forms(problem.layer, [shape[1] for shape in problem.inputs])
        forms = takes or Form.BLOCKED, makes or takes or Form.BLOCKED
    read, made = forms
    if takes_planes(primitive, problem.layer, read):
        return 0
    arrays = (*(read.nbytes(shape) for shape in problem.inputs), made.nbytes(problem.output))
    return sum(map(odd_lines, arrays))


def shape_of(column: Column, array: Stored, planes: int, branches: int) -> Shape:
    """The shape of so many planes of an array of some branches."""
    schedules, (_, y, x) = column.schedules, column.boxes[array.name].size
    samples = len(schedules.positions[array.name]) * branches // column.branches.share(array.name)
    return samples, schedules.layout.network.channels[array.name], planes, y, x


def page_bytes(column: Column, array: Stored) -> int:
    """A plane of a sample; an odd number of cache lines, lest all begin on the same ones."""
    _, channels, _, y, x = shape_of(column, array, 1, 1)
    return odd_lines(array.form.nbytes((1, channels, 1, y, x)))


def _length(planes: Interval) -> int:
    return planes[1] - planes[0]


def memory_of_all(
    schedules: Schedules, cut: Cut, granules: Mapping[str, int], threads: int
) -> ColumnMemory:
    """What suffices for all columns of an answer, wherever in them one is begun."""
    found = []
    longest = min(cut.column[0], cast("Layout", schedules.layout).output_size[0])
    for column in largest_columns(schedules, cut, granules):
        program = Program.of(column).extended(0, longest - column.output.size[0])
        found.append(memory_of(column, threads, program))
    pages = found[0].pages  # of the same sizes in all of them
    counts = [max(most) for most in zip(*(one.pages.counts for one in found), strict=True)]
    lent = [one.lent for one in found if one.lent]
    return ColumnMemory(
        Pages(pages.nbytes, tuple(counts), pages.sizes),
        max(one.copies_bytes for one in found),
        max(one.workspace_bytes for one in found),
        max(one.slab_bytes for one in found),
        max(one.table_bytes for one in found),
        reduce(Offloading.or_more, lent) if lent else None,
        max(one.loaded_bytes for one in found),
        max(one.beside_bytes for one in found),
    )


def largest_columns(
    schedules: Schedules, cut: Cut, granules: Mapping[str, int]
) -> Iterator[Column]:
    """For every stretch of z that may be unlike others the column of the largest cross-section.
    Those that are longer end where they go on as they did."""
    layout, block = cast("Layout", schedules.layout), cut.block
    blocks, *_ = spans(layout, block, block)
    few = min(cut.in_column, 1 + ceil_divide(STEADY * period_of(layout, granules), block[0]))
    starts = [start for start, _ in blocks]
    along_z = [(start, start + few * block[0]) for start in starts]
    middle = starts[len(starts) // 2]  # where a column ends that is begun anew at any block
    along_z += [(middle, middle + count * block[0]) for count in range(1, few)]
    n = layout.output_size[0]
    found = [(start, min(stop, n)) for start, stop in along_z]
    if layout.geometry.dense:  # which has no ends
        found = [(0, stop - start) for start, stop in found]
    for span in dict.fromkeys(found):
        yield across_of(schedules, span, block, granules)


def across_of(
    schedules: Schedules, planes: Interval, block: Size, granules: Mapping[str, int]
) -> Column:
    """A column of some planes of the answer, of the largest cross-section of blocks."""
    layout = cast("Layout", schedules.layout)
    _, *across = spans(layout, block, block)
    stretch = layout.stretch(0, planes, schedules.fragmented[0])
    boxes = {
        name: Box((stretch[name][0], 0, 0), (stretch[name][1], y, x))
        for name, (_, y, x) in schedules.envelope([[planes], *across]).items()
    }
    _, y, x = (min(b, n) for b, n in zip(block, layout.output_size, strict=True))
    output = Box((planes[0], 0, 0), (planes[1], y, x))
    return Column(schedules, output, boxes, granules, schedules.offsets(output.size))
