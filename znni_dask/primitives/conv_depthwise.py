"""Direct convolution of every channel for itself, in blocks of channels, sums in registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide, volume
from znni_dask.kernels.axes import Lanes
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import Form, Problem
from znni_dask.primitives.work import Rate


@final
class ConvDepthwise(rows.InRows):
    """Depthwise convolution on the CPU, any stride, dilation and padding; one output a channel."""

    name: ClassVar[str] = "direct depthwise"
    layer: ClassVar[type[Layer]] = Conv
    rate: ClassVar[Rate] = Rate("direct depthwise", 8e10)  # operations
    takes: ClassVar[str] = "layers that make one output of every channel alone"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.in_channels == conv.out_channels == conv.groups and not conv.whole

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.BLOCKED, Form.BLOCKED

    def count(self, layer: Layer) -> int:
        return ceil_divide(cast("Conv", layer).out_channels, LANES)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        blocks = ceil_divide(conv.out_channels, LANES)
        taps = [VECTOR_BYTES * volume(conv.kernel)] * blocks
        return blocks * allocated_bytes(VECTOR_BYTES) + rows.kept_bytes(taps)

    def prepare(self, layer: Layer, weights: Weights) -> list[rows.Part]:
        """Every block of channels: taps (z, y, x) of sixteen channels."""
        conv = cast("Conv", layer)
        found = []
        for first in range(0, conv.out_channels, LANES):
            taps = rows.padded(weights["weight"][first : first + LANES, 0], LANES)
            bias = weights["bias"][first : first + LANES] if conv.bias else np.zeros(0, np.float32)
            part = np.moveaxis(taps, 0, -1)
            found.append(rows.Part(1, rows.kept([part]), rows.kept([rows.padded(bias, LANES)])))
        return found

    def passes(
        self, prepared: list[rows.Part], problem: Problem, source: rows.Place, out: rows.Place
    ) -> Iterator[rows.Pass]:
        conv = cast("Conv", problem.layer)
        axes, batch = rows.axes_of(problem, conv), problem.inputs[0][0]
        for part in prepared:
            yield rows.Pass.of(Lanes.BOTH, part, axes, batch, LANES, source, out, conv.relu)
            source, out = (place.on(place.strides.block) for place in (source, out))
