"""Convolution that is one product of matrices as its input lies: of single voxels, or of a kernel
as large as what it sees. Nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.network.layers import NO_PADDING, ONES, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import (
    ITEM_BYTES,
    DevicePrimitive,
    Problem,
    direct_flops,
    weights_bytes,
)
from znni_dask.primitives.gpu.pieces import cropped
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY, PRODUCTS, traffic
from znni_dask.primitives.work import Work


@final
class GpuConvMatrix(DevicePrimitive):
    """Convolution on the GPU, of single voxels or with kernels as large as their input."""

    name: ClassVar[str] = "matrix"
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = "single voxels, and kernels as large as what they see"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        if conv.padding != NO_PADDING:
            return False
        return conv.kernel == conv.stride == ONES or (conv.whole == "zyx" and conv.groups == 1)

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        moved = traffic(problem).amounts[MEMORY] + weights_bytes(problem.layer)
        return Work({PRODUCTS: self.flops(problem), LAUNCHES: 3}, {MEMORY: moved})

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Nothing, unless the input given is larger than what is looked at."""
        return 0 if _whole(problem) else ITEM_BYTES * prod(_seen(problem))

    def placed(self, layer: Layer, weights: Weights, device: Device) -> tuple[Any, Any]:
        """The matrix of each group (output, channel), or of a whole kernel (channel and tap,
        output); and the biases."""
        conv = cast("Conv", layer)
        matrix = weights["weight"].reshape(conv.groups, conv.out_channels // conv.groups, -1)
        if conv.kernel != ONES:
            matrix = matrix.swapaxes(1, 2)
        bias = device.put(weights["bias"].reshape(-1, 1, 1, 1)) if conv.bias else None
        return device.put(matrix), bias

    def apply(
        self,
        prepared: tuple[Any, Any],
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        matrix, bias = prepared
        conv, x, samples = cast("Conv", problem.layer), inputs[0], len(out)
        if not _whole(problem):
            memory = team.scratch(self.workspace_bytes(problem, 1)).view(np.float32)
            memory = memory.reshape(_seen(problem))
            memory[...] = cropped(x, problem.offsets[0], problem.output[2:])
            x = memory
        if conv.kernel == ONES:
            read, made = (a.reshape(samples, conv.groups, -1, prod(a.shape[2:])) for a in (x, out))
            team.xp.matmul(matrix, read, out=made)
        else:
            team.xp.matmul(x.reshape(1, samples, -1), matrix, out=out.reshape(1, samples, -1))
        if bias is not None:
            team.xp.add(out, bias, out=out)
        if conv.relu:
            team.xp.maximum(out, 0, out=out)


def _seen(problem: Problem) -> tuple[int, ...]:
    """The shape of what is looked at."""
    if cast("Conv", problem.layer).kernel == ONES:
        return (*problem.inputs[0][:2], *problem.output[2:])
    return problem.inputs[0]


def _whole(problem: Problem) -> bool:
    """Whether all of the input is looked at."""
    return problem.inputs[0] == _seen(problem)
