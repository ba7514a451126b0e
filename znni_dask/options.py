"""Options as users give them, checked: what running and lazy arrays have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from znni_dask.devices.opening import DEVICES, Wanted
from znni_dask.errors import OptionError
from znni_dask.geometry import Size, triple
from znni_dask.machine import CPU, available_bytes, cores, parse_bytes
from znni_dask.normalization import Normalization
from znni_dask.plan import Plan
from znni_dask.windows import Patchwise

SHARE_OF_FREE = 0.8  # of the free memory, when no limit is given


def size(name: str, value: Size | int | None) -> Size | None:
    """An option given as (z, y, x) or as one number; raises `OptionError`."""
    if value is None:
        return None
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    least = 0 if name == "halo" else 1
    whole = all(isinstance(v, int | np.integer) and v >= least for v in values)
    if len(values) != 3 or not whole:
        kind = "whole numbers, not negative," if least == 0 else "positive whole numbers"
        raise OptionError(f"{name} {value!r} is no size: give three {kind} z, y, x")
    return triple(values)


def windows(
    window: Size | None, overlap: float, weights: str, step: Size | None
) -> Patchwise | None:
    """How windows are laid, where any are wanted; raises `OptionError`."""
    if window is None:
        if step is not None:
            raise OptionError("step is the distance of windows: give their size with patchwise")
        return None
    return Patchwise(window, overlap, weights, step)


def normalization(
    method: str, percentiles: Sequence[float], level: int | str | None
) -> Normalization | None:
    """How the volume is normalised, where that is wanted; raises `OptionError`."""
    try:
        low, high = (float(p) for p in percentiles)
    except (TypeError, ValueError):
        raise OptionError(
            f"percentiles {percentiles!r}: two numbers are wanted, as in 1, 99"
        ) from None
    if method != "none":
        return Normalization(method, (low, high), level)
    if level is not None:
        raise OptionError(
            f"stats_level {level} is for statistics, and nothing is normalised: say how with "
            "normalize"
        )
    return None


def check_replacement(nan: float | None) -> None:
    """Raise `OptionError` where NaN would be replaced by what is no number."""
    if nan is not None and not np.isfinite(nan):
        raise OptionError(f"nan={nan} replaces NaN by what is no number: give a finite value")


def plans(
    plan: str | Path | Plan | Sequence[Plan] | None, patch: object, threads: object
) -> tuple[Plan, ...]:
    """Plans that were given back, one for every pass; raises `OptionError`."""
    if plan is None:
        return ()
    if patch is not None or threads is not None:
        raise OptionError("a plan says what patch and threads are: give either")
    if isinstance(plan, Plan):
        return (plan,)
    if not isinstance(plan, str | Path):
        return tuple(plan)
    try:
        return Plan.several_from_json(Path(plan).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the plan {plan} cannot be read: {error}") from None


def check_means(memory: str | float | None, threads: int | None) -> None:
    """Raise `OptionError` where there can be no such memory or threads."""
    if memory is not None:
        parse_bytes(memory)
    computing_threads(threads)


def device(name: str, memory: str | float | None) -> Wanted:
    """The device asked for; raises `OptionError`."""
    if name not in DEVICES:
        raise OptionError(f"device {name!r} is not known: choose {', '.join(DEVICES)}")
    if memory is not None and name == CPU:
        raise OptionError("device_memory is the GPU's, and device='cpu' uses none")
    return Wanted(name, None if memory is None else parse_bytes(memory))


def allowed_bytes(memory: str | float | None) -> int:
    """The memory asked for, 80 % of what is free where none is; raises `OptionError`."""
    return parse_bytes(memory) if memory is not None else int(SHARE_OF_FREE * available_bytes())


def computing_threads(threads: int | None) -> int:
    """The threads asked for, all cores where none are; raises `OptionError`."""
    if threads is None:
        return cores()
    if not isinstance(threads, int) or threads < 1:
        raise OptionError(f"threads {threads!r}: a whole number is wanted, at least one")
    return threads
