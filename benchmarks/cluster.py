"""What a run costs beside its blocks: a paper's network through dask, and in bare loops.

    python benchmarks/cluster.py [--only NAME]

*one*: all cores make the blocks of a volume, reading and writing them: in a loop without dask, by
`znni_dask.run` in its own process, and by a worker that it starts. *two*: a process for every core,
each in such a loop with its share of the blocks, and as many workers of one thread, in patches, so
that there are blocks enough to share. Compared is what is made in a second after the first block of
every process, for which kernels are compiled and prepared, and in how much of the time nothing was
computed; a round counts only between two probes of the machine's rate that agree within 10 %.
*reading*: how often two workers together decode the voxels of a large volume, through caches of
1 GiB each, where the network sees far. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
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
from znni_dask.timeline import Span, spans_of

KEPT_AS = "cluster"
NETWORK = "n337"
MEMORY = "6GiB"  # of all processes
AGREE, ROUNDS, TRIES = 0.1, 7, 11
SIZES = {"one": (128, 256), "two": (128, 128)}  # how wide and how long the volume is
HOW: dict[str, Options] = {
    "one": {"dtype": "uint8", "pyramid": False, "chunks": 64},
    "two": {"dtype": "uint8", "pyramid": False, "chunks": 64, "patch": 64},
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
    job = replace(ready.job, timeline=True)
    maker = BlockMaker(job)
    every = [*job.blocks()]
    first, stop = (len(every) * n // parts for n in (part, part + 1))
    maker.setup(SimpleNamespace(name="here"))
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(plan.blocks_in_flight) as pool:
        blocks = [*pool.map(lambda at: maker.make(*at), every[first:stop])]
    return told(("here", span) for one in blocks for span in one.spans)


def told(spans: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """Of what some processes did: blocks that they make in a second, but for the first of each, and
    the share of the time between these in which a process computes nothing."""
    blocks: defaultdict[str, list[Span]] = defaultdict(list)
    for worker, span in spans:
        if span.what == "computing":
            blocks[worker].append(span)
    rate = idle = 0.0
    for made in blocks.values():
        first, *others = sorted(made, key=_end)
        seconds = max(map(_end, others)) - _end(first)
        rate += len(others) / seconds
        idle += 1 - sum(span.seconds for span in others) / seconds
    return {"blocks_per_second": rate, "idle": idle / len(blocks)}


def _end(span: Span) -> float:
    return span.start_seconds + span.seconds


def through_dask(
    name: str, volume: str, output: str, plan: Plan | None, workers: int
) -> dict[str, Any]:
    """Make all blocks by so many workers, or in this process where that is 0."""
    how = HOW[name] if plan is None else planned(name, plan)
    made = run(
        *(NETWORK, volume, output),
        overwrite=True,
        workers=workers or None,
        timeline=f"{output}.json",
        **(how | {"memory": MEMORY}),
    )
    found = told(spans_of(Path(f"{output}.json")))
    return found | {"plan": made.plan.to_json(), "blocks": made.blocks}


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
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in began]
    rate = sum(one["blocks_per_second"] for one in found)
    idle = sum(one["idle"] for one in found) / len(found)
    return found[0] | {"blocks_per_second": rate, "idle": idle}


def compared(name: str) -> dict[str, Any]:
    """Blocks made in the ways of one ``name``: medians of rounds, and of their ratios."""
    loops, ways = (1, (0, 1)) if name == "one" else (cores(), (cores(),))
    rows: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as place, Team(cores()) as team:
        volume, plan = noise(place, *SIZES[name]), Path(place) / "plan.json"
        first = together(name, volume, plan, str(ways[-1]), 1)
        plan.write_text(first["plan"])
        for _ in range(TRIES):
            row, before = {}, rate(team)
            row["loop"] = together(name, volume, plan, "loop", loops)
            for way in ways:
                called = "run" if way == 0 else f"workers={way}"
                row[called] = together(name, volume, plan, str(way), 1)
            if abs(rate(team) / before - 1) <= AGREE:
                shown = (
                    f"{way} {v['blocks_per_second']:.4f} {v['idle']:.4f}" for way, v in row.items()
                )
                print(name, *shown, flush=True)
                rows.append(row)
            if len(rows) == ROUNDS:
                break
    if not rows:
        return {"name": name, "unsteady": True}
    chosen = Plan.from_json(first["plan"])

    def medians(key: str) -> dict[str, float]:
        return {way: median(row[way][key] for row in rows) for way in rows[0]}

    rates = [{way: found["blocks_per_second"] for way, found in row.items()} for row in rows]
    return {
        "name": name,
        "threads": chosen.threads,
        "block": chosen.block,
        "blocks": first["blocks"],
        "block_seconds": loops / medians("blocks_per_second")["loop"],
        "rounds": len(rows),
        "blocks_per_second": medians("blocks_per_second"),
        "idle": medians("idle"),
        "of_the_loop": {way: median(row[way] / row["loop"] for row in rates) for way in rates[0]},
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
    parser.add_argument("--size", type=int, default=2048, help="of that which is read")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, kind, volume, output, path, part, parts = given.one
        plan = Plan.from_json(Path(path).read_text()) if Path(path).exists() else None
        if kind == "loop":
            assert plan
            found = looped(name, volume, output, plan, int(part), int(parts))
        else:
            found = through_dask(name, volume, output, plan, int(kind))
        print(json.dumps(found))
        return
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "one": lambda: compared("one"),
        "two": lambda: compared("two"),
        "reading": lambda: read_by_two(given.size),
    }
    rows = {row["name"]: row for row in kept(KEPT_AS).get("rows", ())}
    for name in given.only or measures:
        rows[name] = measures[name]()
        print(rows[name], flush=True)
        keep(KEPT_AS, {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
