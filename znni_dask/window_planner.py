"""The planner of patchwise runs: how many windows are computed at once, and how large a block is
made at once of the windows that touch it.

The window is given, and so is the answer. Windows that touch several blocks are computed once for
each, so the largest block that fits is best; several windows at once share what is read of the
weights, as far as memory for their arrays goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod

from znni_dask.choices import Menu, choose_primitives, chosen_primitives, planned
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.geometry import Box, Size, text, triple, volume
from znni_dask.machine import show_bytes
from znni_dask.plan import Alternative, Plan, Stage
from znni_dask.planner import MULTIPLES
from znni_dask.primitives.base import ITEM_BYTES
from znni_dask.reading import Reads
from znni_dask.resources import (
    Need,
    Resources,
    check_given,
    check_room,
    computing_need,
    most_in_flight,
    moving_seconds,
    shared_reading,
)
from znni_dask.schedule import Schedules
from znni_dask.windows import WindowGrid

SAMPLES = (1, 2, 4, 8, 16)  # windows at once
_WORTH_MORE_SAMPLES = 1.05  # times faster that twice the memory must make it


@dataclass(frozen=True)
class _Candidate:
    """A block, the windows that all blocks touch together, the most that any of them does, the
    largest region of the volume that any of them reads, and how much longer than they work all
    workers are there."""

    block: Size
    windows: int
    most: int
    region: Size
    waiting: float


@dataclass(frozen=True, eq=False)
class _Way:
    """How windows may be computed, so many at once; the seconds of a window and those before the
    first, and the memory that it takes."""

    schedules: Schedules
    window_seconds: float
    setup_seconds: float
    need: Need

    @classmethod
    def of(cls, schedules: Schedules, grid: WindowGrid, resources: Resources) -> _Way:
        """Estimates are for one thread, lest answers differ in rounding with their number."""
        sizes, costs = grid.layout.sizes, resources.costs
        steps = schedules.steps(sizes)
        return cls(
            schedules,
            costs.estimated_seconds(steps, threads=1) / schedules.samples,
            sum(costs.setup_seconds(s.primitive, s.operation.node.layer) for s in steps),
            computing_need(resources, schedules, sizes, grid.layout.output_size),
        )

    def seconds(self, candidate: _Candidate) -> float:
        """Of a whole run."""
        computing = candidate.waiting * candidate.windows * self.window_seconds
        return self.setup_seconds + computing


@dataclass(frozen=True)
class _Fit:
    way: _Way
    candidate: _Candidate

    @property
    def seconds(self) -> float:
        """Of a whole run."""
        return self.way.seconds(self.candidate)


def plan(grid: WindowGrid, resources: Resources) -> Plan:
    """The fastest plan that fits; raises `MemoryLimitError` where none does."""
    return search(grid, resources)[0]


def search(grid: WindowGrid, resources: Resources) -> tuple[Plan, tuple[Alternative, ...]]:
    """The fastest plan that fits, and others, with fewer and more windows at once; raises
    `MemoryLimitError` where none fits."""
    candidates = _candidates(grid, resources)
    smallest = min(candidates, key=lambda c: volume(c.block))
    ways = list(_ways(grid, resources, candidates))
    best = most_in_flight(
        partial(_best, grid, resources, ways, candidates), lambda fit: fit.seconds
    )
    if best is None:
        raise _refusal(grid, ways[0], resources, smallest)
    return _told(grid, resources, *best), tuple(_alternatives(grid, resources, ways, candidates))


def _alternatives(
    grid: WindowGrid, resources: Resources, ways: list[_Way], candidates: list[_Candidate]
) -> Iterator[Alternative]:
    """Every way with the largest block whose windows it takes together."""
    for way in ways:
        samples = way.schedules.samples
        candidate = next(c for c in candidates if c.most >= samples)
        nbytes = _predicted_need(grid, way, resources, candidate, 1, False).process_bytes
        rate = _rate(grid, resources, _Fit(way, candidate), 1, nbytes)
        yield Alternative(grid.layout.output_size, candidate.block, samples, rate, nbytes)


def checked(grid: WindowGrid, resources: Resources, given: Plan) -> Plan:
    """A plan that was given back, with what it is expected to take now.

    Raises `OptionError` where it does not fit the network or the volume, `MemoryLimitError` where
    it needs more than is allowed.
    """
    check_given(resources, given)
    if given.patch != grid.layout.output_size:
        raise OptionError(
            f"the plan is for patches of {text(given.patch)}, windows make "
            f"{text(grid.layout.output_size)}"
        )
    (stage,) = given.stages
    primitives = chosen_primitives(grid.layout, given)
    schedules = Schedules(grid.layout, primitives, stage.samples)
    way = _Way.of(schedules, grid, resources)
    (candidate,) = _candidates(grid, replace(resources, block=given.block))
    in_flight = given.blocks_in_flight
    check_room(resources, _predicted_need(grid, way, resources, candidate, in_flight, False))
    return _told(grid, resources, _Fit(way, candidate), in_flight)


def _told(grid: WindowGrid, resources: Resources, fit: _Fit, in_flight: int) -> Plan:
    """The plan as a value."""
    way, block = fit.way, fit.candidate.block
    by_cells, directly = (
        _predicted_need(grid, way, resources, fit.candidate, in_flight, cells)
        for cells in (True, False)
    )
    reads = Reads(grid, block, resources.cells, resources.hull)
    needed = {True: by_cells.process_bytes, False: directly.process_bytes}
    reading, needed_bytes = shared_reading(resources, reads, needed.__getitem__)
    schedules = way.schedules
    turns = fit.candidate.windows / schedules.samples
    voxels, sizes = resources.hull.voxels / turns, grid.layout.sizes
    choices = planned(schedules, sizes, voxels, resources.threads, resources.costs)
    steps = schedules.steps(sizes)
    flops = sum(step.primitive.flops(step.problem) for step in steps)
    return Plan(
        patch=grid.layout.output_size,
        block=block,
        stages=(Stage(resources.device, choices, schedules.samples),),
        threads=resources.threads,
        blocks_in_flight=in_flight,
        reading=reading,
        predicted_bytes=needed_bytes,
        allowed_bytes=resources.allowed_bytes,
        flops_per_voxel=flops / voxels,
        voxels_per_second=_rate(grid, resources, fit, reading.amplification, needed_bytes),
        device_bytes=directly.device_bytes,
        allowed_device_bytes=resources.device_bytes or 0,
    )


def _rate(
    grid: WindowGrid, resources: Resources, fit: _Fit, reads: float, needed_bytes: int
) -> float:
    """Voxels a second of a run that reads all so many times. Windows' answers are added by one
    thread: weights are read and added, answers multiplied by them and added."""
    costs, hull, schedules = resources.costs, resources.hull, fit.way.schedules
    steps = schedules.steps(grid.layout.sizes)
    window = costs.estimated_seconds(steps, resources.threads) / schedules.samples
    if not grid.classifies:
        nbytes = ITEM_BYTES * volume(grid.window) * (1 + 3 * grid.network.out_channels)
        window += costs.copying_seconds(nbytes, threads=1)
    computing = fit.candidate.windows * window / hull.voxels
    a_voxel = resources.together(computing, moving_seconds(grid, resources, reads, 1))
    once = fit.way.setup_seconds + resources.touching_seconds(needed_bytes)
    return 1 / (fit.candidate.waiting * a_voxel + once / hull.voxels)


def _ways(grid: WindowGrid, resources: Resources, candidates: list[_Candidate]) -> Iterator[_Way]:
    """The plain primitives, which need least memory, window by window; then for every number of
    windows that some block has the fastest ones, and those that are so within the memory that the
    smallest such block leaves."""
    plain = Schedules(grid.layout, choose_primitives(grid.layout, device=resources.device))
    way = partial(_Way.of, grid=grid, resources=resources)
    yield way(plain)
    window = Box((0, 0, 0), grid.layout.output_size)
    windows = prod(grid.count(axis, 0, n) for axis, n in enumerate(grid.output_size))
    for samples in SAMPLES:
        some = [candidate for candidate in candidates if candidate.most >= samples]
        if not some:
            return
        together = replace(plain, samples=samples)
        menu = Menu.of_patches(
            together, window, windows / samples, threads=1, costs=resources.costs
        )
        fast = way(replace(together, primitives=menu.fastest()))
        yield fast
        smallest = min(some, key=lambda c: volume(c.block))
        need = _predicted_need(grid, fast, resources, smallest, 1, False)
        if (over := resources.limit(need).over_bytes) > 0:
            spent = fast.schedules.spent_bytes(grid.layout.sizes, resources.threads)
            if (within := menu.fastest_within(spent - over)) is not None:
                yield way(replace(together, primitives=within))


def _best(
    grid: WindowGrid,
    resources: Resources,
    ways: list[_Way],
    candidates: list[_Candidate],
    in_flight: int,
) -> _Fit | None:
    """The fastest of what fits with so many blocks in flight; of those that are about as fast the
    one with the fewest windows at once."""
    found = []
    for way in ways:
        for candidate in candidates:
            if candidate.most < way.schedules.samples:
                continue
            need = _predicted_need(grid, way, resources, candidate, in_flight, False)
            if resources.limit(need).over_bytes <= 0:
                found.append(_Fit(way, candidate))
                break
    limit = _WORTH_MORE_SAMPLES * min((fit.seconds for fit in found), default=0.0)
    return min(
        (fit for fit in found if fit.seconds <= limit),
        key=lambda fit: (fit.way.schedules.samples, fit.seconds),
        default=None,
    )


def _refusal(
    grid: WindowGrid, plain: _Way, resources: Resources, smallest: _Candidate
) -> MemoryLimitError:
    limit = resources.limit(_predicted_need(grid, plain, resources, smallest, 1, False))
    layer = plain.schedules.largest_layer(grid.layout.sizes)
    needed = show_bytes(limit.needed_bytes, enough=True)
    return limit.refusal(
        f"windows of {text(grid.window)} need {needed}{limit.where}, "
        f"{show_bytes(limit.allowed_bytes)} are allowed; the largest layer is {layer!r} "
        f"({grid.network[layer].layer.kind}); a block of {text(smallest.block)} reads "
        f"{text(smallest.region)} voxels. To go on, allow at least {needed}, or choose smaller "
        "windows or chunks"
    )


def _candidates(grid: WindowGrid, resources: Resources) -> list[_Candidate]:
    """All blocks, those first whose windows take workers least, those that wait included."""
    per_axis = [_blocks(grid, resources, axis) for axis in range(3)]
    found = [
        _Candidate(
            *(triple(block), prod(windows), prod(most), triple(region)),
            resources.waiting(triple(block)),
        )
        for along in product(*per_axis)
        for block, windows, most, region in (map(tuple, zip(*along, strict=True)),)
    ]
    return sorted(found, key=lambda c: (c.waiting * c.windows, volume(c.block)))


def _blocks(grid: WindowGrid, resources: Resources, axis: int) -> list[tuple[int, int, int, int]]:
    """Lengths of blocks along an axis; of what is wanted how many windows all blocks touch
    together and any of them at most; and the longest stretch of the volume that any block reads."""
    n, unit = grid.output_size[axis], resources.unit[axis]
    first, last = resources.hull.start[axis], resources.hull.stop[axis]
    lengths = [unit * m for m in MULTIPLES if unit * (m - 1) < n]
    if resources.block is not None:
        lengths = [resources.block[axis]]
    found = []
    for length in lengths:
        counts = [
            grid.count(axis, max(a, first), min(a + length, last))
            for a in range(first // length * length, last, length)
        ]
        spans = (grid.reach(axis, a, min(a + length, n)) for a in range(0, n, length))
        longest = max(stop - start for start, stop in spans)
        found.append((length, sum(counts), max(counts), longest))
    return found


def _predicted_need(
    grid: WindowGrid,
    way: _Way,
    resources: Resources,
    candidate: _Candidate,
    in_flight: int,
    by_cells: bool,
) -> Need:
    """Peak memory for this block, cells that are kept apart."""
    channels = grid.network.out_channels
    largest = triple(min(b, n) for b, n in zip(candidate.block, grid.output_size, strict=True))
    per_block = resources.block_bytes(largest, candidate.region, by_cells)
    # the sums and the weights of a block, and what it becomes when it is stored
    blending = (ITEM_BYTES * (channels + 1) + resources.encoding_bytes) * volume(largest)
    weights = 2 * ITEM_BYTES * volume(grid.layout.output_size)  # of a window, and making them
    beside = resources.answers * (blending + weights)
    return way.need.plus(beside + in_flight * per_block)
