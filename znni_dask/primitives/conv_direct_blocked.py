"""Direct convolution into blocks of channels, row by row, sums in registers.

For what transforms are not for: few input channels, kernels of one voxel, strides. The input may
be in either form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast, final

from znni_dask.geometry import volume
from znni_dask.kernels.axes import Lanes
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import Form, Problem


@final
class ConvDirectBlocked(rows.InRows):
    """Direct convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct blocked"
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = "no groups or whole window"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.groups == 1 and not conv.whole

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def count(self, layer: Layer) -> int:
        return rows.dense_count(cast("Conv", layer).out_channels)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        return rows.dense_bytes(conv.out_channels, [conv.in_channels * volume(conv.kernel)])

    def prepare(self, layer: Layer, weights: Weights) -> list[rows.Part]:
        """Weights in the order in which they are read, of either form of the input."""
        return rows.dense_parts(weights["weight"], weights.get("bias"))

    def passes(
        self, prepared: list[rows.Part], problem: Problem, source: rows.Place, out: rows.Place
    ) -> Iterator[rows.Pass]:
        conv = cast("Conv", problem.layer)
        axes, shape = rows.axes_of(problem, conv), problem.inputs[0]
        return rows.passes_into(prepared, Lanes.OUTPUTS, axes, shape, source, out, conv.relu)
