"""How many tasks of no work a cluster is fed in a second, and what client and scheduler hold.

    python benchmarks/feeding.py [--tasks 100000] [--workers 2]

Client and scheduler share this process; its anonymous memory is taken after every tenth of the
tasks. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

from machine import keep
from znni_dask.cluster import connected
from znni_dask.feeding import Work, feed
from znni_dask.machine import own_bytes

IN_FLIGHT = 3
RUN = 64  # tasks


def nothing(number: int) -> int:
    """Runs on a worker."""
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    done, held = 0, []

    def finished(number: int, outcome: object) -> bool:
        nonlocal done
        assert outcome == number, outcome
        done += 1
        if done * 10 % given.tasks < 10:
            held.append(own_bytes())
            rate = done / (time.perf_counter() - begin)
            print(f"{done:9,}: {rate:5.0f} tasks/s, {held[-1] / 1e6:.0f} MB", flush=True)
        return True

    def task(_: str, number: int) -> Callable[[], int]:
        return partial(nothing, number)

    with connected(workers=given.workers) as cluster:
        before, begin = own_bytes(), time.perf_counter()
        runs = (range(n, min(n + RUN, given.tasks)) for n in range(0, given.tasks, RUN))
        feed(cluster, cluster.crew(), Work(runs, IN_FLIGHT, task, finished))
        seconds = time.perf_counter() - begin
    keep(
        "feeding",
        {
            "tasks": given.tasks,
            "workers": given.workers,
            "in_flight": IN_FLIGHT,
            "tasks_per_second": given.tasks / seconds,
            "bytes_before": before,
            "bytes_of_tenths": held,
        },
    )


if __name__ == "__main__":
    main()
