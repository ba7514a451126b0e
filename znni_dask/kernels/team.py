"""A team of threads that share one piece of work: exactly as many as asked for, nothing global."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from znni_dask.closing import Closing
from znni_dask.kernels import sharing
from znni_dask.kernels.compiled import Compiled
from znni_dask.kernels.memory import Bytes, allocate
from znni_dask.machine import node_for, staying_on

_PIECES_PER_THREAD = 4
_CALLS_PER_THREAD = 16  # pieces of compiled work, which cost next to nothing to hand out
_LOOKS = 1_000_000  # for work, or for its end, before a thread goes to sleep: some 1 ms
_NAP_SECONDS = 5e-5
_HELPERS = (1 << sharing.TURN_BITS) - 1  # of the state: those who are still at a call


class Each(NamedTuple):
    """An argument that differs from thread to thread: ``step`` more for each after the first."""

    first: int
    step: int


class Team(Closing):
    """``threads`` threads, the caller being one of them.

    What they compute in is theirs, too: `scratch` memory, kept from one piece of work to the
    next. Where a machine has several NUMA nodes they stay on one that has enough cores, if there
    is one; memory that they are the first to touch lies there. Kernels must release the
    interpreter lock. Use it as a context manager, or `close` it.

    >>> import numpy as np
    >>> out = np.zeros(10)
    >>> def fill(first, last):
    ...     out[first:last] = 1
    >>> with Team(2) as team:
    ...     team.share(fill, 10)
    >>> int(out.sum())
    10
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._cores = node_for(threads)
        self._helpers = _Helpers(threads - 1) if threads > 1 else None
        if self._helpers:
            weakref.finalize(self, self._helpers.close)  # threads refer to them, not to the team
        self._scratch = allocate(0)

    def scratch(self, nbytes: int) -> Bytes:
        """``nbytes`` of memory for one piece of work, aligned to 64 bytes, holding anything; the
        next call hands out the same memory again."""
        if nbytes > self._scratch.size:
            self._scratch = allocate(0)  # so that never both are there
            self._scratch = allocate(nbytes)
        return self._scratch[:nbytes]

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory held now."""
        return int(self._scratch.size)

    def share(self, work: Callable[[int, int], object], items: int) -> None:
        """Run ``work(first, last)`` over all of ``range(items)``, in pieces, on all threads."""
        with staying_on(self._cores):  # the others begin within, and so stay there, too
            pieces = min(items, self.threads * _PIECES_PER_THREAD)
            if self._helpers is None or pieces < 2:
                work(0, items)
            else:
                self._helpers.share(work, items, pieces)

    def run(self, function: Compiled, arguments: Sequence[int | Each], items: int) -> None:
        """Call a compiled function with these arguments, and first and end of some items, over all
        of ``range(items)``, in pieces, on all threads: for work of microseconds, too."""
        with staying_on(self._cores):
            if self._helpers is None or items < 2:
                function(*(a.first if isinstance(a, Each) else a for a in arguments), 0, items)
            else:
                pieces = min(items, self.threads * _CALLS_PER_THREAD)
                self._helpers.run(function, arguments, items, pieces)

    def close(self) -> None:
        """End the threads."""
        if self._helpers is not None:
            self._helpers.close()
        self._scratch = allocate(0)


class _Helpers:
    """Threads that help the one that calls. Between two calls they look for the next one a while,
    and then sleep: waking takes longer than many a layer, and may leave two threads on one core
    for some 20 ms while another is idle."""

    def __init__(self, count: int) -> None:
        self._library = sharing.sharing_library()
        self._board = allocate(8 * sharing.WORDS).view(np.int64)
        self._board[:] = 0
        self._place = self._board.ctypes.data
        self._lock = threading.Lock()
        self._turn = 0
        self._beds: list[threading.Lock] = []  # of those who sleep
        self._threads = [
            threading.Thread(target=self._help, args=(n + 1,), name=f"znni-team-{n}", daemon=True)
            for n in range(count)
        ]
        self._begun = self._closed = False
        self._work: Callable[[], None] = lambda: None
        self._errors: list[BaseException] = []

    def run(
        self, function: Compiled, arguments: Sequence[int | Each], items: int, pieces: int
    ) -> None:
        """Call a compiled function for all pieces."""
        each = [a if isinstance(a, Each) else Each(a, 0) for a in arguments]
        board, count = self._board, len(each)
        board[sharing.ARGUMENTS : sharing.ARGUMENTS + count] = [a.first for a in each]
        board[sharing.STEPS : sharing.STEPS + count] = [a.step for a in each]
        self._open(function.address, count, items, pieces)
        self._library[sharing.LEAD](self._place, _LOOKS)
        self._wait()

    def share(self, work: Callable[[int, int], object], items: int, pieces: int) -> None:
        """Call a function of the interpreter for all pieces."""
        waiting = iter(pairwise([items * i // pieces for i in range(pieces + 1)]))

        def member() -> None:
            for first, last in waiting:  # one iterator for all: whoever is free takes the next
                work(first, last)

        self._work = member
        self._errors.clear()
        self._open(0, 0, items, pieces)
        try:
            member()
        finally:
            self._library[sharing.CLOSE](self._place, _LOOKS)
            self._wait()
            self._work = lambda: None
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """End the threads."""
        self._closed = True
        self._wake()
        if self._begun:
            for thread in self._threads:
                thread.join()

    def _open(self, *call: int) -> None:
        """Open a call to those who look, and only then wake those who sleep: one that finds nothing
        where it was woken falls asleep again."""
        self._board[sharing.NEXT] = 0
        self._board[sharing.CALL : sharing.CALL + len(call)] = call
        self._turn = (self._turn + 1) % (1 << sharing.TURN_BITS)
        self._library[sharing.OPEN](self._place, self._turn)
        self._wake()
        if not self._begun:
            self._begun = True
            for thread in self._threads:
                thread.start()

    def _wake(self) -> None:
        with self._lock:
            for bed in self._beds:
                bed.release()
            self._beds.clear()

    def _wait(self) -> None:
        """Until nobody is at the call any more: what it computes in may be given back then."""
        interrupted: KeyboardInterrupt | None = None
        while self._board[sharing.STATE] & _HELPERS:
            try:
                time.sleep(_NAP_SECONDS)
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _help(self, member: int) -> None:
        """A thread's life."""
        told, seen = np.zeros(2, np.int64), -1
        bed = threading.Lock()
        bed.acquire()
        while not self._closed:
            self._library[sharing.SERVE](self._place, told.ctypes.data, member, _LOOKS)
            if told[sharing.JOINED]:
                try:
                    self._work()
                except BaseException as error:  # raised again by who shared it
                    self._errors.append(error)
                finally:
                    self._library[sharing.LEAVE](self._place)
                continue
            with self._lock:
                if asleep := seen == self._turn and not self._closed:
                    self._beds.append(bed)
                seen = self._turn
            if asleep:
                bed.acquire()
