"""The contract of a device.

A device has memory of its own and does what it is asked to by the host, lane by lane: copies there,
computing, and copies back go on at the same time, each in the order in which it was asked for. What
is scheduled so knows nothing of CUDA.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.kernels.memory import Bytes

ALIGN = 256  # bytes: where arrays begin in memory that a device gave


class Mark(ABC):
    """A place in what a lane does."""

    @abstractmethod
    def wait(self) -> None:
        """Until all before it is done; raises what went wrong there, `DeviceError` if it was the
        device."""

    @abstractmethod
    def seconds_since(self, before: Any) -> float:
        """Between two marks of the device, both of them passed."""


class Lane(ABC):
    """Does one thing after another."""

    @abstractmethod
    def do(self, work: Callable[[], object], after: Sequence[Any] = ()) -> Mark:
        """Have something done once these marks are passed; what it calls may only ask the device.
        Several threads may ask: what one asks for is not mixed with what another does."""

    @abstractmethod
    def mark(self) -> Mark:
        """Here; within what `do` is given."""


class Lanes(NamedTuple):
    """What goes on at the same time."""

    up: Lane
    compute: Lane
    down: Lane


class Device(Closing):
    """Abstract. ``xp`` is the library of its arrays, numpy or CuPy; all that it holds together
    takes no more than ``allowed_bytes`` of its memory. Use it as a context manager, or `close` it.
    """

    name: str
    xp: Any
    allowed_bytes: int
    lanes: Lanes

    def __init__(self) -> None:
        self._scratch: Any = None
        self._lock = threading.Lock()

    @abstractmethod
    def empty(self, nbytes: int) -> Any:
        """So many bytes of its memory, an array of uint8 that holds anything, given back when
        nothing refers to it any more. Raises `DeviceError` where there is no room."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Bytes:
        """Memory of the host that is copied from and to the device meanwhile other things go on."""

    @abstractmethod
    def copy(self, target: Any, source: Any) -> None:
        """Copy between two arrays of one shape and dtype, one of the device and one `pinned`, both
        C-contiguous; within a lane."""

    @abstractmethod
    def launch(self, kernel: Kernel, blocks: int, *arguments: Any) -> None:
        """Run a kernel in so many blocks; within a lane."""

    def put(self, array: NDArray[np.generic]) -> Any:
        """A copy of an array in the device's memory, at once."""
        whole = np.ascontiguousarray(array)
        memory, staged = self.empty(whole.nbytes), self.pinned(whole.nbytes)
        staged[:] = whole.reshape(-1).view(np.uint8)
        self.lanes.compute.do(lambda: self.copy(memory, staged)).wait()
        return memory.view(whole.dtype).reshape(whole.shape)

    def scratch(self, nbytes: int) -> Any:
        """So many bytes for one piece of work, holding anything; the next call hands out the same
        memory again."""
        if self._scratch is None or nbytes > self._scratch.size:
            self._scratch = None  # so that never both are there
            self._scratch = self.empty(nbytes)
        return self._scratch[:nbytes]

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory held now."""
        return 0 if self._scratch is None else int(self._scratch.size)

    def close(self) -> None:
        """Give its memory back."""
        self._scratch = None
