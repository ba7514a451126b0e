"""Pooling, plain and as fragments: the largest or the mean value of each window.

Max-pooling fragments (MPF; Zlateski et al. 2016, section V) pool at every offset of the stride;
the fragments join the batch, offset by offset, and are interleaved at the end of the network.
Nothing is computed twice. Plain pooling makes one offset; a dense network that uses it runs once
for every offset. Means go into fragments the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size, add, triple
from znni_dask.kernels import pooling
from znni_dask.kernels.team import Team
from znni_dask.network.layers import AveragePool, Layer, MaxPool
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem, indices

_PADDED = "fragments cannot pad: a padded pooling keeps its own grid"

_KERNELS = {
    (False, Form.PLAIN): pooling.max_pool,
    (False, Form.BLOCKED): pooling.max_pool_blocked,
    (True, Form.PLAIN): pooling.average_pool,
    (True, Form.BLOCKED): pooling.average_pool_blocked,
}


def _flops(problem: Problem) -> int:
    batch, channels, z, y, x = problem.output
    pool = cast("MaxPool | AveragePool", problem.layer)
    return batch * channels * z * y * x * pool.kernel[0] * pool.kernel[1] * pool.kernel[2]


def _pool(problem: Problem, x: Array, out: Array, offset: Size, team: Team) -> None:
    """Pool ``x`` from ``offset`` on."""
    layer = cast("MaxPool | AveragePool", problem.layer)
    taps = [indices(*v) for v in (offset, layer.kernel, layer.stride, layer.dilation)]
    mean = isinstance(layer, AveragePool)
    shares = [_shares(problem, axis) for axis in range(3)] if mean else []
    pool = _KERNELS[mean, Form.PLAIN if x.ndim == 5 else Form.BLOCKED]

    def work(first: int, last: int) -> None:
        pool(x, out, *taps, *shares, first, last)

    team.share(work, out.shape[0] * out.shape[1] * out.shape[2])


def _shares(problem: Problem, axis: int) -> Array:
    """For every output along an axis one over the number of taps that count.

    Padding counts only where the layer says so, and never what a last window has beyond it.
    """
    layer = cast("AveragePool", problem.layer)
    low, high = layer.padding[0][axis], layer.padding[1][axis]
    if not layer.window(axis).pads:
        return np.full(problem.output[2 + axis], 1 / layer.kernel[axis], np.float32)
    begin = (problem.start[axis] + np.arange(problem.output[2 + axis])) * layer.stride[axis] - low
    taps = begin[:, None] + np.arange(layer.kernel[axis]) * layer.dilation[axis]
    first, last = 0, problem.whole[axis]
    if layer.count_padding:
        first, last = first - low, last + high
    counted = ((taps >= first) & (taps < last)).sum(axis=1)
    return np.asarray(1 / np.maximum(counted, 1), np.float32)


@final
class MaxPooling(Primitive):
    """Plain max-pooling on the CPU."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = MaxPool

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def flops(self, problem: Problem) -> int:
        return _flops(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _pool(problem, inputs[0], out, problem.offsets[0], team)


@final
class AveragePooling(Primitive):
    """Plain average pooling on the CPU."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = AveragePool

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def flops(self, problem: Problem) -> int:
        return _flops(problem)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return _shares_bytes(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _pool(problem, inputs[0], out, problem.offsets[0], team)


def _shares_bytes(problem: Problem) -> int:
    """Memory of `_shares`: the places of all taps along an axis, compared and counted."""
    kernel = cast("AveragePool", problem.layer).kernel
    longest = max(n * k for n, k in zip(problem.output[2:], kernel, strict=True))
    return 4 * longest * 2 * ITEM_BYTES


class _Fragments(Primitive):
    """Pooling at every offset of the stride, on the CPU."""

    name: ClassVar[str] = "fragments"
    fragments: ClassVar[bool] = True

    def refusal(self, layer: Layer) -> str | None:
        if reason := super().refusal(layer):
            return reason
        return _PADDED if any(layer.window(axis).pads for axis in range(3)) else None

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, None

    def flops(self, problem: Problem) -> int:
        return _flops(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        batch = inputs[0].shape[0]
        offsets = product(*(range(problem.layer.window(axis).stride) for axis in range(3)))
        for index, offset in enumerate(offsets):
            part = out[index * batch : (index + 1) * batch]
            _pool(problem, inputs[0], part, add(problem.offsets[0], triple(offset)), team)


@final
class MaxPoolingFragments(_Fragments):
    """Max-pooling fragments."""

    layer: ClassVar[type[Layer]] = MaxPool


@final
class AveragePoolingFragments(_Fragments):
    """Average-pooling fragments."""

    layer: ClassVar[type[Layer]] = AveragePool

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return _shares_bytes(problem)
