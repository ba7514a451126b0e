"""Fragments put together to the answer of a patch (Zlateski et al. 2016, section V).

Row by row of the answer: its voxels are collected in a line that stays in the first-level cache,
and go from there past the caches.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import LANES, Address, Function, Integer
from znni_dask.kernels.compiled import Library, compiled_library

INTERLEAVE = "interleave"
_FLOAT_BYTES = 4


@cache
def fragments_library() -> Library:
    """The compiled function.

    Items are (channel, plane of the answer). ``places`` holds for every place modulo the ``steps``
    (z, y, x) where its fragment lies, in bytes, or -1 where none is given: with ``some`` there are
    such places, and what the answer holds there stays. ``out`` begins ``shift`` floats behind a
    cache line; ``line`` is the thread's own memory, as long as a row of the answer.
    """
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
        with code.loop(0, step_x) as part:
            place = told.number(part * 8)
            source = fragments + begin + place
            with (
                code.when(place > -1),
                code.loop(0, (out_x - part + step_x - 1) // step_x) as i,
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
    return compiled_library(module)
