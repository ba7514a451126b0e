"""Transforms of whole images by FFTW, one axis at a time.

How FFTW transforms best is found by trying, for a bounded time, once per machine: what was found
("wisdom") is kept beside compiled code (see `compiled`). A transform runs on the thread that
calls it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.kernels.compiled import cache_folder, host, keep

LIBRARY_BYTES = 64 << 20  # memory that pyFFTW takes, with all it imports
_PLANNING_SECONDS = 0.5  # for every pass

Numbers = NDArray[np.float32] | NDArray[np.complex64]


class Pass(NamedTuple):
    """Transforms along one axis, from one array to another or in place; they are not scaled. A
    transform from complex to real numbers destroys its source."""

    source: Numbers
    target: Numbers
    axis: int
    backward: bool = False


@lru_cache(1 << 12)
def fast_length(least: int) -> int:
    """The shortest length, from ``least`` on, without a prime factor above 7.

    >>> [fast_length(n) for n in (1, 11, 97, 127)]
    [1, 12, 98, 128]
    """
    rest = least
    for prime in (2, 3, 5, 7):
        while rest % prime == 0:
            rest //= prime
    return least if rest == 1 else fast_length(least + 1)


def transforms(passes: Sequence[Pass]) -> list[Callable[[], None]]:
    """What computes each pass, always on the same arrays. What these hold is lost."""
    _recall(wisdom_file())
    found = [_plan(one, known=True) for one in passes]
    if None not in found:
        return [plan.execute for plan in found]
    found = [plan or _plan(one) for one, plan in zip(passes, found, strict=True)]
    _keep_wisdom(wisdom_file())
    return [plan.execute for plan in found]


def wisdom_file() -> Path:
    """Where wisdom is kept: that of other processors or versions means nothing here."""
    import pyfftw

    key = repr((host(), pyfftw.__version__))
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.wisdom"


def _plan(wanted: Pass, known: bool = False) -> Any:
    """FFTW's plan; with ``known`` None where there is no wisdom of it."""
    import pyfftw

    flags = ["FFTW_MEASURE", "FFTW_DESTROY_INPUT"]
    try:
        return pyfftw.FFTW(
            wanted.source,
            wanted.target,
            axes=(wanted.axis,),
            direction="FFTW_BACKWARD" if wanted.backward else "FFTW_FORWARD",
            flags=[*flags, "FFTW_WISDOM_ONLY"] if known else flags,
            threads=1,
            planning_timelimit=_PLANNING_SECONDS,
        )
    except RuntimeError:
        if known:
            return None
        raise


@cache
def _recall(place: Path) -> None:
    """Take up the wisdom of a file, once; what it does not hold is found anew."""
    import pyfftw

    with contextlib.suppress(OSError):  # not there yet, or not for us to read
        pyfftw.import_wisdom((b"", place.read_bytes(), b""))


def _keep_wisdom(place: Path) -> None:
    """Keep all wisdom, with what other processes have kept meanwhile."""
    import pyfftw

    _recall.__wrapped__(place)
    with contextlib.suppress(OSError):  # where nothing can be kept, every process finds its own
        keep(place, pyfftw.export_wisdom()[1])
