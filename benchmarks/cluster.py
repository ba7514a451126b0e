"""What a run costs beside its blocks: a paper's network through dask, and in bare loops.

    python benchmarks/cluster.py [--only NAME]

*resting*: what dask takes of a core while there is nothing to do, set up as `run` does it and as
dask does by itself. *beside*: how much longer blocks take in a loop while it rests in the same
process. *one*: all cores make the blocks of a volume, reading and writing them: in a loop without
dask, by `znni_dask.run` in its own process, and by a worker that it starts. *two*: a process for
every core, each in such a loop with its share of the blocks, and as many workers of one thread, in
patches, so that there are blocks enough to share. All ways are under way at once, and take turns of
some seconds, the others being stopped meanwhile, so that all see the same machine, which others
use, too. Compared are blocks made in a second of these turns, after the first, for which kernels
are compiled and prepared, and before the last, when others may be done.
*reading*: how often two workers together decode the voxels of a large volume, through caches of
1 GiB each, where the network sees far. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import zarr
from distributed import Client

from machine import keep, kept
from planning import noise
from znni_dask import run
from znni_dask.asking import Options, asked
from znni_dask.cluster import Crew, Means, connected
from znni_dask.forecast import forecasts, plan_all
from znni_dask.importers.to_onnx import save
from znni_dask.job import BlockMaker
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import anonymous_bytes, cores
from znni_dask.network.build import Builder
from znni_dask.options import allowed_bytes
from znni_dask.passes import create_outputs
from znni_dask.plan import Plan
from znni_dask.storage.urls import location

KEPT_AS = "cluster"
NETWORK = "n337"
PLANNED, MEMORY = "5GiB", "6GiB"  # of all processes: by a plan for less, which fits each of them
ROUNDS, TURN_SECONDS = 2, 3.0
SIZES = {
    "one": (192, 960),
    "two": (128, 768),
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

    def ended(at: tuple[Any, ...]) -> float:
        maker.make(*at)
        return time.time()

    with ThreadPoolExecutor(plan.blocks_in_flight) as pool:
        return {"ends": [*pool.map(ended, every[first:stop])]}


def through_dask(name: str, volume: str, output: str, plan: Plan, workers: int) -> dict[str, Any]:
    """Make all blocks by so many workers, or in this process where that is 0, as soon as a line is
    read."""
    print("ready", flush=True)
    sys.stdin.readline()
    ends: list[float] = []
    run(
        *(NETWORK, volume, output),
        overwrite=True,
        workers=workers or None,
        progress=lambda done, total: ends.append(time.time()),
        **(planned(name, plan) | {"memory": MEMORY}),
    )
    return {"ends": ends}


class Way:
    """Processes that make the blocks of a volume together, stopped but in their turns."""

    def __init__(self, name: str, volume: str, plan: Path, kind: str, processes: int) -> None:
        self.processes, self.turns = max(processes, int(kind) if kind.isdigit() else 0), []
        self._began = []
        for part in range(processes):
            output = str(plan.with_name(f"{kind}-{part}.zarr"))
            asked_of = [name, kind, volume, output, str(plan), str(part), str(processes)]
            command = [sys.executable, __file__, "--one", *asked_of]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._began.append(
                subprocess.Popen(command, text=True, start_new_session=True, **pipes)
            )
        for process in self._began:
            assert process.stdout
            while (line := process.stdout.readline()) != "ready\n":
                if not line:
                    self.end()
                    raise SystemExit(f"{kind} failed with {process.wait()}")
        for process in self._began:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        self._signal(signal.SIGSTOP)

    def turn(self) -> bool:
        """Go on for a while; whether there is more to do."""
        begin = time.time()
        self._signal(signal.SIGCONT)
        while time.time() < begin + TURN_SECONDS and (more := self._is_under_way()):
            time.sleep(0.01)
        self.turns.append((begin, time.time()))
        if more:  # else what is left of them must come to an end
            self._signal(signal.SIGSTOP)
        return more

    def rate(self) -> float:
        """Blocks in a second of the turns: of the line nearest to how many had ended when, which
        does not depend on whether processes end theirs together or by turns."""
        told = [one.communicate()[0] for one in self._began]
        if failed := [one.returncode for one in self._began if one.returncode]:
            raise SystemExit(f"a process failed with {failed[0]}")
        found = [json.loads(one.splitlines()[-1]) for one in told]
        ends = sorted(self._awake(end) for one in found for end in one["ends"])
        counted = ends[: len(ends) - self.processes + 1]
        return float(np.polyfit(counted, range(len(counted)), 1)[0])

    def end(self) -> None:
        """Whatever is left of the processes, which would stay stopped."""
        self._signal(signal.SIGKILL)

    def _awake(self, moment: float) -> float:
        """Seconds of the turns until then."""
        return sum(max(0, min(end, moment) - begin) for begin, end in self.turns)

    def _is_under_way(self) -> bool:
        return any(process.poll() is None for process in self._began)

    def _signal(self, which: signal.Signals) -> None:
        for process in self._began:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, which)


def compared(name: str) -> dict[str, Any]:
    """Blocks made in a second in the ways of one ``name``, by rounds, and medians of ratios."""
    loops, others = (1, (0, 1)) if name == "one" else (cores(), (cores(),))
    rates: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        volume, path = noise(place, *SIZES[name]), Path(place) / "plan.json"
        asked_for = asked(NETWORK, volume, **HOW[name])
        with connected(workers=max(others), memory=PLANNED) as cluster:
            (planned_for,) = plan_all(asked_for, cluster.crew())
        plan = planned_for.job.plan
        path.write_text(plan.to_json())
        called = {"loop": ("loop", loops)} | {
            f"workers={number}" if number else "run": (str(number), 1) for number in others
        }
        for _ in range(ROUNDS):
            with ExitStack() as stack:
                ways: dict[str, Way] = {}
                for what, how in called.items():
                    ways[what] = Way(name, volume, path, *how)
                    stack.callback(ways[what].end)
                left = [*ways.values()]
                while left:
                    left = [way for way in left if way.turn()]
                rates.append({what: way.rate() for what, way in ways.items()})
            print(name, rates[-1], flush=True)
    return {
        "name": name,
        "threads": plan.threads,
        "block": plan.block,
        "block_seconds": median(loops / row["loop"] for row in rates),
        "blocks_per_second": rates,
        "of_the_loop": {way: median(row[way] / row["loop"] for row in rates) for way in rates[0]},
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
        plan = Plan.from_json(Path(path).read_text())
        if kind == "loop":
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
