"""The levels of an image: its coarser resolutions, how large they are and what they hold.

A level is made from the one before. Axes are halved whose voxels are not much longer than those of
the finest axis, so that anisotropic images become isotropic first, and shrink evenly then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size, ceil_divide, multiply, triple, volume
from znni_dask.storage.stored import Three, Units

_FINEST = (1, 1, 1)


@dataclass(frozen=True)
class Level:
    """One resolution: its size, and the voxels of the first level that one of its own spans."""

    size: Size
    factors: Size = _FINEST

    def scaled(self, scale: Three) -> Three:
        """Distance of voxels, for that of the first level."""
        z, y, x = (s * f for s, f in zip(scale, self.factors, strict=True))
        return z, y, x

    def moved(self, scale: Three, translation: Three) -> Three:
        """Centre of the first voxel, for scale and centre of the first level: the middle of the
        voxels that it spans."""
        z, y, x = (
            t + s * (f - 1) / 2 for s, t, f in zip(scale, translation, self.factors, strict=True)
        )
        return z, y, x


def levels(size: Size, spacing: Three, most: int) -> tuple[Level, ...]:
    """Levels of an image of ``size``, the first included, until one has at most ``most`` voxels.

    Halved are axes whose voxels are at most √2 as long as the shortest: there the others, halved
    alone, would not come nearer to them. Sizes are rounded up; axes of one voxel stay.

    >>> [level.size for level in levels((50, 400, 400), (40.0, 10.0, 10.0), 64**3)]
    [(50, 400, 400), (50, 200, 200), (50, 100, 100), (25, 50, 50)]
    """
    found = [Level(size)]
    while volume(found[-1].size) > most:
        last = found[-1]
        lengths = last.scaled(spacing)
        finest = min(a for a, n in zip(lengths, last.size, strict=True) if n > 1)
        step = triple(
            2 if n > 1 and a <= 2**0.5 * finest else 1
            for a, n in zip(lengths, last.size, strict=True)
        )
        smaller = triple(ceil_divide(n, s) for n, s in zip(last.size, step, strict=True))
        found.append(Level(smaller, multiply(last.factors, step)))
    return tuple(found)


def spacing(scale: Three, units: Units) -> Three:
    """How long voxels are along each axis, to be compared; 1 where that is not known, all 1 where
    the axes have different units."""
    if len(set(units)) > 1:
        return 1.0, 1.0, 1.0
    z, y, x = (abs(s) if s and np.isfinite(s) else 1.0 for s in scale)
    return z, y, x


def halved(values: NDArray[np.generic], step: Size, labels: bool) -> NDArray[np.generic]:
    """The level after: cells of ``step`` (1 or 2) voxels along the last three axes become one.

    Values become their mean, computed in float32, rounded where they are whole numbers; the last
    cell of an odd axis is the mean of what there is. Labels become the first of their cell.
    """
    if labels:
        z, y, x = step
        return values[..., ::z, ::y, ::x]
    means = values
    for axis, s in enumerate(step, start=values.ndim - 3):
        if s == 2:
            means = _means_of_pairs(means, axis)
    if np.issubdtype(values.dtype, np.integer):
        means = np.rint(means)
    return means.astype(values.dtype, copy=False)


def _means_of_pairs(values: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    first = np.moveaxis(values, axis, 0)
    means = np.empty((ceil_divide(len(first), 2), *first.shape[1:]), np.float32)
    pairs = len(first) // 2
    with np.errstate(over="ignore", invalid="ignore"):  # infinite answers are answers
        np.add(first[0 : 2 * pairs : 2], first[1::2], out=means[:pairs], dtype=np.float32)
        means[:pairs] *= 0.5
    means[pairs:] = first[2 * pairs :]
    return np.moveaxis(means, 0, axis)
