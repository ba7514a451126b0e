"""Memory over a long run: 100 GB of voxels through a small network by two workers.

    python benchmarks/steady.py [--gigabytes 100] [--memory 4GB] [--workers 2]

The volume is one of which nothing is stored: its chunks are made when they are read. The anonymous
memory of every process is sampled from outside: of the workers, which share what is allowed with
the process of client and scheduler, and of this. What counts is what the later tenths of the run
hold beyond its second: the first is warming up. The result is kept under `benchmarks/results/`, a
picture under `docs/images/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from machine import keep
from memory import ROOT, thinned
from znni_dask.importers.to_onnx import save
from znni_dask.machine import anonymous_bytes, parse_bytes
from znni_dask.network.build import Builder

SECONDS = 1.0  # between two samples
CHUNK = 128
RUN = """
import json, sys, znni_dask
if __name__ == "__main__":
    network, volume, output, memory, workers = sys.argv[1:]
    made = znni_dask.run(
        network, volume, output, memory=int(memory), workers=int(workers), dtype="uint8",
        pyramid=False,
    )
    print(json.dumps({
        "predicted_bytes": made.plan.predicted_bytes,
        "allowed_bytes": made.plan.allowed_bytes,
        "patch": made.plan.patch,
        "block": made.plan.block,
        "blocks": made.blocks,
        "blocks_in_flight": made.plan.blocks_in_flight,
        "seconds": made.seconds,
    }))
"""


def watched(command: list[str], workers: int) -> tuple[list[tuple[float, ...]], dict[str, Any]]:
    """Run a command to its end: moments, what it holds without its workers and what each of these
    holds, and what it says at last."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    begin, samples = time.perf_counter(), []
    while process.poll() is None:
        try:
            children = psutil.Process(process.pid).children()
            held = {child.pid: anonymous_bytes(child.pid) for child in children}
            alone = anonymous_bytes(process.pid) - sum(held.values())
        except psutil.NoSuchProcess:
            continue
        largest = sorted(held, key=lambda pid: -held[pid])[:workers]
        if len(largest) == workers:
            each = (float(held[pid]) for pid in sorted(largest))
            samples.append((time.perf_counter() - begin, float(alone), *each))
        time.sleep(SECONDS)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    return samples, json.loads(said.splitlines()[-1])


def measured(gigabytes: float, memory: str, workers: int) -> dict[str, Any]:
    """The run, and what its processes held."""
    b = Builder(1)
    network = b.network(b.conv(b.input, 1, 3))
    edge = round((gigabytes * 1e9) ** (1 / 3) / CHUNK) * CHUNK
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}" for name in ("network.onnx", "volume.zarr", "out.zarr")]
        save(network, Path(files[0]))
        zarr.create_array(
            files[1], shape=(edge,) * 3, chunks=(CHUNK,) * 3, dtype="u1", fill_value=7
        )
        script = Path(folder) / "long.py"
        script.write_text(RUN)
        asked = [str(parse_bytes(memory)), str(workers)]
        samples, said = watched([sys.executable, str(script), *files, *asked], workers)
    seconds, *held = np.array(samples).T
    return {
        "voxels": edge**3,
        "workers": workers,
        **said,
        "voxels_per_second": edge**3 / said["seconds"],
        "peak_bytes": [int(one.max()) for one in held],
        "peak_bytes_of_tenths": [
            [int(part.max()) for part in np.array_split(one, 10)] for one in held
        ],
        "samples": [[[round(s), int(u)] for s, u in thinned(seconds, one)] for one in held],
    }


def draw(told: dict[str, Any], path: Path) -> None:
    """What every process held over time, beside what a worker is allowed."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for number, samples in enumerate(told["samples"]):
        seconds, used = np.array(samples).T
        label = f"worker {number}" if number else "client and scheduler"
        axes.plot(seconds / 60, used / 1e9, label=label)
    axes.axhline(told["allowed_bytes"] / 1e9, color="red", label="allowed a worker")
    axes.axhline(
        told["predicted_bytes"] / 1e9, color="black", linestyle="--", label="predicted of a worker"
    )
    axes.set(xlabel="minutes", ylabel="anonymous memory, GB", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="center", ncols=2)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=100)
    parser.add_argument("--memory", default="4GB", help="of all")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    told = measured(given.gigabytes, given.memory, given.workers)
    for name, tenths in zip(
        ("client", "worker 1", "worker 2"), told["peak_bytes_of_tenths"], strict=False
    ):
        print(f"{name:9}", *(f"{nbytes / 1e6:6.0f}" for nbytes in tenths), "MB")
    draw(told, ROOT / "docs" / "images" / "steady.svg")
    print(f"kept in {keep('steady', told)}")


if __name__ == "__main__":
    main()
