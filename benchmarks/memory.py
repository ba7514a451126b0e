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
from pathlib import Path

import numpy as np
import zarr

from machine import keep
from reading import stored
from znni_dask.geometry import triple
from znni_dask.machine import anonymous_bytes, parse_bytes, show_bytes

ROOT = Path(__file__).parents[1]
NETWORK = ROOT / "examples" / "networks" / "boundary_valid.onnx"
KINDS = ("zarr", "tiff", "hdf5")
SECONDS = 0.25  # between two samples
CHUNK = 128
RUN = """
import json, sys, znni_dask
network, volume, output, memory = sys.argv[1:]
made = znni_dask.run(network, volume, output, memory=memory, dtype="uint8")
print(json.dumps({
    "peak_bytes": made.peak_bytes,
    "predicted_bytes": made.plan.predicted_bytes,
    "patch": made.plan.patch,
    "block": made.plan.block,
    "blocks": made.blocks,
    "blocks_in_flight": made.plan.blocks_in_flight,
    "seconds": made.seconds,
}))
"""


def watched(command: list[str]) -> tuple[list[tuple[float, int]], dict[str, object]]:
    """Run a command to its end: its memory at moments, and what it says at last."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    begin, samples = time.perf_counter(), []
    while process.poll() is None:
        samples.append((time.perf_counter() - begin, anonymous_bytes(process.pid)))
        time.sleep(SECONDS)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    return samples, json.loads(said.splitlines()[-1])


def measure(kind: str, folder: Path, size: int, memory: str) -> dict[str, object]:
    """One row of the result."""
    volume = stored(kind, folder, triple([size] * 3), CHUNK)
    [path] = [p for p in folder.iterdir() if p.name.startswith(("volume", "zarr"))]
    where = f"{path}:/v" if kind == "hdf5" else str(path)
    output = folder.parent / f"{kind}-answer.zarr"
    samples, said = watched([sys.executable, "-c", RUN, str(NETWORK), where, str(output), memory])
    assert volume.size == (size,) * 3
    seconds, used = (np.array(column) for column in zip(*samples, strict=True))
    tenths = [int(part.max()) for part in np.array_split(used, 10)]
    return {
        "kind": kind,
        "allowed_bytes": parse_bytes(memory),
        **said,
        "peak_bytes_from_outside": int(used.max()),
        "peak_bytes_of_tenths": tenths,
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


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Memory over time, beside what was predicted and what is allowed."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for row in rows:
        seconds, used = np.array(row["samples"]).T
        axes.plot(seconds / 60, used / 2**30, label=f"measured, from {row['kind']}")
    axes.axhline(int(str(rows[0]["allowed_bytes"])) / 2**30, color="red", label="allowed")
    predicted = max(int(str(row["predicted_bytes"])) for row in rows) / 2**30
    axes.axhline(predicted, color="black", linestyle="--", label="predicted")
    axes.set(xlabel="minutes", ylabel="anonymous memory, GiB", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="center", bbox_to_anchor=(0.5, 0.7), ncols=2)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--folder", type=Path, help="for volumes; by default a temporary one")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as answers:
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=answers) as folder:
                row = measure(kind, Path(folder), options.size, options.memory)
            row["same_as_the_first"] = same(
                *(Path(answers) / f"{k}-answer.zarr" for k in (KINDS[0], kind))
            )
            rows.append(row)
            peak, predicted, allowed = (
                show_bytes(int(str(row[name])))
                for name in ("peak_bytes_from_outside", "predicted_bytes", "allowed_bytes")
            )
            print(
                f"{kind:5} {row['seconds']:.0f} s: {peak} measured, {predicted} predicted, "
                f"{allowed} allowed; the same answer: {row['same_as_the_first']}",
                flush=True,
            )
    draw(rows, ROOT / "docs" / "images" / "memory.svg")
    print(f"kept in {keep('memory', {'rows': rows})}")


if __name__ == "__main__":
    main()
