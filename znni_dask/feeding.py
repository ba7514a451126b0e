"""Feeding blocks to a cluster: a bounded number in flight, nothing that grows with the volume."""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import dask
from distributed import Client, Future, as_completed

from znni_dask.geometry import Box
from znni_dask.job import BlockMaker, Job, Made, make_block
from znni_dask.resources import MOST_BLOCKS_IN_FLIGHT

T = TypeVar("T")
_LOOPBACK = "127.0.0.1:0"  # distributed's web servers listen to all the world unless told


@contextmanager
def connected(client: Client | None) -> Iterator[Client]:
    """The client given, else one of a scheduler and a worker within this process."""
    if client is not None:
        yield client
        return
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        Client(
            processes=False,
            n_workers=1,
            threads_per_worker=MOST_BLOCKS_IN_FLIGHT,
            memory_limit=0,
            dashboard_address=_LOOPBACK,
            worker_dashboard_address=_LOOPBACK,
            silence_logs=logging.CRITICAL,  # failures are collected and reported at the end
        ) as local,
    ):
        yield local


def feed(
    waiting: Iterator[T],
    submit: Callable[[T], Future],
    in_flight: int,
    finished: Callable[[T, Future], bool],
) -> None:
    """Keep ``in_flight`` tasks going until none are waiting.

    ``submit`` begins one; ``finished`` takes its result or error, and says whether to begin more.
    """
    running = as_completed()
    items: dict[str, T] = {}

    def begin(count: int) -> None:
        for item in itertools.islice(waiting, count):
            future = submit(item)
            items[future.key] = item
            running.add(future)

    going = True
    begin(in_flight)
    for future in running:
        going = finished(items.pop(future.key), future) and going
        future.release()
        if going:
            begin(1)


def make_blocks(
    client: Client,
    job: Job,
    waiting: Iterator[tuple[int, Box]],
    finished: Callable[[int, Box, Made | BaseException], None],
) -> None:
    """Feed blocks (time point, box) to the workers, a bounded number in flight.

    ``finished`` is told of every block, and what came of it or why it failed. Where the disk is
    full no more blocks are begun.
    """
    maker = BlockMaker(job)
    client.register_plugin(maker)
    workers = len(client.scheduler_info()["workers"])

    def submit(place: tuple[int, Box]) -> Future:
        moment, block = place
        key = f"{maker.name}-{moment}-{block}"
        return client.submit(make_block, maker.name, moment, block, key=key, pure=False)

    def done(place: tuple[int, Box], future: Future) -> bool:
        error: BaseException | None = future.exception()
        finished(*place, future.result() if error is None else error)
        return not is_full(error)

    try:
        feed(waiting, submit, job.plan.blocks_in_flight * max(workers, 1), done)
    finally:
        client.unregister_worker_plugin(maker.name)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
