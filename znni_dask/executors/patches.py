"""Makes blocks of an exact answer, patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from znni_dask.behind import Behind
from znni_dask.choices import chosen_primitives
from znni_dask.closing import Closing
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, hull, volume
from znni_dask.kernels.memory import allocate
from znni_dask.patches import Layout, patches_of, region_of, spans
from znni_dask.plan import Plan
from znni_dask.primitives.base import ITEM_BYTES, Array
from znni_dask.schedule import Schedules
from znni_dask.selection import Wanted


class PatchBlocks(Closing):
    """Runs a plan on the patches of blocks; prepared once, for blocks one after another."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._layout, self._plan = layout, plan
        primitives = chosen_primitives(layout, plan)
        self._schedules = Schedules(layout, primitives)
        sizes = self._schedules.envelope(spans(layout, plan.block, plan.patch))
        arena = self._schedules.arena(sizes)
        largest = ITEM_BYTES * layout.network.out_channels * volume(plan.patch)
        self._answer = allocate(largest).view(np.float32)
        self._executor = SerialExecutor(layout.network, primitives, arena, plan.threads)

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
        channels = self._layout.network.out_channels
        for box in self._patches(block, wanted):
            todo = self._schedules.schedule(box)
            answer = self._answer[: channels * volume(box.size)].reshape(channels, *box.size)
            self._executor.run(todo, [behind.within(todo.input)], [answer])
            take(box, answer)

    def _patches(self, block: Box, wanted: Wanted | None) -> Iterator[Box]:
        """The patches of a block that hold something wanted."""
        for box in patches_of(block, self._plan.patch):
            if wanted is None or wanted[box.seen_from(block.start).slices].any():
                yield box

    @property
    def layer_seconds(self) -> dict[str, float]:
        """The seconds that every layer took so far, changes of its output's form included."""
        return self._executor.layer_seconds

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()
        self._answer = np.empty(0, np.float32)
