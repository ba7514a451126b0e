"""Compiled loops of normalisation: means and variances, and what is done with them.

Sums are kept in double precision and always added in the same order, one that compilers choose, so
that the answer does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from znni_dask.kernels.direct import OPTIONS

_IN_VECTORS = OPTIONS | {"fastmath": {"contract", "nsz", "reassoc"}}


@njit(**_IN_VECTORS)
def moments(rows, mean, spread, first, last):
    """Mean of every row, and the sum of squared differences from it."""
    width = rows.shape[1]
    for item in range(first, last):
        row = rows[item]
        total = 0.0
        for i in range(width):
            total += row[i]
        centre = total / width
        squares = 0.0
        for i in range(width):
            d = row[i] - centre
            squares += d * d
        mean[item] = centre
        spread[item] = squares


@njit(**OPTIONS)
def scale_rows(rows, centre, factor, shift, first, last):
    """``rows[i] = (rows[i] - centre[i]) · factor[i] + shift[i]``, in place."""
    for item in range(first, last):
        row = rows[item]
        m, a, b = centre[item], factor[item], shift[item]
        for i in range(row.shape[0]):
            row[i] = (row[i] - m) * a + b


@njit(**OPTIONS)
def normalize_channels(x, groups, epsilon, scale, shift, first, last):
    """Normalise every voxel over each of its groups of channels, in place.

    Items are (batch, z).
    """
    _, channels, size_z, size_y, size_x = x.shape
    wide = channels // groups
    mean = np.empty(size_x, np.float64)
    spread = np.empty(size_x, np.float64)
    for item in range(first, last):
        batch, z = divmod(item, size_z)
        for y in range(size_y):
            for g in range(groups):
                mean[:] = 0
                spread[:] = 0
                for c in range(g * wide, (g + 1) * wide):
                    row = x[batch, c, z, y]
                    for i in range(size_x):
                        mean[i] += row[i]
                for i in range(size_x):
                    mean[i] /= wide
                for c in range(g * wide, (g + 1) * wide):
                    row = x[batch, c, z, y]
                    for i in range(size_x):
                        d = row[i] - mean[i]
                        spread[i] += d * d
                for i in range(size_x):
                    spread[i] = 1 / np.sqrt(spread[i] / wide + epsilon)
                for c in range(g * wide, (g + 1) * wide):
                    row = x[batch, c, z, y]
                    for i in range(size_x):
                        row[i] = (row[i] - mean[i]) * spread[i] * scale[c] + shift[c]
