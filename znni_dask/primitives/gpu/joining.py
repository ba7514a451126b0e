"""Layers with several inputs: sums, products …, concatenation, broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.network.layers import Arithmetic, Broadcast, Concat, Layer
from znni_dask.primitives.base import DevicePrimitive, Problem
from znni_dask.primitives.gpu.pieces import cropped
from znni_dask.primitives.gpu.rates import traffic
from znni_dask.primitives.work import Work

_FUNCTIONS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
    "min": "minimum",
    "max": "maximum",
    "pow": "power",
    "greater": "greater",
    "less": "less",
    "equal": "equal",
}


def _spread(problem: Problem, inputs: Sequence[Any], number: int, xp: Any) -> Any:
    """The part of an input behind the output, as a view; axes of one voxel, and a single channel,
    are repeated."""
    x, (_, channels, *size) = inputs[number], problem.output
    shape = (x.shape[0], channels, *size)
    return xp.broadcast_to(cropped(x, problem.offsets[number], size), shape)


@final
class GpuArithmetic(DevicePrimitive):
    """Inputs combined value by value."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Arithmetic
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return (len(problem.inputs) - 1) * prod(problem.output)

    def work(self, problem: Problem, threads: int) -> Work:
        """Every input after the first finds what was made of those before it."""
        count = len(problem.inputs) - 1 + cast("Arithmetic", problem.layer).relu
        return traffic(problem, passes=1.5 if count > 1 else 1, launches=count)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Of "where" which values are chosen, a byte each."""
        chosen = cast("Arithmetic", problem.layer).function == "where"
        return prod(problem.output) if chosen else 0

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer, xp = cast("Arithmetic", problem.layer), team.xp
        first, second, *others = (_spread(problem, inputs, i, xp) for i in range(len(inputs)))
        with np.errstate(all="ignore"):
            if layer.function == "where":
                chosen = team.scratch(out.size).view(np.bool_).reshape(out.shape)
                xp.not_equal(first, 0, out=chosen)
                out[...] = others[0]
                xp.copyto(out, second, where=chosen)
            else:
                function = getattr(xp, _FUNCTIONS[layer.function])
                function(first, second, out=out)
                for other in others:
                    function(out, other, out=out)
            if layer.relu:
                xp.maximum(out, 0, out=out)


@final
class GpuConcatenation(DevicePrimitive):
    """Channels behind one another."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Concat

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem, launches=len(problem.inputs))

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        first = 0
        for x, offset in zip(inputs, problem.offsets, strict=True):
            last = first + x.shape[1]
            out[:, first:last] = cropped(x, offset, out.shape[2:])
            first = last


@final
class GpuBroadcasting(DevicePrimitive):
    """One voxel repeated over an axis."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Broadcast

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        out[...] = cropped(inputs[0], problem.offsets[0], out.shape[2:])
