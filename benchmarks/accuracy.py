"""How far float32 answers lie from float64: every primitive of convolution, and whole networks.

    python benchmarks/accuracy.py [--networks NAME ...]        (or: make bench)

Three kinds of input: values of mean 0; raw grey values of mean 1000, with standard deviations of
50 and of 1, each with random kernels and with kernels that sum to zero. Of the first the relative
L2 error counts, of grey values the error over the output's standard deviation, beside that of
PyTorch's direct convolution in the same run. Networks are those of the ZNNi paper, on the smallest
volume that gives a few outputs, computed by the primitives chosen for large volumes. The result is
kept under `benchmarks/results/` with the machine's fingerprint; of networks that are not asked for
that of an earlier run stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch

from layer import empty, formed
from machine import keep, kept
from znni_dask.choices import Menu, choose_primitives, tiled
from znni_dask.costs import Costs
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, triple
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network import layers
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.field_of_view import geometry
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Network, Weights
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.primitives.base import Array, Form, Primitive, Problem
from znni_dask.primitives.table import candidates
from znni_dask.schedule import Schedules

KERNELS = range(1, 10)
FANS = ((1, 16), (80, 16))
MADE = 16  # voxels of output along each axis
GREY = 1000.0
PLANES = 8  # of the float64 reference at once: they stay in the caches
OUTPUTS = 3  # of a network along each axis
PATCHES = 1000  # for which primitives of a network are chosen


def exact(layer: Layer, weights: Weights, x: np.ndarray) -> np.ndarray:
    """A convolution with ReLU, or a pooling, of (channel, z, y, x), tap by tap in float64."""
    z, y, x_ = (layer.window(axis).size(x.shape[1 + axis]) for axis in range(3))
    out = np.empty((layer.channels([len(x)]), z, y, x_))
    pools = isinstance(layer, layers.MaxPool)
    for first in range(0, z, PLANES):
        last = min(first + PLANES, z)
        total: Any = -np.inf if pools else np.asarray(weights["bias"], float)[:, None]
        for taps in product(*(range(k) for k in layer.kernel)):  # type: ignore[attr-defined]
            starts = (taps[0] + first * layer.window(0).stride, *taps[1:])
            there = tuple(
                slice(a, a + n * layer.window(axis).stride, layer.window(axis).stride)
                for axis, (a, n) in enumerate(zip(starts, (last - first, y, x_), strict=True))
            )
            part = x[(slice(None), *there)]
            part = part.reshape(len(x), -1)[:, : (last - first) * y * x_]
            if pools:
                total = np.maximum(total, part)
            else:
                total = total + weights["weight"][(..., *taps)].astype(float) @ part
        out[:, first:last] = total.reshape(-1, last - first, y, x_)
    return np.maximum(out, 0) if getattr(layer, "relu", False) else out


def inputs(channels: int, edge: int) -> Iterator[tuple[str, Array, bool]]:
    """Every kind of input: what it is called, its values, whether kernels sum to zero."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((channels, edge, edge, edge), np.float32)
    yield "mean 0", noise, False
    for deviation, zero_sum in product((50, 1), (False, True)):
        kernels = "kernels of sum 0" if zero_sum else "random kernels"
        x = (GREY + deviation * noise).astype(np.float32)
        yield f"mean {GREY:g}, sd {deviation}, {kernels}", x, zero_sum


def weights_of(conv: Conv, zero_sum: bool) -> dict[str, Array]:
    """Random ones, that leave values about as large as they are."""
    random = np.random.default_rng(1)
    shapes = conv.weight_shapes()
    weight = random.standard_normal(shapes["weight"])
    if zero_sum:
        weight -= weight.mean(axis=(2, 3, 4), keepdims=True)
    weight /= prod(weight.shape[1:]) ** 0.5
    return {"weight": weight.astype(np.float32), "bias": np.zeros(shapes["bias"], np.float32)}


def computing(problem: Problem) -> list[Primitive]:
    """All primitives of a convolution; of tiles that which is fastest and the largest."""
    sizes = list(tiled(problem))
    if not sizes:
        return candidates(problem.layer)
    best = min(sizes, key=lambda p: Costs().step_seconds(p, problem, 1))
    largest = max(sizes, key=lambda p: prod(p.tile))
    return [*candidates(problem.layer), *dict.fromkeys((best, largest))]


def computed(
    primitive: Primitive, problem: Problem, weights: Weights, x: Array, team: Team
) -> Array:
    """The answer of a primitive, (channel, z, y, x)."""
    takes, makes = primitive.forms(problem.layer, [problem.inputs[0][1]])
    takes = takes or Form.PLAIN
    given, out = formed(x[None], takes, team), empty((makes or takes).stored(problem.output))
    primitive.apply(primitive.prepare(problem.layer, weights), problem, [given], out, team)
    if out.ndim == 5:
        return out[0]
    return np.moveaxis(out[0], -1, 1).reshape(-1, *problem.output[2:])[: problem.output[1]]


def errors_of_primitives(team: Team) -> Iterator[dict[str, Any]]:
    """A row for every primitive, kernel size, number of channels and input."""
    for (fan_in, fan_out), kernel in product(FANS, KERNELS):
        conv, edge = Conv(fan_in, fan_out, (kernel,) * 3), MADE + kernel - 1
        shape, made = (1, fan_in, edge, edge, edge), (1, fan_out, MADE, MADE, MADE)
        problem = Problem(conv, (shape,), made, ((0, 0, 0),), (0, 0, 0), (edge, edge, edge))
        for kind, x, zero_sum in inputs(fan_in, edge):
            if zero_sum and kernel == 1:
                continue  # there is none but 0
            weights = weights_of(conv, zero_sum)
            want = exact(conv, weights, x.astype(float))
            scale = np.linalg.norm(want if kind == "mean 0" else spread(want))
            values, kernels = torch.from_numpy(x)[None], torch.from_numpy(weights["weight"])
            answers = {"torch": torch.nn.functional.conv3d(values, kernels)[0].numpy()}
            for primitive in computing(problem):
                answers[primitive.name] = computed(primitive, problem, weights, x, team)
            for name, answer in answers.items():
                yield {
                    "primitive": name,
                    "channels": [fan_in, fan_out],
                    "kernel": kernel,
                    "input": kind,
                    "error": float(np.linalg.norm(answer - want) / scale),
                }


def spread(want: np.ndarray) -> np.ndarray:
    """Values less the mean of their channel."""
    return want - want.mean(axis=(1, 2, 3), keepdims=True)


def errors_of_networks(names: list[str], team: Team) -> Iterator[dict[str, Any]]:
    """A row for every network: relative L2 error of what enters its last ReLU."""
    for name in names:
        network = without_last_relu(PAPER_NETWORKS[name]())
        stride = prod(node.layer.window(0).stride for node in network)
        edge = geometry(network).field_of_view[0] + OUTPUTS * stride - 1  # whole fragments
        x = np.random.default_rng(2).standard_normal((1, edge, edge, edge), np.float32)
        want = x.astype(float)
        for node in network:
            if node.inputs:
                want = exact(node.layer, network.weights.get(node.name, {}), want)
        answer, chosen = applied(network, x, team.threads)
        answer = answer[:, ::stride, ::stride, ::stride]
        yield {
            "network": name,
            "input": edge,
            "primitives": chosen,
            "error": float(np.linalg.norm(answer - want) / np.linalg.norm(want)),
        }


def without_last_relu(network: Network) -> Network:
    """A network before its last ReLU, where half of the values would become zero."""
    folded = simplify(network)
    *nodes, last = folded
    linear = replace(last, layer=replace(last.layer, relu=False))  # type: ignore[call-arg]
    return Network((*nodes, linear), folded.outputs, folded.weights)


def applied(network: Network, x: Array, threads: int) -> tuple[Array, dict[str, str]]:
    """A network on all of a volume as one patch, and the primitives that computed it."""
    layout = Layout(network, triple(x.shape[1:]), "valid")
    patch = Box((0, 0, 0), layout.output_size)
    plain = Schedules(layout, choose_primitives(layout))
    primitives = Menu.of_patches(plain, patch, PATCHES, threads).fastest()
    schedules = Schedules(layout, primitives)
    out = np.empty((network.out_channels, *layout.output_size), np.float32)
    with SerialExecutor(schedules, schedules.sizes(patch), threads) as executor:
        executor.run(schedules.schedule(patch), [x], [out])
    return out, {name: primitive.name for name, primitive in primitives.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=PAPER_NETWORKS, default=PAPER_NETWORKS)
    options = parser.parse_args()
    earlier = kept("accuracy").get("networks", [])
    others = [row for row in earlier if row["network"] not in options.networks]
    found: dict[str, list[dict[str, Any]]] = {"primitives": [], "networks": others}
    with Team(cores()) as team:
        for row in errors_of_primitives(team):
            found["primitives"].append(row)
            fans = " → ".join(map(str, row["channels"]))
            print(
                f"{fans}, {row['kernel']}³  {row['input']:36} {row['primitive']:24} "
                f"{row['error']:.1e}",
                flush=True,
            )
        for row in errors_of_networks(list(options.networks), team):
            found["networks"].append(row)
            print(f"{row['network']}  {row['error']:.1e}", flush=True)
    print(f"kept in {keep('accuracy', found)}")


if __name__ == "__main__":
    main()
