"""Direct convolution, row of outputs by row, sums in registers: compiled for what lies in a vector.

Sixteen output channels (`Lanes.OUTPUTS`): every input is multiplied into sums of some voxels of
a row in some blocks of output channels. Sixteen input channels (`Lanes.INPUTS`), for few outputs:
some voxels' inputs are multiplied into sums of every output, and what is in the lanes is added up
last. Sixteen channels that are each convolved for themselves (`Lanes.BOTH`).

Taps are taken in parts whose weights stay in the first-level cache while all voxels of a row, or of
several short ones, are summed; between parts the sums lie in the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from itertools import count, zip_longest
from typing import Generic, NamedTuple, TypeVar

from llvmlite import ir

from znni_dask.kernels.code import (
    LANES,
    VECTOR_BYTES,
    Address,
    Function,
    Integer,
    Number,
    Variable,
    Vector,
)
from znni_dask.kernels.compiled import Library, compiled_library, host

CONVOLVE = "convolve"
N = TypeVar("N", int, Number)


class Lanes(Enum):
    """What the sixteen numbers of a vector belong to."""

    OUTPUTS = "output channels"
    INPUTS = "input channels"
    BOTH = "channels of both"


# Voxels summed at once, for each number of output blocks (of outputs, where lanes are inputs),
# with 32 long registers, and without.
_VOXELS = {
    (Lanes.OUTPUTS, True): {1: 14, 2: 12, 3: 8, 4: 6, 5: 4},
    (Lanes.OUTPUTS, False): {1: 4, 2: 2},
    (Lanes.INPUTS, True): {1: 16, 2: 12, 3: 8, 4: 6, 5: 4, 6: 4, 7: 3},
    (Lanes.INPUTS, False): {1: 6, 2: 3, 3: 2, 4: 1},
    (Lanes.BOTH, True): {1: 14},
    (Lanes.BOTH, False): {1: 6},
}
_RANGES = ("blocks", "z", "y", "x")


class Axis(NamedTuple, Generic[N]):
    """One axis of a convolution: output ``i`` reads through tap ``t`` the input ``offset`` + i ·
    ``stride`` + t · ``dilation`` of ``size``; what lies beyond these is padding."""

    outputs: N
    stride: N
    dilation: N
    offset: N
    size: N
    taps: N


class Strides(NamedTuple, Generic[N]):
    """Bytes from one to the next, in an array; ``block`` of sixteen channels."""

    batch: N
    block: N
    z: N
    y: N
    x: N
    channel: N


class Rows(NamedTuple, Generic[N]):
    """All that a compiled convolution is told: ``channels`` of the input; the outputs along x,
    from ``begin`` to before ``end``, that no padding reaches; how many blocks of channels, taps
    along z and taps along y make a part; of how many rows sums take a part in turn."""

    z: Axis[N]
    y: Axis[N]
    x: Axis[N]
    source: Strides[N]
    target: Strides[N]
    channels: N
    begin: N
    end: N
    part_blocks: N
    part_z: N
    part_y: N
    together: N
    relu: N


def flat(rows: Rows[int]) -> list[int]:
    """The numbers as compiled code is told them, one after the other."""
    z, y, x, source, target, *others = rows
    return [*z, *y, *x, *source, *target, *others]


def most_at_once(lanes: Lanes) -> int:
    """Output blocks, or outputs, that can be computed at once here."""
    return max(_VOXELS[lanes, host().wide])


@cache
def rows_library(lanes: Lanes, made: int) -> Library:
    """The compiled function for so many output blocks, or outputs, at once."""
    return compiled_library(rows_module(lanes, made, host().wide))


def rows_module(lanes: Lanes, made: int, wide: bool) -> ir.Module:
    """It as it is written. ``rows`` are `flat` numbers, items its (batch, z, y).

    ``weights`` are for every block of input channels, tap along z, along y and along x, in
    `Lanes.OUTPUTS` also every channel: vectors of all output blocks, or of every output.
    """
    module = ir.Module(f"rows {lanes} {made}")
    sums = [_Sums(module, lanes, made, n) for n in _halves(_VOXELS[lanes, wide][made])]
    code = Function(
        module, CONVOLVE, ("rows", "source", "weights", "biases", "out"), ("first", "last")
    )
    told, source, weights, biases, out = code.addresses
    rows = _told(told)
    first, last = code.numbers
    with code.loop(first, last, rows.together) as start:
        end = (start + rows.together).at_most(last)
        for part, begun, clip in _parts(code, rows):
            with code.loop(start, end) as item:
                y, z = item % rows.y.outputs, item // rows.y.outputs % rows.z.outputs
                batch = item // (rows.y.outputs * rows.z.outputs)
                here = source + batch * rows.source.batch + rows.x.offset * rows.source.x
                for at, axis, stride in ((z, rows.z, rows.source.z), (y, rows.y, rows.source.y)):
                    here = here + _start(axis, at) * stride
                to = out + batch * rows.target.batch + z * rows.target.z + y * rows.target.y
                taps = (_shared(part[1], _inside(rows.z, z)), _shared(part[2], _inside(rows.y, y)))
                ranges = (*part[0], *taps[0], *taps[1])
                row = _Row(told, rows, weights, biases, here, to, ranges, begun, clip)
                _write_row(code, sums, row)
    code.finish()
    return module


class _Row(NamedTuple):
    """A row of outputs and the part of its taps that is added."""

    told: Address
    rows: Rows[Number]
    weights: Address
    biases: Address
    source: Address
    out: Address
    ranges: tuple[Integer, ...]  # of blocks, taps along z, taps along y: first, end
    begun: ir.Value  # whether sums begin here, with the bias
    clip: Number  # whether what is negative becomes zero


Span = tuple[Number, Number]  # first and end


def _parts(code: Function, rows: Rows[Number]) -> Iterator[tuple[list[Span], ir.Value, Number]]:
    """Write loops over the parts of the taps: spans of blocks of channels, of taps along z and y;
    whether sums begin with it, and whether they are clipped after it."""
    blocks = (rows.channels + (LANES - 1)) // LANES
    counts = (blocks, rows.z.taps.at_least(1), rows.y.taps.at_least(1))  # or nothing is begun
    steps = (rows.part_blocks, rows.part_z, rows.part_y)
    zero = code.number(0)
    with (
        code.loop(zero, counts[0], steps[0]) as block,
        code.loop(zero, counts[1], steps[1]) as tap_z,
        code.loop(zero, counts[2], steps[2]) as tap_y,
    ):
        starts = (block, tap_z, tap_y)
        ends = [(s + n).at_most(c) for s, n, c in zip(starts, steps, counts, strict=True)]
        begun = code.all(*(s.equals(zero) for s in starts))
        done = code.all(*(e.equals(c) for e, c in zip(ends, counts, strict=True)))
        yield list(zip(starts, ends, strict=True)), begun, code.choose(done, rows.relu, zero)


def _shared(one: Span, other: Span) -> Span:
    """What two spans share; it ends before it begins where that is nothing."""
    return one[0].at_least(other[0]), one[1].at_most(other[1])


def _write_row(code: Function, sums: list[_Sums], row: _Row) -> None:
    """All voxels of a row: where padding reaches one by one, the others as many as may be."""
    rows = row.rows
    single = sums[-1]
    for begin, end in ((code.number(0), rows.begin), (rows.end, rows.x.outputs)):
        with code.loop(begin, end) as x:
            single.call(code, row, x, _inside(rows.x, x))
    begin = rows.begin
    for several in sums:
        whole = begin + (rows.end - begin) // several.voxels * several.voxels
        with code.loop(begin, whole, several.voxels) as x:
            several.call(code, row, x, (code.number(0), rows.x.taps))
        begin = whole


class _Sums:
    """The function that adds a part of the taps for some neighbouring voxels of a row."""

    def __init__(self, module: ir.Module, lanes: Lanes, made: int, voxels: int) -> None:
        self.lanes, self.made, self.voxels = lanes, made, voxels
        self._function = Function(
            module,
            f"sums_of_{voxels}",
            ("rows", "source", "weights", "start", "out"),
            (
                *(f"{name}_{end}" for name in _RANGES for end in ("first", "last")),
                *("start_block", "start_voxel", "clip"),
            ),
            inner=True,
        )
        self._write()

    def call(self, code: Function, row: _Row, x: Number, taps: tuple[Number, Number]) -> None:
        """Add to the voxels from ``x`` on what comes through ``taps`` along x."""
        rows = row.rows
        out = row.out + x * rows.target.x
        code.call(
            self._function,
            row.told,
            row.source + x * (rows.x.stride * rows.source.x),
            row.weights,
            code.choose(row.begun, row.biases, out),
            out,
            *(*row.ranges, *taps),
            code.choose(row.begun, code.number(VECTOR_BYTES), rows.target.block),
            code.choose(row.begun, code.number(0), rows.target.x),
            row.clip,
        )

    def _write(self) -> None:
        code = self._function
        told, source, weights, start, out = code.addresses
        b0, b1, z0, z1, y0, y1, x0, x1, start_block, start_voxel, clip = code.numbers
        rows = _told(told)
        zero = code.vector()  # each part is summed apart: sums of sums lose less
        sums = [[code.variable(zero) for _ in range(self.made)] for _ in range(self.voxels)]
        if self.lanes is not Lanes.INPUTS:
            for v in range(self.voxels):
                for b in range(self.made):
                    ahead = rows.target.x * (self.voxels + v) + rows.target.block * b
                    out.prefetch(ahead, written=True)
        every = rows.z.taps * rows.y.taps * rows.x.taps
        with code.loop(b0, b1) as block:
            channels = (rows.channels - block * LANES).at_most(LANES)
            tap_bytes = self._tap_bytes(channels)
            kernel = weights + block * every * self._tap_bytes(code.number(LANES))
            plane = source + block * rows.source.block
            with code.loop(z0, z1) as z, code.loop(y0, y1) as y:
                line = plane + z * (rows.z.dilation * rows.source.z)
                line = line + y * (rows.y.dilation * rows.source.y)
                if self.lanes is Lanes.BOTH:  # tap by tap would be one for every product
                    self._fetch(line, rows)
                first = kernel + (z * rows.y.taps + y) * rows.x.taps * tap_bytes
                with code.loop(x0, x1) as x:
                    here = line + x * (rows.x.dilation * rows.source.x)
                    self._add(sums, rows, here, first + x * tap_bytes, channels)
        least = code.choose(clip.differs(0), code.vector(), code.vector(float("-inf")))
        totals = [[total.get() for total in values] for values in sums]
        if self.lanes is Lanes.INPUTS:
            for i, of_output in enumerate(zip(*totals, strict=True)):
                value = _added_up(of_output) + start.load_floats(self.voxels, start_block * i)
                out.store_floats(value.at_least(least), self.voxels, rows.target.block * i)
        else:
            for v, of_voxel in enumerate(totals):
                for b, part in enumerate(of_voxel):
                    value = part + start.load(start_block * b + start_voxel * v)
                    place = out + rows.target.x * v
                    place.store(value.at_least(least), rows.target.block * b)
        code.finish()

    def _add(
        self,
        sums: list[list[Variable]],
        rows: Rows[Number],
        source: Address,
        weights: Address,
        channels: Number,
    ) -> None:
        """One tap: a block of channels of every voxel."""
        code = self._function
        step = rows.x.stride * rows.source.x
        if self.lanes is Lanes.OUTPUTS:
            self._fetch(source, rows)
            with code.loop(0, channels) as channel:
                place = weights + channel * (self.made * VECTOR_BYTES)
                values = [place.load(i * VECTOR_BYTES) for i in range(self.made)]
                voxel = source + channel * rows.source.channel
                _multiply(sums, [voxel.spread(step * v) for v in range(self.voxels)], values)
            return
        values = [weights.load(i * VECTOR_BYTES) for i in range(self.made)]
        voxels = [source.load(step * v) for v in range(self.voxels)]
        if self.lanes is Lanes.INPUTS:  # beyond the last channel there may be anything
            voxels = [x.first(channels) for x in voxels]
        _multiply(sums, voxels, values)

    def _fetch(self, source: Address, rows: Rows[Number]) -> None:
        """Have fetched what the next voxels of the row read."""
        for v in range(self.voxels):
            source.prefetch(rows.x.stride * rows.source.x * (self.voxels + v))

    def _tap_bytes(self, channels: Number) -> Number:
        """Weights of one tap, of so many channels."""
        vectors = self.made * VECTOR_BYTES
        return channels * vectors if self.lanes is Lanes.OUTPUTS else channels * 0 + vectors


def _multiply(sums: list[list[Variable]], voxels: list[Vector], weights: list[Vector]) -> None:
    for of_voxel, x in zip(sums, voxels, strict=True):
        for total, weight in zip(of_voxel, weights, strict=True):
            total.set(total.get() + x * weight)


def _added_up(vectors: Sequence[Vector]) -> Vector:
    """The sum over all lanes of each of at most sixteen vectors, side by side."""
    found = list(vectors)
    for _ in range(LANES.bit_length() - 1):
        found = [
            a.neighbours(b) for a, b in zip_longest(found[::2], found[1::2], fillvalue=found[-1])
        ]
    return found[0]


def _told(place: Address) -> Rows[Number]:
    """The numbers of `flat`, as code."""
    places = count(0, 8)

    def several(size: int) -> list[Number]:
        return [place.number(next(places)) for _ in range(size)]

    def axis() -> Axis[Number]:
        return Axis(*several(len(Axis._fields)))

    def strides() -> Strides[Number]:
        return Strides(*several(len(Strides._fields)))

    z, y, x, source, target = axis(), axis(), axis(), strides(), strides()
    return Rows(z, y, x, source, target, *several(len(Rows._fields) - 5))


def _start(axis: Axis[Number], at: Number) -> Number:
    """The input behind the first tap of an output."""
    return at * axis.stride + axis.offset


def _inside(axis: Axis[Number], at: Number) -> tuple[Number, Number]:
    """First and end of the taps of an output that no padding is behind."""
    start = _start(axis, at)
    before, until = (
        (n.at_least(0) + (axis.dilation - 1)) // axis.dilation
        for n in (start * -1, axis.size - start)
    )
    return before.at_most(axis.taps), until.at_most(axis.taps)


def _halves(number: int) -> list[int]:
    """A number, its half, and so on to 1."""
    return [number, *_halves(number // 2)] if number > 1 else [1]
