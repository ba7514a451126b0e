"""Makes blocks of an exact answer, of which those behind one another along z are one column that is
made slab by slab."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from znni_dask.behind import Behind, Values
from znni_dask.choices import chosen_primitives
from znni_dask.closing import Closing
from znni_dask.columns import Column
from znni_dask.cut import Cut
from znni_dask.devices.base import Device
from znni_dask.executors.device_columns import DeviceColumnExecutor
from znni_dask.executors.spent import Spent
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.geometry import Box
from znni_dask.machine import GPU
from znni_dask.network.field_of_view import Interval
from znni_dask.pages import memory_of_all
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.primitives.base import Array
from znni_dask.schedule import Schedules
from znni_dask.selection import Wanted

Take = Callable[[Box, Array], None]
_Executor: TypeAlias = ColumnExecutor | DeviceColumnExecutor


class ColumnBlocks(Closing):
    """Runs a plan on blocks, slab by slab; prepared once, for blocks one after another.

    A block goes on where the one made before it ended, if that is the one before it in its column,
    ``column_of`` it; else the column is begun anew with it. Inside the axis of columns is z: what
    comes and goes is turned. A ``device`` may be lent to layers.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        column_of: Callable[[Box], Box],
        device: Device | None = None,
    ) -> None:
        self._axis, self._column_of = plan.axis, column_of
        self._layout = layout = layout.turned(plan.axis)
        primitives = chosen_primitives(layout, plan)
        self._cut = Cut.of(plan)
        self._schedules, self._granules = Schedules(layout, primitives), plan.granules
        memory = memory_of_all(self._schedules, self._cut, self._granules, plan.threads)
        how = layout.network, primitives, memory
        self._executor: _Executor
        if device is not None and plan.device == GPU:
            self._executor = DeviceColumnExecutor(*how, device)
        else:
            self._executor = ColumnExecutor(*how, plan.threads, device)
        self._going: _Going | None = None

    def region(self, block: Box, wanted: Wanted | None = None) -> Box:
        """The box of the volume behind a block."""
        return self._layout.region(block.turned(self._axis)).turned(self._axis)

    def ahead(self, block: Box, region: Box) -> Box:
        """What of the region behind a block is read before it is made."""
        begins = block.start == self._column_of(block).start
        ahead = self._cut.ahead(self._layout, block.turned(self._axis), begins)
        return ahead.turned(self._axis)

    def make(self, block: Box, behind: Behind, take: Take, wanted: Wanted | None = None) -> None:
        """Compute a block. ``take`` is handed slab after slab of it with its answer (channel, z, y,
        x), which it may overwrite and must not keep."""
        going, self._going = self._going, None
        box = block.turned(self._axis)
        if going is None or not going.comes_to(box, behind.time):
            rest = Box(block.start, self._column_of(block).stop).turned(self._axis)
            column = Column.of(self._schedules, rest, self._granules)
            planes = self._cut.new_planes(self._layout)
            going = _Going(self._executor, column, behind.time, planes)

        def turned(part: Box, answer: Array) -> None:
            take(part.turned(self._axis), answer.swapaxes(1, 1 + self._axis))

        going.make(box, behind.turned(self._axis), turned)
        if not going.ended:
            self._going = going  # not where it failed: then nobody knows how far it is

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        return self._executor.taken()

    def close(self) -> None:
        """End the threads and free the memory."""
        self._going = None
        self._executor.close()


class _Going:
    """A column that is being made, as far as blocks asked for it. Planes that were not read
    beforehand are read ``at_once``, so many."""

    def __init__(self, executor: _Executor, column: Column, time: int, at_once: int) -> None:
        self._column, self._time, self._at_once = column, time, at_once
        if isinstance(executor, DeviceColumnExecutor):
            self._slabs = executor.slabs(column, self._read, self._is_at_hand)
        else:
            self._slabs = executor.slabs(column, self._read)
        self._slab: tuple[Box, Array] | None = None  # of which a part is not taken yet
        self._at = column.output.start[0]
        self._behind: Behind | None = None
        self._beside: tuple[Box, Values] | None = None

    def comes_to(self, block: Box, time: int) -> bool:
        """Whether a block is the next of this column."""
        _, y, x = self._column.output.start
        return (time, block.start) == (self._time, (self._at, y, x))

    @property
    def ended(self) -> bool:
        """Whether all of it is made."""
        return self._at == self._column.output.stop[0]

    def make(self, block: Box, behind: Behind, take: Take) -> None:
        """Hand the slabs of a block to ``take``."""
        self._behind, end = behind, block.stop[0]
        while self._at < end:
            box, answer = self._slab or next(self._slabs)
            stop = min(box.stop[0], end)
            some = Box((self._at, *box.start[1:]), (stop, *box.stop[1:]))
            take(some, answer[(slice(None), *some.seen_from(box.start).slices)])
            self._at, self._slab = stop, (box, answer) if stop < box.stop[0] else None
        self._behind = self._beside = None

    def _read(self, planes: Interval) -> Values:
        """Planes of the volume, counted from the column's first."""
        first = self._column.input.start[0]
        at, stop = first + planes[0], first + planes[1]
        found = []
        while at < stop:
            box, values = self._holding(at)
            end = min(stop, box.stop[0])
            found.append(values[:, at - box.start[0] : end - box.start[0]])
            at = end
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

    def _is_at_hand(self, planes: Interval) -> bool:
        """Whether planes were read beforehand, for the block that is being made."""
        behind, first = self._behind, self._column.input.start[0]
        assert behind is not None
        start, stop = behind.box.start[0] - first, behind.box.stop[0] - first
        return start <= planes[0] and planes[1] <= stop

    def _holding(self, plane: int) -> tuple[Box, Values]:
        """A box of planes with this one, and its values. Some were not read beforehand: where a
        column begins, and where a slab reaches beyond a block."""
        behind = self._behind
        assert behind is not None
        if behind.box.start[0] <= plane < behind.box.stop[0]:
            return behind.box, behind.values
        if self._beside is None or not self._beside[0].start[0] <= plane < self._beside[0].stop[0]:
            self._beside = None  # what was read before makes room
            whole, before = self._column.input, plane < behind.box.start[0]
            end = behind.box.start[0] if before else whole.stop[0]
            stop = min(plane + self._at_once, end)
            box = Box((plane, *whole.start[1:]), (stop, *whole.stop[1:]))
            self._beside = box, behind.read(box)
        return self._beside
