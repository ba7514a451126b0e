"""Compiled loops between arrays of channels and arrays of blocks of channels.

Plain arrays are (batch, channel, z, y, x), blocked ones (batch, channels / 16, z, y, x, 16);
float32, contiguous. Items are (batch, block of channels, z).
"""

from __future__ import annotations

from numba import njit

from znni_dask.kernels.code import LANES
from znni_dask.kernels.direct import OPTIONS


@njit(**OPTIONS)
def block(x, out, first, last):
    """Sixteen channels side by side; zero beyond the last."""
    _, channels, size_z, size_y, size_x = x.shape
    blocks = out.shape[1]
    for item in range(first, last):
        z = item % size_z
        number = item // size_z % blocks
        batch = item // (size_z * blocks)
        for y in range(size_y):
            to = out[batch, number, z, y]
            for lane in range(LANES):
                channel = number * LANES + lane
                if channel < channels:
                    row = x[batch, channel, z, y]
                    for i in range(size_x):
                        to[i, lane] = row[i]
                else:
                    for i in range(size_x):
                        to[i, lane] = 0


@njit(**OPTIONS)
def unblock(x, out, first, last):
    """Every channel for itself."""
    _, channels, size_z, size_y, size_x = out.shape
    blocks = x.shape[1]
    for item in range(first, last):
        z = item % size_z
        number = item // size_z % blocks
        batch = item // (size_z * blocks)
        for y in range(size_y):
            row = x[batch, number, z, y]
            for lane in range(min(LANES, channels - number * LANES)):
                to = out[batch, number * LANES + lane, z, y]
                for i in range(size_x):
                    to[i] = row[i, lane]
