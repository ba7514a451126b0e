"""Pooling on a GPU, plain and as fragments: the largest or the mean value of each window.

As on the CPU (`primitives.pooling`), with the same fragments in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast, final

from znni_dask.devices.base import Device
from znni_dask.kernels.cuda.pooling import Pool, blocks, pooling_kernel
from znni_dask.network.layers import AveragePool, Layer, MaxPool
from znni_dask.primitives.base import ITEM_BYTES, DevicePrimitive, Problem
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY
from znni_dask.primitives.pooling import AtEveryOffset, counted, pooling_flops
from znni_dask.primitives.work import Work

_ALWAYS = -(1 << 40), 1 << 40  # from where to where taps count that all do


class _Pooling(DevicePrimitive):
    """Abstract: pooling on a GPU, into as many fragments as there are."""

    def flops(self, problem: Problem) -> int:
        return pooling_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        """What goes to and from memory."""
        traffic = ITEM_BYTES * (prod(problem.inputs[0]) + prod(problem.output))
        return Work({MEMORY: traffic, LAUNCHES: 1})

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer = cast("MaxPool | AveragePool", problem.layer)
        mean = isinstance(layer, AveragePool)
        fragments = self.fragments_of(layer)
        pool = Pool(layer.kernel, layer.stride, layer.dilation, fragments, mean)
        counts = [_counted(problem, axis) if mean else _ALWAYS for axis in range(3)]
        team.launch(
            pooling_kernel(pool),
            blocks(pool, problem.output),
            *(inputs[0], out, *problem.inputs[0], *problem.output[2:], *problem.offsets[0]),
            *(first for first, _ in counts),
            *(last for _, last in counts),
        )


def _counted(problem: Problem, axis: int) -> tuple[int, int]:
    """Which taps a mean counts, from the first tap of output 0 on."""
    layer = cast("AveragePool", problem.layer)
    if not layer.window(axis).pads:
        return _ALWAYS
    begin = problem.start[axis] * layer.stride[axis] - layer.padding[0][axis]
    first, last = counted(problem, axis)
    return first - begin, last - begin


@final
class GpuMaxPooling(_Pooling):
    """Plain max-pooling."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = MaxPool


@final
class GpuAveragePooling(_Pooling):
    """Plain average pooling."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = AveragePool


@final
class GpuMaxPoolingFragments(AtEveryOffset, _Pooling):
    """Max-pooling fragments."""

    layer: ClassVar[type[Layer]] = MaxPool


@final
class GpuAveragePoolingFragments(AtEveryOffset, _Pooling):
    """Average-pooling fragments."""

    layer: ClassVar[type[Layer]] = AveragePool
