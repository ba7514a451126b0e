"""Parts of a problem that take bounded memory, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from znni_dask.geometry import Box, Size, ceil_divide, tiles

BUFFERS_BYTES = 256 << 10  # of numpy, for numbers that lie apart or are made more precise


def piece_of(size: Size, voxels: int) -> Size:
    """The largest part of a box of so many voxels, at least one: of whole rows and planes where
    these fit."""
    z, y, x = size
    width = max(1, min(x, voxels))
    rows = max(1, min(y, voxels // width if width == x else 1))
    planes = max(1, min(z, voxels // (width * rows) if rows == y else 1))
    return planes, rows, width


def pieces(size: Size, voxels: int) -> Iterator[Box]:
    """Boxes of at most so many voxels that cover a box exactly once."""
    return tiles(size, piece_of(size, voxels))


def piece_count(size: Size, voxels: int) -> int:
    """How many these are."""
    return prod(ceil_divide(n, step) for n, step in zip(size, piece_of(size, voxels), strict=True))


def part(along: slice, first: int, last: int) -> slice:
    """Those numbered from ``first`` to before ``last``, of what a slice takes; there is one."""
    step = along.step or 1
    return slice(along.start + first * step, along.start + (last - 1) * step + 1, step)


def reached(first: int, step: int, count: int, length: int) -> tuple[slice, slice]:
    """Of ``count`` places that begin at ``first``, ``step`` apart, those in ``[0, length)``: which
    they are, and where."""
    low = min(count, max(0, ceil_divide(-first, step)))
    high = max(low, min(count, ceil_divide(length - first, step)))
    if low == high:
        return slice(0, 0), slice(0, 0)
    return slice(low, high), part(slice(first, None, step), low, high)


def cropped(x: Any, offset: Size, size: Sequence[int]) -> Any:
    """The part of an input (batch, channel, z, y, x) that begins at ``offset``, as a view; of an
    axis of one voxel, that voxel."""
    places = (
        slice(o, o + n) if there > 1 else slice(0, 1)
        for o, n, there in zip(offset, size, x.shape[2:], strict=True)
    )
    return x[(slice(None), slice(None), *places)]
