"""Memory for arrays that are computed in: aligned, in huge pages where the system grants them.

With pages of 4 KiB what strides through a large array waits for addresses to be looked up.
"""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HUGE_PAGE = 2 << 20
_LINE = 64
_FLOAT_BYTES = 4
Bytes = NDArray[np.uint8]


def odd_lines(nbytes: int) -> int:
    """At least so many bytes, an odd number of cache lines: what lies so far apart does not all
    fall on the same lines of a cache."""
    return (-(-nbytes // _LINE) | 1) * _LINE


def floats(memory: Any, shape: tuple[int, ...]) -> Any:
    """The beginning of some memory, of the host or of a device, as an array of float32."""
    return memory[: _FLOAT_BYTES * prod(shape)].view(np.float32).reshape(shape)


def allocated_bytes(nbytes: int) -> int:
    """Memory that `allocate` takes at most."""
    return nbytes + (_HUGE_PAGE if nbytes >= _HUGE_PAGE else 64)


def allocate(nbytes: int) -> Bytes:
    """``nbytes`` of memory, aligned to 64 bytes; it is taken from the system when it is touched,
    and given back when nothing refers to it any more."""
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        memory, align = np.frombuffer(pages, np.uint8), _HUGE_PAGE
    else:
        memory, align = np.empty(nbytes + 64, np.uint8), 64
    first = -memory.ctypes.data % align
    return memory[first : first + nbytes]
