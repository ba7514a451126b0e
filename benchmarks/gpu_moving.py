"""Layers on a GPU that compute next to nothing: how near they come to a copy."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import gpu_peers
from gpu_device import Bench, Call, Timing, fetched, filled, side_by_side
from gpu_floors import told
from znni_dask.devices.base import Device
from znni_dask.geometry import triple
from znni_dask.machine import GPU
from znni_dask.network.layers import Activation, Concat, Layer, MaxPool, Normalize, Resize
from znni_dask.primitives.base import DevicePrimitive, Primitive, Problem
from znni_dask.primitives.gpu.fragments import weave
from znni_dask.primitives.table import candidates


def moving(bench: Bench) -> dict[str, Any]:
    """Pooling, activations, joining, weaving …: the share of a copy's bytes in a second that they
    read and write."""
    found = []
    edge, batch, channels = (9, 1, 4) if bench.quick else (66, 8, 80)
    shape = (batch, channels, edge, edge, edge)
    pool = MaxPool((2, 2, 2), (2, 2, 2))
    alone: list[tuple[Layer, int]] = [
        (pool, 1),
        (Activation("relu"), 1),
        (Activation("gelu"), 1),
        (Concat(), 2),
        (Resize((2, 2, 2), "nearest"), 1),
        (Resize((2, 2, 2), "half_pixel"), 1),
        (Normalize(channels, channels, "zyx"), 1),
    ]
    with bench.opened() as device:
        for layer, count in alone:
            for primitive in candidates(layer, GPU):
                if not bench.late and isinstance(primitive, DevicePrimitive):
                    found.append(_moved(bench, device, primitive, layer, count, shape))
        found.append(_woven(bench, device))
    bench.take_back()
    for row in found:
        told(
            f"{row['layer']} ({row['primitive']}): {row['seconds'] * 1e3:.3f} ms, "
            f"{row['bytes_per_second'] / 1e12:.2f} TB/s, {row['share_of_copy']:.0%} of a copy; "
            f"torch {row.get('torch_seconds', float('nan')) * 1e3:.3f} ms {row['reason']}"
        )
    return {"rows": found}


def _moved(
    bench: Bench,
    device: Device,
    primitive: DevicePrimitive,
    layer: Layer,
    count: int,
    shape: tuple[int, int, int, int, int],
) -> dict[str, Any]:
    problem = _problem(layer, primitive, count, shape)
    given = [filled(device, s, seed=i) for i, s in enumerate(problem.inputs)]
    out = device.empty(4 * prod(problem.output)).view(np.float32).reshape(problem.output)
    random = np.random.default_rng(0)
    weights = {
        key: random.standard_normal(s, np.float32) for key, s in layer.weight_shapes().items()
    }
    prepared = primitive.placed(layer, weights, device)

    def apply() -> None:
        primitive.apply(prepared, problem, given, out, device)

    calls: dict[str, Call] = {"own": apply}
    if isinstance(layer, MaxPool) and primitive.fragments_of(layer) == layer.stride:
        calls |= gpu_peers.pooled(layer, device, shape)
    timings = side_by_side(bench, device.lanes.compute, calls, 1.0)
    theirs = [t.seconds for name, t in timings.items() if name != "own" and t.rounds]
    name = f"{layer.kind} {layer.summary}".strip()
    row = _row(bench, name, primitive.name, timings["own"], problem)
    row |= {"family": primitive.family, "estimated_seconds": primitive.work(problem, 1).seconds(1)}
    amounts = primitive.work(problem, 1).amounts
    row["amounts"] = {rate.name: amount for rate, amount in amounts.items()}
    return row | ({"torch_seconds": min(theirs)} if theirs else {})


def _problem(
    layer: Layer, primitive: Primitive, count: int, shape: tuple[int, int, int, int, int]
) -> Problem:
    batch, channels, *size = shape
    apart, made = primitive.fragments_of(layer), []
    for axis in range(3):
        window = layer.window(axis)
        made.append(window.size(size[axis] - apart[axis] + 1))
    z, y, x = made
    output = (batch * prod(apart), layer.channels([channels] * count), z, y, x)
    offset = triple(layer.window(axis).offset(0, 0) for axis in range(3))
    return Problem(layer, (shape,) * count, output, (offset,) * count, (0, 0, 0), triple(size))


def _row(
    bench: Bench, layer: str, primitive: str, timing: Timing, problem: Problem
) -> dict[str, Any]:
    nbytes = 4 * (sum(map(prod, problem.inputs)) + prod(problem.output))
    rate = nbytes / timing.seconds
    return {
        "layer": layer,
        "primitive": primitive,
        "inputs": problem.inputs,
        "output": problem.output,
        "seconds": timing.seconds,
        "reason": timing.reason,
        "bytes_per_second": rate,
        "share_of_copy": rate / bench.floors.get("copy", float("inf")),
    }


def _woven(bench: Bench, device: Device) -> dict[str, Any]:
    """Fragments of the answer, interleaved."""
    edge, channels, step = (3, 2, 2) if bench.quick else (24, 3, 8)
    spacing = (step, step, step)
    places = list(np.ndindex(*spacing))
    numbers = {triple(place): i for i, place in enumerate(places)}
    fragments = filled(device, (len(places), channels, edge, edge, edge))
    whole = (channels, *(edge * step,) * 3)
    out = device.empty(4 * prod(whole)).view(np.float32).reshape(whole)
    calls: dict[str, Call] = {"own": lambda: weave(fragments, numbers, spacing, out, device)}
    timing = side_by_side(bench, device.lanes.compute, calls, 1.0)["own"]
    made, given = fetched(device, out), fetched(device, fragments)
    wrong = any(
        not np.array_equal(made[:, a::step, b::step, c::step], given[i])
        for i, (a, b, c) in enumerate(places)
    )
    shape = (1, channels, *whole[1:])
    problem = Problem(Concat(), (shape,), shape, ((0, 0, 0),), (0, 0, 0), triple(whole[1:]))
    return _row(bench, "weaving", "WRONG" if wrong else "weave", timing, problem)
