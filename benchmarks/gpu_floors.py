"""What a GPU does at best: copies, products of matrices, transforms by its libraries."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np

from gpu_device import Bench, Call, error_of, fetched, filled, side_by_side, wall
from znni_dask.devices.base import Device
from znni_dask.geometry import Size

CHANNELS = 80
# (frequencies, rows) of products of spectra: tiles of 16, 24 and 32 voxels
SPECTRA = ((2304, 64), (2304, 512), (7488, 16), (7488, 128), (17408, 8), (17408, 64))
SQUARES = (4096, 8192)
DIRECT = (80, 512, 28_000)  # outputs, channels and taps, voxels of a piece
LINES = (64, 96, 128, 192)  # lengths of lines that are transformed
_COPIED_BYTES, _HOST_BYTES = 2 << 30, 1 << 30
_QUICK_BYTES = 1 << 20
_LARGEST_ERROR = 1e-5


def floors(bench: Bench) -> dict[str, Any]:
    """All of them; what layers are compared with is kept in ``bench``."""
    with bench.opened() as device:
        found: dict[str, Any] = {
            "copies": copies(bench, device),
            "host": to_and_from_the_host(bench, device),
            "products": products(bench, device),
            "transforms": transforms(bench, device),
        }
    rates = [row["operations_per_second"] for row in found["products"] if row["complex"]]
    bench.floors |= {
        "copy": found["copies"]["bytes_per_second"],
        "products": max([*rates, 1.0]),
    }
    return found | {"floors": dict(bench.floors)}


def copies(bench: Bench, device: Device) -> dict[str, Any]:
    """Bytes read and written in a second within the device's memory."""
    nbytes = _QUICK_BYTES if bench.quick else _COPIED_BYTES
    x, y, out = (filled(device, (nbytes // 4,), seed=i) for i in range(3))
    xp = device.xp
    calls: dict[str, Call] = {
        "copy": lambda: xp.copyto(out, x),
        "add": lambda: xp.add(x, y, out=out),
        "fill": lambda: out.fill(0),
    }
    timings = side_by_side(bench, device.lanes.compute, calls)
    moved = {"copy": 2 * nbytes, "add": 3 * nbytes, "fill": nbytes}
    rates = {name: moved[name] / timing.seconds for name, timing in timings.items()}
    told(f"copies: {', '.join(f'{k} {v / 1e12:.2f} TB/s' for k, v in rates.items())}")
    return {"bytes": nbytes, "bytes_per_second": rates["copy"], "of_each": rates}


def to_and_from_the_host(bench: Bench, device: Device) -> dict[str, Any]:
    """Bytes copied in a second from and to pinned memory, one way and both ways at once; and a copy
    by numpy into such memory, as executors make it."""
    nbytes = _QUICK_BYTES if bench.quick else _HOST_BYTES
    here = [device.pinned(nbytes) for _ in range(2)]
    there = [device.empty(nbytes) for _ in range(2)]
    plain = np.ones(nbytes, np.uint8)
    up, _, down = device.lanes

    def both() -> None:
        marks = [
            up.do(partial(device.copy, there[0], here[0])),
            down.do(partial(device.copy, here[1], there[1])),
        ]
        for mark in marks:
            mark.wait()

    calls: dict[str, Call] = {
        "up": lambda: up.do(partial(device.copy, there[0], here[0])).wait(),
        "down": lambda: down.do(partial(device.copy, here[1], there[1])).wait(),
        "both": both,
        "numpy": lambda: np.copyto(here[0], plain),
    }
    timings = side_by_side(bench, None, calls, timed=wall)
    each = {"both": 2 * nbytes}
    rates = {name: each.get(name, nbytes) / timing.seconds for name, timing in timings.items()}
    told(f"host: {', '.join(f'{k} {v / 1e9:.1f} GB/s' for k, v in rates.items())}")
    return rates


def products(bench: Bench, device: Device) -> list[dict[str, Any]]:
    """Operations in a second of products of matrices, real and complex."""
    shapes: list[tuple[Any, Size, Size]] = [(np.float32, (1, n, n), (1, n, n)) for n in SQUARES]
    outputs, summed, voxels = DIRECT
    shapes.append((np.float32, (1, outputs, summed), (1, summed, voxels)))
    shapes += [(np.complex64, (f, rows, CHANNELS), (f, CHANNELS, CHANNELS)) for f, rows in SPECTRA]
    if bench.quick:
        shapes = [(np.float32, (1, 64, 64), (1, 64, 64)), (np.complex64, (20, 8, 8), (20, 8, 8))]
    return [_multiplied(bench, device, *shape) for shape in shapes]


def _multiplied(
    bench: Bench, device: Device, dtype: Any, first: Size, second: Size
) -> dict[str, Any]:
    a, b = filled(device, first, dtype, 1), filled(device, second, dtype, 2)
    size = (*first[:2], second[2])
    out = filled(device, size, dtype, 3)
    calls: dict[str, Call] = {"matmul": lambda: device.xp.matmul(a, b, out=out)}
    timing = side_by_side(bench, device.lanes.compute, calls)["matmul"]
    made = fetched(device, out[-1, :4])
    exact = fetched(device, a[-1, :4]).astype(complex) @ fetched(device, b[-1]).astype(complex)
    error = error_of(made.astype(complex), exact)
    is_complex = np.dtype(dtype).kind == "c"
    operations = (8 if is_complex else 2) * prod(size) * first[2]
    nbytes = sum(array.nbytes for array in (a, b, out))
    rate = operations / timing.seconds
    told(
        f"{np.dtype(dtype).name} {first} x {second}: {rate / 1e12:.2f} TFLOP/s, "
        f"{nbytes / timing.seconds / 1e12:.2f} TB/s, error {error:.1e} {timing.reason}"
    )
    return {
        "complex": is_complex,
        "shapes": [first, second],
        "seconds": timing.seconds,
        "operations_per_second": rate,
        "bytes_per_second": nbytes / timing.seconds,
        "error": error,
        "whole_float32": error < _LARGEST_ERROR,
        "reason": timing.reason,
    }


def transforms(bench: Bench, device: Device) -> list[dict[str, Any]]:
    """Of the device's library, of lines side by side: bytes in a second, counting what is read and
    made; and the memory that a plan keeps."""
    found = []
    for length in (8,) if bench.quick else LINES:
        count = (_QUICK_BYTES if bench.quick else 256 << 20) // (8 * length)
        x = filled(device, (count, length), np.complex64)
        real = filled(device, (count, length), np.float32)
        fft = device.xp.fft
        calls: dict[str, Call] = {
            "complex": partial(fft.fft, x, axis=-1),
            "from real": partial(fft.rfft, real, axis=-1),
        }
        timings = side_by_side(bench, device.lanes.compute, calls)
        moved = {"complex": 2 * x.nbytes, "from real": 2 * real.nbytes}
        rates = {name: moved[name] / timing.seconds for name, timing in timings.items()}
        row = {"length": length, "bytes_per_second": rates, "plan_bytes": _plan_bytes(device)}
        found.append(row)
        told(f"transforms of {length}: {row}")
    return found


def _plan_bytes(device: Device) -> list[int]:
    """What plans of the library hold that this thread made, the last first."""
    if not hasattr(device.xp, "cuda"):
        return []
    return [int(node.memsize) for _, node in device.xp.fft.config.get_plan_cache()][:2]


def told(line: str) -> None:
    """Print at once."""
    print(line, flush=True)
