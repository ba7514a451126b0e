"""What a run costs beside its blocks: a paper's network through dask, and in bare loops.

    python benchmarks/cluster.py [--only NAME] [--edge 192]

*one*: all cores make the blocks of a volume, reading and writing them: in a loop without dask, by
`znni_dask.run` in its own process, and by a worker that it starts. *two*: a process for every core,
each in such a loop with its share of the blocks, and as many workers of one thread, in patches, so
that there are blocks enough to share. What is
compared is what is made in a second, from the first block to the last; a round counts only between
two probes of the machine's rate that agree within 10 %. *reading*: how often two workers together
decode the voxels of a large volume, through caches of 1 GiB each, where the network sees far. The
result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import zarr

from machine import keep, kept
from planning import noise, rate
from znni_dask import run
from znni_dask.asking import Options, asked
from znni_dask.cluster import Crew, Means
from znni_dask.forecast import plan_all
from znni_dask.importers.to_onnx import save
from znni_dask.job import BlockMaker
from znni_dask.kernels.team import Team
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import anonymous_bytes, cores
from znni_dask.network.build import Builder
from znni_dask.options import allowed_bytes
from znni_dask.passes import create_outputs
from znni_dask.plan import Plan
from znni_dask.storage.urls import location

KEPT_AS = "cluster"
NETWORK = "n337"
MEMORY = "6GiB"  # of all processes
AGREE, ROUNDS, TRIES = 0.1, 5, 9
HOW: dict[str, Options] = {
    "one": {"dtype": "uint8", "pyramid": False, "chunks": 64},
    "two": {"dtype": "uint8", "pyramid": False, "chunks": 96, "patch": 96},
    "reading": {"dtype": "uint8", "pyramid": False, "chunks": 128, "memory": "12GiB"},
}
FAR = 80  # voxels that a network sees beyond a block whose reading is counted
CACHE_BYTES = 1 << 30


def planned(name: str, plan: Plan) -> Options:
    """How what is so called is made by a plan."""
    how = HOW[name].copy()
    how.pop("patch", None)
    return how | {"plan": [plan]}


def looped(
    name: str, volume: str, output: str, plan: Plan, part: int, parts: int
) -> dict[str, Any]:
    """Make one of so many parts of the blocks without dask, as soon as a line is read."""
    found = asked(NETWORK, volume, **planned(name, plan))
    compile_kernels()
    means = Means(plan.threads, allowed_bytes(MEMORY), anonymous_bytes())
    made = plan_all(found, Crew.of({"here": means}))
    (ready,) = create_outputs(found.application, made, found.request, location(output), False)
    maker = BlockMaker(ready.job)
    every = [*ready.job.blocks()]
    runs = sorted({ready.job.run(at) for at in every}, key=str)
    mine = [at for at in every if runs.index(ready.job.run(at)) % parts == part]
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.time()
    maker.setup(SimpleNamespace(name="here"))
    with ThreadPoolExecutor(plan.blocks_in_flight) as pool:
        voxels = sum(one.voxels for one in pool.map(lambda at: maker.make(*at), mine))
    return {"begin": begin, "end": time.time(), "voxels": voxels}


def through_dask(
    name: str, volume: str, output: str, plan: Plan | None, workers: int
) -> dict[str, Any]:
    """Make all blocks by so many workers, or in this process where that is 0."""
    how = HOW[name] if plan is None else planned(name, plan)
    made = run(
        *(NETWORK, volume, output),
        overwrite=True,
        workers=workers or None,
        **(how | {"memory": MEMORY}),
    )
    return {
        "begin": 0.0,
        "end": made.seconds,
        "voxels": made.voxels_per_second * made.seconds,
        "plan": made.plan.to_json(),
        "blocks": made.blocks,
    }


def together(name: str, volume: str, plan: Path, kind: str, processes: int) -> dict[str, Any]:
    """What so many processes of one kind tell that begin at the same time."""
    began = []
    for part in range(processes):
        asked_of = [name, kind, volume, str(plan.with_name(f"{kind}-{part}.zarr")), str(plan)]
        command = [sys.executable, __file__, "--one", *asked_of, str(part), str(processes)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        began.append(subprocess.Popen(command, text=True, **pipes))
    if kind == "loop":
        for process in began:
            assert process.stdout
            while process.stdout.readline() != "ready\n":
                if process.poll() is not None:
                    raise SystemExit(f"a {kind} failed with {process.returncode}")
        for process in began:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in began]
    seconds = max(t["end"] for t in told) - min(t["begin"] for t in told)
    return {**told[0], "voxels_per_second": sum(t["voxels"] for t in told) / seconds}


def compared(name: str, edge: int) -> dict[str, Any]:
    """Blocks made in the ways of one ``name``: medians of rounds, and of their ratios."""
    loops, ways = (1, (0, 1)) if name == "one" else (cores(), (cores(),))
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place, Team(cores()) as team:
        volume, plan = noise(place, edge), Path(place) / "plan.json"
        first = together(name, volume, plan, str(ways[-1]), 1)
        plan.write_text(first["plan"])
        for _ in range(TRIES):
            row, before = {}, rate(team)
            row["loop"] = together(name, volume, plan, "loop", loops)["voxels_per_second"]
            for way in ways:
                told = together(name, volume, plan, str(way), 1)
                row["run" if way == 0 else f"workers={way}"] = told["voxels_per_second"]
            if abs(rate(team) / before - 1) <= AGREE:
                print(name, *(f"{way} {value:,.0f}" for way, value in row.items()), flush=True)
                rows.append(row)
            if len(rows) == ROUNDS:
                break
    if not rows:
        return {"name": name, "unsteady": True}
    chosen = Plan.from_json(first["plan"])
    rates = {way: median(row[way] for row in rows) for way in rows[0]}
    return {
        "name": name,
        "edge": edge,
        "threads": chosen.threads,
        "block": chosen.block,
        "blocks": first["blocks"],
        "block_seconds": edge**3 / first["blocks"] / rates["loop"] * loops,
        "rounds": len(rows),
        "voxels_per_second": rates,
        "of_the_loop": {way: median(row[way] / row["loop"] for row in rows) for way in rates},
    }


def read_by_two(size: int) -> dict[str, Any]:
    """A network that sees far, of one layer that is soon computed, applied to a large volume; what
    two workers decode of it. Its chunks are made when they are read."""
    b = Builder(1)
    seen = b.network(b.conv(b.input, 1, 3, dilation=FAR))
    how = HOW["reading"]
    with tempfile.TemporaryDirectory() as place:
        save(seen, Path(place) / "network.onnx")
        path = f"{place}/volume.zarr"
        zarr.create_array(path, shape=(size,) * 3, chunks=(128,) * 3, dtype="u1", fill_value=7)
        files = f"{place}/network.onnx", path
        first = run(*files, f"{place}/first.zarr", workers=2, roi="0:512,0:512,0:512", **how)
        plan = replace(
            first.plan,
            block=(512, 512, 512),
            reading=replace(first.plan.reading, cache_bytes=CACHE_BYTES),
        )
        made = run(*files, f"{place}/out.zarr", workers=2, plan=[plan], **how)
    return {
        "name": "reading",
        "size": size,
        "halo": FAR,
        "block": made.plan.block,
        "cache_bytes": made.plan.reading.cache_bytes,
        "read_amplification": made.read_amplification,
        "predicted_read_amplification": made.plan.reading.amplification,
        "seconds": made.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["one", "two", "reading"], action="append")
    parser.add_argument("--edge", type=int, default=192, help="of the volume of one and two")
    parser.add_argument("--size", type=int, default=2048, help="of that which is read")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, kind, volume, output, path, part, parts = given.one
        plan = Plan.from_json(Path(path).read_text()) if Path(path).exists() else None
        if kind == "loop":
            assert plan
            told = looped(name, volume, output, plan, int(part), int(parts))
        else:
            told = through_dask(name, volume, output, plan, int(kind))
        print(json.dumps(told))
        return
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "one": lambda: compared("one", given.edge),
        "two": lambda: compared("two", given.edge),
        "reading": lambda: read_by_two(given.size),
    }
    rows = {row["name"]: row for row in kept(KEPT_AS).get("rows", ())}
    for name in given.only or measures:
        rows[name] = measures[name]()
        print(rows[name], flush=True)
        keep(KEPT_AS, {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
