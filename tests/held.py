"""A simulated device that can be held up, and lost."""

from __future__ import annotations

import threading

from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import DeviceError


class Held(SimulatedDevice):
    """A device that computes only when it is let, and may be lost."""

    def __init__(self, allowed_bytes):
        super().__init__(allowed_bytes)
        self.free, self.lost = threading.Event(), False
        self.free.set()

    def copy(self, target, source):
        self.free.wait()
        if self.lost:
            raise DeviceError("the device was lost")
        super().copy(target, source)
