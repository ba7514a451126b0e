"""Blocks of lazy arrays: what a dask task needs to make one, and the chunks that it was handed.

All tasks of an array share one `LazyJob`, which holds the network's weights. It lies in the graph
once, under a key of its own, and there is one of it in a process, however often it arrives there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.behind import Behind
from znni_dask.errors import RunError
from znni_dask.geometry import Box
from znni_dask.job import Blocks, Job, blocks_by
from znni_dask.patches import Layout, region_of
from znni_dask.primitives.base import Array
from znni_dask.storage.stored import Stored

Values = NDArray[np.generic]
Chunks = tuple[tuple[int, ...], ...]

_PREPARED_JOBS = 2  # whose threads and memory a process keeps at a time
_computing = threading.Lock()  # one block at a time in a process, by all its threads
_finding = threading.Lock()
_recent: list[weakref.ref[LazyJob]] = []  # those that are prepared, the last one used first
_jobs: weakref.WeakValueDictionary[str, LazyJob] = weakref.WeakValueDictionary()


class Pieces:
    """Chunks of an array, seen as the whole of it: what a task was handed can be read.

    ``found`` are corners and chunks. Raises `RunError` where a chunk is not what was announced.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        found: Sequence[tuple[tuple[int, ...], tuple[int, ...], Any]],
    ) -> None:
        self.shape, self.dtype = shape, dtype
        for corner, size, chunk in found:
            if type(chunk) is not np.ndarray:
                raise RunError(
                    f"the chunk at {corner} is a {_named(type(chunk))}, not a numpy array: map it "
                    "to one before (map_blocks)"
                )
            alike = chunk.dtype.newbyteorder("=") == dtype.newbyteorder("=")
            if chunk.shape != size or not alike:
                raise RunError(
                    f"the chunk at {corner} was announced as {dtype} of shape {size}, and is "
                    f"{chunk.dtype} of shape {chunk.shape}: give the function that makes it the "
                    "right dtype, meta and chunks"
                )
        self._found = [(corner, chunk) for corner, _, chunk in found]

    def __getitem__(self, index: tuple[slice | int, ...]) -> Values:
        spans = [_span(i, n) for i, n in zip(index, self.shape, strict=True)]
        values = np.empty([b - a for a, b in spans], self.dtype)
        missing = values.size
        for corner, chunk in self._found:
            here, there = [], []
            for (a, b), first, n in zip(spans, corner, chunk.shape, strict=True):
                start, stop = max(a, first), max(min(b, first + n), max(a, first))
                here.append(slice(start - a, stop - a))
                there.append(slice(start - first, stop - first))
            part = chunk[tuple(there)]
            values[tuple(here)] = part
            missing -= part.size
        if missing:
            raise RunError(f"the task was not handed {missing} of the values that it needs")
        single = tuple(0 if isinstance(i, int) else slice(None) for i in index)
        return np.asarray(values[single])


class LazyJob:
    """What makes any block of a lazy array; there is one in a process for every ``token``.

    ``axes`` are those of the answer. ``chunks`` are the source's, None where blocks are read from
    the volume itself. ``own_threads`` says that the plan's threads were asked for; otherwise a
    worker of a cluster computes with no more than it has. ``resources`` are those that the blocks
    were annotated with.
    """

    def __init__(
        self,
        token: str,
        job: Job,
        axes: str,
        chunks: Chunks | None,
        own_threads: bool,
        resources: Mapping[str, float],
    ) -> None:
        self.token, self.job, self.axes, self.chunks = token, job, axes, chunks
        self.own_threads, self.resources = own_threads, resources
        self._blocks: Blocks | None = None
        self._corners = [[0, *accumulate(lengths)] for lengths in chunks or ()]

    def __reduce__(self) -> tuple[Any, ...]:
        rest = (self.job, self.axes, self.chunks, self.own_threads, self.resources)
        return one_in_a_process, (self.token, *rest)

    def __sizeof__(self) -> int:
        return 4 * self.job.laid.network.parameters  # by which dask weighs what moving it costs

    def make(self, time: int, block: Box, pieces: Pieces | None) -> Values:
        """One block at one time point, its axes those of the answer."""
        job = self.job
        volume = job.volume
        if pieces is not None:
            volume = replace(volume, array=Stored.of(lambda: pieces, pieces))
        behind = Behind.of(
            time,
            self.region(block),
            lambda box: volume.read_extended(box, job.laid.boundary, job.nan, time),
        )
        made = np.empty((job.laid.network.out_channels, *block.size), np.float32)

        def take(box: Box, answer: Array) -> None:
            z, y, x = box.seen_from(block.start).slices
            made[:, z, y, x] = answer

        with _computing:
            self._prepared().make(block, behind, take)
        kept = [a for a in "tczyx" if a in self.axes]
        found = made[None][tuple(slice(None) if a in kept else 0 for a in "tczyx")]
        return np.ascontiguousarray(found.transpose([kept.index(a) for a in self.axes]))

    def region(self, block: Box) -> Box:
        """The box of the volume behind a block."""
        laid = self.job.laid
        if isinstance(laid, Layout) and not self.job.plan.granules:
            return region_of(laid, block, self.job.plan.patch)
        return laid.region(block)

    def pieces(self, first: Sequence[int], counts: Sequence[int], found: Sequence[Any]) -> Pieces:
        """The source's chunks from number ``first`` (per axis) on, as many as ``counts`` says."""
        assert self.chunks is not None
        numbers = product(*(range(a, a + n) for a, n in zip(first, counts, strict=True)))
        volume = self.job.volume
        return Pieces(
            volume.array.shape,
            volume.dtype,
            [
                (
                    tuple(self._corners[axis][i] for axis, i in enumerate(place)),
                    tuple(self.chunks[axis][i] for axis, i in enumerate(place)),
                    chunk,
                )
                for place, chunk in zip(numbers, found, strict=True)
            ],
        )

    def _prepared(self) -> Blocks:
        """What computes blocks in this process; only within `_computing`."""
        others = [job for ref in _recent if (job := ref()) is not None and job is not self]
        for job in others[_PREPARED_JOBS - 1 :]:
            job._release()
        _recent[:] = [weakref.ref(job) for job in [self, *others[: _PREPARED_JOBS - 1]]]
        if self._blocks is None:
            plan = replace(self.job.plan, threads=self._threads())
            self._blocks = blocks_by(self.job.laid, plan, column_of=lambda block: block)
        return self._blocks

    def _release(self) -> None:
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    def _threads(self) -> int:
        worker = _worker()
        if self.own_threads or worker is None:
            return self.job.plan.threads
        return max(1, min(self.job.plan.threads, int(worker.state.nthreads)))


def make_block(
    job: LazyJob,
    time: int,
    block: Box,
    first: Sequence[int],
    counts: Sequence[int],
    chunks: Sequence[Any],
) -> Values:
    """The task that makes one block of a lazy array."""
    _check_resources(job.resources)
    return job.make(time, block, job.pieces(first, counts, chunks) if job.chunks else None)


def _check_resources(wanted: Mapping[str, float]) -> None:
    """Raise `RunError` on a worker that has not what the block was annotated with.

    dask forgets annotations of arrays where it fuses tasks; that must not go unseen.
    """
    worker = _worker()
    if worker is None:
        return
    there = worker.state.total_resources
    if lacking := [name for name, amount in wanted.items() if there.get(name, 0) < amount]:
        raise RunError(
            f"this block was annotated with resources {dict(wanted)} and came to the worker "
            f"{worker.name!r}, which has no {' and '.join(lacking)}: dask forgets annotations "
            "where it fuses tasks; compute within znni_dask.keep_annotations()"
        )


def _worker() -> Any:
    """The worker that runs this task; None outside a cluster."""
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:  # what it raises outside of tasks
        return None


def one_in_a_process(token: str, *rest: Any) -> LazyJob:
    """The job of that token, made of the ``rest`` where there is none in this process."""
    with _finding:
        return _jobs.setdefault(token, LazyJob(token, *rest))


def _span(index: slice | int, n: int) -> tuple[int, int]:
    if isinstance(index, int):
        return index, index + 1
    start, stop, _ = index.indices(n)
    return start, stop


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
