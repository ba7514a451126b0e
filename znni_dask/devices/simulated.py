"""A device that is none: numpy's arrays, with as much memory and as fast as one likes.

What is scheduled on a device, its overlaps and limits can be tried so on any machine. Lanes are
threads; copies and computing take at least as long as they would on what is simulated.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from znni_dask.devices.base import Device, Lane, Lanes, Mark
from znni_dask.errors import DeviceError
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.kernels.memory import Bytes, allocate
from znni_dask.machine import show_bytes


@dataclass(frozen=True)
class Pace:
    """How fast a simulated device is: bytes that it copies in a second, None for as fast as this
    machine does, and how many times as long computing takes as here."""

    copied_bytes_per_second: float | None = None
    slowdown: float = 1.0


class SimulatedDevice(Device):
    """Computes with numpy, in no more than ``allowed_bytes`` of memory.

    >>> import numpy as np
    >>> with SimulatedDevice(1 << 20) as device:
    ...     there = device.put(np.arange(3.0))
    ...     held = device.held_bytes
    >>> there.tolist(), held
    ([0.0, 1.0, 2.0], 24)
    """

    name = "simulated"
    xp = np

    def __init__(self, allowed_bytes: int, pace: Pace | None = None) -> None:
        super().__init__()
        self.allowed_bytes = allowed_bytes
        self.pace = pace or Pace()
        self.held_bytes = self.peak_bytes = 0
        self._threads = _Thread("up"), _Thread("compute", self.pace.slowdown), _Thread("down")
        self.lanes = Lanes(*self._threads)

    def empty(self, nbytes: int) -> Any:
        with self._lock:
            if self.held_bytes + nbytes > self.allowed_bytes:
                raise DeviceError(
                    f"{show_bytes(nbytes)} are wanted on the {self.name} device, "
                    f"{show_bytes(self.allowed_bytes - self.held_bytes)} of "
                    f"{show_bytes(self.allowed_bytes)} are free: allow more with --device-memory"
                )
            self.held_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        memory = allocate(nbytes)
        weakref.finalize(memory.base, self._given_back, nbytes)  # views refer to that alone
        return memory

    def pinned(self, nbytes: int) -> Bytes:
        return allocate(nbytes)

    def copy(self, target: Any, source: Any) -> None:
        begin = time.perf_counter()
        np.copyto(target, source)
        if rate := self.pace.copied_bytes_per_second:
            time.sleep(max(0.0, begin + source.nbytes / rate - time.perf_counter()))

    def launch(self, kernel: Kernel, blocks: int, *arguments: Any) -> None:
        kernel.plain(*arguments)

    def close(self) -> None:
        """End the threads and give the memory back."""
        for thread in self._threads:
            thread.close()
        super().close()

    def _given_back(self, nbytes: int) -> None:
        with self._lock:
            self.held_bytes -= nbytes


class _Moment(Mark):
    """When a thread came so far."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self._error: BaseException | None = None
        self._time = 0.0

    def wait(self) -> None:
        self._passed.wait()
        if self._error is not None:
            raise self._error

    def seconds_since(self, before: _Moment) -> float:
        return self._time - before._time

    def set(self, error: BaseException | None = None) -> None:
        """Now."""
        self._time, self._error = time.perf_counter(), error
        self._passed.set()


class _Thread(Lane):
    """A lane that is a thread; what it does takes so many times as long as it would."""

    def __init__(self, name: str, slowdown: float = 1.0) -> None:
        self._slowdown = slowdown
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name=f"znni-{name}", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], object], after: Sequence[Any] = ()) -> Mark:
        done = _Moment()

        def turn() -> None:
            try:
                for mark in after:
                    mark.wait()
                begin = time.perf_counter()
                work()
                time.sleep((self._slowdown - 1) * (time.perf_counter() - begin))
            except BaseException as error:  # raised again by who waits
                done.set(error)
            else:
                done.set()

        self._asked.put(turn)
        return done

    def mark(self) -> Mark:
        here = _Moment()
        here.set()
        return here

    def close(self) -> None:
        """End the thread, after what it was asked for."""
        self._asked.put(None)
        self._thread.join()

    def _live(self) -> None:
        while (turn := self._asked.get()) is not None:
            turn()
            del turn  # it may refer to memory that is wanted for what comes next
