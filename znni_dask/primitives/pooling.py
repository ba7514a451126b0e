"""Pooling, plain and as fragments: the largest or the mean value of each window.

Max-pooling fragments (MPF; Zlateski et al. 2016, section V) pool at every offset of the stride;
the fragments join the batch, offset by offset, and are interleaved at the end of the network.
Nothing is computed twice. Plain pooling makes one offset; a dense network that uses it runs once
for every offset. Means go into fragments the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import AXES, Size, add, ceil_divide, triple, volume
from znni_dask.kernels import pooling
from znni_dask.kernels.code import VECTOR_BYTES
from znni_dask.kernels.pooling_blocked import POOL, Rows, pooling_library
from znni_dask.kernels.team import Each, Team
from znni_dask.network.layers import AveragePool, Layer, MaxPool
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem, indices
from znni_dask.primitives.planes import OfPlanes, Planes
from znni_dask.primitives.work import LOOPS, MEMORY, Work

_STRIP_BYTES = 1 << 19  # of the rows that one strip of outputs reads again in the next plane
_LEAST_STRIP = 8  # rows: those of windows that reach beyond a strip are combined twice
_AHEAD_BYTES = 8192  # which is how far ahead rows are fetched at least
_FEW = 3  # channels
_NONE = np.ones(1, np.float32)
_PADDED = "fragments cannot pad: a padded pooling keeps its own grid"


def pooling_flops(problem: Problem) -> int:
    """Operations: one for every tap."""
    pool = cast("MaxPool | AveragePool", problem.layer)
    return prod(problem.output) * volume(pool.kernel)


def _pool(problem: Problem, x: Array, out: Array, offset: Size, team: Team) -> None:
    """Pool plain ``x`` from ``offset`` on."""
    layer = cast("MaxPool | AveragePool", problem.layer)
    taps = [indices(*v) for v in (offset, layer.kernel, layer.stride, layer.dilation)]
    mean = isinstance(layer, AveragePool)
    shares = [_shares(problem, axis) for axis in range(3)] if mean else []
    pool = pooling.average_pool if mean else pooling.max_pool

    def work(first: int, last: int) -> None:
        pool(x, out, *taps, *shares, first, last)

    team.share(work, out.shape[0] * out.shape[1] * out.shape[2])


def _pool_blocked(problem: Problem, x: Planes, out: Planes, fragments: Size, team: Team) -> None:
    """Pool blocks of channels, into so many fragments along each axis."""
    rows = _rows(problem, x, out, fragments)
    mean = isinstance(problem.layer, AveragePool)
    z, y, shares_x = [_shares(problem, axis) if mean else _NONE for axis in range(3)]
    shares = np.multiply.outer(z, y)
    steps = shares.strides if mean else (0, 0)
    planes, lines, taps_z, taps_y, taps_x = _tables(problem, fragments, rows, steps)
    read, made = x.addresses[:, taps_z], _made(out, fragments)
    first, first_made = x.addresses[0, 0], out.addresses[0, 0]
    tables = indices(*rows), planes, lines, read - first, taps_y, taps_x, made - first_made
    given = [np.ascontiguousarray(table, np.int64) for table in tables]
    own_bytes = _own_bytes(problem, fragments)
    memory = team.scratch(team.threads * own_bytes).ctypes.data
    told: list[int | Each] = [int(first), int(first_made)]
    told += [array.ctypes.data for array in (*given, shares, shares_x)]
    items = prod(x.shape[:2]) * rows.planes * ceil_divide(rows.rows, rows.strip)
    team.run(pooling_library(mean)[POOL], [*told, Each(memory, own_bytes)], items)


def _rows(problem: Problem, x: Planes, made: Planes, fragments: Size) -> Rows[int]:
    """The numbers of a problem in blocks of channels."""
    layer = cast("MaxPool | AveragePool", problem.layer)
    size, out = triple(problem.inputs[0][2:]), triple(problem.output[2:])
    row_bytes = size[2] * VECTOR_BYTES
    offset, line = problem.offsets[0][2], _line(problem, fragments)
    left = min(line, max(0, -offset))
    parts = volume(fragments)
    return Rows(
        planes=out[0] * fragments[0],
        rows=out[1] * fragments[1],
        strip=max(_LEAST_STRIP, _STRIP_BYTES // (row_bytes * layer.kernel[0])),
        kept=layer.window(1).extent,
        blocks=x.shape[1],
        block_bytes=x.step_bytes,
        out_block_bytes=made.step_bytes,
        row_bytes=row_bytes,
        taps_z=layer.kernel[0],
        taps_y=layer.kernel[1],
        taps_x=layer.kernel[2],
        line=line,
        left=left,
        right=min(line, max(left, size[2] - offset)),
        begin=offset + left,
        width=out[2],
        out_step=layer.stride[2],
        fragments=fragments[2],
        parts=fragments[1] * fragments[2],
        fetched_bytes=row_bytes if parts == 1 else 0,
        fetched_rows=ceil_divide(_AHEAD_BYTES, row_bytes) if parts > 1 else 0,
    )


def _tables(
    problem: Problem, fragments: Size, rows: Rows[int], share_bytes: Sequence[int]
) -> list[NDArray[np.int64]]:
    """What the compiled loop is told of every plane and of every row of all fragments, and which
    planes, where among the rows kept, and where in the line taps along each axis are."""
    layer = cast("MaxPool | AveragePool", problem.layer)
    told, taps = [], []
    for axis in (0, 1):
        n, dilation = problem.inputs[0][2 + axis], layer.dilation[axis]
        place, part = np.divmod(
            np.arange(problem.output[2 + axis] * fragments[axis]), fragments[axis]
        )
        begin = place * layer.stride[axis] + part + problem.offsets[0][axis]
        low = np.minimum(-(np.minimum(begin, 0) // dilation), layer.kernel[axis])
        count = np.clip(-((begin - n) // dilation), low, layer.kernel[axis]) - low
        told.append([count, place * share_bytes[axis]])
        taps.append((begin + low * dilation)[:, None] + np.arange(layer.kernel[axis]) * dilation)
    end = np.clip(begin + (layer.kernel[1] - 1) * layer.dilation[1] + 1, 0, n)
    new = np.maximum(begin, 0)
    again = np.arange(rows.rows) % rows.strip > 0  # such rows find some rows combined already
    new[again] = np.maximum(new[1:], end[:-1])[again[1:]]
    to = place * problem.output[4] * VECTOR_BYTES
    (count_y, share_y), (at, row) = told[1], taps
    return [
        np.stack(told[0], axis=1),
        np.stack([new, end, count_y, to, share_y, part * fragments[2]], axis=1),
        np.minimum(at, problem.inputs[0][2] - 1),  # those beyond do not count
        row % rows.kept * (rows.line * VECTOR_BYTES),
        np.arange(layer.kernel[2]) * layer.dilation[2] * VECTOR_BYTES,
    ]


def _made(out: Planes, fragments: Size) -> NDArray[np.int64]:
    """Where the planes of all fragments along z lie: (sample, plane, fragment along y and x)."""
    z, parts = fragments[0], fragments[1] * fragments[2]
    samples, planes = out.shape[0] // (z * parts), out.shape[2]
    apart = out.addresses.reshape(z, parts, samples, planes)
    return apart.transpose(2, 3, 0, 1).reshape(samples, planes * z, parts)


def _line(problem: Problem, fragments: Size) -> int:
    """Voxels behind a row of outputs of all fragments."""
    window = problem.layer.window(2)
    return (problem.output[4] - 1) * window.stride + window.extent + fragments[2] - 1


def _own_bytes(problem: Problem, fragments: Size) -> int:
    """A thread's memory: a line, and the rows combined along z that windows reach."""
    return (1 + problem.layer.window(1).extent) * _line(problem, fragments) * VECTOR_BYTES


def _shares(problem: Problem, axis: int) -> Array:
    """For every output along an axis one over the number of taps that count.

    Padding counts only where the layer says so, and never what a last window has beyond it.
    """
    layer = cast("AveragePool", problem.layer)
    if not layer.window(axis).pads:
        return np.full(problem.output[2 + axis], 1 / layer.kernel[axis], np.float32)
    places = problem.start[axis] + np.arange(problem.output[2 + axis])
    begin = places * layer.stride[axis] - layer.padding[0][axis]
    taps = begin[:, None] + np.arange(layer.kernel[axis]) * layer.dilation[axis]
    first, last = counted(problem, axis)
    among = ((taps >= first) & (taps < last)).sum(axis=1)
    return np.asarray(1 / np.maximum(among, 1), np.float32)


def counted(problem: Problem, axis: int) -> tuple[int, int]:
    """Which taps along an axis a mean counts, from the first voxel of the whole input on."""
    layer = cast("AveragePool", problem.layer)
    low, high = layer.padding[0][axis], layer.padding[1][axis]
    first, last = 0, problem.whole[axis]
    return (first - low, last + high) if layer.count_padding else (first, last)


class _Pooling(OfPlanes):
    """Abstract: pooling on the CPU, into as many fragments as there are."""

    def takes_planes(self, layer: Layer, form: Form) -> bool:
        return form is Form.BLOCKED

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        """In blocks, but of so few channels that most of a block would be empty: voxel by voxel
        they take ten times as long, more than changes of form."""
        form = None if max(channels) <= _FEW else Form.BLOCKED
        return form, form

    def flops(self, problem: Problem) -> int:
        return pooling_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        """Operations, and what goes to and from memory."""
        traffic = sum(map(Form.BLOCKED.nbytes, (problem.inputs[0], problem.output)))
        return Work({LOOPS: self.flops(problem)}, {MEMORY: traffic})

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Memory of the lines, of the places of rows and planes, of taps along z and of fragments
        for every sample, and of `_shares`: the places of all taps along an axis, compared and
        counted."""
        pool = cast("MaxPool | AveragePool", problem.layer)
        fragments = self.fragments_of(pool)
        lines = threads * _own_bytes(problem, fragments)
        places = 8 * sum(
            n * f * (16 + 3 * k)
            for n, f, k in zip(problem.output[2:4], fragments, pool.kernel, strict=False)
        )
        apart = pool.kernel[0] + fragments[1] * fragments[2]
        places += 3 * 8 * problem.inputs[0][0] * problem.output[2] * fragments[0] * apart
        if isinstance(pool, MaxPool):
            return lines + places
        longest = max(n * k for n, k in zip(problem.output[2:], pool.kernel, strict=True))
        shares = problem.output[2] * problem.output[3] * ITEM_BYTES
        return lines + places + shares + 4 * longest * 2 * ITEM_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        if inputs[0].ndim > 5:
            super().apply(prepared, problem, inputs, out, team)
            return
        fragments, batch = self.fragments_of(problem.layer), inputs[0].shape[0]
        for index, offset in enumerate(product(*map(range, fragments))):
            part = out[index * batch : (index + 1) * batch]
            _pool(problem, inputs[0], part, add(problem.offsets[0], triple(offset)), team)

    def apply_planes(
        self,
        prepared: Any,
        problem: Problem,
        inputs: Sequence[Planes],
        out: Planes,
        team: Team,
    ) -> None:
        _pool_blocked(problem, inputs[0], out, self.fragments_of(problem.layer), team)


@final
class MaxPooling(_Pooling):
    """Plain max-pooling."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = MaxPool


@final
class AveragePooling(_Pooling):
    """Plain average pooling."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = AveragePool


@dataclass(frozen=True)
class AtEveryOffset(Primitive):
    """Abstract: pooling at every offset of the stride along ``axes``, the last ones of z, y and x;
    the network runs once for every offset along the others."""

    axes: str = "zyx"
    fragments: ClassVar[bool] = True
    takes: ClassVar[str] = "strides along the axis before those of its fragments"

    @property
    def name(self) -> str:  # type: ignore[override]
        """As the table and plans name it."""
        return "fragments" if self.axes == "".join(AXES) else f"fragments {self.axes}"

    def fits(self, layer: Layer) -> bool:
        first = len(AXES) - len(self.axes)
        return first == 0 or layer.window(first - 1).stride > 1

    def refusal(self, layer: Layer) -> str | None:
        if reason := super().refusal(layer):
            return reason
        return _PADDED if any(layer.window(axis).pads for axis in range(3)) else None

    def fragments_of(self, layer: Layer) -> Size:
        first = len(AXES) - len(self.axes)
        z, y, x = (layer.window(axis).stride if axis >= first else 1 for axis in range(3))
        return z, y, x


@final
class MaxPoolingFragments(AtEveryOffset, _Pooling):
    """Max-pooling fragments."""

    layer: ClassVar[type[Layer]] = MaxPool


@final
class AveragePoolingFragments(AtEveryOffset, _Pooling):
    """Average-pooling fragments."""

    layer: ClassVar[type[Layer]] = AveragePool
