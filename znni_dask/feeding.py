"""Feeding work to a cluster: a bounded number of tasks on every worker, nothing that grows with the
volume.

Work comes in *runs*, items that belong on one worker: neighbours, which share what is read, or
blocks that go on where the one before them ended. A worker takes a run, and the next one when it is
through; when there are no more, half of what the busiest has left, if it will be done with that
sooner. So fast and slow workers end together. Workers may come and go: one that comes takes its
share at once, and what one that leaves had in hand goes to others.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

from distributed import Future, KilledWorker
from distributed.client import ClosedClientError, FutureCancelledError

from znni_dask.cluster import Cluster, Crew, Means, on_workers
from znni_dask.errors import DeviceError, RunError, ZnniError, is_full
from znni_dask.geometry import Box
from znni_dask.job import BlockMaker, Job, Made, make_block
from znni_dask.tasks import together, wanted_seconds

LOG = logging.getLogger(__name__)
T = TypeVar("T")
_LOOK_SECONDS = 5.0  # without news, after which it is seen who is there
_TRIES = 3  # of an item whose task fails, or whose worker dies
_LOST = "scheduler-connection-lost"  # why distributed cancels tasks then
_TOPIC = "all"  # of the scheduler's events: among others workers that come and go


def make_blocks(
    cluster: Cluster,
    crew: Crew,
    job: Job,
    waiting: Iterator[tuple[int, Box]],
    finished: Callable[[int, Box, Made | BaseException], None],
) -> None:
    """Make blocks (time point, box) on the workers, a bounded number in flight on each.

    ``finished`` is told of every block, and what came of it or why it failed. Where the disk is
    full no more blocks are begun. Workers that come later must have what one of the plans needs.
    """
    maker = BlockMaker(job)
    kinds = {w: kind for w, kind in crew.kind.items() if kind < len(job.plans)}
    in_flight = min(plan.blocks_in_flight for plan in job.plans)

    def make(worker: str, place: tuple[int, Box]) -> Callable[[], Made]:
        return partial(make_block, maker.name, *place, kinds.get(worker, 0))

    def takes(worker: str, means: Means) -> bool:
        needed = (
            Means(plan.threads, plan.predicted_bytes, planned.baseline_bytes, plan.device_bytes)
            for plan, planned in zip(job.plans, crew.kinds, strict=False)
        )
        fitting = [number for number, one in enumerate(needed) if means.suffice_for(one)]
        kinds[worker] = max(fitting, key=lambda n: job.plans[n].voxels_per_second, default=0)
        return bool(fitting)

    def done(place: tuple[int, Box], outcome: Made | BaseException) -> bool:
        finished(*place, outcome)
        return not is_full(outcome)

    runs = (run for _, run in groupby(waiting, key=job.run))
    with on_workers(cluster.client, maker):
        in_order = job.plan.blocks_in_column > 1
        feed(cluster, crew, Work(runs, in_flight, make, done, takes, in_order))


@dataclass(frozen=True, eq=False)
class Work(Generic[T]):
    """Items of ``runs``, ``in_flight`` of them to be done on every worker at a time.

    ``task`` gives what a worker (by its address) is to call for an item. ``finished`` takes its
    result, or the exception that it raised, and says whether to begin more. ``takes`` says whether
    a worker that is not of the crew, with such means, is to have any: None, if it has what the
    weakest has. Items that take little time are sent several at once, unless those of a run must be
    done ``in_order``.
    """

    runs: Iterator[Iterable[T]]
    in_flight: int
    task: Callable[[str, T], Callable[[], Any]]
    finished: Callable[[T, Any], bool]
    takes: Callable[[str, Means], bool] | None = None
    in_order: bool = False


def feed(cluster: Cluster, crew: Crew, work: Work[Any]) -> None:
    """Do all items of some work. One that failed is tried again, but where the error is a
    `ZnniError` or says that the disk is full: those would come again."""
    feeding = _Feeding(cluster, crew, work)
    with feeding.listening():
        feeding.run()


@dataclass(eq=False)
class _Item(Generic[T]):
    value: T
    failures: int = 0


@dataclass(eq=False)
class _Hand(Generic[T]):
    """What a worker has: the rest of its run, and the tasks that it was sent."""

    run: deque[_Item[T]] = field(default_factory=deque)
    sent: dict[Future, list[_Item[T]]] = field(default_factory=dict)
    done: int = 0
    busy_seconds: float = 0.0  # of tasks, added up
    began: float = field(default_factory=time.monotonic)

    @property
    def item_seconds(self) -> float:
        """What an item takes, as far as is known: not what it waits until it is sent."""
        waited = time.monotonic() - self.began
        return min(waited, self.busy_seconds) / self.done if self.done else waited

    @property
    def seconds_left(self) -> float:
        """What is left of its run takes."""
        return self.item_seconds * len(self.run)

    @property
    def in_flight(self) -> list[_Item[T]]:
        """All items that were sent."""
        return [item for items in self.sent.values() for item in items]

    def next(self, most: int) -> list[_Item[T]]:
        """The next of its run, ``most`` at most. What failed before goes alone, and so that nothing
        else is blamed if its worker dies; nothing, while it may not."""
        suspect = bool(self.run[0].failures)
        if self.sent and (suspect or any(item.failures for item in self.in_flight)):
            return []
        found = [self.run.popleft()]
        while self.run and len(found) < most and not (suspect or self.run[0].failures):
            found.append(self.run.popleft())
        return found


class _Feeding(Generic[T]):
    """All of it happens in one thread, by one queue of news."""

    def __init__(self, cluster: Cluster, crew: Crew, work: Work[T]) -> None:
        self._cluster, self._client, self._address = cluster, cluster.client, cluster.address
        self._crew, self._work = crew, work
        self._asked: set[str] = set()  # what they have: workers that are not of the crew
        self._unfit: set[str] = set()  # whose device failed
        self._again: deque[deque[_Item[T]]] = deque()  # what was begun, and must be done elsewhere
        self._hands: dict[str, _Hand[T]] = {}
        self._going, self._waited, self._all_handed_out = True, False, False
        self._news: SimpleQueue[Callable[[], None]] = SimpleQueue()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of workers that come and go; at the end nothing is left on any."""
        heard = weakref.WeakMethod(self._heard)  # the client keeps what is subscribed

        def told(event: tuple[float, Mapping[str, Any]]) -> None:
            if hears := heard():
                hears(event)

        self._client.subscribe_topic(_TOPIC, told)
        try:
            yield
        finally:
            if self._client.status == "running":  # else the scheduler has gone
                self._client.unsubscribe_topic(_TOPIC)
                left = [future for hand in self._hands.values() for future in hand.sent]
                self._client.cancel(left)

    def _heard(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, told = event
        if told.get("action") == "add-worker":
            self._news.put(partial(self._came, told["worker"]))
        elif told.get("action") == "remove-worker":
            self._news.put(partial(self._left, told["worker"], bool(told.get("expected"))))

    def run(self) -> None:
        """Until all is done, or nothing more is to be begun."""
        try:
            self._look_around()
            while self._is_left():
                try:
                    self._news.get(timeout=_LOOK_SECONDS)()
                except Empty:
                    self._look_around()
        except (ClosedClientError, OSError):
            if self._client.status == "running":
                raise
            raise self._lost() from None

    def _look_around(self) -> None:
        """Who is there? News of it may be missed: of a client only the last who asked hears any."""
        if self._client.status not in ("running", "connecting"):
            raise self._lost()
        if self._client.status == "running":
            there = self._cluster.workers()
            for worker in [*(self._hands.keys() - there)]:
                self._left(worker)
            for worker in sorted(there - self._hands.keys() - self._asked - self._unfit):
                self._came(worker)
        if not self._hands and not self._waited:
            self._waited = True
            LOG.warning("no workers at %s: waiting for some", self._address)

    def _lost(self) -> RunError:
        return RunError(
            f"the connection to the scheduler {self._address} was lost; what was made until then "
            "is written: the same command goes on, once there is a scheduler"
        )

    def _is_left(self) -> bool:
        if any(hand.sent for hand in self._hands.values()):
            return True
        if not self._going:
            return False
        if not self._again and (run := self._next_run()):
            self._again.append(run)  # of which no worker is there to take any
        return bool(self._again)

    def _came(self, worker: str) -> None:
        """One of the crew is handed work at once, another is asked what it has."""
        if worker in self._hands or worker in self._asked:
            return
        if worker in self._crew.kind:
            self._take_on(worker)
            return
        self._asked.add(worker)
        self._await(self._cluster.means_of(worker), partial(self._answered, worker))

    def _await(self, asked: Awaitable[Any], then: Callable[[Any], None]) -> None:
        """Wait for something in the client's own thread, as it may take long where a worker has
        left; what comes of it, or the error that does, is news for ``then``."""

        async def told() -> None:
            outcome: Any = (await asyncio.gather(asked, return_exceptions=True))[0]
            self._news.put(partial(then, outcome))

        asyncio.run_coroutine_threadsafe(told(), self._client.loop.asyncio_loop)

    def _answered(self, worker: str, means: Means | BaseException | None) -> None:
        if isinstance(means, BaseException):
            LOG.warning("%s", means)
        elif means is None:
            self._asked.discard(worker)  # it left, or is asked once more
        elif worker in self._asked and self._takes(worker, means):
            self._take_on(worker)

    def _takes(self, worker: str, means: Means) -> bool:
        if self._work.takes is None:
            return means.suffice_for(self._crew.kinds[0])
        return self._work.takes(worker, means)

    def _take_on(self, worker: str) -> None:
        self._hands[worker] = _Hand()
        self._fill(worker)

    def _left(self, worker: str, expected: bool = False) -> None:
        """What was done is taken up again, too: if it was not told of, it is lost. Nothing is
        blamed for a worker that was to go."""
        self._asked.discard(worker)
        hand = self._hands.pop(worker, None)
        if hand is None:
            return
        self._client.cancel([*hand.sent])
        error = _left_alone(worker)
        lost = [item for item in hand.in_flight if expected or self._may_again(item, error)]
        if rest := deque([*lost, *hand.run]):
            self._again.append(rest)
        self._fill_all()

    def _fill_all(self) -> None:
        for worker in [*self._hands]:
            self._fill(worker)

    def _fill(self, worker: str) -> None:
        """Send a worker what it may have in flight."""
        hand, work = self._hands.get(worker), self._work
        if hand is None:
            return  # it was just spared
        while self._going and len(hand.sent) < work.in_flight and self._supply(hand):
            if not (items := hand.next(self._together(hand))):
                break
            calls = [work.task(worker, item.value) for item in items]
            seconds = wanted_seconds(len(self._hands))
            future = self._client.submit(_called, calls, seconds, workers=[worker], pure=False)
            hand.sent[future] = items
            outcome = self._client.gather(future, asynchronous=True)
            self._await(outcome, partial(self._ended, worker, future))

    def _together(self, hand: _Hand[T]) -> int:
        """How many items are sent in one task."""
        if self._work.in_order or not hand.done:
            return 1
        more = bool(self._again) or not self._all_handed_out
        return together(hand.item_seconds, len(self._hands), len(hand.run), more)

    def _supply(self, hand: _Hand[T]) -> bool:
        """Let a hand have something to send, if there is anything for it."""
        if not hand.run:
            hand.run = self._next_run() or self._half(hand)
        return bool(hand.run)

    def _next_run(self) -> deque[_Item[T]] | None:
        if self._again:
            return self._again.popleft()
        run = next(self._work.runs, None)
        self._all_handed_out = run is None
        return None if run is None else deque(map(_Item, run))

    def _half(self, hand: _Hand[T]) -> deque[_Item[T]]:
        """The latter half of what the busiest worker has left, or as much of it as this one does
        meanwhile."""
        busiest = max(self._hands.values(), key=lambda one: one.seconds_left)
        ours, theirs = hand.item_seconds, busiest.item_seconds
        known = hand.done and busiest.done and ours + theirs
        share = theirs / (ours + theirs) if known else 0.5
        all_left = len(busiest.run) + len(busiest.in_flight)
        count = min(round(share * all_left), len(busiest.run))
        return deque(reversed([busiest.run.pop() for _ in range(count)]))

    def _ended(self, worker: str, future: Future, outcome: Any) -> None:
        hand = self._hands.get(worker)
        if hand is None or future not in hand.sent:
            return  # of a worker that has left
        if isinstance(outcome, FutureCancelledError) and outcome.reason == _LOST:
            raise self._lost()
        items = hand.sent.pop(future)
        future.release()
        if isinstance(outcome, KilledWorker | CancelledError):  # nobody knows by which
            again = [item for item in items if self._may_again(item, outcome)]
        else:
            done = outcome if isinstance(outcome, _Done) else _Done([], outcome, 0.0)
            again = self._told(hand, items, done)
            if isinstance(done.error, DeviceError):
                self._spare(worker, done.error)
        if again:
            self._again.append(deque(again))
        self._fill_all() if self._again else self._fill(worker)

    def _told(self, hand: _Hand[T], items: list[_Item[T]], outcome: _Done) -> list[_Item[T]]:
        """Take what came of a task; which of its items are to be done again, or at last."""
        hand.done += len(outcome.made)
        hand.busy_seconds += outcome.seconds
        for item, found in zip(items, outcome.made, strict=False):
            self._going = self._work.finished(item.value, found) and self._going
        left = items[len(outcome.made) :]
        if outcome.error is None:
            hand.run.extendleft(reversed(left))
            return []
        failed, *rest = left
        hand.run.extendleft(reversed(rest))
        return [failed] if self._may_again(failed, outcome.error) else []

    def _spare(self, worker: str, error: DeviceError) -> None:
        """Send a worker whose device fails no more, as long as there are others: it would fail all
        that they could do."""
        if len(self._hands) > 1:
            LOG.warning("no more work is sent to %s: %s", worker, error)
            self._left(worker, expected=True)
            self._unfit.add(worker)

    def _may_again(self, item: _Item[T], error: BaseException) -> bool:
        """Whether an item that failed, or was on a worker that did, is tried once more; else it is
        told of."""
        item.failures += 1
        final = isinstance(error, ZnniError) and not isinstance(error, DeviceError)
        passing = not final and not is_full(error)
        if self._going and passing and item.failures < _TRIES:
            return True
        if isinstance(error, KilledWorker | CancelledError):
            error = _left_alone(str(error))
        self._going = self._work.finished(item.value, error) and self._going
        return False


class _Done(NamedTuple):
    """What came of a task: what was ``made`` of its items, the ``error`` of the next one if it
    failed, and the seconds that it took."""

    made: list[Any]
    error: BaseException | None
    seconds: float


def _called(calls: Sequence[Callable[[], Any]], most_seconds: float) -> _Done:
    """The task: runs on a worker, at least one item, and others as long as there is time."""
    begin, made, error = time.perf_counter(), [], None
    for call in calls:
        try:
            made.append(call())
        except Exception as failure:
            if not made:
                raise
            error = failure  # handed on, with what was made before
            break
        if time.perf_counter() - begin > most_seconds:
            break
    return _Done(made, error, time.perf_counter() - begin)


def _left_alone(worker: str) -> Exception:
    return ConnectionError(f"the worker {worker} left or died while it was made")
