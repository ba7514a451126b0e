"""A GPU that is measured: opening it, timing what it does, and watching the kernels of a layer.

On a simulated device all of it runs, too; its numbers mean nothing there.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import numpy as np

from znni_dask.devices.base import Device, Lane
from znni_dask.devices.cuda import CudaDevice
from znni_dask.devices.opening import Wanted, gpu_of
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.machine import GPU
from znni_dask.primitives.base import Array

Call = Callable[[], object]
SIMULATED_BYTES = 1 << 30
SHARE = 0.5  # of the memory, where PyTorch has the rest
ROUNDS = 5
_LEAST_SECONDS = 0.02  # of one timing: what is shorter is repeated
_MOST_REPEATS = 50
_TRANSFORMS = ("fft", "ifft", "rfft", "irfft")


@dataclass
class Bench:
    """What is measured, and how: a GPU or a simulated one, everything or a little of it."""

    simulated: bool = False
    quick: bool = False
    end: float = float("inf")  # of the part that runs, by `time.monotonic`
    floors: dict[str, float] = field(default_factory=dict)

    @property
    def free_bytes(self) -> int:
        """Of the device's memory what may be taken."""
        if self.simulated:
            return SIMULATED_BYTES
        found = gpu_of(Wanted(GPU))
        if found.why:
            raise SystemExit(found.why)
        return found.allowed_bytes(Wanted(GPU))

    def opened(self, share: float = SHARE) -> Device:
        """The device, of whose memory a share may be taken."""
        return self.opened_within(int(share * self.free_bytes))

    def opened_within(self, allowed_bytes: int) -> Device:
        """The device, of whose memory so much may be taken."""
        return SimulatedDevice(allowed_bytes) if self.simulated else CudaDevice(allowed_bytes)

    @property
    def torch_device(self) -> str:
        """Where PyTorch computes."""
        return "cpu" if self.simulated else "cuda"

    @property
    def late(self) -> bool:
        """Whether the part is to end."""
        return time.monotonic() > self.end

    def take_back(self) -> None:
        """Have PyTorch give memory back that it holds for later."""
        if not self.simulated:
            import torch

            torch.cuda.empty_cache()


def described(bench: Bench) -> dict[str, Any]:
    """The device, its driver and the libraries; ends the benchmark where there is none."""
    found: dict[str, Any] = {"device": "simulated", "free_bytes": bench.free_bytes}
    for name in ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if not bench.simulated:
        import cupy
        import torch

        runtime = cupy.cuda.runtime
        told = runtime.getDeviceProperties(0)
        found |= {
            "device": told["name"].decode(),
            "memory_bytes": int(told["totalGlobalMem"]),
            "multiprocessors": int(told["multiProcessorCount"]),
            "driver": _driver(),
            "cuda_of_driver": runtime.driverGetVersion(),
            "cuda": runtime.runtimeGetVersion(),
            "cufft": cupy.cuda.cufft.getVersion(),
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _driver() -> str:
    """The driver's version, where its own tool tells it."""
    asked = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not told: {error}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Timing:
    """Median ``seconds`` of so many ``rounds``, the fastest, and the slowest; or the ``reason``
    why there are none."""

    seconds: float = float("nan")
    least_seconds: float = float("nan")
    most_seconds: float = float("nan")
    rounds: int = 0
    reason: str = ""


def once(lane: Lane, call: Call, repeats: int = 1) -> float:
    """Seconds of a call on a lane, by the device's own marks."""
    marks: list[Any] = []

    def work() -> None:
        marks.append(lane.mark())
        for _ in range(repeats):
            call()
        marks.append(lane.mark())

    lane.do(work).wait()
    begin, end = marks
    return float(end.seconds_since(begin)) / repeats


def wall(lane: Lane | None, call: Call, repeats: int = 1) -> float:
    """Seconds of a call by the clock of the host; it waits for its answer."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def side_by_side(
    bench: Bench,
    lane: Lane | None,
    calls: Mapping[str, Call],
    seconds: float = 5.0,
    timed: Callable[..., float] = once,
) -> dict[str, Timing]:
    """All calls in turn, round after round, for about so many ``seconds``; what cannot be done is
    left out with its reason."""
    found: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            timed(lane, call)  # compiles, and chooses
            taken = timed(lane, call)
        except Exception as error:  # whatever it is, the others are timed
            text = str(error).strip() or type(error).__name__
            reasons[name] = f"{type(error).__name__}: {text.splitlines()[0]}"[:300]
            bench.take_back()
        else:
            repeats[name] = max(1, min(_MOST_REPEATS, round(_LEAST_SECONDS / max(taken, 1e-6))))
            found[name] = []
    end = time.monotonic() + seconds
    for number in range(1 if bench.quick else ROUNDS):
        if number and (time.monotonic() > end or bench.late):
            break
        for name in found:
            found[name].append(timed(lane, calls[name], repeats[name]))
    timings = {
        name: Timing(median(some), min(some), max(some), len(some)) for name, some in found.items()
    }
    return timings | {name: Timing(reason=reason) for name, reason in reasons.items()}


def filled(device: Device, shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> Any:
    """An array of the device; not of zeros, which are multiplied faster than others."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize // 4
    some = np.random.default_rng(seed).standard_normal(min(count, 1 << 20), np.float32)
    made = device.empty(4 * count).view(np.float32)

    def work() -> None:
        few = device.xp.asarray(some)
        for first in range(0, count, some.size):
            part = made[first : first + some.size]
            part[...] = few[: part.size]

    device.lanes.compute.do(work).wait()
    return made.view(dtype).reshape(shape)


def fetched(device: Device, array: Any) -> Any:
    """A copy on the host of an array of the device."""
    kept: list[Any] = []
    device.lanes.compute.do(lambda: kept.append(device.xp.ascontiguousarray(array))).wait()
    there = kept[0].reshape(-1).view(np.uint8)
    here = device.pinned(there.nbytes)
    device.lanes.compute.do(lambda: device.copy(here, there)).wait()
    return here.view(array.dtype).reshape(array.shape)


def error_of(made: Array, want: Array) -> float:
    """Relative, of all values together."""
    return float(np.linalg.norm(made - want) / np.linalg.norm(want))


@dataclass
class Noted:
    """What a kernel did in all its launches."""

    marks: list[tuple[Any, Any]] = field(default_factory=list)
    nbytes: float = 0
    operations: float = 0

    def told(self, floors: Mapping[str, float]) -> dict[str, float]:
        """Its seconds, and the share of what memory or multipliers would allow."""
        seconds = sum(float(end.seconds_since(begin)) for begin, end in self.marks)
        least = self.nbytes / floors.get("copy", float("inf"))
        least = max(least, self.operations / floors.get("products", float("inf")))
        return {
            "seconds": seconds,
            "launches": len(self.marks),
            "bytes_per_second": self.nbytes / seconds if seconds else 0.0,
            "operations_per_second": self.operations / seconds if seconds else 0.0,
            "share_of_floor": least / seconds if seconds else 0.0,
        }


class Watched:
    """A device that notes what kernels, products of matrices and transforms take. Of arrays that
    are ``whole`` each launch reads or writes a part: they are counted once."""

    def __init__(self, device: Device, whole: Sequence[Any]) -> None:
        self._device, self._whole = device, whole
        self._counted: set[tuple[str, int]] = set()
        self.noted: dict[str, Noted] = {}
        self.xp = _Library(device.xp, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def launch(self, kernel: Kernel, blocks: int, *arguments: Any) -> None:
        """Run a kernel, and note it."""
        arrays = [a for a in arguments if hasattr(a, "nbytes") and getattr(a, "ndim", 0)]
        with self.noting(kernel.name, arrays):
            self._device.launch(kernel, blocks, *arguments)

    @contextmanager
    def noting(self, name: str, arrays: Sequence[Any], operations: float = 0) -> Iterator[None]:
        """Note what is done until this is left."""
        note = self.noted.setdefault(name, Noted())
        lane = self._device.lanes.compute
        begin = lane.mark()
        yield
        note.marks.append((begin, lane.mark()))
        note.operations += operations
        for array in arrays:
            number = next((i for i, one in enumerate(self._whole) if one is array), -1)
            if number < 0 or (name, number) not in self._counted:
                note.nbytes += array.nbytes
                self._counted.add((name, number))


class _Library:
    """The library of a device's arrays; its products and transforms are noted."""

    def __init__(self, xp: Any, watched: Watched) -> None:
        self._xp, self._watched = xp, watched

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._xp, name)
        if name == "fft":
            return _Transforms(found, self._watched)
        return self._multiply if name == "matmul" else found

    def _multiply(self, a: Any, b: Any, out: Any) -> Any:
        each = 8 if a.dtype.kind == "c" else 2
        with self._watched.noting("product", (a, b, out), each * out.size * a.shape[-1]):
            return self._xp.matmul(a, b, out=out)


class _Transforms:
    """Transforms of a library, noted."""

    def __init__(self, library: Any, watched: Watched) -> None:
        self._library, self._watched = library, watched

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if name not in _TRANSFORMS:
            return found

        def transform(x: Any, *given: Any, **how: Any) -> Any:
            with self._watched.noting("transform", (x, x)):
                return found(x, *given, **how)

        return transform
