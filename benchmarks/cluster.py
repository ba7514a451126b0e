"""What a run costs beside its blocks: a paper's network through dask, and in bare loops.

    python benchmarks/cluster.py [--only NAME]

*resting*: what dask takes of a core while there is nothing to do, set up as `run` does it and as
dask does by itself. *beside*: how much longer blocks take in a loop while it rests in the same
process. *one*: all cores make the blocks of a volume, reading and writing them: in a loop without
dask, by `znni_dask.run` in its own process, and by a worker that it starts. *two*: a process for
every core, each in such a loop with its share of the blocks, and as many workers of one thread, in
patches, so that there are blocks enough to share. Compared is what is made in a second after the
first block of every process, for which kernels are compiled and prepared: the median of the rounds'
ratios, and, as others use the machine, the best of the rounds; and in how much of the time nothing
was computed. A round counts only between two probes of the machine's rate that agree within 10 %.
*reading*: how often two workers together decode the voxels of a large volume, through caches of
1 GiB each, where the network sees far. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import zarr
from distributed import Client

from machine import keep, kept
from planning import noise, rate
from znni_dask import run
from znni_dask.asking import Options, asked
from znni_dask.cluster import Crew, Means, connected
from znni_dask.forecast import forecasts, plan_all
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
SIZES = {
    "one": (128, 256),
    "two": (128, 128),
    "beside": (192, 30),
}  # how wide and how long the volume is
HOW: dict[str, Options] = {
    "one": {"dtype": "uint8", "pyramid": False, "chunks": 64},
    "two": {"dtype": "uint8", "pyramid": False, "chunks": 64, "patch": 64},
    "reading": {"dtype": "uint8", "pyramid": False, "chunks": 128, "memory": "12GiB"},
}
RESTING_SECONDS = 20.0
FAR = 80  # voxels that a network sees beyond a block whose reading is counted
CACHE_BYTES = 1 << 30


def planned(name: str, plan: Plan) -> Options:
    """How what is so called is made by a plan."""
    how = HOW[name].copy()
    how.pop("patch", None)
    return how | {"plan": [plan]}


def maker_of(name: str, volume: str, output: str, plan: Plan) -> BlockMaker:
    """What makes blocks on a worker, set up here."""
    found = asked(NETWORK, volume, **planned(name, plan))
    compile_kernels()
    means = Means(plan.threads, allowed_bytes(MEMORY), anonymous_bytes())
    made = plan_all(found, Crew.of({"here": means}))
    (ready,) = create_outputs(found.application, made, found.request, location(output), False)
    maker = BlockMaker(replace(ready.job, timeline=True))
    maker.setup(SimpleNamespace(name="here"))
    return maker


def looped(
    name: str, volume: str, output: str, plan: Plan, part: int, parts: int
) -> dict[str, Any]:
    """Make one of so many parts of the blocks without dask, as soon as a line is read."""
    maker = maker_of(name, volume, output, plan)
    every = [*maker.job.blocks()]
    first, stop = (len(every) * n // parts for n in (part, part + 1))
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
        called = {"loop": ("loop", loops)} | {
            f"workers={way}" if way else "run": (str(way), 1) for way in ways
        }
        for turn in range(TRIES):
            row, before, order = {}, rate(team), [*called]
            order = order[turn % len(order) :] + order[: turn % len(order)]  # none is always first
            for what in order:
                row[what] = together(name, volume, plan, *called[what])
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
    best = {way: max(row[way] for row in rates) for way in rates[0]}
    return {
        "name": name,
        "threads": chosen.threads,
        "block": chosen.block,
        "blocks": first["blocks"],
        "block_seconds": loops / medians("blocks_per_second")["loop"],
        "rounds": len(rows),
        "blocks_per_second": medians("blocks_per_second"),
        "idle": medians("idle"),
        "rounds_blocks_per_second": rates,
        "of_the_loop": {way: median(row[way] / row["loop"] for row in rates) for way in rates[0]},
        "best_of_the_best_loop": {way: best[way] / best["loop"] for way in best},
    }


def beside() -> dict[str, Any]:
    """Seconds of blocks in a loop, and of those for which dask rested in the same process: two
    without it, two with it."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    wide, count = SIZES["beside"]
    with tempfile.TemporaryDirectory() as place:
        volume = noise(place, wide, 64 * count)
        options: Options = {**HOW["one"], "memory": MEMORY}
        (found,) = forecasts(NETWORK, volume, **options)
        maker = maker_of("one", volume, f"{place}/out.zarr", found.plan)
        for number, at in enumerate(maker.job.blocks()):
            rests = number % 4 in (2, 3)
            with connected() if rests else nullcontext():
                spans = maker.make(*at).spans
            if number >= 2:  # the first is not like the others
                seconds[rests] += [span.seconds for span in spans if span.what == "computing"]
    without, with_it = (median(seconds[rests]) for rests in (False, True))
    return {
        "name": "beside",
        "block": found.plan.block,
        "seconds": seconds[False],
        "seconds_beside_dask": seconds[True],
        "times": with_it / without,
        "times_of_the_shortest": min(seconds[True]) / min(seconds[False]),
    }


def resting() -> dict[str, Any]:
    """What dask takes of a core while there is nothing to do: its client, scheduler and worker in
    this process, and where the worker is another one, all together."""
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "run": connected,
        "workers=1": lambda: connected(workers=1, memory=MEMORY),
        "dask": lambda: Client(processes=False, n_workers=1),
        "dask, a worker": lambda: Client(processes=True, n_workers=1),
    }
    found = {}
    for way, begun in ways.items():
        with begun():
            time.sleep(RESTING_SECONDS / 4)  # until all has begun
            this = psutil.Process()
            processes = [this, *this.children(recursive=True)]
            before = sum(sum(one.cpu_times()[:2]) for one in processes)
            time.sleep(RESTING_SECONDS)
            after = sum(sum(one.cpu_times()[:2]) for one in processes)
        found[way] = (after - before) / RESTING_SECONDS
    return {"name": "resting", "of_a_core": found}


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
    parser.add_argument(
        "--only", choices=["resting", "beside", "one", "two", "reading"], action="append"
    )
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
        "resting": resting,
        "beside": beside,
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
