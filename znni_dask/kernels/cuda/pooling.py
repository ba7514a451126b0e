"""Pooling, into as many fragments as there are.

A thread makes one output. Outputs of all fragments along x stand side by side, as their windows
do: neighbouring threads read what lies side by side, and write stretches of each fragment. Where
padding lies is nowhere read.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from znni_dask.geometry import Size, ceil_divide
from znni_dask.kernels.cuda.kernel import Kernel

THREADS = 256


class Pool(NamedTuple):
    """What a kernel is written for: a window, and the fragments along each axis."""

    kernel: Size
    stride: Size
    dilation: Size
    fragments: Size
    mean: bool


@cache
def pooling_kernel(pool: Pool) -> Kernel:
    """The kernel, of `blocks` blocks.

    It is told of ``x`` and ``out``, samples and channels, the sizes (z, y, x) of both, where the
    first tap of output 0 lies; and for means from where on taps count along each axis, and up to
    where, counted from that tap on.
    """
    named = zip("ZYX", pool.kernel, pool.stride, pool.dilation, pool.fragments, strict=True)
    words = [
        f"#define {word}_{axis} {value}"
        for axis, *values in named
        for word, value in zip(("KERNEL", "STEP", "APART", "PARTS"), values, strict=True)
    ]
    words.append(f"#define MEAN {int(pool.mean)}")
    return Kernel("pool", "\n".join(words) + _SOURCE, partial(_plain, pool), THREADS)


def blocks(pool: Pool, shape: tuple[int, ...]) -> int:
    """Blocks for an output of all fragments."""
    samples, channels, z, y, x = shape
    _, parts_y, parts_x = pool.fragments
    return (
        samples
        * channels
        * z
        // (parts_y * parts_x)
        * ceil_divide(y * parts_y * x * parts_x, THREADS)
    )


_SOURCE = """
#define INTEGER long long

extern "C" __global__ void pool(
    const float *__restrict__ x, float *__restrict__ out,
    INTEGER samples, INTEGER channels,
    INTEGER size_z, INTEGER size_y, INTEGER size_x,
    INTEGER out_z, INTEGER out_y, INTEGER out_x,
    INTEGER offset_z, INTEGER offset_y, INTEGER offset_x,
    INTEGER first_z, INTEGER first_y, INTEGER first_x,
    INTEGER last_z, INTEGER last_y, INTEGER last_x)
{
    int width = (int)out_x * PARTS_X, height = (int)out_y * PARTS_Y;
    int pieces = (height * width + blockDim.x - 1) / blockDim.x;
    INTEGER plane = blockIdx.x / pieces;
    int place = (int)(blockIdx.x % pieces) * blockDim.x + threadIdx.x;
    if (place >= height * width)
        return;
    int depth = (int)out_z * PARTS_Z;
    int z = (int)(plane % depth), y = place / width, i = place % width;
    INTEGER image = plane / depth;  // of a sample and channel

    int moved_z = z / PARTS_Z * STEP_Z + z % PARTS_Z;
    int moved_y = y / PARTS_Y * STEP_Y + y % PARTS_Y;
    int moved_x = i / PARTS_X * STEP_X + i % PARTS_X;
    int from_z = moved_z + (int)offset_z;
    int from_y = moved_y + (int)offset_y;
    int from_x = moved_x + (int)offset_x;
    const float *voxels = x + image * size_z * size_y * size_x;
    float found = MEAN ? 0.0f : __int_as_float(0xff800000);  // minus infinity
    for (int a = 0; a < KERNEL_Z; a++) {
        int at_z = from_z + a * APART_Z;
        if (at_z < 0 || at_z >= size_z)
            continue;
        for (int b = 0; b < KERNEL_Y; b++) {
            int at_y = from_y + b * APART_Y;
            if (at_y < 0 || at_y >= size_y)
                continue;
            const float *line = voxels + (at_z * size_y + at_y) * size_x;
#pragma unroll
            for (int c = 0; c < KERNEL_X; c++) {
                int at_x = from_x + c * APART_X;
                if (at_x < 0 || at_x >= size_x)
                    continue;
                float value = line[at_x];
                if (MEAN)
                    found += value;
                else if (value > found || value != value)  // what is no number stays
                    found = value;
            }
        }
    }
    if (MEAN) {
        int count_z = 0, count_y = 0, count_x = 0;
        for (int a = 0; a < KERNEL_Z; a++)
            count_z += moved_z + a * APART_Z >= first_z && moved_z + a * APART_Z < last_z;
        for (int b = 0; b < KERNEL_Y; b++)
            count_y += moved_y + b * APART_Y >= first_y && moved_y + b * APART_Y < last_y;
        for (int c = 0; c < KERNEL_X; c++)
            count_x += moved_x + c * APART_X >= first_x && moved_x + c * APART_X < last_x;
        found /= (float)max(count_z * count_y * count_x, 1);
    }
    int part = (z % PARTS_Z * PARTS_Y + y % PARTS_Y) * PARTS_X + i % PARTS_X;
    image += part * samples * channels;
    INTEGER row = (image * out_z + z / PARTS_Z) * out_y + y / PARTS_Y;
    out[row * out_x + i / PARTS_X] = found;
}
"""


def _plain(pool: Pool, x: Any, out: Any, samples: int, channels: int, *told: int) -> None:
    """The same in numpy."""
    size, made, offset, first, last = (told[i : i + 3] for i in range(0, len(told), 3))
    parts = out.reshape(-1, samples, channels, *made)
    x = x.reshape(samples, channels, *size)
    for part, moves in zip(parts, product(*map(range, pool.fragments)), strict=True):
        begins = [
            np.arange(n) * step + move
            for n, step, move in zip(made, pool.stride, moves, strict=True)
        ]
        part[...] = 0 if pool.mean else -np.inf
        for taps in product(*map(range, pool.kernel)):
            at, inside = [], []
            for axis, (begin, tap) in enumerate(zip(begins, taps, strict=True)):
                place = begin + tap * pool.dilation[axis] + offset[axis]
                there = (place >= 0) & (place < size[axis])
                at.append(place[there])
                inside.append(np.flatnonzero(there))
            voxels = x[:, :, *np.ix_(*at)]
            here = (slice(None), slice(None), *np.ix_(*inside))
            part[here] = part[here] + voxels if pool.mean else np.maximum(part[here], voxels)
        if pool.mean:
            counts = [
                _counts(begin, pool, axis, first[axis], last[axis])
                for axis, begin in enumerate(begins)
            ]
            part /= np.maximum(np.multiply.outer(np.multiply.outer(*counts[:2]), counts[2]), 1)


def _counts(begin: Any, pool: Pool, axis: int, first: int, last: int) -> Any:
    """Taps that count, for every output along an axis."""
    taps = begin[:, None] + np.arange(pool.kernel[axis]) * pool.dilation[axis]
    return ((taps >= first) & (taps < last)).sum(axis=1).astype(np.float32)
