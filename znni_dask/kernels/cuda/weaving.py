"""Fragments woven into the answer of a patch.

A thread makes a voxel of the answer: neighbouring threads write what lies side by side, and read
stretches of as many fragments as there are along x. `WEAVE` is told of the fragments (fragment,
channel, z, y, x), of the number of the fragment for every place modulo the steps, -1 where there is
none, and of the answer (channel, z, y, x); then of channels, and of the sizes of a fragment, of the
answer and of the steps. What the answer holds where there is no fragment stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from znni_dask.geometry import ceil_divide
from znni_dask.kernels.cuda.kernel import Kernel

THREADS = 256

_SOURCE = """
typedef long long integer;

extern "C" __global__ void weave(
    const float *__restrict__ fragments, const long long *__restrict__ numbers,
    float *__restrict__ out,
    integer channels, integer part_z, integer part_y, integer part_x,
    integer out_z, integer out_y, integer out_x,
    integer step_z, integer step_y, integer step_x)
{
    int width = (int)out_x, size = (int)(out_y * out_x);
    int pieces = (size + blockDim.x - 1) / blockDim.x;
    integer plane = blockIdx.x / pieces;
    int place = (int)(blockIdx.x % pieces) * blockDim.x + threadIdx.x;
    if (place >= size)
        return;
    int z = (int)(plane % out_z), y = place / width, x = place % width;
    integer channel = plane / out_z;
    int sz = (int)step_z, sy = (int)step_y, sx = (int)step_x;
    integer number = numbers[(z % sz * sy + y % sy) * sx + x % sx];
    if (number < 0)
        return;
    integer row = ((number * channels + channel) * part_z + z / sz) * part_y + y / sy;
    out[plane * size + place] = fragments[row * part_x + x / sx];
}
"""


def _plain(fragments: Any, numbers: Any, out: Any, channels: int, *told: int) -> None:
    """The same in numpy."""
    part, made, step = (told[i : i + 3] for i in range(0, 9, 3))
    fragments, out = fragments.reshape(-1, channels, *part), out.reshape(channels, *made)
    for place, number in np.ndenumerate(numbers.reshape(step)):
        if number >= 0:
            there = (slice(p, None, s) for p, s in zip(place, step, strict=True))
            target = out[:, *there]
            z, y, x = target.shape[1:]
            target[...] = fragments[number, :, :z, :y, :x]


WEAVE = Kernel("weave", _SOURCE, _plain, THREADS)


def blocks(channels: int, z: int, y: int, x: int) -> int:
    """Blocks for an answer."""
    return channels * z * ceil_divide(y * x, THREADS)
