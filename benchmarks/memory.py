"""Memory over a whole run of a large volume, from every way of storing it.

    python benchmarks/memory.py [--size 1024] [--memory 2GiB]

The sample network is applied to a volume of 1024³ voxels by `znni_dask.run` in a process of its
own, whose anonymous memory is sampled from outside. The answers to all kinds of input are compared,
voxel by voxel. The result is kept under `benchmarks/results/`, a picture of memory over time under
`docs/images/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from machine import keep
from reading import stored
from znni_dask.geometry import triple
from znni_dask.machine import anonymous_bytes, show_bytes

ROOT = Path(__file__).parents[1]
NETWORK = ROOT / "examples" / "networks" / "boundary_valid.onnx"
KINDS = ("zarr", "tiff", "hdf5")
SECONDS = 0.25  # between two samples
CHUNK = 128
RUN = """
import json, sys, znni_dask
*files, options = sys.argv[1:]
made = znni_dask.run(*files, **json.loads(options))
print(json.dumps({
    "peak_bytes": made.peak_bytes,
    "predicted_bytes": made.plan.predicted_bytes,
    "allowed_bytes": made.plan.allowed_bytes,
    "patch": made.plan.patch,
    "block": made.plan.block,
    "blocks": made.blocks,
    "blocks_in_flight": made.plan.blocks_in_flight,
    "seconds": made.seconds,
}))
"""


def watched(
    files: list[str],
    options: Mapping[str, Any],
    held: Callable[[int], tuple[int, ...]],
    seconds: float,
) -> tuple[list[tuple[float, ...]], dict[str, Any]]:
    """Run in a process of its own, from network, volume and output, with such options: moments, so
    many seconds apart, with what it held then, and what it says at last. What ``held`` tells of a
    process is left out while it is empty."""
    command = [sys.executable, "-c", RUN, *files, json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    begin, samples = time.perf_counter(), []
    while process.poll() is None:
        if now := held(process.pid):
            samples.append((time.perf_counter() - begin, *map(float, now)))
        time.sleep(seconds)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    return samples, json.loads(said.splitlines()[-1])


def tenths(used: np.ndarray) -> list[int]:
    """The most that was held in every tenth of a run."""
    return [int(part.max()) for part in np.array_split(used, 10)]


def measure(kind: str, folder: Path, size: int, memory: str) -> dict[str, Any]:
    """One row of the result."""
    volume = stored(kind, folder, triple([size] * 3), CHUNK)
    [path] = [p for p in folder.iterdir() if p.name.startswith(("volume", "zarr"))]
    where = f"{path}:/v" if kind == "hdf5" else str(path)
    files = [str(NETWORK), where, str(folder.parent / f"{kind}-answer.zarr")]
    options = {"memory": memory, "dtype": "uint8"}
    samples, said = watched(files, options, lambda pid: (anonymous_bytes(pid),), SECONDS)
    assert volume.size == (size,) * 3
    seconds, used = np.array(samples).T
    return {
        "kind": kind,
        **said,
        "peak_bytes_from_outside": int(used.max()),
        "peak_bytes_of_tenths": tenths(used),
        "samples": [[round(s, 1), int(u)] for s, u in thinned(seconds, used)],
    }


def thinned(seconds: np.ndarray, used: np.ndarray, count: int = 300) -> list[tuple[float, int]]:
    """At most so many samples: of each part the largest."""
    parts = np.array_split(np.arange(len(used)), min(count, len(used)))
    return [(float(seconds[i]), int(used[i])) for i in (p[used[p].argmax()] for p in parts)]


def same(first: Path, second: Path) -> bool:
    """Whether two answers hold the same values."""
    a, b = (zarr.open_array(str(path / "0"), mode="r") for path in (first, second))
    step = a.chunks[-3]
    return a.shape == b.shape and all(
        np.array_equal(a[..., z : z + step, :, :], b[..., z : z + step, :, :])
        for z in range(0, a.shape[-3], step)
    )


def draw(curves: Mapping[str, Any], allowed: int, predicted: int, path: Path) -> None:
    """Memory over time, each curve so called, beside what is allowed and what was predicted."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for called, samples in curves.items():
        seconds, used = np.array(samples).T
        axes.plot(seconds / 60, used / 2**30, label=called)
    axes.axhline(allowed / 2**30, color="red", label="allowed")
    axes.axhline(predicted / 2**30, color="black", linestyle="--", label="predicted")
    axes.set(xlabel="minutes", ylabel="anonymous memory, GiB", ylim=(0, None), xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--folder", type=Path, help="for volumes; by default a temporary one")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as answers:
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=answers) as folder:
                row = measure(kind, Path(folder), options.size, options.memory)
            row["same_as_the_first"] = same(
                *(Path(answers) / f"{k}-answer.zarr" for k in (KINDS[0], kind))
            )
            rows.append(row)
            peak, predicted, allowed = (
                show_bytes(row[name])
                for name in ("peak_bytes_from_outside", "predicted_bytes", "allowed_bytes")
            )
            print(
                f"{kind:5} {row['seconds']:.0f} s: {peak} measured, {predicted} predicted, "
                f"{allowed} allowed; the same answer: {row['same_as_the_first']}",
                flush=True,
            )
    curves = {f"measured, from {row['kind']}": row["samples"] for row in rows}
    predicted = max(row["predicted_bytes"] for row in rows)
    path = ROOT / "docs" / "images" / "memory.svg"
    draw(curves, rows[0]["allowed_bytes"], predicted, path)
    print(f"kept in {keep('memory', {'rows': rows})}")


if __name__ == "__main__":
    main()
