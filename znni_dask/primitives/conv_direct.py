"""Direct convolution: every tap of every kernel, run by run of voxels.

Zlateski et al. 2016, section IV.A, "direct convolution": work is shared over batch, output
channels and planes. The right choice for small kernels and few channels, and the reference for
every faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide, round_up, volume
from znni_dask.kernels import direct
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Primitive, Problem, direct_flops, indices


@final
class ConvDirect(Primitive):
    """Direct convolution on the CPU, any stride, dilation, groups and padding."""

    name: ClassVar[str] = "direct"
    layer: ClassVar[type[Layer]] = Conv

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Per thread the runs, and the stretch of a padded plane that a run reads."""
        y, x = (problem.layer.window(axis).extent - 1 for axis in (1, 2))
        stretch = direct.RUN + y * (problem.output[-1] + x) + x + direct.LANES
        return threads * (direct.CHANNELS * direct.RUN + stretch) * ITEM_BYTES

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        wide = round_up(conv.out_channels // conv.groups, direct.CHANNELS)
        taps = conv.in_channels // conv.groups * volume(conv.kernel)
        return ITEM_BYTES * conv.groups * wide * (taps + 1)

    def prepare(self, layer: Layer, weights: Weights) -> tuple[Array, Array]:
        """Output channels in blocks, the channels of a block side by side."""
        conv = cast("Conv", layer)
        out, fan_in, *kernel = weights["weight"].shape
        per_group = out // conv.groups
        wide = direct.CHANNELS
        blocks = ceil_divide(per_group, wide)
        weight = np.zeros((conv.groups, blocks * wide, fan_in, *kernel), np.float32)
        weight[:, :per_group] = weights["weight"].reshape(conv.groups, per_group, fan_in, *kernel)
        blocked = weight.reshape(conv.groups, blocks, wide, fan_in, *kernel)
        bias = np.zeros((conv.groups, blocks * wide), np.float32)
        if conv.bias:
            bias[:, :per_group] = weights["bias"].reshape(conv.groups, per_group)
        return (
            np.ascontiguousarray(np.moveaxis(blocked, 2, -1)),
            bias.reshape(conv.groups, blocks, wide),
        )

    def apply(
        self,
        prepared: tuple[Array, Array],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        weight, bias = prepared
        conv = cast("Conv", problem.layer)
        offset = indices(*problem.offsets[0])
        stride, dilation = indices(*conv.stride), indices(*conv.dilation)
        least = np.float32(0 if conv.relu else -np.inf)
        strided = max(conv.stride[1:]) > 1
        kernel = direct.convolve_strided if strided else direct.convolve

        def work(first: int, last: int) -> None:
            kernel(inputs[0], weight, bias, out, offset, stride, dilation, least, first, last)

        team.share(work, out.shape[0] * prod(weight.shape[:2]) * out.shape[2])
