"""Volume ↔ blocks ↔ patches: which outputs are made where, from which part of the volume.

A `Layout` says how a whole volume is extended and what the whole answer looks like. A *block* is
what one writer writes: whole output chunks. A *patch* is what is computed at once: a part of a
block. `Layout.patch` gives for any output box the box of every layer behind it, so that patches
of any size and place give the same answer as the whole volume at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, floor, gcd
from typing import TypeAlias

from znni_dask.errors import OptionError, VolumeError
from znni_dask.geometry import (
    AXES,
    Box,
    Size,
    ceil_divide,
    hull,
    round_up,
    subtract,
    tiles,
    triple,
    turned,
)
from znni_dask.network.field_of_view import (
    Extension,
    Interval,
    NetworkGeometry,
    demand,
    geometry,
)
from znni_dask.network.network import Network
from znni_dask.network.turned import turned as turned_network

Fragmented: TypeAlias = tuple[frozenset[str], frozenset[str], frozenset[str]]
"""Along every axis the layers that are evaluated at all offsets of their stride."""

BOUNDARIES = ("reflect", "nearest", "constant", "valid")


@dataclass(frozen=True)
class Patch:
    """One output box of a run and what lies behind it.

    ``output`` is in voxels of the answer. ``boxes`` are the layers' own boxes, each in the grid
    of its layer; ``input`` is the box of the volume (it may reach beyond the volume, which is
    then extended). With ``fragments`` (z, y, x) every layer of a dense network counts from the
    patch's own corner, the network's output is one fragment of the patch, and ``output.size``
    is rounded up to whole fragments.
    """

    output: Box
    input: Box
    boxes: dict[str, Box]
    fragments: Size


@dataclass(frozen=True, eq=False)
class Layout:
    """A network applied to a volume of ``size`` voxels (z, y, x), extended by ``boundary``.

    With ``halo`` (z, y, x) patches see no more than so many voxels beyond themselves, rounded up
    to the network's alignment: what lies further counts as padding, and the answer becomes
    approximate.
    """

    network: Network
    size: Size
    boundary: str
    halo: Size | None = None

    def __post_init__(self) -> None:
        check_boundary(self.boundary)
        if min(self.size) < 1:
            raise VolumeError(f"the volume is empty: its size is {self.size}")
        _ = self.extensions
        if self.halo is not None:
            self._check_halo(self.halo)

    def _check_halo(self, halo: Size) -> None:
        if min(halo) < 0:
            raise OptionError(f"halo {halo} must not be negative")
        if any(axis.shrink for axis in self.geometry.axes):
            raise OptionError(
                "a halo of one's own is for networks that pad and keep the size of the volume, so "
                "that patches can end anywhere; this one needs its whole field of view"
            )

    @property
    def geometry(self) -> NetworkGeometry:
        """The geometry of the network."""
        return geometry(self.network)

    @cached_property
    def extensions(self) -> tuple[Extension, Extension, Extension]:
        """How each axis is extended; raises `VolumeError` where the volume is too thin."""
        found = []
        for name, axis, n in zip(AXES, self.geometry.axes, self.size, strict=True):
            try:
                found.append(axis.extension(n, self.boundary))
            except VolumeError as error:
                raise VolumeError(f"axis {name}: {error}") from None
        z, y, x = found
        return z, y, x

    @property
    def output_size(self) -> Size:
        """Size of the answer, (z, y, x)."""
        return triple(e.outputs for e in self.extensions)

    def turned(self, axis: int) -> Layout:
        """The same where axes 0 and ``axis`` are swapped."""
        if axis == 0:
            return self
        halo = self.halo and turned(self.halo, axis)
        network = turned_network(self.network, axis)
        return Layout(network, turned(self.size, axis), self.boundary, halo)

    @property
    def output_stride(self) -> tuple[Fraction, Fraction, Fraction]:
        """Voxel spacing of the answer."""
        return self.geometry.output_stride

    def region(self, block: Box) -> Box:
        """The box of the volume behind a block of the answer."""
        return self.patch(block).input

    def reach(self, axis: int, start: int, stop: int) -> Interval:
        """The stretch of the volume behind outputs ``[start, stop)``: one axis of `region`."""
        stretch = self.stretch(axis, (start, stop), self.strided)[self.network.input.name]
        corner = start if self.geometry.dense else 0
        first = corner - self.extensions[axis].low
        return stretch[0] + first, stretch[1] + first

    @property
    def translation(self) -> tuple[Fraction, Fraction, Fraction]:
        """Centre of output voxel 0 in voxels of the volume."""
        z, y, x = (
            axis.origin - extension.low + axis.output_stride * extension.first
            if axis.output_stride != 1
            else Fraction(axis.shift - extension.low + extension.first)
            for axis, extension in zip(self.geometry.axes, self.extensions, strict=True)
        )
        return z, y, x

    @cached_property
    def strided(self) -> frozenset[str]:
        """Layers of a dense network that stride: each makes fragments or runs per offset."""
        if not self.geometry.dense:
            return frozenset()
        return frozenset(
            node.name
            for node in self.network
            if any(node.layer.window(axis).stride > 1 for axis in range(3))
        )

    @cached_property
    def periods(self) -> Size:
        """The network's alignment in voxels of the answer: patches that lie so far apart are alike,
        but for the ends of the volume."""
        return triple(
            max(1, int(alignment / stride))
            for alignment, stride in zip(self.geometry.alignment, self.output_stride, strict=True)
        )

    @cached_property
    def reaches(self) -> Size:
        """How far from the ends of the answer, in its voxels, patches may feel them."""
        return triple(
            ceil(2 * (axis.field_of_view + axis.alignment + halo) / axis.output_stride)
            for axis, halo in zip(self.geometry.axes, self.halo or (0, 0, 0), strict=True)
        )

    @property
    def fragments(self) -> Size:
        """Fragments per axis that a dense network's output falls into; 1 for all others."""
        if not self.geometry.dense:
            return (1, 1, 1)
        return triple(int(s) for s in self.network.spacing[self.network.output])

    def blocks(self, block: Size, over: Box | None = None) -> Iterator[Box]:
        """All blocks, covering the answer exactly once; or those that touch the box ``over``."""
        return tiles(self.output_size, block, over)

    def patch(self, output: Box) -> Patch:
        """The patch that makes ``output``, every strided layer of a dense network fragmented."""
        return self.patch_with(output, (self.strided,) * 3)

    def patch_with(self, output: Box, fragmented: Fragmented) -> Patch:
        """The patch that makes ``output`` (for a dense network: one fragment of it for every
        offset that the layers not ``fragmented`` along an axis leave open)."""
        stretches = [
            self.stretch(axis, (output.start[axis], output.stop[axis]), fragmented[axis])
            for axis in range(3)
        ]
        boxes = {
            name: Box(
                triple(stretch[name][0] for stretch in stretches),
                triple(stretch[name][1] for stretch in stretches),
            )
            for name in stretches[0]
        }
        behind = boxes[self.network.input.name]
        corner = output.start if self.geometry.dense else (0, 0, 0)
        low = triple(e.low for e in self.extensions)
        return Patch(output, behind.shifted(subtract(corner, low)), boxes, self.fragments)

    def stretch(self, axis: int, span: Interval, fragmented: frozenset[str]) -> dict[str, Interval]:
        """One axis of `patch_with`: for outputs ``span`` the stretch of every layer, of a dense
        network counted from the patch's corner."""
        begin, end = span
        if self.geometry.dense:
            interval = (0, ceil_divide(end - begin, self.fragments[axis]))
        else:
            first = self.extensions[axis].first
            interval = (begin + first, end + first)
        key = (axis, interval, fragmented)
        if key not in self._demands:
            self._demands[key] = demand(
                self.network,
                axis,
                interval,
                bounds=self._seen(axis, interval),
                fragmented=fragmented,
            )
        return self._demands[key]

    def whole(self, name: str, boxes: Mapping[str, Box]) -> Size:
        """Size of a layer's whole output; of a dense network, which has no edges, of its box."""
        if self.geometry.dense:
            return boxes[name].size
        return triple(bounds[name][1] for bounds in self.bounds if bounds)

    def _seen(self, axis: int, outputs: Interval) -> dict[str, Interval] | None:
        """What a patch may see of every layer: all there is, or with a halo of its own what the
        network makes of the patch and that halo."""
        bounds = self.bounds[axis]
        if self.halo is None or bounds is None:
            return bounds
        geometry, size = self.geometry.axes[axis], self.extensions[axis].size
        step = geometry.alignment
        start = floor(outputs[0] * geometry.output_stride)
        stop = ceil(outputs[1] * geometry.output_stride)
        low = max((start - self.halo[axis]) // step * step, 0)
        high = min(round_up(stop + self.halo[axis], step), size)
        while (sizes := geometry.sizes(high - low)) is None:  # a size that the graph maps exactly
            if high == size:
                return bounds
            high += 1
        spacing = self.network.spacing
        return {
            name: (int(low / spacing[name][axis]), int(low / spacing[name][axis]) + n)
            for name, n in sizes.items()
        }

    @cached_property
    def bounds(self) -> list[dict[str, Interval] | None]:
        """Per axis what there is of every layer; None for a dense network, which slides."""
        if self.geometry.dense:
            return [None, None, None]
        found: list[dict[str, Interval] | None] = []
        for axis, extension in zip(self.geometry.axes, self.extensions, strict=True):
            sizes = axis.sizes(extension.size)
            assert sizes is not None  # an extension is a size that the graph maps
            found.append({name: (0, n) for name, n in sizes.items()})
        return found

    @cached_property
    def _demands(self) -> dict[tuple[int, Interval, frozenset[str]], dict[str, Interval]]:
        return {}


def check_boundary(boundary: str) -> None:
    """Raise `OptionError` where there is no such boundary."""
    if boundary not in BOUNDARIES:
        raise OptionError(f"boundary {boundary!r} is not known: choose {', '.join(BOUNDARIES)}")


def source_index(start: int, stop: int, n: int, boundary: str) -> list[int]:
    """For every place in ``[start, stop)`` the voxel of a volume of length ``n`` that stands
    there; -1 for the constant.

    ``reflect`` does not repeat the edge (numpy's meaning) and goes to and fro as often as it
    takes. What ``valid`` reads beyond the volume is cropped away afterwards, so anything serves.

    >>> source_index(-3, 5, 4, "reflect")
    [3, 2, 1, 0, 1, 2, 3, 2]
    """
    if boundary == "constant":
        return [i if 0 <= i < n else -1 for i in range(start, stop)]
    if boundary == "reflect":
        period = max(2 * (n - 1), 1)
        return [min(i % period, period - i % period) if n > 1 else 0 for i in range(start, stop)]
    return [min(max(i, 0), n - 1) for i in range(start, stop)]


def source_box(box: Box, size: Size, boundary: str) -> Box | None:
    """The voxels of a volume of ``size`` that stand in ``box``, which may reach beyond it; None
    where all of that is the constant.

    >>> print(source_box(Box((-3, 0, 2), (1, 4, 9)), (5, 5, 5), "reflect"))
    0:4, 0:4, 0:5
    """
    spans = []
    for start, stop, n in zip(box.start, box.stop, size, strict=True):
        inside = [i for i in source_index(start, stop, n, boundary) if i >= 0]
        if not inside:
            return None
        spans.append((min(inside), max(inside) + 1))
    return Box(triple(a for a, _ in spans), triple(b for _, b in spans))


def patches_of(block: Box, patch: Size) -> Iterator[Box]:
    """The patches of one block, covering it exactly once."""
    for box in tiles(block.size, patch):
        yield box.shifted(block.start)


def region_of(layout: Layout, block: Box, patch: Size) -> Box:
    """The box of the volume behind the patches of a block. It may be larger than that behind the
    block as one patch: each patch of a dense network is computed in whole fragments."""
    along = [
        [(start, min(start + p, last)) for start in range(first, last, p)]
        for first, last, p in zip(block.start, block.stop, patch, strict=True)
    ]
    diagonal = [
        [spans[min(number, len(spans) - 1)] for spans in along]
        for number in range(max(len(spans) for spans in along))
    ]
    return hull(
        layout.region(Box(triple(a for a, _ in ends), triple(b for _, b in ends)))
        for ends in diagonal
    )


def spans(layout: Layout, block: Size, patch: Size) -> list[list[Interval]]:
    """Along every axis the extents (start, stop) of the patches of a run; of blocks that lie
    alike, far from both ends of the answer, a few stand for all."""
    found: list[list[Interval]] = []
    for axis, n in enumerate(layout.output_size):
        period = layout.periods[axis]
        few = ceil_divide(layout.reaches[axis], block[axis]) + period // gcd(period, block[axis])
        starts = range(0, n, block[axis])
        chosen = sorted({*starts[: few + 1], *starts[-few - 1 :]})
        found.append(
            [
                (start, min(start + patch[axis], first + block[axis], n))
                for first in chosen
                for start in range(first, min(first + block[axis], n), patch[axis])
            ]
        )
    return found


def largest_box(layout: Layout, block: Size) -> Box:
    """A block in the middle of the answer, clipped to it."""
    size = triple(min(b, n) for b, n in zip(block, layout.output_size, strict=True))
    start = triple(
        min(n // 2 // s * s, n - s) for n, s in zip(layout.output_size, size, strict=True)
    )
    return Box(start, triple(a + s for a, s in zip(start, size, strict=True)))
