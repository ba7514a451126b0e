"""Pooling of blocks of channels, plain or at every offset of the stride.

A window's maximum is that of its rows' maxima, its sum that of their sums. First the rows behind
a row of outputs are combined voxel by voxel into one line, whose ends are padding; then the
line's voxels are combined for every output. Fragments differ only in where they begin in the
line, so that each row is read once for all fragments along x. Answers go past the caches: they
are not read soon.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Generic, NamedTuple, TypeVar

from llvmlite import ir

from znni_dask.kernels.code import VECTOR_BYTES, Address, Function, Number
from znni_dask.kernels.compiled import Library, compiled_library, host

POOL = "pool"
PLACE_NUMBERS = 4
N = TypeVar("N")
_VOXELS = {True: 8, False: 4}  # at once: with 32 long registers, or without


class Rows(NamedTuple, Generic[N]):
    """What is pooled, in the order in which the compiled function reads it.

    Planes, and rows of a plane, of all fragments together; the bytes of a block of the input and
    of the output; steps between a window's taps along z and y. Along x, in voxels: the length of
    the line, the first of it inside the input and the first beyond, and where in a row the former
    lies; taps and the step between them, outputs and the step between them; fragments and the
    bytes of one.
    """

    planes: N
    rows: N
    block_bytes: N
    out_block_bytes: N
    plane_step: N
    row_step: N
    line: N
    left: N
    right: N
    begin: N
    taps: N
    tap_step: N
    width: N
    out_step: N
    fragments: N
    fragment_bytes: N


@cache
def pooling_library(mean: bool) -> Library:
    """The compiled function for the largest value of windows, or for their mean."""
    return compiled_library(pooling_module(mean, host().wide))


def pooling_module(mean: bool, wide: bool) -> ir.Module:
    """It as it is written.

    Items are (batch and block, plane). ``numbers`` is a `Rows`; ``planes`` and ``rows`` hold for
    every one `PLACE_NUMBERS`: where its first tap inside the input lies, how many lie there,
    where it goes, and where its share is, all but the second in bytes. ``line`` is the thread's
    own memory. Of means a window's sum is multiplied by the share of its row and of its place
    along x.
    """
    module = ir.Module(f"pooling mean {mean}")
    collect, reduce = (_write_row(module, _VOXELS[wide], mean, last) for last in (False, True))
    addresses = ("x", "out", "numbers", "planes", "rows", "shares", "shares_x", "line")
    code = Function(module, POOL, addresses, ("first", "last"))
    x, out, numbers, planes, rows, shares, shares_x, line = code.addresses
    r = Rows(*(numbers.number(8 * i) for i in range(len(Rows._fields))))
    padding = code.vector(_start(mean))
    with code.loop(*code.numbers) as item:
        block, plane = item // r.planes, item % r.planes
        from_z, taps_z, to_z, share_z = _place(planes, plane)
        source_z = x + block * r.block_bytes + from_z + r.begin * VECTOR_BYTES
        target_z = out + block * r.out_block_bytes + to_z
        with code.loop(0, r.rows) as row:
            from_y, taps_y, to_y, share_y = _place(rows, row)
            source = source_z + from_y
            right = (taps_z * taps_y * r.line).at_most(r.right)  # without taps all is padding
            left = right.at_most(r.left)
            for low, high in ((code.number(0), left), (right, r.line)):
                with code.loop(low, high) as voxel:
                    line.store(padding, voxel * VECTOR_BYTES)
            steps = (taps_z, taps_y, r.plane_step, r.row_step)
            to, share = line + left * VECTOR_BYTES, shares + share_z + share_y
            code.call(collect, source, to, share, right - left, VECTOR_BYTES, *steps)
            target = target_z + to_y
            with code.loop(0, r.fragments) as part:
                begin, to = line + part * VECTOR_BYTES, target + part * r.fragment_bytes
                steps = (code.number(1), r.taps, code.number(0), r.tap_step * VECTOR_BYTES)
                out_step = r.out_step * VECTOR_BYTES
                code.call(reduce, begin, to, shares_x, r.width, out_step, *steps)
    code.finish()
    return module


def _start(mean: bool) -> float:
    """What changes neither a sum nor a maximum."""
    return 0.0 if mean else -math.inf


def _place(places: Address, which: Number) -> tuple[Number, ...]:
    begin = places + which * (8 * PLACE_NUMBERS)
    return tuple(begin.number(8 * i) for i in range(PLACE_NUMBERS))


def _write_row(module: ir.Module, voxels: int, mean: bool, last: bool) -> Function:
    """A row of ``width`` voxels, ``step`` bytes apart: all taps of each, some voxels at a time.
    The ``last`` function has a share for each voxel and writes past the caches."""
    code = Function(
        module,
        "reduce" if last else "collect",
        ("source", "target", "share"),
        ("width", "step", "outer", "inner", "outer_step", "inner_step"),
        inner=True,
    )
    source, target, share = code.addresses
    width, step, outer, inner, outer_step, inner_step = code.numbers
    start = code.vector(_start(mean))

    def write(first: Number, count: int) -> None:
        begin = source + first * step
        found = [code.variable(start) for _ in range(count)]
        with code.loop(0, outer) as a, code.loop(0, inner) as b:
            tap = begin + a * outer_step + b * inner_step
            for n, variable in enumerate(found):
                x, there = tap.load(step * n), variable.get()
                variable.set(there + x if mean else x.largest(there))
        for n, variable in enumerate(found):
            value, place = variable.get(), first + n
            if mean:
                value = value * share.spread(place * 4 if last else 0)
            target.store(value, place * VECTOR_BYTES, streamed=last)

    with code.when(width > voxels - 1), code.loop(0, width, voxels) as i:
        write(i.at_most(width - voxels), voxels)  # some of the last ones are made twice
    with code.when(width < voxels), code.loop(0, width) as i:
        write(i, 1)
    return code.finish()
