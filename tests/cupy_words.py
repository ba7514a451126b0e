"""Words of CuPy on a machine without a GPU: arrays are numpy's, streams do everything at once, and
kernels are run from their CUDA source (`cuda_source`)."""

from __future__ import annotations

import ctypes
import time
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np

from cuda_source import emulated
from znni_dask.kernels.cuda.kernel import Kernel

NAME, TOTAL_BYTES = "imagined GPU", 1 << 30


class OutOfMemoryError(MemoryError):
    """As of `cupy.cuda.memory`."""


class CUDARuntimeError(RuntimeError):
    """As of `cupy.cuda.runtime`."""


class CUDADriverError(RuntimeError):
    """As of `cupy.cuda.driver`."""


class Array(np.ndarray):
    """An array of the device, whose values only kernels, copies and CuPy may look at."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class Event:
    def __init__(self, block=False):
        assert block, "who waits for an event leaves the core to others"
        self.stream, self.time = None, None

    def record(self, stream):
        self.stream, self.time = stream, time.perf_counter()

    def synchronize(self):
        assert self.time is not None


class Stream:
    current = None

    def __init__(self, non_blocking=False):
        assert non_blocking, "others would wait for it"
        self.waited = []

    def __enter__(self):
        self.before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *error):
        Stream.current = self.before

    def wait_event(self, event):
        assert event.time is not None
        self.waited.append(event)


class MemoryPool:
    def __init__(self):
        self.limit, self.used, self.freed = None, 0, False

    def set_limit(self, size):
        self.limit = size

    def malloc(self, nbytes):
        if self.used + nbytes > self.limit:
            raise OutOfMemoryError(f"{nbytes} bytes")
        self.used += nbytes

    def free_all_blocks(self):
        self.freed = True


class PinnedMemory:
    def __init__(self, nbytes):
        self.memory = bytearray(nbytes)


def _function(code, name):
    def run(grid, block, arguments, shared_mem):
        assert Stream.current is not None, "a kernel is launched within a lane"
        assert shared_mem <= run.max_dynamic_shared_size_bytes
        for argument in arguments:
            assert type(argument) in (Array, np.int64, np.float32), type(argument)
        given = [a if isinstance(a, Array) else a.item() for a in arguments]
        given = [a.view(np.ndarray) if isinstance(a, Array) else a for a in given]
        emulated(Kernel(name, code, None, block[0], shared_mem), grid[0], *given)

    run.max_dynamic_shared_size_bytes = 48 << 10
    return run


class RawModule:
    def __init__(self, code, options):
        assert options == ("-std=c++17",)
        self._code = code

    def get_function(self, name):
        return _function(self._code, name)


def cupy(devices=1, free=TOTAL_BYTES, shared_bytes=227 << 10):
    """The module, as far as it is used."""
    allocators = []

    @contextmanager
    def using_allocator(allocator):
        allocators.append(allocator)
        try:
            yield
        finally:
            allocators.pop()

    def copy(to, where, nbytes, kind, stream):
        assert stream is Stream.current
        ctypes.memmove(to, where, nbytes)

    def count():
        if not devices:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return devices

    class Device:
        attributes: ClassVar = {"MaxSharedMemoryPerBlockOptin": shared_bytes}

        def __init__(self, number):
            self.id = number

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def synchronize(self):
            pass

    class Module(ModuleType):
        def __getattr__(self, name):
            return getattr(np, name)

    made = Module("cupy")
    made.ndarray, made.RawModule = Array, RawModule

    def empty(shape, dtype):
        found = np.full(shape, 0xA5, np.uint8).view(Array)
        assert dtype is np.uint8
        allocators[-1](found.nbytes)
        return found

    made.empty = empty
    made.asarray = lambda values: np.array(values).view(Array)
    cache = SimpleNamespace(set_size=lambda size: None)
    made.fft = SimpleNamespace(
        **{name: getattr(np.fft, name) for name in ("fft", "ifft", "rfft", "irfft")},
        config=SimpleNamespace(get_plan_cache=lambda: cache),
    )
    made.cuda = SimpleNamespace(
        Device=Device,
        Event=Event,
        Stream=Stream,
        MemoryPool=MemoryPool,
        PinnedMemory=PinnedMemory,
        PinnedMemoryPointer=lambda memory, offset: memory.memory,
        using_allocator=using_allocator,
        get_current_stream=lambda: SimpleNamespace(ptr=Stream.current),
        get_elapsed_time=lambda begin, end: 1e3 * (end.time - begin.time),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        runtime=SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=count,
            memGetInfo=lambda: (free, TOTAL_BYTES),
            getDeviceProperties=lambda number: {"name": NAME.encode(), "uuid": b"\1" * 16},
            memcpyAsync=copy,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
        ),
    )
    return made
