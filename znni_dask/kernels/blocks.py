"""Changes between arrays of channels and arrays of blocks of channels: sixteen voxels of sixteen
channels are transposed in registers.

Plain arrays are (batch, channel, voxel), blocked ones (batch, channels / 16, voxel, 16); float32,
contiguous.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import LANES, VECTOR_BYTES, Function, Vector
from znni_dask.kernels.compiled import Library, kept_library

BLOCK, UNBLOCK = "block", "unblock"
_FEW = ((1, 1), (2, 4), (5, LANES))  # channels of a block: the fewer, the less is transposed
_AHEAD_BYTES = 4096  # which is how far ahead blocks are fetched


@cache
def blocks_library() -> Library:
    """The compiled functions."""
    return kept_library(blocks_module)


def blocks_module() -> ir.Module:
    """They as they are written.

    Items are (block, sixteen voxels) of one sample of ``channels`` channels, ``groups`` times
    sixteen voxels each at least; a channel is ``channel_bytes`` long. Lanes beyond the last
    channel hold the last channel. `UNBLOCK` writes past the caches where ``streamed``: then all
    addresses must be multiples of 64 bytes.
    """
    module = ir.Module("blocks")
    _write_block(module)
    _write_unblock(module)
    return module


_PARAMETERS = ("channels", "channel_bytes", "groups", "first", "last")


def _write_block(module: ir.Module) -> None:
    code = Function(module, BLOCK, ("plain", "blocked"), _PARAMETERS)
    (plain, blocked), (channels, channel_bytes, groups, first, last) = code.addresses, code.numbers
    with code.loop(first, last) as item:
        block, group = item // groups, item % groups
        source = plain + group * VECTOR_BYTES
        rows = []
        for lane in range(LANES):
            channel = (block * LANES + lane).at_most(channels - 1)
            rows.append(source.load_floats(LANES, channel * channel_bytes))
        target = blocked + block * (channel_bytes * LANES) + group * (VECTOR_BYTES * LANES)
        for voxel, vector in enumerate(_transposed(rows)):
            target.store(vector, voxel * VECTOR_BYTES, streamed=True)
    code.finish()


def _write_unblock(module: ir.Module) -> None:
    code = Function(module, UNBLOCK, ("blocked", "plain"), ("streamed", *_PARAMETERS))
    (blocked, plain), (streamed, *numbers) = code.addresses, code.numbers
    channels, channel_bytes, groups, first, last = numbers
    with code.loop(first, last) as item:
        block, group = item // groups, item % groups
        source = blocked + block * (channel_bytes * LANES) + group * (VECTOR_BYTES * LANES)
        for voxel in range(LANES):
            source.prefetch(_AHEAD_BYTES + voxel * VECTOR_BYTES)
        target = plain + group * VECTOR_BYTES
        there = (channels - block * LANES).at_most(LANES)
        for least, most in _FEW:
            with code.when(code.all(there > least - 1, there < most + 1)):
                rows = _transposed([source.load(voxel * VECTOR_BYTES) for voxel in range(LANES)])
                for lane, vector in enumerate(rows[:most]):
                    place = (block * LANES + lane) * channel_bytes
                    with code.when(code.all(there > lane, streamed.differs(0))):
                        target.store(vector, place, streamed=True)
                    with code.when(code.all(there > lane, streamed.equals(0))):
                        target.store_floats(vector, LANES, place)
    code.finish()


def _transposed(rows: list[Vector]) -> list[Vector]:
    """Vector i holds what lane i of every vector held."""
    distance = 1
    while distance < LANES:
        for low in range(LANES):
            if low & distance:
                continue
            a, b = rows[low], rows[low + distance]
            lanes = range(LANES)
            rows[low] = a.chosen(b, [k + LANES - distance if k & distance else k for k in lanes])
            rows[low + distance] = a.chosen(
                b, [k + LANES if k & distance else k + distance for k in lanes]
            )
        distance *= 2
    return rows
