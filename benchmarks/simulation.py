"""What is simulated of a run beside what it takes: of workers that sleep, and of real ones.

    python benchmarks/simulation.py [--only NAME] [--real]

Sleeping workers are dask's, 4 to 32 of them in this process, and fed as real ones are; their blocks
take the time that they would, whatever else the machine does: of reading and writing through a
store that serves one after another, and of computing one after another on every worker. How many
tasks of no work the same workers are fed in a second, before and after, is what the scheduler is
simulated with. With ``--real`` a small network is applied to a volume of noise by one and two
workers on this machine, planned by what was just measured of it. The result is kept under
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from machine import keep, kept
from planning import Probe, calibrated, noise, steady, unet
from sleeping import SLEEPING, Case, Sleepers, fed, make, nothing, sleeping
from znni_dask import run
from znni_dask.asking import Options
from znni_dask.cluster import share
from znni_dask.importers.to_onnx import save
from znni_dask.job import LONGEST_RUN
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.outlook import outlooks
from znni_dask.simulation import Blocks, Group, Shared, simulate
from znni_dask.sketch import Scheduler, Sketch, Store, Workers

KEPT_AS = "simulation"
EMPTY = 400  # tasks of no work
AGREE = 0.25  # of their rates before and after
LATENCY_SECONDS = 0.01
EDGE = 384  # of the volume for real workers
BLOCK = 64  # and of their blocks


CASES = (
    Case("4 alike", (Group(4, 0.5),), 120),
    Case("16 alike", (Group(16, 1.0),), 300, 3),
    Case("32 alike", (Group(32, 1.5),), 400, 3),
    Case("few blocks", (Group(16, 3.0),), 40, 3),
    Case("1 : 4", (Group(1, 0.4), Group(1, 0.1)), 200),
    Case("quick and slow", (Group(8, 1.6), Group(8, 0.4)), 400),
    Case("some come later", (Group(8, 0.6), Group(8, 0.6, 8.0)), 400),
    Case("reading limits", (Group(16, 0.4),), 400, 3, read_seconds=0.05),
    Case("writing limits", (Group(8, 0.2),), 300, 2, write_seconds=0.06),
    Case("the scheduler limits", (Group(32, 0.02),), 3000, 3),
)


def measured(case: Case) -> dict[str, Any]:
    """A case simulated, and slept through."""
    later = [group for group in case.groups if group.after_seconds]
    first = case.workers - sum(group.count for group in later)
    with sleeping(first) as (local, cluster):
        before = EMPTY / fed(cluster, EMPTY, case.in_flight, nothing)
        SLEEPING.append(Sleepers(case))
        timers = [
            threading.Timer(group.after_seconds, partial(local.scale, case.workers))
            for group in later
        ]
        for timer in timers:
            timer.start()
        seconds = fed(cluster, case.blocks, case.in_flight, make)
        for timer in timers:
            timer.join()
        after = EMPTY / fed(cluster, EMPTY, case.in_flight, nothing)
    rate = (before + after) / 2
    blocks = Blocks(
        case.blocks,
        LONGEST_RUN,
        case.in_flight,
        case.read_seconds,
        case.write_seconds,
        in_order=True,
    )
    found = simulate(case.groups, blocks, Shared(1.0, 1.0, 1 / rate, LATENCY_SECONDS))
    told = {
        "workers": case.workers,
        "blocks": case.blocks,
        "in_flight": case.in_flight,
        "tasks_per_second": rate,
        "limits": found.bottleneck,
        "predicted_seconds": found.seconds,
        "seconds": seconds,
    }
    return told if abs(after / before - 1) <= AGREE else told | {"unsteady": True}


def real(workers: int, folder: str, tasks_per_second: float) -> dict[str, Any]:
    """A small network and a volume, planned and simulated, and run by real workers."""
    means = share(workers, "4GiB", cores())
    options: Options = {"dtype": "uint8", "pyramid": False, "chunks": BLOCK, "patch": BLOCK}
    sketch = Sketch(
        (Workers(workers, means.threads, means.allowed_bytes),),
        Store(),
        Scheduler(tasks_per_second),
    )
    files = Path(folder) / "network.onnx", noise(folder, EDGE)
    ((_, found),) = outlooks(*files, sketch, **options)
    made = run(
        *files, f"{folder}/out.zarr", overwrite=True, workers=workers, memory="4GiB", **options
    )
    return {
        "workers": workers,
        "blocks": found.blocks,
        "in_flight": made.plan.blocks_in_flight,
        "tasks_per_second": tasks_per_second,
        "limits": found.bottleneck,
        "predicted_seconds": found.seconds,
        "seconds": made.seconds,
    }


def real_rows(rate: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """One worker and two."""
    with tempfile.TemporaryDirectory() as folder, Team(cores()) as team:
        os.environ["ZNNI_TIMINGS"] = f"{folder}/timings.json"
        save(unet(2, 8), Path(folder) / "network.onnx")
        probe = Probe(team)
        reference = calibrated(probe)
        for workers in (1, 2):
            command = [sys.executable, __file__, "--one", str(workers), folder, str(rate)]
            told = steady(command, probe, reference)
            if "seconds" in told:
                told["predicted_seconds"] /= told["rate"]
            yield f"{workers} real", told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--real", action="store_true", help="real workers alone")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        workers, folder, rate = given.one
        print(json.dumps(real(int(workers), folder, float(rate))))
        return
    rows = {row["case"]: row for row in kept(KEPT_AS).get("rows", ())}

    def told(name: str, row: dict[str, Any]) -> None:
        rows[name] = {"case": name, **row}
        print(line(rows[name]), flush=True)
        keep(KEPT_AS, {"rows": list(rows.values())})

    if given.real:
        rates = [row["tasks_per_second"] for row in rows.values()]
        for name, row in real_rows(min(rates, default=100.0)):
            told(name, row)
        return
    for case in CASES:
        if not given.only or case.name in given.only:
            told(case.name, measured(case))


def line(row: dict[str, Any]) -> str:
    """A case as it is told."""
    if "refused" in row:
        return f"{row['case']:22} refused: {row['refused'][:150]}"
    ratio = row["seconds"] / row["predicted_seconds"]
    unsteady = ", unsteady" if "unsteady" in row else ""
    return (
        f"{row['case']:22} {row['seconds']:6.1f} s, {ratio:.2f} times as predicted, "
        f"{row['tasks_per_second']:.0f} tasks/s: {row['limits']}{unsteady}"
    )


if __name__ == "__main__":
    main()
