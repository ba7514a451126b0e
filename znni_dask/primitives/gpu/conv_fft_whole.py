"""Convolution by Fourier transforms of whole images: one-dimensional passes along z, y and x.

Zlateski et al. 2016, section IV.B. Passes are pruned: along every axis only lines are transformed
that are not zero before, or read after. Of a block of output channels at a time kernels are
transformed; at every frequency the channels' sum is a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import ceil_divide
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import (
    FEWEST_PRODUCTS,
    DevicePrimitive,
    Problem,
    products_of,
)
from znni_dask.primitives.gpu.pieces import part, pieces
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY, PRODUCTS, TRANSFORMS
from znni_dask.primitives.images import Frame
from znni_dask.primitives.work import Work

COMPLEX_BYTES = 8
BLOCK_BYTES = 512 << 20  # of spectra of kernels and of sums
PIECE_BYTES = 32 << 20  # of what is transformed, or multiplied, at once
_COPIES = 6  # of a piece: as it is given to the library, its answer, and what that computes in,
# which of numpy is twice as precise
_LEAST_PIECE_BYTES = 64 << 10


@final
class GpuConvWholeFFT(DevicePrimitive):
    """Convolution of whole images on the GPU, any stride, dilation and padding."""

    name: ClassVar[str] = "whole fft"
    layer: ClassVar[type[Layer]] = Conv
    beside: ClassVar[bool] = True
    takes: ClassVar[str] = f"a single group, and sums of at least {FEWEST_PRODUCTS} products"

    def fits(self, layer: Layer) -> bool:
        return cast("Conv", layer).groups == 1 and products_of(layer) >= FEWEST_PRODUCTS

    def flops(self, problem: Problem) -> int:
        return self.work(problem, threads=1).amount(TRANSFORMS, PRODUCTS)

    def work(self, problem: Problem, threads: int) -> Work:
        """5 n log n for a line of n complex numbers, half of it for real ones; 8 for a product.
        What is transformed is moved six times, what is multiplied twice."""
        frame, outputs = Frame.of(problem), problem.output[1]
        z, y, x = (5 * n * log2(n) for n in frame.size)
        columns, numbers = frame.size[1] * frame.half * z, prod(frame.size[:2]) * frame.half
        planes, rows, _ = (last - first for first, last in frame.inside)
        image = planes * (rows * x / 2 + frame.half * y) + columns
        kernel = frame.kernel[0] * (frame.kernel[1] * x / 2 + frame.half * y) + columns
        made = columns + frame.made[0] * (frame.half * y + frame.made[1] * x / 2)
        images, kernels, sums = (
            frame.batch * frame.channels,
            outputs * frame.channels,
            frame.batch * outputs,
        )
        read_again = images * (_Plan.of(problem).blocks - 1)
        return Work(
            {
                TRANSFORMS: images * image + kernels * kernel + sums * made,
                PRODUCTS: 8 * frame.batch * kernels * numbers,
                MEMORY: COMPLEX_BYTES * numbers * (8 * (images + kernels + sums) + 2 * read_again),
                LAUNCHES: _Plan.of(problem).launches,
            }
        )

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Spectra of all images, and of a block of output channels those of kernels and sums; of a
        piece what is multiplied, or what the library takes that transforms it."""
        plan = _Plan.of(problem)
        return plan.nbytes + plan.transformed_bytes

    def placed(self, layer: Layer, weights: Weights, device: Device) -> tuple[Any, Any]:
        """Kernels and biases as they are."""
        conv = cast("Conv", layer)
        bias = device.put(weights["bias"].reshape(-1, 1, 1, 1)) if conv.bias else None
        return device.put(weights["weight"]), bias

    def apply(
        self,
        prepared: tuple[Any, Any],
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        kernels, bias = prepared
        passes = _Passes(problem, _Plan.of(problem), team)
        passes.transform_images(inputs[0])
        for first in range(0, out.shape[1], passes.plan.at_once):
            channels = slice(first, min(first + passes.plan.at_once, out.shape[1]))
            passes.transform_kernels(kernels[channels])
            passes.multiply(channels.stop - first)
            made = out[:, channels]
            passes.make(made, None if bias is None else bias[channels])
            if cast("Conv", problem.layer).relu:
                team.xp.maximum(made, 0, out=made)


@dataclass(frozen=True)
class _Plan:
    """How much is computed at once: output channels, and frequencies."""

    frame: Frame
    outputs: int
    at_once: int
    multiplied: int

    @classmethod
    def of(cls, problem: Problem) -> _Plan:
        frame, outputs = Frame.of(problem), problem.output[1]
        numbers = prod(frame.size[:2]) * frame.half
        room = BLOCK_BYTES // (COMPLEX_BYTES * numbers * (frame.channels + frame.batch))
        at_once = max(1, min(outputs, room))
        each = frame.batch * frame.channels + at_once * (frame.batch + frame.channels)
        multiplied = max(1, min(numbers, PIECE_BYTES // (COMPLEX_BYTES * each)))
        return cls(frame, outputs, at_once, multiplied)

    @property
    def blocks(self) -> int:
        """Blocks of output channels."""
        return ceil_divide(self.outputs, self.at_once)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of spectra of images, kernels and sums, and of frequencies of each of them."""
        frame = self.frame
        spectrum = *frame.size[:2], frame.half
        return [
            (frame.batch, frame.channels, *spectrum),
            (self.at_once, frame.channels, *spectrum),
            (frame.batch, self.at_once, *spectrum),
            (self.multiplied, frame.batch, frame.channels),
            (self.multiplied, frame.channels, self.at_once),
            (self.multiplied, frame.batch, self.at_once),
        ]

    @property
    def nbytes(self) -> int:
        """Memory of these."""
        return COMPLEX_BYTES * sum(map(prod, self.shapes))

    @property
    def launches(self) -> int:
        """Kernels begun, about: for a piece six of every pass, and four of what is multiplied."""
        passes = self.frame.batch * (1 + self.blocks) + self.blocks
        spectra = COMPLEX_BYTES * sum(map(prod, self.shapes[:3]))
        multiplied = ceil_divide(prod(self.shapes[0][2:]), self.multiplied)
        return 18 * max(passes, self.blocks * spectra // PIECE_BYTES) + 4 * self.blocks * multiplied

    @property
    def transformed_bytes(self) -> int:
        """Memory of transforms: of pieces, or of all there is, or of a plane where that is more."""
        frame = self.frame
        z, y, _ = frame.size
        spectra = max(map(prod, self.shapes[:3]))
        least = max(frame.half * y, frame.half * z)
        most = max(least, min(spectra, PIECE_BYTES // COMPLEX_BYTES))
        return _COPIES * COMPLEX_BYTES * most + _LEAST_PIECE_BYTES


class _Passes:
    """A problem being computed, in scratch memory of a device."""

    def __init__(self, problem: Problem, plan: _Plan, device: Device) -> None:
        self.plan, self._frame, self._xp = plan, plan.frame, device.xp
        self._offset = problem.offsets[0]
        memory, first = device.scratch(plan.nbytes).view(np.complex64), 0
        arrays = []
        for shape in plan.shapes:
            arrays.append(memory[first : first + prod(shape)].reshape(shape))
            first += prod(shape)
        self._images, self._kernels, self._sums, *self._parts = arrays

    def transform_images(self, x: Any) -> None:
        """The spectra of the input."""
        frame = self._frame
        here = tuple(slice(first, last) for first, last in frame.inside)
        there = tuple(
            slice(s.start + o, s.stop + o) for s, o in zip(here, self._offset, strict=True)
        )
        if frame.inside[0][0] == frame.inside[0][1]:
            self._images[...] = 0
            return
        seen = x[(slice(None), slice(None), *there)]
        for source, spectra in zip(seen, self._images, strict=True):
            self._forward(source, spectra, here)

    def transform_kernels(self, kernels: Any) -> None:
        """The spectra of kernels of some output channels, as large as makes answers of the right
        size."""
        scale = 1 / prod(self._frame.size)
        sources, spectra = (
            array.reshape(-1, *array.shape[2:])
            for array in (kernels, self._kernels[: len(kernels)])
        )
        self._forward(sources, spectra, self._frame.taps, scale)

    def multiply(self, channels: int) -> None:
        """The spectra of so many output channels, summed over those of the input."""
        xp, step = self._xp, self.plan.multiplied
        images, kernels, sums = (
            a.reshape(*a.shape[:2], -1)
            for a in (self._images, self._kernels[:channels], self._sums[:, :channels])
        )
        for first in range(0, images.shape[2], step):
            last = min(first + step, images.shape[2])
            shapes = (images.shape[:2], kernels.shape[1::-1], sums.shape[:2])
            read, factors, made = (
                array.reshape(-1)[: (last - first) * prod(shape)].reshape(-1, *shape)
                for array, shape in zip(self._parts, shapes, strict=True)
            )
            read[...] = images[:, :, first:last].transpose(2, 0, 1)
            xp.conjugate(kernels[:, :, first:last].transpose(2, 1, 0), out=factors)
            xp.matmul(read, factors, out=made)
            sums[:, :, first:last] = made.transpose(1, 2, 0)

    def make(self, out: Any, bias: Any) -> None:
        """Of the sums' spectra the output (batch, channel, z, y, x)."""
        xp, frame = self._xp, self._frame
        along_z, along_y, along_x = frame.outputs
        for target, spectra in zip(out, self._sums, strict=True):
            sums = spectra[: len(target)]
            self._along_z(sums, backward=True)
            for images, numbers, planes in self._planes(sums, along_z):
                self._along(2, sums[images, planes], backward=True)
                lines = sums[images, planes, along_y]
                rows = xp.fft.irfft(lines, n=frame.size[2], axis=-1, norm="forward")
                there = target[images, numbers]
                if bias is None:
                    there[...] = rows[..., along_x]
                else:
                    xp.add(rows[..., along_x], bias[images], out=there)

    def _forward(
        self, source: Any, spectra: Any, places: Sequence[slice], scale: float = 1
    ) -> None:
        """The spectra of arrays (array, z, y, x) that lie at these places, zero elsewhere."""
        xp, (along_z, along_y, along_x) = self._xp, places
        spectra[...] = 0
        for images, numbers, planes in self._planes(spectra, along_z, source.shape[1]):
            part_of = source[images, numbers]
            rows = xp.zeros((*part_of.shape[:3], self._frame.size[2]), np.float32)
            xp.multiply(part_of, scale, out=rows[..., along_x])
            spectra[images, planes, along_y] = xp.fft.rfft(rows, axis=-1)
            del rows
            self._along(2, spectra[images, planes])
        self._along_z(spectra)

    def _planes(
        self, spectra: Any, along_z: slice, count: int = 0
    ) -> Iterator[tuple[slice, slice, slice]]:
        """Pieces of some planes of spectra: which arrays, which of these planes, and where these
        are."""
        plane = COMPLEX_BYTES * prod(spectra.shape[2:])
        size = len(spectra), count or self._frame.made[0], 1
        for box in pieces(size, PIECE_BYTES // plane):
            images, numbers, _ = box.slices
            yield images, numbers, part(along_z, numbers.start, numbers.stop)

    def _along_z(self, spectra: Any, backward: bool = False) -> None:
        column = COMPLEX_BYTES * spectra.shape[1] * spectra.shape[3]
        for box in pieces((len(spectra), spectra.shape[2], 1), PIECE_BYTES // column):
            images, rows, _ = box.slices
            self._along(1, spectra[images, :, rows], backward)

    def _along(self, axis: int, piece: Any, backward: bool = False) -> None:
        """Transform a piece of spectra; neither way is scaled."""
        fft = self._xp.fft
        transform, norm = (fft.ifft, "forward") if backward else (fft.fft, "backward")
        piece[...] = transform(piece, axis=axis, norm=norm)
