"""The graph of a lazy answer: one task a block, which names the source's chunks that it needs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from math import ceil
from typing import TYPE_CHECKING, Any

from znni_dask import timings
from znni_dask.application import Application
from znni_dask.costs import Costs
from znni_dask.errors import NetworkError
from znni_dask.geometry import Box, Size, multiply, round_up, triple
from znni_dask.job import Job
from znni_dask.lazy import Chunks, LazyJob, make_block, one_in_a_process
from znni_dask.machine import anonymous_bytes
from znni_dask.options import allowed_bytes, computing_threads
from znni_dask.passes import plan_for
from znni_dask.patches import Layout, source_box
from znni_dask.primitives.base import ITEM_BYTES
from znni_dask.resources import Resources
from znni_dask.storage.encoding import Encoding
from znni_dask.windows import Laid

if TYPE_CHECKING:
    from dask.array import Array
    from dask.delayed import Delayed

_LEAST = 128  # voxels along the chunks of an answer, unless told: smaller ones are mostly halo


@dataclass(frozen=True, eq=False, kw_only=True)
class Asked:
    """What is applied to what, and what is asked for beside the answer.

    ``array`` is the dask array that the application's volume stands for; None where blocks read
    the volume themselves. ``memory`` and ``threads`` are as the user gave them.
    """

    application: Application
    array: Array | None
    chunks: Size | None
    patch: Size | None
    memory: str | float | None
    threads: int | None

    def answer(self, names: tuple[str, ...]) -> dict[str, Array]:
        """The answers of outputs that are made in one pass, as dask arrays of `axes_of` them."""
        from dask.array import Array
        from dask.base import tokenize
        from dask.highlevelgraph import HighLevelGraph

        laid, volume = self.application.laid(*names), self.application.volume
        chunks = self._chunks_of(laid)
        source = self._merged(laid, chunks)
        job = self.job(names, chunks, None if source is None else source.chunks)
        axes, shared = job.axes, delayed_job(job)
        name = "znni-infer-" + tokenize(self._told(names, chunks), source)
        tasks = {
            (name, *(place.get(a, 0) for a in axes)): task
            for place, task in _tasks(job, shared.key, source, chunks)
        }
        graph = HighLevelGraph.from_collections(
            name, tasks, dependencies=[shared] if source is None else [shared, source]
        )
        grid = {"t": (1,) * volume.times, "c": (laid.network.out_channels,)}
        for a, n, c in zip("zyx", laid.output_size, chunks, strict=True):
            grid[a] = tuple(min(c, n - start) for start in range(0, n, c))
        made = Array(graph, name, tuple(grid[a] for a in axes), dtype="float32")
        return self._parted(made, axes, names)

    def job(self, names: tuple[str, ...], chunks: Size, source: Chunks | None) -> LazyJob:
        """What the tasks share that make blocks of size ``chunks`` of these outputs."""
        from dask.base import tokenize

        laid, volume = self.application.laid(*names), self.application.volume
        axes = axes_of(volume.axes, laid.network.out_channels)
        if "z" not in axes and laid.output_size[0] > 1:
            raise NetworkError(
                f"of one section the network makes {laid.output_size[0]}, for which there is no "
                f"axis (axes {volume.axes}): give the volume a z axis"
            )
        plan, _ = plan_for(laid, self._resources(laid, chunks), self.patch)
        # what a block reads depends on its patches; its name and its values do not
        token = tokenize(self._told(names, chunks), source, plan.patch, plan.granules)
        job = Job(laid, volume, self.application.selection, self.application.nan, plan)
        own = self.threads is not None
        return one_in_a_process(token, job, axes, source, own, _resources_annotated())

    def _told(self, names: tuple[str, ...], chunks: Size) -> object:
        """What was asked for: by it arrays are told apart."""
        described = [self.application.described(name, Encoding()) for name in names]
        how = (chunks, self.patch, self.memory, self.threads, _resources_annotated())
        return described, self.application.defining, how

    def _resources(self, laid: Laid, chunks: Size) -> Resources:
        return Resources(
            unit=chunks,
            voxel_bytes=ITEM_BYTES * laid.network.out_channels,
            encoding_bytes=0,
            read_bytes=self.application.volume.read_bytes,
            write_bytes=0,
            baseline_bytes=anonymous_bytes(),
            allowed_bytes=allowed_bytes(self.memory),
            threads=computing_threads(self.threads),
            hull=Box((0, 0, 0), laid.output_size),
            block=chunks,
            in_order=False,
            costs=Costs(timings.kept()),
        )

    def _chunks_of(self, laid: Laid) -> Size:
        """Chunks of an answer: those asked for, else a whole number of the source's."""
        if self.chunks is not None:
            return triple(min(c, n) for c, n in zip(self.chunks, laid.output_size, strict=True))
        seen, step = (1, 1, 1), (1, 1, 1)
        if isinstance(laid, Layout):
            seen = laid.geometry.field_of_view
            step = multiply(laid.fragments, laid.periods)
        else:
            seen = laid.window
        return triple(
            min(n, round_up(ceil(round_up(max(_LEAST, f), base) / stride), s))
            for n, f, base, stride, s in zip(
                laid.output_size, seen, self._stored, laid.output_stride, step, strict=True
            )
        )

    @cached_property
    def _stored(self) -> Size:
        """The longest chunks of the source, (z, y, x)."""
        volume = self.application.volume
        if self.array is None:
            return volume.chunks or (_LEAST,) * 3
        longest = dict(zip(volume.axes, map(max, self.array.chunks), strict=True))
        return triple(longest.get(a, 1) for a in "zyx")

    def _merged(self, laid: Laid, chunks: Size) -> Array | None:
        """The dask array, its chunks merged where they are smaller than what blocks stand for, so
        that no block needs more than a few."""
        if self.array is None:
            return None
        wanted = {
            self.application.volume.axes.index(a): round_up(ceil(c * stride), base)
            for a, c, stride, base in zip(
                "zyx", chunks, laid.output_stride, self._stored, strict=True
            )
            if ceil(c * stride) > base
        }
        return self.array.rechunk(wanted) if wanted else self.array

    def _parted(self, made: Array, axes: str, names: tuple[str, ...]) -> dict[str, Array]:
        """The outputs of a pass, whose channels stand behind one another."""
        if len(names) == 1:
            return {names[0]: made}
        found, first = {}, 0
        for name in names:
            count = self.application.laid(name).network.out_channels
            own = axes_of(self.application.volume.axes, count)
            part = slice(first, first + count) if "c" in own else first
            found[name] = made[tuple(part if a == "c" else slice(None) for a in axes)]
            first += count
        return found


def _resources_annotated() -> dict[str, float]:
    """The resources that `dask.annotate` asks for here."""
    import dask

    found = dask.get_annotations().get("resources")
    return dict(found) if isinstance(found, Mapping) else {}


def axes_of(source: str, channels: int) -> str:
    """The axes of an answer of so many channels: the source's, and one of channels before those
    of space where the answer has several and the source has no such axis.

    >>> axes_of("tzyx", 3)
    'tczyx'
    """
    if "c" in source or channels == 1:
        return source
    first = min(source.index(a) for a in "zyx" if a in source)
    return source[:first] + "c" + source[first:]


def delayed_job(job: LazyJob) -> Delayed:
    """The job as a task of its own, which others name: so it travels once, not with every block."""
    from dask import delayed

    return delayed(job, name=f"znni-job-{job.token}", pure=True, traverse=False)


def _tasks(
    job: LazyJob, key: str, source: Array | None, chunks: Size
) -> Iterator[tuple[dict[str, int], tuple[Any, ...]]]:
    """For every block its number along t, z, y, x, and its task."""
    laid, volume = job.job.laid, job.job.volume
    spans = [
        [(a, min(a + c, n)) for a in range(0, n, c)]
        for n, c in zip(laid.output_size, chunks, strict=True)
    ]
    needed = Needed(job, source)
    for time, *place in product(range(volume.times), *(range(len(s)) for s in spans)):
        start, stop = zip(*(s[i] for s, i in zip(spans, place, strict=True)), strict=True)
        block = Box(triple(start), triple(stop))
        number = dict(zip("tzyx", (time, *place), strict=True))
        yield number, (make_block, key, time, block, *needed.by(time, block))


class Needed:
    """Which of a source's chunks stand behind a block; found for every axis on its own."""

    def __init__(self, job: LazyJob, source: Array | None) -> None:
        self._job, self._axes, self._source = job, job.job.volume.axes, source
        chunks = () if source is None else source.chunks
        self._ends = [list(accumulate(lengths)) for lengths in chunks]
        self._found: dict[tuple[int, int, int], tuple[int, int]] = {}

    def by(self, time: int, block: Box) -> tuple[Any, ...]:
        """Number of the first chunk and count, along every axis of the source, and their keys."""
        if self._source is None:
            return (), (), []
        spans = {"t": (time, time + 1)}
        for i, axis in enumerate("zyx"):
            spans[axis] = self.behind(i, block.start[i], block.stop[i])
        first, counts = [], []
        for axis, ends in zip(self._axes, self._ends, strict=True):
            begin, end = spans.get(axis, (0, ends[-1]))  # of channels all
            first.append(bisect_right(ends, begin))
            counts.append(bisect_right(ends, end - 1) - first[-1] + 1)
        numbers = product(*(range(a, a + n) for a, n in zip(first, counts, strict=True)))
        return tuple(first), tuple(counts), [(self._source.name, *n) for n in numbers]

    def behind(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """The stretch of the volume behind outputs ``[start, stop)``."""
        key = (axis, start, stop)
        if key not in self._found:
            low, high = [0, 0, 0], [1, 1, 1]
            low[axis], high[axis] = start, stop
            region = self._job.region(Box(triple(low), triple(high)))
            laid = self._job.job.laid
            stored = source_box(region, laid.size, laid.boundary)
            assert stored is not None  # outputs lie within the volume
            self._found[key] = stored.start[axis], stored.stop[axis]
        return self._found[key]
