"""Host and GPU together, on the simulated device: what overlaps, and what is predicted.

    OPENBLAS_NUM_THREADS=1 python benchmarks/together.py [--only pipeline|sublayers|runs]

The simulated device computes with numpy and PyTorch on one core, as many times slower as it is
told, and copies as slowly as it is told; the host computes with the other core. *Pipeline*: patches
whose first layers the host computes and whose rest the device does, beside the longer of the two
and the time until the first patch arrives. *Sublayers*: a convolution in pieces, beside what takes
longest of copying there, computing, and copying back. *Runs*: a chain like n537 but of few
channels, and a U-Net, from a Zarr store to another by whom one asks for, planned by what was just
measured, beside the prediction. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import dask
import numpy as np
import torch

from machine import keep, kept
from planning import noise, unet
from znni_dask import Builder, run, timings
from znni_dask.calibration import calibrate
from znni_dask.choices import choose_primitives
from znni_dask.devices.base import Lane, Lanes, Mark
from znni_dask.devices.ferry import Ferry
from znni_dask.devices.simulated import Pace, SimulatedDevice
from znni_dask.errors import MemoryLimitError
from znni_dask.executors.split import SplitExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU
from znni_dask.network.chains import Row, chain
from znni_dask.network.layers import Conv
from znni_dask.network.network import Network
from znni_dask.patches import Layout
from znni_dask.primitives.base import Problem
from znni_dask.primitives.gpu.conv_cudnn import GpuConvCudnn
from znni_dask.primitives.offloaded import Offloaded, SubLayer, offloading
from znni_dask.split import Split, splits

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
    """For devices of several speeds: the time of patches over that of the longer stage."""
    b = Builder(1)
    x = b.max_pool(b.relu(b.conv(b.input, 24, 5)), 2)
    x = b.relu(b.conv(x, 32, 5))
    network = b.network(b.conv(b.relu(b.conv(x, 32, 3)), 3, 1))
    layout = Layout(network, (512, 64, 64), "reflect")
    layer = splits(network)[2]
    here, there = choose_primitives(layout), choose_primitives(layout, device=GPU)
    before = list(here)[: list(here).index(layer) + 1]
    split = Split.at(layout, layer, there | {name: here[name] for name in before}, 2)
    boxes = [Box((32 * i, 16, 16), (32 * i + 32, 48, 48)) for i in range(1, 1 + PATCHES)]
    rows = []
    for slowdown in (2.0, 4.0, 8.0):
        with WatchedDevice(GIB, Pace(slowdown=slowdown)) as device:
            sizes = split.sizes(boxes[0])
            with SplitExecutor(split, sizes, boxes[0].size, 1, device) as executor:
                rows.append({"slowdown": slowdown, **_pipelined(split, executor, boxes)})
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
    "batch": SubLayer(1, 32, 32, (40, 40, 40)),
    "outputs": SubLayer(8, 8, 32, (40, 40, 40)),
    "inputs": SubLayer(1, 32, 8, (40, 40, 40)),
    "space": SubLayer(1, 32, 32, (20, 40, 40)),
}


def sublayers() -> list[dict[str, Any]]:
    """A convolution cut in several ways, where the bus is slow and where computing is."""
    problem = Problem(
        CONV, ((8, 32, 44, 44, 44),), (8, 32, 40, 40, 40), ((0, 0, 0),), (0, 0, 0), (44, 44, 44)
    )
    random = np.random.default_rng(0)
    given = random.standard_normal(problem.inputs[0], np.float32)
    weights = {
        key: random.standard_normal(shape, np.float32)
        for key, shape in CONV.weight_shapes().items()
    }
    out = np.empty(problem.output, np.float32)
    rows = []
    for rate in (2e8, 1e9, 1e10):
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


# ---- runs


def like_n537() -> Network:
    """Its kernels and its pooling, of 8 channels."""
    rows = [Row("CONV", (4,) * 3, 8)]
    for _ in range(3):
        rows += [Row("POOL", (2,) * 3, 0), Row("CONV", (5,) * 3, 8)]
    return chain(1, [*rows, Row("CONV", (5,) * 3, 3)])


CASES: dict[str, tuple[Callable[[], Network], int, tuple[str, ...]]] = {
    "like n537": (like_n537, 128, ("1GiB", "100MiB")),
    "U-Net 3, 16": (partial(unet, 3, 16), 256, ("1GiB", "100MiB")),
}
PACE = {"copied_bytes_per_second": 2e9, "slowdown": 1.0}
DEVICES = ("cpu", "gpu", "cpu+gpu", "gpu+ram", "auto")


def runs() -> list[dict[str, Any]]:
    """By whom one asks for, within memory of the device, large and small."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZNNI_TIMINGS"] = f"{folder}/timings.json"
        with dask.config.set({"znni.simulated-gpu": {"memory": "2GiB", **PACE}}):
            found = calibrate(1).joined(calibrate(1, device_bytes=2 * GIB).found)
        timings.keep_timings(found)
        for name, (network, edge, memories) in CASES.items():
            for memory in memories:
                for device in DEVICES:
                    row = {"network": name, "memory": memory, "device": device}
                    rows.append(row | _run(network(), edge, memory, device, Path(folder)))
                    print(rows[-1], flush=True)
    return rows


def _run(network: Network, edge: int, memory: str, device: str, folder: Path) -> dict[str, Any]:
    with dask.config.set({"znni.simulated-gpu": {"memory": memory, **PACE}}):
        try:
            made = run(
                *(network, noise(str(folder), edge), folder / "out.zarr"),
                device=device,
                threads=1,
                memory="4GiB",
                overwrite=True,
                pyramid=False,
            )
        except MemoryLimitError as error:
            return {"refused": str(error)}
    plan = made.plan
    return {
        "by": plan.device + (" apart" if plan.apart else ""),
        "patch": plan.patch,
        "seconds": made.seconds,
        "voxels_per_second": made.voxels_per_second,
        "of_predicted": made.voxels_per_second / plan.voxels_per_second,
        "device_bytes": plan.device_bytes,
    }


GROUPS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "pipeline": pipeline,
    "sublayers": sublayers,
    "runs": runs,
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
