"""A flattening followed by a matrix, as it is: weights are read once, from where they lie.

What the end of a classifier takes is bound by its weights' way from memory, so they are kept in
no second copy and in no other order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.kernels.matrix import multiply
from znni_dask.kernels.team import Team
from znni_dask.network.layers import NO_PADDING, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import ITEM_BYTES, Array, Primitive, Problem, weights_bytes
from znni_dask.primitives.work import MEMORY, Rate, Work

MULTIPLYING = Rate("matrix", 2e10)  # operations


@final
class ConvMatrix(Primitive):
    """Convolution whose kernel is as large as its input, on the CPU."""

    name: ClassVar[str] = "matrix"
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = "kernels as large as what they see"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.whole == "zyx" and conv.groups == 1 and conv.padding == NO_PADDING

    def flops(self, problem: Problem) -> int:
        return int(2 * problem.layer.multiply_adds() * problem.output[0])

    def work(self, problem: Problem, threads: int) -> Work:
        return Work({MULTIPLYING: self.flops(problem)}, {MEMORY: weights_bytes(problem.layer)})

    def prepared_bytes(self, layer: Layer) -> int:
        """Of the bias alone: weights are kept by the network."""
        return ITEM_BYTES * cast("Conv", layer).out_channels

    def prepare(self, layer: Layer, weights: Weights) -> tuple[Array, Array]:
        """The matrix (output, channel and tap), and the bias."""
        matrix = weights["weight"].reshape(len(weights["weight"]), -1)
        return matrix, weights.get("bias", np.zeros(len(matrix), np.float32))

    def apply(
        self,
        prepared: tuple[Array, Array],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        matrix, bias = prepared
        x, made = inputs[0].reshape(len(out), -1), out.reshape(len(out), -1)
        least = np.float32(0 if cast("Conv", problem.layer).relu else -np.inf)
        team.share(lambda a, b: multiply(matrix, bias, x, made, least, a, b), len(matrix))
