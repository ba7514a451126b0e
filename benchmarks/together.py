"""Host and GPU together, on the simulated device: what is done at the same time.

    OPENBLAS_NUM_THREADS=1 python benchmarks/together.py [--only pipeline|sublayers]

The simulated device computes with numpy and PyTorch on one core, as many times slower as it is
told, and copies as slowly as it is told; the host computes with the other core. *Pipeline*: patches
whose first layers the host computes and whose rest the device does, beside the longer of the two
and the time until the first patch arrives. *Sublayers*: a convolution in pieces, beside what takes
longest of copying there, computing, and copying back. The result is kept under
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch

from machine import keep, kept
from znni_dask import Builder
from znni_dask.choices import choose_primitives
from znni_dask.devices.base import Lane, Lanes, Mark
from znni_dask.devices.ferry import Ferry
from znni_dask.devices.simulated import Pace, SimulatedDevice
from znni_dask.executors.split import SplitExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU
from znni_dask.network.layers import Conv
from znni_dask.patches import Layout
from znni_dask.primitives.base import Problem
from znni_dask.primitives.gpu.conv_cudnn import GpuConvCudnn
from znni_dask.primitives.offloaded import Offloaded, SubLayer, offloading
from znni_dask.split import Split, joined_at, splits

KEPT_AS = "together"
ROUNDS = 5
PATCHES = 10
GIB = 1 << 30


class _Watched(Lane):
    """A lane that tells how long it was at work, as slow as it is."""

    def __init__(self, lane: Lane, slowdown: float = 1.0) -> None:
        self._lane, self._slowdown = lane, slowdown
        self.seconds = 0.0

    def do(self, work: Callable[[], object], after: Sequence[Any] = ()) -> Mark:
        def timed() -> None:
            begin = time.perf_counter()
            work()
            self.seconds += self._slowdown * (time.perf_counter() - begin)

        return self._lane.do(timed, after)

    def mark(self) -> Mark:
        return self._lane.mark()


class WatchedDevice(SimulatedDevice):
    """A simulated device that tells how long every lane was at work."""

    def __init__(self, allowed_bytes: int, pace: Pace) -> None:
        super().__init__(allowed_bytes, pace)
        up, compute, down = self.lanes
        self._watched = _Watched(up), _Watched(compute, pace.slowdown), _Watched(down)
        self.lanes = Lanes(*self._watched)

    def taken(self) -> list[float]:
        """Seconds of every lane since this was last asked."""
        found = [lane.seconds for lane in self._watched]
        for lane in self._watched:
            lane.seconds = 0.0
        return found


# ---- the pipeline of two stages


def pipeline() -> list[dict[str, Any]]:
    """Split early and late, for devices of several speeds: the time of patches over that of the
    longer stage."""
    b = Builder(1)
    x = b.max_pool(b.relu(b.conv(b.input, 24, 5)), 2)
    x = b.relu(b.conv(x, 32, 5))
    network = b.network(b.conv(b.relu(b.conv(x, 32, 3)), 3, 1))
    layout = Layout(network, (512, 64, 64), "reflect")
    here, there = choose_primitives(layout), choose_primitives(layout, device=GPU)
    boxes = [Box((32 * i, 16, 16), (32 * i + 32, 48, 48)) for i in range(1, 1 + PATCHES)]
    rows = []
    for layer, slowdown in product(splits(network)[2:5:2], (1.0, 2.0, 4.0)):
        split = Split.at(layout, layer, joined_at(layer, here, there), 2)
        with WatchedDevice(GIB, Pace(slowdown=slowdown)) as device:
            sizes = split.sizes(boxes[0])
            with SplitExecutor(split, sizes, boxes[0].size, 1, device) as executor:
                found = _pipelined(split, executor, boxes)
        rows.append({"behind": layer, "slowdown": slowdown, **found})
    return rows


def _pipelined(split: Split, executor: SplitExecutor, boxes: list[Box]) -> dict[str, Any]:
    def made(box: Box) -> None:
        todo = split.schedule(box)
        volume = np.zeros((1, *todo.input.size), np.float32)
        executor.run(todo, [volume], [np.empty((3, *box.size), np.float32)])

    def stages() -> tuple[float, float]:
        """Of one patch by itself: the host, and what comes then."""
        executor.taken()
        begin = time.perf_counter()
        made(boxes[0])
        whole = time.perf_counter() - begin
        spent = executor.taken().seconds
        host = sum(s for array, s in spent.items() if array.name in split.head.primitives)
        return host, whole - host

    made(boxes[0])
    found = []
    for _ in range(ROUNDS):
        host, rest = map(median, zip(*(stages() for _ in range(3)), strict=True))
        begin = time.perf_counter()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(made, boxes))
        whole = time.perf_counter() - begin
        found.append((host, rest, whole / (len(boxes) * max(host, rest) + min(host, rest))))
    host, rest, ratio = map(median, zip(*found, strict=True))
    return {"host_seconds": host, "device_seconds": rest, "ratio": ratio}


# ---- sub-layers

CONV = Conv(32, 32, (5, 5, 5))
SUBS = {
    "batch": SubLayer(1, 32, 32, (28, 28, 28)),
    "outputs": SubLayer(1, 8, 32, (28, 28, 28)),
    "inputs": SubLayer(1, 32, 8, (28, 28, 28)),
    "space": SubLayer(1, 32, 32, (14, 28, 28)),
}


def sublayers() -> list[dict[str, Any]]:
    """A convolution cut in several ways, where the bus is slow and where computing is."""
    problem = Problem(
        CONV, ((16, 32, 32, 32, 32),), (16, 32, 28, 28, 28), ((0, 0, 0),), (0, 0, 0), (32, 32, 32)
    )
    random = np.random.default_rng(0)
    given = random.standard_normal(problem.inputs[0], np.float32)
    weights = {
        key: random.standard_normal(shape, np.float32)
        for key, shape in CONV.weight_shapes().items()
    }
    out = np.empty(problem.output, np.float32)
    rows = []
    for rate in (5e7, 1e8, 1e10):
        for what, sub in SUBS.items():
            primitive = Offloaded(GpuConvCudnn(), sub)
            needs = offloading([(primitive, problem)])
            assert needs is not None
            with WatchedDevice(4 * GIB, Pace(rate)) as device, Team(1) as team:
                device.scratch(needs.scratch)
                ferry = Ferry(device, team, needs.load)
                work = partial(primitive.apply, weights, problem, [given], out, ferry)
                rows.append({"cut": what, "bytes_per_second": rate, **_streamed(work, device)})
    return rows


def _streamed(work: Callable[[], None], device: WatchedDevice) -> dict[str, Any]:
    work()
    device.taken()
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        whole = time.perf_counter() - begin
        lanes = device.taken()
        found.append((whole / max(lanes), *lanes))
    ratio, up, compute, down = (median(some) for some in zip(*found, strict=True))
    return {"up": up, "compute": compute, "down": down, "ratio": ratio}


GROUPS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "pipeline": pipeline,
    "sublayers": sublayers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=GROUPS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the device is one core
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        raise SystemExit("set OPENBLAS_NUM_THREADS=1: the device is to be one core")
    found = kept(KEPT_AS).get("groups", {})
    for group in options.only or GROUPS:
        found[group] = GROUPS[group]()
        for row in found[group]:
            print(row)
        print(f"kept in {keep(KEPT_AS, {'groups': found})}")


if __name__ == "__main__":
    main()
