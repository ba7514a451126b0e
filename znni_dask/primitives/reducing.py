"""Layers that reduce: over the channels of a voxel, or over space.

Over space the input given is always the whole one: only networks that are applied window by
window have such layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import AXES, ceil_divide
from znni_dask.kernels import statistics
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Layer, Normalize, Reduce, Softmax
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Primitive, Problem
from znni_dask.primitives.pointwise import PIECE, bring, crop
from znni_dask.primitives.work import Rate, Work

NORMALISING = Rate("normalising", 8e8)  # values

Doubles = NDArray[np.float64]
_DOUBLE_BYTES = 8


def _l2(v: Array, axis: Any, keepdims: bool = False) -> Array:
    return cast("Array", np.sqrt(np.square(v).sum(axis=axis, keepdims=keepdims)))


def _l1(v: Array, axis: Any, keepdims: bool = False) -> Array:
    return cast("Array", np.abs(v).sum(axis=axis, keepdims=keepdims))


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "l1": _l1,
    "l2": _l2,
    "argmax": np.argmax,
}


def _space(axes: str) -> tuple[int, ...]:
    """Axes of space as axes of an array (z, y, x)."""
    return tuple(i for i, name in enumerate(AXES) if name in axes)


@final
class Reducing(Primitive):
    """Mean, sum, maximum … over channels, plane by plane, or over axes of space."""

    name: ClassVar[str] = "reduction"
    layer: ClassVar[type[Layer]] = Reduce

    def flops(self, problem: Problem) -> int:
        return prod(problem.inputs[0])

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        _, channels, z, y, x = problem.inputs[0]
        channelwise = cast("Reduce", problem.layer).axes == "c"
        piece = channels * y * x if channelwise else max(PIECE, z * y * x)
        return threads * 2 * piece * _DOUBLE_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        layer = cast("Reduce", problem.layer)
        reduction = _REDUCTIONS[layer.function]
        if layer.axes == "c":
            source = crop(inputs[0], problem.offsets[0], out.shape[2:])

            def over_channels(first: int, last: int) -> None:
                for item in range(first, last):
                    batch, z = divmod(item, out.shape[2])
                    out[batch, 0, z] = reduction(source[batch, :, z], axis=0)

            team.share(over_channels, out.shape[0] * out.shape[2])
            return
        axes = tuple(1 + axis for axis in _space(layer.axes))
        rows = inputs[0].reshape(-1, *inputs[0].shape[2:])
        made = out.reshape(-1, *out.shape[2:])
        at_once = max(1, PIECE // prod(rows.shape[1:]))

        def over_space(first: int, last: int) -> None:
            for row in range(first * at_once, min(last * at_once, len(rows)), at_once):
                values = rows[row : row + at_once].astype(np.float64)
                made[row : row + at_once] = reduction(values, axis=axes, keepdims=True)

        team.share(over_space, ceil_divide(len(rows), at_once))


@final
class SoftmaxOverAxes(Primitive):
    """exp(x - max) over its sum, maximum and sum taken over channels or over space."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Softmax
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 4 * prod(problem.output)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        # the maxima or sums, and numpy's buffers of what is reduced
        _, channels, z, y, x = problem.output
        if cast("Softmax", problem.layer).axes == "c":
            return threads * (channels + 2) * y * x * ITEM_BYTES
        return threads * 3 * z * y * x * ITEM_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        layer = cast("Softmax", problem.layer)
        channels = layer.axes == "c"
        axes = 0 if channels else _space(layer.axes)

        def work(first: int, last: int) -> None:
            for item in range(first, last):
                batch, index = divmod(item, out.shape[2] if channels else out.shape[1])
                values = out[batch, :, index] if channels else out[batch, index]
                np.subtract(values, values.max(axis=axes, keepdims=True), out=values)
                if layer.log:
                    total = np.exp(values).sum(axis=axes, keepdims=True)
                    np.subtract(values, np.log(total), out=values)
                else:
                    np.exp(values, out=values)
                    np.divide(values, values.sum(axis=axes, keepdims=True), out=values)

        bring(problem, inputs, out, team)
        team.share(work, out.shape[0] * (out.shape[2] if channels else out.shape[1]))


@final
class Normalization(Primitive):
    """Instance, group and layer normalisation.

    Over space: mean and spread of every channel, joined into those of its group (Chan, Golub and
    LeVeque 1983), then one multiplication and addition a value.
    """

    name: ClassVar[str] = "normalisation"
    layer: ClassVar[type[Layer]] = Normalize
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 6 * prod(problem.output)

    def work(self, problem: Problem, threads: int) -> Work:
        return Work({NORMALISING: prod(problem.output)})

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        batch, channels, z, y, x = problem.output
        rows = batch * channels * z * y  # at most, of normalisation along x alone
        if cast("Normalize", problem.layer).space == "zyx":
            rows = batch * channels
        elif cast("Normalize", problem.layer).space == "yx":
            rows = batch * channels * z
        return 8 * rows * _DOUBLE_BYTES + 2 * threads * x * _DOUBLE_BYTES

    def prepare(self, layer: Layer, weights: Weights) -> tuple[Array, Array]:
        return weights["scale"], weights["shift"]

    def apply(
        self,
        prepared: tuple[Array, Array],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        scale, shift = prepared
        layer = cast("Normalize", problem.layer)
        bring(problem, inputs, out, team)
        if not layer.space:

            def by_voxel(first: int, last: int) -> None:
                statistics.normalize_channels(
                    out, layer.groups, layer.epsilon, scale, shift, first, last
                )

            team.share(by_voxel, out.shape[0] * out.shape[2])
            return
        kept = 3 - len(layer.space)  # leading axes of space that are not reduced
        lead = out.shape[: 2 + kept]
        rows = out.reshape(prod(lead), -1)
        mean, spread = np.empty(len(rows)), np.empty(len(rows))
        team.share(lambda a, b: statistics.moments(rows, mean, spread, a, b), len(rows))
        centre, factor = _joined(layer, mean, spread, lead, rows.shape[1])
        axes = (1, -1, *(1,) * kept)
        factor = (factor * scale.reshape(axes)).ravel()
        addend = np.broadcast_to(shift.reshape(axes).astype(np.float64), lead).flatten()
        team.share(
            lambda a, b: statistics.scale_rows(rows, centre, factor, addend, a, b), len(rows)
        )


def _joined(
    layer: Normalize, mean: Doubles, spread: Doubles, lead: tuple[int, ...], width: int
) -> tuple[Doubles, Doubles]:
    """The mean of each row's group, and one over the group's standard deviation (shaped
    ``lead``), from the moments of the rows, which are ``width`` values each."""
    grouped = (lead[0], layer.groups, lead[1] // layer.groups, *lead[2:])
    mean, spread = mean.reshape(grouped), spread.reshape(grouped)
    centre = mean.mean(axis=2, keepdims=True)
    between = width * np.square(mean - centre).sum(axis=2, keepdims=True)
    variance = (spread.sum(axis=2, keepdims=True) + between) / (width * grouped[2])
    inverse = 1 / np.sqrt(variance + layer.epsilon)
    return (
        np.broadcast_to(centre, grouped).flatten(),  # a copy: kernels are compiled for such
        np.broadcast_to(inverse, grouped).reshape(lead),
    )
