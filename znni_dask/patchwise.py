"""Computing windows: a network on one array as a whole, and blocks blended from windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import prod
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from znni_dask.behind import Behind
from znni_dask.choices import choose_primitives
from znni_dask.closing import Closing
from znni_dask.devices.base import Device
from znni_dask.executors.device import executor_of
from znni_dask.executors.spent import Spent
from znni_dask.geometry import Box, hull, triple
from znni_dask.kernels.memory import allocate
from znni_dask.network.network import Network
from znni_dask.primitives.base import ITEM_BYTES, Array, Primitive
from znni_dask.resources import SLOTS
from znni_dask.schedule import Schedule, Schedules
from znni_dask.selection import Wanted
from znni_dask.windows import WholeWindow, WindowGrid


class WindowExecutor(Closing):
    """Applies a network to arrays of one size, to as many as ``samples`` at once. Use it as a
    context manager, or `close` it."""

    def __init__(
        self,
        layout: WholeWindow,
        primitives: Mapping[str, Primitive],
        threads: int,
        samples: int = 1,
        device: Device | None = None,
    ) -> None:
        self.samples = samples
        self.output_shape = (layout.network.out_channels, *layout.output_size)
        self._whole = Box((0, 0, 0), layout.output_size)
        self._schedules = Schedules(layout, primitives, samples)
        self._made: dict[int, Schedule] = {}
        size = layout.output_size
        self._executor = executor_of(self._schedules, layout.sizes, size, threads, device)

    def apply(self, windows: Sequence[NDArray[np.generic]]) -> Array:
        """The network's outputs (sample, channel, z, y, x) for any number of arrays (channel, z,
        y, x)."""
        outs = np.empty((len(windows), *self.output_shape), np.float32)
        for first in range(0, len(windows), self.samples):
            some = slice(first, first + self.samples)
            self.run(windows[some], list(outs[some]))
        return outs

    def run(self, windows: Sequence[NDArray[np.generic]], outs: Sequence[Array]) -> None:
        """The same into ``outs``, for no more arrays than are computed at once."""
        samples = len(windows)
        if samples not in self._made:
            schedules = replace(self._schedules, samples=samples)
            self._made[samples] = schedules.schedule(self._whole)
        self._executor.run(self._made[samples], windows, outs)

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        return self._executor.taken()

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
        answer: Array = executor.apply([x])[0]
        return answer


class WindowBlocks(Closing):
    """Makes blocks of the answer out of all the windows that touch them, computing so many
    ``samples`` of these at once, the last ones of a block perhaps fewer."""

    def __init__(
        self,
        grid: WindowGrid,
        primitives: Mapping[str, Primitive],
        threads: int,
        samples: int = 1,
        device: Device | None = None,
    ) -> None:
        self._grid = grid
        self._executor = WindowExecutor(grid.layout, primitives, threads, samples, device)
        shape = samples, *self._executor.output_shape
        self._answers: SimpleQueue[Array] = SimpleQueue()
        for _ in range(SLOTS if device else 1):
            memory = allocate(ITEM_BYTES * prod(shape))
            self._answers.put(memory.view(np.float32).reshape(shape))

    def region(self, block: Box, wanted: Wanted | None = None) -> Box:
        """The box of the volume behind the windows of a block that touch something wanted."""
        if wanted is None:
            return self._grid.region(block)
        return hull(window for window, _ in self._windows(block, wanted))

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
        """Compute a block and hand it to ``take`` with its answer, which is right where it is
        wanted."""
        take(block, self.blended(block, behind, wanted))

    def blended(self, block: Box, behind: Behind, wanted: Wanted | None = None) -> Array:
        """The answer within a block, (channel, z, y, x), made of the windows that touch something
        wanted."""
        grid, channels = self._grid, self._grid.network.out_channels
        total = np.zeros((channels, *block.size), np.float32)
        if grid.classifies:
            for _, here, answer in self._computed(block, behind, wanted):
                total[(slice(None), *here.slices)] = answer
            return total
        weight = np.zeros(block.size, np.float32)
        for window, here, answer in self._computed(block, behind, wanted):
            there = here.shifted(block.start).seen_from(window.start)
            importance = grid.importance[there.slices]
            weight[here.slices] += importance
            part = answer[(slice(None), *there.slices)]
            part *= importance
            total[(slice(None), *here.slices)] += part
        np.maximum(weight, np.finfo(np.float32).tiny, out=weight)  # 0 where no window touches
        total /= weight
        return total

    def _computed(
        self, block: Box, behind: Behind, wanted: Wanted | None
    ) -> Iterator[tuple[Box, Box, Array]]:
        """The windows of a block in the grid's order, what they cover of it, and their answers,
        which are overwritten by later ones."""
        windows, memory = self._windows(block, wanted), self._answers.get()
        try:
            while some := list(islice(windows, self._executor.samples)):
                answers = list(memory[: len(some)])
                self._executor.run([behind.within(window) for window, _ in some], answers)
                for (window, here), answer in zip(some, answers, strict=True):
                    yield window, here, answer
        finally:
            self._answers.put(memory)

    def _windows(self, block: Box, wanted: Wanted | None) -> Iterator[tuple[Box, Box]]:
        """The windows of a block that touch something wanted, and what they cover of it, in
        voxels of the block."""
        for window, here in self._grid.windows_of(block):
            if wanted is None or wanted[here.slices].any():
                yield window, here

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        return self._executor.taken()

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()
        while not self._answers.empty():
            self._answers.get()
