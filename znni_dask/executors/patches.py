"""Makes blocks of an exact answer, patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np

from znni_dask.behind import Behind
from znni_dask.choices import Work, schedules_of
from znni_dask.closing import Closing
from znni_dask.devices.base import Device
from znni_dask.executors.apart import ApartExecutor
from znni_dask.executors.device import DeviceExecutor, executor_of
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.spent import Spent
from znni_dask.executors.split import SplitExecutor
from znni_dask.geometry import Box, Size, hull, volume
from znni_dask.kernels.memory import allocate
from znni_dask.patches import Layout, patches_of, region_of, spans
from znni_dask.plan import Plan
from znni_dask.primitives.base import ITEM_BYTES, Array
from znni_dask.resources import SLOTS
from znni_dask.schedule import Schedules
from znni_dask.selection import Wanted
from znni_dask.split import Split


class PatchBlocks(Closing):
    """Runs a plan on the patches of blocks; prepared once, for blocks one after another, or on a
    ``device`` for as many at once as it has slots."""

    def __init__(self, layout: Layout, plan: Plan, device: Device | None = None) -> None:
        self._layout, self._plan = layout, plan
        self._schedules = schedules_of(layout, plan)
        sizes = self._schedules.envelope(spans(layout, plan.block, plan.patch))
        largest = ITEM_BYTES * layout.network.out_channels * volume(plan.patch)
        self._answers: SimpleQueue[Array] = SimpleQueue()
        at_once = (SLOTS if plan.ends_on_gpu else 1) + plan.apart
        for _ in range(at_once):
            self._answers.put(allocate(largest).view(np.float32))
        self._executor = executor_for(self._schedules, sizes, plan.patch, plan.threads, device)

    def region(self, block: Box, wanted: Wanted | None = None) -> Box:
        """The box of the volume behind the patches of a block that hold something wanted."""
        if wanted is None:
            return region_of(self._layout, block, self._plan.patch)
        return hull(self._layout.region(box) for box in self._patches(block, wanted))

    def ahead(self, block: Box, region: Box) -> Box:
        """What of the region behind a block is read before it is made: all."""
        return region

    def make(
        self,
        block: Box,
        behind: Behind,
        take: Callable[[Box, Array], None],
        wanted: Wanted | None = None,
    ) -> None:
        """Compute a block. ``take`` is handed each part of it that holds something wanted with its
        answer (channel, z, y, x), which it may overwrite and must not keep."""
        channels, memory = self._layout.network.out_channels, self._answers.get()
        try:
            for box in self._patches(block, wanted):
                todo: Any = self._schedules.schedule(box)  # of the executor's own kind
                answer = memory[: channels * volume(box.size)].reshape(channels, *box.size)
                self._executor.run(todo, [behind.within(todo.input)], [answer])
                take(box, answer)
        finally:
            self._answers.put(memory)

    def _patches(self, block: Box, wanted: Wanted | None) -> Iterator[Box]:
        """The patches of a block that hold something wanted."""
        for box in patches_of(block, self._plan.patch):
            if wanted is None or wanted[box.seen_from(block.start).slices].any():
                yield box

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        return self._executor.taken()

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()
        while not self._answers.empty():
            self._answers.get()


def executor_for(
    work: Work, sizes: Mapping[str, Size], patch: Size, threads: int, device: Device | None
) -> SerialExecutor | DeviceExecutor | SplitExecutor | ApartExecutor:
    """What computes patches, with all that it holds."""
    if isinstance(work, Schedules):
        return executor_of(work, sizes, patch, threads, device)
    assert device is not None
    if isinstance(work, Split):
        return SplitExecutor(work, sizes, patch, threads, device)
    return ApartExecutor(work, sizes, patch, threads, device)
