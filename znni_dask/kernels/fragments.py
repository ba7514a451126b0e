"""Fragments put together to the answer of a patch (Zlateski et al. 2016, section V).

Row by row of the answer: its voxels are collected in a line that stays in the first-level cache,
and go from there past the caches. Rows of 2, 4 or 8 fragments, of which none is missing, are woven
in registers, others voxel by voxel.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import (
    LANES,
    VECTOR_BYTES,
    Address,
    Function,
    Integer,
    Number,
    Vector,
)
from znni_dask.kernels.compiled import Library, kept_library

INTERLEAVE = "interleave"
_FLOAT_BYTES = 4
_WOVEN = (2, 4, 8)  # fragments along x
_LEAST = 4  # voxels of each that are woven at once
_AHEAD_BYTES = 512  # which is how far ahead rows are fetched


@cache
def fragments_library() -> Library:
    """The compiled function.

    Items are (channel, plane of the answer). ``places`` holds for every place modulo the ``steps``
    (z, y, x) where its fragment lies, in bytes, or -1 where none is given: with ``some`` there are
    such places, and what the answer holds there stays. ``out`` begins ``shift`` floats behind a
    cache line; ``line`` is the thread's own memory, as long as a row of the answer.
    """
    return kept_library(fragments_module)


def fragments_module() -> ir.Module:
    """The function as it is written."""
    module = ir.Module("fragments")
    code = Function(
        module,
        INTERLEAVE,
        ("fragments", "out", "places", "line"),
        (
            *("channel_bytes", "plane_bytes", "row_bytes", "step_z", "step_y", "step_x"),
            *("out_z", "out_y", "out_x", "some", "shift", "first", "last"),
        ),
    )
    fragments, out, places, line = code.addresses
    channel_bytes, plane_bytes, row_bytes, step_z, step_y, step_x, *numbers = code.numbers
    out_z, out_y, out_x, some, shift, first, last = numbers

    def copy(source: Address, target: Address, begin: Integer, end: Integer) -> None:
        with code.loop(begin, end) as i:
            target.store_floats(source.spread(i * _FLOAT_BYTES), 1, i * _FLOAT_BYTES)

    with code.loop(first, last) as item, code.loop(0, out_y) as y:
        channel, z, row = item // out_z, item % out_z, item * out_y + y
        target = out + row * out_x * _FLOAT_BYTES
        with code.when(some.differs(0)):
            copy(target, line, 0, out_x)
        begin = channel * channel_bytes + z // step_z * plane_bytes + y // step_y * row_bytes
        told = places + (z % step_z * step_y + y % step_y) * step_x * 8
        for count in _WOVEN:
            with code.when(code.all(step_x.equals(count), some.equals(0))):
                sources = [fragments + begin + told.number(part * 8) for part in range(count)]
                _weave(code, sources, line, out_x // count)
        woven = code.number(0)
        for count in _WOVEN:
            condition = code.all(step_x.equals(count), some.equals(0))
            woven = code.choose(condition, out_x // count // _LEAST * _LEAST, woven)
        with code.loop(0, step_x) as part:
            place = told.number(part * 8)
            source = fragments + begin + place
            with (
                code.when(place > -1),
                code.loop(woven, (out_x - part + step_x - 1) // step_x) as i,
            ):
                value = source.spread(i * _FLOAT_BYTES)
                line.store_floats(value, 1, (i * step_x + part) * _FLOAT_BYTES)
        head = ((row * out_x + shift) % LANES * -1 + LANES) % LANES  # up to a cache line
        head = head.at_most(out_x)
        whole = head + (out_x - head) // LANES * LANES
        copy(line, target, 0, head)
        with code.loop(head, whole, LANES) as i:
            values = line.load_floats(LANES, i * _FLOAT_BYTES)
            target.store(values, i * _FLOAT_BYTES, streamed=True)
        copy(line, target, whole, out_x)
    code.finish()
    return module


def _weave(code: Function, sources: list[Address], line: Address, length: Number) -> None:
    """Voxels of rows in turn, of each row as many as are a multiple of `_LEAST`."""
    begun, step = code.number(0), len(sources) * _FLOAT_BYTES
    for size in (LANES, _LEAST):
        whole = length // size * size
        with code.loop(begun, whole, size) as i:
            for source in sources:
                source.prefetch(i * _FLOAT_BYTES + _AHEAD_BYTES)
            rows = [source.load_floats(size, i * _FLOAT_BYTES) for source in sources]
            left = size * len(rows)
            for number, vector in enumerate(_woven(rows)):
                count = min(LANES, left - number * LANES)
                if count > 0:
                    line.store_floats(vector, count, i * step + number * VECTOR_BYTES)
        begun = whole


def _woven(rows: list[Vector]) -> list[Vector]:
    """The first lanes of all vectors, then the second ones, and so on."""
    if len(rows) == 1:
        return rows
    found = []
    for even, odd in zip(_woven(rows[::2]), _woven(rows[1::2]), strict=True):
        for half in (0, LANES // 2):
            lanes = [half + lane // 2 + lane % 2 * LANES for lane in range(LANES)]
            found.append(even.chosen(odd, lanes))
    return found
