"""Layers on a GPU, one by one: by the project's primitives, and by PyTorch beside them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

import gpu_peers
from gpu_device import (
    Bench,
    Call,
    Timing,
    Watched,
    error_of,
    fetched,
    once,
    side_by_side,
)
from gpu_floors import told
from layer import Point
from znni_dask.devices.base import Device
from znni_dask.geometry import Size, triple
from znni_dask.machine import GPU
from znni_dask.network.layers import (
    FULL,
    Conv,
    ConvTranspose,
)
from znni_dask.primitives.base import Array, DevicePrimitive, Primitive, Problem
from znni_dask.primitives.gpu import rates
from znni_dask.primitives.gpu.conv_fft_tiles import gpu_tiles
from znni_dask.primitives.table import candidates

TILES = 4  # of those worth trying, that are estimated to be fastest
LARGEST_ERROR = 1e-5  # in float32
_CHECKED = (6, 6, 6)
_SECONDS = 5.0  # of the rounds of a point


def conv(fan_in: int, fan_out: int, kernel: int, padding: int = 0) -> Conv:
    ends = ((padding,) * 3, (padding,) * 3)
    return Conv(fan_in, fan_out, (kernel,) * 3, padding=ends, relu=True)


def points(layer: Conv | ConvTranspose, *sizes: tuple[int, int]) -> list[Point]:
    """A layer on (edge, batch) of every size."""
    return [Point(layer, layer.in_channels, edge, batch) for edge, batch in sizes]


MIDDLE = [
    point
    for size in ((66, 8), (24, 64), (100, 1))
    for k in (3, 5, 7, 9)
    for point in points(conv(80, 80, k), size)
]
ENDS = [
    *(p for k in (4, 6, 8) for p in points(conv(1, 80, k), (130, 1))),
    *(p for k in (3, 5, 9) for p in points(conv(80, 3, k), (36, 64))),
    *(
        p
        for f, n in ((32, 128), (64, 64), (128, 32), (256, 16))
        for p in points(conv(f, f, 3, 1), (n, 4))
    ),
    *points(conv(80, 80, 1), (66, 8)),
    *points(ConvTranspose(64, 32, (2, 2, 2), (2, 2, 2)), (64, 1)),
    *points(ConvTranspose(128, 64, (2, 2, 2), (2, 2, 2)), (32, 4)),
]
_SMALL = [
    *points(conv(3, 4, 3), (9, 2)),
    *points(conv(1, 4, 3, 1), (9, 1)),
    *points(ConvTranspose(3, 2, (2, 2, 2), (2, 2, 2)), (5, 1)),
]


def middle(bench: Bench) -> dict[str, Any]:
    """Layers of 80 channels."""
    return _all(bench, _SMALL[:1] if bench.quick else MIDDLE)


def ends(bench: Bench) -> dict[str, Any]:
    """First and last layers, those of U-Nets, of single voxels, and transposed ones."""
    return _all(bench, _SMALL[1:] if bench.quick else ENDS)


def _all(bench: Bench, some: list[Point]) -> dict[str, Any]:
    rows, left_out = [], []
    for point in some:
        name = f"{point.name}, {point.size}"
        if bench.late:
            left_out.append(name)
            continue
        try:
            with bench.opened() as device:
                row = measured(bench, point, device)
        except Exception:  # the others are measured all the same
            left_out.append(f"{name}: {traceback.format_exc()}")
            told(left_out[-1])
        else:
            rows.append(row)
            told(_line(row))
        bench.take_back()
    return {"rows": rows, "left_out": left_out}


@dataclass
class Own:
    """A point made ready for a primitive on a device; all primitives share input and output."""

    primitive: DevicePrimitive
    problem: Problem
    given: Any
    out: Any
    device: Device
    prepared: Any = None

    def make_ready(self, point: Point) -> None:
        """Have what depends on the weights."""
        self.prepared = self.primitive.placed(point.layer, point.weights, self.device)

    def apply(self, device: Any = None) -> None:
        """Compute it."""
        self.primitive.apply(
            self.prepared, self.problem, [self.given], self.out, device or self.device
        )


def primitives_of(point: Point, most: int) -> list[DevicePrimitive]:
    """All that compute a point in float32; of those in tiles the most promising."""
    found: list[Primitive] = [p for p in candidates(point.layer, GPU) if p.precision == FULL]
    found += list(gpu_tiles(point.problem))[:most]
    return [p for p in found if isinstance(p, DevicePrimitive)]


def measured(bench: Bench, point: Point, device: Device) -> dict[str, Any]:
    """A row: every primitive and PyTorch, side by side."""
    given = device.put(point.x)
    out = device.empty(4 * prod(point.output)).view(np.float32).reshape(point.output)
    size = triple(min(n, c) for n, c in zip(point.output[2:], _CHECKED, strict=True))
    want = gpu_peers.exact(point, device, size)
    own: dict[str, Own] = {}
    reasons: dict[str, str] = {}
    errors: dict[str, float] = {}
    for primitive in primitives_of(point, 1 if bench.quick else TILES):
        one = Own(primitive, point.problem, given, out, device)
        try:
            one.make_ready(point)
            device.lanes.compute.do(lambda: out.fill(np.nan)).wait()
            device.lanes.compute.do(one.apply).wait()
            errors[primitive.name] = _error(device, out, size, want)
            own[primitive.name] = one
        except Exception as error:  # the others are measured all the same
            reasons[primitive.name] = f"{type(error).__name__}: {str(error)[:200]}"
    peers = gpu_peers.convolutions(point, device)
    calls: dict[str, Call] = {name: one.apply for name, one in own.items()}
    calls |= {name: peer.call for name, peer in peers.items()}
    timings = side_by_side(bench, device.lanes.compute, calls, _SECONDS)
    for name, peer in peers.items():
        if timings[name].rounds:
            kept: list[Any] = []
            device.lanes.compute.do(partial(_noted, kept, peer)).wait()
            errors[name] = error_of(gpu_peers.part_of(kept[0], size), want["first"])
    rows = {name: _own_row(bench, point, own[name], timings[name]) for name in own}
    for name, peer in peers.items():
        whole = {"seconds": timings[name].seconds / peer.share, "part": peer.share}
        rows[name] = {"reason": timings[name].reason, "rounds": timings[name].rounds, **whole}
    for name, error in errors.items():
        rows[name]["error"] = error
    rows |= {name: {"seconds": float("nan"), "reason": why} for name, why in reasons.items()}
    return {
        "layer": point.name,
        "size": point.size,
        "flops": point.flops,
        "voxels": prod(point.output[2:]) * point.batch,
        "rows": rows,
        **compared(rows, set(own)),
    }


def _error(device: Device, out: Any, size: Size, want: Mapping[str, Array]) -> float:
    """Of the first outputs of the first sample, or of the last of the last, if these are known."""
    z, y, x = map(slice, size)
    errors = [error_of(fetched(device, out[0][:, z, y, x]), want["first"])]
    if "last" in want:
        z, y, x = (slice(-n, None) for n in size)
        errors.append(error_of(fetched(device, out[-1][:, z, y, x]), want["last"]))
    return max(errors)


def _noted(kept: list[Any], peer: gpu_peers.Peer) -> None:
    kept.append(peer.answer())


def _own_row(bench: Bench, point: Point, one: Own, timing: Timing) -> dict[str, Any]:
    """What a primitive took, and its kernels."""
    work = one.primitive.work(one.problem, 1)
    amounts = {rate.name: amount for rate, amount in {**work.amounts, **work.meanwhile}.items()}
    found: dict[str, Any] = {
        "family": one.primitive.family,
        "seconds": timing.seconds,
        "least_seconds": timing.least_seconds,
        "rounds": timing.rounds,
        "reason": timing.reason,
        "estimated_seconds": work.seconds(1),
        "amounts": amounts,
        "prepared_bytes": one.primitive.prepared_bytes(point.layer),
        "workspace_bytes": one.primitive.workspace_bytes(one.problem, 1),
    }
    if not timing.rounds:
        return found
    copy, products = (bench.floors.get(key, float("inf")) for key in ("copy", "products"))
    moved = amounts.get(rates.MEMORY.name, 0) / copy
    multiplied = amounts.get(rates.PRODUCTS.name, 0) / products
    found["floor_seconds"] = {"memory": moved, "products": multiplied}
    found["share_of_floor"] = max(moved, multiplied) / timing.seconds
    watched = Watched(one.device, (one.given, one.out))
    taken = once(one.device.lanes.compute, partial(one.apply, watched))
    kernels = {name: note.told(bench.floors) for name, note in watched.noted.items()}
    rest = taken - sum(kernel["seconds"] for kernel in kernels.values())
    return found | {"watched_seconds": taken, "kernels": kernels, "other_seconds": rest}


def compared(rows: Mapping[str, Mapping[str, Any]], own: set[str]) -> dict[str, Any]:
    """The best of both sides, where it is right; PyTorch's in every precision."""

    def best(names: Any) -> tuple[float, str | None]:
        able = [
            (row["seconds"], name)
            for name, row in rows.items()
            if name in names and row["seconds"] > 0  # what could not be done has no number
        ]
        return min(able, default=(float("nan"), None))

    right = {name for name in own if rows[name].get("error", 1.0) <= LARGEST_ERROR}
    seconds, name = best(right)
    found: dict[str, Any] = {
        "best": name,
        "seconds": seconds,
        "wrong": sorted(own - right),
        "peers": {},
    }
    for precision in gpu_peers.PRECISIONS:
        theirs, who = best({n for n in rows if n.startswith(f"torch {precision}")})
        found["peers"][precision] = {"name": who, "seconds": theirs, "times": theirs / seconds}
    return found


def _line(row: Mapping[str, Any]) -> str:
    """A row in short."""
    times = "  ".join(f"{k} {v['times']:.2f}x" for k, v in row["peers"].items())
    kernels = "\n    ".join(
        f"{who}, {one['share_of_floor']:.0%} of the floor: {_kernels(one)}"
        for who, one in row["rows"].items()
        if one.get("kernels")
    )
    others = ", ".join(
        f"{name} {one['seconds'] * 1e3:.2f} ms ({one.get('error', float('nan')):.0e})"
        + (f" {one['reason']}" if one.get("reason") else "")
        for name, one in row["rows"].items()
    )
    wrong = f"  WRONG: {', '.join(row['wrong'])}" if row["wrong"] else ""
    return (
        f"{row['layer']}, {row['size']}: {row['best']} {row['seconds'] * 1e3:.2f} ms, "
        f"{row['flops'] / row['seconds'] / 1e12:.1f} direct TFLOP/s; {times}{wrong}\n"
        f"    {kernels}\n    {others}"
    )


def _kernels(row: Mapping[str, Any]) -> str:
    """What each took, with its share of what memory and multipliers allow."""
    some = [
        f"{name} {kernel['seconds'] * 1e3:.2f} ms ({kernel['share_of_floor']:.0%})"
        for name, kernel in row["kernels"].items()
    ]
    return ", ".join([*some, f"other {row['other_seconds'] * 1e3:.2f} ms"])
