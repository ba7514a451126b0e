"""Layers that look at one value at a time: activations, affine maps.

Where its input is not needed any more, such a layer overwrites it. Work goes in pieces that stay
in the second-level cache, so temporaries are small and their size is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size
from znni_dask.kernels import special
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Activation, Affine, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem

PIECE = 1 << 16
ZEROS = np.zeros(PIECE, np.float32)  # numpy takes seven times as long with one number


def crop(x: Array, offset: Size, size: Sequence[int]) -> Array:
    """The part of ``x`` that begins at ``offset`` (z, y, x), as a view; ``x`` in either form."""
    z, y, x_axis = (slice(o, o + n) for o, n in zip(offset, size[:3], strict=True))
    return x[:, :, z, y, x_axis]


def copy_channels(target: Array, source: Array, team: Team) -> None:
    """Copy (batch, channel, z, y, x), shared out by batch and channel."""
    channels = target.shape[1]

    def work(first: int, last: int) -> None:
        for item in range(first, last):
            at = divmod(item, channels)
            target[at] = source[at]

    team.share(work, target.shape[0] * channels)


def bring(problem: Problem, inputs: Sequence[Array], out: Array, team: Team) -> None:
    """Copy the first input into ``out`` unless it is there already."""
    if out is inputs[0] or np.shares_memory(out, inputs[0]):
        return
    copy_channels(out, crop(inputs[0], problem.offsets[0], out.shape[2:]), team)


@final
class ActivationFunction(Primitive):
    """Every function of a value that `layers.Activation` names."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Activation
    in_place: ClassVar[bool] = True

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        if cast("Activation", layer).function == "prelu":
            return Form.PLAIN, Form.PLAIN
        return None, None

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
        activation = cast("Activation", problem.layer)
        channels = out.shape[1]
        if activation.function == "prelu":
            assert prepared is not None
            _per_channel(
                problem, inputs, out, team, lambda v, c: _leak(v, prepared[c % channels], 0)
            )
            return
        function = _FUNCTIONS[activation.function]
        alpha, beta = np.float32(activation.alpha), np.float32(activation.beta)
        _per_channel(problem, inputs, out, team, lambda v, c: function(v, alpha, beta))


def _per_channel(
    problem: Problem,
    inputs: Sequence[Array],
    out: Array,
    team: Team,
    function: Callable[[Array, int], object],
) -> None:
    """Call ``function(values, index)`` on pieces of every (batch, channel) of the first input,
    which are in ``out`` by then."""
    flat = out.reshape(out.shape[0] * out.shape[1], -1)
    pieces = max(1, -(-flat.shape[1] // PIECE))
    if inputs[0].shape != out.shape:
        bring(problem, inputs, out, team)
        inputs = [out]
    source = inputs[0].reshape(flat.shape)
    there = np.shares_memory(flat, source)

    def work(first: int, last: int) -> None:
        with np.errstate(all="ignore"):  # infinities are what such functions have there
            for item in range(first, last):
                row, piece = divmod(item, pieces)
                place = row, slice(piece * PIECE, (piece + 1) * PIECE)
                if not there:
                    flat[place] = source[place]
                function(flat[place], row)

    team.share(work, flat.shape[0] * pieces)


def _leak(v: Array, alpha: Any, beta: Any) -> None:
    np.multiply(v, alpha, out=v, where=v < 0)


def _elu(v: Array, alpha: Any, beta: Any) -> None:
    negative = np.minimum(v, 0)
    np.expm1(negative, out=negative)
    np.multiply(negative, alpha, out=negative)
    np.maximum(v, 0, out=v)
    np.add(v, negative, out=v)


def _selu(v: Array, alpha: Any, gamma: Any) -> None:
    _elu(v, alpha, 0)
    np.multiply(v, gamma, out=v)


def _celu(v: Array, alpha: Any, beta: Any) -> None:
    np.multiply(v, 1 / alpha, out=v, where=v < 0)
    _elu(v, alpha, 0)


def _sigmoid(v: Array, alpha: Any, beta: Any) -> None:
    np.negative(v, out=v)
    np.exp(v, out=v)
    np.add(v, 1, out=v)
    np.reciprocal(v, out=v)


def _silu(v: Array, alpha: Any, beta: Any) -> None:
    gate = v.copy()
    _sigmoid(gate, 0, 0)
    np.multiply(v, gate, out=v)


def _gelu_tanh(v: Array, alpha: Any, beta: Any) -> None:
    inner = v * v
    np.multiply(inner, np.float32(0.044715), out=inner)
    np.add(inner, 1, out=inner)
    np.multiply(inner, v, out=inner)
    np.multiply(inner, np.float32(np.sqrt(2 / np.pi)), out=inner)
    np.tanh(inner, out=inner)
    np.add(inner, 1, out=inner)
    np.multiply(inner, np.float32(0.5), out=inner)
    np.multiply(v, inner, out=v)


def _hard_sigmoid(v: Array, slope: Any, shift: Any) -> None:
    np.multiply(v, slope, out=v)
    np.add(v, shift, out=v)
    np.clip(v, 0, 1, out=v)


def _hard_swish(v: Array, alpha: Any, beta: Any) -> None:
    gate = v.copy()
    _hard_sigmoid(gate, np.float32(1 / 6), np.float32(0.5))
    np.multiply(v, gate, out=v)


def _softplus(v: Array, alpha: Any, beta: Any) -> None:
    np.logaddexp(v, np.float32(0), out=v)


def _softsign(v: Array, alpha: Any, beta: Any) -> None:
    size = np.abs(v)
    np.add(size, 1, out=size)
    np.divide(v, size, out=v)


def _threshold(v: Array, alpha: Any, beta: Any) -> None:
    np.multiply(v, 0, out=v, where=v <= alpha)


_FUNCTIONS: dict[str, Callable[[Array, Any, Any], object]] = {
    "relu": lambda v, a, b: np.maximum(v, ZEROS[: v.size], out=v),
    "leaky_relu": _leak,
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "gelu": lambda v, a, b: special.gelu(v),
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": lambda v, a, b: special.mish(v),
    "hard_swish": _hard_swish,
    "hard_sigmoid": _hard_sigmoid,
    "softplus": _softplus,
    "softsign": _softsign,
    "tanh": lambda v, a, b: np.tanh(v, out=v),
    "sigmoid": _sigmoid,
    "clip": lambda v, low, high: np.clip(v, low, high, out=v),
    "thresholded_relu": _threshold,
    "erf": lambda v, a, b: special.erf(v),
    "exp": lambda v, a, b: np.exp(v, out=v),
    "log": lambda v, a, b: np.log(v, out=v),
    "sqrt": lambda v, a, b: np.sqrt(v, out=v),
    "pow": lambda v, exponent, b: np.power(v, exponent, out=v),
    "abs": lambda v, a, b: np.abs(v, out=v),
    "neg": lambda v, a, b: np.negative(v, out=v),
    "reciprocal": lambda v, a, b: np.reciprocal(v, out=v),
    "sign": lambda v, a, b: np.sign(v, out=v),
    "floor": lambda v, a, b: np.floor(v, out=v),
    "ceil": lambda v, a, b: np.ceil(v, out=v),
    "round": lambda v, a, b: np.rint(v, out=v),
    "sin": lambda v, a, b: np.sin(v, out=v),
    "cos": lambda v, a, b: np.cos(v, out=v),
    "atan": lambda v, a, b: np.arctan(v, out=v),
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

        _per_channel(problem, inputs, out, team, affine)
