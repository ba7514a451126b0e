"""Memory over a long run: 100 GB of voxels through a small network by two workers.

    python benchmarks/steady.py [--gigabytes 100] [--memory 4GiB] [--workers 2]

The volume is one of which nothing is stored: its chunks are made when they are read. The anonymous
memory of every process is sampled from outside: of the workers, which share what is allowed with
the process of client and scheduler, and of this. What counts is what the later tenths of the run
hold beyond its second: the first is warming up. The result is kept under `benchmarks/results/`, a
picture under `docs/images/`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from machine import keep
from memory import ROOT, draw, tenths, thinned, watched
from znni_dask.importers.to_onnx import save
from znni_dask.machine import anonymous_bytes
from znni_dask.network.build import Builder

SECONDS = 1.0  # between two samples
CHUNK = 128


def held(pid: int, workers: int) -> tuple[int, ...]:
    """By a process without its workers, and by each of these, once all are there."""
    try:
        children = psutil.Process(pid).children()
        each = {child.pid: anonymous_bytes(child.pid) for child in children}
        alone = anonymous_bytes(pid) - sum(each.values())
    except psutil.NoSuchProcess:
        return ()
    largest = sorted(each, key=lambda pid: -each[pid])[:workers]
    return (alone, *(each[pid] for pid in sorted(largest))) if len(largest) == workers else ()


def measured(gigabytes: float, memory: str, workers: int) -> dict[str, Any]:
    """The run, and what its processes held."""
    b = Builder(1)
    network = b.network(b.conv(b.input, 1, 3))
    edge = round((gigabytes * 1e9) ** (1 / 3) / CHUNK) * CHUNK
    options = {"memory": memory, "workers": workers, "dtype": "uint8", "pyramid": False}
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}" for name in ("network.onnx", "volume.zarr", "out.zarr")]
        save(network, Path(files[0]))
        zarr.create_array(
            files[1], shape=(edge,) * 3, chunks=(CHUNK,) * 3, dtype="u1", fill_value=7
        )
        samples, said = watched(files, options, lambda pid: held(pid, workers), SECONDS)
    seconds, *used = np.array(samples).T
    return {
        "voxels": edge**3,
        "workers": workers,
        **said,
        "voxels_per_second": edge**3 / said["seconds"],
        "peak_bytes_of_processes": [int(one.max()) for one in used],
        "peak_bytes_of_tenths": [tenths(one) for one in used],
        "samples": [[[round(s), int(u)] for s, u in thinned(seconds, one)] for one in used],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=100)
    parser.add_argument("--memory", default="4GiB", help="of all")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    told = measured(given.gigabytes, given.memory, given.workers)
    called = ["client and scheduler", *(f"worker {n + 1}" for n in range(given.workers))]
    for name, peaks in zip(called, told["peak_bytes_of_tenths"], strict=True):
        print(f"{name:20}", *(f"{nbytes / 2**20:6.0f}" for nbytes in peaks), "MiB")
    curves = dict(zip(called, told["samples"], strict=True))
    path = ROOT / "docs" / "images" / "steady.svg"
    draw(curves, told["allowed_bytes"], told["predicted_bytes"], path)
    print(f"kept in {keep('steady', told)}")


if __name__ == "__main__":
    main()
