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


@dataclass(frozen=True)
class _Pool(Layer):
    """What both have: a window, of which with ``ceil`` a last one that begins inside the input
    (or its low padding) counts although it reaches beyond, as PyTorch's ``ceil_mode`` has it.

    ``same``: the padding is that of sizes with an output for every ``stride`` voxels; others are
    not taken.
    """

    kernel: Size
    stride: Size
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    ceil: bool = False
    same: bool = False

    def channels(self, inputs: Sequence[int]) -> int:
        check_window(self, self.kernel, self.stride, self.dilation, self.padding)
        for axis in range(3):
            if max(self.padding[0][axis], self.padding[1][axis]) >= self.window(axis).extent:
                raise NetworkError(
                    f"{self.kind} ({self.summary}): a window lies in the padding alone"
                )
        return only(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(
            extent(self.kernel[axis], self.dilation[axis]),
            stride=self.stride[axis],
            low=self.padding[0][axis],
            high=self.padding[1][axis],
            ceil=self.ceil and self.stride[axis] > 1,
            same=self.same and self.stride[axis] > 1,
        )

    @property
    def summary(self) -> str:
        ceil = "rounded up" if self.ceil else ""
        return window_text(self.kernel, self.stride, self.dilation, self.padding, ceil)


@final
@dataclass(frozen=True)
class MaxPool(_Pool):
    """Largest value of each window; padding never wins."""


@final
@dataclass(frozen=True)
class AveragePool(_Pool):
    """Mean of each window: over the voxels that exist, or with ``count_padding`` over those of
    the padding too, which are zero; what reaches beyond by ``ceil`` never counts."""

    count_padding: bool = False
