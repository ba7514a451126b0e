"""Makes blocks of an exact answer, each a column that is made slab by slab."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from znni_dask.choices import chosen_primitives
from znni_dask.closing import Closing
from znni_dask.columns import Column
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.geometry import Box, Size
from znni_dask.network.field_of_view import Interval
from znni_dask.pages import memory_of_all
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.primitives.base import Array
from znni_dask.schedule import Schedules
from znni_dask.selection import Wanted


class ColumnBlocks(Closing):
    """Runs a plan on blocks, slab by slab; prepared once, for blocks one after another."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        primitives = chosen_primitives(layout, plan)
        self._schedules, self._granules = Schedules(layout, primitives), plan.granules
        memory = memory_of_all(self._schedules, plan.block, self._granules, plan.threads)
        self._executor = ColumnExecutor(layout.network, primitives, memory, plan.threads)

    def region(self, block: Box, wanted: Wanted | None = None) -> Box:
        """The box of the volume behind a block."""
        return self._column(block).input

    def make(
        self,
        block: Box,
        values: NDArray[np.generic],
        corner: Size,
        take: Callable[[Box, Array], None],
        wanted: Wanted | None = None,
    ) -> None:
        """Compute a block of the extended volume's ``values`` behind it, whose first voxel is the
        volume's voxel ``corner``. ``take`` is handed slab after slab with its answer (channel, z,
        y, x), which it may overwrite and must not keep."""
        column = self._column(block)
        z, y, x = column.input.seen_from(corner).slices
        behind = values[:, z, y, x]

        def read(planes: Interval) -> NDArray[np.generic]:
            return behind[:, slice(*planes)]

        for box, answer in self._executor.slabs(column, read):
            take(box, answer)

    @property
    def layer_seconds(self) -> dict[str, float]:
        """The seconds that every layer took so far, changes of its output's form included."""
        return self._executor.layer_seconds

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()

    def _column(self, block: Box) -> Column:
        return Column.of(self._schedules, block, self._granules)
