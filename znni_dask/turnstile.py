"""One at a time, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turnstile:
    """Lets threads through one at a time; those of several that are `coming`, the earliest first,
    where they go ``in_order``."""

    def __init__(self, in_order: bool) -> None:
        self._in_order = in_order
        self._free = threading.Condition()
        self._coming: set[int] = set()
        self._taken = False

    @contextmanager
    def coming(self, turn: int) -> Iterator[None]:
        """Who has this turn is on the way, and will not come any more once this is left."""
        with self._free:
            self._coming.add(turn)
        try:
            yield
        finally:
            with self._free:
                self._gone(turn)

    @contextmanager
    def through(self, turn: int) -> Iterator[None]:
        """Wait until it is one's turn; the next one's is when this is left."""
        with self._free:
            self._free.wait_for(lambda: not self._taken and self._is_next(turn))
            self._taken = True
        try:
            yield
        finally:
            with self._free:
                self._taken = False
                self._gone(turn)

    def _is_next(self, turn: int) -> bool:
        return not self._in_order or turn == min(self._coming)

    def _gone(self, turn: int) -> None:
        self._coming.discard(turn)
        self._free.notify_all()
