"""Values fetched from elsewhere: padding, nearest and linear resizing.

Which input an output looks at is a matter of each axis by itself; callers say it in arrays of
indices, one per axis. A block makes a piece of a plane of ``out_y`` · ``out_x`` voxels.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import ceil_divide
from znni_dask.kernels.cuda.kernel import Kernel

Array = NDArray[np.float32]
Places = NDArray[np.int64]
_THREADS, _EACH = 256, 8
_PIECE = _THREADS * _EACH

_BEGIN = """
    const long long plane = blockIdx.x / pieces;
    const int piece = blockIdx.x % pieces;
    const long long row = plane / out_z;
    const int z = plane % out_z, width = out_x, voxels = out_y * out_x;
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int voxel = (piece * EACH + k) * THREADS + threadIdx.x;
        if (voxel >= voxels)
            break;
        const int y = voxel / width, i = voxel % width;
"""

_GATHER = (
    """
extern "C" __global__ void gather(
    const float *__restrict__ x, float *__restrict__ out,
    const long long *__restrict__ index_z, const long long *__restrict__ index_y,
    const long long *__restrict__ index_x, long long in_z, long long in_y, long long in_x,
    long long out_z, long long out_y, long long out_x, long long pieces, float value)
{"""
    + _BEGIN
    + """
        const long long from_z = index_z[z], from_y = index_y[y], from_x = index_x[i];
        const bool there = from_z >= 0 && from_y >= 0 && from_x >= 0;
        out[plane * voxels + voxel] =
            there ? x[((row * in_z + from_z) * in_y + from_y) * in_x + from_x] : value;
    }
}
"""
)

_INTERPOLATE = (
    """
extern "C" __global__ void interpolate(
    const float *__restrict__ x, float *__restrict__ out,
    const long long *__restrict__ places_z, const long long *__restrict__ places_y,
    const long long *__restrict__ places_x, const float *__restrict__ weights_z,
    const float *__restrict__ weights_y, const float *__restrict__ weights_x,
    long long in_z, long long in_y, long long in_x,
    long long out_z, long long out_y, long long out_x, long long pieces)
{"""
    + _BEGIN
    + """
        const float *below = x + (row * in_z + places_z[z]) * in_y * in_x;
        const float *above = x + (row * in_z + places_z[out_z + z]) * in_y * in_x;
        const long long near = places_y[y] * in_x, far = places_y[out_y + y] * in_x;
        const float v = weights_z[z], w = weights_y[y];
        float ends[2];
        for (int end = 0; end < 2; ++end) {
            const long long at = places_x[end * out_x + i];
            const float p = below[near + at] + w * (below[far + at] - below[near + at]);
            const float q = above[near + at] + w * (above[far + at] - above[near + at]);
            ends[end] = p + v * (q - p);
        }
        out[plane * voxels + voxel] = ends[0] + weights_x[i] * (ends[1] - ends[0]);
    }
}
"""
)


def blocks_of(out: Any) -> tuple[int, int]:
    """Blocks that make an array (batch, channel, z, y, x), and pieces of a plane."""
    pieces = ceil_divide(prod(out.shape[3:]), _PIECE)
    return prod(out.shape[:3]) * pieces, pieces


def _gather(
    x: Array, out: Array, index_z: Places, index_y: Places, index_x: Places, *numbers: float
) -> None:
    value = numbers[-1]
    inside = np.ix_(index_y >= 0, index_x >= 0)
    taken = np.ix_(index_y[index_y >= 0], index_x[index_x >= 0])
    for sources, targets in zip(_volumes(x), _volumes(out), strict=True):
        for from_z, target in zip(index_z, targets, strict=True):
            target[...] = value
            if from_z >= 0:
                target[inside] = sources[from_z][taken]


def _interpolate(
    x: Array,
    out: Array,
    places_z: Places,
    places_y: Places,
    places_x: Places,
    weights_z: Array,
    weights_y: Array,
    weights_x: Array,
    *numbers: int,
) -> None:
    near, far = places_y.reshape(2, -1)
    left, right = places_x.reshape(2, -1)
    w = weights_y[:, None]
    for sources, targets in zip(_volumes(x), _volumes(out), strict=True):
        for below, above, v, target in zip(
            *places_z.reshape(2, -1), weights_z, targets, strict=True
        ):
            p, q = (
                sources[at][near] + w * (sources[at][far] - sources[at][near])
                for at in (below, above)
            )
            lines = p + v * (q - p)
            target[...] = lines[:, left] + weights_x * (lines[:, right] - lines[:, left])


def _volumes(array: Array) -> Array:
    return array.reshape(-1, *array.shape[2:])


def _kernel(name: str, source: str, plain: Any) -> Kernel:
    text = source.replace("EACH", str(_EACH)).replace("THREADS", str(_THREADS))
    return Kernel(name, text, plain, _THREADS)


GATHER = _kernel("gather", _GATHER, _gather)
"""``out[z, y, x] = x[index_z[z], index_y[y], index_x[x]]``; ``value`` where one is -1."""

INTERPOLATE = _kernel("interpolate", _INTERPOLATE, _interpolate)
"""Linear interpolation: along an axis output i lies between the inputs ``places[i]`` and
``places[out + i]``, ``weights[i]`` of the way."""
