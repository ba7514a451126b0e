"""Layers that only move values: padding, cropping, choosing channels, resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, cast, final

import numpy as np
from numpy.typing import NDArray

from znni_dask.kernels import resampling
from znni_dask.kernels.code import VECTOR_BYTES
from znni_dask.kernels.resampling_blocked import GATHER, INTERPOLATE, resampling_library
from znni_dask.kernels.team import Each, Team
from znni_dask.network.layers import Crop, DepthToSpace, Layer, Pad, Resize, Select
from znni_dask.primitives.base import Array, Form, Primitive, Problem, indices
from znni_dask.primitives.pointwise import copy_channels, crop

_INDEX_BYTES = 8
Places: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


@final
class Cropping(Primitive):
    """The input without its border."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Crop

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        copy_channels(out, crop(inputs[0], problem.offsets[0], out.shape[2:]), team)


@final
class Selecting(Primitive):
    """Some of the channels, in any order."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Select

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        chosen = cast("Select", problem.layer).indices
        source = crop(inputs[0], problem.offsets[0], out.shape[2:])

        def work(first: int, last: int) -> None:
            for item in range(first, last):
                batch, channel = divmod(item, len(chosen))
                out[batch, channel] = source[batch, chosen[channel]]

        team.share(work, out.shape[0] * len(chosen))


def _gather(
    x: Array, out: Array, index: list[NDArray[np.int64]], team: Team, value: float = 0.0
) -> None:
    """Take of ``x`` what ``index`` names for every output along each axis; ``value`` for -1."""
    if x.ndim == 5:

        def work(first: int, last: int) -> None:
            resampling.gather(x, out, *index, np.float32(value), first, last)

    else:
        gather, inside = resampling_library()[GATHER], np.flatnonzero(index[2] >= 0)
        left, right = (inside[0], inside[-1] + 1) if inside.size else (0, 0)
        given: list[NDArray[Any]] = [x, out, *index, np.full(1, value, np.float32)]
        numbers = *x.shape[2:5], *out.shape[2:5], int(left), int(right)

        def work(first: int, last: int) -> None:
            gather(*(array.ctypes.data for array in given), *numbers, first, last)

    team.share(work, out.shape[0] * out.shape[1] * out.shape[2])


def _index_bytes(problem: Problem) -> int:
    """Memory of the index of `_gather`, and of making it."""
    return 4 * _INDEX_BYTES * sum(problem.output[2:])


@final
class Padding(Primitive):
    """A constant, the edge or the mirrored input around the input; of a box, only where the box
    meets the edge of the whole."""

    name: ClassVar[str] = "gather"
    layer: ClassVar[type[Layer]] = Pad

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return _index_bytes(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        layer = cast("Pad", problem.layer)
        index = [padding_index(problem, axis) for axis in range(3)]
        _gather(inputs[0], out, index, team, layer.value)


@final
class NearestResizing(Primitive):
    """Every voxel repeated."""

    name: ClassVar[str] = "gather"
    layer: ClassVar[type[Layer]] = Resize

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def refusal(self, layer: Layer) -> str | None:
        if reason := super().refusal(layer):
            return reason
        if cast("Resize", layer).placing != "nearest":
            return f"repeating voxels does not interpolate ({layer.summary})"
        return None

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return _index_bytes(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _gather(inputs[0], out, [nearest_index(problem, axis) for axis in range(3)], team)


@final
class LinearResizing(Primitive):
    """Linear interpolation between neighbouring voxels, axis by axis."""

    name: ClassVar[str] = "linear"
    layer: ClassVar[type[Layer]] = Resize

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def refusal(self, layer: Layer) -> str | None:
        if reason := super().refusal(layer):
            return reason
        if cast("Resize", layer).placing == "nearest":
            return "interpolation does not repeat voxels (nearest)"
        return None

    def flops(self, problem: Problem) -> int:
        batch, channels, z, y, x = problem.output
        return batch * channels * z * y * (6 * problem.inputs[0][-1] + 2 * x)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        places = 8 * _INDEX_BYTES * sum(problem.output[2:])
        return places + threads * problem.inputs[0][-1] * VECTOR_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        axes = [linear_places(problem, axis) for axis in range(3)]
        x = inputs[0]
        if x.ndim > 5:
            self._interpolate_blocked(x, out, axes, team)
            return
        below, above, weight = (tuple(axis[i] for axis in axes) for i in range(3))

        def work(first: int, last: int) -> None:
            resampling.interpolate(x, out, below, above, weight, first, last)

        team.share(work, out.shape[0] * out.shape[1] * out.shape[2])

    @staticmethod
    def _interpolate_blocked(x: Array, out: Array, axes: list[Places], team: Team) -> None:
        interpolate = resampling_library()[INTERPOLATE]
        tables = [
            table
            for below, above, weight in axes
            for table in (np.stack([below, above], axis=1), weight)
        ]
        line_bytes = x.shape[4] * VECTOR_BYTES
        memory = team.scratch(team.threads * line_bytes).ctypes.data
        arrays, numbers = (x, out), (*x.shape[2:5], *out.shape[2:5])
        before, after = ([array.ctypes.data for array in some] for some in (arrays, tables))
        told = *before, Each(memory, line_bytes), *after, *numbers
        team.run(interpolate, told, out.shape[0] * out.shape[1] * out.shape[2])


@final
class ShufflingToSpace(Primitive):
    """Channels moved into space."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = DepthToSpace

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        offset = indices(*problem.offsets[0])
        factor = indices(*cast("DepthToSpace", problem.layer).factor)

        def work(first: int, last: int) -> None:
            resampling.depth_to_space(inputs[0], out, offset, factor, first, last)

        team.share(work, out.shape[0] * out.shape[1] * out.shape[2])


def padding_index(problem: Problem, axis: int) -> NDArray[np.int64]:
    """For every output of a padding the place in the input given; -1 for the constant."""
    layer = cast("Pad", problem.layer)
    n = problem.whole[axis]
    low = layer.padding[0][axis]
    place = problem.start[axis] + np.arange(problem.output[2 + axis]) - low
    given = problem.start[axis] - low - problem.offsets[0][axis]
    if layer.mode == "constant":
        index = place - given
        inside = (place >= 0) & (place < n) & (index >= 0)
        return np.where(inside & (index < problem.inputs[0][2 + axis]), index, -1)
    if layer.mode == "reflect":
        place = np.abs(place)
        place = np.where(place >= n, 2 * (n - 1) - place, place)
    return np.clip(np.clip(place, 0, n - 1) - given, 0, problem.inputs[0][2 + axis] - 1)


def nearest_index(problem: Problem, axis: int) -> NDArray[np.int64]:
    """For every output the place of the voxel that it repeats, in the input given."""
    places = np.arange(problem.output[2 + axis]) + problem.offsets[0][axis]
    return places // cast("Resize", problem.layer).factor[axis]


def linear_places(problem: Problem, axis: int) -> Places:
    """For every output the inputs given on both sides of it, and how far it is between."""
    layer = cast("Resize", problem.layer)
    factor, n = layer.factor[axis], problem.whole[axis]
    output = problem.start[axis] + np.arange(problem.output[2 + axis], dtype=np.float64)
    if factor == 1:
        place = output
    elif layer.placing == "half_pixel":
        place = (output + 0.5) / factor - 0.5
    elif layer.placing == "asymmetric":
        place = output / factor
    else:
        place = output * ((n - 1) / (n * factor - 1))
    place = np.clip(place, 0, n - 1)
    below = np.minimum(place.astype(np.int64), n - 1)
    window = layer.window(axis)
    given = window.offset(problem.start[axis], 0) - problem.offsets[0][axis]
    given //= window.up
    last = problem.inputs[0][2 + axis] - 1
    return (
        np.clip(below - given, 0, last),
        np.clip(below + 1 - given, 0, last),
        (place - below).astype(np.float32),
    )
