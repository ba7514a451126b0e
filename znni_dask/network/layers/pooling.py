"""Pooling: the largest or the mean value of each window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size
from znni_dask.network.layers.base import (
    NO_PADDING,
    ONES,
    Layer,
    Padding,
    check_window,
    extent,
    only,
    window_text,
)
from znni_dask.network.window import Window


@final
@dataclass(frozen=True)
class MaxPool(Layer):
    """Largest value of each window; padding never wins.

    ``ceil``: a last window that begins inside the input (or its low padding) counts although it
    reaches beyond, as PyTorch's ``ceil_mode`` has it.
    """

    kernel: Size
    stride: Size
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    ceil: bool = False

    def channels(self, inputs: Sequence[int]) -> int:
        return _channels(self, inputs)

    def window(self, axis: int) -> Window:
        return _window(self, axis)

    @property
    def summary(self) -> str:
        return _summary(self)


@final
@dataclass(frozen=True)
class AveragePool(Layer):
    """Mean of each window: over the voxels that exist, or with ``count_padding`` over those of
    the padding too, which are zero; ``ceil`` as of `MaxPool`, its overhang never counting."""

    kernel: Size
    stride: Size
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    ceil: bool = False
    count_padding: bool = False

    def channels(self, inputs: Sequence[int]) -> int:
        return _channels(self, inputs)

    def window(self, axis: int) -> Window:
        return _window(self, axis)

    @property
    def summary(self) -> str:
        return _summary(self)


def _window(layer: MaxPool | AveragePool, axis: int) -> Window:
    return Window(
        extent(layer.kernel[axis], layer.dilation[axis]),
        stride=layer.stride[axis],
        low=layer.padding[0][axis],
        high=layer.padding[1][axis],
        ceil=layer.ceil and layer.stride[axis] > 1,
    )


def _summary(layer: MaxPool | AveragePool) -> str:
    ceil = "rounded up" if layer.ceil else ""
    return window_text(layer.kernel, layer.stride, layer.dilation, layer.padding, ceil)


def _channels(layer: MaxPool | AveragePool, inputs: Sequence[int]) -> int:
    check_window(layer, layer.kernel, layer.stride, layer.dilation, layer.padding)
    for axis in range(3):
        if max(layer.padding[0][axis], layer.padding[1][axis]) >= layer.window(axis).extent:
            raise NetworkError(
                f"{layer.kind} ({layer.summary}): a window lies in the padding alone"
            )
    return only(layer, inputs)
