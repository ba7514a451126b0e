"""Layers that look at one value at a time: activations, affine maps; in one kernel each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast, final

from znni_dask.devices.base import Device
from znni_dask.kernels.cuda.pointwise import blocks_of, of_channels, of_values
from znni_dask.network.layers import Activation, Affine, Layer
from znni_dask.primitives.base import DevicePrimitive, Problem
from znni_dask.primitives.gpu.pieces import cropped
from znni_dask.primitives.gpu.rates import traffic
from znni_dask.primitives.work import Work


def read_from(problem: Problem, x: Any, out: Any) -> Any:
    """An array that holds the part of an input behind the output, and no more: the input, or the
    output, where that is copied to."""
    if x.shape == out.shape:
        return x
    out[...] = cropped(x, problem.offsets[0], out.shape[2:])
    return out


@final
class GpuActivation(DevicePrimitive):
    """Every function of a value that `layers.Activation` names."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Activation
    in_place: ClassVar[bool] = True

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer, x = cast("Activation", problem.layer), read_from(problem, inputs[0], out)
        if layer.function == "prelu":
            slope = prepared["slope"]
            _by_channel(team, "prelu", x, out, slope, slope)
        else:
            kernel, told = of_values(layer.function), (float(layer.alpha), float(layer.beta))
            team.launch(kernel, blocks_of(out.size), x, out, out.size, *told)


@final
class GpuAffine(DevicePrimitive):
    """scale · x + shift per channel."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Affine
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 2 * prod(problem.output)

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        x = read_from(problem, inputs[0], out)
        _by_channel(team, "affine", x, out, prepared["scale"], prepared["shift"])


def _by_channel(device: Device, function: str, x: Any, out: Any, scale: Any, shift: Any) -> None:
    rows, voxels = prod(out.shape[:2]), prod(out.shape[2:])
    pieces = blocks_of(voxels)
    told = out.shape[1], voxels, pieces
    device.launch(of_channels(function), rows * pieces, x, out, scale, shift, *told)
