"""Convolution with a stride as one without, of more channels.

Of a stride s the input's voxels p, p + s, p + 2s, … are one *phase*; each is a channel of its own,
and its kernel has the taps p, p + s, … of the whole one. Sums are the same, products no more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size, ceil_divide, triple, volume
from znni_dask.kernels.phases import take_apart
from znni_dask.kernels.team import Team
from znni_dask.network.layers import NO_PADDING, ONES, Conv
from znni_dask.primitives.base import Array, Problem, Shape


def phases_of(conv: Conv) -> Size:
    """How many phases there are along each axis: no more than taps."""
    return triple(min(s, k) for s, k in zip(conv.stride, conv.kernel, strict=True))


def without_stride(conv: Conv) -> Conv:
    """The same convolution of phases; where there is no stride it is ``conv``."""
    if conv.stride == ONES:
        return conv
    return replace(
        conv,
        in_channels=conv.in_channels * volume(phases_of(conv)),
        kernel=triple(ceil_divide(k, s) for k, s in zip(conv.kernel, conv.stride, strict=True)),
        stride=ONES,
        padding=NO_PADDING,
        same=False,
    )


def problem_without_stride(problem: Problem) -> Problem:
    """The same problem of phases, which hold the padding, too."""
    conv = cast("Conv", problem.layer)
    if (dense := without_stride(conv)) is conv:
        return problem
    batch, _, *made = problem.output
    size = triple(
        n + (k - 1) * d for n, k, d in zip(made, dense.kernel, dense.dilation, strict=True)
    )
    shape: Shape = (batch, dense.in_channels, *size)
    return Problem(dense, (shape,), problem.output, ((0, 0, 0),), problem.start, size)


def split_weights(conv: Conv, weight: Array, out: Array) -> None:
    """Weights (output channel, channel, z, y, x) as those of phases into ``out``, which is zero."""
    phases = phases_of(conv)
    apart = out.reshape(len(out), *phases, conv.in_channels, *without_stride(conv).kernel)
    for p, q, r in np.ndindex(phases):
        part = weight[:, :, p :: conv.stride[0], q :: conv.stride[1], r :: conv.stride[2]]
        z, y, x = part.shape[2:]
        apart[:, p, q, r, :, :z, :y, :x] = part


def split_input(problem: Problem, x: Array, out: Array, team: Team) -> None:
    """The input of a problem, in either form, as phases into the blocked array ``out``."""
    conv = cast("Conv", problem.layer)
    source = x[..., None] if x.ndim == 5 else x
    indices = [_indices(problem, axis, out.shape[2 + axis]) for axis in range(3)]

    def work(first: int, last: int) -> None:
        take_apart(source, out, *indices, conv.in_channels, first, last)

    team.share(work, out.shape[0] * out.shape[2] * out.shape[3])


def _indices(problem: Problem, axis: int, length: int) -> NDArray[np.int64]:
    """Of every phase its ``length`` voxels of the input; -1 where they are padding."""
    conv, there = cast("Conv", problem.layer), problem.inputs[0][2 + axis]
    phases = np.arange(phases_of(conv)[axis])[:, None] * conv.dilation[axis]
    found = np.arange(length) * conv.stride[axis] + phases + problem.offsets[0][axis]
    return np.where((found >= 0) & (found < there), found, -1)
