"""Direct convolution of blocks of channels to few channels: last layers.

With sixteen output channels in a vector most of it would be wasted on three. Here lanes are input
channels; what is in them is added up once for every output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide, round_up, volume
from znni_dask.kernels.axes import Lanes
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.kernels.rows import most_at_once
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import Form, Problem
from znni_dask.primitives.work import Rate, Work


@final
class ConvDirectFew(rows.InRows):
    """Direct convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct to few channels"
    layer: ClassVar[type[Layer]] = Conv
    rate: ClassVar[Rate] = Rate("direct to few channels", 1.8e11)  # operations
    takes: ClassVar[str] = "no groups or whole window"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.groups == 1 and not conv.whole

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.BLOCKED, Form.PLAIN

    def work(self, problem: Problem, threads: int) -> Work:
        return rows.work_of(self.rate, problem, lanes=problem.inputs[0])

    def count(self, layer: Layer) -> int:
        return len(_parts(cast("Conv", layer)))

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        fan_in = ceil_divide(conv.in_channels, LANES) * volume(conv.kernel)
        sizes = [VECTOR_BYTES * outputs for outputs in _parts(conv)]
        return sum(map(allocated_bytes, sizes)) + rows.kept_bytes([n * fan_in for n in sizes])

    def prepare(self, layer: Layer, weights: Weights) -> list[rows.Part]:
        """Weights in the order in which they are read; biases in all lanes."""
        conv = cast("Conv", layer)
        found, begin = [], 0
        for outputs in _parts(conv):
            part = slice(begin, begin + outputs)
            begin += outputs
            channels = rows.padded(
                weights["weight"][part].swapaxes(0, 1), round_up(conv.in_channels, LANES)
            )
            # (channel, output, z, y, x) → block, z, y, x, output, channel of the block
            lanes = channels.reshape(-1, LANES, outputs, *conv.kernel).transpose(0, 3, 4, 5, 2, 1)
            bias = weights["bias"][part] if conv.bias else np.zeros(outputs, np.float32)
            found.append(
                rows.Part(outputs, rows.kept([lanes]), rows.kept([np.repeat(bias, LANES)]))
            )
        return found

    def passes(
        self, prepared: list[rows.Part], problem: Problem, source: rows.Place, out: rows.Place
    ) -> Iterator[rows.Pass]:
        conv = cast("Conv", problem.layer)
        out = out._replace(strides=out.strides._replace(block=out.strides.channel))
        axes, shape = rows.axes_of(problem, conv), problem.inputs[0]
        return rows.passes_into(prepared, Lanes.INPUTS, axes, shape, source, out, conv.relu)


def _parts(conv: Conv) -> list[int]:
    return rows.equal_parts(conv.out_channels, most_at_once(Lanes.INPUTS))
