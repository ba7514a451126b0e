"""Feeding blocks to a cluster: a bounded number in flight, nothing that grows with the volume."""

from __future__ import annotations

import errno
import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, groupby, islice, starmap
from typing import Any, NamedTuple, TypeVar

import dask
from distributed import Client, Future, as_completed
from distributed.comm import CommClosedError

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


@contextmanager
def on_workers(client: Client, plugin: Any) -> Iterator[None]:
    """The plugin lives on all workers, also on those that come later, until this is left."""
    client.register_plugin(plugin)
    try:
        yield
    finally:
        with suppress(CommClosedError):  # of a worker that is leaving, with all it has
            client.unregister_worker_plugin(plugin.name)


def feed(
    lanes: Sequence[Iterator[T]],
    in_flight: int,
    submit: Callable[[T], Future],
    finished: Callable[[T, Any], bool],
) -> None:
    """Keep ``in_flight`` tasks of every lane going until none are waiting.

    ``submit`` begins one, and again one that was cancelled; ``finished`` takes its result, or the
    exception that it raised, and says whether to begin more.
    """
    running = as_completed()
    items: dict[str, tuple[Iterator[T], T]] = {}

    def begin(lane: Iterator[T], some: Iterable[T]) -> None:
        for item in some:
            future = submit(item)
            items[future.key] = lane, item
            running.add(future)

    going = True
    for lane in lanes:
        begin(lane, islice(lane, in_flight))
    for future in running:
        lane, item = items.pop(future.key)
        try:
            error = future.exception()
            outcome = future.result() if error is None else error
        except CancelledError:
            begin(lane, [item])
            continue
        going = finished(item, outcome) and going
        future.release()
        if going:
            begin(lane, islice(lane, 1))


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
    numbers = count()  # a task that is begun again is another one

    def submit(one: _Waiting) -> Future:
        key = f"{maker.name}-{one.time}-{one.block}-{next(numbers)}"
        return workers.submit(one.worker, make_block, maker.name, one.time, one.block, key=key)

    def done(one: _Waiting, outcome: Made | BaseException) -> bool:
        finished(one.time, one.block, outcome)
        return not is_full(outcome)

    workers = _Workers(client)
    lanes, in_flight = _lanes(job, waiting, sorted(workers.there))
    with on_workers(client, maker), workers.watched():
        feed(lanes, in_flight, submit, done)


class _Waiting(NamedTuple):
    """A block that is still to be made; on that worker, as long as it is there."""

    time: int
    block: Box
    worker: str | None = None


def _lanes(
    job: Job, waiting: Iterator[tuple[int, Box]], workers: Sequence[str]
) -> tuple[list[Iterator[_Waiting]], int]:
    """The blocks, and how many are in flight, of every lane. There is one for all workers; but of a
    column, of which one block goes on where another ended, all go to one worker."""
    in_flight = job.plan.blocks_in_flight
    if job.plan.blocks_in_column == 1 or not workers:
        return [starmap(_Waiting, waiting)], in_flight * max(len(workers), 1)
    columns = (list(blocks) for _, blocks in groupby(waiting, key=job.column))

    def lane(worker: str) -> Iterator[_Waiting]:
        for column in columns:  # whichever no other worker has begun
            for time, block in column:
                yield _Waiting(time, block, worker)

    return [lane(worker) for worker in workers], in_flight


class _Workers:
    """The workers of a cluster, as long as they are ``there``. What was begun on one that leaves is
    cancelled, as nobody else would take it up."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._begun: defaultdict[str, weakref.WeakSet[Future]] = defaultdict(weakref.WeakSet)
        self.there: set[str] = set(client.scheduler_info()["workers"])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hear of workers that leave meanwhile."""
        workers = set(self.there)
        for worker in workers:
            self._client.subscribe_topic(worker, partial(self._heard, worker))
        self.there &= set(self._client.scheduler_info()["workers"])  # who left before is not heard
        try:
            yield
        finally:
            for worker in workers:
                self._client.unsubscribe_topic(worker)

    def submit(self, worker: str | None, task: Callable[..., Any], *given: Any, key: str) -> Future:
        """Begin a task; on that worker, if it is there."""
        if worker is None or worker not in self.there:
            return self._client.submit(task, *given, key=key, pure=False)
        future = self._client.submit(task, *given, key=key, pure=False, workers=[worker])
        self._begun[worker].add(future)
        if worker not in self.there:  # it left meanwhile
            future.cancel()
        return future

    async def _heard(self, worker: str, event: tuple[float, Mapping[str, Any]]) -> None:
        _, told = event
        if told.get("action") == "remove-worker":
            self.there.discard(worker)
            left = list(self._begun.pop(worker, ()))  # what is done, too: its result is lost
            await self._client.cancel(left, asynchronous=True)


def is_full(outcome: object) -> bool:
    """Whether what came of a task is an error that says, or came of one that says, that no space is
    left."""
    error = outcome if isinstance(outcome, BaseException) else None
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
