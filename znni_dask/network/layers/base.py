"""What all layers share, and the input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, text
from znni_dask.network.window import LARGEST, SAME, Window

Padding = tuple[Size, Size]
ONES: Size = (1, 1, 1)
NO_PADDING: Padding = ((0, 0, 0), (0, 0, 0))
AXES_OF_SPACE = ("z", "y", "x", "zy", "zx", "yx", "zyx")  # that a layer can take in together


class Layer(ABC):
    """One operation on arrays (batch, channel, z, y, x)."""

    @abstractmethod
    def channels(self, inputs: Sequence[int]) -> int:
        """Channels of the output; raises `NetworkError` where the inputs' do not fit."""

    def window(self, axis: int) -> Window:
        """The layer's window along axis 0 (z), 1 (y) or 2 (x)."""
        return SAME

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of weights."""
        return {}

    def multiply_adds(self) -> Fraction:
        """Multiply-adds for one output voxel with all its channels."""
        return Fraction(0)

    @property
    def kind(self) -> str:
        """The layer's word in tables and messages."""
        return type(self).__name__

    @property
    def summary(self) -> str:
        """The parameters as shown in a table."""
        return ""


@final
@dataclass(frozen=True)
class Input(Layer):
    """The volume."""

    width: int

    def channels(self, inputs: Sequence[int]) -> int:
        if inputs:
            raise NetworkError("Input takes no inputs")
        return self.width


def only(layer: Layer, inputs: Sequence[int]) -> int:
    """The channels of a layer's one input."""
    if len(inputs) != 1:
        raise NetworkError(f"{layer.kind} takes one input, {len(inputs)} are given")
    return inputs[0]


def only_of_width(layer: Layer, width: int, inputs: Sequence[int]) -> int:
    """The channels of a layer's one input, which must be ``width``."""
    found = only(layer, inputs)
    if found != width:
        raise NetworkError(f"{layer.kind} has {width} channels, its input {found}")
    return found


def extent(kernel: int, dilation: int) -> int:
    """Length of a dilated window."""
    return (kernel - 1) * dilation + 1


def check_window(
    layer: Layer, kernel: Size, stride: Size, dilation: Size, padding: Padding
) -> None:
    """Raise `NetworkError` where a window's sizes make no sense."""
    sizes = (*kernel, *stride, *dilation)
    if min(sizes) < 1:
        raise NetworkError(f"{layer.kind} ({layer.summary}): sizes must be positive")
    if max(*sizes, *map(abs, (*padding[0], *padding[1]))) > LARGEST:
        raise NetworkError(f"{layer.kind} ({layer.summary}): sizes beyond {LARGEST} are a mistake")


def padding_text(padding: Padding) -> str:
    """Padding as shown in a table."""
    low, high = padding
    return text(low) if low == high else f"{text(low)} to {text(high)}"


def window_text(
    kernel: Size,
    stride: Size = ONES,
    dilation: Size = ONES,
    padding: Padding = NO_PADDING,
    *more: str,
) -> str:
    """A window as shown in a table."""
    parts = [text(kernel)]
    if stride != ONES:
        parts.append(f"stride {text(stride)}")
    if dilation != ONES:
        parts.append(f"dilation {text(dilation)}")
    if padding != NO_PADDING:
        parts.append(f"pad {padding_text(padding)}")
    return ", ".join([*parts, *(m for m in more if m)])
