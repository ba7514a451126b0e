"""Several ways of doing one thing, timed side by side on a machine that others use too.

All are run in turn, round after round; a round counts only where two probes of the machine's
rate, before and after it, agree within 10 %. Medians are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from machine import flops_per_second
from znni_dask.kernels.team import Team

ROUNDS, TRIES = 5, 12
AGREE = 0.1
_LEAST_SECONDS = 0.02  # of one timing: what is shorter is repeated
_PAUSE_SECONDS = 0.05  # in which threads that wait for more work fall asleep
_SHORT_SECONDS = 0.5  # of a call: waking threads, which may take 20 ms, counts in no shorter one
_AWAKE_SECONDS = 0.05  # of calls before: meanwhile threads that wake on one core find another


@dataclass(frozen=True)
class Timing:
    """Median ``seconds`` of ``rounds``, in which ``cores`` were kept busy."""

    seconds: float
    cores: float
    rounds: int


def side_by_side(
    calls: Mapping[str, Callable[[], object]], team: Team, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """The timing of every call; nothing at all where no round was steady."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(TRIES):
        before = _rate(team)
        one = {name: _timed(call, *repeats[name]) for name, call in calls.items()}
        after = _rate(team)
        if abs(after / before - 1) <= AGREE:
            for name, timing in one.items():
                found[name].append(timing)
        if all(len(timings) == rounds for timings in found.values()):
            break
    return {
        name: Timing(median(s for s, _ in timings), median(c for _, c in timings), len(timings))
        for name, timings in found.items()
        if timings
    }


def _rate(team: Team) -> float:
    """What the machine gives just now."""
    time.sleep(_PAUSE_SECONDS)
    return flops_per_second(team)


def _repeats(call: Callable[[], object]) -> tuple[int, bool]:
    """How often to repeat a call, which this makes ready; whether to call it before."""
    call()
    seconds, _ = _timed(call, 1, False)
    return max(1, round(_LEAST_SECONDS / max(seconds, 1e-6))), seconds < _SHORT_SECONDS


def _timed(call: Callable[[], object], repeats: int, awake: bool) -> tuple[float, float]:
    """Seconds of one call, and the cores that were busy meanwhile; ``awake`` after others."""
    time.sleep(_PAUSE_SECONDS)
    begin = time.perf_counter()
    while awake and time.perf_counter() < begin + _AWAKE_SECONDS:
        call()
    begin, begin_busy = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    seconds, busy = time.perf_counter() - begin, time.process_time() - begin_busy
    return seconds / repeats, busy / seconds
