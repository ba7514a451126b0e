"""Layers that look at one value at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

from znni_dask.errors import NetworkError
from znni_dask.network.layers.base import Layer, only, only_of_width


@final
@dataclass(frozen=True)
class Affine(Layer):
    """``scale`` · x + ``shift``, one of each per channel: a batch normalisation that could not
    be folded into a convolution, or a product or sum with constants."""

    width: int

    def channels(self, inputs: Sequence[int]) -> int:
        return only_of_width(self, self.width, inputs)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scale": (self.width,), "shift": (self.width,)}


Function = Literal[
    "relu",
    "leaky_relu",
    "prelu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "gelu_tanh",
    "silu",
    "mish",
    "hard_swish",
    "hard_sigmoid",
    "softplus",
    "softsign",
    "tanh",
    "sigmoid",
    "clip",
    "thresholded_relu",
    "erf",
    "exp",
    "log",
    "sqrt",
    "pow",
    "abs",
    "neg",
    "reciprocal",
    "sign",
    "floor",
    "ceil",
    "round",
    "sin",
    "cos",
    "atan",
]
FUNCTIONS: tuple[str, ...] = get_args(Function)
# the meaning of ``alpha`` and ``beta``, for the functions that have them
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "leaky_relu": ("slope",),
    "elu": ("scale",),
    "selu": ("scale", "gamma"),
    "celu": ("scale",),
    "hard_sigmoid": ("slope", "shift"),
    "thresholded_relu": ("threshold",),
    "clip": ("low", "high"),
    "pow": ("exponent",),
}


@final
@dataclass(frozen=True)
class Activation(Layer):
    """A function of every value.

    ``alpha`` and ``beta`` are the slope of leaky_relu, the scale of elu and celu, alpha and gamma
    of selu, slope and shift of hard_sigmoid, the threshold of thresholded_relu, the bounds of
    clip (which may be infinite), the exponent of pow; prelu has a weight ``slope`` per channel
    (``width`` of them). ``gelu`` is the exact one, ``gelu_tanh`` its approximation.
    """

    function: Function
    alpha: float = 0.0
    beta: float = 0.0
    width: int = 0

    def channels(self, inputs: Sequence[int]) -> int:
        found = only(self, inputs)
        if self.function not in FUNCTIONS:
            raise NetworkError(f"the function {self.function!r} is not known")
        if self.function == "prelu" and found != self.width:
            raise NetworkError(f"PRelu has {self.width} slopes, its input {found} channels")
        return found

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"slope": (self.width,)} if self.function == "prelu" else {}

    @property
    def kind(self) -> str:
        return self.function

    @property
    def summary(self) -> str:
        names = _PARAMETERS.get(self.function, ())
        values = (self.alpha, self.beta)
        return ", ".join(f"{n} {v:g}" for n, v in zip(names, values, strict=False))
