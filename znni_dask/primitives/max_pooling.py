"""Max-pooling, plain and as fragments.

Max-pooling fragments (MPF; Zlateski et al. 2016, section V) pool at every offset of the stride;
the fragments join the batch, offset by offset, and are interleaved at the end of the network.
Nothing is computed twice. Plain pooling makes one offset; a dense network that uses it runs once
for every offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar, cast, final

from znni_dask.geometry import Size, add, triple
from znni_dask.kernels import direct
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Layer, MaxPool
from znni_dask.primitives.base import Array, Primitive, Problem, indices


def _flops(problem: Problem) -> int:
    batch, channels, z, y, x = problem.output
    pool = cast("MaxPool", problem.layer)
    return batch * channels * z * y * x * pool.kernel[0] * pool.kernel[1] * pool.kernel[2]


def _pool(problem: Problem, x: Array, out: Array, offset: Size, team: Team) -> None:
    layer = cast("MaxPool", problem.layer)
    kernel, stride = indices(*layer.kernel), indices(*layer.stride)
    dilation, start = indices(*layer.dilation), indices(*offset)

    def work(first: int, last: int) -> None:
        direct.max_pool(x, out, start, kernel, stride, dilation, first, last)

    team.share(work, out.shape[0] * out.shape[1] * out.shape[2])


@final
class MaxPooling(Primitive):
    """Plain max-pooling on the CPU."""

    name: ClassVar[str] = "pooling"
    layer: ClassVar[type[Layer]] = MaxPool

    def flops(self, problem: Problem) -> int:
        return _flops(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        _pool(problem, inputs[0], out, problem.offsets[0], team)


@final
class MaxPoolingFragments(Primitive):
    """Max-pooling at every offset of the stride, on the CPU."""

    name: ClassVar[str] = "fragments"
    layer: ClassVar[type[Layer]] = MaxPool
    fragments: ClassVar[bool] = True

    def refusal(self, layer: Layer) -> str | None:
        if reason := super().refusal(layer):
            return reason
        if any(layer.window(axis).pads for axis in range(3)):
            return "fragments cannot pad: a padded pooling keeps its own grid"
        return None

    def flops(self, problem: Problem) -> int:
        return _flops(problem)

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        batch = inputs[0].shape[0]
        offsets = product(*(range(s) for s in cast("MaxPool", problem.layer).stride))
        for index, offset in enumerate(offsets):
            part = out[index * batch : (index + 1) * batch]
            _pool(problem, inputs[0], part, add(problem.offsets[0], triple(offset)), team)
