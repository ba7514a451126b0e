"""Layers that move values about: padding, cropping, choosing channels, resizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, text, volume
from znni_dask.network.layers.base import Layer, Padding, only, padding_text
from znni_dask.network.window import SAME, Window

PadMode = Literal["constant", "edge", "reflect"]
Placing = Literal["nearest", "half_pixel", "asymmetric", "align_corners"]


@final
@dataclass(frozen=True)
class Pad(Layer):
    """``value`` put around the input; or its edge; or the input mirrored, the edge not repeated."""

    padding: Padding
    value: float = 0.0
    mode: PadMode = "constant"

    def channels(self, inputs: Sequence[int]) -> int:
        if self.mode not in get_args(PadMode):
            raise NetworkError(f"padding by {self.mode!r} is not known")
        if min(*self.padding[0], *self.padding[1]) < 0:
            raise NetworkError(f"Pad ({self.summary}): to take away is to Crop")
        return only(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(
            low=self.padding[0][axis],
            high=self.padding[1][axis],
            reflects=self.mode == "reflect",
        )

    @property
    def summary(self) -> str:
        how = f"with {self.value:g}" if self.mode == "constant" else f"by {self.mode}"
        return f"{padding_text(self.padding)} {how}"


@final
@dataclass(frozen=True)
class Crop(Layer):
    """The input without ``low`` first and ``high`` last voxels per axis."""

    low: Size
    high: Size

    def channels(self, inputs: Sequence[int]) -> int:
        if min(*self.low, *self.high) < 0:
            raise NetworkError(f"Crop ({self.summary}): to add is to Pad")
        return only(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(low=-self.low[axis], high=-self.high[axis])

    @property
    def summary(self) -> str:
        return padding_text((self.low, self.high))


@final
@dataclass(frozen=True)
class Select(Layer):
    """The input's channels ``indices``, in that order; some may be left out or repeated."""

    indices: tuple[int, ...]

    def channels(self, inputs: Sequence[int]) -> int:
        found = only(self, inputs)
        if not self.indices or not all(0 <= i < found for i in self.indices):
            raise NetworkError(f"the channels {self.summary or 'none'} chosen out of {found}")
        return len(self.indices)

    @property
    def contiguous(self) -> bool:
        """Whether the channels are a slice."""
        first = self.indices[0]
        return self.indices == tuple(range(first, first + len(self.indices)))

    @property
    def summary(self) -> str:
        if self.indices and self.contiguous:
            return f"{self.indices[0]}:{self.indices[-1] + 1}"
        shown = ", ".join(map(str, self.indices[:6]))
        return shown + (" …" if len(self.indices) > 6 else "")


@final
@dataclass(frozen=True)
class DepthToSpace(Layer):
    """Up-sampling by channels: output channel c at voxel (z·fz + i, y·fy + j, x·fx + k) is input
    channel ((c·fz + i)·fy + j)·fx + k at (z, y, x). Also known as pixel shuffle."""

    factor: Size

    def channels(self, inputs: Sequence[int]) -> int:
        found, of = only(self, inputs), volume(self.factor)
        if min(self.factor) < 1 or found % of:
            raise NetworkError(f"DepthToSpace by {text(self.factor)} of {found} channels")
        return found // of

    def window(self, axis: int) -> Window:
        return _repeating(self.factor[axis])

    @property
    def summary(self) -> str:
        return text(self.factor)


@final
@dataclass(frozen=True)
class Resize(Layer):
    """Up-sampling by whole factors.

    ``placing`` "nearest" repeats every voxel. The others interpolate linearly: output q lies, in
    voxels of the input, at (q + ½) / factor - ½ ("half_pixel"), at q / factor ("asymmetric"), or
    at q · (n - 1) / (n · factor - 1) of an input of length n ("align_corners"); places beyond the
    outermost voxels are theirs.
    """

    factor: Size
    placing: Placing = "nearest"

    def channels(self, inputs: Sequence[int]) -> int:
        if min(self.factor) < 1:
            raise NetworkError(f"Resize by {text(self.factor)}: factors must be positive")
        if self.placing not in get_args(Placing):
            raise NetworkError(f"the placing {self.placing!r} is not known")
        return only(self, inputs)

    def window(self, axis: int) -> Window:
        factor = self.factor[axis]
        if factor == 1 or self.placing == "nearest":
            return _repeating(factor)
        match self.placing:
            case "half_pixel":
                trim = factor // 2
                return Window(2 * factor - factor % 2, up=factor, low=trim, high=trim)
            case "asymmetric":
                return Window(2 * factor - 1, up=factor, low=factor - 1)
        # With corners aligned places drift by less than a voxel over the whole axis, so what is
        # behind an output lies within one voxel of where "asymmetric" has it.
        return Window(3 * factor - 1, up=factor, low=factor, high=factor - 1)

    @property
    def summary(self) -> str:
        how = self.placing if self.placing == "nearest" else f"linear, {self.placing}"
        return f"{how} {text(self.factor)}"


def _repeating(factor: int) -> Window:
    return Window(factor, up=factor) if factor > 1 else SAME
