"""Transposed convolution into blocks of channels, row by row, sums in registers.

Outputs a stride apart read inputs that are neighbours, through every so many-th tap: each of
these *phases* is a small convolution with stride 1, the kernel turned round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import gcd, prod
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size, ceil_divide, triple, volume
from znni_dask.kernels.axes import Axis, Lanes
from znni_dask.network.layers import ConvTranspose, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import ITEM_BYTES, Form, Problem
from znni_dask.primitives.conv_transpose_direct import offsets_of_output
from znni_dask.primitives.work import Rate

_MOST_PHASES = 512  # each is a call of its own


@final
class ConvTransposeBlocked(rows.InRows):
    """Direct transposed convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct transposed blocked"
    layer: ClassVar[type[Layer]] = ConvTranspose
    rate: ClassVar[Rate] = Rate("direct transposed", 1.6e11)  # operations
    takes: ClassVar[str] = f"no groups and at most {_MOST_PHASES} phases"

    def fits(self, layer: Layer) -> bool:
        conv = cast("ConvTranspose", layer)
        return conv.groups == 1 and volume(conv.stride) <= _MOST_PHASES

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def count(self, layer: Layer) -> int:
        conv = cast("ConvTranspose", layer)
        return volume(conv.stride) * rows.dense_count(conv.out_channels)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("ConvTranspose", layer)
        taps = [prod(map(len, phase)) for phase in _phases(conv).values()]
        phase = ITEM_BYTES * conv.out_channels * conv.in_channels * max(taps)
        return phase + rows.dense_bytes(conv.out_channels, [conv.in_channels * n for n in taps])

    def prepare(self, layer: Layer, weights: Weights) -> dict[Size, list[rows.Part]]:
        """The convolution of every phase."""
        conv = cast("ConvTranspose", layer)
        turned = weights["weight"].swapaxes(0, 1)
        every = (range(conv.out_channels), range(conv.in_channels))
        return {
            phase: rows.dense_parts(turned[np.ix_(*every, *taps)], weights.get("bias"))
            for phase, taps in _phases(conv).items()
        }

    def passes(
        self,
        prepared: dict[Size, list[rows.Part]],
        problem: Problem,
        source: rows.Place,
        out: rows.Place,
    ) -> Iterator[rows.Pass]:
        conv = cast("ConvTranspose", problem.layer)
        phases = _phases(conv)
        for phase, parts in prepared.items():
            firsts, axes = _axes(problem, phase, phases[phase])
            if min(axis.outputs for axis in axes) < 1:
                continue
            target = out.every(conv.stride, firsts)
            shape = problem.inputs[0]
            yield from rows.passes_into(parts, Lanes.OUTPUTS, axes, shape, source, target)


def _phases(conv: ConvTranspose) -> dict[Size, tuple[list[int], ...]]:
    """For every phase its taps along z, y and x, the last first: those whose place, in steps of
    the output, is that phase modulo the stride."""
    along = [
        [
            [t for t in reversed(range(taps)) if t * dilation % stride == phase]
            for phase in range(stride)
        ]
        for taps, dilation, stride in zip(conv.kernel, conv.dilation, conv.stride, strict=True)
    ]
    return {
        triple(phase): tuple(along[axis][r] for axis, r in enumerate(phase))
        for phase in product(*map(range, conv.stride))
    }


def _axes(
    problem: Problem, phase: Size, taps: Sequence[Sequence[int]]
) -> tuple[Size, list[Axis[int]]]:
    """Of a phase the first output (z, y, x), and its axes as those of a convolution.

    Output ``q`` reads input ``i`` through tap ``t`` where q + offset = i · stride + t · dilation.
    """
    conv = cast("ConvTranspose", problem.layer)
    firsts, found = [], []
    for axis, offset in enumerate(offsets_of_output(problem)):
        stride, dilation = conv.stride[axis], conv.dilation[axis]
        first = (phase[axis] - offset) % stride
        there = (first + offset - taps[axis][0] * dilation) // stride if taps[axis] else 0
        firsts.append(first)
        found.append(
            Axis(
                outputs=ceil_divide(problem.output[2 + axis] - first, stride),
                stride=1,
                dilation=dilation // gcd(dilation, stride),
                offset=there,
                size=problem.inputs[0][2 + axis],
                taps=len(taps[axis]),
            )
        )
    return triple(firsts), found
