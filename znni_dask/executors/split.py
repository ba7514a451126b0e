"""Run a plan on a patch, its first layers by the host and the rest by a device.

The host makes fragments of a patch, or one array where none are made, and hands them to the device,
which takes some at a time through all remaining layers without their coming back. Of several
threads that ask one has its patch begun by the host while the device is busy with that of another:
so both are at work, with a bounded number of patches between them (the pipeline of Zlateski et al.
2016). Where the device computes sub-layers of the first layers, too, these take turns with others.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.devices.base import Device
from znni_dask.executors.device import DeviceExecutor
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.spent import Spent
from znni_dask.geometry import Size, triple
from znni_dask.kernels.memory import Bytes, allocate, floats
from znni_dask.primitives.base import Array
from znni_dask.resources import SLOTS
from znni_dask.shares import WAITING
from znni_dask.split import Split, SplitSchedule
from znni_dask.timeline import Spans


class SplitExecutor(Closing):
    """Computes patches, each within ``patch`` and its layers' boxes within ``sizes``; the host,
    with so many ``threads``, is ahead of the device by as many patches as ``waiting`` says. Use it
    as a context manager, or `close` it, and with it the device."""

    def __init__(
        self,
        split: Split,
        sizes: Mapping[str, Size],
        patch: Size,
        threads: int,
        device: Device,
        waiting: int = WAITING,
    ) -> None:
        self._split, self._together = split, split.tail.samples
        self._tail = DeviceExecutor(split.tail, sizes, split.part(patch), device)
        self._head = SerialExecutor(split.head, sizes, threads, device)
        self._head_is_free, self._spans = threading.Lock(), Spans()
        self._pool = ThreadPoolExecutor(SLOTS, thread_name_prefix="znni-split")
        self._handed: SimpleQueue[Bytes] = SimpleQueue()
        for _ in range(1 + waiting):
            self._handed.put(allocate(split.handed_bytes(sizes)))

    def run(
        self,
        todo: SplitSchedule,
        volumes: Sequence[NDArray[np.generic]],
        outs: Sequence[Array],
    ) -> None:
        """The same as `SerialExecutor.run`, of one volume; several threads may ask at once."""
        (out,) = outs
        memory = self._handed.get()
        try:
            with self._head_is_free, self._spans.of("first layers", "host"):
                made = self._head.fragments(todo.head, volumes)
                fragments = floats(memory, made.shape)
                np.copyto(fragments, made)
            firsts = range(0, len(fragments), self._together)
            work = partial(self._group, todo, fragments, out)
            groups = [self._pool.submit(work, first) for first in firsts]
            wait(groups)  # what they read is another's from then on
            for group in groups:
                group.result()
        finally:
            self._handed.put(memory)

    def _group(self, todo: SplitSchedule, fragments: Array, out: Array, first: int) -> None:
        """Some fragments through the rest of the layers, to where they belong."""
        spacing, numbers = todo.head.spacing, range(first, first + self._together)
        size = self._split.part(triple(out.shape[1:]))
        made = np.empty((self._together, len(out), *size), np.float32)
        self._tail.run(todo.tail, [fragments[number] for number in numbers], [*made])
        for number, one in zip(numbers, made, strict=True):
            z, y, x = map(slice, todo.head.positions[number], (None,) * 3, spacing)
            there = out[:, z, y, x]
            z, y, x = map(slice, there.shape[1:])
            there[...] = one[:, z, y, x]

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        own = Spent({}, self._spans.taken())
        return own.plus(self._head.taken()).plus(self._tail.taken())

    def close(self) -> None:
        """End the threads, give all memory back, and close the device."""
        self._pool.shutdown()
        self._head.close()
        while not self._handed.empty():
            self._handed.get()
        self._tail.close()
