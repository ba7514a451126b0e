"""Convolution by Winograd's minimal algorithms: values of small tiles at points, the products of
matrices at every point, and the answers that they make.

Between direct convolution and transforms: a quarter to a third of the products of a kernel of 3³,
and kernels' values that take little more than twice the memory of the kernels. For what is too
small for the spectra of larger tiles to be worth reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import ClassVar, NamedTuple, cast, final

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import ceil_divide, round_up, volume
from znni_dask.kernels import winograd
from znni_dask.kernels.axes import Strides, flat
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import allocate, allocated_bytes, odd_lines
from znni_dask.kernels.team import Each, Team
from znni_dask.kernels.turns import Turn
from znni_dask.kernels.winograd import Tile, Tiles
from znni_dask.network.layers import ONES, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem
from znni_dask.primitives.work import MEMORY, Rate, Work

SUMS = Rate("sums at points", 2e10)  # operations of transforms, to and from the caches
PRODUCTS = Rate("products at points", 1.9e11)  # operations
CACHED_BYTES = 1 << 20  # of values and products of a thread, which stay near


class Prepared(NamedTuple):
    """Kernels' values, of some output blocks after the other: (point, channel, output channel);
    and the biases."""

    values: Array
    biases: Array


@final
class ConvWinograd(Primitive):
    """Convolution on the CPU with kernels of up to three voxels along each axis, any padding."""

    name: ClassVar[str] = "winograd"
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = "kernels of 2 and 3 voxels along an axis, no stride, dilation or groups"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        plain = conv.stride == conv.dilation == ONES and conv.groups == 1 and not conv.whole
        return plain and 1 < max(conv.kernel) <= winograd.LONGEST

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.BLOCKED, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        return self.work(problem, threads=1).amount(SUMS, PRODUCTS)

    def work(self, problem: Problem, threads: int) -> Work:
        """Operations of transforms (one for each point and axis) and of products, and what goes to
        and from memory or the caches that threads share: kernels' values for every batch."""
        batches, conv = _Batches.of(problem, threads), _conv(problem)
        points = batches.tile.points
        channels = LANES * (batches.read + batches.made)
        kernels = points * conv.in_channels * batches.made * VECTOR_BYTES
        products = 2 * points * batches.tiles * conv.in_channels * LANES * batches.made
        sums = 3 * points * batches.tiles * channels
        return Work({SUMS: sums, PRODUCTS: products, MEMORY: batches.count * kernels})

    def is_compiled(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return winograd.winograd_kept(Tile(conv.kernel), conv.relu)

    def prepared_bytes(self, layer: Layer) -> int:
        conv, made = cast("Conv", layer), rows.blocks_at_once(cast("Conv", layer).out_channels)
        values = [Tile(conv.kernel).points * conv.in_channels * n * VECTOR_BYTES for n in made]
        biases = allocated_bytes(sum(made) * VECTOR_BYTES)
        return allocated_bytes(sum(values)) + biases + 3 * max(values)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return threads * _Batches.of(problem, threads).nbytes

    def prepare(self, layer: Layer, weights: Weights) -> Prepared:
        """The kernels' values, in the order in which they are read."""
        conv = cast("Conv", layer)
        weight, bias = weights["weight"], weights.get("bias")
        points, made = Tile(conv.kernel).points, rows.blocks_at_once(conv.out_channels)
        size = points * conv.in_channels * LANES * sum(made)
        values, begin = allocate(ITEM_BYTES * size).view(np.float32), 0
        for first, blocks in zip(accumulate(made, initial=0), made, strict=False):
            part = weight[first * LANES : (first + blocks) * LANES]
            shape = (points, conv.in_channels, blocks * LANES)
            here = values[begin : begin + volume(shape)].reshape(shape)
            here[..., : len(part)] = _values(part).reshape(*shape[:2], len(part))
            here[..., len(part) :] = 0
            begin += volume(shape)
        there = np.zeros(conv.out_channels, np.float32) if bias is None else bias
        return Prepared(values, rows.kept([rows.padded(there, sum(made) * LANES)]))

    def apply(
        self, prepared: Prepared, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        told = _told(problem, team.threads)
        nbytes = told.batches.nbytes
        arrays = told.tiles, told.turns, inputs[0], *prepared, out
        memory = Each(team.scratch(team.threads * nbytes).ctypes.data, nbytes)
        library = winograd.winograd_library(told.batches.tile, _conv(problem).relu)
        places = [array.ctypes.data for array in arrays]
        team.run(library[winograd.CONVOLVE], (*places, memory), told.batches.count)


@dataclass(frozen=True)
class _Batches:
    """The tiles of a problem, and how many are computed at once; blocks of channels that are read
    and made."""

    tile: Tile
    tiles: int
    at_once: int
    read: int
    made: int

    @classmethod
    def of(cls, problem: Problem, threads: int) -> _Batches:
        """As many at once as have values that stay near, or as many for which the kernels' are not
        read more often than they: in batches of one size, and one for every thread."""
        tile, (batch, outputs, *size) = Tile(_conv(problem).kernel), problem.output
        read, made = (ceil_divide(n, LANES) for n in (problem.inputs[0][1], outputs))
        tiles = batch * prod(map(ceil_divide, size, tile.made))
        near = CACHED_BYTES // (tile.points_of_plane * (read + made) * VECTOR_BYTES)
        enough = read * made * LANES // (2 * (read + made))
        count = ceil_divide(tiles, max(1, near, enough))
        at_once = ceil_divide(tiles, round_up(count, threads))
        return cls(tile, tiles, at_once, read, made)

    @property
    def count(self) -> int:
        """How many batches."""
        return ceil_divide(self.tiles, self.at_once)

    @property
    def point_bytes(self) -> tuple[int, int]:
        """From point to point of values and of products."""
        read, made = (blocks * self.at_once * VECTOR_BYTES for blocks in (self.read, self.made))
        return odd_lines(read), odd_lines(made)

    @property
    def nbytes(self) -> int:
        """Memory of values and products at a plane of points."""
        return self.tile.points_of_plane * sum(self.point_bytes) + winograd.ZEROS_BYTES


class _Told(NamedTuple):
    """What compiled code is told of a problem, wherever its arrays lie. ``passes`` must live on."""

    batches: _Batches
    tiles: NDArray[np.int64]
    turns: NDArray[np.int64]
    passes: list[rows.Pass]


@lru_cache(maxsize=1 << 10)
def _told(problem: Problem, threads: int) -> _Told:
    """The axes and strides of its tiles, and the turns that make the products: convolutions with
    kernels of one voxel. Where the last batch has fewer tiles nobody wants some products."""
    batches, conv, made = _Batches.of(problem, threads), _conv(problem), problem.output
    axes = zip(rows.axes_of(problem, conv), batches.tile.made, strict=True)
    z, y, x = (axis._replace(stride=step) for axis, step in axes)
    counts = batches.tiles, batches.at_once, batches.read, batches.made
    parts = rows.blocks_at_once(conv.out_channels)
    turns = len(parts) * batches.tile.points_of_plane
    source, target = (_strides(Form.BLOCKED.stored(shape)) for shape in (problem.inputs[0], made))
    tiles = Tiles(z, y, x, source, target, *counts, *batches.point_bytes, turns)

    block_bytes, nothing = batches.at_once * VECTOR_BYTES, np.zeros(0, np.float32)
    place = rows.Place(0, Strides(0, block_bytes, 0, 0, VECTOR_BYTES, ITEM_BYTES))
    nowhere = [rows.Part(blocks, nothing, nothing) for blocks in parts]
    passes = rows.products(nowhere, batches.at_once, conv.in_channels, place, place)
    return _Told(batches, np.array(flat(tiles), np.int64), _turns(batches, conv, passes), passes)


def _turns(batches: _Batches, conv: Conv, passes: Sequence[rows.Pass]) -> NDArray[np.int64]:
    """The passes at every point: all that they are given lies so far behind where it begins."""
    points = np.arange(batches.tile.points)[:, None]
    in_plane, (values, products) = points % batches.tile.points_of_plane, batches.point_bytes
    kernels = [one.part.made * conv.in_channels * VECTOR_BYTES for one in passes]
    begins = [batches.tile.points * n for n in accumulate(kernels[:-1], initial=0)]
    turns = np.array([[one.turn for one in passes]] * len(points), np.int64)
    turns[..., Turn._fields.index("source")] = in_plane * values
    turns[..., Turn._fields.index("weights")] = begins + points * kernels
    turns[..., Turn._fields.index("out")] += in_plane * products
    return turns


def _strides(stored: Sequence[int]) -> Strides[int]:
    """Of an array in blocks."""
    batch, block, z, y, x, lane = (ITEM_BYTES * prod(stored[axis + 1 :]) for axis in range(6))
    return Strides(batch, block, z, y, x, lane)


def _values(weight: Array) -> Array:
    """Of weights (output channel, channel, z, y, x) the values at all points (z, y, x, channel,
    output channel)."""
    values = weight.transpose(2, 3, 4, 1, 0)
    for axis in range(3):
        matrix = winograd.kernel_matrix(values.shape[axis])
        values = np.moveaxis(np.tensordot(matrix, values, (1, axis)), 0, axis)
    return values


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)
