"""Which device there is, and opening it.

Where the configuration has ``znni.simulated-gpu`` (in the environment
``DASK_ZNNI__SIMULATED_GPU``), a size of memory, or that and a pace as of `simulated.Pace`, a
simulated device stands for the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import dask

from znni_dask.devices.base import Device
from znni_dask.devices.cuda import CudaDevice
from znni_dask.devices.simulated import Pace, SimulatedDevice
from znni_dask.errors import OptionError
from znni_dask.kernels.cuda.layouts import SHARED_BYTES
from znni_dask.machine import CPU, CPU_GPU, GPU, GPU_RAM, parse_bytes, show_bytes

AUTO = "auto"
DEVICES = (AUTO, CPU, GPU, GPU_RAM, CPU_GPU)
_SHARE_OF_FREE = 0.9  # of a GPU's memory: other programs come and go
_SIMULATED = "znni.simulated-gpu"
_PACES = ("copied_bytes_per_second", "slowdown")


class Wanted(NamedTuple):
    """The device that was asked for, one of `DEVICES`, and how much of its memory may be taken, if
    that was said."""

    name: str = CPU
    memory_bytes: int | None = None


class Found(NamedTuple):
    """What there is of a GPU: its name and free memory, and what it is known by, for workers that
    share it; or ``why`` there is none."""

    name: str = ""
    free_bytes: int = 0
    known_by: str = ""
    why: str = ""

    def allowed_bytes(self, wanted: Wanted, sharing: int = 1) -> int:
        """What one of so many that share it may take; 0 where there is none."""
        free = int(_SHARE_OF_FREE * self.free_bytes) // sharing
        return min(free, wanted.memory_bytes or free)


def gpu_of(wanted: Wanted) -> Found:
    """The GPU of this process, if one is wanted: the first that CUDA shows it."""
    if wanted.name == CPU:
        return Found(why="only the CPU was asked for")
    if (told := _simulated()) is not None:
        return Found("simulated GPU", told[0], known_by=f"process {os.getpid()}")
    cupy = _cupy()
    if isinstance(cupy, str):
        return Found(why=cupy)
    try:
        with cupy.cuda.Device(0) as device:
            free, _ = cupy.cuda.runtime.memGetInfo()
            told = cupy.cuda.runtime.getDeviceProperties(0)
            shared = device.attributes["MaxSharedMemoryPerBlockOptin"]
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return Found(why=f"CUDA cannot use its first GPU: {error}")
    name = told["name"].decode()
    if shared < SHARED_BYTES:
        return Found(
            why=f"{name} lets a block of threads share {show_bytes(shared)}, and tiles take up to "
            f"{show_bytes(SHARED_BYTES)}, as GPUs of compute capability 8.0, 9.0 and 10.0 have"
        )
    return Found(name, int(free), known_by=bytes(told["uuid"]).hex())


def gpus() -> list[str]:
    """By what CUDA knows every GPU that this process may use."""
    if _simulated() is not None:
        return ["simulated"]
    cupy = _cupy()
    if isinstance(cupy, str):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(cupy.cuda.runtime.getDeviceCount())
    return visible.split(",")[: len(numbers)] if visible else [str(number) for number in numbers]


def _cupy() -> Any:
    """CuPy, or why there is no GPU to be used through it."""
    if find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'znni_dask[cuda13]', or [cuda12]"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): install the one for this driver's CUDA"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA shows no GPU ({error}): is there one, and a driver for it?"
    return cupy if count else "CUDA shows no GPU: is one hidden by CUDA_VISIBLE_DEVICES?"


def opened(allowed_bytes: int) -> Device:
    """The GPU of this process, of whose memory so much may be taken."""
    if (told := _simulated()) is not None:
        return SimulatedDevice(allowed_bytes, told[1])
    return CudaDevice(allowed_bytes)


def opened_here(allowed_bytes: int, what_for: str) -> Device:
    """The same, of a process that need not have a GPU; raises `OptionError`, with ``what_for`` it
    is wanted, where it has none."""
    if not (found := gpu_of(Wanted(GPU))).name:
        raise OptionError(f"{what_for} needs a GPU in this process, and there is none: {found.why}")
    return opened(allowed_bytes)


def _simulated() -> tuple[int, Pace] | None:
    """Memory and pace of a simulated device, if there is to be one; raises `OptionError`."""
    told: Any = dask.config.get(_SIMULATED, None)
    if told is None:
        return None
    settings = dict(told) if isinstance(told, Mapping) else {"memory": told}
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    odd = set(settings) - {"memory", *_PACES}
    if odd or "memory" not in settings:
        raise OptionError(
            f"{_SIMULATED} is {told!r}: a size of memory is wanted, or memory with "
            f"{' and '.join(_PACES)}"
        )
    pace = {key: float(settings[key]) for key in _PACES if key in settings}
    return parse_bytes(settings["memory"]), Pace(**pace)
