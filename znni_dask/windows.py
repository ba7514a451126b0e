"""Patchwise inference: windows of one size, laid over a volume on a grid.

A network that reduces over space has no answer for a whole volume, only one for every window it
is shown. The grid of windows is fixed by the volume alone, so the answer does not depend on
blocks, memory or workers; but it is approximate, in that neighbouring windows see different
surroundings. Where windows overlap their answers are averaged with weights.

Grid and weights are those of MONAI's sliding-window inference (the Gaussian ones go back to
Isensee et al. 2021, nnU-Net). A network that makes one vector of a window, a classifier, is
applied at every ``step`` voxels instead, like a sliding window of that stride.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import NetworkError, OptionError, VolumeError
from znni_dask.geometry import AXES, Box, Size, add, ceil_divide, text, tiles, triple
from znni_dask.network.field_of_view import Interval, sizes_of
from znni_dask.network.network import Network
from znni_dask.patches import Fragmented, Layout, Patch, check_boundary

WEIGHTS = ("constant", "gaussian")
_SIGMA = 0.125  # of the Gaussian weights, in window lengths
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Patchwise:
    """How windows are laid over a volume.

    ``window`` is their size (z, y, x), ``overlap`` the share of a window that its neighbour
    covers too, ``weights`` one of `WEIGHTS`. ``step``, of a classifier, is the distance of
    windows in voxels; by default that which ``overlap`` gives.
    """

    window: Size
    overlap: float = 0.5
    weights: str = "constant"
    step: Size | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise OptionError(
                f"weights {self.weights!r} are not known: choose {' or '.join(WEIGHTS)}"
            )
        if not 0 <= self.overlap < 1:
            raise OptionError(f"overlap {self.overlap:g}: a share from 0 up to, not with, 1")

    @property
    def interval(self) -> Size:
        """Distance of neighbouring windows."""
        if self.step is not None:
            return self.step
        return triple(max(1, int(w * (1 - self.overlap))) for w in self.window)


@dataclass(frozen=True, eq=False)
class WholeWindow:
    """The layout of a network applied once to an array of ``size``, everything in one patch.

    Raises `NetworkError` where the network cannot take arrays of that size.
    """

    network: Network
    size: Size

    def __post_init__(self) -> None:
        _ = self.sizes

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """Size of every layer's output."""
        found = [sizes_of(self.network, axis, self.size[axis]) for axis in range(3)]
        axes = [axis for axis in found if axis is not None]
        if len(axes) < 3:
            bad = next(i for i, axis in enumerate(found) if axis is None)
            raise NetworkError(
                f"the network cannot be applied to windows of {text(self.size)}: {self.size[bad]} "
                f"voxels along {AXES[bad]} do not pass through it{self._hint(bad)}"
            )
        return {name: triple(axis[name] for axis in axes) for name in axes[0]}

    def _hint(self, axis: int) -> str:
        near = [
            n
            for n in range(max(self.size[axis] - 64, 1), self.size[axis] + 65)
            if sizes_of(self.network, axis, n)
        ]
        nearest = sorted(sorted(near, key=lambda n: abs(n - self.size[axis]))[:3])
        return f" (the nearest that do: {', '.join(map(str, nearest))})" if near else ""

    @property
    def output_size(self) -> Size:
        """Size of the network's output."""
        return self.sizes[self.network.output]

    # what `schedule.Schedules` asks of a layout

    @property
    def strided(self) -> frozenset[str]:
        """No layer is evaluated at other offsets than its own."""
        return frozenset()

    @property
    def fragments(self) -> Size:
        """The output is in one piece."""
        return (1, 1, 1)

    def patch(self, output: Box) -> Patch:
        """The one patch there is."""
        return self.patch_with(output, (frozenset(),) * 3)

    def patch_with(self, output: Box, fragmented: Fragmented) -> Patch:
        """The one patch there is."""
        boxes = {name: Box((0, 0, 0), size) for name, size in self.sizes.items()}
        return Patch(output, boxes[self.network.input.name], boxes, (1, 1, 1))

    def stretch(self, axis: int, span: Interval, fragmented: frozenset[str]) -> dict[str, Interval]:
        """Of every layer all there is."""
        return {name: (0, size[axis]) for name, size in self.sizes.items()}

    def whole(self, name: str, boxes: Mapping[str, Box]) -> Size:
        """Size of a layer's whole output."""
        return self.sizes[name]


@dataclass(frozen=True, eq=False)
class WindowGrid:
    """A network applied to windows all over a volume of ``size``, which is extended by
    ``boundary`` where it is smaller than a window (of a classifier: where windows reach beyond).
    """

    network: Network
    size: Size
    boundary: str
    how: Patchwise

    def __post_init__(self) -> None:
        check_boundary(self.boundary)
        if min(self.size) < 1:
            raise VolumeError(f"the volume is empty: its size is {self.size}")
        if not self.classifies and self.layout.output_size != self.window:
            raise NetworkError(
                f"of windows of {text(self.window)} the network makes "
                f"{text(self.layout.output_size)}: patchwise inference is for networks that keep "
                "the size of a window, or make one vector of it"
            )
        if self.how.step is not None and not self.classifies:
            raise OptionError(
                "a step is for networks that make one vector of a window; this one keeps the "
                "window's size: give an overlap"
            )
        thin = [i for i in range(3) if self.size[i] < self.window[i]]
        if self.boundary == "valid" and thin:
            raise VolumeError(
                f'boundary="valid" needs at least {self.window[thin[0]]} voxels along '
                f"{AXES[thin[0]]}, the volume has {self.size[thin[0]]}: take another boundary or "
                "a smaller window"
            )

    @cached_property
    def layout(self) -> WholeWindow:
        """The network on one window."""
        return WholeWindow(self.network, self.window)

    @property
    def classifies(self) -> bool:
        """Whether the network makes one vector of a window."""
        return self.layout.output_size == (1, 1, 1) and self.window != (1, 1, 1)

    @property
    def window(self) -> Size:
        """Size of a window."""
        return self.how.window

    @property
    def output_size(self) -> Size:
        """Size of the answer, (z, y, x)."""
        if not self.classifies:
            return self.size
        if self.boundary == "valid":
            return triple(
                (n - w) // s + 1
                for n, w, s in zip(self.size, self.window, self.how.interval, strict=True)
            )
        return triple(ceil_divide(n, s) for n, s in zip(self.size, self.how.interval, strict=True))

    @property
    def output_stride(self) -> tuple[Fraction, Fraction, Fraction]:
        """Voxel spacing of the answer."""
        z, y, x = (Fraction(s) for s in (self.how.interval if self.classifies else (1, 1, 1)))
        return z, y, x

    @property
    def translation(self) -> tuple[Fraction, Fraction, Fraction]:
        """Centre of output voxel 0 in voxels of the volume."""
        moved = self.classifies and self.boundary == "valid"
        z, y, x = (Fraction((w - 1) // 2 if moved else 0) for w in self.window)
        return z, y, x

    def blocks(self, block: Size, over: Box | None = None) -> Iterator[Box]:
        """All blocks, covering the answer exactly once; or those that touch the box ``over``."""
        return tiles(self.output_size, block, over)

    def windows_of(self, block: Box) -> Iterator[tuple[Box, Box]]:
        """The windows behind a block of the answer, in the grid's order, in voxels of the volume,
        beyond which they may reach; and the part of the block that each makes, in voxels of the
        block."""
        chosen = [self._starts_of(axis, block.start[axis], block.stop[axis]) for axis in range(3)]
        places = np.ndindex(*block.size)
        for corner in product(*chosen):
            window = Box(triple(corner), add(triple(corner), self.window))
            if self.classifies:
                place = triple(next(places))
                yield window, Box(place, add(place, (1, 1, 1)))
            else:
                shared = window.shared(block)
                assert shared is not None  # only windows that touch a block are behind it
                yield window, shared.seen_from(block.start)

    def count(self, axis: int, start: int, stop: int) -> int:
        """How many windows along an axis lie behind outputs ``[start, stop)``."""
        return len(self._starts_of(axis, start, stop))

    def reach(self, axis: int, start: int, stop: int) -> Interval:
        """The stretch of the volume behind outputs ``[start, stop)``."""
        starts = self._starts_of(axis, start, stop)
        return starts[0], starts[-1] + self.window[axis]

    def region(self, block: Box) -> Box:
        """The box of the volume behind a block of the answer."""
        spans = [self.reach(axis, block.start[axis], block.stop[axis]) for axis in range(3)]
        return Box(triple(s[0] for s in spans), triple(s[1] for s in spans))

    def _starts_of(self, axis: int, start: int, stop: int) -> list[int]:
        w, s = self.window[axis], self.how.interval[axis]
        if self.classifies:
            low = 0 if self.boundary == "valid" else (w - 1) // 2
            return [q * s - low for q in range(start, stop)]
        return [a for a in self._starts[axis] if a < stop and a + w > start]

    @cached_property
    def _starts(self) -> tuple[list[int], ...]:
        """Where windows begin along every axis; the last ends where the volume does."""
        return tuple(
            _grid(n, w, s)
            for n, w, s in zip(self.size, self.window, self.how.interval, strict=True)
        )

    @cached_property
    def importance(self) -> NDArray[np.float32]:
        """The weight of every voxel of a window."""
        if self.how.weights == "constant":
            return np.ones(self.window, np.float32)
        found = np.ones((), np.float32)
        for n in self.window:
            distance = np.arange(n) - (n - 1) / 2
            bell = np.exp(-(distance**2) / (2 * (_SIGMA * n) ** 2)).astype(np.float32)
            found = found[..., None] * bell
        return np.maximum(found, max(float(found.min()), _LEAST_WEIGHT), out=found)


Laid = Layout | WindowGrid  # how a network may lie over a volume


def _grid(n: int, window: int, interval: int) -> list[int]:
    """Starts of windows that cover ``n`` voxels; of one window where the volume is smaller, which
    then lies around its middle.

    >>> _grid(10, 4, 3)
    [0, 3, 6]
    >>> _grid(3, 6, 3)
    [-1]
    """
    if n <= window:
        return [-((window - n) // 2)]
    return [min(i * interval, n - window) for i in range(ceil_divide(n - window, interval) + 1)]
