"""What plans promise beside what runs take: throughput and memory, of many networks and limits.

    python benchmarks/planning.py [--only NAME] [--limit 2GiB] [--seconds 10]

First this machine is measured as `znni measure` does. Then every network is applied within every
limit to a volume of noise, chosen so that computing is predicted to take some seconds, by
`znni_dask.run` in a process of its own, whose plan is the one that was searched. Runs count only
between two probes of the machine's rate that agree within 10 %, and predictions are scaled by the
probe at the time of measuring. What is refused is kept with the reason. The result is kept under
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr

from machine import copy, flops_per_second, keep, kept
from rounds import AGREE
from znni_dask import run, timings
from znni_dask.asking import Options
from znni_dask.calibration import calibrate
from znni_dask.forecast import forecasts
from znni_dask.geometry import text
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network.build import Builder
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.network import Network
from znni_dask.plan import Plan

LIMITS = ("512MiB", "1GiB", "2GiB", "4GiB", "8GiB", "16GiB")
TRIES = 3  # of a run between probes that do not agree
PROBES = 15  # of which the median counts, after as many
COPIED_BYTES = 64 << 20  # beyond caches
FIRST, LEAST, MOST, STEP = 256, 128, 640, 64  # edges of a volume
CHUNKS = (64, 64, 64)
LONGEST = 6  # times the seconds that were asked for: what takes longer is not run


def unet(levels: int, base: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> Network:
    """Two convolutions with batch normalisation and ReLU at each resolution, padded; transposed
    convolutions up."""
    b = Builder(1)
    pool = tuple(2 if k > 1 else 1 for k in kernel)

    def two(x: str, width: int) -> str:
        for _ in range(2):
            x = b.relu(b.batch_norm(b.conv(x, width, kernel, padding="same")))
        return x

    x, skips = b.input, []
    for level in range(levels):
        x = two(x, base << level)
        skips.append(x)
        x = b.max_pool(x, pool)
    x = two(x, base << levels)
    for level in reversed(range(levels)):
        x = b.conv_transpose(x, base << level, pool, stride=pool)
        x = two(b.concat(skips[level], x), base << level)
    return b.network(b.activation(b.conv(x, 2, 1), "sigmoid"))


def residual(width: int, blocks: int, stride: int) -> Network:
    """Residual blocks at one resolution, resized to the volume's."""
    b = Builder(1)
    x = b.relu(b.conv(b.input, width, 5, stride=stride, padding=2))
    for _ in range(blocks):
        y = b.relu(b.batch_norm(b.conv(x, width, 3, padding="same")))
        x = b.relu(b.plus(x, b.batch_norm(b.conv(y, width, 3, padding="same"))))
    x = b.resize(x, stride) if stride > 1 else x
    return b.network(b.activation(b.conv(x, 1, 1), "sigmoid"))


def sliding(width: int, kernel: tuple[int, int, int]) -> Network:
    """A sliding window with two poolings."""
    b = Builder(1)
    pool = tuple(2 if k > 1 else 1 for k in kernel)
    x = b.max_pool(b.relu(b.conv(b.input, width, kernel)), pool)
    x = b.max_pool(b.relu(b.conv(x, width, kernel)), pool)
    x = b.relu(b.conv(x, width, kernel))
    return b.network(b.conv(x, 2, kernel))


def windowed(width: int) -> Network:
    """One that reduces over space, for windows."""
    b = Builder(1)
    x = b.relu(b.conv(b.input, width, 3, padding="same"))
    y = b.relu(b.conv(b.max_pool(x, 2), 2 * width, 3, padding="same"))
    y = b.normalize(y, groups=4)
    x = b.concat(x, b.conv_transpose(y, width, 2, stride=2))
    return b.network(b.conv(b.relu(b.conv(x, width, 3, padding="same")), 2, 1))


WINDOWS = {"windows 16": (64, 64, 64), "windows 32": (32, 64, 64)}  # their sizes
NETWORKS: dict[str, Callable[[], Network]] = {
    **PAPER_NETWORKS,
    **{
        f"U-Net {levels}, {base}": partial(unet, levels, base)
        for levels, base in ((2, 8), (2, 16), (2, 32), (3, 8), (3, 16), (3, 32), (4, 8), (4, 16))
    },
    "U-Net 2, 16, 2D": partial(unet, 2, 16, (1, 3, 3)),
    "residual 16": partial(residual, 16, 4, 1),
    "residual 32, stride 2": partial(residual, 32, 6, 2),
    "residual 64, stride 2": partial(residual, 64, 4, 2),
    "sliding 24, anisotropic": partial(sliding, 24, (2, 5, 5)),
    "sliding 32, 2D": partial(sliding, 32, (1, 4, 4)),
    "windows 16": partial(windowed, 16),
    "windows 32": partial(windowed, 32),
}


def one(name: str, limit: str, threads: int, seconds: float, folder: str) -> dict[str, Any]:
    """A network within a limit: planned, and run as planned."""
    network = Path(folder) / "network.onnx"
    options: Options = {"memory": limit, "threads": threads, "dtype": "uint8"}
    if name in WINDOWS:
        options["patchwise"] = WINDOWS[name]
    edge = FIRST
    found = forecasts(network, noise(folder, edge), **options)[0]
    wanted = edge * (seconds / found.seconds) ** (1 / 3)
    edge = max(LEAST, min(MOST, round(wanted / STEP) * STEP))
    found = forecasts(network, noise(folder, edge), **options)[0]
    told: dict[str, Any] = {
        "edge": edge,
        "patch": found.plan.patch,
        "block": found.plan.block,
        "blocks": found.blocks,
        "allowed_bytes": found.plan.allowed_bytes,
        "predicted_bytes": found.plan.predicted_bytes,
        "predicted_seconds": found.seconds,
        "predicted_voxels_per_second": found.plan.voxels_per_second,
        "predicted_layer_seconds": {
            choice.layer: choice.voxel_seconds * found.voxels
            for stage in found.plan.stages
            for choice in stage.choices
        },
    }
    if found.seconds > LONGEST * seconds:
        return told
    del options["threads"]  # the plan says how many
    files = str(network), noise(folder, edge), f"{folder}/out.zarr"
    with ProcessPoolExecutor(1, get_context("spawn")) as another:  # which searched nothing
        return told | another.submit(made, files, found.plan, options).result()


def made(files: tuple[str, str, str], plan: Plan, options: Options) -> dict[str, Any]:
    """What comes of a plan."""
    summary = run(*files, overwrite=True, plan=[plan], **options)
    return {
        "seconds": summary.seconds,
        "voxels_per_second": summary.voxels_per_second,
        "peak_bytes": summary.peak_bytes,
        "layer_seconds": dict(summary.passes[0].layer_seconds),
    }


def noise(folder: str, edge: int, length: int = 0) -> str:
    """A volume, along z as long as wide or so long, made where it is not there yet."""
    shape = (length or edge, edge, edge)
    place = Path(folder) / f"volume-{text(shape)}.zarr"
    if not place.exists():
        values = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        zarr.create_array(place, shape=shape, chunks=CHUNKS, dtype="uint8")[...] = values
    return str(place)


class Probe:
    """How fast the machine is just now."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self._copied, _ = copy(team, COPIED_BYTES)

    @property
    def rate(self) -> float:
        """The geometric mean of operations and of copies in a second, as layers wait for either,
        of threads that are awake and on cores of their own."""
        flops, copies = ([one() for _ in range(2 * PROBES)] for one in (self._flops, self._copies))
        return sqrt(median(flops[PROBES:]) * median(copies[PROBES:]))

    def _flops(self) -> float:
        return flops_per_second(self.team)

    def _copies(self) -> float:
        begin = time.perf_counter()
        self._copied()
        return 1 / (time.perf_counter() - begin)


def calibrated(probe: Probe, also: Sequence[int] = ()) -> float:
    """Measure the machine, for plans to be made by, with other numbers of threads ``also``; the
    rate that it gives meanwhile."""
    before = probe.rate
    found = calibrate(probe.team.threads)
    for threads in also:
        found = found.joined(calibrate(threads).found)
    timings.keep_timings(found)
    return (before + probe.rate) / 2


def steady(
    command: list[str], probe: Probe, reference: float, tries: int = TRIES
) -> dict[str, Any]:
    """What a command tells that runs between probes that agree, and the machine's rate then."""
    for _ in range(tries):
        before = probe.rate
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = probe.rate
        if done.returncode:
            return {"refused": done.stderr.strip().splitlines()[-1]}
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        told["rate"] = (before + after) / 2 / reference
        if "seconds" not in told or abs(after / before - 1) <= AGREE:
            return told
    return told | {"unsteady": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*NETWORKS], action="append")
    parser.add_argument("--limit", choices=LIMITS, action="append")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, limit, threads, seconds, folder = given.one
        print(json.dumps(one(name, limit, int(threads), float(seconds), folder)))
        return
    kept_as = f"planning-{given.threads}-threads"
    rows = {(r["network"], r["limit"]): r for r in kept(kept_as).get("rows", ())}
    with tempfile.TemporaryDirectory() as place, Team(given.threads) as team:
        os.environ["ZNNI_TIMINGS"] = f"{place}/timings.json"
        probe = Probe(team)
        reference = calibrated(probe, also=[1] if given.threads > 1 else [])
        for name in given.only or NETWORKS:
            with tempfile.TemporaryDirectory() as folder:
                network = to_onnx(NETWORKS[name]()).SerializeToString()
                (Path(folder) / "network.onnx").write_bytes(network)
                for limit in given.limit or LIMITS:
                    asked = (name, limit, str(given.threads), str(given.seconds), folder)
                    command = [sys.executable, __file__, "--one", *asked]
                    row = {"network": name, "limit": limit, **steady(command, probe, reference)}
                    rows[name, limit] = row
                    print(line(row), flush=True)
                    keep(kept_as, {"rows": list(rows.values())})


def line(row: dict[str, Any]) -> str:
    """A run as it is told."""
    head = f"{row['network']:26} {row['limit']:>7}"
    if "refused" in row:
        return f"{head} refused: {row['refused'][:150]}"
    size = "·".join(map(str, row["patch"]))
    if "seconds" not in row:
        return f"{head} {size:12} {row['predicted_voxels_per_second']:12,.0f} voxels/s predicted"
    speed = row["voxels_per_second"] / row["predicted_voxels_per_second"] / row["rate"]
    memory = row["peak_bytes"] / row["predicted_bytes"]
    layers = sum(row["layer_seconds"].values()) / sum(row["predicted_layer_seconds"].values())
    return (
        f"{head} {size:12} {row['voxels_per_second']:12,.0f} voxels/s, {speed:.2f} of predicted; "
        f"layers took {layers * row['rate']:.2f}, memory {memory:.2f} times as predicted; "
        f"{row['seconds']:.1f} s for {row['edge']}³{', unsteady' if 'unsteady' in row else ''}"
    )


if __name__ == "__main__":
    main()
