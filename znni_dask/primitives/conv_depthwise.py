"""Direct convolution of every channel for itself, in blocks of channels, sums in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide, volume
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.kernels.rows import Lanes
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import Array, Form, Primitive, Problem


@final
class ConvDepthwise(Primitive):
    """Depthwise convolution on the CPU, any stride, dilation and padding; one output a channel."""

    name: ClassVar[str] = "direct depthwise"
    layer: ClassVar[type[Layer]] = Conv

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        conv = cast("Conv", layer)
        if not conv.in_channels == conv.out_channels == conv.groups or conv.whole:
            return f"{self.name} makes one output of every channel alone, not {conv.summary}"
        return None

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.BLOCKED, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        batch, _, z, y, x = problem.output
        return int(2 * problem.layer.multiply_adds() * batch * z * y * x)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        blocks = ceil_divide(conv.out_channels, LANES)
        taps = [VECTOR_BYTES * volume(conv.kernel)] * blocks
        return blocks * allocated_bytes(VECTOR_BYTES) + rows.kept_bytes(taps)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return rows.PASS_BYTES * ceil_divide(problem.output[1], LANES)

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
        axes, batch = rows.axes_of(problem, conv), problem.inputs[0][0]
        for part in prepared:
            one = rows.Pass.of(Lanes.BOTH, part, axes, batch, LANES, source, target, conv.relu)
            rows.share([one], team)
            source = source.on(source.strides.block)
            target = target.on(target.strides.block)
