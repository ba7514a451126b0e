"""What steps took on this machine, over what is estimated for them: kept on disk, as FFTW's wisdom.

Estimates know how seconds grow with a problem, and not how fast a machine is. So of every step
that was measured the ratio is kept, and a step is expected to be off as those measured are, most of
all those that are like it: by a Gaussian process of logarithms around their median, also known as
kriging (Krige 1951; Rasmussen and Williams 2006, section 2.2).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from math import dist
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import OutputError
from znni_dask.kernels.compiled import cache_folder, host, keep
from znni_dask.machine import CPU, GPU, cores

# As leave little error when what is known of every step in turn is told by the others:
_ALIKE = 5.0  # how far apart features of problems are that are off alike
_SAME = 0.3  # and those of problems that are nearly the same,
_OWN = 0.1  # which share so much more: variance over that of all problems
_NOISE = 0.02  # the same of what is measured twice of one problem
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """How many times longer than estimated a step took: of a ``family`` of primitives, with so
    many ``threads``; ``features`` of the problem as of `Primitive.features`."""

    family: str
    threads: int
    features: tuple[float, ...]
    ratio: float

    def is_like(self, other: Timing) -> bool:
        """Whether another tells nearly the same."""
        alike = self.family == other.family and self.threads == other.threads
        return alike and dist(self.features, other.features) < _SAME


@dataclass(frozen=True)
class Timings:
    """All that was measured. Of a number of threads with which nothing was, that of the next one
    counts."""

    found: tuple[Timing, ...] = ()

    def tell_of(self, device: str) -> bool:
        """Whether anything was measured of a device, or of both that compute together."""
        known = {timing.family.startswith(f"{GPU} ") for timing in self.found}
        return known >= {CPU: {False}, GPU: {True}}.get(device, {False, True})

    def ratio(self, family: str, threads: int, features: tuple[float, ...]) -> float:
        """How many times longer than estimated a step is expected to take; 1 where no primitive of
        its family was measured."""
        known = self._known.get(family)
        if known is None:
            return 1.0
        nearest = min(known, key=lambda count: abs(count - threads))
        return known[nearest].ratio(np.array(features))

    def joined(self, others: Iterable[Timing]) -> Timings:
        """These and others, which replace those of the same problem."""
        found = {(t.family, t.threads, t.features): t for t in (*self.found, *others)}
        return Timings(tuple(found.values()))

    def refined(self, others: Iterable[Timing]) -> Timings:
        """These and others, which replace all that are nearly of the same problem: of however many
        runs, no more are kept than there are kinds of problems."""
        others = tuple(others)
        return Timings((*(t for t in self.found if not any(map(t.is_like, others))), *others))

    @cached_property
    def _known(self) -> Mapping[str, Mapping[int, _Known]]:
        groups: dict[str, dict[int, list[Timing]]] = {}
        for one in self.found:
            groups.setdefault(one.family, {}).setdefault(one.threads, []).append(one)
        return {
            family: {threads: _Known.of(some) for threads, some in by_threads.items()}
            for family, by_threads in groups.items()
        }


class _Known(NamedTuple):
    """What is known of a family: the features of what was measured, what each counts, and the
    median of the logarithms."""

    places: _Floats
    weights: _Floats
    median: float

    @classmethod
    def of(cls, some: list[Timing]) -> _Known:
        """By its timings."""
        places = np.array([one.features for one in some])
        logarithms = np.log([one.ratio for one in some])
        median = float(np.median(logarithms))
        alike = np.array([_alike(places, place) for place in places]) + _NOISE * np.eye(len(some))
        weights = np.asarray(np.linalg.solve(alike, logarithms - median), np.float64)
        return cls(places, weights, median)

    def ratio(self, place: _Floats) -> float:
        """What is expected of a problem."""
        return float(np.exp(self.median + _alike(self.places, place) @ self.weights))


def _alike(places: _Floats, place: _Floats) -> _Floats:
    """How much what was measured tells of a problem."""
    apart = -((places - place) ** 2).sum(axis=1) / 2
    found: _Floats = np.exp(apart / _ALIKE**2) + _OWN * np.exp(apart / _SAME**2)
    return found


def machine() -> dict[str, object]:
    """What timings belong to: the processor as compilers see it, its cores, and the programs."""
    target = host()
    return {
        "processor": target.cpu,
        "features": hashlib.sha256(target.features.encode()).hexdigest()[:16],
        "system": platform.system(),
        "cores": cores(),
        "znni_dask": version("znni_dask"),
    }


def place() -> Path:
    """Where the timings of this machine are kept: in the file that ``$ZNNI_TIMINGS`` names, by
    default beside compiled code."""
    if chosen := os.environ.get("ZNNI_TIMINGS"):
        return Path(chosen)
    fingerprint = hashlib.sha256(json.dumps(machine()).encode()).hexdigest()[:16]
    return cache_folder() / f"timings-{fingerprint}.json"


def kept() -> Timings:
    """The timings of this machine; none where nothing was measured, or it cannot be read."""
    try:
        told = json.loads(place().read_text(encoding="utf-8"))
        return Timings(
            tuple(
                Timing(str(t["family"]), int(t["threads"]), tuple(t["features"]), float(t["ratio"]))
                for t in told["timings"]
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Timings()


def keep_timings(timings: Timings) -> Path:
    """Keep the timings of this machine; raises `OutputError` where they cannot be."""
    told = {"machine": machine(), "timings": [asdict(one) for one in timings.found]}
    there = place()
    try:
        keep(there, json.dumps(told, indent=1).encode())
    except OSError as error:
        raise OutputError(
            f"timings cannot be kept in {there}: {error}; ZNNI_TIMINGS may name another file"
        ) from None
    return there
