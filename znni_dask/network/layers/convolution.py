"""Convolution and transposed convolution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import final

from znni_dask.errors import NetworkError
from znni_dask.geometry import AXES, Size, volume
from znni_dask.network.layers.base import (
    AXES_OF_SPACE,
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

FULL, LOWER = "float32", "bfloat16"
PRECISIONS = (FULL, LOWER)


@dataclass(frozen=True)
class _Convolution(Layer):
    """What both have."""

    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size = ONES
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    groups: int = 1
    bias: bool = True

    def channels(self, inputs: Sequence[int]) -> int:
        found = only(self, inputs)
        check_window(self, self.kernel, self.stride, self.dilation, self.padding)
        if found != self.in_channels:
            raise NetworkError(
                f"{self.kind} wants {self.in_channels} channels, its input has {found}"
            )
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise NetworkError(
                f"{self.kind} from {self.in_channels} to {self.out_channels} channels cannot have "
                f"{self.groups} groups: both must be whole numbers of groups"
            )
        return self.out_channels

    @abstractmethod
    def window(self, axis: int) -> Window: ...

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": self._kernels} | ({"bias": (self.out_channels,)} if self.bias else {})

    @property
    @abstractmethod
    def _kernels(self) -> tuple[int, ...]:
        """Shape of ``weight``."""

    @property
    def summary(self) -> str:
        groups = f"{self.groups} groups" if self.groups > 1 else ""
        return window_text(self.kernel, self.stride, self.dilation, self.padding, groups)


@final
@dataclass(frozen=True)
class Conv(_Convolution):
    """Cross-correlation with ``weight`` (out, in / groups, z, y, x), plus ``bias`` (out,).

    ``whole``: the axes of space along which the kernel is as large as the input of one window of
    the network (a flattening followed by a matrix), so outputs exist for that alone. ``same``:
    the padding is that of sizes with an output for every ``stride`` voxels; others are not taken.
    ``relu``: what is negative becomes zero. ``precision``: the lowest that it may be computed in,
    which is asked for and no part of the network.
    """

    whole: str = ""
    same: bool = False
    relu: bool = False
    precision: str = field(default=FULL, repr=False)

    def channels(self, inputs: Sequence[int]) -> int:
        if self.whole not in ("", *AXES_OF_SPACE):
            raise NetworkError(f"{self.kind} over the axes {self.whole!r}: wanted are some of zyx")
        return super().channels(inputs)

    def window(self, axis: int) -> Window:
        whole = AXES[axis] in self.whole
        return Window(
            extent(self.kernel[axis], self.dilation[axis]),
            stride=self.stride[axis],
            low=self.padding[0][axis],
            high=self.padding[1][axis],
            whole=whole,
            single=whole,
            same=self.same and self.stride[axis] > 1,
        )

    @property
    def _kernels(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def multiply_adds(self) -> Fraction:
        return Fraction(self.out_channels * self.in_channels // self.groups * volume(self.kernel))

    @property
    def summary(self) -> str:
        return super().summary + (", relu" if self.relu else "")


@final
@dataclass(frozen=True)
class ConvTranspose(_Convolution):
    """Transposed convolution with ``weight`` (in, out / groups, z, y, x), plus ``bias`` (out,).

    ``padding`` trims the output; ONNX's ``output_padding`` is subtracted from its high side.
    """

    def window(self, axis: int) -> Window:
        length = extent(self.kernel[axis], self.dilation[axis])
        low, high = self.padding[0][axis], self.padding[1][axis]
        if self.stride[axis] == 1:  # an ordinary convolution with the kernel turned round
            return Window(length, low=length - 1 - low, high=length - 1 - high)
        return Window(length, up=self.stride[axis], low=low, high=high)

    @property
    def _kernels(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.groups, *self.kernel)

    def multiply_adds(self) -> Fraction:
        """Of an inner voxel, averaged over the stride's offsets."""
        taps = self.out_channels * self.in_channels // self.groups * volume(self.kernel)
        return Fraction(taps, volume(self.stride))
