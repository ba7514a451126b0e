"""Run a plan on patches, some of them by the host and some by a device: whoever is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from queue import PriorityQueue

import numpy as np
from numpy.typing import NDArray

from znni_dask.apart import Apart, ApartSchedule
from znni_dask.closing import Closing
from znni_dask.devices.base import Device
from znni_dask.executors.device import DeviceExecutor
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.spent import Spent
from znni_dask.geometry import Size
from znni_dask.primitives.base import Array
from znni_dask.resources import SLOTS
from znni_dask.timeline import Spans


class ApartExecutor(Closing):
    """Computes patches, each within ``patch`` and its layers' boxes within ``sizes``: one by so
    many ``threads`` of the host, others by the device. Use it as a context manager, or `close` it,
    and with it the device."""

    def __init__(
        self, apart: Apart, sizes: Mapping[str, Size], patch: Size, threads: int, device: Device
    ) -> None:
        self._device = DeviceExecutor(apart.device, sizes, patch, device)
        self._host = SerialExecutor(apart.host, sizes, threads)
        self._spans = Spans()
        self._free: PriorityQueue[tuple[int, bool]] = PriorityQueue()
        # of two who ask one is the host's; a third has its patch copied while the device computes
        for rank, by_host in enumerate((False, True, *[False] * (SLOTS - 1))):
            self._free.put((rank, by_host))

    def run(
        self,
        todo: ApartSchedule,
        volumes: Sequence[NDArray[np.generic]],
        outs: Sequence[Array],
    ) -> None:
        """The same as `SerialExecutor.run`; several threads may ask at once."""
        rank, by_host = self._free.get()
        try:
            if by_host:
                with self._spans.of("patch", "host"):
                    self._host.run(todo.host, volumes, outs)
            else:
                self._device.run(todo.device, volumes, outs)
        finally:
            self._free.put((rank, by_host))

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        own = Spent({}, self._spans.taken())
        return own.plus(self._host.taken()).plus(self._device.taken())

    def close(self) -> None:
        """End the threads, give all memory back, and close the device."""
        self._host.close()
        self._device.close()
