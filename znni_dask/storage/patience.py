"""What a store refuses is asked for again, as stores recover: a file system that is not mounted for
a moment, a server that is restarted."""

from __future__ import annotations

import errno
from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

from znni_dask.errors import is_full
from znni_dask.storage.clouds import is_overloaded, is_unreachable, refusals

T = TypeVar("T")
_SECONDS = 60.0  # since a store last gave what it was asked for
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


_PASSING = {  # of file systems and stores that are elsewhere
    *(errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO),
}


def is_passing(error: Exception) -> bool:
    """Whether what refuses may be there again soon: not where something is damaged, missing or
    forbidden."""
    own = isinstance(error, OSError) and error.errno in _PASSING
    return own or is_unreachable(error) or is_overloaded(error)


class Patience:
    """Asks again for what a store refuses, if that is ``passing``, for a minute at most, and no
    longer than a minute after anything succeeded: when that is over every refusal counts at once,
    until something succeeds. Where the disk is full it is not asked again. Several threads may
    ask."""

    def __init__(self, passing: Callable[[Exception], bool] = lambda _: True) -> None:
        self._passing = passing
        self._refused: float | None = None  # since when

    def __call__(self, do: Callable[[], T]) -> T:
        """What ``do`` gives, in the end."""
        pause, first = _FIRST_PAUSE, None
        while True:
            try:
                found = do()
            except refusals() as error:
                if is_full(error) or not self._passing(error):
                    raise
                now = monotonic()
                first = first or now
                since = self._refused = self._refused or first
                if now + pause > min(first, since) + _SECONDS:
                    raise
                sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._refused = None
                return found
