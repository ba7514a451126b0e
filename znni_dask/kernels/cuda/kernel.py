"""A function that a device runs: CUDA C++, and the same on arrays of numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A CUDA function ``name`` of ``source``, which `Device.launch` runs with so many ``threads``
    in a block and ``shared_bytes`` of memory for each block.

    Its arguments are arrays, all C-contiguous, whole numbers (``long long`` there) and floats
    (``float`` there). ``plain`` does on numpy's arrays what all blocks together do, with the same
    arguments.
    """

    name: str
    source: str
    plain: Callable[..., None]
    threads: int = 256
    shared_bytes: int = 0
