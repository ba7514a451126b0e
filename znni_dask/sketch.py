"""A cluster on paper: the file that tells what its workers have, its store and its scheduler.

YAML (or JSON), for instance::

    workers:
      - {count: 900, threads: 16, memory: 60GiB, price: 0.40}
      - {count: 100, threads: 64, memory: 240GiB, speed: 1.2, price: 1.60, after: 600}
    store: {read: 40GB, write: 20GB, latency: 0.02}
    scheduler: {tasks_per_second: 120}

Only workers must be told of. docs/cluster.md says what the keys mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import yaml

from znni_dask.errors import OptionError
from znni_dask.machine import parse_bytes

TASKS_PER_SECOND = 120.0  # of one block, as `benchmarks/simulation.py` measures them
_LATENCY_SECONDS = 0.01  # of a task, from client to worker
_AT_ONCE = 10  # zarr's default `async.concurrency`
_MOST_WORKERS = 100_000
_LARGEST = 1 << 16  # bytes of a file


@dataclass(frozen=True)
class Workers:
    """So many workers, all alike. Each has so many threads, on which it computes ``speed`` times as
    fast as planned, and so much memory; it costs ``price`` an hour from when it is there, after so
    many seconds. Its link reads and writes so many bytes a second."""

    count: int
    threads: int
    memory_bytes: int
    speed: float = 1.0
    price: float = 0.0
    after_seconds: float = 0.0
    read_bytes_per_second: float = inf
    write_bytes_per_second: float = inf


@dataclass(frozen=True)
class Store:
    """So many bytes a second that all workers read and write together. A request waits
    ``latency_seconds`` for its answer, ``at_once`` of a block do so together. A chunk as stored has
    so many bytes for each of its values' (``read_ratio``, ``write_ratio``)."""

    read_bytes_per_second: float = inf
    write_bytes_per_second: float = inf
    latency_seconds: float = 0.0
    at_once: int = _AT_ONCE
    read_ratio: float = 1.0
    write_ratio: float = 1.0


@dataclass(frozen=True)
class Scheduler:
    """So many tasks a second are handed out, client and scheduler together; each begins
    ``latency_seconds`` after it was sent."""

    tasks_per_second: float = TASKS_PER_SECOND
    latency_seconds: float = _LATENCY_SECONDS


@dataclass(frozen=True)
class Sketch:
    """A cluster."""

    workers: tuple[Workers, ...]
    store: Store = Store()
    scheduler: Scheduler = Scheduler()

    @classmethod
    def read(cls, place: str | Path) -> Sketch:
        """That which a file tells of; raises `OptionError` where it cannot be one."""
        told = _mapping(f"{place}", _loaded(place), {"workers", "store", "scheduler"})
        some = told.get("workers")
        if not isinstance(some, list) or not some:
            raise OptionError(
                f"{place}: workers is {_shown(some)}: a list of groups is wanted, like "
                "[{count: 4, threads: 8, memory: 30GiB}]"
            )
        groups = [_told(Workers, f"{place}: workers {n}", one) for n, one in enumerate(some, 1)]
        if (count := sum(group.count for group in groups)) > _MOST_WORKERS:
            raise OptionError(f"{place}: {count:,} workers: {_MOST_WORKERS:,} at most")
        return cls(
            tuple(groups),
            _told(Store, f"{place}: store", told.get("store") or {}),
            _told(Scheduler, f"{place}: scheduler", told.get("scheduler") or {}),
        )

    @property
    def count(self) -> int:
        """Of all workers."""
        return sum(group.count for group in self.workers)


def _loaded(place: str | Path) -> Any:
    try:
        path = Path(place)
        if (size := path.stat().st_size) > _LARGEST:
            raise OptionError(f"{place} has {size:,} bytes: a cluster is told of in a few lines")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the cluster {place} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        found = " ".join(str(error).split())
        raise OptionError(f"the cluster {place} is not YAML: {found}") from None


def _mapping(what: str, told: Any, known: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        raise OptionError(f"{what} is {_shown(told)}: wanted are keys out of {_listed(known)}")
    if odd := [key for key in told if key not in known]:
        raise OptionError(
            f"{what} has the key {_shown(odd[0])}, which means nothing: known are {_listed(known)}"
        )
    return told


def _told(kind: Callable[..., Any], what: str, told: Any) -> Any:
    """A part of a cluster as it is told of."""
    fields = _FIELDS[kind]
    found = {}
    for key, value in _mapping(what, told, fields.keys()).items():
        name, read, wanted = fields[key]
        try:
            found[name] = read(value)
        except (OptionError, TypeError, ValueError, OverflowError):
            raise OptionError(f"{what}: {key} is {_shown(value)}: {wanted} is wanted") from None
    needed = {"count", "threads", "memory"} if kind is Workers else set()
    if missing := needed - told.keys():
        raise OptionError(f"{what} has no {_listed(missing)}: say {_listed(needed)} of every group")
    return kind(**found)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _count(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(value) or int(value) < 1:
        raise ValueError
    return int(value)


def _bytes(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    return parse_bytes(value)


def _positive(value: Any) -> float:
    if (number := _from_zero(value)) == 0:
        raise ValueError
    return number


def _from_zero(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not isfinite(number) or number < 0:
        raise ValueError
    return number


_Field = tuple[str, Callable[[Any], Any], str]  # what is meant, how it is read, what is wanted
_A_RATE = "a number of bytes a second, like 2GB,"
_RATES: dict[str, _Field] = {
    "read": ("read_bytes_per_second", _bytes, _A_RATE),
    "write": ("write_bytes_per_second", _bytes, _A_RATE),
}
_LATENCY: _Field = ("latency_seconds", _from_zero, "a number of seconds, 0 or more,")
_A_COUNT, _MORE_THAN_ZERO = "a whole number, at least one,", "a number more than 0"
_FIELDS: dict[Callable[..., Any], dict[str, _Field]] = {
    Workers: {
        "count": ("count", _count, _A_COUNT),
        "threads": ("threads", _count, _A_COUNT),
        "memory": ("memory_bytes", _bytes, "a size, like 60GiB,"),
        "speed": ("speed", _positive, _MORE_THAN_ZERO),
        "price": ("price", _from_zero, "a number, 0 or more,"),
        "after": ("after_seconds", _from_zero, "a number of seconds, 0 or more,"),
        **_RATES,
    },
    Store: {
        **_RATES,
        "latency": _LATENCY,
        "at_once": ("at_once", _count, _A_COUNT),
        "read_ratio": ("read_ratio", _positive, _MORE_THAN_ZERO),
        "write_ratio": ("write_ratio", _positive, _MORE_THAN_ZERO),
    },
    Scheduler: {
        "tasks_per_second": ("tasks_per_second", _positive, _MORE_THAN_ZERO),
        "latency": _LATENCY,
    },
}
