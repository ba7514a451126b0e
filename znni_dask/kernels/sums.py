"""Sums of some neighbouring voxels of a row in registers: functions for `rows`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from llvmlite import ir

from znni_dask.kernels.axes import Lanes, Rows, Told
from znni_dask.kernels.code import (
    LANES,
    VECTOR_BYTES,
    Address,
    Function,
    Number,
    Variable,
    Vector,
)

# Voxels summed at once, for each number of output blocks (of outputs, where lanes are inputs),
# with 32 long registers, and without.
VOXELS = {
    (Lanes.OUTPUTS, True): {1: 14, 2: 12, 3: 8, 4: 6, 5: 4},
    (Lanes.OUTPUTS, False): {1: 4, 2: 2},
    (Lanes.INPUTS, True): {1: 16, 2: 12, 3: 8, 4: 6, 5: 4, 6: 4, 7: 3},
    (Lanes.INPUTS, False): {1: 6, 2: 3, 3: 2, 4: 1},
    (Lanes.BOTH, True): {1: 14},
    (Lanes.BOTH, False): {1: 6},
}
_FEW = 6  # voxels: of any fewer sums are compiled, too
_RANGES = ("blocks", "z", "y", "x")


def sizes(lanes: Lanes, made: int, wide: bool) -> list[int]:
    """Of how many voxels sums are compiled: of most, and of all from half as many down."""
    most = VOXELS[lanes, wide][made]
    return [most, *range(most // 2 if most > _FEW else most - 1, 0, -1)]


class Sums:
    """The function that adds a part of the taps for some neighbouring voxels of a row."""

    def __init__(self, module: ir.Module, lanes: Lanes, made: int, voxels: int) -> None:
        self.lanes, self.made, self.voxels = lanes, made, voxels
        self.function = Function(
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

    def _write(self) -> None:
        code = self.function
        told, source, weights, start, out = code.addresses
        b0, b1, z0, z1, y0, y1, x0, x1, start_block, start_voxel, clip = code.numbers
        rows = Told.of(told).rows
        zero = code.vector()  # each part is summed apart: sums of sums lose less
        sums = [[code.variable(zero) for _ in range(self.made)] for _ in range(self.voxels)]
        if self.lanes is not Lanes.INPUTS:
            for v in range(self.voxels):
                for b in range(self.made):
                    ahead = rows.target.x * (self.voxels + v) + rows.target.block * b
                    out.prefetch(ahead, written=True)
        with code.loop(b0, b1) as block:
            channels = (rows.channels - block * LANES).at_most(LANES)
            tap_bytes = self._tap_bytes(channels)
            plane = source + block * rows.source.block
            with code.loop(z0, z1) as z, code.loop(y0, y1) as y:
                line = plane + z * (rows.z.dilation * rows.source.z)
                line = line + y * (rows.y.dilation * rows.source.y)
                if self.lanes is Lanes.BOTH:  # tap by tap would be one for every product
                    self._fetch(line, rows)
                first = self.weights_at(code, rows, weights, block, z, y)
                with code.loop(x0, x1) as x:
                    here = line + x * (rows.x.dilation * rows.source.x)
                    self._add(sums, rows, here, first + x * rows.apart_x * tap_bytes, channels)
        least = code.least(clip)
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

    def weights_at(
        self,
        code: Function,
        rows: Rows[Number],
        weights: Address,
        block: Number,
        z: Number,
        y: Number,
    ) -> Address:
        """The weights of a block of channels, of a tap along z and y, and of the first along x."""
        channels = (rows.channels - block * LANES).at_most(LANES)
        kernel = weights + block * rows.kept_taps * self._tap_bytes(code.number(LANES))
        taps = rows.first_tap + z * rows.apart_z + y * rows.apart_y
        return kernel + taps * self._tap_bytes(channels)

    def _add(
        self,
        sums: list[list[Variable]],
        rows: Rows[Number],
        source: Address,
        weights: Address,
        channels: Number,
    ) -> None:
        """One tap: a block of channels of every voxel."""
        code = self.function
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
