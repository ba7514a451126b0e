"""Plans of blocks that are made slab by slab along z: which cross-section, how thick slabs, which
primitive for every layer.

What is done along z depends on the slabs, but not on the cross-section, so it is worked out once
for each thickness; cross-sections are tried from the largest of which the pages alone fit.
Arithmetic on shapes and costs only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod

from znni_dask.choices import Menu, choose_primitives, chosen_primitives
from znni_dask.columns import Branches, Column
from znni_dask.errors import OptionError
from znni_dask.geometry import Box, Size, ceil_divide
from znni_dask.pages import STEADY, Program, across_of, copied_bytes, memory_of, memory_of_all
from znni_dask.patches import Layout, largest_box
from znni_dask.plan import Choice, Plan, Reading, Stage
from znni_dask.planner import MULTIPLES
from znni_dask.primitives.forms import FormChange
from znni_dask.reading import Reads
from znni_dask.resources import (
    MOST_BLOCKS_IN_FLIGHT,
    OVERHEAD_BYTES,
    Resources,
    check_given,
    check_room,
    moving_seconds,
    network_bytes,
    shared_reading,
)
from znni_dask.schedule import Schedules, Step, Stored

_THIN = 4  # planes of the volume that layers at full resolution make at once
_THICKNESSES = (1, 2, 4, 8)  # of slabs, in fragments or alignments
_THICKEST = 128  # voxels
_TURN_SECONDS = 2e-4  # to find planes and take pages, beside calling a primitive
_TRIED = 3  # cross-sections for a thickness
_AGAIN = 3  # times that primitives are chosen for one, within less memory each time
_LONGEST = max(MULTIPLES)  # blocks, in chunks
_NARROWEST = 2  # times as long as wide


def streams(layout: Layout, schedules: Schedules) -> bool:
    """Whether blocks can be made slab by slab: not where a halo of one's own makes the answer, nor
    where a network runs once per offset."""
    return layout.halo is None and schedules.repeats == 1


def granules_of(schedules: Schedules, thickness: int) -> dict[str, int]:
    """Planes of every layer that are made at once in slabs of so many voxels: of layers at full
    resolution, and of those before branches part, few, as they are large and many."""
    network, branches = schedules.layout.network, Branches(schedules)
    deep = branches.parted - branches.parting
    finest = min(spacing[0] for spacing in network.spacing.values())
    found = {}
    for node in network:
        spacing = network.spacing[node.name][0]
        thin = node.name not in deep if deep else spacing == finest
        found[node.name] = max(1, int((min(_THIN, thickness) if thin else thickness) / spacing))
    return found


def search(layout: Layout, resources: Resources) -> Plan | None:
    """The fastest plan in slabs that fits; None where none does, or none can be."""
    plain = Schedules(layout, choose_primitives(layout))
    if not streams(layout, plain):
        return None
    found = [
        one
        for thickness in _thicknesses(layout)
        for one in _tried(layout, resources, plain, thickness)
    ]
    for one in sorted(found, key=lambda one: one.seconds):
        for in_flight in range(MOST_BLOCKS_IN_FLIGHT, 0, -1):
            reading, needed_bytes = one.slabs.reading(in_flight)
            if needed_bytes <= resources.allowed_bytes:
                return one.slabs.plan(in_flight, reading, needed_bytes)
    return None


def checked(layout: Layout, resources: Resources, given: Plan) -> Plan:
    """A plan that was given back, with what it is expected to take now.

    Raises `OptionError` where it does not fit the network or the volume, `MemoryLimitError` where
    it needs more than is allowed.
    """
    check_given(resources, given)
    primitives = chosen_primitives(layout, given)
    schedules = Schedules(layout, primitives)
    if not streams(layout, schedules):
        raise OptionError("the plan makes blocks slab by slab, which this run cannot")
    if odd := set(primitives) - set(given.granules):
        raise OptionError(f"the plan does not say how many planes of {sorted(odd)[0]!r} are made")
    if any(stage.samples > 1 for stage in given.stages):
        raise OptionError("the plan computes several windows at once, and here are slabs")
    slabs = Slabs(layout, resources, schedules, given.block, given.granules)
    reading, needed_bytes = slabs.reading(given.blocks_in_flight)
    check_room(resources, needed_bytes)
    return slabs.plan(given.blocks_in_flight, reading, needed_bytes)


def _thicknesses(layout: Layout) -> list[int]:
    """Of slabs, in voxels."""
    unit = layout.geometry.alignment[0] if not layout.geometry.dense else layout.fragments[0]
    return [unit * n for n in _THICKNESSES if n == 1 or unit * n <= _THICKEST]


def _tried(
    layout: Layout, resources: Resources, plain: Schedules, thickness: int
) -> Iterator[_Found]:
    """The largest cross-sections that fit, with the primitives that are fastest there."""
    threads, granules = resources.threads, granules_of(plain, thickness)
    blocks, programs = _blocks(layout, resources), _Programs(layout, plain, granules, thickness)

    def column_of(block: Size) -> tuple[Column, Program, int]:
        """The column of a block, what is done in it, and the memory left for what primitives keep
        and compute in."""
        column, program = programs.of(min(block[0], layout.output_size[0]))
        wide = _across(column, block)
        memory = memory_of(wide, threads, program)
        pages = memory.pages.all_bytes + memory.slab_bytes + memory.table_bytes
        beside = _beside_bytes(layout, resources, block, thickness, 1, by_cells=False)
        return wide, program, resources.allowed_bytes - beside - pages

    first = bisect_left(blocks, True, key=lambda block: column_of(block)[-1] > 0)
    for block in blocks[first : first + _TRIED]:
        wide, program, room = column_of(block)
        count = _count(resources.hull, block)
        problems = {
            step.operation.node.name: (step.problem, count * times)
            for step, times in _typical(wide, program)
            if not isinstance(step.primitive, FormChange)
        }
        menu = Menu(plain, problems, threads, resources.costs, copied_bytes)
        for _ in range(_AGAIN):
            if (found := menu.best_within(room)) is None:
                break
            seconds, primitives = found
            slabs = Slabs(layout, resources, Schedules(layout, primitives), block, granules)
            over = slabs.estimated_bytes - resources.allowed_bytes
            if over <= 0:
                turns = count * sum(task.times for task in program.tasks)
                yield _Found(slabs, seconds + turns * _TURN_SECONDS)
                break
            room -= over  # what changes forms, and is handed copies, takes pages and copies, too


def _blocks(layout: Layout, resources: Resources) -> list[Size]:
    """Those to try, of the largest cross-section first: as long as does not take a quarter of the
    memory."""
    if resources.block is not None:
        return [resources.block]
    (along, *across), size = resources.unit, layout.output_size
    widths = [
        [u * m for m in MULTIPLES if u * (m - 1) < n] for u, n in zip(across, size[1:], strict=True)
    ]
    found = []
    for y, x in product(*widths):
        if max(y, x) <= _NARROWEST * min(y, x) or (y, x) == (widths[0][0], widths[1][0]):
            lengths = [along * m for m in range(_LONGEST, 0, -1) if along * (m - 1) < size[0]]
            fitting = (
                z
                for z in lengths
                if 4 * _block_bytes(layout, resources, (z, y, x), False) <= resources.allowed_bytes
            )
            found.append((next(fitting, lengths[-1]), y, x))
    return sorted(found, key=lambda block: -block[1] * block[2])


@dataclass(frozen=True, eq=False)
class _Programs:
    """What is done in columns, in slabs of a thickness. Of a long column a few slabs stand for all:
    then it goes on as it did."""

    layout: Layout
    schedules: Schedules
    granules: Mapping[str, int]
    thickness: int
    _found: dict[int, tuple[Column, Program]] = field(default_factory=dict)

    def of(self, length: int) -> tuple[Column, Program]:
        """What is done in a column of so many planes, and a column of a few of them."""
        short = STEADY * self.thickness
        few = length if length <= short + self.thickness else short
        if few not in self._found:
            first = (self.layout.output_size[0] - few) // 2
            first -= first % self.layout.periods[0]
            output = Box((first, 0, 0), (first + few, 1, 1))
            column = Column.of(self.schedules, output, self.granules)
            self._found[few] = column, Program.of(column)
        column, program = self._found[few]
        return column, program.extended((length - few) / self.thickness)


def _across(column: Column, block: Size) -> Column:
    """A column of the largest cross-section of blocks."""
    start, stop = column.output.start[0], column.output.stop[0]
    return across_of(column.schedules, (start, stop), block, column.granules)


def _typical(column: Column, program: Program) -> list[tuple[Step, float]]:
    """For every operation what it computes at once, mostly, and how often."""
    planes: defaultdict[Stored, float] = defaultdict(float)
    most: dict[Stored, tuple[float, int, Step]] = {}
    for task, problem in program.problems(column):
        array, made = task.operation.output, task.planes[1] - task.planes[0]
        planes[array] += task.times * made
        if array not in most or task.times * made > most[array][0]:
            most[array] = task.times * made, made, Step(task.operation, problem)
    return [(step, planes[array] / made) for array, (_, made, step) in most.items()]


@dataclass(frozen=True, eq=False)
class Slabs:
    """Blocks that are made slab by slab by chosen primitives."""

    layout: Layout
    resources: Resources
    schedules: Schedules
    block: Size
    granules: Mapping[str, int]

    @property
    def thickness(self) -> int:
        """Of a slab, in voxels of the answer."""
        return min(
            self.granules[self.layout.network.output] * self.layout.fragments[0], self.block[0]
        )

    def steps(self) -> list[tuple[Step, float]]:
        """For every operation what it computes at once, mostly, and how often in a block."""
        column, program = self._column
        return _typical(_across(column, self.block), program)

    @cached_property
    def _column(self) -> tuple[Column, Program]:
        programs = _Programs(self.layout, self.schedules, self.granules, self.thickness)
        return programs.of(min(self.block[0], self.layout.output_size[0]))

    @property
    def estimated_bytes(self) -> int:
        """Memory of the process, one block in flight, as far as a few slabs tell."""
        column, program = self._column
        wide = _across(column, self.block)
        computing = memory_of(wide, self.resources.threads, program).all_bytes
        beside = (self.block, self.thickness, 1, False)
        return (
            computing
            + self.schedules.prepared_bytes
            + _beside_bytes(self.layout, self.resources, *beside)
        )

    @cached_property
    def computing_bytes(self) -> int:
        """Memory of computing."""
        threads = self.resources.threads
        memory = memory_of_all(self.schedules, self.block, self.granules, threads)
        return memory.all_bytes + self.schedules.prepared_bytes

    def reading(self, in_flight: int) -> tuple[Reading, int]:
        """How so many blocks in flight share what is decoded, and the memory of the process."""

        def needed(by_cells: bool) -> int:
            beside = (self.block, self.thickness, in_flight, by_cells)
            return self.computing_bytes + _beside_bytes(self.layout, self.resources, *beside)

        resources = self.resources
        reads = Reads(self.layout, self.block, resources.cells, resources.hull)
        return shared_reading(resources, reads, needed)

    def plan(self, in_flight: int, reading: Reading, needed_bytes: int) -> Plan:
        """The plan as a value."""
        layout, resources, costs = self.layout, self.resources, self.resources.costs
        column, program = self._column
        share = _count(resources.hull, self.block) / resources.hull.voxels  # of a voxel
        seconds: defaultdict[str, float] = defaultdict(float)
        flops = 0.0
        for task, problem in program.problems(_across(column, self.block)):
            primitive, times = task.operation.primitive, share * task.times
            one = costs.step_seconds(primitive, problem, resources.threads)
            copied = copied_bytes(primitive, problem)
            one += costs.copying_seconds(copied, resources.threads) + _TURN_SECONDS
            seconds[task.operation.node.name] += times * one
            flops += times * primitive.flops(problem)
        primitives = self.schedules.primitives
        once = costs.touching_seconds(needed_bytes - resources.baseline_bytes)
        once += sum(costs.setup_seconds(p, layout.network[n].layer) for n, p in primitives.items())
        moved = moving_seconds(layout, resources, reading.amplification, 1)
        a_voxel = sum(seconds.values()) + moved + once / resources.hull.voxels
        _, y, x = (min(b, n) for b, n in zip(self.block, layout.output_size, strict=True))
        choices = tuple(
            Choice(name, primitive.name, seconds[name], self.granules[name])
            for name, primitive in primitives.items()
        )
        return Plan(
            patch=(self.thickness, y, x),
            block=self.block,
            stages=(Stage("cpu", choices),),
            threads=resources.threads,
            blocks_in_flight=in_flight,
            reading=reading,
            predicted_bytes=needed_bytes,
            allowed_bytes=resources.allowed_bytes,
            flops_per_voxel=flops,
            voxels_per_second=1 / a_voxel,
        )


@dataclass(frozen=True, eq=False)
class _Found:
    """Slabs, and the seconds of all blocks, reading and writing not counted."""

    slabs: Slabs
    seconds: float


def _beside_bytes(
    layout: Layout, resources: Resources, block: Size, slab: int, in_flight: int, by_cells: bool
) -> int:
    """Memory of the process beside what computes: blocks in flight, a slab while it is encoded,
    the weights."""
    _, y, x = (min(b, n) for b, n in zip(block, layout.output_size, strict=True))
    encoded = resources.encoding_bytes * slab * y * x
    blocks = in_flight * _block_bytes(layout, resources, block, by_cells)
    held = OVERHEAD_BYTES + network_bytes(layout.network) + resources.baseline_bytes
    return held + encoded + blocks


def _block_bytes(layout: Layout, resources: Resources, block: Size, by_cells: bool) -> int:
    """Memory of a block in flight."""
    largest = largest_box(layout, block)
    return resources.block_bytes(largest.size, layout.region(largest).size, by_cells)


def _count(hull: Box, block: Size) -> int:
    """How many blocks touch what is wanted."""
    axes = zip(hull.start, hull.stop, block, strict=True)
    return prod(ceil_divide(stop, b) - start // b for start, stop, b in axes)
