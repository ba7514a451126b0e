"""Products of complex matrices: rows of channels times sixteen output channels.

With three real products for one complex (Gauss): of x = a + ib and w = c + id

    p = (a + b) c        q = a (d - c)        r = b (c + d)
    xw = (p - r) + i (p + q)

The sum a + b is stored beside a and b where rows are made, once for all output channels; d - c
and c + d are made once for all rows that are computed together. Two blocks of output channels are
computed together where there are registers enough: so values are read half as often, from the
second-level cache as well as from the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llvmlite import ir

from znni_dask.kernels.code import LANES, VECTOR_BYTES, Address, Function, Integer, Number

PAIR_BYTES = 2 * VECTOR_BYTES  # real and imaginary parts of 16 channels
TRIPLE_BYTES = 3 * VECTOR_BYTES  # these and their sums
_AT_ONCE: Mapping[bool, Mapping[int, Sequence[int]]] = {
    True: {2: (4, 1), 1: (8, 4, 1)},
    False: {1: (2, 1)},
}  # with 32 long registers, and without: blocks, and rows of each, whose sums are in registers


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
        self._functions = {
            blocks: {rows: _write_rows(module, rows, blocks) for rows in groups}
            for blocks, groups in _AT_ONCE[wide].items()
        }

    @property
    def blocks_at_once(self) -> int:
        """Blocks of output channels that are computed together."""
        return max(self._functions)

    def turns(self, rows: Number, blocks: Number) -> Number:
        """How often `write` fetches what is read soon."""
        found: Integer = 0
        for many, functions in self._functions.items():
            found = blocks // many * (rows // max(functions)) + found
            blocks = blocks % many
        assert isinstance(found, Number)
        return found.at_least(1)

    def write(
        self,
        code: Function,
        places: tuple[Address, Address, Address],
        rows: Number,
        blocks: Number,
        strides: tuple[Integer, Integer],
        channels: Number,
        ahead: Sequence[Ahead],
    ) -> None:
        """All ``rows`` of ``a``, ``channels`` in blocks of triples, times ``b``, for each channel
        a pair of 16 output channels, ``blocks`` of them one after another, into rows of pairs
        ``c``. ``places`` are a, b and c, ``strides`` those of rows of a and c."""
        a, b, c = places
        first: Integer = 0
        turn: Integer = 0
        for many, functions in self._functions.items():
            left, turns = blocks - first, rows // max(functions)
            with code.loop(0, left // many) as number:
                block = number * many + first
                here = (a, b + block * channels * PAIR_BYTES, c + block * PAIR_BYTES)
                begun = number * turns + turn
                _write_groups(code, functions, here, rows, strides, channels, ahead, begun)
            first, turn = blocks - left % many, left // many * turns + turn


def _write_groups(
    code: Function,
    functions: Mapping[int, Function],
    places: tuple[Address, Address, Address],
    rows: Number,
    strides: tuple[Integer, Integer],
    channels: Number,
    ahead: Sequence[Ahead],
    turn: Number,
) -> None:
    """All rows for the blocks that are computed together: what is read soon is fetched with every
    one of the largest groups, from a ``turn`` on."""
    a, b, c = places
    a_stride, c_stride = strides
    begin: Integer = 0
    for many, function in functions.items():
        left = rows - begin
        with code.loop(0, left // many) as group:
            if many == max(functions):
                for stretch in ahead:
                    stretch.fetch(code, turn + group)
            row = group * many + begin
            code.call(function, a + row * a_stride, b, c + row * c_stride, *strides, channels)
        begin = rows - left % many


def _write_rows(module: ir.Module, rows: int, blocks: int) -> Function:
    """So many rows of so many blocks at once, their sums in registers."""
    code = Function(
        module,
        f"product_of_{rows}_rows_{blocks}_blocks",
        ("a", "b", "c"),
        ("a_stride", "c_stride", "channels"),
        inner=True,
    )
    (a, b, c), (a_stride, c_stride, channels) = code.addresses, code.numbers
    starts = [a + a_stride * r for r in range(rows)]
    sums = {
        (row, part): tuple(code.variable(code.vector()) for _ in "pqr")
        for row in range(rows)
        for part in range(blocks)
    }
    with (
        code.loop(0, channels, LANES) as block,
        code.loop(0, (channels - block).at_most(LANES)) as channel,
    ):
        here = block * (TRIPLE_BYTES // LANES) + channel * 4
        weights = []
        for part in range(blocks):
            weight = b + (channels * part + block + channel) * PAIR_BYTES
            re, im = weight.load(), weight.load(VECTOR_BYTES)
            weights.append((re, im - re, re + im))
        for row, start in enumerate(starts):
            for which, offset in enumerate((2 * VECTOR_BYTES, 0, VECTOR_BYTES)):
                value = start.spread(here + offset)
                for part in range(blocks):
                    total = sums[row, part][which]
                    total.set(total.get() + value * weights[part][which])
    for (row, part), (p, q, r) in sums.items():
        to = c + c_stride * row + part * PAIR_BYTES
        to.store(p.get() - r.get())
        to.store(p.get() + q.get(), VECTOR_BYTES)
    return code.finish()
