"""Layers that only move values: padding, cropping, choosing channels, resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import ceil_divide
from znni_dask.kernels.cuda.resampling import GATHER, INTERPOLATE, blocks_of
from znni_dask.network.layers import Crop, DepthToSpace, Layer, Pad, Resize, Select
from znni_dask.primitives.base import DevicePrimitive, Problem
from znni_dask.primitives.gpu.pieces import cropped
from znni_dask.primitives.gpu.rates import traffic
from znni_dask.primitives.rearranging import linear_places, nearest_index, padding_index
from znni_dask.primitives.work import Work

_PLACE_BYTES = 8


class _Moving(DevicePrimitive):
    """Abstract: reads and writes, and computes next to nothing."""

    def work(self, problem: Problem, threads: int) -> Work:
        return traffic(problem)


class _Copying(_Moving):
    """Abstract: copies parts of arrays."""

    name: ClassVar[str] = "copy"


@final
class GpuCropping(_Copying):
    """The input without its border."""

    layer: ClassVar[type[Layer]] = Crop

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        out[...] = cropped(inputs[0], problem.offsets[0], out.shape[2:])


@final
class GpuSelecting(_Copying):
    """Some of the channels, in any order."""

    layer: ClassVar[type[Layer]] = Select

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        layer = cast("Select", problem.layer)
        source = cropped(inputs[0], problem.offsets[0], out.shape[2:])
        if layer.contiguous:
            out[...] = source[:, layer.indices[0] : layer.indices[-1] + 1]
            return
        for number, channel in enumerate(layer.indices):
            out[:, number] = source[:, channel]


@final
class GpuShufflingToSpace(_Copying):
    """Channels moved into space."""

    layer: ClassVar[type[Layer]] = DepthToSpace

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        factor = cast("DepthToSpace", problem.layer).factor
        x, channels = inputs[0], out.shape[1]
        for number, moves in enumerate(np.ndindex(factor)):
            here, there = [], []
            for axis, (move, step) in enumerate(zip(moves, factor, strict=True)):
                offset = problem.offsets[0][axis]
                first = (move - offset) % step
                begin = (first + offset) // step
                here.append(slice(first, None, step))
                there.append(slice(begin, begin + ceil_divide(out.shape[2 + axis] - first, step)))
            source = x[(slice(None), slice(number, None, len(x[0]) // channels), *there)]
            out[(slice(None), slice(None), *here)] = source


class _Gathering(_Moving):
    """Abstract: which input an output looks at is a matter of each axis by itself."""

    name: ClassVar[str] = "gather"

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Memory of the indices, and of making them."""
        return 5 * _PLACE_BYTES * sum(problem.output[2:])


@final
class GpuPadding(_Gathering):
    """A constant, the edge or the mirrored input around the input; of a box, only where the box
    meets the edge of the whole."""

    layer: ClassVar[type[Layer]] = Pad

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        index = [padding_index(problem, axis) for axis in range(3)]
        _gather(team, inputs[0], out, index, cast("Pad", problem.layer).value)


@final
class GpuNearestResizing(_Gathering):
    """Every voxel repeated."""

    layer: ClassVar[type[Layer]] = Resize
    takes: ClassVar[str] = "what repeats voxels"

    def fits(self, layer: Layer) -> bool:
        return cast("Resize", layer).placing == "nearest"

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        _gather(team, inputs[0], out, [nearest_index(problem, axis) for axis in range(3)])


@final
class GpuLinearResizing(_Moving):
    """Linear interpolation between neighbouring voxels."""

    name: ClassVar[str] = "linear"
    layer: ClassVar[type[Layer]] = Resize
    takes: ClassVar[str] = "what interpolates"

    def fits(self, layer: Layer) -> bool:
        return cast("Resize", layer).placing != "nearest"

    def flops(self, problem: Problem) -> int:
        return 14 * super().flops(problem)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Memory of the places on both sides, and of making them."""
        return 12 * _PLACE_BYTES * sum(problem.output[2:])

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None:
        found = [linear_places(problem, axis) for axis in range(3)]
        tables = [np.concatenate([below, above]) for below, above, _ in found]
        tables += [weights for _, _, weights in found]
        there = map(team.xp.asarray, tables)
        blocks, pieces = blocks_of(out)
        sizes = *inputs[0].shape[2:], *out.shape[2:]
        team.launch(INTERPOLATE, blocks, inputs[0], out, *there, *sizes, pieces)


def _gather(device: Device, x: Any, out: Any, index: Sequence[Any], value: float = 0.0) -> None:
    """Take of ``x`` what ``index`` names for every output along each axis; ``value`` for -1."""
    blocks, pieces = blocks_of(out)
    there = map(device.xp.asarray, index)
    sizes = *x.shape[2:], *out.shape[2:]
    device.launch(GATHER, blocks, x, out, *there, *sizes, pieces, float(value))
