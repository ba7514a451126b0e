"""What slabs take: blocks of the answer made as columns, by chosen primitives.

What is done along z depends on the slabs, but not on the cross-section, so it is worked out once
for each thickness. Arithmetic on shapes and costs only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from znni_dask.columns import Column, period_of, thickness_of
from znni_dask.cut import Cut
from znni_dask.geometry import Box, ceil_divide
from znni_dask.machine import GPU
from znni_dask.pages import (
    STEADY,
    ColumnMemory,
    Program,
    across_of,
    copied_bytes,
    memory_of,
    memory_of_all,
)
from znni_dask.patches import Layout, largest_box
from znni_dask.plan import Choice, Plan, Reading, Stage
from znni_dask.primitives.offloaded import inner_of
from znni_dask.reading import Reads
from znni_dask.resources import (
    DEVICE_SLACK_BYTES,
    OVERHEAD_BYTES,
    SLOTS,
    Need,
    Resources,
    lent_need,
    moving_seconds,
    network_bytes,
    shared_reading,
)
from znni_dask.schedule import Arrangement, Schedules, Step, Stored

_LITTLE = 0.05  # of the memory, to decode chunks once along a column
TURN_SECONDS = 2e-4  # to find planes and take pages, beside calling a primitive


def granules_of(layout: Arrangement, thickness: int, thin: int) -> dict[str, int]:
    """Planes of every layer that are made at once in slabs of so many voxels: of layers at full
    resolution, and of those that read them, ``thin`` ones, as they are large."""
    network = layout.network
    finest = min(spacing[0] for spacing in network.spacing.values())
    found = {}
    for node in network:
        near = [network.spacing[name][0] for name in (node.name, *node.inputs)]
        planes = min(thin, thickness) if min(near) == finest else thickness
        found[node.name] = max(1, int(planes / near[0]))
    return found


@dataclass(frozen=True, eq=False)
class Programs:
    """What is done in columns, in slabs of a thickness. Of a long column a few periods stand for
    all: then it goes on as it did. What is done is the same whatever computes it."""

    layout: Layout
    granules: Mapping[str, int]
    _found: dict[tuple[Any, ...], Program] = field(default_factory=dict)

    def of(self, schedules: Schedules, length: int) -> tuple[Column, Program]:
        """What is done in a column of so many planes, and a column of a few of them."""
        period = period_of(self.layout, self.granules)
        short = STEADY * period
        few = length if length <= short + period else short
        first = (self.layout.output_size[0] - few) // 2
        first -= first % self.layout.periods[0]
        output = Box((first, 0, 0), (first + few, 1, 1))
        column = Column.of(schedules, output, self.granules)
        alike = few, schedules.repeats, tuple((o.inputs, o.output) for o in schedules.operations)
        if alike not in self._found:
            self._found[alike] = Program.of(column)
        more = length - few
        return column, self._found[alike].extended(more / period, more)


def across(column: Column, cut: Cut) -> Column:
    """A column of the largest cross-section of blocks."""
    start, stop = column.output.start[0], column.output.stop[0]
    return across_of(column.schedules, (start, stop), cut.block, column.granules)


def typical(column: Column, program: Program) -> list[tuple[Step, float]]:
    """For every operation what it computes at once, mostly, and how often."""
    planes: defaultdict[Stored, float] = defaultdict(float)
    most: dict[Stored, tuple[float, int, Step]] = {}
    for task, step in program.steps(column):
        array, made = step.operation.output, task.planes[1] - task.planes[0]
        planes[array] += task.times * made
        if array not in most or task.times * made > most[array][0]:
            most[array] = task.times * made, made, step
    return [(step, planes[array] / made) for array, (_, made, step) in most.items()]


@dataclass(frozen=True, eq=False)
class Slabs:
    """An answer, cut into columns, that is made in the slabs of ``programs`` by chosen
    primitives."""

    resources: Resources
    schedules: Schedules
    cut: Cut
    programs: Programs

    @property
    def layout(self) -> Layout:
        """How the network lies over the volume."""
        return self.programs.layout

    @property
    def granules(self) -> Mapping[str, int]:
        """Planes of every layer that are made at once."""
        return self.programs.granules

    def steps(self) -> list[tuple[Step, float]]:
        """For every operation what it computes at once, mostly, and how often in a block."""
        column, program = self._column
        return typical(across(column, self.cut), program)

    @cached_property
    def _column(self) -> tuple[Column, Program]:
        long, *_ = self.cut.column
        return self.programs.of(self.schedules, min(long, self.layout.output_size[0]))

    def estimated_need(self, in_flight: int) -> Need:
        """Memory that is needed, as far as a few slabs tell."""
        column, program = self._column
        wide = across(column, self.cut)
        beside = wanted_bytes(self.programs, self.resources, self.cut, in_flight)
        return self._need(memory_of(wide, self.resources.threads, program)).plus(beside)

    @cached_property
    def computing(self) -> Need:
        """Memory of computing."""
        threads = self.resources.threads
        return self._need(memory_of_all(self.schedules, self.cut, self.granules, threads))

    def _need(self, memory: ColumnMemory) -> Need:
        primitives, kept = self.schedules.primitives.values(), self.schedules.prepared_bytes
        if self.resources.device == GPU:
            libraries = {type(p): p.process_bytes for p in primitives}
            beside, device = on_device(memory)
            device += memory.copies_bytes + memory.workspace_bytes + memory.beside_bytes
            return Need(beside + sum(libraries.values()), device + kept)
        lent = lent_need(memory.lent, inner_of(primitives)) if memory.lent else Need(0)
        return lent.plus(memory.all_bytes + kept)

    def reading(self, in_flight: int) -> tuple[Reading, int]:
        """How so many blocks in flight share what is decoded, and the memory of the process."""

        def needed(by_cells: bool) -> int:
            beside = beside_bytes(self.programs, self.resources, self.cut, in_flight, by_cells)
            return self.computing.process_bytes + beside

        resources, cut = self.resources, self.cut
        reads = Reads(self.layout, cut.block, resources.cells, resources.hull, cut.in_column)
        return shared_reading(resources, reads, needed)

    def plan(self, in_flight: int, reading: Reading, needed_bytes: int) -> Plan:
        """The plan as a value."""
        layout, resources, costs = self.layout, self.resources, self.resources.costs
        column, program = self._column
        share = times_of(layout, resources, self.cut) / resources.hull.voxels  # of a voxel
        seconds: defaultdict[str, float] = defaultdict(float)
        flops = 0.0
        for task, step in program.steps(across(column, self.cut)):
            primitive, times = step.primitive, share * task.times
            one = costs.step_seconds(primitive, step.problem, resources.threads)
            copied = copied_bytes(primitive, step.problem)
            one += costs.handing_seconds(primitive, step.problem, copied, resources.threads)
            one += TURN_SECONDS
            seconds[step.operation.node.name] += times * one
            flops += times * primitive.flops(step.problem)
        primitives = self.schedules.primitives
        once = resources.touching_seconds(needed_bytes)
        once += sum(costs.setup_seconds(p, layout.network[n].layer) for n, p in primitives.items())
        moved = moving_seconds(layout, resources, reading.amplification, 1)
        a_voxel = resources.together(sum(seconds.values()), moved) + once / resources.hull.voxels
        long, y, x = (min(b, n) for b, n in zip(self.cut.column, layout.output_size, strict=True))
        choices = tuple(
            Choice(name, primitive.name, seconds[name], self.granules[name])
            for name, primitive in primitives.items()
        )
        return Plan(
            patch=(min(period_of(layout, self.granules), long), y, x),
            block=self.cut.block,
            stages=(Stage(resources.device, choices),),
            threads=resources.threads,
            blocks_in_flight=in_flight,
            reading=reading,
            predicted_bytes=needed_bytes,
            allowed_bytes=resources.allowed_bytes,
            flops_per_voxel=flops,
            voxels_per_second=1 / (resources.waiting(self.cut.block) * a_voxel),
            blocks_in_column=self.cut.in_column,
            device_bytes=self.computing.device_bytes,
            allowed_device_bytes=resources.device_bytes,
        )


def beside_bytes(
    programs: Programs, resources: Resources, cut: Cut, in_flight: int, by_cells: bool
) -> int:
    """Memory of the process beside what computes: blocks in flight, what else is read of the volume
    while a column goes on, a slab while it is encoded, the weights."""
    layout = programs.layout
    long, y, x = (min(b, n) for b, n in zip(cut.column, layout.output_size, strict=True))
    slab = min(thickness_of(layout, programs.granules), long)
    encoded = resources.encoding_bytes * slab * y * x
    largest = largest_box(layout, cut.block)
    ahead = cut.ahead(layout, largest, begins=True).size
    blocks = in_flight * resources.block_bytes(largest.size, ahead, by_cells)
    more = resources.read_bytes(ahead, by_cells=by_cells) if cut.in_column > 1 else 0
    held = OVERHEAD_BYTES + network_bytes(layout.network) + resources.baseline_bytes
    return held + encoded + blocks + more


def wanted_bytes(programs: Programs, resources: Resources, cut: Cut, in_flight: int) -> int:
    """The same with room for the chunks that two blocks of a column read, where that is little:
    kept, they are decoded once."""
    if resources.cells is None or cut.in_column == 1:
        return beside_bytes(programs, resources, cut, in_flight, by_cells=False)
    cells, layout = resources.cells, programs.layout
    region = layout.region(largest_box(layout, cut.block))
    _, y, x = (
        min((ceil_divide(n, cell) + 1) * cell, whole)
        for n, cell, whole in zip(region.size, cells.size, cells.whole, strict=True)
    )
    kept = cells.size[0] * y * x * cells.voxel_bytes
    little = kept <= _LITTLE * resources.allowed_bytes
    beside = beside_bytes(programs, resources, cut, in_flight, by_cells=little)
    return beside + kept * little


def on_device(memory: ColumnMemory) -> Need:
    """Memory that columns take on a device, and of the process, but for what primitives keep and
    compute in."""
    ends = SLOTS * (memory.loaded_bytes + memory.slab_bytes)
    return Need(memory.table_bytes + ends, DEVICE_SLACK_BYTES + memory.pages.held_bytes + ends)


def times_of(layout: Layout, resources: Resources, cut: Cut) -> float:
    """How many columns touch what is wanted; the last ones, which are smaller, count less."""
    hull, found = resources.hull, 1.0
    for axis, (b, long) in enumerate(zip(cut.block, cut.column, strict=True)):
        n, halo = layout.output_size[axis], halo_of(layout, axis)
        starts = range(hull.start[axis] // b * b, hull.stop[axis], long)
        found *= sum(min(long, n - start) + halo for start in starts) / (min(long, n) + halo)
    return found


def halo_of(layout: Layout, axis: int) -> float:
    """What a typical layer computes beyond a block, in voxels of the answer."""
    geometry = layout.geometry.axes[axis]
    return (geometry.field_of_view - 1) / 2 / float(geometry.output_stride)


def computed_voxels(layout: Layout, resources: Resources, cut: Cut) -> float:
    """In voxels what all columns compute: of a typical layer half the field of view is added."""
    axes = zip(cut.column, layout.output_size, strict=True)
    sides = (min(b, n) + halo_of(layout, axis) for axis, (b, n) in enumerate(axes))
    return times_of(layout, resources, cut) * prod(sides)
