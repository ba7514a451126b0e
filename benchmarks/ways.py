"""Every way to use a GPU, run, beside what its plan says: on a GPU that computes nothing.

    python benchmarks/ways.py [--only NAME] [--way WAY]

Kernels of this GPU are not run; each takes as long as the planner's estimate, times `SLOWDOWN`. So
the host's cores are free meanwhile, as they are beside a GPU, and the paper's networks can be run
anywhere. All around it is real: copies, no faster than the bus is told to be, lanes, both memories,
reading and writing, and what the host computes. What is computed so is nobody's answer; that
schedules make the right one is shown by the tests.

First the host and this GPU are measured as `znni measure` does. Then every network is applied by
each of `WAYS` to the same volume of noise, with a GPU of 12 GB and with one of an eighth of what
the GPU alone takes of that. Runs count only between two probes of the machine's rate that agree
within 10 %, and predictions are scaled by the probe at the time of measuring as far as the host is
what they wait for: both are kept. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import dask
import numpy as np
from numpy.typing import NDArray

from machine import keep, kept
from planning import Probe, calibrated, noise, steady, unet
from znni_dask import calibration, job, run, timings
from znni_dask.asking import Options
from znni_dask.calibration import calibrate
from znni_dask.devices.base import Device
from znni_dask.devices.simulated import Pace, SimulatedDevice
from znni_dask.forecast import forecasts
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU, cores, parse_bytes
from znni_dask.network.chains import n337, n537
from znni_dask.network.layers import Layer
from znni_dask.network.network import Network, Weights
from znni_dask.primitives.base import DevicePrimitive, Problem, weights_bytes
from znni_dask.primitives.gpu.conv_fft_tiles import GpuTiledFFT
from znni_dask.primitives.gpu.rates import MEMORY
from znni_dask.primitives.table import table

KEPT_AS = "ways"
SLOWDOWN = 32.0  # times slower than the GPU that estimates are for: one of 1 TFLOP/s,
BUS_BYTES = 6e9  # which are carried there, and back, in a second, as by half of a PCIe 3 bus
GPU_MEMORY = "12GB"  # as in the paper
LONGEST = 400.0  # seconds: what is predicted to take longer is not run
HOST_MEMORY = "8GiB"
WAYS = ("cpu", "gpu", "gpu+ram", "cpu+gpu", "auto")
SHARE = 8  # of what the GPU alone takes, one in so many
NETWORKS: dict[str, Callable[[], Network]] = {
    "n337": n337,
    "n537": n537,
    "U-Net 3, 16": partial(unet, 3, 16),
    "U-Net 2, 32": partial(unet, 2, 32),
}
EDGES = {"n337": 320, "n537": 256, "U-Net 3, 16": 384, "U-Net 2, 32": 320}


class IdleDevice(SimulatedDevice):
    """Computes nothing; `spend` lets time pass instead."""

    xp = SimpleNamespace(
        **{name: getattr(np, name) for name in ("asarray", "float32")},
        add=lambda *_, **__: None,
        maximum=lambda *_, **__: None,
    )

    def launch(self, kernel: Kernel, blocks: int, *arguments: Any) -> None:
        """As long as memory takes to be read and written, by kernels that only copy: of the arrays
        that they are told of the smaller one."""
        arrays = (a for a in arguments if isinstance(a, np.ndarray) and a.dtype == np.float32)
        self.spend(2 * min(array.nbytes for array in arrays) / MEMORY.per_second)

    @staticmethod
    def spend(seconds: float) -> None:
        """So many of the GPU that estimates are for."""
        time.sleep(SLOWDOWN * seconds)


def _placed(self: DevicePrimitive, layer: Layer, weights: Weights, device: Device) -> Any:
    """The weights, and room for what would be prepared of them."""
    held = [device.put(value) for value in weights.values()]
    more = self.prepared_bytes(layer) - weights_bytes(layer)
    IdleDevice.spend(self.prepared_bytes(layer) / MEMORY.per_second)
    return [*held, device.empty(max(0, more))]


def _apply(
    self: DevicePrimitive,
    prepared: Any,
    problem: Problem,
    inputs: Sequence[NDArray[Any]],
    out: NDArray[Any],
    team: Device,
) -> None:
    """Takes memory and time, and makes nothing."""
    team.scratch(self.workspace_bytes(problem, 1))
    IdleDevice.spend(self.work(problem, 1).seconds(1))


@contextmanager
def idle_gpu() -> Iterator[None]:
    """A GPU that computes nothing, its kernels compiled."""
    pace = Pace(copied_bytes_per_second=BUS_BYTES)
    told = {"memory": GPU_MEMORY, "copied_bytes_per_second": BUS_BYTES}

    def opened(allowed_bytes: int) -> Device:
        return IdleDevice(allowed_bytes, pace)

    kinds = {GpuTiledFFT, *(type(primitive) for primitive in table() if primitive.device == GPU)}
    with ExitStack() as changed:
        changed.enter_context(dask.config.set({"znni.simulated-gpu": told}))
        for module in (job, calibration):
            changed.enter_context(patch.object(module, "opened", opened))
        for kind in kinds:
            own = {"placed": _placed, "apply": _apply, "setup_seconds": 0.0}
            changed.enter_context(patch.multiple(kind, **own))
        yield


def one(name: str, way: str, gpu_memory: str, threads: int, folder: str) -> dict[str, Any]:
    """A network by one of the ways: planned, and run as planned."""
    network, volume = Path(folder) / "network.onnx", noise(folder, EDGES[name])
    options: Options = {"memory": HOST_MEMORY, "dtype": "uint8", "pyramid": False}
    if way != "cpu":
        options["device_memory"] = gpu_memory
    with idle_gpu():
        begin = time.perf_counter()
        found = forecasts(network, volume, device=way, threads=threads, **options)[0]
        planning = time.perf_counter() - begin
        plan = found.plan
        told: dict[str, Any] = {
            "planning_seconds": planning,
            "device": plan.device,
            "apart": plan.apart,
            "slabs": bool(plan.granules),
            "patch": plan.patch,
            "block": plan.block,
            "stages": [
                {choice.layer: choice.primitive for choice in stage.choices}
                for stage in plan.stages
            ],
            "samples": [stage.samples for stage in plan.stages],
            "device_bytes": plan.device_bytes,
            "predicted_bytes": plan.predicted_bytes,
            "predicted_seconds": found.seconds,
            "predicted_voxels_per_second": plan.voxels_per_second,
            "predicted_layer_seconds": {
                f"{stage.device} {choice.layer}": choice.voxel_seconds * found.voxels
                for stage in plan.stages
                for choice in stage.choices
            },
        }
        if way == "auto" or found.seconds > LONGEST:
            return told  # what "auto" chose is run as what it is
        made = run(network, volume, f"{folder}/out.zarr", overwrite=True, plan=[plan], **options)
    return told | {
        "seconds": made.seconds,
        "voxels_per_second": made.voxels_per_second,
        "layer_seconds": dict(made.passes[0].layer_seconds),
    }


def rows_of(
    name: str, gpu_memory: str, ways: Sequence[str], measure: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A network by every way, with a GPU of so much memory."""
    for way in ways:
        row = {"network": name, "way": way, "gpu_memory": gpu_memory, "edge": EDGES[name]}
        yield row | measure(name, way, gpu_memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*NETWORKS], action="append")
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    threads = cores()
    if given.one:
        name, way, gpu_memory, count, folder = given.one
        print(json.dumps(one(name, way, gpu_memory, int(count), folder)))
        return
    rows = {(r["network"], r["way"], r["share"]): r for r in kept(KEPT_AS).get("rows", ())}
    with tempfile.TemporaryDirectory() as place, Team(threads) as team:
        os.environ["ZNNI_TIMINGS"] = f"{place}/timings.json"
        probe = Probe(team)
        reference = calibrated(probe)
        with idle_gpu():
            of_gpu = calibrate(1, device_bytes=parse_bytes(GPU_MEMORY))
        timings.keep_timings(timings.kept().joined(of_gpu.found))
        for name in given.only or NETWORKS:
            with tempfile.TemporaryDirectory() as folder:
                network = to_onnx(NETWORKS[name]()).SerializeToString()
                (Path(folder) / "network.onnx").write_bytes(network)

                def measure(name: str, way: str, memory: str, folder: str = folder) -> Any:
                    asked = (name, way, memory, str(threads), folder)
                    return steady([sys.executable, __file__, "--one", *asked], probe, reference)

                for share in (1, SHARE):
                    memory = GPU_MEMORY
                    if share > 1:
                        memory = f"{rows[name, 'gpu', 1]['device_bytes'] // share}B"
                    for row in rows_of(name, memory, given.way or WAYS, measure):
                        rows[name, row["way"], share] = row | {"share": share}
                        print(line(row), flush=True)
                        keep(KEPT_AS, {"rows": list(rows.values())})


def line(row: dict[str, Any]) -> str:
    """A run as it is told."""
    head = f"{row['network']:12} {row['way']:8} {row['gpu_memory']:>12}"
    if "refused" in row:
        return f"{head} refused: {row['refused'][:150]}"
    how = "apart" if row["apart"] else "slabs" if row["slabs"] else "patches"
    told = f"{head} {row['device']} in {how}, {row['predicted_voxels_per_second']:10,.0f} predicted"
    if "seconds" not in row:
        return told
    ratio = row["voxels_per_second"] / row["predicted_voxels_per_second"]
    return f"{told}, {row['voxels_per_second']:10,.0f} made, {ratio:.2f}, rate {row['rate']:.2f}"


if __name__ == "__main__":
    main()
