"""Layers that look at one voxel at a time: activations, affine maps, softmax, sums and products.

Where its first input is not needed any more, such a layer overwrites it. Work goes in pieces
that stay in the second-level cache, so temporaries are small and their size is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Activation, Add, Affine, Layer, Mul, Softmax
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Primitive, Problem

PIECE = 1 << 16


def crop(x: Array, offset: Size, size: Sequence[int]) -> Array:
    """The part of ``x`` that begins at ``offset`` (z, y, x), as a view."""
    z, y, x_axis = (slice(o, o + n) for o, n in zip(offset, size, strict=True))
    return x[:, :, z, y, x_axis]


def _bring(problem: Problem, inputs: Sequence[Array], out: Array, team: Team) -> None:
    """Copy the first input into ``out`` unless it is there already."""
    if out is inputs[0] or np.shares_memory(out, inputs[0]):
        return
    source = crop(inputs[0], problem.offsets[0], out.shape[2:])

    def work(first: int, last: int) -> None:
        out[first:last] = source[first:last]

    if out.shape[0] > 1:
        team.share(work, out.shape[0])
    else:
        team.share(
            lambda first, last: np.copyto(out[0, first:last], source[0, first:last]), out.shape[1]
        )


@final
class ActivationFunction(Primitive):
    """relu, leaky_relu, prelu, elu, tanh, sigmoid."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Activation
    in_place: ClassVar[bool] = True

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return 2 * threads * PIECE * ITEM_BYTES

    def prepare(self, layer: Layer, weights: Weights) -> Array | None:
        return weights.get("slope")

    def apply(
        self,
        prepared: Array | None,
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        _bring(problem, inputs, out, team)
        activation = cast("Activation", problem.layer)
        channels = out.shape[1]
        if activation.function == "prelu":
            assert prepared is not None
            _per_channel(out, team, lambda v, c: _leak(v, prepared[c % channels]))
            return
        function = _FUNCTIONS[activation.function]
        _per_channel(out, team, lambda v, c: function(v, activation.alpha))


def _per_channel(out: Array, team: Team, function: Callable[[Array, int], None]) -> None:
    """Call ``function(values, index)`` on pieces of every (batch, channel)."""
    flat = out.reshape(out.shape[0] * out.shape[1], -1)
    pieces = max(1, -(-flat.shape[1] // PIECE))

    def work(first: int, last: int) -> None:
        for item in range(first, last):
            row, piece = divmod(item, pieces)
            function(flat[row, piece * PIECE : (piece + 1) * PIECE], row)

    team.share(work, flat.shape[0] * pieces)


def _relu(v: Array, alpha: float) -> None:
    np.maximum(v, 0, out=v)


def _leak(v: Array, alpha: float | np.floating[Any]) -> None:
    np.multiply(v, np.float32(alpha), out=v, where=v < 0)


def _elu(v: Array, alpha: float) -> None:
    negative = np.minimum(v, 0)
    np.expm1(negative, out=negative)
    np.multiply(negative, np.float32(alpha), out=negative)
    np.maximum(v, 0, out=v)
    np.add(v, negative, out=v)


def _tanh(v: Array, alpha: float) -> None:
    np.tanh(v, out=v)


def _sigmoid(v: Array, alpha: float) -> None:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, its reciprocal 0
        np.negative(v, out=v)
        np.exp(v, out=v)
        np.add(v, 1, out=v)
        np.reciprocal(v, out=v)


_FUNCTIONS: dict[str, Callable[[Array, float], None]] = {
    "relu": _relu,
    "leaky_relu": _leak,
    "elu": _elu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
}


@final
class AffineMap(Primitive):
    """scale · x + shift per channel."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Affine
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 2 * prod(problem.output)

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
        channels = out.shape[1]

        def affine(v: Array, row: int) -> None:
            np.multiply(v, scale[row % channels], out=v)
            np.add(v, shift[row % channels], out=v)

        _bring(problem, inputs, out, team)
        _per_channel(out, team, affine)


def _combine(
    ufunc: np.ufunc, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
) -> None:
    views = [
        np.broadcast_to(crop(x, offset, out.shape[2:]), out.shape)
        for x, offset in zip(inputs, problem.offsets, strict=True)
    ]

    def work(first: int, last: int) -> None:
        for item in range(first, last):
            at = divmod(item, out.shape[1])
            ufunc(views[0][at], views[1][at], out=out[at])
            for view in views[2:]:
                ufunc(out[at], view[at], out=out[at])

    team.share(work, out.shape[0] * out.shape[1])


@final
class Sum(Primitive):
    """Sum of any number of inputs."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Add
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return (len(problem.inputs) - 1) * prod(problem.output)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _combine(np.add, problem, inputs, out, team)


@final
class Product(Primitive):
    """Product of any number of inputs."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Mul
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return (len(problem.inputs) - 1) * prod(problem.output)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _combine(np.multiply, problem, inputs, out, team)


@final
class SoftmaxOverChannels(Primitive):
    """exp(x - max) over its sum, the maximum and the sum taken over channels."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Softmax
    in_place: ClassVar[bool] = True

    def flops(self, problem: Problem) -> int:
        return 4 * prod(problem.output)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        # a plane of maxima or sums, and numpy's buffer of a plane of one channel
        _, channels, _, y, x = problem.output
        return threads * (channels + 2) * y * x * ITEM_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        def work(first: int, last: int) -> None:
            for item in range(first, last):
                batch, z = divmod(item, out.shape[2])
                plane = out[batch, :, z]
                np.subtract(plane, plane.max(axis=0), out=plane)
                np.exp(plane, out=plane)
                np.divide(plane, plane.sum(axis=0), out=plane)

        _bring(problem, inputs, out, team)
        team.share(work, out.shape[0] * out.shape[2])
