"""Whole networks on a GPU: a patch of a dense one, a U-Net, and a run from a Zarr store to
another.

Patches go from and to the host's memory, as the planner plans them for the device's. PyTorch's time
of a dense network is that of its layers one by one, by the same algorithm (max-pooling fragments)
on the same patch, each scaled from a part of it and held in the device's memory: copies from and to
the host, and that a patch has to fit, are not counted against it.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import dask
import numpy as np
import zarr

import gpu_peers
from gpu_device import SIMULATED_BYTES, Bench, Call, error_of, side_by_side, wall
from gpu_floors import told
from networks import unet
from znni_dask import run
from znni_dask.choices import Menu, choose_primitives, chosen_primitives
from znni_dask.executors.device import DeviceExecutor
from znni_dask.geometry import Box, Size, triple, volume
from znni_dask.machine import GPU, MemoryMeter, cores
from znni_dask.network.chains import PAPER_NETWORKS, Row, chain
from znni_dask.network.field_of_view import geometry
from znni_dask.network.layers import FULL, LOWER
from znni_dask.network.network import Network
from znni_dask.network.rewrites import computed_in, simplify
from znni_dask.patches import Layout, spans
from znni_dask.patchwise import WindowExecutor
from znni_dask.planner import Request, plan
from znni_dask.primitives.base import Array, Primitive
from znni_dask.primitives.gpu.conv_cudnn import TENSOR, GpuConvCudnn
from znni_dask.resources import SLOTS
from znni_dask.schedule import Schedule, Schedules
from znni_dask.windows import WholeWindow

LARGEST_ERROR = 1e-5
RUNS = 100_000  # of a network, over which what it takes to begin is spread
_CHECKED = 8  # voxels of the answer along every axis
_HOST_BYTES = 80 << 30
_MADE = 256  # voxels of the answer along every axis, of which a patch is as much as fits
_PATCHES, _PATCHES_SECONDS = 6, 12  # that are made together, at most, in about so many seconds
_UNET = ((32, 64, 128, 256), 128)
_EDGE = 384  # of the volume of a run
_LAYER_SECONDS = 0.5
_MOST_IN_DOUBLE = 2e13  # operations


def _small() -> Network:
    kinds = ("CONV", "POOL", "CONV")
    return chain(1, [Row(k, (2,) * 3 if k == "POOL" else (3,) * 3, 4) for k in kinds])


def dense(bench: Bench) -> dict[str, Any]:
    """The papers' networks."""
    names: Mapping[str, Callable[[], Network]] = PAPER_NETWORKS
    rows, left_out = {}, []
    for name, make in ({"small": _small} if bench.quick else names).items():
        if bench.late:
            left_out.append(name)
            continue
        told(name)
        rows[name] = attempted(bench, partial(_dense, bench, simplify(make())))
        told(json.dumps(rows[name], default=str))
    return {"rows": rows, "left_out": left_out}


def _planned(bench: Bench, network: Network) -> tuple[Layout, Size, dict[str, Primitive], Any]:
    """A patch and primitives, for as much of the device's memory as a run would take."""
    made_edge, unit = (24, 8) if bench.quick else (_MADE, 32)
    edges = [axis.shrink + made_edge for axis in geometry(network).axes]
    layout = Layout(network, triple(edges), "valid")
    made = plan(
        Request(
            layout=layout,
            unit=(unit,) * 3,
            voxel_bytes=4,
            encoding_bytes=0,
            read_bytes=lambda region, by_cells=False: volume(region),
            write_bytes=0,
            baseline_bytes=0,
            allowed_bytes=_HOST_BYTES,
            threads=cores(),
            hull=Box((0, 0, 0), layout.output_size),
            device=GPU,
            device_bytes=bench.free_bytes,
        )
    )
    return layout, made.patch, chosen_primitives(layout, made), made


def _dense(bench: Bench, network: Network) -> dict[str, Any]:
    begin = time.perf_counter()
    layout, patch, primitives, made = _planned(bench, network)
    planning = time.perf_counter() - begin
    schedules = Schedules(layout, primitives)
    todo = schedules.schedule(Box((0, 0, 0), patch))
    x = np.random.default_rng(0).standard_normal((1, *todo.input.size), np.float32)
    sizes = schedules.envelope(spans(layout, patch, patch))
    device = bench.opened_within(made.allowed_device_bytes)
    with DeviceExecutor(schedules, sizes, patch, device) as executor:
        outs = [np.empty((network.out_channels, *patch), np.float32) for _ in range(SLOTS + 1)]
        begin = time.perf_counter()
        executor.run(todo, [x], outs[:1])
        first = time.perf_counter() - begin
        executor.taken()
        alone = wall(None, lambda: executor.run(todo, [x], outs[:1]))
        once = executor.taken()
        layers, spent = once.layer_seconds, {s.what: s.seconds for s in once.spans}
        patches = max(2, min(_PATCHES, int(_PATCHES_SECONDS / alone)))
        together = _together(executor, todo, x, outs, patches)
        alike = all(np.array_equal(out, outs[0]) for out in outs[:patches])
    bench.take_back()
    want = _exact(bench, layout, (_CHECKED,) * 3, x)
    error = error_of(outs[0][:, :_CHECKED, :_CHECKED, :_CHECKED], want)
    voxels = volume(patch)
    found: dict[str, Any] = {
        "patch": patch,
        "input": todo.input.size,
        "primitives": {name: p.name for name, p in primitives.items()},
        "planning_seconds": planning,
        "first_seconds": first,
        "seconds_alone": alone,
        "lanes": spent,
        "seconds": together,
        "patches": patches,
        "voxels_per_second": voxels / together,
        "planned_voxels_per_second": made.voxels_per_second,
        "device_bytes": made.device_bytes,
        "error": error,
        "right": bool(error <= LARGEST_ERROR and alike),
        "layers": layers,
    }
    told(f"  {voxels / together:,.0f} voxels/s, error {error:.1e}; now PyTorch")
    return found | _by_torch(bench, layout, patch, together)


def _together(
    executor: DeviceExecutor, todo: Schedule, x: Array, outs: list[Array], patches: int
) -> float:
    """Seconds of a patch where several threads ask, as those of a run do."""
    with ThreadPoolExecutor(len(outs)) as pool:
        some = [outs[i % len(outs)] for i in range(patches)]
        begin = time.perf_counter()
        list(pool.map(lambda out: executor.run(todo, [x], [out]), some))
    return (time.perf_counter() - begin) / patches


def _exact(bench: Bench, layout: Layout, size: Size, x: Array) -> Array:
    """The first voxels of the answer for an input, in double precision unless that takes long."""
    network = layout.network
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    todo = schedules.schedule(Box((0, 0, 0), size))
    crop = np.zeros((network.in_channels, *todo.input.size), np.float32)
    seen = x[:, *map(slice, todo.input.size)]  # fragments may reach beyond what is there
    crop[:, *map(slice, seen.shape[1:])] = seen
    flops = sum(step.primitive.flops(step.problem) for step in todo.steps)
    double = flops < _MOST_IN_DOUBLE
    made = gpu_peers.precise(network, bench, double, lambda peer: peer.fragments(crop[None]))
    answer = np.empty((network.out_channels, *size))
    for fragment, start in zip(made, todo.positions, strict=True):
        target = answer[:, *(slice(a, None, s) for a, s in zip(start, todo.spacing, strict=True))]
        target[...] = fragment[:, *map(slice, target.shape[1:])]
    return answer


def _by_torch(bench: Bench, layout: Layout, patch: Size, own: float) -> dict[str, Any]:
    """Its seconds, layer by layer."""
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    todo = schedules.schedule(Box((0, 0, 0), patch))
    layers: dict[str, dict[str, float]] = {}
    with bench.opened(0.1) as device:
        for name, calls, share in gpu_peers.steps(todo, device):
            timings = side_by_side(bench, device.lanes.compute, calls, _LAYER_SECONDS)
            layers[name] = gpu_peers.sum_of(timings, share)
            reasons = {who: t.reason for who, t in timings.items() if t.reason}
            if reasons:
                told(f"  {name}: {reasons}")
            bench.take_back()
    total = {p: sum(one[p] for one in layers.values()) for p in gpu_peers.PRECISIONS}
    return {
        "peer": "PyTorch, layer by layer, scaled",
        "peer_seconds": total,
        "peer_seconds_of_layers": layers,
        "times": {precision: seconds / own for precision, seconds in total.items()},
    }


# ---- a U-Net


def unets(bench: Bench) -> dict[str, Any]:
    """A U-Net of four levels, whole arrays from and to the host's memory, in three precisions."""
    widths, edge = ((2, 3, 4, 5), 16) if bench.quick else _UNET
    network = simplify(unet(widths))
    x = np.random.default_rng(0).standard_normal((1, 1, edge, edge, edge), np.float32)
    want = gpu_peers.precise(network, bench, True, lambda peer: peer.apply(x))
    layout = WholeWindow(network, (edge,) * 3)
    answers: dict[str, Array] = {}
    with bench.opened(0.25) as one, bench.opened(0.2) as two, bench.opened(0.2) as three:
        executors = {
            f"own {precision}": _applying(network, layout, precision, device)
            for precision, device in ((FULL, one), (TENSOR, two), (LOWER, three))
        }
        calls: dict[str, Call] = {
            name: partial(executor.apply, [x[0]]) for name, executor in executors.items()
        }
        calls |= gpu_peers.Whole(network, bench).calls(x)
        timings = side_by_side(bench, None, calls, 20.0, timed=wall)
        for name, timing in timings.items():
            if timing.rounds:
                answers[name] = np.asarray(calls[name]())
        layers = {name: executor.taken().layer_seconds for name, executor in executors.items()}
        for executor in executors.values():
            executor.close()
    bench.take_back()
    errors = gpu_peers.errors(answers, want)
    rows = {name: {**asdict(timing), "error": errors.get(name)} for name, timing in timings.items()}
    for name, row in rows.items():
        seconds, error, reason = (row[key] for key in ("seconds", "error", "reason"))
        told(f"U-Net {edge}³, {name}: {seconds * 1e3:.2f} ms, error {error} {reason}")
    return {"widths": widths, "edge": edge, "rows": rows, "layers": layers}


def _applying(network: Network, layout: WholeWindow, precision: str, device: Any) -> WindowExecutor:
    """By the primitives that are estimated fastest; in less than float32 where that was asked."""
    if precision != FULL:
        network = computed_in(network, LOWER)
        layout = WholeWindow(network, layout.output_size)
    plain = Schedules(layout, choose_primitives(layout, device=GPU))
    patch = Box((0, 0, 0), layout.output_size)
    chosen = Menu.of_patches(plain, patch, RUNS, 1).fastest()
    asked = GpuConvCudnn(precision)
    for node in network:
        if node.inputs and precision != FULL and asked.refusal(node.layer) is None:
            chosen[node.name] = asked
    return WindowExecutor(layout, chosen, 1, 1, device)


# ---- a run


def overlap(bench: Bench) -> dict[str, Any]:
    """How busy the device is in runs from a Zarr store to another, of bytes."""
    names: Mapping[str, Callable[[], Network]] = PAPER_NETWORKS
    some = {"small": _small} if bench.quick else {n: names[n] for n in ("n337", "n537")}
    rows = {}
    for name, make in some.items():
        if not bench.late:
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = attempted(bench, partial(_run, bench, make(), Path(folder)))
            told(f"{name}, {json.dumps(rows[name], default=str)}")
    return {"rows": rows}


def attempted(bench: Bench, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found, or why nothing is: other networks are measured all the same."""
    try:
        return measure()
    except Exception:
        return {"failed": traceback.format_exc()}
    finally:
        bench.take_back()


def _run(bench: Bench, network: Network, folder: Path) -> dict[str, Any]:
    edge, chunk = (30, 10) if bench.quick else (_EDGE, 64)
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (edge,) * 3, np.uint8)
    array = zarr.create_array(
        folder / "in.zarr", shape=values.shape, chunks=(chunk,) * 3, dtype=np.uint8
    )
    array[:] = values
    place, want = _sample(bench, network, values)
    low, high = float(want.min()), float(want.max())
    told_of = {"znni.simulated-gpu": str(SIMULATED_BYTES)} if bench.simulated else {}
    begin = time.perf_counter()
    with dask.config.set(told_of), MemoryMeter() as meter:
        made = run(
            network,
            folder / "in.zarr",
            folder / "out.zarr",
            device=GPU,
            dtype="uint8",
            value_range=(low, high),
            chunks=chunk,
            pyramid=False,
            timeline=folder / "line.json",
        )
    seconds = time.perf_counter() - begin
    got = zarr.open_array(folder / "out.zarr" / "0", mode="r")[(..., *place.slices)]
    levels = np.rint((want - low) / (high - low) * 255)
    return {
        "edge": edge,
        "patch": made.plan.patch,
        "block": made.plan.block,
        "blocks": made.blocks,
        "primitives": made.plan.primitives,
        "wall_seconds": seconds,
        "voxels_per_second": edge**3 / seconds,
        "planned_voxels_per_second": made.plan.voxels_per_second,
        "host_peak_bytes": meter.peak_bytes,
        "largest_difference": float(np.abs(got.reshape(want.shape) - levels).max()),
        **busy(json.loads((folder / "line.json").read_text())),
    }


def _sample(bench: Bench, network: Network, values: Any) -> tuple[Box, Array]:
    """Some voxels in the middle of the answer, in double precision, and where they lie."""
    simple = simplify(network)
    axes = geometry(simple).axes
    side = 2 if bench.quick else _CHECKED
    start = [n // 2 for n in values.shape]
    first = [s - axis.shrink // 2 for s, axis in zip(start, axes, strict=True)]
    seen = values[tuple(slice(f, None) for f in first)][None]
    answer = _exact(bench, Layout(simple, triple(seen.shape[1:]), "valid"), (side,) * 3, seen)
    stop = [s + side for s in start]
    return Box(triple(start), triple(stop)), answer


def busy(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a timeline: the seconds of every thing done, from the first to the last, and the share of
    these in which the device computed; and that from its first patch to its last."""
    done = [event for event in events if event.get("ph") == "X"]
    begin, end = (f(e["ts"] + g * e["dur"] for e in done) for f, g in ((min, 0), (max, 1)))
    sums: dict[str, float] = {}
    for event in done:
        sums[event["name"]] = sums.get(event["name"], 0.0) + event["dur"] / 1e6
    computed = [event for event in done if event["name"] == "compute"]
    first = min(event["ts"] for event in computed)
    last = max(event["ts"] + event["dur"] for event in computed)
    return {
        "seconds_of_what": sums,
        "busy_share": sums["compute"] * 1e6 / max(end - begin, 1),
        "busy_share_between_patches": sums["compute"] * 1e6 / max(last - first, 1),
        "median_patch_seconds": median(event["dur"] for event in computed) / 1e6,
    }
