"""Pooling of blocks of channels, plain or at every offset of the stride.

A window's maximum is that along x of those along y of those along z; so is its sum. Rows of the
input are combined along z, and kept for as long as windows reach them; those behind a row of
outputs are combined along y into one line, whose ends are padding; the line's voxels are combined
for every output. Fragments differ only in where windows begin, so nothing is combined twice for
them. What is read next is fetched meanwhile, and answers go past the caches: they are not read
soon.
"""

from __future__ import annotations

import math
from enum import Enum
from functools import cache, reduce
from typing import Generic, NamedTuple, TypeVar

from llvmlite import ir

from znni_dask.kernels.code import VECTOR_BYTES, Address, Function, Integer, Number, Vector
from znni_dask.kernels.compiled import Library, host, kept_library

POOL = "pool"
PLANE_NUMBERS, ROW_NUMBERS = 2, 6
N = TypeVar("N")
_VOXELS = {True: 8, False: 4}  # at once: with 32 long registers, or without
_UNROLLED = 4  # taps; more are a loop


class Along(Enum):
    """What is combined: rows of the planes behind an output, of a plane, voxels of a row."""

    Z = "planes"
    Y = "rows"
    X = "voxels"


class Rows(NamedTuple, Generic[N]):
    """What is pooled, in the order in which the compiled function reads it.

    Planes, rows of a plane and rows of a strip, of all fragments together; how many combined rows
    are kept; blocks of a sample, from one to the next so many bytes in the input and in the output;
    the bytes of a row of the input; taps along z, y and x. Along x, in voxels: the length of the
    line, the first of it inside the input and the first beyond, and where in a row the former lies;
    outputs and the step between them. Fragments along x, and along y and x together. What to fetch:
    while rows are combined along z, for each the row so many bytes behind it, or, as fragments read
    all planes but one for the second time, of the last plane alone the row so many behind the last,
    while voxels are combined; 0 for neither.
    """

    planes: N
    rows: N
    strip: N
    kept: N
    blocks: N
    block_bytes: N
    out_block_bytes: N
    row_bytes: N
    taps_z: N
    taps_y: N
    taps_x: N
    line: N
    left: N
    right: N
    begin: N
    width: N
    out_step: N
    fragments: N
    parts: N
    fetched_bytes: N
    fetched_rows: N


@cache
def pooling_library(mean: bool) -> Library:
    """The compiled function for the largest value of windows, or for their mean."""
    return kept_library(pooling_module, mean, host().wide)


def pooling_module(mean: bool, wide: bool) -> ir.Module:
    """It as it is written.

    Items are (sample, block, strip of rows, plane). ``numbers`` is a `Rows`; ``planes`` holds for
    every plane how many of its taps lie inside the input, and where its share is; ``rows`` for
    every row the first row of the input that it needs and its strip did not need before, the first
    that it does not need, how many taps lie inside, where it goes in a plane, where its share is,
    and which is its first fragment. ``taps_z`` … are where the taps inside lie: of every sample and
    plane the planes of the input, behind ``x``; among the rows kept; in the line. ``made`` is where
    every sample's planes go of all fragments along y and x, behind ``out``. All places are in
    bytes. ``memory`` is the thread's own: the line, then the rows kept. Of means a window's sum is
    multiplied by the share of its row and of its place along x.
    """
    module = ir.Module(f"pooling mean {mean}")
    along_z, along_y, along_x = (
        [_write(module, along, mean, _VOXELS[wide], taps) for taps in range(_UNROLLED + 1)]
        for along in Along
    )
    tables = ("numbers", "planes", "rows", "taps_z", "taps_y", "taps_x", "made")
    addresses = ("x", "out", *tables, "shares", "shares_x", "memory")
    code = Function(module, POOL, addresses, ("first", "last"))
    x, out, numbers, planes, rows, taps_z, taps_y, taps_x, made, shares, *others = code.addresses
    shares_x, line = others
    r = Rows(*_told(numbers, 0, len(Rows._fields)))
    kept, inside = line + r.line * VECTOR_BYTES, line + r.left * VECTOR_BYTES
    width, strips = r.right - r.left, (r.rows + r.strip - 1) // r.strip
    one = code.number(VECTOR_BYTES)
    for low, high in ((0, r.left), (r.right, r.line)):
        with code.loop(low, high) as voxel:
            line.store(code.vector(_start(mean)), voxel * VECTOR_BYTES)
    with code.loop(*code.numbers) as item:
        plane, block = item % r.planes, item // r.planes // strips
        sample_plane, block = block // r.blocks * r.planes + plane, block % r.blocks
        count_z, share_z = _told(planes, plane, PLANE_NUMBERS)
        source = x + block * r.block_bytes + r.begin * VECTOR_BYTES
        places = taps_z + sample_plane * r.taps_z * 8
        last_plane = source + places.number(r.taps_z * 8 - 8)
        begin = item // r.planes % strips * r.strip
        with code.loop(begin, (begin + r.strip).at_most(r.rows)) as row:
            new, end, count_y, to_y, share_y, first_part = _told(rows, row, ROW_NUMBERS)
            with code.loop(new, end) as y:
                here, to = source + y * r.row_bytes, kept + y % r.kept * (r.line * VECTOR_BYTES)
                told = here, to, places, shares, shares, here, width, one, r.fetched_bytes
                _combine(code, along_z, count_z, *told)
            places_y, step = taps_y + row * r.taps_y * 8, r.out_step * VECTOR_BYTES
            told = kept, inside, places_y, shares, shares, kept, width, one, code.number(0)
            _combine(code, along_y, count_y, *told)
            target, share = out + block * r.out_block_bytes + to_y, shares + share_z + share_y
            targets = made + (sample_plane * r.parts + first_part) * 8
            ahead = last_plane + (end + r.fetched_rows - 1) * r.row_bytes
            with code.loop(0, r.fragments) as part:
                here, to = line + part * VECTOR_BYTES, target + targets.number(part * 8)
                next_part = ahead + part * r.width * VECTOR_BYTES
                told = here, to, taps_x, share, shares_x, next_part, r.width, step, r.fetched_rows
                _combine(code, along_x, r.taps_x, *told)
    code.finish()
    return module


def _start(mean: bool) -> float:
    """What changes neither a sum nor a maximum."""
    return 0.0 if mean else -math.inf


def _told(table: Address, which: Integer, size: int) -> list[Number]:
    place = table + which * (8 * size)
    return [place.number(8 * i) for i in range(size)]


def _combine(
    code: Function, functions: list[Function], taps: Number, *told: Address | Number
) -> None:
    """Call the function for so many taps."""
    loop, *unrolled = functions
    for count, function in enumerate(unrolled, 1):
        with code.when(taps.equals(count)):
            code.call(function, *told, taps)
    for others in (taps < 1, taps > _UNROLLED):
        with code.when(others):
            code.call(loop, *told, taps)


def _write(module: ir.Module, along: Along, mean: bool, voxels: int, unrolled: int) -> Function:
    """Combines the taps of each of ``width`` voxels, ``step`` bytes apart, some voxels at a time:
    taps lie at ``places`` behind ``source``, and are as many as are ``unrolled``, or any number
    where none are. Along x sums are multiplied by a share, and go past the caches."""
    code = Function(
        module,
        f"{along.value}{unrolled}",
        ("source", "target", "places", "share", "shares", "ahead"),
        ("width", "step", "fetched", "taps"),
        inner=True,
    )
    source, target, places, share, shares, ahead = code.addresses
    width, step, fetched, taps = code.numbers
    start, last = code.vector(_start(mean)), along is Along.X
    sources = [source + places.number(8 * tap) for tap in range(unrolled)]
    factor = share.spread() if mean and last else start

    def both(one: Vector, other: Vector) -> Vector:
        return one + other if mean else other.largest(one)

    def combined(first: Number, count: int) -> list[Vector]:
        begins = [(first + n) * step for n in range(count)]
        if sources:
            return [reduce(both, [tap.load(begin) for tap in sources]) for begin in begins]
        found = [code.variable(start) for _ in begins]
        with code.loop(0, taps) as tap:
            here = source + places.number(tap * 8)
            for variable, begin in zip(found, begins, strict=True):
                variable.set(both(variable.get(), here.load(begin)))
        return [variable.get() for variable in found]

    def write(first: Number, count: int) -> None:
        places = [(first + n) * VECTOR_BYTES for n in range(count)]
        with code.when(fetched.differs(0)):
            for place in places:
                if last:
                    ahead.prefetch(place)
                elif along is Along.Z:
                    for tap in sources:
                        tap.prefetch(place + fetched)
        found = combined(first, count)
        for n, (value, place) in enumerate(zip(found, places, strict=True)):
            weighted = value * factor * shares.spread((first + n) * 4) if mean and last else value
            target.store(weighted, place, streamed=last)

    whole = width // voxels * voxels
    with code.loop(0, whole, voxels) as i:
        write(i, voxels)
    with code.loop(whole, width) as i:
        write(i, 1)
    return code.finish()
