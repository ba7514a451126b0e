"""How an answer is cut into blocks, of which those behind one another may be made in one go."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from znni_dask.geometry import Box, Size, turned
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.schedule import Arrangement


@dataclass(frozen=True)
class Cut:
    """How an answer is cut: into blocks of a size, of which so many behind one another along z are
    made in one go, each going on where the one before it ended."""

    block: Size
    in_column: int = 1

    @classmethod
    def of(cls, plan: Plan) -> Cut:
        """That of a plan, turned so that columns run along z."""
        return cls(turned(plan.block, plan.axis), plan.blocks_in_column)

    @property
    def column(self) -> Size:
        """Size of what is made in one go."""
        z, y, x = self.block
        return z * self.in_column, y, x

    def new_planes(self, layout: Arrangement) -> int:
        """Planes of the volume that come with a block, of those behind the one before it."""
        spacing = layout.network.spacing[layout.network.output][0] / layout.fragments[0]
        return ceil(self.block[0] * spacing)

    def ahead(self, layout: Layout, block: Box, begins: bool) -> Box:
        """What of the volume behind a block is read before it is made: all where every block is
        made for itself, else what comes new with it; no more, where a column ``begins``."""
        region, before = layout.region(block), block.start[0] - self.block[0]
        if self.in_column == 1:
            return region
        start = max(region.start[0], region.stop[0] - self.new_planes(layout))
        if not begins:
            read = layout.reach(0, before, block.start[0])[1]
            start = min(max(start, read), region.stop[0] - 1)  # some, lest there is nothing
        return Box((start, *region.start[1:]), region.stop)
