"""Memory as a promise, under a limit that kills: random networks, volumes and limits.

    python benchmarks/promise.py [--cases 200] [--go-on]

Every case is a network, a volume of noise and options, drawn by its number. `znni plan` is asked
for it within 16 MiB and says what the smallest plan needs; `znni infer` is run with 1.0 to 1.5
times as much, in a memory cgroup whose limit is what it is allowed: a process that takes more is
killed. Cases that are predicted to take more than a minute are drawn again. Only where memory
cgroups of version 1 may be made: by root, mostly. The result is kept under `benchmarks/results/`,
case by case; `--go-on` goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from machine import keep, kept
from planning import residual, sliding, unet, windowed
from znni_dask.geometry import Size, text, triple
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.machine import parse_bytes
from znni_dask.network.chains import Row, chain
from znni_dask.network.network import Network

CGROUPS = Path("/sys/fs/cgroup/memory")
LITTLE = "16MiB"  # less than any run needs
MOST_SECONDS = 60.0  # that a run is predicted to take
COMMAND = [sys.executable, "-m", "znni_dask.cli"]


def drawn(random: np.random.Generator) -> tuple[str, Network, dict[str, str]]:
    """A network, what it is, and options that belong to it."""

    def one_of(*values: int) -> int:
        return int(random.choice(values))

    match random.choice(["unet", "residual", "sliding", "windows", "chain"]):
        case "unet":
            levels, base, kernel = one_of(1, 2, 3), one_of(4, 8, 16, 32), (one_of(1, 3), 3, 3)
            return f"U-Net {levels}, {base}, {kernel}", unet(levels, base, kernel), {}
        case "residual":
            width, blocks, stride = one_of(8, 16, 48), one_of(2, 5), one_of(1, 2)
            return f"residual {width}, {blocks}, {stride}", residual(width, blocks, stride), {}
        case "sliding":
            width, kernel = one_of(8, 24, 48), (one_of(1, 2, 3), one_of(3, 4), one_of(3, 5))
            return f"sliding {width}, {kernel}", sliding(width, kernel), {}
        case "windows":
            width, window = one_of(8, 16), (one_of(16, 32), one_of(32, 64), 32)
            options = {"--patchwise": ",".join(map(str, window))}
            return f"windows {width}, {window}", windowed(width), options
        case _:
            kernels, width = [one_of(2, 3, 5) for _ in range(3)], one_of(16, 40)
            rows = [Row("CONV", (k, k, k), width) for k in kernels]
            for place in range(one_of(1, 2), 0, -1):
                rows.insert(place, Row("POOL", (2, 2, 2)))
            rows.append(Row("CONV", (1, 1, 1), 2))
            kinds = ", ".join(f"{row.kind[0]}{row.kernel[0]}" for row in rows)
            return f"chain {width}: {kinds}", chain(1, rows), {}


def options_of(random: np.random.Generator) -> tuple[Size, str, dict[str, str]]:
    """Size and type of a volume, and how the answer is wanted."""
    size = triple([int(n) for n in random.integers(60, 240, 3)])
    options = {
        "--dtype": str(random.choice(["uint8", "float32"])),
        "--chunks": str(random.choice(["32,32,32", "64,64,64", "16,64,64"])),
        "--threads": str(random.integers(1, 3)),
    }
    return size, str(random.choice(["uint8", "uint16", "float32"])), options


@contextmanager
def cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup with a limit."""
    place = CGROUPS / f"znni-promise-{os.getpid()}"
    place.mkdir()
    try:
        (place / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield place
    finally:
        place.rmdir()


def joined(place: Path) -> None:
    """Let this process be of a cgroup."""
    (place / "cgroup.procs").write_text(str(os.getpid()))


def said(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a command says."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def case(number: int, folder: str) -> dict[str, Any]:
    """One of the cases: what was asked for, and what came of it."""
    random = np.random.default_rng(number)
    (name, network, more), (size, dtype, how) = drawn(random), options_of(random)
    factor = float(random.uniform(1.0, 1.5))
    files = [f"{folder}/{file}" for file in ("network.onnx", "volume.zarr", "out.zarr")]
    Path(files[0]).write_bytes(to_onnx(network).SerializeToString())
    values = random.integers(0, 255, size).astype(dtype)
    chunk = int(random.choice([32, 64, 100]))
    zarr.create_array(files[1], data=values, chunks=tuple(min(chunk, n) for n in size))
    options = [word for pair in (more | how).items() for word in pair]
    told: dict[str, Any] = {
        "case": number,
        "network": name,
        "volume": f"{text(size)} {dtype}",
        "options": " ".join(options),
    }
    refused = said([*COMMAND, "plan", *files[:2], *options, "--memory", LITTLE]).stderr
    if not (least := re.search(r"allow at least ([\d.]+) (\w+)", refused)):
        return told | {"error": refused.strip()[-300:]}
    least_bytes = parse_bytes("".join(least.groups()))
    allowed = round(factor * least_bytes)
    told |= {"least_bytes": least_bytes, "allowed_bytes": allowed}
    limit = ["--memory", f"{allowed}B"]
    planned = said([*COMMAND, "plan", *files[:2], *options, *limit, "--format", "json"])
    if planned.returncode:
        return told | {"refused": planned.stderr.strip()[-300:]}
    seconds = json.loads(planned.stdout)[0]["seconds"]
    if seconds > MOST_SECONDS:
        return told | {"too long": seconds}
    with cgroup(allowed) as place:
        done = subprocess.run(
            [*COMMAND, "infer", *files, *options, *limit],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=partial(joined, place),
        )
        told["peak_of_cgroup_bytes"] = int((place / "memory.max_usage_in_bytes").read_text())
    if done.returncode:
        how_it_ended = done.stderr.strip()[-300:]
        kind = "refused" if done.returncode == 2 else "died"
        return told | {kind: f"{done.returncode}: {how_it_ended}"}
    run = zarr.open_group(files[2], mode="r").attrs["znni_run"]
    assert isinstance(run, dict)
    return told | {key: run[key] for key in ("peak_bytes", "predicted_bytes", "blocks", "seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--go-on", action="store_true", help="with the case after the last kept")
    given = parser.parse_args()
    before = kept("promise") if given.go_on else {}
    rows: list[dict[str, Any]] = before.get("rows", [])
    ends: Counter[str] = Counter(before.get("ends"))
    number = before.get("next", 0)
    while ends["kept"] + ends["died"] < given.cases:
        with tempfile.TemporaryDirectory() as folder:
            row = case(number, folder)
        number += 1
        end = next((end for end in ("died", "refused", "error", "too long") if end in row), "kept")
        ends[end] += 1
        if end != "too long":
            rows.append(row)
        if end == "kept":
            used = row["peak_bytes"] / row["predicted_bytes"]
            what = f"{row['blocks']} blocks, {used:.2f} of what was predicted"
        else:
            what = f"{end}: {row[end]}"
        print(f"{row['case']:4} {row['network']:32} {what}", flush=True)
        many = sum(row.get("blocks", 0) >= 8 for row in rows)
        keep("promise", {"next": number, "ends": ends, "many_blocks": many, "rows": rows})
    print(f"{dict(ends)}; {many} of 8 blocks or more")


if __name__ == "__main__":
    main()
