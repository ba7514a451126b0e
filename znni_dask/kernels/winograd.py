"""Convolution of small tiles at points: the minimal algorithms of Winograd (1980), nested along
z, y and x (Lavin and Gray 2016).

Four neighbouring voxels of an axis hold 5 - k windows of k voxels. Taken as polynomials, with
values at the points 0, 1, -1 and infinity, tile and kernel need four products for all of these
windows and not k for each: of 3³ a quarter to a third, of 2³ two fifths. At these points every
transform is a sum or a difference. Channels lie side by side in vectors; what is between the two
transforms, a product of matrices at every point, is direct convolution of one voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Generic, NamedTuple

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from znni_dask.geometry import Size, triple, volume
from znni_dask.kernels.axes import (
    NUMBER_BYTES,
    Axis,
    N,
    Strides,
    axes_from,
    numbers_at,
    strides_from,
)
from znni_dask.kernels.code import VECTOR_BYTES, Address, Function, Number, Vector
from znni_dask.kernels.compiled import Library, is_kept, kept_library
from znni_dask.kernels.turns import Turn

CONVOLVE = "convolve"
LONGEST = 3  # kernel for which four products are fewer
TURN_BYTES = NUMBER_BYTES * len(Turn._fields)
ZEROS_BYTES = 5 * VECTOR_BYTES  # read where padding is, and as biases of products
_POINTS = 4


@dataclass(frozen=True)
class Tile:
    """What is computed at once, for kernels of a size: ``size`` voxels of the input, and as many
    points, make ``made`` of the output."""

    kernel: Size

    @property
    def size(self) -> Size:
        """Voxels of the input; an axis along which the kernel is one voxel has one."""
        return triple(1 if k == 1 else _POINTS for k in self.kernel)

    @property
    def made(self) -> Size:
        """Voxels of the output."""
        return triple(n + 1 - k for n, k in zip(self.size, self.kernel, strict=True))

    @property
    def points(self) -> int:
        """Products of each channel with each."""
        return volume(self.size)

    @property
    def points_of_plane(self) -> int:
        """Those at one point along z."""
        return self.points // self.size[0]


class Tiles(NamedTuple, Generic[N]):
    """What compiled code is told: axes, whose stride is from tile to tile, and strides of the
    input and of the output; tiles of all samples, and how many are computed at once; blocks of
    channels that are read and made; the bytes from point to point of values and of their products;
    how many turns make the products at a plane of points.
    """

    z: Axis[N]
    y: Axis[N]
    x: Axis[N]
    source: Strides[N]
    target: Strides[N]
    tiles: N
    at_once: N
    read: N
    made: N
    value_bytes: N
    product_bytes: N
    turns: N


def kernel_matrix(kernel: int) -> NDArray[np.float32]:
    """What makes a kernel's values at the points of an axis of its taps."""
    if kernel == 1:
        return np.ones((1, 1), np.float32)
    matrix = np.zeros((_POINTS, kernel), np.float32)
    matrix[0, 0] = matrix[-1, -1] = 1
    matrix[1] = matrix[2] = 1 / 2
    matrix[2, 1::2] *= -1
    return matrix


@cache
def winograd_library(tile: Tile, relu: bool) -> Library:
    """The compiled function."""
    return kept_library(winograd_module, tile, relu)


def winograd_kept(tile: Tile, relu: bool) -> bool:
    """Whether they are compiled already."""
    return is_kept(winograd_module, tile, relu)


def winograd_module(tile: Tile, relu: bool) -> ir.Module:
    """It as it is written. Items are batches of tiles (batch, z, y, x).

    ``turns`` are calls of compiled functions, point after point, of places behind those of the
    values, of the kernels' values and of the products. ``memory`` is the thread's own:
    `ZEROS_BYTES`, values of a batch at the points of a plane, (point, block of channels, tile),
    and products like values. Planes of points come one after the other, so that many tiles have
    room in the second-level cache; each adds its share to the output.
    """
    module = ir.Module(f"winograd {tile.kernel} {relu}")
    planes = range(tile.size[0])
    evaluate = [_write_evaluate(module, tile, plane) for plane in planes]
    restore = [_write_restore(module, tile, plane, relu) for plane in planes]
    addresses = ("tiles", "turns", "source", "kernels", "biases", "out", "memory")
    code = Function(module, CONVOLVE, addresses, ("first", "last"))
    place, turns, source, kernels, biases, out, zeros = code.addresses
    told, values = _told(place), zeros + ZEROS_BYTES
    products = values + told.value_bytes * tile.points_of_plane
    for offset in range(0, ZEROS_BYTES, VECTOR_BYTES):
        zeros.store(code.vector(), offset)
    with code.loop(*code.numbers) as batch:
        begin = batch * told.at_once
        count = (told.tiles - begin).at_most(told.at_once)
        for plane in planes:
            code.call(evaluate[plane], place, source, zeros, values, begin, count)
            with code.loop(told.turns * plane, told.turns * (plane + 1)) as number:
                turn = islice(numbers_at(turns + number * TURN_BYTES), len(Turn._fields))
                function, numbers, behind, weights, _, to, items = turn
                places = values + behind, kernels + weights, zeros, products + to
                code.call_at(function, numbers, *places, 0, items)
            code.call(restore[plane], place, products, biases, out, begin, count)
    code.finish()
    return module


def _write_evaluate(module: ir.Module, tile: Tile, plane: int) -> Function:
    """The values of ``count`` tiles of the input from number ``begin`` on, at a plane of points."""
    inside, reached = (_write_values(module, tile, plane, padded) for padded in (False, True))
    addresses = ("tiles", "source", "zeros", "values")
    code = Function(module, f"evaluate_{plane}", addresses, ("begin", "count"), inner=True)
    (place, source, zeros, values), (begin, count) = code.addresses, code.numbers
    told = _told(place)
    strides = (told.source.z, told.source.y, told.source.x)
    with code.loop(0, count) as number:
        here = _Place.of(told, tile, begin + number)
        starts = [a + axis.offset for a, axis in zip(here.starts, told[:3], strict=True)]
        corner = _at(source, told.source, here.sample, starts)
        spans: list[Number] = []
        missing = code.number(0)
        for start, axis, size in zip(starts, told[:3], tile.size, strict=True):
            begins, end = (start * -1).at_least(0), (axis.size - start).at_most(size)
            spans, missing = [*spans, begins, end], missing + begins + size - end
        with code.loop(0, told.read) as block:
            to = values + (block * told.at_once + number) * VECTOR_BYTES
            given = corner + block * told.source.block, zeros, to, *strides, told.value_bytes
            with code.when(missing.equals(0)):
                code.call(inside, *given, *spans)
            with code.when(missing.differs(0)):
                code.call(reached, *given, *spans)
    return code.finish()


def _write_values(module: ir.Module, tile: Tile, plane: int, padded: bool) -> Function:
    """The values of one tile at a plane of points: two of its planes make them. With padding only
    what lies within spans (first and end along z, y and x) is there; all else is zero."""
    code = Function(
        module,
        f"values_{plane}_{padded}",
        ("source", "zeros", "target"),
        ("z", "y", "x", "point_bytes", *(f"{end}_{axis}" for axis in "zyx" for end in ("a", "b"))),
        inner=True,
    )
    (source, zeros, target), (*strides, point_bytes) = code.addresses, code.numbers[:4]
    spans = list(zip(code.numbers[4::2], code.numbers[5::2], strict=True))
    nz, ny, nx = tile.size

    def there(*voxel: int) -> ir.Value:
        pairs = zip(voxel, spans, strict=True)
        return code.all(*(c for n, (a, b) in pairs for c in (a < n + 1, b > n)))

    def load(*voxel: int) -> Vector:
        place = source
        for n, stride in zip(voxel, strides, strict=True):
            place = place + stride * n
        return (code.choose(there(*voxel), place, zeros) if padded else place).load()

    lines = [
        [_evaluated([load(z, y, x) for z in range(nz)])[plane] for y in range(ny)]
        for x in range(nx)
    ]
    lines = [_evaluated(line) for line in lines]
    for y in range(ny):
        for x, value in enumerate(_evaluated([line[y] for line in lines])):
            target.store(value, point_bytes * (y * nx + x))
    return code.finish()


def _write_restore(module: ir.Module, tile: Tile, plane: int, relu: bool) -> Function:
    """The share of a plane of points in tiles of the output: the first adds the bias."""
    addresses = ("tiles", "products", "biases", "out")
    code = Function(module, f"restore_{plane}", addresses, ("begin", "count"), inner=True)
    (place, products, biases, out), (begin, count) = code.addresses, code.numbers
    told = _told(place)
    strides = (told.target.z, told.target.y, told.target.x)
    with code.loop(0, count) as number:
        here = _Place.of(told, tile, begin + number)
        corner = _at(out, told.target, here.sample, here.starts)
        left = [axis.outputs - start for axis, start in zip(told[:3], here.starts, strict=True)]
        with code.loop(0, told.made) as block:
            source = products + (block * told.at_once + number) * VECTOR_BYTES
            bias, target = biases.load(block * VECTOR_BYTES), corner + block * told.target.block
            answers = _restored(source, tile, told.product_bytes)
            for z, shares in enumerate(_shares(tile)):
                if not shares[plane]:
                    continue
                for (y, x), answer in answers.items():
                    with code.when(
                        code.all(*(n > v for n, v in zip(left, (z, y, x), strict=True)))
                    ):
                        to = target + strides[0] * z + strides[1] * y + strides[2] * x
                        before = to.load() if any(shares[:plane]) else bias
                        value = before + answer if shares[plane] > 0 else before - answer
                        last = relu and not any(shares[plane + 1 :])
                        to.store(value.at_least(code.vector()) if last else value)
    return code.finish()


def _restored(source: Address, tile: Tile, point_bytes: Number) -> dict[tuple[int, int], Vector]:
    """What the products at a plane of points make, along y and x."""
    _, ny, nx = tile.size
    _, my, mx = tile.made
    lines = [
        _answers([source.load(point_bytes * (y * nx + x)) for x in range(nx)], mx)
        for y in range(ny)
    ]
    columns = [_answers([line[x] for line in lines], my) for x in range(mx)]
    return {(y, x): columns[x][y] for y in range(my) for x in range(mx)}


def _shares(tile: Tile) -> list[list[int]]:
    """Of every plane of a tile of the output how the planes of points are added up."""
    if tile.size[0] == 1:
        return [[1]]
    made = tile.made[0]
    return [[int(z == 0), 1, (-1) ** z, int(z == made - 1)] for z in range(made)]


def _evaluated(x: list[Vector]) -> list[Vector]:
    """Values at 0, 1, -1 and infinity; halves are the kernel's."""
    if len(x) == 1:
        return x
    a, b, c, d = x
    return [a - c, b + c, c - b, d - b]


def _answers(products: list[Vector], made: int) -> list[Vector]:
    """What the products at these points make."""
    if len(products) == 1:
        return products
    at_zero, at_one, at_minus_one, at_infinity = products
    even, odd = at_one + at_minus_one, at_one - at_minus_one
    found = [even, odd, even][:made]
    found[0] = found[0] + at_zero
    found[-1] = found[-1] + at_infinity
    return found


def _at(
    array: Address, strides: Strides[Number], sample: Number, voxel: Sequence[Number]
) -> Address:
    """A voxel of a sample's first block."""
    z, y, x = voxel
    return array + sample * strides.batch + z * strides.z + y * strides.y + x * strides.x


class _Place(NamedTuple):
    """A tile: its sample, and its first output along each axis."""

    sample: Number
    starts: list[Number]

    @classmethod
    def of(cls, told: Tiles[Number], tile: Tile, number: Number) -> _Place:
        starts = []
        for axis, made in zip(reversed(told[:3]), reversed(tile.made), strict=True):
            tiles = (axis.outputs + (made - 1)) // made
            starts.append(number % tiles * made)
            number = number // tiles
        return cls(number, starts[::-1])


def _told(place: Address) -> Tiles[Number]:
    """The numbers of `flat`, as code."""
    numbers = numbers_at(place)
    axes, source, target = axes_from(numbers), strides_from(numbers), strides_from(numbers)
    return Tiles(*axes, source, target, *islice(numbers, len(Tiles._fields) - 5))
