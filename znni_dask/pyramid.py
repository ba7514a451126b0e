"""The coarser levels of outputs, made on the workers when the first level is complete.

A task makes one block of a level, whole chunks or one shard, from the level before: channel after
channel, part after part, so that its memory depends on chunks and shards alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from distributed import WorkerPlugin, get_worker

from znni_dask.cluster import Cluster, Crew, Means, on_workers
from znni_dask.errors import MemoryLimitError, RunError, is_full
from znni_dask.feeding import Work, feed
from znni_dask.geometry import (
    Box,
    Size,
    ceil_divide,
    multiply,
    round_up,
    text,
    tiles,
    triple,
    volume,
)
from znni_dask.job import LONGEST_RUN, Target
from znni_dask.journal import Journal
from znni_dask.machine import show_bytes
from znni_dask.primitives.base import ITEM_BYTES
from znni_dask.resources import MOST_BLOCKS_IN_FLIGHT
from znni_dask.storage.levels import Level, halved
from znni_dask.storage.output import ENCODED_AT_ONCE, OutputLayout

Failure = tuple[Box, BaseException]
_PART_VOXELS = 64**3  # made at once, of a level: smaller chunks are taken together


@dataclass(frozen=True)
class Pyramid:
    """How the coarser levels of a pass are made: so many blocks at a time, and the peak memory of
    the whole process meanwhile."""

    blocks_in_flight: int
    predicted_bytes: int


def plan(layouts: Sequence[OutputLayout], used_bytes: int, allowed_bytes: int) -> Pyramid:
    """As many blocks in flight as fit; raises `MemoryLimitError` where not even one does.

    ``used_bytes`` is what the process holds beside them.
    """
    per_block = max(
        (_block_bytes(m, number) for m in layouts for number in range(1, len(m.levels))), default=0
    )
    for in_flight in range(MOST_BLOCKS_IN_FLIGHT, 0, -1):
        needed = used_bytes + in_flight * per_block
        if needed <= allowed_bytes or not per_block:
            return Pyramid(in_flight, needed)
    block = f"{show_bytes(per_block)} for a block of {text(_block(layouts[0], 1))}"
    enough = show_bytes(needed, enough=True)
    raise MemoryLimitError(
        f"the coarser levels of the output need {enough}, {show_bytes(allowed_bytes)} are "
        f"allowed: {block}. To go on, allow at least {enough}, choose smaller chunks or shards, or "
        "leave the levels out (pyramid=False, --no-pyramid)",
        needed,
    )


class LevelMaker(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Lives on a worker and makes blocks of one level there."""

    def __init__(self, targets: Sequence[Target], level: int) -> None:
        self.name = f"znni-{uuid.uuid4().hex}"
        self.targets = tuple(targets)
        self.level = level

    def make(self, time: int, block: Box) -> None:
        """Make one block of all targets."""
        for target in self.targets:
            channels = target.layout.encoding.stored_channels(target.layout.channels)
            for channel in range(channels):
                self._make(target, time, channel, block)

    def _make(self, target: Target, time: int, channel: int, block: Box) -> None:
        layout, image = target.layout, target.image
        before, step = layout.levels[self.level - 1], _step(layout, self.level)
        made = np.empty(block.size, layout.dtype)
        for part in tiles(block.size, _part(layout, self.level)):
            there = part.shifted(block.start)
            source = Box(multiply(there.start, step), multiply(there.stop, step))
            values = image.read(self.level - 1, source.clipped(before.size), time, channel)
            made[part.slices] = halved(values, step, layout.encoding.labels)
        image.write(block, made, time, level=self.level, channel=channel)


def make_levels(
    cluster: Cluster,
    crew: Crew,
    targets: Sequence[Target],
    hull: Box,
    plan: Pyramid,
    journal: Journal,
    steps: Sequence[int],
    told: Callable[[int], None],
) -> tuple[int, list[Failure]]:
    """Make what is missing of the coarser levels, one after another; none after one that failed.

    Outside ``hull``, in voxels of the first level, is nothing but 0, which stays unwritten.
    ``steps`` are the numbers of the levels in the journal; ``told`` is called with the voxels of
    every block that is done. Returns how many blocks were made, and those that failed.
    """
    layout, count = targets[0].layout, 0
    failures: list[Failure] = []
    for level in range(1, len(layout.levels)):
        held = partial(journal.holds, steps[level])
        missing = (place for place in _blocks(layout, level, hull) if not held(*place))
        over = _over(layout.levels[level], hull)
        told(sum(b.shared_voxels(over) for t, b in _blocks(layout, level, hull) if held(t, b)))

        def finished(
            time: int,
            block: Box,
            error: BaseException | None,
            level: int = level,
            over: Box = over,
        ) -> None:
            nonlocal count
            if error is None:
                journal.add(steps[level], time, block)
                count += 1
            else:
                failed = RunError(f"level {level}: {error}")
                failed.__cause__ = error
                failures.append((block, failed))
            told(block.shared_voxels(over))

        _make_level(cluster, crew, LevelMaker(targets, level), plan, missing, finished)
        if failures:
            break
    return count, failures


def voxels(layout: OutputLayout, hull: Box) -> int:
    """Voxels of all coarser levels over the hull, at all time points."""
    return layout.times * sum(_over(level, hull).voxels for level in layout.levels[1:])


def _make_level(
    cluster: Cluster,
    crew: Crew,
    maker: LevelMaker,
    plan: Pyramid,
    waiting: Iterator[tuple[int, Box]],
    finished: Callable[[int, Box, BaseException | None], None],
) -> None:
    """Feed the blocks (time point, box) of a level to the workers, those that come later, too, if
    they have what it takes. Where the disk is full no more are begun."""
    needed = Means(1, plan.predicted_bytes, crew.kinds[0].baseline_bytes)

    def make(_: str, place: tuple[int, Box]) -> Callable[[], None]:
        return partial(_make_block, maker.name, *place)

    def done(place: tuple[int, Box], error: BaseException | None) -> bool:
        finished(*place, error)
        return not is_full(error)

    def takes(_: str, means: Means) -> bool:
        return means.suffice_for(needed)

    runs = iter(lambda: [*islice(waiting, LONGEST_RUN)], [])
    with on_workers(cluster.client, maker):
        feed(cluster, crew, Work(runs, plan.blocks_in_flight, make, done, takes))


def _make_block(name: str, time: int, block: Box) -> None:
    maker: LevelMaker = get_worker().plugins[name]
    maker.make(time, block)


def _blocks(layout: OutputLayout, level: int, hull: Box) -> Iterator[tuple[int, Box]]:
    """The blocks (time point, box) of a level that touch the hull; the same for all outputs of a
    pass."""
    there = layout.levels[level]
    for time in range(layout.times):
        for block in tiles(there.size, _block(layout, level), _over(there, hull)):
            yield time, block


def _over(level: Level, hull: Box) -> Box:
    """The voxels of a level that span something of the hull."""
    start = triple(a // f for a, f in zip(hull.start, level.factors, strict=True))
    stop = triple(ceil_divide(b, f) for b, f in zip(hull.stop, level.factors, strict=True))
    return Box(start, stop)


def _block(layout: OutputLayout, level: int) -> Size:
    """What a task makes of a level: a shard, or chunks."""
    return layout.shards or _part(layout, level)


def _part(layout: OutputLayout, level: int) -> Size:
    """What is made at once: a chunk, or several where they are small."""
    part, size = layout.chunks_of(layout.levels[level]), layout.levels[level].size
    while 2 * volume(part) <= _PART_VOXELS:
        short = [axis for axis in range(3) if part[axis] < size[axis]]
        if not short:
            break
        longer = min(short, key=lambda axis: part[axis])
        part = triple(2 * p if axis == longer else p for axis, p in enumerate(part))
    return part


def _step(layout: OutputLayout, level: int) -> Size:
    """How many voxels of the level before a voxel spans."""
    factors, before = layout.levels[level].factors, layout.levels[level - 1].factors
    return triple(f // b for f, b in zip(factors, before, strict=True))


def _block_bytes(layout: OutputLayout, level: int) -> int:
    """Memory that making a block of a level takes at most, of one channel."""
    item, size, before = layout.dtype.itemsize, layout.levels[level].size, layout.levels[level - 1]
    block = triple(min(b, n) for b, n in zip(_block(layout, level), size, strict=True))
    part = triple(min(p, n) for p, n in zip(_part(layout, level), size, strict=True))
    region = multiply(part, _step(layout, level))
    touched = triple(map(round_up, region, layout.chunks_of(before)))
    # chunks are held twice while they are decoded, and twice more within shards
    decoded = (4 if layout.shards else 2) * item * volume(touched)
    reading = item * volume(region) + decoded + ITEM_BYTES * volume(region)
    unit = layout.shards or layout.chunks_of(layout.levels[level])
    units = volume(triple(map(ceil_divide, block, unit)))
    writing = 3 * item * volume(unit) * min(units, ENCODED_AT_ONCE)
    return item * volume(block) + max(reading, writing)
