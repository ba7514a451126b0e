"""Compiled loop that takes an array apart into its phases: every so many-th voxel."""

from __future__ import annotations

from numba import njit

from znni_dask.kernels.direct import OPTIONS


@njit(**OPTIONS)
def take_apart(x, out, index_z, index_y, index_x, channels, first, last):
    """``out[c, z, y, i] = x[c % channels, index_z[p, z], index_y[q, y], index_x[r, i]]``, where
    ``c // channels`` counts the phases (p, q, r); 0 where an index is -1, or c beyond them.

    Arrays are (batch, block, z, y, x, lane), float32: a channel is a lane of a block. Items are
    (batch, z, y) of ``out``.
    """
    lanes, lanes_made = x.shape[5], out.shape[5]
    phases_y, phases_x = len(index_y), len(index_x)
    phases = len(index_z) * phases_y * phases_x
    for item in range(first, last):
        plane, y = divmod(item, out.shape[3])
        batch, z = divmod(plane, out.shape[2])
        for made in range(out.shape[1] * lanes_made):
            target = out[batch, made // lanes_made, z, y, :, made % lanes_made]
            phase, channel = divmod(made, channels)
            line, r = divmod(phase, phases_x)
            p, q = divmod(line, phases_y)
            if phase >= phases or index_z[p, z] < 0 or index_y[q, y] < 0:
                target[:] = 0
                continue
            row = x[batch, channel // lanes, index_z[p, z], index_y[q, y], :, channel % lanes]
            for i in range(len(target)):
                target[i] = row[index_x[r, i]] if index_x[r, i] >= 0 else 0
