"""Direct convolution on a GPU from few channels or to few: first and last layers, whose products of
matrices would be mostly copying."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import ceil_divide, volume
from znni_dask.kernels.cuda.direct import MOST_MADE, Direct, blocks, direct_kernel, taps
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, DevicePrimitive, Problem, direct_flops
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY, SUMS
from znni_dask.primitives.work import Work

_FEW_READ, _FEW_MADE = 4, MOST_MADE  # channels
_MOST_SHARED_BYTES = 48 << 10  # of the weights of one channel


class Prepared(NamedTuple):
    """On the device: the weights as the kernel reads them, and biases."""

    taps: Any
    bias: Any


@final
class GpuConvDirectFew(DevicePrimitive):
    """Direct convolution of few channels, any stride, dilation and padding."""

    name: ClassVar[str] = "direct few"
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = (
        f"a single group, of at most {_FEW_READ} channels or to at most {_FEW_MADE}"
    )

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        few = conv.in_channels <= _FEW_READ or conv.out_channels <= _FEW_MADE
        return few and conv.groups == 1 and not conv.whole

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        shared = _direct(cast("Conv", layer)).shared_bytes
        if shared > _MOST_SHARED_BYTES:
            return f"{self.name} has no room for the taps of {layer.summary}"
        return None

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        """Products, those of all outputs that threads have room for; the input, once for all
        outputs of a thread, and the output."""
        direct = _direct(cast("Conv", problem.layer))
        groups = ceil_divide(problem.output[1], direct.made)
        share = groups * direct.made / problem.output[1]
        moved = ITEM_BYTES * (groups * prod(problem.inputs[0]) + prod(problem.output))
        loads = prod(problem.output) // problem.output[1] * groups * direct.channels
        return Work(
            {
                SUMS: share * self.flops(problem) + 2 * loads * volume(direct.kernel),
                MEMORY: moved,
                LAUNCHES: 1,
            }
        )

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        direct = _direct(conv)
        outputs = ceil_divide(conv.out_channels, direct.made) * direct.made
        return ITEM_BYTES * outputs * (conv.in_channels * volume(conv.kernel) + 1)

    def placed(self, layer: Layer, weights: Weights, device: Device) -> Prepared:
        conv = cast("Conv", layer)
        bias = weights["bias"] if conv.bias else np.zeros(conv.out_channels, np.float32)
        return Prepared(device.put(taps(_direct(conv), weights["weight"])), device.put(bias))

    def apply(
        self,
        prepared: Prepared,
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        direct = _direct(cast("Conv", problem.layer))
        team.launch(
            direct_kernel(direct),
            blocks(direct, problem.output),
            *(inputs[0], prepared.taps, prepared.bias, out),
            *(problem.output[1], *problem.inputs[0][2:], *problem.output[2:]),
            *problem.offsets[0],
        )


def _direct(conv: Conv) -> Direct:
    window = conv.kernel, conv.stride, conv.dilation
    return Direct.of(*window, conv.in_channels, conv.out_channels, conv.relu)
