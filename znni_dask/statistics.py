"""The statistics of a whole volume, by one or two passes over it in bounded memory.

Workers look at boxes fixed by the volume alone; what they find is added up exactly (counts, and
sums as fractions), so that the result does not depend on workers, their number or order. Values
count as networks see them, as float32; those that are not finite do not count.

Percentiles are exact order statistics: those of integers of up to 16 bits are read from a
histogram of all values; others are sorted by the upper half of their 32 bits in one pass and, of
the few values that then remain in question, by the lower half in another.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial, reduce
from itertools import islice
from operator import add
from typing import Any

import numpy as np
from distributed import WorkerPlugin, get_worker
from numpy.typing import NDArray

from znni_dask.cluster import Cluster, Crew, Means, on_workers
from znni_dask.errors import MemoryLimitError, RunError, VolumeError
from znni_dask.feeding import Work, feed
from znni_dask.geometry import Box, Size, ceil_divide, text, tiles, triple, volume
from znni_dask.machine import show_bytes
from znni_dask.normalization import Normalization, Statistics
from znni_dask.resources import MOST_BLOCKS_IN_FLIGHT, OVERHEAD_BYTES
from znni_dask.storage.volume import Volume

_BOX = 1 << 21  # voxels read at a time, or one chunk where that is more
_MOST_BOXES = 1 << 10  # that one task looks at
_TASKS = 16  # for each worker, where there are enough boxes
_PIECE = 1 << 18  # values looked at at a time
_PIECE_BYTES = 48  # memory that looking at a value takes at most
_BINS = 1 << 16
_LOWER = 16  # bits of a value that the second pass looks at
_MOST_RANKS = 4  # values between which two percentiles lie

Question = Callable[[int, NDArray[Any]], Any]  # of a channel and some of its values; answers add up


@dataclass(frozen=True)
class Measured:
    """Statistics, and the memory that the process was predicted to take meanwhile."""

    statistics: Statistics
    predicted_bytes: int


def measure(
    cluster: Cluster, crew: Crew, source: Volume, nan: float | None, wanted: Normalization
) -> Measured:
    """The statistics by which a volume is normalised, taken by the workers of a crew.

    Raises `MemoryLimitError` where not even one box can be read, and `VolumeError` where values
    cannot be read, are not finite (and ``nan`` does not replace them), or are all the same.
    """
    in_flight, predicted = _in_flight(source, crew.kinds[0])
    needed = Means(1, predicted, crew.kinds[0].baseline_bytes)
    survey = _Survey(cluster, crew, source, nan is not None, in_flight, needed)
    find = {"zscore": _deviations, "range": _extremes, "percentile": _percentiles}[wanted.method]
    with on_workers(cluster.client, survey.surveyor):
        found = [_checked(find(survey, time, wanted), survey, time) for time in range(source.times)]
    offset = tuple(tuple(offset for offset, _ in channels) for channels in found)
    scale = tuple(tuple(scale for _, scale in channels) for channels in found)
    return Measured(Statistics(offset, scale), predicted)


def check_alike(source: Volume, surveyed: Volume) -> None:
    """Raise `VolumeError` where the statistics of one volume cannot be those of another."""
    if (source.channels, source.times) != (surveyed.channels, surveyed.times):
        raise VolumeError(
            f"{surveyed.path}: the level of which statistics are wanted has {surveyed.channels} "
            f"channels at {surveyed.times} times, the volume {source.channels} at {source.times}"
        )


def boxes(source: Volume) -> Size:
    """The size of the boxes that are looked at: whole chunks, grown until they are large."""
    size = source.size
    edges = [min(c, n) for c, n in zip(source.chunks or (1, 1, 1), size, strict=True)]
    while volume(triple(edges)) < _BOX and edges != list(size):
        shortest = min((i for i in range(3) if edges[i] < size[i]), key=lambda i: edges[i])
        edges[shortest] = min(2 * edges[shortest], size[shortest])
    return triple(edges)


def _in_flight(source: Volume, means: Means) -> tuple[int, int]:
    """How many boxes may be looked at at a time, and the memory that this takes."""
    box = boxes(source)
    tables = (
        8 * _BINS * _MOST_RANKS * source.channels
    )  # those of a piece, a box and a task, and a sum
    each = source.read_bytes(box) + _PIECE * _PIECE_BYTES + 4 * tables
    base, allowed_bytes = means.baseline_bytes + OVERHEAD_BYTES + 2 * tables, means.allowed_bytes
    fitting = min((allowed_bytes - base) // each, MOST_BLOCKS_IN_FLIGHT)
    if fitting < 1:
        needed = show_bytes(base + each, enough=True)
        raise MemoryLimitError(
            f"the statistics of {source.path} are taken in boxes of {text(box)} voxels, which need "
            f"{needed}, {show_bytes(allowed_bytes)} are allowed: allow at least {needed}"
        )
    return fitting, base + fitting * each


class _Surveyor(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Lives on a worker and looks at boxes there, one after the other."""

    def __init__(self, source: Volume, replaced: bool) -> None:
        self.name = f"znni-{uuid.uuid4().hex}"
        self._source, self._replaced = source, replaced

    def look(self, question: Question, time: int, boxes: Sequence[Box]) -> list[Any]:
        """What the values of every channel in some boxes answer to a question."""
        return reduce(_together, (self._look(question, time, box) for box in boxes))

    def _look(self, question: Question, time: int, box: Box) -> list[Any]:
        if self._replaced:
            values = self._source.read(box, time)
        else:
            values = self._source.read_extended(box, "valid", None, time)  # tells of NaN
        return [
            reduce(add, (question(channel, piece) for piece in _pieces(values[channel])))
            for channel in range(len(values))
        ]


def _look(name: str, question: Question, time: int, boxes: Sequence[Box]) -> list[Any]:
    """The task: runs on a worker, where the plugin lives."""
    surveyor: _Surveyor = get_worker().plugins[name]
    return surveyor.look(question, time, boxes)


def _together(some: list[Any], more: list[Any]) -> list[Any]:
    """The answers of all channels, added up."""
    return [a + b for a, b in zip(some, more, strict=True)]


def _pieces(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The values that count, some at a time: small integers as they are, others as float32."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if not _small(piece.dtype):
            with np.errstate(over="ignore"):
                piece = piece.astype(np.float32, copy=False)
            piece = piece[np.isfinite(piece)]
        yield piece


def _small(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "bui" and dtype.itemsize <= 2


class _Survey:
    """Questions put to all values of a volume."""

    def __init__(
        self,
        cluster: Cluster,
        crew: Crew,
        source: Volume,
        replaced: bool,
        in_flight: int,
        needed: Means,
    ) -> None:
        self.source = source
        self.surveyor = _Surveyor(source, replaced)
        self._cluster, self._crew = cluster, crew
        self._in_flight, self._needed = in_flight, needed

    def ask(self, question: Question, time: int) -> list[Any]:
        """What the values of every channel at a time point answer together."""
        answers: list[list[Any]] = []
        failures: list[tuple[Size, BaseException]] = []

        def look(_: str, some: Sequence[Box]) -> Callable[[], list[Any]]:
            return partial(_look, self.surveyor.name, question, time, some)

        def finished(some: Sequence[Box], outcome: Any) -> bool:
            if isinstance(outcome, BaseException):
                failures.append((some[0].start, outcome))
                return False
            answers[:] = [_together(answers[0], outcome) if answers else outcome]
            return True

        def takes(_: str, means: Means) -> bool:
            return means.suffice_for(self._needed)

        runs = ([some] for some in self._shares())
        feed(self._cluster, self._crew, Work(runs, self._in_flight, look, finished, takes))
        if failures:
            _, error = min(failures, key=lambda failure: failure[0])
            if isinstance(error, RunError):
                raise VolumeError(f"while its statistics were taken: {error}") from error
            if isinstance(error, OSError):
                raise RunError(f"while its statistics were taken: {error}") from error
            raise error
        return answers[0]

    def _shares(self) -> Iterator[list[Box]]:
        """The boxes that one task looks at, in turn: the more the fewer workers there are for them,
        as every task answers at once for all of its own."""
        size, box = self.source.size, boxes(self.source)
        count = volume(triple(map(ceil_divide, size, box)))
        each = min(ceil_divide(count, _TASKS * self._crew.workers), _MOST_BOXES)
        left = tiles(size, box)
        return iter(lambda: [*islice(left, each)], [])


@dataclass(frozen=True)
class _Spread:
    """Count, exact sums of values and of their squares, and extremes of some values."""

    count: int
    total: Fraction
    squares: Fraction
    low: float
    high: float

    @classmethod
    def of(cls, channel: int, values: NDArray[Any]) -> _Spread:
        """Those of an array. The squares are taken around its mean, lest they swamp it."""
        if values.size == 0:
            return cls(0, Fraction(0), Fraction(0), math.inf, -math.inf)
        low, high = float(values.min()), float(values.max())
        exact = values.astype(np.float64)
        mean = float(exact.mean())
        exact -= mean
        around = float(np.square(exact, out=exact).sum())
        total = values.size * Fraction(mean)
        return cls(values.size, total, Fraction(around) + total * Fraction(mean), low, high)

    def __add__(self, other: _Spread) -> _Spread:
        return _Spread(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            min(self.low, other.low),
            max(self.high, other.high),
        )


Found = list[tuple[float, float] | None]  # for every channel offset and scale; None: no values


def _deviations(survey: _Survey, time: int, wanted: Normalization) -> Found:
    """Mean and standard deviation."""
    found: Found = []
    for spread in survey.ask(_Spread.of, time):
        if spread.count == 0:
            found.append(None)
            continue
        mean = spread.total / spread.count
        variance = spread.squares / spread.count - mean * mean
        same = spread.low == spread.high
        found.append((float(mean), 0.0 if same else math.sqrt(variance)))
    return found


def _extremes(survey: _Survey, time: int, wanted: Normalization) -> Found:
    """Minimum, and maximum beyond it."""
    return [
        (spread.low, spread.high - spread.low) if spread.count else None
        for spread in survey.ask(_Spread.of, time)
    ]


def _percentiles(survey: _Survey, time: int, wanted: Normalization) -> Found:
    """A lower percentile, and a higher one beyond it; as numpy interpolates them, linearly."""
    counts = survey.ask(_upper, time)
    ranks = [_ranks(int(table.sum()), wanted.percentiles) for table in counts]
    bins = [_bins(table, needed) for table, needed in zip(counts, ranks, strict=True)]
    if _small(survey.source.dtype):
        least = int(_least(survey.source.dtype))
        values = [{rank: float(least + place) for rank, (place, _) in b.items()} for b in bins]
    else:
        halves = tuple(tuple(sorted({place for place, _ in b.values()})) for b in bins)
        tables = survey.ask(partial(_lower, halves), time)
        values = [
            {
                rank: _value(upper, _bins(table[half.index(upper)], [rest])[rest][0])
                for rank, (upper, rest) in b.items()
            }
            for b, half, table in zip(bins, halves, tables, strict=True)
        ]
    found: Found = []
    for table, sorted_values in zip(counts, values, strict=True):
        if not sorted_values:
            found.append(None)
            continue
        low, high = (_between(sorted_values, int(table.sum()), p) for p in wanted.percentiles)
        found.append((low, high - low))
    return found


def _place(count: int, percentile: float) -> Fraction:
    """Where among ``count`` sorted values a percentile lies."""
    return Fraction(percentile) / 100 * (count - 1)


def _ranks(count: int, percentiles: Sequence[float]) -> list[int]:
    """Of the sorted values those between which the percentiles lie."""
    if count == 0:
        return []
    places = [_place(count, p) for p in percentiles]
    return sorted({end for p in places for end in (math.floor(p), math.ceil(p))})


def _between(values: dict[int, float], count: int, percentile: float) -> float:
    place = _place(count, percentile)
    low, high = values[math.floor(place)], values[math.ceil(place)]
    share = float(place - math.floor(place))
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def _bins(table: NDArray[np.int64], ranks: Sequence[int]) -> dict[int, tuple[int, int]]:
    """For every rank the bin of a histogram that holds it, and its rank among those in there."""
    ends = np.cumsum(table)
    places = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    return {r: (p, r - int(ends[p] - table[p])) for r, p in zip(ranks, places, strict=True)}


def _least(dtype: np.dtype[Any]) -> int:
    return 0 if dtype.kind == "b" else int(np.iinfo(dtype).min)


def _keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Whole numbers in the order of the values."""
    bits = values.view(np.uint32)
    return np.where(bits >> 31 != 0, ~bits, bits | np.uint32(1 << 31))


def _value(upper: int, lower: int) -> float:
    """The value whose key has these halves."""
    key = upper << _LOWER | lower
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def _upper(channel: int, values: NDArray[Any]) -> NDArray[np.int64]:
    """How often small integers, and the upper halves of the keys of others, occur."""
    if _small(values.dtype):
        places = values.astype(np.int64) - _least(values.dtype)
    else:
        places = (_keys(values) >> _LOWER).astype(np.int64)
    return np.bincount(places, minlength=_BINS)


def _lower(
    halves: Sequence[Sequence[int]], channel: int, values: NDArray[np.float32]
) -> NDArray[np.int64]:
    """How often lower halves of keys occur with each of a channel's upper ``halves``."""
    keys = _keys(values)
    upper, lower = keys >> _LOWER, (keys & (_BINS - 1)).astype(np.int64)
    found = [np.bincount(lower[upper == half], minlength=_BINS) for half in halves[channel]]
    return np.stack(found) if found else np.zeros((0, _BINS), np.int64)


def _checked(found: Found, survey: _Survey, time: int) -> list[tuple[float, float]]:
    """The ends of all channels; raises `VolumeError` where one cannot be normalised."""
    usable = []
    for channel, ends in enumerate(found):
        where = f"channel {channel} at time point {time} of {survey.source.path}"
        if ends is None:
            raise VolumeError(f"{where} holds no finite value: it cannot be normalised")
        offset, scale = ends
        with np.errstate(over="ignore"):
            divisor = np.float32(scale)
        if not (divisor > 0 and np.isfinite(divisor)):
            raise VolumeError(
                f"{where} cannot be normalised: what its values would be divided by is "
                f"{float(divisor):g} (they are all the same, {offset:g}, or nearly all): choose "
                "another way to normalise, or none"
            )
        usable.append(ends)
    return usable
