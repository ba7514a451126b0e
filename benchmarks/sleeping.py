"""Workers that sleep: dask's, fed as real ones are, whose blocks take the time that they would.

A module of its own, so that what runs on the workers is sent to them by its name.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from distributed import Client, LocalCluster, get_worker

from znni_dask.cluster import Cluster
from znni_dask.feeding import Work, feed
from znni_dask.job import LONGEST_RUN
from znni_dask.simulation import Group

LOOPBACK = "127.0.0.1:0"


@dataclass(frozen=True)
class Case:
    """Workers that sleep; of every group some are quicker, or come later. A block's reading and
    writing take the store so many seconds, and nobody else then."""

    name: str
    groups: tuple[Group, ...]
    blocks: int
    in_flight: int = 2
    read_seconds: float = 0.0
    write_seconds: float = 0.0

    @property
    def workers(self) -> int:
        """Of all groups."""
        return sum(group.count for group in self.groups)


class Sleepers:
    """What workers that sleep share; in this process. Who waits knows until when, so that what is
    slept too long is not added up."""

    def __init__(self, case: Case) -> None:
        self._case, self._lock = case, threading.Lock()
        self._free: defaultdict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = {}  # of a block, by worker
        self._left = [group.block_seconds for group in case.groups for _ in range(group.count)]

    def make(self) -> None:
        """Read, compute and write a block, as it seems."""
        worker = get_worker().address
        with self._lock:
            if worker not in self._seconds:
                self._seconds[worker] = self._left.pop(0)
        self._sleep("reading", self._case.read_seconds)
        self._sleep(worker, self._seconds[worker])
        self._sleep("writing", self._case.write_seconds)

    def _sleep(self, what: str, seconds: float) -> None:
        """So long as it takes, after those who came before."""
        if seconds:
            with self._lock:
                until = max(self._free[what], time.monotonic()) + seconds
                self._free[what] = until
            time.sleep(max(until - time.monotonic(), 0))


SLEEPING: list[Sleepers] = []  # the last counts


def make(_: int) -> None:
    """Runs on a worker within this process."""
    SLEEPING[-1].make()


def nothing(_: int) -> None:
    """Runs on a worker."""


@contextmanager
def sleeping(workers: int) -> Iterator[tuple[LocalCluster, Cluster]]:
    """Workers in this process."""
    with (
        LocalCluster(
            processes=False,
            n_workers=workers,
            threads_per_worker=3,
            memory_limit=0,
            dashboard_address=LOOPBACK,
            worker_dashboard_address=LOOPBACK,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, Cluster(client)


def fed(cluster: Cluster, count: int, in_flight: int, task: Callable[[int], None]) -> float:
    """Seconds in which so many tasks are done, each sent alone."""
    runs = (range(n, min(n + LONGEST_RUN, count)) for n in range(0, count, LONGEST_RUN))

    def finished(_: int, outcome: object) -> bool:
        assert outcome is None, outcome
        return True

    def call(_: str, number: int) -> Callable[[], None]:
        return partial(task, number)

    work = Work(runs, in_flight, call, finished, lambda *_: True, in_order=True)
    crew = cluster.crew()
    begin = time.perf_counter()
    feed(cluster, crew, work)
    return time.perf_counter() - begin
