"""Having the lanes of a device do something, and telling when it was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from znni_dask.devices.base import Device, Lane, Mark
from znni_dask.timeline import Span


class Done(NamedTuple):
    """Something that a lane was asked for: its begin, which is there once it has begun, and end."""

    lane: str
    begin: list[Mark]
    end: Mark


class Clock:
    """Tells when what a ``device`` was asked for is done."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._zero = device.lanes.compute.do(lambda: None)
        self._zero.wait()
        self._time = time.time()

    def do(self, lane: str, work: Callable[[], object], after: Sequence[Mark] = ()) -> Done:
        """Have a lane do something, once these marks are passed."""
        found: Lane = getattr(self._device.lanes, lane)
        begin: list[Mark] = []

        def timed() -> None:
            begin.append(found.mark())
            work()

        return Done(lane, begin, found.do(timed, after))

    def span(self, done: Done) -> Span:
        """When something was done that is done."""
        (begin,), end = done.begin, done.end
        start = self._time + begin.seconds_since(self._zero)
        return Span(f"device, {done.lane}", done.lane, start, end.seconds_since(begin))
