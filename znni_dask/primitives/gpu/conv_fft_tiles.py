"""Convolution on a GPU by Fourier transforms of small tiles.

Overlap-save, as on the CPU (`primitives.conv_fft_tiles`). One kernel reads tiles straight from the
input, what lies outside being padding, and writes their spectra; cuBLAS multiplies them with the
kernels' spectra, frequency by frequency; another kernel transforms the products back, with bias and
activation, into the output. Tiles are *rows* of the matrices that are multiplied, and come in
batches, so that what lies in between stays within `WORKSPACE_BYTES`.

Of a tile of n³ voxels there are n²(n/2 + 1) / (n - k + 1)³ frequencies for each output. A frequency
takes 8 f f' operations, and 8 (f + f') bytes that are written and read again; the kernels' spectra,
8 f f' bytes, are read once for every batch. With 80 channels, k = 5 and n = 24 an output of all
channels takes 0.94 frequencies: 48 thousand operations and 2.4 KB, besides 0.9 KB of input and
output. The sum itself has 1.6 million operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf, log2, prod
from typing import Any, ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.devices.base import ALIGN, Device
from znni_dask.geometry import Size, ceil_divide, round_up, triple, volume
from znni_dask.kernels.codelets import LONGEST, operations, refusal
from znni_dask.kernels.cuda.layouts import PAIR_BYTES, GpuTile, Rows
from znni_dask.kernels.cuda.tiles import blocks, forward_kernel, inverse_kernel
from znni_dask.kernels.tiles import Tile
from znni_dask.machine import GPU
from znni_dask.network.layers import ONES, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import (
    ITEM_BYTES,
    DevicePrimitive,
    Problem,
    may_transform,
    weights_bytes,
)
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.gpu.rates import LAUNCHES, MEMORY, PRODUCTS, TRANSFORMS
from znni_dask.primitives.work import COMPILE_SECONDS, Work

WORKSPACE_BYTES = 1 << 30  # for spectra and products; more rows read kernels' spectra less often
_LONGEST = 32  # of tiles worth trying
_TRIED = 4  # lengths of a tile along each axis
_SMALL = (8, 12, 16, 20)  # and the least along all axes of tiles that prepare less
_BEST = 8  # tiles that take least time; of others only those that prepare so much less
_LESS, _WASTEFUL = 0.75, 3  # and take no more than so many times as long
_ORIGIN: Size = (0, 0, 0)


class Prepared(NamedTuple):
    """On the device: spectra of the kernels (frequency, channel, output channel), and biases."""

    kernels: Any
    bias: Any


@final
@dataclass(frozen=True)
class GpuTiledFFT(DevicePrimitive):
    """Convolution in tiles of ``tile`` voxels (z, y, x) on a GPU; the tile is part of its name.

    Takes any kernel, dilation and padding; no stride and no groups.
    """

    tile: Size
    layer: ClassVar[type[Layer]] = Conv
    setup_seconds: ClassVar[float] = COMPILE_SECONDS
    takes: ClassVar[str] = "no stride, groups or whole window"

    @property
    def name(self) -> str:  # type: ignore[override]
        """As on the CPU, like ``tiled fft 16·24·24``."""
        return ConvTiledFFT(self.tile).name

    @classmethod
    def of(cls, name: str) -> GpuTiledFFT | None:
        """The primitive of a name; None where it is another's."""
        found = ConvTiledFFT.of(name)
        return None if found is None or found.remade else cls(found.tile)

    @property
    def family(self) -> str:
        """All of them."""
        return f"{GPU} {ConvTiledFFT(self.tile).family}"

    def features(self, problem: Problem) -> tuple[float, ...]:
        return *super().features(problem), log2(volume(self.tile))

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.groups == 1 and conv.stride == ONES and not conv.whole

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        conv = cast("Conv", layer)
        return Tile(self.tile, conv.kernel).refusal() or self._tile(conv).refusal()

    def flops(self, problem: Problem) -> int:
        return self.work(problem, threads=1).amount(TRANSFORMS, PRODUCTS)

    def work(self, problem: Problem, threads: int) -> Work:
        """Operations of transforms (half as many of real numbers) and of products (8), and what
        goes to and from memory."""
        conv, batches = _conv(problem), self._batches(problem)
        tile, rows = batches.tile, batches.rows
        (z, y, _), (made_z, made_y, _), half = tile.size, tile.made, tile.half
        along_z, along_y, along_x = (operations(n) for n in tile.size)
        read = z * y * along_x / 2 + z * half * along_y + y * half * along_z
        made = y * half * along_z + made_z * half * along_y + made_z * made_y * along_x / 2
        channels, out_channels = conv.in_channels, conv.out_channels
        spectra = rows * (batches.spectrum_bytes + batches.product_bytes)
        kernels = batches.count * channels * batches.product_bytes
        voxels = rows * channels * volume(tile.size) + prod(problem.output)
        return Work(
            {
                TRANSFORMS: rows * (channels * read + out_channels * made),
                PRODUCTS: 8 * rows * tile.frequencies * channels * out_channels,
                MEMORY: 2 * spectra + kernels + ITEM_BYTES * voxels,
                LAUNCHES: 3 * batches.count,
            }
        )

    def prepared_bytes(self, layer: Layer) -> int:
        """Spectra, biases, and the weights, which are there meanwhile."""
        conv = cast("Conv", layer)
        return self._kernels_bytes(conv) + conv.out_channels * ITEM_BYTES + weights_bytes(conv)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return self._batches(problem).nbytes

    def placed(self, layer: Layer, weights: Weights, device: Device) -> Prepared:
        """The spectra are those of kernels as if they were tiles, conjugated, since a convolution
        is a correlation, and scaled, since no transform is."""
        conv, xp = cast("Conv", layer), device.xp
        tile, channels, made = self._tile(conv), conv.in_channels, conv.out_channels
        bias = weights["bias"] if conv.bias else np.zeros(made, np.float32)
        bias, taps = device.put(bias), device.put(weights["weight"])
        kernels = device.empty(self._kernels_bytes(conv)).view(np.complex64)
        kernels = kernels.reshape(tile.frequencies, channels, made)
        rows = Rows(ONES, ONES, ONES, tile.size, _ORIGIN)
        layout = tile.before(channels)

        def work() -> None:
            device.launch(
                forward_kernel(tile.size, layout),
                blocks(layout, made, channels),
                *(taps, kernels, channels, *conv.kernel, *rows.numbers),
                *(0, channels * made, 1, made),
            )
            xp.conjugate(kernels, out=kernels)
            xp.multiply(kernels, np.float32(1 / volume(self.tile)), out=kernels)

        device.lanes.compute.do(work).wait()
        return Prepared(kernels, bias)

    def apply(
        self,
        prepared: Prepared,
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        conv, batches = _conv(problem), self._batches(problem)
        tile, channels, made = batches.tile, conv.in_channels, conv.out_channels
        before, behind = tile.before(channels), tile.behind(made)
        forward = forward_kernel(tile.size, before)
        inverse = inverse_kernel(tile, behind, conv.relu)
        read = channels, *problem.inputs[0][2:], *batches.places(problem.offsets[0]).numbers
        written = made, *problem.output[2:], *batches.places(_ORIGIN).numbers
        memory = team.scratch(batches.nbytes)
        for first in range(0, batches.rows, batches.at_once):
            rows = min(batches.at_once, batches.rows - first)
            spectra, products = batches.matrices(memory, rows, channels, made)
            steps = rows * channels, channels, 1
            count = blocks(before, rows, channels)
            team.launch(forward, count, inputs[0], spectra, *read, first, *steps)
            team.xp.matmul(spectra, prepared.kernels, out=products)
            count = blocks(behind, rows, made)
            team.launch(inverse, count, products, prepared.bias, out, *written, first, rows)

    def _tile(self, conv: Conv) -> GpuTile:
        return GpuTile(self.tile, Tile(self.tile, conv.kernel).made)

    def _kernels_bytes(self, conv: Conv) -> int:
        """Spectra of all kernels."""
        return self._tile(conv).frequencies * conv.in_channels * conv.out_channels * PAIR_BYTES

    def _batches(self, problem: Problem) -> _Batches:
        conv = _conv(problem)
        tile, size = self._tile(conv), triple(problem.output[2:])
        tiles = triple(
            ceil_divide(ceil_divide(n, d), m)
            for n, d, m in zip(size, conv.dilation, tile.made, strict=True)
        )
        phases = triple(map(min, conv.dilation, size))
        spectrum = tile.frequencies * conv.in_channels * PAIR_BYTES
        products = tile.frequencies * conv.out_channels * PAIR_BYTES
        rows = problem.output[0] * volume(tiles) * volume(phases)
        count = ceil_divide(rows, max(1, WORKSPACE_BYTES // (spectrum + products)))
        return _Batches(
            tile=tile,
            tiles=tiles,
            phases=phases,
            step=conv.dilation,
            rows=rows,
            at_once=ceil_divide(rows, count),
            spectrum_bytes=spectrum,
            product_bytes=products,
        )


@dataclass(frozen=True)
class _Batches:
    """How many tiles there are, and how many are computed at once, all batches being alike; and
    the memory of a row of spectra and of products."""

    tile: GpuTile
    tiles: Size
    phases: Size
    step: Size
    rows: int
    at_once: int
    spectrum_bytes: int
    product_bytes: int

    @property
    def count(self) -> int:
        """Batches."""
        return ceil_divide(self.rows, self.at_once)

    @property
    def nbytes(self) -> int:
        """Memory that they are computed in."""
        return self._products_at(self.at_once) + self.at_once * self.product_bytes

    def places(self, offset: Size) -> Rows:
        """Of the tiles in an array whose first tile begins at ``offset``."""
        return Rows(self.tiles, self.phases, self.step, self.tile.made, offset)

    def matrices(self, memory: Any, rows: int, channels: int, made: int) -> tuple[Any, Any]:
        """Spectra and products of so many rows."""
        begin = self._products_at(rows)
        spectra = memory[: rows * self.spectrum_bytes].view(np.complex64)
        products = memory[begin : begin + rows * self.product_bytes].view(np.complex64)
        frequencies = self.tile.frequencies
        return (
            spectra.reshape(frequencies, rows, channels),
            products.reshape(frequencies, rows, made),
        )

    def _products_at(self, rows: int) -> int:
        return round_up(rows * self.spectrum_bytes, ALIGN)


def gpu_tiles(problem: Problem) -> Iterator[GpuTiledFFT]:
    """Tiled convolutions worth trying for a problem: those that are estimated to take least time,
    and others that are slower, but prepare less. Of few products the sum itself is faster, and
    loses less."""
    if isinstance(problem.layer, Conv) and may_transform(problem.layer):
        yield from _tried(problem)


@lru_cache(1 << 10)
def _tried(problem: Problem) -> tuple[GpuTiledFFT, ...]:
    conv, few = _conv(problem), list[GpuTiledFFT]()
    outputs = (ceil_divide(n, d) for n, d in zip(problem.output[2:], conv.dilation, strict=True))
    lengths = list(map(_lengths, outputs, conv.kernel, (False, False, True)))
    best = product(*(along[:_TRIED] for along in lengths))
    small = [triple(_shortest(along, n) for along in lengths) for n in _SMALL if all(lengths)]
    found = map(GpuTiledFFT, dict.fromkeys([*map(triple, best), *small]))
    seconds = {
        tiled: tiled.work(problem, threads=1).seconds(1)
        for tiled in found
        if tiled.refusal(conv) is None
    }
    for tiled in sorted(seconds, key=seconds.__getitem__):
        least = min((t.prepared_bytes(conv) for t in few), default=inf)
        less = tiled.prepared_bytes(conv) < _LESS * least
        if len(few) < _BEST or (less and seconds[tiled] <= _WASTEFUL * seconds[few[0]]):
            few.append(tiled)
    return tuple(few)


@lru_cache(1 << 10)
def _lengths(outputs: int, kernel: int, even: bool) -> list[int]:
    """Lengths of tiles along an axis, those first that transform fewest values."""
    if kernel == 1 and not even:
        return [1]
    needed = outputs + kernel - 1  # for one tile
    longest = LONGEST if 2 * kernel > _LONGEST else _LONGEST
    lengths = [n for n in range(kernel, longest + 1) if not (even and n % 2) and not refusal(n)]
    found = [n for n in lengths if n <= needed]
    found += lengths[len(found) : len(found) + 1]  # in one tile, most often larger than needed
    return sorted(found, key=lambda n: (n * ceil_divide(outputs, n - kernel + 1), n))


def _shortest(lengths: Sequence[int], least: int) -> int:
    """Of lengths the shortest that are not shorter than ``least``, if there are such."""
    return min((n for n in lengths if n >= least), default=max(lengths))


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)
