"""Transposed convolution into blocks of channels, row by row, sums in registers.

Outputs a stride apart read inputs that are neighbours, through every so many-th tap: each of
these *phases* is a small convolution with stride 1, the kernel turned round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import gcd, prod
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size, ceil_divide, triple, volume
from znni_dask.kernels.rows import Axis, Lanes
from znni_dask.kernels.team import Team
from znni_dask.network.layers import ConvTranspose, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem
from znni_dask.primitives.conv_transpose_direct import offsets_of_output

_MOST_PHASES = 512  # each is a call of its own


@final
class ConvTransposeBlocked(Primitive):
    """Direct transposed convolution on the CPU, any stride, dilation and padding; no groups."""

    name: ClassVar[str] = "direct transposed blocked"
    layer: ClassVar[type[Layer]] = ConvTranspose

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        conv = cast("ConvTranspose", layer)
        if conv.groups != 1 or volume(conv.stride) > _MOST_PHASES:
            most = f"no groups and at most {_MOST_PHASES} phases"
            return f"{self.name} takes {most}, not {conv.summary}"
        return None

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        batch, _, z, y, x = problem.output
        return int(2 * problem.layer.multiply_adds() * batch * z * y * x)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("ConvTranspose", layer)
        taps = [prod(map(len, phase)) for phase in _phases(conv).values()]
        phase = ITEM_BYTES * conv.out_channels * conv.in_channels * max(taps)
        return phase + rows.dense_bytes(conv.out_channels, [conv.in_channels * n for n in taps])

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        conv = cast("ConvTranspose", problem.layer)
        return rows.PASS_BYTES * volume(conv.stride) * rows.dense_count(conv.out_channels)

    def prepare(self, layer: Layer, weights: Weights) -> dict[Size, list[rows.Part]]:
        """The convolution of every phase."""
        conv = cast("ConvTranspose", layer)
        turned = weights["weight"].swapaxes(0, 1)
        every = (range(conv.out_channels), range(conv.in_channels))
        return {
            phase: rows.dense_parts(turned[np.ix_(*every, *taps)], weights.get("bias"))
            for phase, taps in _phases(conv).items()
        }

    def apply(
        self,
        prepared: dict[Size, list[rows.Part]],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        conv = cast("ConvTranspose", problem.layer)
        source, whole = rows.Place.of(inputs[0]), rows.Place.of(out)
        batch, channels = problem.inputs[0][:2]
        passes = []
        for phase, parts in prepared.items():
            firsts, axes = _axes(problem, phase, _phases(conv)[phase])
            if min(axis.outputs for axis in axes) < 1:
                continue
            target = whole.every(conv.stride, firsts)
            for part in parts:
                passes.append(
                    rows.Pass.of(Lanes.OUTPUTS, part, axes, batch, channels, source, target)
                )
                target = target.on(part.made * target.strides.block)
        rows.share(passes, team)


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
