"""How the outputs of a convolution fall into tiles: stacks of them along z, and where each lies
in memory.

Arithmetic on whole numbers, then tables of addresses for the compiled stages in `kernels.tiles`.
Tiles of a dilated convolution take every d-th voxel: along each axis there are d *phases*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size, ceil_divide
from znni_dask.kernels.tiles import STACK_NUMBERS, Tile
from znni_dask.primitives.base import Problem
from znni_dask.primitives.planes import Planes

Numbers = NDArray[np.int64]
_AXES_KEPT = 256  # tables of one axis: small, and the same for every patch of a size


class Batch(NamedTuple):
    """Stacks that are computed together: tables of the addresses of their planes and of what
    counts of these, and the strides of blocks of channels, of a tile's rows and its voxels."""

    planes: Numbers
    stacks: Numbers
    strides: tuple[int, int, int]

    @property
    def stacked(self) -> int:
        """Number of stacks."""
        return len(self.planes)

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the tables lie; they must live on while these are used."""
        return self.planes.ctypes.data, self.stacks.ctypes.data


@dataclass(frozen=True)
class _Axis:
    """One axis: ``made`` outputs, of each phase in pieces of ``piece``."""

    made: int
    there: int
    offset: int
    dilation: int
    kernel: int
    piece: int

    @cached_property
    def pieces(self) -> list[tuple[int, int]]:
        """Phase and first output of every piece."""
        return [
            (phase, first)
            for phase in range(min(self.dilation, self.made))
            for first in range(0, ceil_divide(self.made - phase, self.dilation), self.piece)
        ]

    @property
    def count(self) -> int:
        """Number of pieces."""
        there, more = divmod(
            self.made, self.dilation
        )  # outputs of each phase, and phases of 1 more
        short = min(self.dilation, self.made) - more
        pieces = more * ceil_divide(there + 1, self.piece)
        return pieces + (short * ceil_divide(there, self.piece) if there else 0)

    def places(self, length: int) -> Numbers:
        """Of every piece ``length`` voxels, from its first output on."""
        first = np.array([phase + begin * self.dilation for phase, begin in self.pieces])
        return first[:, None] + np.arange(length) * self.dilation


@lru_cache(_AXES_KEPT)
def _outputs(axis: _Axis, length: int) -> Numbers:
    """Of every piece ``length`` outputs; -1 where there is none."""
    places = axis.places(length)
    return np.where(places < axis.made, places, -1)


@lru_cache(_AXES_KEPT)
def _inputs(axis: _Axis, length: int) -> Numbers:
    """Of every piece ``length`` inputs; -1 where they are padding, or read by no output."""
    places = axis.places(length)
    read = axis.made + (axis.kernel - 1) * axis.dilation
    inside = (places < read) & (places + axis.offset >= 0)
    inside &= places + axis.offset < axis.there
    return np.where(inside, places + axis.offset, -1)


@lru_cache(_AXES_KEPT)
def _reach(axis: _Axis, length: int, inputs: bool) -> Numbers:
    """Of every piece which of ``length`` voxels count, first and end, and where it begins."""
    counts = (_inputs if inputs else _outputs)(axis, length) >= 0
    any_there = counts.any(axis=1)
    first = np.where(any_there, counts.argmax(axis=1), 0)
    end = np.where(any_there, length - counts[:, ::-1].argmax(axis=1), 0)
    begin = axis.places(1)[:, 0] + (axis.offset if inputs else 0)
    return np.stack([first, end, begin], axis=1)


@dataclass(frozen=True)
class Stacks:
    """The stacks of a problem: ``count`` of ``tiles`` each, computed ``batch`` at a time."""

    tile: Tile
    axes: tuple[_Axis, _Axis, _Axis]
    count: int
    tiles: int
    batch: int

    @property
    def planes(self) -> int:
        """Planes of the input behind a stack."""
        return (self.tiles - 1) * self.tile.made[0] + self.tile.size[0]

    @property
    def planes_made(self) -> int:
        """Planes that a stack makes."""
        return self.tiles * self.tile.made[0]

    @property
    def table_bytes(self) -> int:
        """Memory of all tables, temporaries included."""
        return 8 * self.count * (2 * (self.planes + self.planes_made) + 8 * STACK_NUMBERS)

    def of_input(self, array: Planes) -> Iterator[Batch]:
        """Batch by batch where the planes behind stacks lie in a blocked array."""
        z, y, x = self.axes
        _, ny, nx = self.tile.size
        planes = _inputs(z, self.planes)
        return self._batches(array, planes, _reach(y, ny, True), _reach(x, nx, True))

    def of_output(self, array: Planes) -> Iterator[Batch]:
        """Batch by batch where the planes that stacks make lie in a blocked array."""
        z, y, x = self.axes
        _, my, mx = self.tile.made
        planes = _outputs(z, self.planes_made)
        return self._batches(array, planes, _reach(y, my, False), _reach(x, mx, False))

    def _batches(
        self, array: Planes, planes: Numbers, rows: Numbers, columns: Numbers
    ) -> Iterator[Batch]:
        table, told = _tables(array, planes, rows, columns)
        _, step_y, step_x = (axis.dilation for axis in self.axes)
        strides = array.step_bytes, step_y * array.row_bytes, step_x * array.voxel_bytes
        for first in range(0, self.count, self.batch):
            part = slice(first, first + self.batch)
            yield Batch(table[part], told[part], strides)


@lru_cache(_AXES_KEPT)
def stacks_of(problem: Problem, tile: Tile, dilation: Size, at_once: int) -> Stacks:
    """The stacks that make a problem's output in batches of about ``at_once`` tiles."""
    batch, _, *made = problem.output
    _, my, mx = tile.made
    tiles = ceil_divide(ceil_divide(made[0], dilation[0]), tile.made[0])
    tiles = ceil_divide(tiles, ceil_divide(tiles, at_once))
    pieces = (tiles * tile.made[0], my, mx)
    z, y, x = (
        _Axis(
            made[axis],
            problem.inputs[0][2 + axis],
            problem.offsets[0][axis],
            dilation[axis],
            tile.kernel[axis],
            pieces[axis],
        )
        for axis in range(3)
    )
    count = batch * z.count * y.count * x.count
    batches = ceil_divide(count, max(1, at_once // tiles))
    return Stacks(tile, (z, y, x), count, tiles, ceil_divide(count, batches))


def _tables(
    array: Planes, planes: Numbers, rows: Numbers, columns: Numbers
) -> tuple[Numbers, Numbers]:
    """``planes`` of every piece along z; of every piece along y and x what counts."""
    address = np.where(planes >= 0, array.addresses[:, planes], 0)[:, :, None, None, :]
    whole = (len(array.addresses), len(planes), len(rows), len(columns))
    table = np.broadcast_to(address, (*whole, planes.shape[1])).reshape(-1, planes.shape[1])
    told = np.empty((*whole, STACK_NUMBERS), np.int64)
    told[..., 0:2] = rows[:, None, :2]
    told[..., 2:4] = columns[:, :2]
    told[..., 4] = rows[:, None, 2] * array.row_bytes + columns[:, 2] * array.voxel_bytes
    return np.ascontiguousarray(table), told.reshape(-1, STACK_NUMBERS)
