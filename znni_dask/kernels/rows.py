"""Direct convolution, row of outputs by row, sums in registers: compiled for what lies in a vector.

Sixteen output channels (`Lanes.OUTPUTS`): every input is multiplied into sums of some voxels of
a row in some blocks of output channels. Sixteen input channels (`Lanes.INPUTS`), for few outputs:
some voxels' inputs are multiplied into sums of every output, and what is in the lanes is added up
last. Sixteen channels that are each convolved for themselves (`Lanes.BOTH`).

Taps are taken in parts whose weights stay in the first-level cache while all voxels of a row, or of
several short ones, are summed; between parts the sums lie in the output. Voxels that padding
reaches along x are summed in columns, through the same taps each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from llvmlite import ir

from znni_dask.kernels.axes import TOLD_BYTES, Axis, Lanes, Rows, Told
from znni_dask.kernels.code import LANES, VECTOR_BYTES, Address, Function, Number
from znni_dask.kernels.compiled import Library, host, kept_library
from znni_dask.kernels.sums import VOXELS, Sums, sizes

CONVOLVE = "convolve"


def most_at_once(lanes: Lanes) -> int:
    """Output blocks, or outputs, that can be computed at once here."""
    return max(VOXELS[lanes, host().wide])


@cache
def rows_library(lanes: Lanes, made: int) -> Library:
    """The compiled function for so many output blocks, or outputs, at once."""
    return kept_library(rows_module, lanes, made, host().wide)


Span = tuple[Number, Number]  # first and end


def rows_module(lanes: Lanes, made: int, wide: bool) -> ir.Module:
    """It as it is written. ``rows`` are `flat` numbers, and those of its columns after them; items
    are (batch, z, y).

    ``weights`` are for every block of input channels, tap along z, along y and along x, in
    `Lanes.OUTPUTS` also every channel: vectors of all output blocks, or of every output.
    """
    module = ir.Module(f"rows {lanes} {made}")
    sums = [Sums(module, lanes, made, voxels) for voxels in sizes(lanes, made, wide)]
    of_columns = sums[-1:] if lanes is Lanes.INPUTS else sums  # their answers lie side by side
    addresses = ("rows", "source", "weights", "biases", "out")
    code = Function(module, CONVOLVE, addresses, ("first", "last"))
    (place, source, weights, biases, out), (first, last) = code.addresses, code.numbers
    rows, columns = Told.of(place), Told.of(place + TOLD_BYTES)
    told = rows.rows
    height, every = told.y.outputs, (code.number(0), told.x.taps)
    with code.loop(first, last, told.together) as start:
        end = (start + told.together).at_most(last)
        for part in _parts(code, told, sums[0], weights):
            run = _Run(code, source, weights, biases, out, part)
            with code.loop(start, end) as item:
                part.fetch(code, item - start, end - start)
                row = run.row(rows, item // height, item % height, part.y, every)
                run.write_inside(sums, row, told.begin, told.end)
            planes = start // height, (end + (height - 1)) // height
            for reached in ((code.number(0), told.begin), (told.end, told.x.outputs)):
                with code.loop(*reached) as x, code.loop(*planes) as plane:
                    column, before = run.row(columns, plane, x, every, part.y), plane * height
                    begin, until = (start - before).at_least(0), (end - before).at_most(height)
                    run.write(of_columns, column, begin, until)
    code.finish()
    return module


class _Part(NamedTuple):
    """A part of the taps: blocks of channels, taps along z and along y; whether sums begin with
    it, with the bias; whether what is negative becomes zero after it; the next part's weights."""

    blocks: Span
    z: Span
    y: Span
    begun: ir.Value
    clip: Number
    ahead: Address
    ahead_bytes: Number

    def fetch(self, code: Function, number: Number, of: Number) -> None:
        """Have fetched one of so many shares of the next part's weights."""
        share = self.ahead_bytes // of
        with code.loop(number * share, (number + 1) * share, VECTOR_BYTES) as offset:
            self.ahead.prefetch(offset)


def _parts(code: Function, rows: Rows[Number], sums: Sums, weights: Address) -> Iterator[_Part]:
    """Write a loop over the parts of the taps."""
    blocks = (rows.channels + (LANES - 1)) // LANES
    extents = (blocks, rows.z.taps.at_least(1), rows.y.taps.at_least(1))  # or nothing is begun
    steps = (rows.part_blocks, rows.part_z, rows.part_y)
    counts = [(n + (step - 1)) // step for n, step in zip(extents, steps, strict=True)]
    parts = counts[0] * counts[1] * counts[2]

    def starts(number: Number) -> list[Number]:
        block, tap_z, tap_y = (
            number // (counts[1] * counts[2]),
            number // counts[2] % counts[1],
            number % counts[2],
        )
        return [n * step for n, step in zip((block, tap_z, tap_y), steps, strict=True)]

    zero = code.number(0)
    with code.loop(zero, parts) as number:
        spans = [
            (start, (start + step).at_most(extent))
            for start, step, extent in zip(starts(number), steps, extents, strict=True)
        ]
        last = (number + 1).equals(parts)
        block, tap_z, tap_y = starts(number + 1)
        yield _Part(
            spans[0],
            spans[1],
            spans[2],
            number.equals(zero),
            code.choose(last, rows.relu, zero),
            sums.weights_at(code, rows, weights, block, tap_z, tap_y),
            code.choose(last, zero, rows.ahead_bytes),
        )


class _Row(NamedTuple):
    """A row of outputs, or a column, and the taps through which it is added to: of blocks, along z
    and across, first and end of each; along it."""

    told: Told
    source: Address
    out: Address
    ranges: tuple[Number, ...]
    along: Span


class _Run(NamedTuple):
    """One part of the taps, for all rows and columns."""

    code: Function
    source: Address
    weights: Address
    biases: Address
    out: Address
    part: _Part

    def row(self, told: Told, plane: Number, y: Number, across: Span, along: Span) -> _Row:
        """The one at a place in a plane (batch, z), through these taps as far as no padding is
        behind them."""
        rows, part = told.rows, self.part
        batch, z = plane // rows.z.outputs, plane % rows.z.outputs
        here = self.source + batch * rows.source.batch + rows.x.offset * rows.source.x
        for at, axis, stride in ((z, rows.z, rows.source.z), (y, rows.y, rows.source.y)):
            here = here + _start(axis, at) * stride
        out = self.out + batch * rows.target.batch + z * rows.target.z + y * rows.target.y
        taps = (_shared(part.z, _inside(rows.z, z)), _shared(across, _inside(rows.y, y)))
        return _Row(told, here, out, (*part.blocks, *taps[0], *taps[1]), along)

    def write(self, sums: list[Sums], row: _Row, first: Number, last: Number) -> None:
        """Some voxels: where padding reaches one by one, the others as many as may be."""
        axis, code = row.told.rows.x, self.code
        begin = row.told.rows.begin.at_least(first).at_most(last)
        end = row.told.rows.end.at_least(begin).at_most(last)
        for reached in ((first, begin), (end, last)):
            with code.loop(*reached) as x:
                self._add(sums[-1], row, x, _shared(row.along, _inside(axis, x)))
        self.write_inside(sums, row, begin, end)

    def write_inside(self, sums: list[Sums], row: _Row, begin: Number, end: Number) -> None:
        """Voxels that no padding reaches, as many at once as may be."""
        for several in sums:
            whole = begin + (end - begin) // several.voxels * several.voxels
            with self.code.loop(begin, whole, several.voxels) as x:
                self._add(several, row, x, row.along)
            begin = whole

    def _add(self, sums: Sums, row: _Row, x: Number, along: Span) -> None:
        """Add to the voxels from ``x`` on what comes through taps ``along`` the row."""
        rows, code, begun = row.told.rows, self.code, self.part.begun
        out = row.out + x * rows.target.x
        code.call(
            sums.function,
            row.told.place,
            row.source + x * (rows.x.stride * rows.source.x),
            self.weights,
            code.choose(begun, self.biases, out),
            out,
            *(*row.ranges, *along),
            code.choose(begun, code.number(VECTOR_BYTES), rows.target.block),
            code.choose(begun, code.number(0), rows.target.x),
            self.part.clip,
        )


def _shared(one: Span, other: Span) -> Span:
    """What two spans share; it ends before it begins where that is nothing."""
    return one[0].at_least(other[0]), one[1].at_most(other[1])


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
