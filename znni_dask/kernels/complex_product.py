"""Products of complex matrices: rows of channels times sixteen output channels.

With three real products for one complex (Gauss): of x = a + ib and w = c + id

    p = (a + b) c        q = a (d - c)        r = b (c + d)
    xw = (p - r) + i (p + q)

The sum a + b is stored beside a and b where rows are made, once for all output channels; d - c
and c + d are made once for all rows that are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from znni_dask.kernels.code import LANES, VECTOR_BYTES, Address, Function, Integer, Number

PAIR_BYTES = 2 * VECTOR_BYTES  # real and imaginary parts of 16 channels
TRIPLE_BYTES = 3 * VECTOR_BYTES  # these and their sums
ROWS_AT_ONCE = {True: (8, 4, 1), False: (2, 1)}  # with 32 long registers, and without


class Ahead(NamedTuple):
    """A stretch of memory that is read soon: so many cache lines of it are fetched in every turn
    of what is computed before."""

    start: Address
    lines: Number

    def fetch(self, code: Function, turn: Number) -> None:
        """The lines of one turn."""
        share = self.start + turn * (self.lines * VECTOR_BYTES)
        with code.loop(0, self.lines) as line:
            share.prefetch(line * VECTOR_BYTES)


class Product:
    """Writes products into functions of a module."""

    def __init__(self, module: ir.Module, wide: bool) -> None:
        self._groups = {rows: _write_rows(module, rows) for rows in ROWS_AT_ONCE[wide]}

    @property
    def rows_at_once(self) -> int:
        """Rows of a group."""
        return max(self._groups)

    def write(
        self,
        code: Function,
        places: tuple[Address, Address, Address],
        rows: Number,
        strides: tuple[Integer, Integer],
        channels: Number,
        ahead: Sequence[Ahead],
    ) -> None:
        """All ``rows`` of ``a``, ``channels`` in blocks of triples, times ``b``, for each channel
        a pair of 16 output channels, into rows of pairs ``c``. ``places`` are a, b
        and c, ``strides`` those of rows of a and c."""
        a, b, c = places
        a_stride, c_stride = strides
        begin: Integer = 0
        for many, function in self._groups.items():
            left = rows - begin
            with code.loop(0, left // many) as group:
                for stretch in ahead:
                    stretch.fetch(code, group)
                row = group * many + begin
                places = (a + row * a_stride, b, c + row * c_stride)
                code.call(function, *places, *strides, channels)
            begin = rows - left % many


def _write_rows(module: ir.Module, rows: int) -> Function:
    """So many rows at once, their sums in registers."""
    code = Function(
        module,
        f"product_of_{rows}_rows",
        ("a", "b", "c"),
        ("a_stride", "c_stride", "channels"),
        inner=True,
    )
    (a, b, c), (a_stride, c_stride, channels) = code.addresses, code.numbers
    starts = [a + a_stride * r for r in range(rows)]
    sums = [tuple(code.variable(code.vector()) for _ in "pqr") for _ in range(rows)]
    with (
        code.loop(0, channels, LANES) as block,
        code.loop(0, (channels - block).at_most(LANES)) as channel,
    ):
        here = block * (TRIPLE_BYTES // LANES) + channel * 4
        weight = b + (block + channel) * PAIR_BYTES
        re, im = weight.load(), weight.load(VECTOR_BYTES)
        across, along = im - re, re + im
        for start, (p, q, r) in zip(starts, sums, strict=True):
            p.set(p.get() + start.spread(here + 2 * VECTOR_BYTES) * re)
            q.set(q.get() + start.spread(here) * across)
            r.set(r.get() + start.spread(here + VECTOR_BYTES) * along)
    for row, (p, q, r) in enumerate(sums):
        c.store(p.get() - r.get(), c_stride * row)
        c.store(p.get() + q.get(), c_stride * row + VECTOR_BYTES)
    return code.finish()
