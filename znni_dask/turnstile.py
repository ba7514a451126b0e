"""One at a time, in order, or a few."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from znni_dask.errors import RunError


class Turnstile:
    """Lets threads through one at a time, or a few; those of several that are `coming`, the
    earliest first, where they go ``in_order``. Once it is shut, who wants through, or asks, is told
    by a `RunError`."""

    def __init__(self, in_order: bool) -> None:
        self._in_order = in_order
        self._free = threading.Condition()
        self._coming: set[int] = set()
        self._shut, self._through = False, 0
        self._inside = 0  # of all who are on the way, or beyond

    def shut(self) -> None:
        """Let nobody through any more. Waits for all who are on the way, or beyond."""
        with self._free:
            self._shut = True
            self._free.notify_all()
            self._free.wait_for(lambda: not self._inside)

    def check(self) -> None:
        """Raise `RunError` where it has been shut."""
        if self._shut:
            raise RunError("what makes it has been closed meanwhile")

    @contextmanager
    def coming(self, turn: int) -> Iterator[None]:
        """Who has this turn is on the way, or beyond, and will not come any more once this is
        left."""
        with self._free:
            self.check()
            self._coming.add(turn)
            self._inside += 1
        try:
            yield
        finally:
            with self._free:
                self._inside -= 1
                self._gone(turn)

    @contextmanager
    def through(self, turn: int, at_once: int = 1) -> Iterator[None]:
        """Wait until it is one's turn, no more than so many going through ``at_once``, several in
        any order; the next one's is when this is left."""
        with self._free:
            self._free.wait_for(
                lambda: (
                    self._shut or (self._through < at_once and (at_once > 1 or self._is_next(turn)))
                )
            )
            self.check()
            self._through += 1
        try:
            yield
        finally:
            with self._free:
                self._through -= 1
                self._gone(turn)

    def _is_next(self, turn: int) -> bool:
        return not self._in_order or turn == min(self._coming)

    def _gone(self, turn: int) -> None:
        self._coming.discard(turn)
        self._free.notify_all()
