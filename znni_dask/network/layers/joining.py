"""Layers with several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from znni_dask.errors import NetworkError
from znni_dask.network.layers.base import Layer

Join = Literal["add", "sub", "mul", "div", "min", "max", "pow", "greater", "less", "equal", "where"]
_INPUTS = {"add": 0, "mul": 0, "min": 0, "max": 0, "where": 3}  # 0: any number; others take two


@final
@dataclass(frozen=True)
class Arithmetic(Layer):
    """The inputs combined value by value, from left to right. An input with one channel counts
    for all channels, one that was reduced to a single voxel for all voxels.

    Comparisons give 1 or 0; "where" takes the second input where the first is not 0, the third
    elsewhere. ``relu``: what is negative becomes zero.
    """

    function: Join
    relu: bool = False

    def channels(self, inputs: Sequence[int]) -> int:
        wanted = _INPUTS.get(self.function, 2)
        if len(inputs) != wanted and (wanted or len(inputs) < 2):
            raise NetworkError(
                f"{self.kind} takes {wanted or 'at least 2'} inputs, {len(inputs)} are given"
            )
        wide = max(inputs)
        if any(c not in (1, wide) for c in inputs):
            raise NetworkError(
                f"{self.kind} of arrays with {', '.join(map(str, inputs))} channels: "
                "they must be equal, or 1"
            )
        return wide

    @property
    def kind(self) -> str:
        return self.function

    @property
    def summary(self) -> str:
        return "relu" if self.relu else ""


@final
@dataclass(frozen=True)
class Concat(Layer):
    """The inputs' channels behind one another."""

    def channels(self, inputs: Sequence[int]) -> int:
        if not inputs:
            raise NetworkError("Concat takes at least one input")
        return sum(inputs)


@final
@dataclass(frozen=True)
class Broadcast(Layer):
    """The first input, one voxel along the axes over which it was reduced, repeated to the size
    of the second."""

    def channels(self, inputs: Sequence[int]) -> int:
        if len(inputs) != 2:
            raise NetworkError(f"Broadcast takes two inputs, {len(inputs)} are given")
        return inputs[0]
