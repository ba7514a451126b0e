"""Convolution of tiles by Fourier transforms on a GPU: the kernels before and behind the product.

Overlap-save, as on the CPU (`kernels.tiles`). A *row* is one tile of all channels, which are
transformed by one block each few of them: a tile lies in the block's shared memory, and a thread
transforms a line of it in registers, along x, then y, then z. What is transformed along z goes to
memory at once, channels side by side, so that sectors of 32 bytes are written whole; where only one
channel has room its neighbours' blocks fill the sector up in the second-level cache. `inverse` goes
the other way, and computes no line that is not asked for.

=========  =======================================================  ==========================
array      from outside in                                          elements
=========  =======================================================  ==========================
spectra    frequency of the tile (z, y, half of x), row, channel    complex
products   frequency, row, output channel                           complex
tile       channel, z, y, half of x                                 complex, or two real values
=========  =======================================================  ==========================

Banks of shared memory: neighbouring threads read complex numbers that lie side by side, or an odd
number of them apart; planes and channels begin where this goes on.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np

from znni_dask.geometry import Size, ceil_divide, triple
from znni_dask.kernels.cuda.codelets import complex_line, real_line, restored_line
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.kernels.cuda.layouts import PAIR_BYTES, GpuTile, Layout, Rows


def blocks(layout: Layout, rows: int, channels: int) -> int:
    """Blocks for so many rows."""
    return rows * ceil_divide(channels, layout.channels)


@cache
def forward_kernel(size: Size, layout: Layout) -> Kernel:
    """Transforms tiles of an array, whose outside is zero.

    It is told of the array and the spectra, of the array's channels and size (z, y, x), the `Rows`,
    the first row, and how far apart in ``spectra`` frequencies, rows and channels lie.
    """
    z, y, x = size
    half, source = layout.half, _defined(size, layout)
    target = "float2 *__restrict__ target, long long apart"
    source += real_line("along_x", "float2 *line", x, lambda j: f"line[{j}]")
    source += complex_line(
        *("along_y", "float2 *line", y, y, _at("line", layout.row), _at("line", layout.row)),
        inverse=False,
    )
    source += complex_line(
        *("along_z", f"const float2 *line, {target}", z, z, _at("line", layout.plane)),
        lambda j: f"target[{j} * apart]",
        inverse=False,
    )
    lines = [layout.channels * n for n in (z * y, z * half, y * half)]
    threads = layout.threads(*lines)
    return Kernel(
        "forward",
        f"#define THREADS {threads}\n{source}{_PLACE}{_FORWARD}",
        partial(_forward, size),
        threads,
        layout.nbytes,
    )


@cache
def inverse_kernel(tile: GpuTile, layout: Layout, relu: bool) -> Kernel:
    """Transforms products back, adds biases, and writes what lies inside the output.

    It is told of ``products``, ``bias``, ``out``, of the output's channels and size, the `Rows`,
    the first row and how many there are.
    """
    (z, y, x), (made_z, made_y, made_x) = tile.size, tile.made
    source = _defined(tile.size, layout)
    source += "".join(
        f"#define MADE_{axis} {n}\n" for axis, n in zip("ZYX", tile.made, strict=True)
    )
    origin = "const float2 *__restrict__ origin, long long apart"
    source += complex_line(
        *("along_z", f"{origin}, float2 *line", z, made_z),
        *(lambda j: f"origin[{j} * apart]", _at("line", layout.plane)),
        inverse=True,
    )
    source += complex_line(
        *("along_y", "float2 *line", y, made_y, _at("line", layout.row), _at("line", layout.row)),
        inverse=True,
    )
    source += restored_line(
        *("along_x", "float2 *line, float bias", x, made_x, lambda j: f"line[{j}]", "bias"),
        relu=relu,
    )
    lines = [layout.channels * n for n in (y * layout.half, made_z * layout.half, made_z * made_y)]
    threads = layout.threads(*lines)
    return Kernel(
        "inverse",
        f"#define THREADS {threads}\n{source}{_PLACE}{_INVERSE}",
        partial(_inverse, tile, relu),
        threads,
        layout.nbytes,
    )


def _at(name: str, apart: int) -> Any:
    return lambda j: f"{name}[{j * apart}]"


def _defined(size: Size, layout: Layout) -> str:
    """Numbers of a tile for the preprocessor."""
    named = {f"SIZE_{axis}": n for axis, n in zip("ZYX", size, strict=True)}
    named |= {"HALF": layout.half, "ROW": layout.row, "PLANE": layout.plane}
    named |= {"TILE": layout.tile, "CHANNELS": layout.channels}
    return "".join(f"#define {name} {value}\n" for name, value in named.items())


_PLACE = """
typedef long long integer;

// The line that a thread begins with, where so many threads take one; those left over take none.
#define LINE(LENGTH) \\
    (threadIdx.x < THREADS / LENGTH * LENGTH ? (int)threadIdx.x / LENGTH : 1 << 30)

struct Place
{
    integer sample;
    int z, y, x;
};

static __device__ __forceinline__ int next(int &rest, integer count)
{
    int index = rest % (int)count;
    rest /= (int)count;
    return index;
}

// The sample of a row, and the first voxel of its tile.
static __device__ __forceinline__ Place place_of(
    int row, integer tiles_z, integer tiles_y, integer tiles_x,
    integer phases_z, integer phases_y, integer phases_x,
    integer step_z, integer step_y, integer step_x,
    integer advance_z, integer advance_y, integer advance_x,
    integer offset_z, integer offset_y, integer offset_x)
{
    Place place;
    place.x = (int)(offset_x + next(row, tiles_x) * advance_x * step_x);
    place.y = (int)(offset_y + next(row, tiles_y) * advance_y * step_y);
    place.z = (int)(offset_z + next(row, tiles_z) * advance_z * step_z);
    place.x += next(row, phases_x);
    place.y += next(row, phases_y);
    place.z += next(row, phases_z);
    place.sample = row;
    return place;
}
"""

_FORWARD = """
extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(
    const float *__restrict__ x, float2 *__restrict__ spectra,
    integer channels, integer size_z, integer size_y, integer size_x,
    integer tiles_z, integer tiles_y, integer tiles_x,
    integer phases_z, integer phases_y, integer phases_x,
    integer step_z, integer step_y, integer step_x,
    integer advance_z, integer advance_y, integer advance_x,
    integer offset_z, integer offset_y, integer offset_x,
    integer first_row, integer frequency_step, integer row_step, integer channel_step)
{
    extern __shared__ float shared[];
    float2 *tile = (float2 *)shared;
    int groups = ((int)channels + CHANNELS - 1) / CHANNELS;
    int first_channel = (int)(blockIdx.x % groups) * CHANNELS, row = (int)(blockIdx.x / groups);
    Place place = place_of(
        (int)first_row + row, tiles_z, tiles_y, tiles_x, phases_z, phases_y, phases_x,
        step_z, step_y, step_x, advance_z, advance_y, advance_x, offset_z, offset_y, offset_x);
    integer volume = size_z * size_y * size_x;
    const float *image = x + (place.sample * channels + first_channel) * volume;

    int at_x = threadIdx.x % SIZE_X, from_x = place.x + at_x * (int)step_x;
    bool inside_x = from_x >= 0 && from_x < size_x;
    for (int line = LINE(SIZE_X); line < CHANNELS * SIZE_Z * SIZE_Y; line += THREADS / SIZE_X) {
        int at_y = line % SIZE_Y, plane = line / SIZE_Y;
        int at_z = plane % SIZE_Z, c = plane / SIZE_Z;
        int from_z = place.z + at_z * (int)step_z, from_y = place.y + at_y * (int)step_y;
        bool inside = inside_x && first_channel + c < channels
            && from_z >= 0 && from_z < size_z && from_y >= 0 && from_y < size_y;
        integer from = c * volume + (from_z * size_y + from_y) * size_x + from_x;
        shared[2 * (c * TILE + at_z * PLANE + at_y * ROW) + at_x] = inside ? image[from] : 0.0f;
    }
    __syncthreads();
    for (int line = threadIdx.x; line < CHANNELS * SIZE_Z * SIZE_Y; line += THREADS) {
        int plane = line / SIZE_Y;
        along_x(tile + plane / SIZE_Z * TILE + plane % SIZE_Z * PLANE + line % SIZE_Y * ROW);
    }
    __syncthreads();
    for (int line = threadIdx.x; line < CHANNELS * SIZE_Z * HALF; line += THREADS) {
        int plane = line / HALF;
        along_y(tile + plane / SIZE_Z * TILE + plane % SIZE_Z * PLANE + line % HALF);
    }
    __syncthreads();
    for (int line = threadIdx.x; line < CHANNELS * SIZE_Y * HALF; line += THREADS) {
        int c = line % CHANNELS, column = line / CHANNELS;
        integer to = column * frequency_step + row * row_step + (first_channel + c) * channel_step;
        if (first_channel + c < channels)
            along_z(
                tile + c * TILE + column / HALF * ROW + column % HALF,
                spectra + to, SIZE_Y * HALF * frequency_step);
    }
}
"""

_INVERSE = """
extern "C" __global__ void __launch_bounds__(THREADS, 1) inverse(
    const float2 *__restrict__ products, const float *__restrict__ bias, float *__restrict__ out,
    integer channels, integer size_z, integer size_y, integer size_x,
    integer tiles_z, integer tiles_y, integer tiles_x,
    integer phases_z, integer phases_y, integer phases_x,
    integer step_z, integer step_y, integer step_x,
    integer advance_z, integer advance_y, integer advance_x,
    integer offset_z, integer offset_y, integer offset_x,
    integer first_row, integer rows)
{
    extern __shared__ float shared[];
    float2 *tile = (float2 *)shared;
    int groups = ((int)channels + CHANNELS - 1) / CHANNELS;
    int first_channel = (int)(blockIdx.x % groups) * CHANNELS, row = (int)(blockIdx.x / groups);
    Place place = place_of(
        (int)first_row + row, tiles_z, tiles_y, tiles_x, phases_z, phases_y, phases_x,
        step_z, step_y, step_x, advance_z, advance_y, advance_x, offset_z, offset_y, offset_x);

    for (int line = threadIdx.x; line < CHANNELS * SIZE_Y * HALF; line += THREADS) {
        int c = line % CHANNELS, column = line / CHANNELS;
        if (first_channel + c < channels)
            along_z(
                products + (column * rows + row) * channels + first_channel + c,
                SIZE_Y * HALF * rows * channels,
                tile + c * TILE + column / HALF * ROW + column % HALF);
    }
    __syncthreads();
    for (int line = threadIdx.x; line < CHANNELS * MADE_Z * HALF; line += THREADS) {
        int plane = line / HALF;
        along_y(tile + plane / MADE_Z * TILE + plane % MADE_Z * PLANE + line % HALF);
    }
    __syncthreads();
    for (int line = threadIdx.x; line < CHANNELS * MADE_Z * MADE_Y; line += THREADS) {
        int plane = line / MADE_Y, c = plane / MADE_Z;
        if (first_channel + c < channels)
            along_x(
                tile + c * TILE + plane % MADE_Z * PLANE + line % MADE_Y * ROW,
                bias[first_channel + c]);
    }
    __syncthreads();
    integer volume = size_z * size_y * size_x;
    float *image = out + (place.sample * channels + first_channel) * volume;
    int at_x = threadIdx.x % MADE_X, to_x = place.x + at_x * (int)step_x;
    if (to_x >= size_x)
        return;
    for (int line = LINE(MADE_X); line < CHANNELS * MADE_Z * MADE_Y; line += THREADS / MADE_X) {
        int at_y = line % MADE_Y, plane = line / MADE_Y;
        int at_z = plane % MADE_Z, c = plane / MADE_Z;
        int to_z = place.z + at_z * (int)step_z, to_y = place.y + at_y * (int)step_y;
        if (first_channel + c < channels && to_z < size_z && to_y < size_y)
            image[c * volume + (to_z * size_y + to_y) * size_x + to_x] =
                shared[2 * (c * TILE + at_z * PLANE + at_y * ROW) + at_x];
    }
}
"""


def _forward(size: Size, x: Any, spectra: Any, channels: int, *told: int) -> None:
    """The same in numpy."""
    shape, rows, (first_row, *steps) = _told(told)
    images = x.reshape(-1, channels, *shape)
    z, y, wide = size
    count = (spectra.size // channels) // (z * y * (wide // 2 + 1))
    strides = [PAIR_BYTES * step for step in steps]
    made = np.lib.stride_tricks.as_strided(
        spectra.reshape(-1), (z * y * (wide // 2 + 1), count, channels), strides
    )
    for row in range(min(count, len(images) * rows.of_sample - first_row)):
        sample, begin = rows.place(first_row + row)
        tile: Any = np.zeros((channels, *size), np.float32)
        there, here = [], []
        for axis in range(3):
            place = begin[axis] + np.arange(size[axis]) * rows.step[axis]
            inside = (place >= 0) & (place < shape[axis])
            there.append(place[inside])
            here.append(np.flatnonzero(inside))
        tile[:, *np.ix_(*here)] = images[sample][:, *np.ix_(*there)]
        made[:, row] = np.fft.rfftn(tile, axes=(1, 2, 3)).reshape(channels, -1).T


def _inverse(
    tile: GpuTile, relu: bool, products: Any, bias: Any, out: Any, channels: int, *told: int
) -> None:
    """The same in numpy."""
    shape, rows, (first_row, count) = _told(told)
    z, y, x = tile.size
    images = out.reshape(-1, channels, *shape)
    spectra = products.reshape(z, y, x // 2 + 1, count, channels)
    z, y, x = tile.made
    for row in range(count):
        sample, begin = rows.place(first_row + row)
        spectrum = spectra[:, :, :, row].transpose(3, 0, 1, 2)
        values = np.fft.irfftn(spectrum, tile.size, axes=(1, 2, 3), norm="forward")
        values = values[:, :z, :y, :x] + bias[:channels, None, None, None]
        place = (slice(b, None, s) for b, s in zip(begin, rows.step, strict=True))
        target = images[sample][:, *place][:, :z, :y, :x]
        _, *cut = target.shape
        kept = values[:, : cut[0], : cut[1], : cut[2]]
        target[...] = np.where(kept < 0, 0, kept) if relu else kept


def _told(told: tuple[int, ...]) -> tuple[Size, Rows, tuple[int, ...]]:
    """The size of an array, the rows, and what else a kernel is told."""
    size, *rows = (triple(told[i : i + 3]) for i in range(0, 18, 3))
    return size, Rows(*rows), told[18:]
