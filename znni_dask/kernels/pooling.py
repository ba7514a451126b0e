"""Compiled loops of pooling. Arrays, offsets and items are as in `kernels.direct`."""

from __future__ import annotations

import numpy as np
from numba import njit

from znni_dask.kernels.code import LANES
from znni_dask.kernels.direct import OPTIONS, reach


@njit(**OPTIONS)
def max_pool(x, out, offset, kernel, stride, dilation, first, last):
    """Items are (batch, channel, z); padding never wins."""
    _, channels, size_z, size_y, size_x = x.shape
    _, _, out_z, out_y, out_x = out.shape
    for item in range(first, last):
        z = item % out_z
        c = item // out_z % channels
        batch = item // (out_z * channels)
        for y in range(out_y):
            target = out[batch, c, z, y]
            target[:] = -np.inf
            for tz in range(kernel[0]):
                iz = z * stride[0] + tz * dilation[0] + offset[0]
                if iz < 0 or iz >= size_z:
                    continue
                for ty in range(kernel[1]):
                    iy = y * stride[1] + ty * dilation[1] + offset[1]
                    if iy < 0 or iy >= size_y:
                        continue
                    row = x[batch, c, iz, iy]
                    for tx in range(kernel[2]):
                        shift = tx * dilation[2] + offset[2]
                        _max_row(target, row, shift, stride[2], out_x, size_x)


@njit(**OPTIONS)
def _max_row(target, row, shift, stride, width, size_x):
    """Raise every ``target[i]`` to ``row[i · stride + shift]``; NaN, once met, stays."""
    low, high = reach(shift, stride, width, size_x)
    for i in range(low, high):
        v = row[i * stride + shift]
        if v > target[i] or v != v:
            target[i] = v


@njit(**OPTIONS)
def max_pool_blocked(x, out, offset, kernel, stride, dilation, first, last):
    """The same of blocks of channels; items are (batch, block, z)."""
    _, blocks, size_z, size_y, size_x, _ = x.shape
    _, _, out_z, out_y, out_x, _ = out.shape
    for item in range(first, last):
        z = item % out_z
        block = item // out_z % blocks
        batch = item // (out_z * blocks)
        for y in range(out_y):
            for i in range(out_x):
                target = out[batch, block, z, y, i]
                target[:] = -np.inf
                for tz in range(kernel[0]):
                    iz = z * stride[0] + tz * dilation[0] + offset[0]
                    if iz < 0 or iz >= size_z:
                        continue
                    for ty in range(kernel[1]):
                        iy = y * stride[1] + ty * dilation[1] + offset[1]
                        if iy < 0 or iy >= size_y:
                            continue
                        for tx in range(kernel[2]):
                            ix = i * stride[2] + tx * dilation[2] + offset[2]
                            if 0 <= ix < size_x:
                                _raise(target, x[batch, block, iz, iy, ix])


@njit(**OPTIONS)
def _raise(target, values):
    """Raise every value of a block to another; NaN, once met, stays."""
    for lane in range(LANES):
        v, largest = values[lane], target[lane]
        target[lane] = v if v > largest or v != v else largest


@njit(**OPTIONS)
def average_pool(x, out, offset, kernel, stride, dilation, share_z, share_y, share_x, first, last):
    """Items are (batch, channel, z); padding adds nothing. The sum of window (z, y, x) is
    multiplied by ``share_z[z] · share_y[y] · share_x[x]``."""
    _, channels, size_z, size_y, size_x = x.shape
    _, _, out_z, out_y, out_x = out.shape
    for item in range(first, last):
        z = item % out_z
        c = item // out_z % channels
        batch = item // (out_z * channels)
        for y in range(out_y):
            target = out[batch, c, z, y]
            target[:] = 0
            for tz in range(kernel[0]):
                iz = z * stride[0] + tz * dilation[0] + offset[0]
                if iz < 0 or iz >= size_z:
                    continue
                for ty in range(kernel[1]):
                    iy = y * stride[1] + ty * dilation[1] + offset[1]
                    if iy < 0 or iy >= size_y:
                        continue
                    row = x[batch, c, iz, iy]
                    for tx in range(kernel[2]):
                        shift = tx * dilation[2] + offset[2]
                        low, high = reach(shift, stride[2], out_x, size_x)
                        for i in range(low, high):
                            target[i] += row[i * stride[2] + shift]
            share = share_z[z] * share_y[y]
            for i in range(out_x):
                target[i] *= share * share_x[i]


@njit(**OPTIONS)
def average_pool_blocked(
    x, out, offset, kernel, stride, dilation, share_z, share_y, share_x, first, last
):
    """The same of blocks of channels; items are (batch, block, z)."""
    _, blocks, size_z, size_y, size_x, _ = x.shape
    _, _, out_z, out_y, out_x, _ = out.shape
    for item in range(first, last):
        z = item % out_z
        block = item // out_z % blocks
        batch = item // (out_z * blocks)
        for y in range(out_y):
            for i in range(out_x):
                target = out[batch, block, z, y, i]
                target[:] = 0
                for tz in range(kernel[0]):
                    iz = z * stride[0] + tz * dilation[0] + offset[0]
                    if iz < 0 or iz >= size_z:
                        continue
                    for ty in range(kernel[1]):
                        iy = y * stride[1] + ty * dilation[1] + offset[1]
                        if iy < 0 or iy >= size_y:
                            continue
                        for tx in range(kernel[2]):
                            ix = i * stride[2] + tx * dilation[2] + offset[2]
                            if 0 <= ix < size_x:
                                for lane in range(LANES):
                                    target[lane] += x[batch, block, iz, iy, ix, lane]
                share = share_z[z] * share_y[y] * share_x[i]
                for lane in range(LANES):
                    target[lane] *= share
