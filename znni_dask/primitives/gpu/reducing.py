"""Layers that reduce: over the channels of a voxel, or over space.

Work goes in pieces, so that what is there in between takes bounded memory; sums over space are
made in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import AXES
from znni_dask.network.layers import Layer, Normalize, Reduce, Softmax
from znni_dask.primitives.base import ITEM_BYTES, DevicePrimitive, Problem
from znni_dask.primitives.gpu.pieces import BUFFERS_BYTES, cropped, piece_of, pieces
from znni_dask.primitives.gpu.rates import traffic
from znni_dask.primitives.work import Work

PIECE_BYTES = 64 << 20  # of an array, looked at at once
_DOUBLE_BYTES = 8


def _mean(xp: Any, v: Any, axes: tuple[int, ...]) -> Any:
    return xp.mean(v, axis=axes, dtype=np.float64, keepdims=True)


def _sum(xp: Any, v: Any, axes: tuple[int, ...]) -> Any:
    return xp.sum(v, axis=axes, dtype=np.float64, keepdims=True)


_REDUCTIONS: dict[str, Callable[[Any, Any, tuple[int, ...]], Any]] = {
    "mean": _mean,
    "sum": _sum,
    "max": lambda xp, v, axes: xp.max(v, axis=axes, keepdims=True),
    "min": lambda xp, v, axes: xp.min(v, axis=axes, keepdims=True),
    "l1": lambda xp, v, axes: _sum(xp, xp.abs(v), axes),
    "l2": lambda xp, v, axes: xp.sqrt(_sum(xp, xp.square(v, dtype=np.float64), axes)),
    "argmax": lambda xp, v, axes: xp.argmax(v, axis=axes[0], keepdims=True),
}


def _axes(names: str) -> tuple[int, ...]:
    """Axes as those of an array (batch, channel, z, y, x)."""
    return tuple(1 + ("c", *AXES).index(name) for name in names)


def _cut(shape: Sequence[int], axes: str) -> tuple[int, int, int]:
    """An array (batch, channel, z, y, x) as a box of what is looked at by itself: sample, plane and
    row where channels are reduced, else sample and channel."""
    batch, channels, z, y, _ = shape
    return (batch, z, y) if axes == "c" else (batch, channels, 1)


def _unit(shape: Sequence[int], axes: str) -> int:
    """Values of what is looked at by itself."""
    return prod(shape) // prod(_cut(shape, axes))


def _parts(shape: Sequence[int], axes: str) -> Iterator[tuple[slice, ...]]:
    """Indices of pieces of such an array."""
    units = PIECE_BYTES // (ITEM_BYTES * _unit(shape, axes))
    for box in pieces(_cut(shape, axes), units):
        samples, others, rows = box.slices
        yield (samples, slice(None), others, rows) if axes == "c" else (samples, others)


def _values_at_once(shape: Sequence[int], axes: str) -> int:
    """Values of the largest piece."""
    unit = _unit(shape, axes)
    return unit * prod(piece_of(_cut(shape, axes), PIECE_BYTES // (ITEM_BYTES * unit)))


@final
class GpuReducing(DevicePrimitive):
    """Mean, sum, maximum … over channels, or over axes of space."""

    name: ClassVar[str] = "reduction"
    layer: ClassVar[type[Layer]] = Reduce
    beside: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return prod(problem.inputs[0])

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Of a piece its squares, in double precision, and two sums of them."""
        axes = cast("Reduce", problem.layer).axes
        batch, channels, *_ = problem.inputs[0]
        seen = (batch, channels, *(problem.output if axes == "c" else problem.inputs[0])[2:])
        share = prod(problem.output) / prod(seen)
        values = _values_at_once(seen, axes)
        return round(values * _DOUBLE_BYTES * (1 + 2 * share)) + BUFFERS_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer, x = cast("Reduce", problem.layer), inputs[0]
        if layer.axes == "c":
            x = cropped(x, problem.offsets[0], out.shape[2:])
        function, axes = _REDUCTIONS[layer.function], _axes(layer.axes)
        for part in _parts(x.shape, layer.axes):
            out[part] = function(team.xp, x[part], axes)


@final
class GpuSoftmax(DevicePrimitive):
    """exp(x - max) over its sum, maximum and sum taken over channels or over space."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Softmax
    beside: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 4 * prod(problem.output)

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem, passes=4, launches=6)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Of a piece its exponentials, where there is a logarithm, and three maxima or sums."""
        layer = cast("Softmax", problem.layer)
        values = _values_at_once(problem.output, layer.axes)
        summed = _axes(layer.axes)
        share = 1 / prod(n for axis, n in enumerate(problem.output) if axis in summed)
        sums = 3 * share * _DOUBLE_BYTES
        return round(values * (layer.log * ITEM_BYTES + sums)) + BUFFERS_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer, xp = cast("Softmax", problem.layer), team.xp
        axes = _axes(layer.axes)
        _bring(problem, inputs[0], out, xp)
        for part in _parts(out.shape, layer.axes):
            values = out[part]
            xp.subtract(values, xp.max(values, axis=axes, keepdims=True), out=values)
            if layer.log:
                xp.subtract(values, xp.log(_sum(xp, xp.exp(values), axes)), out=values)
            else:
                xp.exp(values, out=values)
                xp.divide(values, _sum(xp, values, axes), out=values)


@final
class GpuNormalization(DevicePrimitive):
    """Instance, group and layer normalisation: the mean is taken away, then what is left is
    multiplied."""

    name: ClassVar[str] = "normalisation"
    layer: ClassVar[type[Layer]] = Normalize
    beside: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 6 * prod(problem.output)

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem, passes=6, launches=10)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Of some planes the squares, and of each group that is normalised for itself what is
        found of it."""
        layer = cast("Normalize", problem.layer)
        planes, values = _planes_at_once(problem.output)
        kept = [
            n for n, axis in zip(problem.output[2:], AXES, strict=True) if axis not in layer.space
        ]
        groups = layer.groups * prod(kept)
        if "z" not in layer.space:
            groups = groups * planes // problem.output[2]
        return values * ITEM_BYTES + 6 * groups * _DOUBLE_BYTES + BUFFERS_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer = cast("Normalize", problem.layer)
        scale, shift = (prepared[key].reshape(-1, 1, 1, 1) for key in ("scale", "shift"))
        _bring(problem, inputs[0], out, team.xp)
        step, _ = _planes_at_once(problem.output)
        for sample in out.reshape(len(out), layer.groups, -1, *out.shape[2:]):
            parts = [sample[:, :, z : z + step] for z in range(0, out.shape[2], step)]
            together = [parts] if "z" in layer.space else [[part] for part in parts]
            for some in together:
                _normalize(layer, some, team.xp)
        team.xp.multiply(out, scale, out=out)
        team.xp.add(out, shift, out=out)


def _normalize(layer: Normalize, parts: Sequence[Any], xp: Any) -> None:
    """Normalise some parts (group, channel, z, y, x) together."""
    axes = (1, *_axes(layer.space))
    found = [_sum(xp, part, axes) for part in parts]
    count = sum(part.size for part in parts) // found[0].size
    mean = sum(found) / count
    for part in parts:
        xp.subtract(part, mean, out=part)
    squares = sum(_sum(xp, xp.square(part), axes) for part in parts)
    factor = 1 / xp.sqrt(squares / count + layer.epsilon)
    for part in parts:
        xp.multiply(part, factor, out=part)


def _planes_at_once(shape: Sequence[int]) -> tuple[int, int]:
    """Planes of all channels of a sample, and their values."""
    _, channels, z, y, x = shape
    plane = channels * y * x
    planes = max(1, min(z, PIECE_BYTES // (ITEM_BYTES * plane)))
    return planes, planes * plane


def _bring(problem: Problem, x: Any, out: Any, xp: Any) -> None:
    """Copy the input into ``out`` unless it is there already."""
    if not xp.may_share_memory(out, x):
        out[...] = cropped(x, problem.offsets[0], out.shape[2:])
