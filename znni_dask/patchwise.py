"""Computing windows: a network on one array as a whole, and blocks blended from windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.choices import choose_primitives
from znni_dask.closing import Closing
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, Size, hull, triple
from znni_dask.network.network import Network
from znni_dask.primitives.base import Array, Primitive
from znni_dask.schedule import Schedules
from znni_dask.selection import Wanted
from znni_dask.windows import WholeWindow, WindowGrid


class WindowExecutor(Closing):
    """Applies a network to arrays of one size. Use it as a context manager, or `close` it."""

    def __init__(
        self, layout: WholeWindow, primitives: Mapping[str, Primitive], threads: int
    ) -> None:
        whole = Box((0, 0, 0), layout.output_size)
        schedules = Schedules(layout, primitives)
        self._todo = schedules.schedule(whole)
        arena = schedules.arena(layout.sizes)
        self._executor = SerialExecutor(layout.network, primitives, arena, threads)
        self._channels = layout.network.out_channels
        self._size = layout.output_size

    def apply(self, x: NDArray[np.generic]) -> Array:
        """The network's output (channel, z, y, x) for an array (channel, z, y, x)."""
        out = np.empty((self._channels, *self._size), np.float32)
        self._executor.run(self._todo, x, out)
        return out

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()


def apply(network: Network, x: NDArray[np.generic], threads: int = 1) -> Array:
    """Apply ``network`` once to a whole array (channel, z, y, x), held in memory.

    Every network can be applied so, those that reduce over space included. Raises `NetworkError`
    where the array's size does not pass through it.
    """
    layout = WholeWindow(network, triple(x.shape[1:]))
    with WindowExecutor(layout, choose_primitives(layout), threads) as executor:
        return executor.apply(x)


class WindowBlocks(Closing):
    """Makes blocks of the answer out of all the windows that touch them."""

    def __init__(self, grid: WindowGrid, primitives: Mapping[str, Primitive], threads: int) -> None:
        self._grid = grid
        self._executor = WindowExecutor(grid.layout, primitives, threads)

    def region(self, block: Box, wanted: Wanted | None = None) -> Box:
        """The box of the volume behind the windows of a block that touch something wanted."""
        if wanted is None:
            return self._grid.region(block)
        return hull(window for window, _ in self._windows(block, wanted))

    def make(
        self,
        block: Box,
        values: NDArray[np.generic],
        corner: Size,
        take: Callable[[Box, Array], None],
        wanted: Wanted | None = None,
    ) -> None:
        """Compute a block of the extended volume's ``values`` behind it, whose first voxel is the
        volume's voxel ``corner``, and hand it to ``take`` with its answer, which is right where it
        is wanted."""
        take(block, self.blended(block, values, corner, wanted))

    def blended(
        self,
        block: Box,
        values: NDArray[np.generic],
        corner: Size,
        wanted: Wanted | None = None,
    ) -> Array:
        """The answer within a block, (channel, z, y, x), made of the windows that touch something
        wanted."""
        grid, channels = self._grid, self._grid.network.out_channels
        total = np.zeros((channels, *block.size), np.float32)
        if grid.classifies:
            for window, here in self._windows(block, wanted):
                total[(slice(None), *here.slices)] = self._answer(window, values, corner)
            return total
        weight = np.zeros(block.size, np.float32)
        for window, here in self._windows(block, wanted):
            there = here.shifted(block.start).seen_from(window.start)
            answer = self._answer(window, values, corner)
            importance = grid.importance[there.slices]
            weight[here.slices] += importance
            answer = answer[(slice(None), *there.slices)]
            answer *= importance
            total[(slice(None), *here.slices)] += answer
        np.maximum(weight, np.finfo(np.float32).tiny, out=weight)  # 0 where no window touches
        total /= weight
        return total

    def _windows(self, block: Box, wanted: Wanted | None) -> Iterator[tuple[Box, Box]]:
        """The windows of a block that touch something wanted, and what they cover of it, in
        voxels of the block."""
        for window, here in self._grid.windows_of(block):
            if wanted is None or wanted[here.slices].any():
                yield window, here

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()

    def _answer(self, window: Box, values: Any, corner: Size) -> Array:
        z, y, x = window.seen_from(corner).slices
        return self._executor.apply(values[:, z, y, x])
