"""Transposed convolution, tap by tap: each output row gathers the input rows that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size, triple
from znni_dask.kernels import direct
from znni_dask.kernels.team import Team
from znni_dask.network.layers import ConvTranspose, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Primitive, Problem, direct_flops, indices


@final
class ConvTransposeDirect(Primitive):
    """Direct transposed convolution on the CPU."""

    name: ClassVar[str] = "direct transposed"
    layer: ClassVar[type[Layer]] = ConvTranspose

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return threads * problem.inputs[0][-1] * ITEM_BYTES

    def prepare(self, layer: Layer, weights: Weights) -> tuple[Array, Array]:
        """Kernels as (out, in / groups, z, y, x)."""
        conv = cast("ConvTranspose", layer)
        channels, per_group, *kernel = weights["weight"].shape
        grouped = weights["weight"].reshape(
            conv.groups, channels // conv.groups, per_group, *kernel
        )
        weight = np.moveaxis(grouped, 2, 1).reshape(
            conv.out_channels, channels // conv.groups, *kernel
        )
        bias = weights["bias"] if conv.bias else np.zeros(conv.out_channels, np.float32)
        return np.ascontiguousarray(weight), bias

    def apply(
        self,
        prepared: tuple[Array, Array],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        weight, bias = prepared
        conv = cast("ConvTranspose", problem.layer)
        up, dilation = indices(*conv.stride), indices(*conv.dilation)
        offset = indices(*offsets_of_output(problem))

        def work(first: int, last: int) -> None:
            direct.convolve_transposed(
                inputs[0], weight, bias, out, offset, up, dilation, first, last
            )

        team.share(work, out.shape[0] * out.shape[1] * out.shape[2])


def offsets_of_output(problem: Problem) -> Size:
    """Offsets (z, y, x) in steps of the output. An axis of stride 1 counts as convolution does,
    from the last tap of the turned kernel, so it lies the kernel's extent further on."""
    conv = cast("ConvTranspose", problem.layer)
    return triple(
        start if conv.stride[axis] > 1 else start + conv.window(axis).extent - 1
        for axis, start in enumerate(problem.offsets[0])
    )
