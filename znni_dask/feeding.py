"""Feeding blocks to a cluster: a bounded number in flight, nothing that grows with the volume."""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dask
from distributed import Client, as_completed

from znni_dask import planner
from znni_dask.geometry import Box
from znni_dask.job import BlockMaker, Job, make_block

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
            threads_per_worker=planner.MOST_BLOCKS_IN_FLIGHT,
            memory_limit=0,
            dashboard_address=_LOOPBACK,
            worker_dashboard_address=_LOOPBACK,
            silence_logs=logging.CRITICAL,  # failures are collected and reported at the end
        ) as local,
    ):
        yield local


def make_blocks(
    client: Client,
    job: Job,
    waiting: Iterator[tuple[int, Box]],
    finished: Callable[[int, Box, BaseException | None], None],
) -> None:
    """Feed blocks (time point, box) through a window of those in flight.

    ``finished`` is told of every block, and of the error where it failed. Where the disk is full
    no more blocks are begun.
    """
    maker = BlockMaker(job)
    client.register_plugin(maker)
    workers = len(client.scheduler_info()["workers"])
    running = as_completed()
    places: dict[str, tuple[int, Box]] = {}

    def submit(count: int) -> None:
        for moment, block in itertools.islice(waiting, count):
            key = f"{maker.name}-{moment}-{block}"
            future = client.submit(make_block, maker.name, moment, block, key=key, pure=False)
            places[future.key] = (moment, block)
            running.add(future)

    full = False
    try:
        submit(job.plan.blocks_in_flight * max(workers, 1))
        for future in running:
            moment, block = places.pop(future.key)
            error = future.exception()
            future.release()
            finished(moment, block, error)
            full = full or is_full(error)
            if not full:
                submit(1)
    finally:
        client.unregister_worker_plugin(maker.name)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
