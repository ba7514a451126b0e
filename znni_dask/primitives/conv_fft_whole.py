"""Convolution by Fourier transforms of whole images.

Zlateski et al. 2016, section IV.A, with its two ways of sharing the work: *data parallel*, one
image at a time and all threads inside it, which takes least memory; and *task parallel*, every
thread its own image, which waits least. For kernels too large for tiles. Transforms are pruned:
along every axis only lines are transformed that are not zero before, or read after. Kernels are
transformed anew for every patch, each once for all samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from typing import ClassVar, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide
from znni_dask.kernels import fourier
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import FEWEST_PRODUCTS, Array, Primitive, Problem, products_of
from znni_dask.primitives.images import Frame, Images, spectra_bytes
from znni_dask.primitives.work import Rate, Work

WHOLE = Rate("transforms of images", 2e10)  # operations, of their products, too
_CALL_SECONDS = 3e-6  # of each call from Python, which do not run side by side
_SHARE_SECONDS = 4e-5  # sharing work among threads
_PLAN_BYTES = 1 << 20  # FFTW's own, for each thread


@final
@dataclass(frozen=True)
class ConvWholeFFT(Primitive):
    """Convolution of whole images on the CPU, any stride, dilation, groups and padding.

    ``tasks``: every thread has images of its own.
    """

    tasks: bool
    layer: ClassVar[type[Layer]] = Conv
    library_bytes: ClassVar[int] = fourier.LIBRARY_BYTES
    takes: ClassVar[str] = f"sums of at least {FEWEST_PRODUCTS} products"
    setup_seconds: ClassVar[float] = 1.5  # planning transforms, too

    @property
    def name(self) -> str:  # type: ignore[override]
        """How it shares work, too."""
        return f"whole fft, {'task' if self.tasks else 'data'} parallel"

    def fits(self, layer: Layer) -> bool:
        return products_of(layer) >= FEWEST_PRODUCTS

    @property
    def family(self) -> str:
        """Both."""
        return "whole fft"

    def flops(self, problem: Problem) -> int:
        return self.work(problem, threads=1).amount(WHOLE)

    def work(self, problem: Problem, threads: int) -> Work:
        """5 n log n for a line of n complex numbers, half of it for real ones; 8 for a product."""
        conv, frame, batch = _conv(problem), Frame.of(problem), problem.output[0]
        z, y, x = (5 * n * log2(n) for n in frame.size)
        columns = frame.size[1] * frame.half * z
        planes, rows, _ = (last - first for first, last in frame.inside)
        image = planes * (rows * x / 2 + frame.half * y) + columns
        kernel = conv.kernel[0] * (conv.kernel[1] * x / 2 + frame.half * y) + columns
        made = columns + frame.made[0] * (frame.half * y + frame.made[1] * x / 2)
        images, outputs = batch * frame.channels, conv.out_channels
        kernels = outputs * frame.fan_in
        products = 8 * batch * kernels * frame.half * frame.size[0] * frame.size[1]
        blocks, busy = frame.blocks, outputs / ceil_divide(outputs, threads)
        transforms = images * image + kernels * kernel + batch * outputs * made
        calls = images * (planes + blocks) + kernels * (1 + blocks)
        calls += outputs * (blocks + batch * frame.made[0])
        shared = 0 if threads == 1 else 2 if self.tasks else 2 * images + 3 * outputs
        return Work(
            {WHOLE: transforms + products},
            busy=busy if self.tasks else threads,
            alone=calls * _CALL_SECONDS + shared * _SHARE_SECONDS,
        )

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """``S f ñ`` numbers, in the paper's words, for spectra of the input. What the paper takes
        for kernels and sums, ``ñ`` or ``S f' ñ`` and more, is made block by block: of each output
        channel at work the planes of its kernels and those of its sums."""
        return (
            spectra_bytes(Frame.of(problem).shapes(*self._at_once(threads))) + threads * _PLAN_BYTES
        )

    def prepare(self, layer: Layer, weights: Weights) -> tuple[Array, Array]:
        """Kernels and biases as they are."""
        conv = cast("Conv", layer)
        bias = weights["bias"] if conv.bias else np.zeros(conv.out_channels, np.float32)
        return weights["weight"], bias

    def apply(
        self,
        prepared: tuple[Array, Array],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        frame, (channels, threads) = Frame.of(problem), self._at_once(team.threads)
        memory = team.scratch(spectra_bytes(frame.shapes(channels, threads)))
        images = Images(problem, inputs[0], *prepared, out, frame, memory, channels, threads)
        outer, inner = (team.share, _alone) if self.tasks else (_alone, team.share)

        def transform(first: int, last: int) -> None:
            for number in range(first, last):
                images.transform(*divmod(number, frame.channels), inner)

        def make(first: int, last: int) -> None:
            for channel in range(first, last):
                images.make(channel, inner)

        outer(transform, frame.batch * frame.channels)
        outer(make, problem.output[1])

    def _at_once(self, threads: int) -> tuple[int, int]:
        """Output channels that are at work at once, and threads."""
        return threads if self.tasks else 1, threads


def _alone(work: Callable[[int, int], object], items: int) -> None:
    """Share nothing."""
    work(0, items)


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)
