"""A team of threads that share one piece of work: exactly as many as asked for, nothing global."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

from znni_dask.closing import Closing
from znni_dask.kernels.memory import Bytes, allocate
from znni_dask.machine import node_for, staying_on

_PIECES_PER_THREAD = 4


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
        self._pool = (
            ThreadPoolExecutor(threads - 1, thread_name_prefix="znni-team") if threads > 1 else None
        )
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
            self._share(work, items)

    def _share(self, work: Callable[[int, int], object], items: int) -> None:
        pieces = min(items, self.threads * _PIECES_PER_THREAD)
        if self._pool is None or pieces < 2:
            work(0, items)
            return
        bounds = [items * i // pieces for i in range(pieces + 1)]
        waiting = iter(pairwise(bounds))

        def member() -> None:
            for first, last in waiting:  # one iterator for all: whoever is free takes the next
                work(first, last)

        others = [self._pool.submit(member) for _ in range(self.threads - 1)]
        try:
            member()
        finally:
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._scratch = allocate(0)
