"""What lies behind a block of the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Box

Values = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Behind:
    """The extended volume at a time point: its ``values`` (channel, z, y, x) within ``box``, which
    were read beforehand. ``read`` gives those of other boxes."""

    time: int
    box: Box
    values: Values
    read: Callable[[Box], Values]

    @classmethod
    def of(cls, time: int, box: Box, read: Callable[[Box], Values]) -> Behind:
        """What ``read`` gives for ``box``, and more where it is asked for."""
        return cls(time, box, read(box), read)

    def turned(self, axis: int) -> Behind:
        """The same where axes 0 and ``axis`` of space are swapped, not copied."""

        def read(box: Box) -> Values:
            return self.read(box.turned(axis)).swapaxes(1, 1 + axis)

        return Behind(self.time, self.box.turned(axis), self.values.swapaxes(1, 1 + axis), read)

    def within(self, box: Box) -> Values:
        """The values of a box that lies within ``box``, not copied."""
        return self.values[(slice(None), *box.seen_from(self.box.start).slices)]
