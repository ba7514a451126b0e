"""Layers whose outputs depend on all channels of a voxel, or on all voxels of an axis.

Which axes they reduce decides whether a network can be computed in patches: over channels is
local, over space is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

from znni_dask.errors import NetworkError
from znni_dask.geometry import AXES
from znni_dask.network.layers.base import AXES_OF_SPACE, Layer, only, only_of_width
from znni_dask.network.window import SAME, Window

Reduction = Literal["mean", "sum", "max", "min", "l1", "l2", "argmax"]


@final
@dataclass(frozen=True)
class Reduce(Layer):
    """Mean, sum … over the channels (``axes`` "c") or over some of the axes "zyx".

    One channel, or one voxel along those axes, is left. ``argmax`` is the index of the first
    largest channel.
    """

    function: Reduction
    axes: str

    def channels(self, inputs: Sequence[int]) -> int:
        found = only(self, inputs)
        _check_axes(self, self.axes)
        if self.function not in get_args(Reduction):
            raise NetworkError(f"the reduction {self.function!r} is not known")
        if self.function == "argmax" and self.axes != "c":
            raise NetworkError("argmax goes over channels alone")
        return 1 if self.axes == "c" else found

    def window(self, axis: int) -> Window:
        return Window(whole=True, single=True) if AXES[axis] in self.axes else SAME

    @property
    def kind(self) -> str:
        return f"reduce_{self.function}"

    @property
    def summary(self) -> str:
        return f"over {self.axes}"


@final
@dataclass(frozen=True)
class Softmax(Layer):
    """Exponentials divided by their sum, over the channels of each voxel (``axes`` "c") or over
    axes of space; its logarithm where ``log``."""

    axes: str = "c"
    log: bool = False

    def channels(self, inputs: Sequence[int]) -> int:
        _check_axes(self, self.axes)
        return only(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(whole=True) if AXES[axis] in self.axes else SAME

    @property
    def kind(self) -> str:
        return "LogSoftmax" if self.log else "Softmax"

    @property
    def summary(self) -> str:
        return f"over {self.axes}"


@final
@dataclass(frozen=True)
class Normalize(Layer):
    """(x - mean) / sqrt(variance + ``epsilon``) · ``scale`` + ``shift``.

    Mean and variance are those of each of the ``groups`` of channels, over the axes ``space``:
    instance normalisation has as many groups as channels, layer normalisation one. With
    ``space`` "" each voxel is normalised by itself, which is local.
    """

    width: int
    groups: int
    space: str
    epsilon: float = 1e-5

    def channels(self, inputs: Sequence[int]) -> int:
        if self.space not in ("", "x", "yx", "zyx"):
            raise NetworkError(f"normalisation over the axes {self.space!r} is not supported")
        if self.groups < 1 or self.width % self.groups:
            raise NetworkError(f"{self.width} channels do not fall into {self.groups} groups")
        return only_of_width(self, self.width, inputs)

    def window(self, axis: int) -> Window:
        return Window(whole=True) if AXES[axis] in self.space else SAME

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scale": (self.width,), "shift": (self.width,)}

    @property
    def kind(self) -> str:
        if self.space and self.groups == self.width:
            return "InstanceNormalization"
        return "GroupNormalization" if self.groups > 1 else "LayerNormalization"

    @property
    def summary(self) -> str:
        groups = f"{self.groups} groups, " if 1 < self.groups < self.width else ""
        return f"{groups}over {'c' if self.groups < self.width else ''}{self.space}"


def _check_axes(layer: Layer, axes: str) -> None:
    if axes not in ("c", *AXES_OF_SPACE):
        raise NetworkError(f"{layer.kind} over the axes {axes!r}: wanted are c, or some of zyx")
