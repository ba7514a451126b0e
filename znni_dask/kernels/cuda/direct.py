"""Direct convolution from few channels, or to few: sums of products, one by one.

A thread makes one voxel of a few output channels, so that every value it reads serves all of them;
neighbouring threads read and write what lies side by side. The weights of some channels at a time
lie in the block's shared memory, those of one tap side by side. What lies outside the input is
padding.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from znni_dask.geometry import Size, ceil_divide, volume
from znni_dask.kernels.cuda.kernel import Kernel

THREADS = 256
MOST_MADE = 16  # output channels of a thread
_SHARED_BYTES = 32 << 10
_ITEM_BYTES = 4


class Direct(NamedTuple):
    """What a kernel is written for: a window, channels, and those that a thread makes."""

    kernel: Size
    stride: Size
    dilation: Size
    channels: int
    made: int
    relu: bool

    @property
    def at_once(self) -> int:
        """Channels whose weights lie in shared memory together."""
        each = _ITEM_BYTES * volume(self.kernel) * self.made
        return max(1, min(self.channels, _SHARED_BYTES // each))

    @property
    def shared_bytes(self) -> int:
        """Memory of these weights."""
        return _ITEM_BYTES * self.at_once * volume(self.kernel) * self.made

    @classmethod
    def of(
        cls, kernel: Size, stride: Size, dilation: Size, channels: int, outputs: int, relu: bool
    ) -> Direct:
        """That of a convolution to so many outputs, which threads share evenly."""
        made = ceil_divide(outputs, ceil_divide(outputs, MOST_MADE))
        return cls(kernel, stride, dilation, channels, made, relu)


@cache
def direct_kernel(direct: Direct) -> Kernel:
    """The kernel, of `blocks` blocks.

    It is told of ``x``, the `taps`, ``bias`` and ``out``; of the output's channels, the sizes (z,
    y, x) of input and output, and where the first tap of output 0 lies.
    """
    words = {"CHANNELS": direct.channels, "MADE": direct.made, "AT_ONCE": direct.at_once}
    named = zip("ZYX", direct.kernel, direct.stride, direct.dilation, strict=True)
    for axis, *values in named:
        names = (f"KERNEL_{axis}", f"STEP_{axis}", f"APART_{axis}")
        words |= dict(zip(names, values, strict=True))
    words |= {"RELU": int(direct.relu), "THREADS": THREADS}
    source = "".join(f"#define {word} {value}\n" for word, value in words.items()) + _SOURCE
    return Kernel("direct", source, partial(_plain, direct), THREADS, direct.shared_bytes)


def blocks(direct: Direct, shape: tuple[int, ...]) -> int:
    """Blocks for an output (batch, channel, z, y, x)."""
    batch, outputs, z, y, x = shape
    return batch * ceil_divide(outputs, direct.made) * ceil_divide(z * y * x, THREADS)


def taps(direct: Direct, weight: Any) -> Any:
    """The weights (output, channel, z, y, x) as a kernel reads them: (outputs of a thread, channel,
    tap, output), zero where there are no more outputs."""
    outputs, channels = weight.shape[:2]
    groups = ceil_divide(outputs, direct.made)
    found = np.zeros((groups * direct.made, channels, volume(direct.kernel)), np.float32)
    found[:outputs] = weight.reshape(outputs, channels, -1)
    grouped = found.reshape(groups, direct.made, *found.shape[1:])
    return np.ascontiguousarray(grouped.transpose(0, 2, 3, 1))


_SOURCE = """
typedef long long integer;

extern "C" __global__ void __launch_bounds__(THREADS) direct(
    const float *__restrict__ x, const float *__restrict__ taps,
    const float *__restrict__ bias, float *__restrict__ out,
    integer outputs, integer size_z, integer size_y, integer size_x,
    integer out_z, integer out_y, integer out_x,
    integer offset_z, integer offset_y, integer offset_x)
{
    extern __shared__ float shared[];
    const int WEIGHTS = KERNEL_Z * KERNEL_Y * KERNEL_X * MADE;
    integer voxels = out_z * out_y * out_x, volume = size_z * size_y * size_x;
    integer pieces = (voxels + THREADS - 1) / THREADS;
    int groups = ((int)outputs + MADE - 1) / MADE;
    integer voxel = blockIdx.x % pieces * THREADS + threadIdx.x, image = blockIdx.x / pieces;
    int group = (int)(image % groups);
    image /= groups;
    bool wanted = voxel < voxels;

    integer line = voxel / out_x;
    int from_x = (int)(voxel % out_x) * STEP_X + (int)offset_x;
    int from_y = (int)(line % out_y) * STEP_Y + (int)offset_y;
    int from_z = (int)(line / out_y) * STEP_Z + (int)offset_z;
    const float *values = x + image * CHANNELS * volume;
    const float *weights = taps + (integer)group * CHANNELS * WEIGHTS;
    float sums[MADE];
#pragma unroll
    for (int o = 0; o < MADE; o++)
        sums[o] = group * MADE + o < outputs ? bias[group * MADE + o] : 0.0f;

    for (int first = 0; first < CHANNELS; first += AT_ONCE) {
        int count = min(AT_ONCE, CHANNELS - first);
        __syncthreads();
        for (int i = threadIdx.x; i < count * WEIGHTS; i += THREADS)
            shared[i] = weights[first * WEIGHTS + i];
        __syncthreads();
        for (int c = 0; wanted && c < count; c++) {
            const float *channel = values + (first + c) * volume;
            const float *own = shared + c * WEIGHTS;
            for (int a = 0; a < KERNEL_Z; a++) {
                int at_z = from_z + a * APART_Z;
                if (at_z < 0 || at_z >= size_z)
                    continue;
                for (int b = 0; b < KERNEL_Y; b++) {
                    int at_y = from_y + b * APART_Y;
                    if (at_y < 0 || at_y >= size_y)
                        continue;
                    const float *row = channel + (at_z * size_y + at_y) * size_x;
#pragma unroll
                    for (int d = 0; d < KERNEL_X; d++) {
                        int at_x = from_x + d * APART_X;
                        float value = at_x >= 0 && at_x < size_x ? row[at_x] : 0.0f;
                        const float *tap = own + ((a * KERNEL_Y + b) * KERNEL_X + d) * MADE;
#pragma unroll
                        for (int o = 0; o < MADE; o++)
                            sums[o] += value * tap[o];
                    }
                }
            }
        }
    }
    if (!wanted)
        return;
    float *made = out + (image * outputs + group * MADE) * voxels + voxel;
#pragma unroll
    for (int o = 0; o < MADE; o++)
        if (group * MADE + o < outputs)
            made[o * voxels] = RELU && sums[o] < 0 ? 0.0f : sums[o];
}
"""


def _plain(
    direct: Direct, x: Any, taps: Any, bias: Any, out: Any, outputs: int, *told: int
) -> None:
    """The same in numpy."""
    size, made, offset = (told[i : i + 3] for i in range(0, 9, 3))
    x = x.reshape(-1, direct.channels, *size)
    sums = np.empty((len(x), outputs, *made), np.float32)
    sums[...] = bias.reshape(-1)[:outputs, None, None, None]
    weights = taps.reshape(-1, direct.channels, volume(direct.kernel), direct.made)
    weights = weights.transpose(0, 3, 1, 2).reshape(-1, direct.channels, volume(direct.kernel))
    for number, tap in enumerate(product(*map(range, direct.kernel))):
        there, here = [], []
        for axis in range(3):
            place = np.arange(made[axis]) * direct.stride[axis] + offset[axis]
            place += tap[axis] * direct.dilation[axis]
            inside = (place >= 0) & (place < size[axis])
            there.append(place[inside])
            here.append(np.flatnonzero(inside))
        seen = x[:, :, *np.ix_(*there)]
        part: Any = (slice(None), slice(None), *np.ix_(*here))
        sums[part] += np.einsum("oc,bczyx->bozyx", weights[:outputs, :, number], seen)
    out.reshape(sums.shape)[...] = np.where(sums < 0, 0, sums) if direct.relu else sums
