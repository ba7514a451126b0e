"""Convolution and transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, volume
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
class Conv(Layer):
    """Cross-correlation with ``weight`` (out, in / groups, z, y, x), plus ``bias`` (out,).

    ``whole``: the kernel is as large as the input of one window of the network (a flattening
    followed by a matrix), so outputs exist for that window alone.
    """

    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size = ONES
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    groups: int = 1
    bias: bool = True
    whole: bool = False

    def channels(self, inputs: Sequence[int]) -> int:
        return _channels(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(
            extent(self.kernel[axis], self.dilation[axis]),
            stride=self.stride[axis],
            low=self.padding[0][axis],
            high=self.padding[1][axis],
            whole=self.whole,
            single=self.whole,
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        weight = (self.out_channels, self.in_channels // self.groups, *self.kernel)
        return _shapes(self, weight)

    def multiply_adds(self) -> Fraction:
        return Fraction(self.out_channels * self.in_channels // self.groups * volume(self.kernel))

    @property
    def summary(self) -> str:
        return _summary(self)


@final
@dataclass(frozen=True)
class ConvTranspose(Layer):
    """Transposed convolution with ``weight`` (in, out / groups, z, y, x), plus ``bias`` (out,).

    ``padding`` trims the output; ONNX's ``output_padding`` is subtracted from its high side.
    """

    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size = ONES
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    groups: int = 1
    bias: bool = True

    def channels(self, inputs: Sequence[int]) -> int:
        return _channels(self, inputs)

    def window(self, axis: int) -> Window:
        length = extent(self.kernel[axis], self.dilation[axis])
        low, high = self.padding[0][axis], self.padding[1][axis]
        if self.stride[axis] == 1:  # an ordinary convolution with the kernel turned round
            return Window(length, low=length - 1 - low, high=length - 1 - high)
        return Window(length, up=self.stride[axis], low=low, high=high)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        weight = (self.in_channels, self.out_channels // self.groups, *self.kernel)
        return _shapes(self, weight)

    def multiply_adds(self) -> Fraction:
        """Of an inner voxel, averaged over the stride's offsets."""
        taps = self.out_channels * self.in_channels // self.groups * volume(self.kernel)
        return Fraction(taps, volume(self.stride))

    @property
    def summary(self) -> str:
        return _summary(self)


def _shapes(layer: Conv | ConvTranspose, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"weight": weight} | ({"bias": (layer.out_channels,)} if layer.bias else {})


def _summary(layer: Conv | ConvTranspose) -> str:
    groups = f"{layer.groups} groups" if layer.groups > 1 else ""
    return window_text(layer.kernel, layer.stride, layer.dilation, layer.padding, groups)


def _channels(layer: Conv | ConvTranspose, inputs: Sequence[int]) -> int:
    found = only(layer, inputs)
    check_window(layer, layer.kernel, layer.stride, layer.dilation, layer.padding)
    if found != layer.in_channels:
        raise NetworkError(
            f"{layer.kind} wants {layer.in_channels} channels, its input has {found}"
        )
    if layer.groups < 1 or layer.in_channels % layer.groups or layer.out_channels % layer.groups:
        raise NetworkError(
            f"{layer.kind} from {layer.in_channels} to {layer.out_channels} channels cannot have "
            f"{layer.groups} groups: both must be whole numbers of groups"
        )
    return layer.out_channels
