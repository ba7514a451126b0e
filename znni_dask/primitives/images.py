"""The stages of a convolution by transforms of whole images: how a problem lies in them, and what
is computed where.

Spectra of images are (block of lines, line along y, z, x): what is transformed along z at once
lies together, and is multiplied with the same part of a kernel's spectrum while that is in the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size, round_up, triple, volume
from znni_dask.kernels.code import VECTOR_BYTES
from znni_dask.kernels.fourier import Pass, fast_length, transforms
from znni_dask.kernels.memory import Bytes
from znni_dask.kernels.spectra import add_products
from znni_dask.network.layers import Conv
from znni_dask.primitives.base import Array, Problem

Spectrum = NDArray[np.complex64]
Shapes = Sequence[tuple[int, ...]]
Share = Callable[[Callable[[int, int], object], int], None]
_COMPLEX_BYTES = 8
_BLOCK_BYTES = 256 << 10  # of a spectrum that is computed at once, in a core's own cache


@dataclass(frozen=True)
class Frame:
    """How a problem lies in its transforms, of ``size``: along every axis where the input is not
    zero, where ``taps`` and where ``outputs`` lie, and how many outputs are ``made``. Along y
    spectra fall into blocks of so many ``lines``."""

    batch: int
    channels: int
    fan_in: int
    size: Size
    inside: tuple[tuple[int, int], ...]
    kernel: Size
    taps: tuple[slice, ...]
    made: Size
    outputs: tuple[slice, ...]
    lines: int

    @classmethod
    def of(cls, problem: Problem) -> Frame:
        conv, made = cast("Conv", problem.layer), triple(problem.output[2:])
        reach, inside = [], []
        for axis, (there, offset) in enumerate(
            zip(problem.inputs[0][2:], problem.offsets[0], strict=True)
        ):
            read = (made[axis] - 1) * conv.stride[axis] + conv.window(axis).extent
            reach.append(read)
            inside.append((max(0, -offset), min(read, there - offset)))
        if any(first >= last for first, last in inside):  # nothing but padding is read
            inside = [(0, 0), (0, 1), (0, 1)]
        size = triple(map(fast_length, reach))
        line_bytes = size[0] * (size[2] // 2 + 1) * _COMPLEX_BYTES
        whole = [n for n in range(2, size[1] + 1) if size[1] % n == 0]
        return cls(
            batch=problem.output[0],
            channels=problem.inputs[0][1],
            fan_in=conv.in_channels // conv.groups,
            size=size,
            inside=tuple(inside),
            kernel=conv.kernel,
            taps=_steps(conv.kernel, conv.dilation),
            made=made,
            outputs=_steps(made, conv.stride),
            lines=max((n for n in whole if n * line_bytes <= _BLOCK_BYTES), default=1),
        )

    @property
    def half(self) -> int:
        """Numbers along x of the spectrum of real values."""
        return self.size[2] // 2 + 1

    @property
    def blocks(self) -> int:
        """Blocks of lines that a spectrum falls into."""
        return self.size[1] // self.lines

    def shapes(self, channels: int, threads: int) -> list[tuple[int, ...]]:
        """Of all arrays of complex numbers: spectra of images; planes of kernels and of sums for
        each channel; rows, planes, a block of a spectrum and of sums for each thread."""
        z, y, _ = self.size
        most = max(self.inside[1][1] - self.inside[1][0], prod(self.kernel[:2]), self.made[1])
        return [
            (self.batch, self.channels, self.blocks, self.lines, z, self.half),
            *channels
            * [
                (self.fan_in, self.kernel[0], y, self.half),
                (self.batch, self.made[0], y, self.half),
            ],
            *threads
            * [
                (most, self.half),
                (self.kernel[0], y, self.half),
                (self.lines, z, self.half),
                (self.batch, self.lines, z, self.half),
            ],
        ]


class _Channel(NamedTuple):
    """An output channel in the making: its kernels, transformed along x and y, and its sums,
    transformed back along z."""

    kernels: Spectrum
    sums: Spectrum


class _Passes(NamedTuple):
    """The arrays of a thread, and its transforms there."""

    rows: Array
    planes: Spectrum
    block: Spectrum
    sums: Spectrum
    image_plane: Callable[[], None]
    kernel_planes: Callable[[], None]
    columns: Callable[[], None]
    columns_back: Callable[[], None]
    plane_back: Callable[[], None]


class Images:
    """A problem being computed in ``memory``: by so many threads, so many output channels at
    once. Several threads may call it."""

    def __init__(
        self,
        problem: Problem,
        image: Array,
        kernels: Array,
        biases: Array,
        out: Array,
        frame: Frame,
        memory: Bytes,
        channels: int,
        threads: int,
    ) -> None:
        self._conv = cast("Conv", problem.layer)
        self._offset = problem.offsets[0]
        self._image, self._kernels, self._biases, self._out = image, kernels, biases, out
        self._frame = frame
        arrays = cut(memory, frame.shapes(channels, threads))
        self._spectra = next(arrays)
        self._channels = [_Channel(next(arrays), next(arrays)) for _ in range(channels)]
        self._passes = [self._passes_of(*(next(arrays) for _ in range(4))) for _ in range(threads)]

    def transform(self, sample: int, channel: int, share: Share) -> None:
        """The spectrum of an image."""
        (z0, z1), (y0, y1), (x0, x1) = self._frame.inside
        oz, oy, ox = self._offset
        image, spectrum = self._image[sample, channel], self._spectra[sample, channel]
        columns = spectrum.reshape(-1, *spectrum.shape[2:])

        def plane(own: _Passes, z: int) -> None:
            rows = own.rows[: y1 - y0]
            rows[...] = own.planes[0] = 0
            rows[:, x0:x1] = image[z0 + z + oz, y0 + oy : y1 + oy, x0 + ox : x1 + ox]
            own.image_plane()
            columns[:, z0 + z] = own.planes[0]

        def block(own: _Passes, number: int) -> None:
            own.block[:, :z0] = own.block[:, z1:] = 0
            own.block[:, z0:z1] = spectrum[number, :, z0:z1]
            own.columns()
            spectrum[number] = own.block

        self._share(share, plane, z1 - z0)
        self._share(share, block, self._frame.blocks)

    def make(self, channel: int, share: Share) -> None:
        """An output channel, of all samples."""
        frame, conv = self._frame, self._conv
        made = self._channels.pop()  # there is one for each that is at work
        first = channel * conv.groups // conv.out_channels * frame.fan_in
        scale = np.float32(1 / volume(frame.size))
        taps_z, _, taps_x = frame.taps
        outputs_z, _, outputs_x = frame.outputs
        spectra = self._spectra.reshape(frame.batch, frame.channels, frame.blocks, -1)

        def kernel(own: _Passes, number: int) -> None:
            rows = own.rows[: prod(frame.kernel[:2])].reshape(*frame.kernel[:2], -1)
            rows[...] = own.planes[...] = 0
            np.multiply(self._kernels[channel, number], scale, out=rows[..., taps_x])
            own.kernel_planes()
            made.kernels[number] = own.planes

        def block(own: _Passes, number: int) -> None:
            lines = slice(number * frame.lines, (number + 1) * frame.lines)
            own.sums[...] = 0
            for image in range(frame.fan_in):
                own.block[...] = 0
                own.block[:, taps_z] = made.kernels[image, :, lines].swapaxes(0, 1)
                own.columns()
                sums = own.sums.reshape(frame.batch, -1)
                add_products(spectra, first + image, number, own.block.reshape(-1), sums)
            own.columns_back()
            made.sums[:, :, lines] = own.sums[:, :, outputs_z].swapaxes(1, 2)

        def plane(own: _Passes, item: int) -> None:
            sample, z = divmod(item, frame.made[0])
            own.planes[0] = made.sums[sample, z]
            own.plane_back()
            there = self._out[sample, channel, z]
            np.add(own.rows[: frame.made[1], outputs_x], self._biases[channel], out=there)
            if conv.relu:
                np.maximum(there, 0, out=there)

        self._share(share, kernel, frame.fan_in)
        self._share(share, block, frame.blocks)
        self._share(share, plane, frame.batch * frame.made[0])
        self._channels.append(made)

    def _share(self, share: Share, work: Callable[[_Passes, int], None], items: int) -> None:
        def some(first: int, last: int) -> None:
            own = self._passes.pop()  # there is one for every thread
            for item in range(first, last):
                work(own, item)
            self._passes.append(own)

        share(some, items)

    def _passes_of(
        self, rows: Spectrum, planes: Spectrum, block: Spectrum, sums: Spectrum
    ) -> _Passes:
        frame = self._frame
        real = rows.view(np.float32)[:, : frame.size[2]]
        _, (y0, y1), _ = frame.inside
        taps = real[: prod(frame.kernel[:2])].reshape(*frame.kernel[:2], -1)
        made = planes[0, frame.outputs[1]]
        image, image_y, kernel, kernel_y, z, z_back, y_back, x_back = transforms(
            [
                Pass(real[: y1 - y0], planes[0, y0:y1], 1),
                Pass(planes[0], planes[0], 0),
                Pass(taps, planes[:, frame.taps[1]], 2),
                Pass(planes, planes, 1),
                Pass(block, block, 1),
                Pass(sums, sums, 2, backward=True),
                Pass(planes[0], planes[0], 0, backward=True),
                Pass(made, real[: frame.made[1]], 1, backward=True),
            ]
        )
        return _Passes(
            *(real, planes, block, sums),
            image_plane=_one_after_another(image, image_y),
            kernel_planes=_one_after_another(kernel, kernel_y),
            columns=z,
            columns_back=z_back,
            plane_back=_one_after_another(y_back, x_back),
        )


def _steps(counts: Size, steps: Size) -> tuple[slice, ...]:
    """So many along each axis, so far apart."""
    return tuple(
        slice(0, (count - 1) * step + 1, step) for count, step in zip(counts, steps, strict=True)
    )


def _one_after_another(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def spectra_bytes(shapes: Shapes) -> int:
    """Memory of arrays of complex numbers, each beginning a cache line."""
    return sum(round_up(_COMPLEX_BYTES * prod(shape), VECTOR_BYTES) for shape in shapes)


def cut(memory: Bytes, shapes: Shapes) -> Iterator[Spectrum]:
    """Those arrays, one after another in memory."""
    first = 0
    for shape in shapes:
        nbytes = _COMPLEX_BYTES * prod(shape)
        yield memory[first : first + nbytes].view(np.complex64).reshape(shape)
        first += round_up(nbytes, VECTOR_BYTES)
