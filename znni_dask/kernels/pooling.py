"""Compiled loops of pooling. Arrays, offsets and items are as in `kernels.direct`.

The rows behind a row of outputs are combined voxel by voxel into one line first, where padding
counts for nothing, then the line's voxels for every output.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from znni_dask.kernels.direct import OPTIONS, placed


@njit(**OPTIONS)
def max_pool(x, out, offset, kernel, stride, dilation, first, last):
    """Items are (batch, channel, z); padding never wins; NaN passes on."""
    _, channels, size_z, size_y, _ = x.shape
    _, _, out_z, out_y, out_x = out.shape
    line = np.empty((out_x - 1) * stride[2] + (kernel[2] - 1) * dilation[2] + 1, np.float32)
    for item in range(first, last):
        batch, c, z = placed(item, channels, out_z)
        for y in range(out_y):
            line[:] = -np.inf
            for tz in range(kernel[0]):
                iz = z * stride[0] + tz * dilation[0] + offset[0]
                if iz < 0 or iz >= size_z:
                    continue
                for ty in range(kernel[1]):
                    iy = y * stride[1] + ty * dilation[1] + offset[1]
                    if 0 <= iy < size_y:
                        row, part = _facing(x[batch, c, iz, iy], line, offset[2])
                        for i in range(part.shape[0]):
                            part[i] = _larger(row[i], part[i])
            target = out[batch, c, z, y]
            for i in range(out_x):
                value = line[i * stride[2]]
                for tx in range(1, kernel[2]):
                    value = _larger(line[i * stride[2] + tx * dilation[2]], value)
                target[i] = value


@njit(**OPTIONS)
def average_pool(x, out, offset, kernel, stride, dilation, share_z, share_y, share_x, first, last):
    """Items are (batch, channel, z); padding adds nothing. The sum of window (z, y, x) is
    multiplied by ``share_z[z] · share_y[y] · share_x[x]``."""
    _, channels, size_z, size_y, _ = x.shape
    _, _, out_z, out_y, out_x = out.shape
    line = np.empty((out_x - 1) * stride[2] + (kernel[2] - 1) * dilation[2] + 1, np.float32)
    for item in range(first, last):
        batch, c, z = placed(item, channels, out_z)
        for y in range(out_y):
            line[:] = 0
            for tz in range(kernel[0]):
                iz = z * stride[0] + tz * dilation[0] + offset[0]
                if iz < 0 or iz >= size_z:
                    continue
                for ty in range(kernel[1]):
                    iy = y * stride[1] + ty * dilation[1] + offset[1]
                    if 0 <= iy < size_y:
                        row, part = _facing(x[batch, c, iz, iy], line, offset[2])
                        for i in range(part.shape[0]):
                            part[i] += row[i]
            share = share_z[z] * share_y[y]
            target = out[batch, c, z, y]
            for i in range(out_x):
                total = line[i * stride[2]]
                for tx in range(1, kernel[2]):
                    total += line[i * stride[2] + tx * dilation[2]]
                target[i] = total * (share * share_x[i])


@njit(**OPTIONS)
def _facing(row, line, offset):
    """The parts of a row and of a line, which begins at voxel ``offset`` of it, that face each
    other."""
    low = max(0, -offset)
    high = max(low, min(line.shape[0], row.shape[0] - offset))
    return row[low + offset : high + offset], line[low:high]


@njit(**OPTIONS)
def _larger(value, largest):
    """The larger of both; NaN, once met, stays."""
    return value if value > largest or value != value else largest
