"""Direct convolution into blocks of channels, row by row, sums in registers.

For what transforms are not for: few input channels, kernels of one voxel, strides. The input may
be in either form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast, final

from znni_dask.geometry import volume
from znni_dask.kernels.rows import Lanes
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import Array, Form, Primitive, Problem


@final
class ConvDirectBlocked(Primitive):
    """Direct convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct blocked"
    layer: ClassVar[type[Layer]] = Conv

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        conv = cast("Conv", layer)
        if conv.groups != 1 or conv.whole:
            return f"{self.name} takes no groups or whole window, not {conv.summary}"
        return None

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        batch, _, z, y, x = problem.output
        return int(2 * problem.layer.multiply_adds() * batch * z * y * x)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        return rows.dense_bytes(conv.out_channels, [conv.in_channels * volume(conv.kernel)])

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return rows.PASS_BYTES * rows.dense_count(problem.output[1])

    def prepare(self, layer: Layer, weights: Weights) -> list[rows.Part]:
        """Weights in the order in which they are read, of either form of the input."""
        return rows.dense_parts(weights["weight"], weights.get("bias"))

    def apply(
        self,
        prepared: list[rows.Part],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        conv = cast("Conv", problem.layer)
        source, target = rows.Place.of(inputs[0]), rows.Place.of(out)
        axes, (batch, channels) = rows.axes_of(problem, conv), problem.inputs[0][:2]
        passes = []
        for part in prepared:
            passes.append(
                rows.Pass.of(
                    *(Lanes.OUTPUTS, part, axes, batch, channels, source, target), conv.relu
                )
            )
            target = target.on(part.made * target.strides.block)
        rows.share(passes, team)
