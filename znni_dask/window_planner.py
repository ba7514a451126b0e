"""The planner of patchwise runs: how large a block is made at once of the windows that touch it.

The window is given, and so is the answer. Only the block is free: windows that touch several
blocks are computed once for each, so the largest block that fits is best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod

from znni_dask.choices import Menu, choose_primitives
from znni_dask.errors import MemoryLimitError
from znni_dask.geometry import Box, Size, text, triple, volume
from znni_dask.machine import show_bytes
from znni_dask.plan import Choice, Plan, Reading, Stage
from znni_dask.planner import MULTIPLES, computing_bytes
from znni_dask.primitives.base import ITEM_BYTES
from znni_dask.reading import Reads
from znni_dask.resources import Resources, most_in_flight, shared_reading
from znni_dask.schedule import Schedules
from znni_dask.windows import WindowGrid


@dataclass(frozen=True)
class _Candidate:
    block: Size
    windows: int


@dataclass(frozen=True)
class _Fit:
    candidate: _Candidate
    reading: Reading
    needed_bytes: int


def plan(grid: WindowGrid, resources: Resources) -> Plan:
    """The plan that computes fewest windows and fits; raises `MemoryLimitError` where none does."""
    per_axis = [_blocks(grid, resources, axis) for axis in range(3)]
    ranked = sorted(
        (
            _Candidate(triple(b for b, _ in chosen), chosen[0][1] * chosen[1][1] * chosen[2][1])
            for chosen in product(*per_axis)
        ),
        key=lambda c: (c.windows, volume(c.block)),
    )
    smallest = min(ranked, key=lambda c: volume(c.block)).block
    plain = Schedules(grid.layout, choose_primitives(grid.layout))
    for schedules in (*_fast(grid, plain, resources, smallest), plain):
        if (best := _best(grid, schedules, resources, ranked)) is not None:
            break
    else:
        raise MemoryLimitError(_refusal(grid, plain, resources, smallest))
    fit, in_flight = best
    steps = schedules.steps(grid.layout.sizes)
    flops = fit.candidate.windows * sum(s.primitive.flops(s.problem) for s in steps)
    return Plan(
        patch=grid.layout.output_size,
        block=fit.candidate.block,
        stages=(Stage("cpu", tuple(Choice(n, p.name) for n, p in schedules.primitives.items())),),
        threads=resources.threads,
        blocks_in_flight=in_flight,
        reading=fit.reading,
        predicted_bytes=fit.needed_bytes,
        allowed_bytes=resources.allowed_bytes,
        flops_per_voxel=flops / volume(grid.output_size),
    )


def _fast(
    grid: WindowGrid, plain: Schedules, resources: Resources, block: Size
) -> Iterator[Schedules]:
    """The fastest primitives, and those that are so within the memory that blocks leave. They are
    the same whatever threads there are."""
    window = Box((0, 0, 0), grid.layout.output_size)
    windows = prod(grid.count(axis, 0, n) for axis, n in enumerate(grid.output_size))
    menu = Menu(plain, window, windows, threads=1)
    yield (fast := Schedules(grid.layout, menu.fastest()))
    over = _predicted_bytes(grid, fast, resources, block, 1, False) - resources.allowed_bytes
    if over > 0:
        spent = fast.spent_bytes(grid.layout.sizes, resources.threads)
        if (within := menu.fastest_within(spent - over)) is not None:
            yield Schedules(grid.layout, within)


def _best(
    grid: WindowGrid, schedules: Schedules, resources: Resources, ranked: list[_Candidate]
) -> tuple[_Fit, int] | None:
    """The best block with some primitives, and the blocks in flight."""

    def first_that_fits(in_flight: int) -> _Fit | None:
        for candidate in ranked:
            block = candidate.block
            needed = partial(_predicted_bytes, grid, schedules, resources, block, in_flight)
            if needed(by_cells=False) <= resources.allowed_bytes:
                reads = Reads(grid, block, resources.cells, resources.hull)
                return _Fit(candidate, *shared_reading(resources, reads, needed))
        return None

    return most_in_flight(first_that_fits, lambda fit: fit.candidate.windows)


def _refusal(grid: WindowGrid, schedules: Schedules, resources: Resources, block: Size) -> str:
    needed = _predicted_bytes(grid, schedules, resources, block, 1, False)
    layer = schedules.largest_layer(grid.layout.sizes)
    return (
        f"windows of {text(grid.window)} need {show_bytes(needed)}, "
        f"{show_bytes(resources.allowed_bytes)} are allowed; the largest layer is {layer!r} "
        f"({grid.network[layer].layer.kind}); a block of {text(block)} reads "
        f"{text(_largest_region(grid, block))} voxels. To go on, allow at least "
        f"{show_bytes(needed)}, or choose smaller windows or chunks"
    )


def _blocks(grid: WindowGrid, resources: Resources, axis: int) -> list[tuple[int, int]]:
    """Lengths of blocks along an axis, and how many windows all blocks touch together of what is
    wanted."""
    n, unit = grid.output_size[axis], resources.unit[axis]
    first, last = resources.hull.start[axis], resources.hull.stop[axis]
    lengths = [unit * m for m in MULTIPLES if unit * (m - 1) < n]
    if resources.block is not None:
        lengths = [resources.block[axis]]
    return [
        (
            length,
            sum(
                grid.count(axis, max(a, first), min(a + length, last))
                for a in range(first // length * length, last, length)
            ),
        )
        for length in lengths
    ]


def _predicted_bytes(
    grid: WindowGrid,
    schedules: Schedules,
    resources: Resources,
    block: Size,
    in_flight: int,
    by_cells: bool,
) -> int:
    """Peak memory of the whole process for this block, cells that are kept apart."""
    channels = grid.network.out_channels
    largest = triple(min(b, n) for b, n in zip(block, grid.output_size, strict=True))
    per_block = resources.block_bytes(largest, _largest_region(grid, block), by_cells)
    # the sums and the weights of a block, and what it becomes when it is stored
    blending = (ITEM_BYTES * (channels + 1) + resources.encoding_bytes) * volume(largest)
    window = ITEM_BYTES * (channels + 2) * volume(grid.layout.output_size)
    return (
        resources.baseline_bytes
        + computing_bytes(schedules, grid.layout.sizes, grid.layout.output_size, resources.threads)
        + blending
        + window
        + in_flight * per_block
    )


def _largest_region(grid: WindowGrid, block: Size) -> Size:
    """The longest stretch of the volume along every axis that any block needs."""
    longest = []
    for axis, (n, b) in enumerate(zip(grid.output_size, block, strict=True)):
        spans = (grid.reach(axis, a, min(a + b, n)) for a in range(0, n, b))
        longest.append(max(stop - start for start, stop in spans))
    return triple(longest)
