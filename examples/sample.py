"""A made-up electron-microscopy volume of any size, with its true membranes.

For trying a network, a plan or a cluster when no real volume is at hand: the command writes a raw
volume and its truth as two OME-Zarr stores, and `generate` makes any box of the same, infinite
volume as arrays. Cells are a Voronoi diagram of hashed lattice points, curved by a smooth warp;
some are bundles of thin neurites. Mitochondria and vesicles are dark too, but are no membranes.

    python examples/sample.py raw.zarr membranes.zarr --size 256,256,256 --seed 1
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size
from znni_dask.storage import output
from znni_dask.storage.encoding import Encoding

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]

VOXEL_NANOMETERS = (30.0, 8.0, 8.0)
# The same in pixels, the unit of all lengths below; less than 30 / 8 along z, so that cells are
# drawn out along z, as neurites that run that way.
VOXEL_PIXELS = (2.6, 1.0, 1.0)
BLOCK = (32, 64, 64)  # made at once; the grid is fixed, so that boxes agree to the last bit
BLUR_MARGIN = (1, 3, 3)
CHUNK = (64, 64, 64)

MEMBRANE_HALF_WIDTH = 2.3
MEMBRANE_GREY = 62.0
BUNDLES = 0.30  # share of the cells that are bundles of thin neurites


@dataclass(frozen=True)
class Lattice:
    """Cell centres, one near every point of a cubic lattice; lengths in pixels."""

    stream: int
    spacing: float
    jitter: float
    weight: float

    @property
    def reach(self) -> float:
        """No centre farther away than this takes part in a voxel's cell or its walls."""
        return 1.75 * self.spacing


CELLS = Lattice(stream=1, spacing=64.0, jitter=0.95, weight=0.35)
NEURITES = Lattice(stream=2, spacing=33.0, jitter=0.9, weight=0.3)
VESICLE_SPACING = 13.0
WARP, FINE_WARP, SMUDGE, SHADE, GRAIN, NOISE, SECTION, VESICLE, CRISTAE = range(10, 100, 10)


@dataclass(frozen=True)
class Anatomy:
    """What is where in one section: per pixel, its cell, and the distance to the nearest wall."""

    cell: Bits
    wall_distance: Floats
    from_centre: Floats  # (3, pixels), from the centre of the large cell
    large_cell: Bits


def generate(
    shape: Sequence[int], seed: int = 0, start: Sequence[int] = (0, 0, 0)
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Make the box of `shape` voxels (z, y, x) that begins at `start` in the volume of `seed`.

    Returns the raw grey values, uint8, and the membranes, bool. Boxes that overlap agree exactly
    where they do; `start` may be negative. Peak memory is the result and one small block.
    """
    raw = np.empty(tuple(shape), np.uint8)
    membranes = np.empty(tuple(shape), np.bool_)
    stop = [low + length for low, length in zip(start, shape, strict=True)]
    blocks = (
        range(low // side, -(-high // side))
        for low, high, side in zip(start, stop, BLOCK, strict=True)
    )
    for index in itertools.product(*blocks):
        corner = [i * side for i, side in zip(index, BLOCK, strict=True)]
        low = [max(a, b) for a, b in zip(corner, start, strict=True)]
        high = [min(a + n, b) for a, n, b in zip(corner, BLOCK, stop, strict=True)]
        inside = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))
        target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        block_raw, block_membranes = _block((corner[0], corner[1], corner[2]), seed)
        raw[target] = block_raw[inside]
        membranes[target] = block_membranes[inside]
    return raw, membranes


def save(raw_path: Path, membranes_path: Path, size: Size, seed: int) -> None:
    """Write both volumes as OME-Zarr, slab by slab; what was there before is replaced."""
    stores = [
        output.create(
            path,
            output.output_layout(Encoding("uint8"), 1, size, CHUNK),
            scale=VOXEL_NANOMETERS,
            translation=(0.0, 0.0, 0.0),
            units=("nanometer",) * 3,
            attributes={},
        ).arrays[0]
        for path in (raw_path, membranes_path)
    ]
    for z in range(0, size[0], CHUNK[0]):
        depth = min(CHUNK[0], size[0] - z)
        raw, membranes = generate((depth, *size[1:]), seed, (z, 0, 0))
        stores[0][z : z + depth] = raw
        stores[1][z : z + depth] = membranes.astype(np.uint8)


def _block(corner: Size, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One block of the fixed grid, made with the margin that the blur needs, then cropped."""
    begin = (corner[0] - BLUR_MARGIN[0], corner[1] - BLUR_MARGIN[1], corner[2] - BLUR_MARGIN[2])
    shape = (
        BLOCK[0] + 2 * BLUR_MARGIN[0],
        BLOCK[1] + 2 * BLUR_MARGIN[1],
        BLOCK[2] + 2 * BLUR_MARGIN[2],
    )
    points = _warped_points(begin, shape, seed)
    stretch = _stretch(points)
    grey = np.empty(shape, np.float32)
    wall_distance = np.empty(shape, np.float32)
    cristae = _smooth_noise(begin, shape, 6.0, seed, CRISTAE)
    for z in range(shape[0]):
        section = points[:, z].reshape(3, -1)
        anatomy = _anatomy(section, stretch[z].ravel(), begin, seed)
        wall_distance[z] = anatomy.wall_distance.reshape(shape[1:])
        grey[z] = _paint(section, anatomy, cristae[z].ravel(), begin, seed).reshape(shape[1:])
    smudge = np.maximum(_smooth_noise(begin, shape, 34.0, seed, SMUDGE) - 0.25, 0)
    grey -= 200 * smudge * np.maximum(1 - wall_distance / 18, 0)
    grey += 50 * _smooth_noise(begin, shape, 10.0, seed, SHADE)
    grey += 76 * _voxel_noise(begin, shape, seed, GRAIN)
    crop = tuple(slice(m, m + n) for m, n in zip(BLUR_MARGIN, BLOCK, strict=True))
    raw = _blur(grey)[crop] + 14 * _voxel_noise(corner, BLOCK, seed, NOISE)
    raw = _section_contrast(raw, corner[0], seed)
    membranes = wall_distance[crop] < MEMBRANE_HALF_WIDTH
    return np.clip(np.rint(raw), 0, 255).astype(np.uint8), membranes


def _warped_points(begin: Size, shape: Size, seed: int) -> Floats:
    """(3, z, y, x): every voxel's place in pixels, from the block's begin, bent smoothly."""
    points = np.empty((3, *shape), np.float32)
    for axis in range(3):
        steps = np.arange(shape[axis], dtype=np.float32) * np.float32(VOXEL_PIXELS[axis])
        points[axis] = np.expand_dims(steps, tuple({0, 1, 2} - {axis}))
        points[axis] += 75 * _smooth_noise(begin, shape, 90.0, seed, WARP + axis)
        points[axis] += 17 * _smooth_noise(begin, shape, 26.0, seed, FINE_WARP + axis)
    return points


def _stretch(points: Floats) -> Floats:
    """How much the warp lengthens distances around every voxel, on average over directions."""
    squares = np.zeros(points.shape[1:], np.float32)
    for axis in range(3):
        for slope in np.gradient(points[axis], *VOXEL_PIXELS):
            squares += slope**2
    return np.sqrt(squares / 3)


def _anatomy(section: Floats, stretch: Floats, begin: Size, seed: int) -> Anatomy:
    """Find the cell of every pixel: a large one, or a neurite where the large one is a bundle.

    `stretch` turns distances in the bent space into distances in the volume.
    """
    centres, bits = _centres(section, begin, CELLS, seed)
    owner, wall_distance = _nearest(section, centres)
    large_cell = bits[owner]
    from_centre = section - centres[:3, owner]
    cell = large_cell.copy()
    bundled = np.flatnonzero(_uniform(large_cell, 1) < BUNDLES)
    if bundled.size:
        thin_centres, thin_bits = _centres(section[:, bundled], begin, NEURITES, seed)
        thin_owner, thin_distance = _nearest(section[:, bundled], thin_centres)
        cell[bundled] = thin_bits[thin_owner]
        wall_distance[bundled] = np.minimum(wall_distance[bundled], thin_distance)
    return Anatomy(cell, wall_distance / stretch, from_centre, large_cell)


def _centres(points: Floats, begin: Size, lattice: Lattice, seed: int) -> tuple[Floats, Bits]:
    """The centres that matter to `points` (3, n): rows z, y, x and weight; and a hash for each."""
    origin = np.multiply(begin, VOXEL_PIXELS)
    low = np.floor((origin + points.min(axis=1) - lattice.reach) / lattice.spacing).astype(np.int64)
    high = np.ceil((origin + points.max(axis=1) + lattice.reach) / lattice.spacing).astype(np.int64)
    axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    z, y, x = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
    bits = _hash(z, y, x, seed, lattice.stream)
    centres = np.empty((4, bits.size), np.float32)
    for axis, index in enumerate((z, y, x)):
        place = index + 0.5 + lattice.jitter * (_uniform(bits, 10 + axis) - 0.5)
        centres[axis] = place * lattice.spacing - origin[axis]
    centres[3] = lattice.weight * lattice.spacing**2 * _uniform(bits, 13)
    outside = np.maximum(points.min(axis=1)[:, None] - centres[:3], 0)
    outside += np.maximum(centres[:3] - points.max(axis=1)[:, None], 0)
    near = (outside**2).sum(axis=0) < lattice.reach**2
    return centres[:, near], bits[near]


def _nearest(points: Floats, centres: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Power diagram: the centre that owns each point, and the distance to the cell's wall.

    The wall between centres a and b is a plane; a point of cell a with powers p_a < p_b lies
    (p_b - p_a) / (2 |a - b|) away from it.
    """
    place, weight = centres[:3], centres[3]
    offset = (place**2).sum(axis=0) - weight
    power = offset[:, None] - 2 * place[0][:, None] * points[0]
    power -= 2 * place[1][:, None] * points[1]
    power -= 2 * place[2][:, None] * points[2]
    owner = power.argmin(axis=0)
    own_power = np.take_along_axis(power, owner[None], axis=0)
    apart = np.sqrt(((place[:, :, None] - place[:, None, :]) ** 2).sum(axis=0))
    np.fill_diagonal(apart, np.float32(1e-9))
    power -= own_power
    np.put_along_axis(power, owner[None], np.float32(1e9), axis=0)
    power *= (0.5 / apart)[:, owner]
    return owner, power.min(axis=0)


def _paint(section: Floats, anatomy: Anatomy, cristae: Floats, begin: Size, seed: int) -> Floats:
    """Grey values of one section before blur and noise."""
    cell, distance = anatomy.cell, anatomy.wall_distance
    grey = 158 + 26 * (_uniform(cell, 2) - 0.5)
    grey -= 26 * (_uniform(cell, 3) < 0.12)
    grey -= _vesicles(section, begin, seed) * 80 * (_uniform(cell, 4) < 0.45)
    for organelle in range(2):
        inside, rim = _mitochondrion(anatomy, 20 + 10 * organelle)
        texture = 92 + 110 * cristae
        grey += inside * (texture - grey)
        grey -= 38 * rim
    wall = np.clip(1.45 - distance / MEMBRANE_HALF_WIDTH, 0, 1)
    grey += wall * (MEMBRANE_GREY - grey)
    return grey


def _mitochondrion(anatomy: Anatomy, salt: int) -> tuple[Floats, Floats]:
    """Share (0-1) of each pixel inside its large cell's ellipsoid, and on that one's outline."""
    bits = anatomy.large_cell
    hosts = (_uniform(bits, salt) < 0.5) & (_uniform(bits, 1) >= BUNDLES)
    radius = (8 + 14 * _uniform(bits, salt + 1)) * hosts
    axis = np.stack([_uniform(bits, salt + k) - 0.5 for k in (2, 3, 4)])
    axis /= np.sqrt((axis**2).sum(axis=0)) + np.float32(1e-6)
    shift = np.stack([_uniform(bits, salt + k) - 0.5 for k in (5, 6, 7)])
    place = anatomy.from_centre - 30 * shift
    along = (place * axis).sum(axis=0)
    depth = radius - np.sqrt(np.maximum((place**2).sum(axis=0) - 0.8 * along**2, 0))
    depth = np.minimum(depth, anatomy.wall_distance - 2 * MEMBRANE_HALF_WIDTH)
    inside = np.clip(depth, 0, 1)
    rim = np.clip(1 - np.abs(depth - 1) / 2, 0, 1)
    return inside, rim


def _vesicles(section: Floats, begin: Size, seed: int) -> Floats:
    """Share (0-1) of each pixel on the dark shell of a vesicle; at most one per lattice cube."""
    scaled = section / np.float32(VESICLE_SPACING)
    origin = np.multiply(begin, VOXEL_PIXELS) / VESICLE_SPACING
    scaled += (origin - np.floor(origin)).astype(np.float32)[:, None]
    cube = np.floor(scaled)
    z, y, x = cube.astype(np.int64) + np.floor(origin).astype(np.int64)[:, None]
    bits = _hash(z, y, x, seed, VESICLE)
    squared = np.zeros(bits.shape, np.float32)
    for axis in range(3):
        centre = 0.35 + 0.3 * _uniform(bits, axis)
        squared += (scaled[axis] - cube[axis] - centre) ** 2
    distance = np.float32(VESICLE_SPACING) * np.sqrt(squared)
    shell: Floats = np.clip(1.6 - np.abs(distance - 2.6), 0, 1)
    shell *= _uniform(bits, 3) < 0.6
    return shell


def _blur(grey: Floats) -> Floats:
    """Binomial blur, wider along z than the voxel's own size; edges are for the margin."""
    for axis, taps in ((0, (1, 3, 1)), (1, (1, 4, 6, 4, 1)), (2, (1, 4, 6, 4, 1))):
        reach = len(taps) // 2
        padded = np.pad(grey, [(reach, reach) if a == axis else (0, 0) for a in range(3)], "edge")
        parts = (
            np.float32(tap / sum(taps)) * padded.take(range(k, k + grey.shape[axis]), axis)
            for k, tap in enumerate(taps)
        )
        grey = sum(parts, np.zeros_like(grey))
    return grey


def _section_contrast(raw: Floats, z: int, seed: int) -> Floats:
    """Every section has its own brightness and contrast, as sections on a grid do."""
    index = np.arange(z, z + raw.shape[0])
    bits = _hash(index, np.zeros_like(index), np.zeros_like(index), seed, SECTION)
    contrast = (0.92 + 0.16 * _uniform(bits, 0))[:, None, None]
    brightness = (10 * (_uniform(bits, 1) - 0.5))[:, None, None]
    shown: Floats = contrast * (raw - 126) + 126 + brightness
    return shown


def _smooth_noise(begin: Size, shape: Size, spacing: float, seed: int, stream: int) -> Floats:
    """Cubic B-spline through random values in -1..1 on a lattice of `spacing` pixels."""
    lattices, weights = [], []
    for axis in range(3):
        steps = (np.arange(shape[axis]) + begin[axis]) * VOXEL_PIXELS[axis] / spacing
        knots = np.arange(np.floor(steps[0]) - 1, np.floor(steps[-1]) + 3)
        far = np.abs(steps[:, None] - knots)
        tail = np.maximum(2 - far, 0) ** 3 / 6
        weights.append((tail - 4 * np.maximum(1 - far, 0) ** 3 / 6).astype(np.float32))
        lattices.append(knots.astype(np.int64))
    z, y, x = np.meshgrid(*lattices, indexing="ij")
    values = 2 * _uniform(_hash(z, y, x, seed, stream), 0) - 1
    noise: Floats = np.einsum("zk,kyx->zyx", weights[0], values)
    noise = np.einsum("yk,zkx->zyx", weights[1], noise)
    return np.asarray(np.einsum("xk,zyk->zyx", weights[2], noise), np.float32)


def _voxel_noise(begin: Size, shape: Size, seed: int, stream: int) -> Floats:
    """Independent noise per voxel, mean 0, standard deviation 1: the sum of a hash's four bytes."""
    ranges = (np.arange(b, b + n) for b, n in zip(begin, shape, strict=True))
    z, y, x = np.meshgrid(*ranges, indexing="ij", sparse=True)
    bits = _hash(z, y, x, seed, stream)
    total = bits.view(np.uint8).reshape(*bits.shape, 4).sum(axis=-1, dtype=np.float32)
    noise: Floats = (total - 510) / np.float32(147.8)
    return noise


def _hash(
    z: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64], seed: int, stream: int
) -> Bits:
    """32 well-mixed bits per integer position; positions broadcast."""
    key = np.uint32((seed * 0x9E3779B1 + stream * 0x85EBCA77) & 0xFFFFFFFF)
    bits = _mix(x.astype(np.uint32) ^ key)
    bits = _mix(bits + y.astype(np.uint32))
    return _mix(bits + z.astype(np.uint32))


def _mix(bits: Bits) -> Bits:
    """The finalizer of MurmurHash3 (Appleby), which lets every input bit change every output."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


def _uniform(bits: Bits, salt: int) -> Floats:
    """A number in 0..1 from each hash; other salts give independent numbers."""
    mixed = _mix(bits + np.uint32((salt + 1) * 0x9E3779B1 & 0xFFFFFFFF))
    return (mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _size(text: str) -> Size:
    parts = [int(part) for part in text.split(",")]
    if len(parts) != 3 or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give z,y,x in voxels, for instance 64,256,256")
    return parts[0], parts[1], parts[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("raw", type=Path, help="OME-Zarr store to write: grey values, uint8")
    parser.add_argument("membranes", type=Path, help="OME-Zarr store to write: the truth, 0 or 1")
    parser.add_argument("--size", type=_size, default=(128, 256, 256), metavar="Z,Y,X")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size: Size = arguments.size
    save(arguments.raw, arguments.membranes, size, arguments.seed)
    print(f"{arguments.raw} and {arguments.membranes}: {'x'.join(map(str, size))} voxels")


if __name__ == "__main__":
    main()
