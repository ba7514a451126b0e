"""A GPU, through CuPy: one stream for each lane, all memory from one pool."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from znni_dask.devices.base import Device, Lane, Lanes, Mark
from znni_dask.errors import DeviceError, OptionError
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.kernels.memory import Bytes
from znni_dask.machine import show_bytes

LOG = logging.getLogger(__name__)
_STANDARD = "-std=c++17"
_PLAIN_SHARED_BYTES = 48 << 10  # what a block has without asking


class CudaDevice(Device):
    """The GPU that CUDA counts as the first, of whose memory no more than ``allowed_bytes`` are
    taken; what CUDA itself and its libraries take is beside that."""

    def __init__(self, allowed_bytes: int) -> None:
        super().__init__()
        import cupy

        if os.environ.get("CUPY_TF32", "0") != "0":
            raise OptionError("CUPY_TF32 makes less of products than float32 is: unset it")
        self.xp, self.allowed_bytes = cupy, allowed_bytes
        self._cuda = cupy.cuda
        self._device, self.name = cupy.cuda.Device(0), "the GPU"
        self._pool = cupy.cuda.MemoryPool()
        with self.current():
            self.name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
            self._pool.set_limit(size=allowed_bytes)
            self.lanes = Lanes(*(_Stream(self, cupy.cuda.Stream(non_blocking=True)) for _ in "123"))

    @contextmanager
    def current(self) -> Iterator[None]:
        """What this thread asks CuPy for is done on this GPU, in its pool's memory; failures there
        are `DeviceError`."""
        cuda = self._cuda
        try:
            with self._device, cuda.using_allocator(self._pool.malloc):
                yield
        except cuda.memory.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.name} has no room left of the {show_bytes(self.allowed_bytes)} that were "
                f"planned for, others may have taken it: {error}; the same command plans anew"
            ) from None
        except RuntimeError as error:  # of CUDA, its libraries, or torch
            raise DeviceError(
                f"{self.name} failed: {error}; what is written is kept, and the same command goes "
                "on where it can be used again"
            ) from error

    def empty(self, nbytes: int) -> Any:
        with self.current():
            return self.xp.empty(nbytes, np.uint8)

    def pinned(self, nbytes: int) -> Bytes:
        cuda = self._cuda
        with self.current():  # not from CuPy's pool, which rounds up to powers of two
            memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(nbytes), 0)
        return np.frombuffer(memory, np.uint8, nbytes)

    def copy(self, target: Any, source: Any) -> None:
        there = isinstance(target, self.xp.ndarray)
        runtime, stream = self._cuda.runtime, self._cuda.get_current_stream()
        kind = runtime.memcpyHostToDevice if there else runtime.memcpyDeviceToHost
        to, where = (
            array.data.ptr if isinstance(array, self.xp.ndarray) else array.ctypes.data
            for array in (target, source)
        )
        runtime.memcpyAsync(to, where, source.nbytes, kind, stream.ptr)

    def launch(self, kernel: Kernel, blocks: int, *arguments: Any) -> None:
        function = _function(kernel)
        given = tuple(
            np.int64(a) if isinstance(a, int) else np.float32(a) if isinstance(a, float) else a
            for a in arguments
        )
        function((blocks,), (kernel.threads,), given, shared_mem=kernel.shared_bytes)

    def keep_no_plans(self) -> None:
        """Let this thread keep no plans of cuFFT, each of which has memory that nobody counts."""
        self.xp.fft.config.get_plan_cache().set_size(0)

    def close(self) -> None:
        """Give its memory back to the system."""
        super().close()
        try:
            with self.current():
                self._device.synchronize()
                self._pool.free_all_blocks()
        except DeviceError as error:  # what was under way has told of it
            LOG.warning("%s", error)
        if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@cache
def _function(kernel: Kernel) -> Any:
    """The compiled kernel; CuPy keeps what is compiled on disk."""
    import cupy

    function = cupy.RawModule(code=kernel.source, options=(_STANDARD,)).get_function(kernel.name)
    if kernel.shared_bytes > _PLAIN_SHARED_BYTES:
        function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return function


class _Event(Mark):
    def __init__(self, device: CudaDevice, event: Any) -> None:
        self._device, self.event = device, event

    def wait(self) -> None:
        with self._device.current():
            self.event.synchronize()

    def seconds_since(self, before: _Event) -> float:
        with self._device.current():
            elapsed: float = self._device.xp.cuda.get_elapsed_time(before.event, self.event)
            return elapsed / 1e3


class _Stream(Lane):
    """A lane that is a stream. What it is asked for is put into the stream at once."""

    def __init__(self, device: CudaDevice, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._lock = threading.Lock()

    def do(self, work: Callable[[], object], after: Sequence[Any] = ()) -> Mark:
        with self._lock, self._device.current(), self._stream:
            self._device.keep_no_plans()
            for mark in after:
                self._stream.wait_event(mark.event)
            work()
            return self.mark()

    def mark(self) -> Mark:
        event = self._device.xp.cuda.Event(block=True)
        event.record(self._stream)
        return _Event(self._device, event)
