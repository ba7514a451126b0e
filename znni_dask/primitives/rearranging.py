"""Layers that only move values: concatenation, padding, cropping, slicing, nearest resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast, final

from znni_dask.kernels import direct
from znni_dask.kernels.team import Team
from znni_dask.network.layers import ChannelSlice, Concat, Crop, Layer, Pad, Resize
from znni_dask.primitives.base import Array, Primitive, Problem, indices
from znni_dask.primitives.pointwise import crop


def _copy_channels(target: Array, source: Array, team: Team) -> None:
    """Copy (batch, channel, z, y, x), shared out by batch and channel."""
    channels = target.shape[1]

    def work(first: int, last: int) -> None:
        for item in range(first, last):
            at = divmod(item, channels)
            target[at] = source[at]

    team.share(work, target.shape[0] * channels)


@final
class Concatenation(Primitive):
    """Channels behind one another."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Concat

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        first = 0
        for x, offset in zip(inputs, problem.offsets, strict=True):
            last = first + x.shape[1]
            _copy_channels(out[:, first:last], crop(x, offset, out.shape[2:]), team)
            first = last


@final
class Cropping(Primitive):
    """The input without its border."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Crop

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _copy_channels(out, crop(inputs[0], problem.offsets[0], out.shape[2:]), team)


@final
class ChannelSlicing(Primitive):
    """Some of the channels."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = ChannelSlice

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        part = cast("ChannelSlice", problem.layer)
        source = inputs[0][:, part.start : part.stop]
        _copy_channels(out, crop(source, problem.offsets[0], out.shape[2:]), team)


@final
class Padding(Primitive):
    """A constant around the input; of a box, only where the box meets the array's edge."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Pad

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        out.fill(cast("Pad", problem.layer).value)
        here: list[slice] = []
        there: list[slice] = []
        for offset, n, wide in zip(
            problem.offsets[0], inputs[0].shape[2:], out.shape[2:], strict=True
        ):
            first, last = max(0, -offset), min(wide, n - offset)
            here.append(slice(first, last))
            there.append(slice(first + offset, last + offset))
        every = (slice(None), slice(None))
        _copy_channels(out[(*every, *here)], inputs[0][(*every, *there)], team)


@final
class NearestResizing(Primitive):
    """Every voxel repeated."""

    name: ClassVar[str] = "nearest"
    layer: ClassVar[type[Layer]] = Resize

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        offset = indices(*problem.offsets[0])
        factor = indices(*cast("Resize", problem.layer).factor)

        def work(first: int, last: int) -> None:
            direct.repeat(inputs[0], out, offset, factor, first, last)

        team.share(work, out.shape[0] * out.shape[1] * out.shape[2])
