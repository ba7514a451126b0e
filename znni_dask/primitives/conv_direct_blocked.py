"""Direct convolution into blocks of channels, row by row, sums in registers.

For what transforms are not for: few input channels, kernels of one voxel, strides, groups. The
input may be in either form. Groups are computed so many together that they begin where blocks do,
as one convolution whose other weights are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, lcm
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import volume
from znni_dask.kernels.axes import Lanes
from znni_dask.kernels.code import LANES
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import ITEM_BYTES, Form, Problem
from znni_dask.primitives.work import Rate, Work


@final
class ConvDirectBlocked(rows.InRows):
    """Direct convolution on the CPU: any stride, dilation, padding and groups."""

    name: ClassVar[str] = "direct blocked"
    layer: ClassVar[type[Layer]] = Conv
    rate: ClassVar[Rate] = Rate("direct blocked", 2e11)  # operations
    takes: ClassVar[str] = "no whole window"

    def fits(self, layer: Layer) -> bool:
        return not cast("Conv", layer).whole

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def work(self, problem: Problem, threads: int) -> Work:
        groups = groups_together(cast("Conv", problem.layer))
        return rows.work_of(self.rate, problem, problem.output, wasted=groups)

    def count(self, layer: Layer) -> int:
        return sum(rows.dense_count(made) for _, made in _together(cast("Conv", layer)))

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        taps, together = volume(conv.kernel), _together(conv)
        apart = ITEM_BYTES * taps * max(read * made for read, made in together)
        return (conv.groups > 1) * apart + sum(
            rows.dense_bytes(made, [read * taps]) for read, made in together
        )

    def prepare(self, layer: Layer, weights: Weights) -> list[list[rows.Part]]:
        """For groups that are computed together: weights in the order in which they are read, of
        either form of the input."""
        conv = cast("Conv", layer)
        weight, bias = weights["weight"], weights.get("bias")
        if conv.groups == 1:
            return [rows.dense_parts(weight, bias)]
        found, begin = [], 0
        reads, makes = weight.shape[1], conv.out_channels // conv.groups
        for read, made in _together(conv):
            dense = np.zeros((made, read, *conv.kernel), np.float32)
            for i in range(made // makes):
                outputs = slice(i * makes, (i + 1) * makes)
                own = weight[begin + i * makes : begin + (i + 1) * makes]
                dense[outputs, i * reads : (i + 1) * reads] = own
            here = None if bias is None else bias[begin : begin + made]
            found.append(rows.dense_parts(dense, here))
            begin += made
        return found

    def passes(
        self, prepared: list[list[rows.Part]], problem: Problem, source: rows.Place, out: rows.Place
    ) -> Iterator[rows.Pass]:
        conv, batch = cast("Conv", problem.layer), problem.inputs[0][0]
        axes = rows.axes_of(problem, conv)
        for parts, (read, made) in zip(prepared, _together(conv), strict=True):
            shape = batch, read
            yield from rows.passes_into(parts, Lanes.OUTPUTS, axes, shape, source, out, conv.relu)
            source = source.on(read // LANES * source.strides.block)
            out = out.on(made // LANES * out.strides.block)


def groups_together(conv: Conv) -> int:
    """So many groups as begin where blocks of the input and of the output do."""
    reads, makes = (n // conv.groups for n in (conv.in_channels, conv.out_channels))
    return min(conv.groups, lcm(LANES // gcd(LANES, reads), LANES // gcd(LANES, makes)))


def _together(conv: Conv) -> list[tuple[int, int]]:
    """Channels of the input and of the output of groups that are computed together."""
    most = groups_together(conv)
    counts = [min(most, conv.groups - first) for first in range(0, conv.groups, most)]
    reads, makes = (n // conv.groups for n in (conv.in_channels, conv.out_channels))
    return [(count * reads, count * makes) for count in counts]
