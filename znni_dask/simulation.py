"""A run on paper: blocks handed out, read, computed and written by workers that need not be there.

Arithmetic and events only: event by event in the order of time, as `feeding` hands blocks out. All
blocks of a run are alike. A worker computes one block at a time, and reads and writes others
meanwhile, one after another through its own link; all links share the store. The client and the
scheduler take their time for every task, one after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import ceil, inf
from typing import Any

from znni_dask.tasks import together

_MOST_EVENTS = 1_000_000  # blocks, of which each is simulated by itself; more go in bundles
COMPUTING, READING, WRITING = "computing", "reading", "writing"
SCHEDULER, END = "the scheduler", "the end"


@dataclass(frozen=True)
class Group:
    """So many workers, all alike, which are there after ``after_seconds``. Each computes a block in
    ``block_seconds``, and its link moves so many bytes a second."""

    count: int
    block_seconds: float
    after_seconds: float = 0.0
    read_bytes_per_second: float = inf
    write_bytes_per_second: float = inf


@dataclass(frozen=True)
class Shared:
    """What all workers share: so many bytes a second of the store, and the client's and the
    scheduler's time, ``task_seconds`` for every task, which begins ``latency_seconds`` after it was
    sent."""

    read_bytes_per_second: float = inf
    write_bytes_per_second: float = inf
    task_seconds: float = 0.0
    latency_seconds: float = 0.0


@dataclass(frozen=True)
class Blocks:
    """So many blocks, handed out in runs of ``run`` neighbours, ``in_flight`` of them on every
    worker at a time; several in one task where they take little time, unless they must be made
    ``in_order``. Of every block so many bytes are read and written; what its requests wait for
    answers takes ``read_seconds`` and ``write_seconds`` besides."""

    count: int
    run: int
    in_flight: int
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    in_order: bool = False


@dataclass(frozen=True)
class Simulated:
    """How a run went. ``there_seconds`` are those that the workers of every group were there, all
    together. ``busy`` is the share of that time in which a worker computed, read, wrote, or had
    nothing left to do at the end; of the scheduler the share of the run's ``seconds``. ``made``
    blocks were made by every group. Blocks went in bundles of ``bundle``."""

    seconds: float
    there_seconds: tuple[float, ...]
    made: tuple[int, ...]
    busy: Mapping[str, float]
    bundle: int = 1

    @property
    def bottleneck(self) -> str:
        """What was busy most."""
        return max(self.busy, key=lambda what: self.busy[what])


def simulate(groups: Sequence[Group], blocks: Blocks, shared: Shared) -> Simulated:
    """Make the blocks. More than a million go in bundles, which are handed out, read, computed and
    written as one block would be that takes as much: ends are drawn out by a bundle."""
    bundle = ceil(blocks.count / _MOST_EVENTS)
    if bundle > 1:
        blocks = replace(
            blocks,
            count=ceil(blocks.count / bundle),
            run=max(1, blocks.run // bundle),
            read_bytes=bundle * blocks.read_bytes,
            write_bytes=bundle * blocks.write_bytes,
            read_seconds=bundle * blocks.read_seconds,
            write_seconds=bundle * blocks.write_seconds,
        )
        groups = [replace(one, block_seconds=bundle * one.block_seconds) for one in groups]
    run = _Run(groups, blocks, shared, bundle)
    run.go()
    return run.told()


def shares(total: float, wanted: Sequence[tuple[int, float]]) -> list[float]:
    """What each of so many that share ``total`` gets, of groups (number, the most that one takes):
    as much as any other, but for those that take less.

    >>> shares(10, [(2, 1), (2, 100)])
    [1, 4.0]
    """
    found = [0.0] * len(wanted)
    left, sharing = total, sum(count for count, _ in wanted)
    for group in sorted(range(len(wanted)), key=lambda g: wanted[g][1]):
        count, most = wanted[group]
        if count:
            found[group] = min(most, left / sharing)
            left, sharing = left - count * found[group], sharing - count
    return found


class _Worker:
    """One worker, and what it has in hand."""

    __slots__ = (
        *("began", "busy", "computing", "done", "group", "last", "links", "moved", "moving"),
        *("ready", "run", "sent", "since"),
    )

    def __init__(self, group: int, now: float) -> None:
        self.group = group
        self.began = self.last = now
        self.run = 0  # blocks that are left of it
        self.sent = self.done = 0  # tasks, and blocks
        self.busy = 0.0  # seconds of all tasks that were done
        self.computing = False
        self.ready: deque[_Task] = deque()  # to be computed
        self.links: tuple[deque[_Task], deque[_Task]] = deque(), deque()  # to be read, or written
        self.moving, self.since, self.moved = [0, 0], [0.0, 0.0], [0.0, 0.0]

    def moves(self, way: int, more: int, now: float) -> None:
        """One block more, or less, is being read (0) or written (1)."""
        if more > 0 and not self.moving[way]:
            self.since[way] = now
        self.moving[way] += more
        if not self.moving[way]:
            self.moved[way] += now - self.since[way]

    def item_seconds(self, now: float) -> float:
        """What a block takes, as far as is known: not what it waits until it is sent."""
        waited = now - self.began
        return min(waited, self.busy) / self.done if self.done else waited


class _Task:
    """Blocks that were sent together, of which one after another is made: read (``way`` 0),
    computed, and written (1)."""

    __slots__ = ("began", "count", "left", "way", "worker")

    def __init__(self, worker: _Worker, count: int) -> None:
        self.worker, self.count, self.left, self.way = worker, count, count, 0
        self.began = -1.0


class _Pipe:
    """The store, one way: what moves shares it, each no faster than its worker's link."""

    def __init__(self, total: float, links: Sequence[float]) -> None:
        self._total, self._links = total, links
        self.takes_time = [min(total, link) < inf for link in links]
        self._now, self._number = 0.0, 0
        self._gone = [0.0] * len(links)  # bytes that one of a group which always moves has moved
        self._rates = [0.0] * len(links)
        self._ends: list[list[tuple[float, int, _Task]]] = [[] for _ in links]
        self.next, self._first = inf, 0

    def begin(self, now: float, nbytes: float, task: _Task) -> None:
        """Another moves so much from now on."""
        self._go_on(now)
        group = task.worker.group
        self._number += 1
        heappush(self._ends[group], (self._gone[group] + nbytes, self._number, task))
        self._share()

    def end(self) -> _Task:
        """The next that is through, at the time ``next``."""
        self._go_on(self.next)
        gone, _, task = heappop(self._ends[self._first])
        self._gone[self._first] = gone
        self._share()
        return task

    def _go_on(self, now: float) -> None:
        for group, rate in enumerate(self._rates):
            self._gone[group] += rate * (now - self._now)
        self._now = now

    def _share(self) -> None:
        ends = self._ends
        counts = [(len(some), link) for some, link in zip(ends, self._links, strict=True)]
        self._rates = rates = shares(self._total, counts)
        self.next = inf
        for group, some in enumerate(ends):
            if some:
                when = self._now + max(some[0][0] - self._gone[group], 0.0) / rates[group]
                if when < self.next:
                    self.next, self._first = when, group


class _Run:
    """What happens, in the order of time."""

    def __init__(
        self, groups: Sequence[Group], blocks: Blocks, shared: Shared, bundle: int
    ) -> None:
        self._groups, self._blocks, self._shared, self._bundle = groups, blocks, shared, bundle
        self._seconds = [group.block_seconds for group in groups]
        self._bytes = blocks.read_bytes, blocks.write_bytes
        self._waits = blocks.read_seconds, blocks.write_seconds
        self._pipes = (
            _Pipe(shared.read_bytes_per_second, [g.read_bytes_per_second for g in groups]),
            _Pipe(shared.write_bytes_per_second, [g.write_bytes_per_second for g in groups]),
        )
        self._workers: list[_Worker] = []
        self._left = blocks.count  # that are in no run yet
        self._in_runs = self._made = 0
        self._now = self._free = self._sending = 0.0  # and when the scheduler is, how long it was
        self._number = 0
        self._news: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def go(self) -> None:
        """Until all blocks are made."""
        for number, group in enumerate(self._groups):
            for _ in range(group.count):
                self._number += 1
                self._news.append((group.after_seconds, self._number, self._came, number))
        heapify(self._news)
        news, (reading, writing), count = self._news, self._pipes, self._blocks.count
        while self._made < count:
            pipe = reading if reading.next <= writing.next else writing
            if not news or pipe.next < news[0][0]:
                self._now = pipe.next
                self._through(pipe.end())
            else:
                self._now, _, then, what = heappop(news)
                then(what)

    def told(self) -> Simulated:
        """What came of it."""
        there, made = [0.0] * len(self._groups), [0] * len(self._groups)
        moved, over, computed = [0.0, 0.0], 0.0, 0.0
        for worker in self._workers:
            there[worker.group] += self._now - worker.began
            made[worker.group] += worker.done * self._bundle
            over += self._now - worker.last
            computed += worker.done * self._seconds[worker.group]
            moved = [moved[way] + worker.moved[way] for way in (0, 1)]
        total = sum(there) or inf
        busy = {
            END: over / total,
            SCHEDULER: self._sending / (self._now or inf),
            READING: moved[0] / total,
            WRITING: moved[1] / total,
            COMPUTING: computed / total,
        }
        return Simulated(self._now, tuple(there), tuple(made), busy, self._bundle)

    def _later(self, seconds: float, then: Callable[[Any], None], what: Any) -> None:
        self._number += 1
        heappush(self._news, (self._now + seconds, self._number, then, what))

    def _came(self, group: int) -> None:
        worker = _Worker(group, self._now)
        self._workers.append(worker)
        self._fill(worker)

    def _fill(self, worker: _Worker) -> None:
        """Send a worker what it may have in flight."""
        while worker.sent < self._blocks.in_flight and self._supply(worker):
            sent = self._together(worker)
            count = min(worker.run, max(sent // self._bundle, 1))
            worker.run -= count
            worker.sent += 1
            self._in_runs -= count
            spent = max(count * self._bundle / sent, 1.0) * self._shared.task_seconds
            self._sending += spent
            self._free = max(self._free, self._now) + spent
            wait = self._free - self._now + self._shared.latency_seconds
            self._later(wait, self._moves, _Task(worker, count))

    def _together(self, worker: _Worker) -> int:
        """How many blocks are sent in one task."""
        if self._blocks.in_order or not worker.done:
            return 1
        seconds, left = worker.item_seconds(self._now) / self._bundle, worker.run * self._bundle
        return together(seconds, len(self._workers), left, more=self._left > 0)

    def _supply(self, worker: _Worker) -> bool:
        """Let a worker have something, if there is anything for it."""
        if not worker.run and self._left:
            worker.run = min(self._blocks.run, self._left)
            self._left -= worker.run
            self._in_runs += worker.run
        elif not worker.run and self._in_runs:
            self._take(worker)
        return worker.run > 0

    def _take(self, worker: _Worker) -> None:
        """Half of what the busiest has left, or as much of it as this worker does meanwhile."""
        now, busiest, longest = self._now, worker, -1.0
        for one in self._workers:
            if one.run and (left := one.item_seconds(now) * one.run) > longest:
                busiest, longest = one, left
        ours, theirs = worker.item_seconds(now), busiest.item_seconds(now)
        known = worker.done and busiest.done and ours + theirs
        share = theirs / (ours + theirs) if known else 0.5
        count = min(round(share * (busiest.run + busiest.sent)), busiest.run)
        busiest.run -= count
        worker.run = count

    def _moves(self, task: _Task) -> None:
        """A block begins to be read, or written: its requests wait for answers."""
        if task.began < 0:
            task.began = self._now
        task.worker.moves(task.way, 1, self._now)
        if wait := self._waits[task.way]:
            self._later(wait, self._answered, task)
        else:
            self._answered(task)

    def _answered(self, task: _Task) -> None:
        """It goes through the worker's link, after those that came before."""
        way, worker = task.way, task.worker
        if not (self._bytes[way] and self._pipes[way].takes_time[worker.group]):
            self._moved(task)
            return
        worker.links[way].append(task)
        if len(worker.links[way]) == 1:
            self._pipes[way].begin(self._now, self._bytes[way], task)

    def _through(self, task: _Task) -> None:
        """It has gone through the link, and the next one goes."""
        link = task.worker.links[task.way]
        link.popleft()
        if link:
            self._pipes[task.way].begin(self._now, self._bytes[task.way], link[0])
        self._moved(task)

    def _moved(self, task: _Task) -> None:
        """It has been read, or written."""
        worker = task.worker
        worker.moves(task.way, -1, self._now)
        if task.way:
            self._finished(task)
        else:
            worker.ready.append(task)
            if not worker.computing:
                self._compute(worker)

    def _compute(self, worker: _Worker) -> None:
        worker.computing = True
        self._later(self._seconds[worker.group], self._computed, worker.ready.popleft())

    def _computed(self, task: _Task) -> None:
        worker = task.worker
        worker.computing = False
        if worker.ready:
            self._compute(worker)
        task.way = 1
        self._moves(task)

    def _finished(self, task: _Task) -> None:
        """A block is made; the next one of its task begins, or the worker is sent another."""
        worker = task.worker
        self._made += 1
        worker.last = self._now
        task.left -= 1
        if task.left:
            task.way = 0
            self._moves(task)
            return
        worker.sent -= 1
        worker.done += task.count
        worker.busy += self._now - task.began
        self._fill(worker)
