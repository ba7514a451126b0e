"""One pass of a run, as it travels to the workers, and what makes its blocks there.

A pass applies one network to one volume. Its answer may be several outputs of the user's network
that lie on one grid: their channels stand behind one another.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from distributed import WorkerPlugin, get_worker
from numpy.typing import NDArray

from znni_dask.behind import Behind
from znni_dask.choices import chosen_primitives
from znni_dask.devices.base import Device
from znni_dask.devices.opening import opened
from znni_dask.errors import DeviceError
from znni_dask.executors.columns import ColumnBlocks
from znni_dask.executors.patches import PatchBlocks
from znni_dask.geometry import Box, Size, volume
from znni_dask.machine import CPU, MemoryMeter, own_bytes
from znni_dask.patches import Layout
from znni_dask.patchwise import WindowBlocks
from znni_dask.plan import Plan
from znni_dask.primitives.base import Array
from znni_dask.reading import Order, Reads
from znni_dask.resources import SLOTS
from znni_dask.selection import Selection
from znni_dask.storage.chunk_cache import ChunkCache
from znni_dask.storage.output import Image, OutputLayout
from znni_dask.storage.volume import Volume
from znni_dask.timeline import Span, Spans
from znni_dask.turnstile import Turnstile
from znni_dask.windows import Laid

LOG = logging.getLogger(__name__)
PLUGIN = "znni blocks of "  # and where they go: what a plugin that makes blocks is called
LONGEST_RUN = 64  # blocks: a worker that takes them holds as many boxes


@dataclass(frozen=True, eq=False)
class Target:
    """An image, which takes channels ``first`` to ``last`` of a pass, encoded."""

    image: Image
    layout: OutputLayout
    first: int
    last: int

    def empty(self, block: Box) -> NDArray[np.generic]:
        """Room for a block (channel, z, y, x) as it is stored, 0 so far."""
        channels = self.layout.encoding.stored_channels(self.layout.channels)
        return np.zeros((channels, *block.size), self.layout.dtype)


@dataclass(frozen=True, eq=False)
class Job:
    """Everything a worker needs to make any block; it travels to the workers once. The ``plan`` is
    that of the weakest workers; ``others`` of kinds of workers that have more make the same blocks
    in the same order; ``smaller`` are those for each kind that take less of a device, for where
    others have taken its memory meanwhile. Where a ``timeline`` is wanted blocks tell when what was
    done."""

    laid: Laid
    volume: Volume
    selection: Selection
    nan: float | None
    plan: Plan
    others: tuple[Plan, ...] = ()
    targets: tuple[Target, ...] = ()
    timeline: bool = False
    smaller: tuple[tuple[Plan, ...], ...] = ()

    @cached_property
    def reads(self) -> Reads:
        """What the blocks read."""
        hull = self.selection.hull(self.laid)
        plan = self.plan
        column = plan.blocks_in_column, plan.axis
        return Reads(self.laid, plan.block, self.volume.cells, hull, *column)

    @cached_property
    def order(self) -> Order:
        """The order in which the blocks of a time point are made."""
        return self.reads.order(self.plan.reading)

    def blocks(self) -> Iterator[tuple[int, Box]]:
        """Every block that may hold something selected, at every time point, in the order in which
        they are made."""
        for time in range(self.volume.times):
            for place in self.order:
                yield time, self.reads.box(place)

    def turn(self, time: int, place: Size) -> int:
        """When a block is made, over all time points."""
        return time * volume(self.order.blocks) + self.order.turn(place)

    def run(self, at: tuple[int, Box]) -> Hashable:
        """What blocks (time point, box) have in common that one worker is to make: those of a
        column, of which one goes on where another ended; else neighbours, which share chunks."""
        time, block = at
        if self.plan.blocks_in_column > 1:
            return time, self.reads.column(block)
        return self.turn(time, self.reads.place(block)) // LONGEST_RUN

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of all kinds of workers, the weakest first."""
        return self.plan, *self.others

    def cache(self, plan: Plan) -> ChunkCache:
        """A cache for the blocks that one worker makes."""

        def users(time: int, cell: Size) -> set[int]:
            return {self.turn(time, place) for place in self.reads.users(cell)}

        return ChunkCache(self.volume, plan.reading.cache_bytes, users)


Blocks: TypeAlias = PatchBlocks | ColumnBlocks | WindowBlocks


def blocks_by(laid: Laid, plan: Plan, column_of: Callable[[Box], Box]) -> Blocks:
    """What computes the blocks of an answer, of which ``column_of`` are made in one go; it holds
    threads and memory, perhaps a device, until it is closed. Raises `DeviceError`."""
    with ExitStack() as failing:
        device = None
        if plan.device != CPU:
            device = failing.enter_context(opened(plan.allowed_device_bytes))
        made = _blocks_of(laid, plan, column_of, device)
        failing.pop_all()  # what computes closes it from now on
    return made


def _blocks_of(
    laid: Laid, plan: Plan, column_of: Callable[[Box], Box], device: Device | None
) -> Blocks:
    if isinstance(laid, Layout) and plan.granules:
        return ColumnBlocks(laid, plan, column_of, device)
    if isinstance(laid, Layout):
        return PatchBlocks(laid, plan, device)
    (stage,) = plan.stages
    primitives = chosen_primitives(laid.layout, plan)
    return WindowBlocks(laid, primitives, plan.threads, stage.samples, device)


@dataclass(frozen=True)
class Made:
    """What came of a block: how many of its voxels are selected; of none nothing was done.

    ``decoded_voxels`` of the volume's chunks were decoded for it; ``needed_voxels`` are those that
    it reads and no block before it, which over all blocks are those needed. Every layer took so
    many ``layer_seconds`` to compute, all threads working; of blocks that are computed at once, as
    on a device, some may be told with the next one. ``peak_bytes`` is the anonymous memory
    that the worker's process took at most, so far. ``spans`` are what was done, on ``worker``.
    ``shrunk``: whether its device had less room than was planned for.
    """

    voxels: int
    decoded_voxels: int = 0
    needed_voxels: int = 0
    layer_seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    worker: str = ""
    spans: tuple[Span, ...] = ()
    shrunk: bool = False


class BlockMaker(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Lives on a worker and makes blocks there; one of a run that goes on takes the place of the
    one that its client left there when it was killed.

    Several tasks may read and write at a time; one computes, with all threads of the plan: of
    blocks of which one goes on where another ended, the first to be made.
    """

    def __init__(self, job: Job) -> None:
        self.name = PLUGIN + " ".join(f"//{target.image.place}/" for target in job.targets)
        self.job = job

    def setup(self, worker: Any) -> None:
        """Prepare what needs no plan, and the order of blocks, lest the first ones wait for it."""
        _ = self.job.order
        self._worker = str(worker.name)
        self._computing = Turnstile(in_order=self.job.plan.blocks_in_column > 1)
        self._open, self._lock = ExitStack(), threading.Lock()
        self._meter = self._open.enter_context(MemoryMeter(measure=own_bytes))
        self._shared: tuple[Blocks, ChunkCache] | None = None
        self._shrunk = False

    def _prepared(self, kind: int) -> tuple[Blocks, ChunkCache]:
        """What all blocks share on a worker of this kind."""
        with self._lock:
            if self._shared is None:
                self._shared = self._blocks(kind), self.job.cache(self.job.plans[kind])
                self._open.callback(self._shared[0].close)
            return self._shared

    def _blocks(self, kind: int) -> Blocks:
        """What computes them, by a smaller plan where a device has no more room for its own."""
        job = self.job
        smaller, why = job.smaller[kind] if job.smaller else (), ""
        for plan in (job.plans[kind], *smaller):
            try:
                return blocks_by(job.laid, plan, job.reads.column)
            except DeviceError as error:
                why = str(error)  # it refers to what holds the device's memory
                self._shrunk = True
                LOG.warning("%s", why)
            gc.collect()
        raise DeviceError(why)

    async def teardown(self, worker: Any) -> None:
        """End the executor's threads, once the blocks that are under way are made or given up."""
        await asyncio.to_thread(self._computing.shut)
        self._open.close()

    def make(self, time: int, block: Box, kind: int = 0) -> Made:
        """Read, compute and write one block, as far as it is selected, on a worker of this kind."""
        place = self.job.reads.place(block)
        turn = self.job.turn(time, place)
        with self._computing.coming(turn):  # before all that takes time: others keep their order
            return self._make(time, block, place, turn, kind)

    def _make(self, time: int, block: Box, place: Size, turn: int, kind: int) -> Made:
        job = self.job
        wanted = job.selection.wanted(job.laid, block, time)
        if wanted is not None and not wanted.any():
            return Made(0)
        blocks, cache = self._prepared(kind)
        region = blocks.region(block, wanted)
        made = [(target, target.empty(block)) for target in job.targets]

        def take(box: Box, answer: Array) -> None:
            z, y, x = box.seen_from(block.start).slices
            left_out = None if wanted is None else ~wanted[z, y, x]
            if left_out is not None:
                np.copyto(answer, 0, where=left_out)  # it may hold what cannot be stored
            for target, stored in made:
                here = stored[:, z, y, x]
                here[...] = target.layout.encoding.encode(answer[target.first : target.last])
                if left_out is not None:
                    np.copyto(here, 0, where=left_out)

        spans = Spans(job.timeline)
        with cache.turn(turn) as reader:

            def read(box: Box) -> NDArray[np.generic]:
                volume, boundary = job.volume, job.laid.boundary
                return volume.read_extended(box, boundary, job.nan, time, reader.read)

            with spans.of("reading"):
                behind = Behind.of(time, blocks.ahead(block, region), read)
            plan = job.plans[kind]
            at_once = SLOTS if plan.ends_on_gpu and not plan.granules else 1
            with self._computing.through(turn, at_once), spans.of("computing"):
                blocks.make(block, behind, take, wanted)
            del behind  # it makes room for what writing takes
        spent = blocks.taken()
        spans.add(spent.spans)
        with spans.of("writing"):
            for target, stored in made:
                self._computing.check()  # another run may have taken its place
                target.image.write(block, stored, time)
        return Made(
            block.voxels if wanted is None else int(wanted.sum()),
            reader.decoded_voxels,
            job.reads.needed_voxels(place, region),
            spent.layer_seconds,
            self._meter.peak_bytes,
            self._worker,
            tuple(spans.found),
            self._shrunk,
        )


def make_block(name: str, time: int, block: Box, kind: int) -> Made:
    """The task: runs on a worker, where the plugin lives."""
    maker: BlockMaker = get_worker().plugins[name]
    return maker.make(time, block, kind)
