"""Compiled loops that fetch values from elsewhere: padding, nearest and linear resizing.

Which input an output looks at is a matter of each axis by itself; callers say it in arrays of
indices, one per axis. Arrays and items are as in `kernels.direct`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from znni_dask.kernels.direct import OPTIONS, placed


@njit(**OPTIONS)
def gather(x, out, index_z, index_y, index_x, value, first, last):
    """``out[z, y, x] = x[index_z[z], index_y[y], index_x[x]]``; ``value`` where one is -1."""
    _, channels, out_z, out_y, out_x = out.shape
    for item in range(first, last):
        batch, c, z = placed(item, channels, out_z)
        for y in range(out_y):
            target = out[batch, c, z, y]
            if index_z[z] < 0 or index_y[y] < 0:
                target[:] = value
                continue
            source = x[batch, c, index_z[z], index_y[y]]
            for i in range(out_x):
                target[i] = source[index_x[i]] if index_x[i] >= 0 else value


@njit(**OPTIONS)
def interpolate(x, out, below, above, weight, first, last):
    """Linear interpolation: along axis a output i lies between inputs ``below[a][i]`` and
    ``above[a][i]``, ``weight[a][i]`` of the way (a triple of arrays each)."""
    _, channels, _, _, size_x = x.shape
    _, _, out_z, out_y, out_x = out.shape
    line = np.empty(size_x, np.float32)
    for item in range(first, last):
        batch, c, z = placed(item, channels, out_z)
        plane0, plane1 = x[batch, c, below[0][z]], x[batch, c, above[0][z]]
        v = weight[0][z]
        for y in range(out_y):
            a, b, w = below[1][y], above[1][y], weight[1][y]
            row00, row01, row10, row11 = plane0[a], plane0[b], plane1[a], plane1[b]
            for i in range(size_x):
                near = row00[i] + w * (row01[i] - row00[i])
                far = row10[i] + w * (row11[i] - row10[i])
                line[i] = near + v * (far - near)
            target = out[batch, c, z, y]
            for i in range(out_x):
                p = line[below[2][i]]
                target[i] = p + weight[2][i] * (line[above[2][i]] - p)


@njit(**OPTIONS)
def depth_to_space(x, out, offset, factor, first, last):
    """Items are (batch, output channel, z); ``offset`` counts in steps of the output."""
    _, channels, out_z, out_y, out_x = out.shape
    for item in range(first, last):
        batch, c, z = placed(item, channels, out_z)
        iz, part_z = divmod(z + offset[0], factor[0])
        for y in range(out_y):
            iy, part_y = divmod(y + offset[1], factor[1])
            source = ((c * factor[0] + part_z) * factor[1] + part_y) * factor[2]
            target = out[batch, c, z, y]
            for i in range(out_x):
                ix, part_x = divmod(i + offset[2], factor[2])
                target[i] = x[batch, source + part_x, iz, iy, ix]
