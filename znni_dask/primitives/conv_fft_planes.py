"""Convolution of few channels by Fourier transforms along y and x, and sums along z.

First layers of networks. With one channel in, transforms of answers are most of the work; along z
they would not pay, and without them an answer stays in a core's caches until it is whole. The
volume is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log2, prod
from typing import ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide, round_up, triple, volume
from znni_dask.kernels import planes
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.codelets import operations
from znni_dask.kernels.complex_product import PAIR_BYTES
from znni_dask.kernels.memory import Bytes, allocate, allocated_bytes
from znni_dask.kernels.team import Each, Team
from znni_dask.kernels.tiles import Tile
from znni_dask.network.layers import ONES, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import FEWEST_PRODUCTS, Array, Form, Problem, products_of
from znni_dask.primitives.planes import OfPlanes, Planes
from znni_dask.primitives.stacks import Stacks, stacks_of
from znni_dask.primitives.work import MEMORY, Rate, Work

TRANSFORMS = Rate("transforms of planes", 1.6e11)  # operations; they stay in the caches
PRODUCTS = Rate("products of planes", 2.4e11)  # operations
_NAME = "fft of planes "
MOST_CHANNELS = 16  # beyond, transforms along z pay
LONGEST_OF_PLANES = 24  # along an axis: transforms of longer lines run out of registers
SPECTRA_BYTES = 1 << 19  # of a batch of stacks, which stay in a second-level cache
TURNS = 3  # of every thread, so that none waits long for the others


class Prepared(NamedTuple):
    """Spectra of the kernels, and what rows are transformed with; biases in blocks."""

    kernels: Array
    waves: Array
    biases: Array


@final
@dataclass(frozen=True)
class ConvPlanesFFT(OfPlanes):
    """Convolution in tiles of ``tile`` voxels (y, x) on the CPU; the tile is part of its name.

    Takes any dilation and padding, kernels that sum at least 27 products; no stride, no groups, at
    most 16 channels.
    """

    tile: tuple[int, ...]
    layer: ClassVar[type[Layer]] = Conv
    takes: ClassVar[str] = "no stride, groups or whole window"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Like ``fft of planes 16·24``."""
        return f"{_NAME}{'·'.join(map(str, self.tile))}"

    @classmethod
    def of(cls, name: str) -> ConvPlanesFFT | None:
        """The primitive of a name; None where it is another's."""
        lengths = name.removeprefix(_NAME).split("·")
        if not name.startswith(_NAME) or len(lengths) != 2 or not all(map(str.isdecimal, lengths)):
            return None
        return cls(tuple(map(int, lengths)))

    @property
    def family(self) -> str:
        """All of them."""
        return _NAME.strip()

    def features(self, problem: Problem) -> tuple[float, ...]:
        return *super().features(problem), log2(prod(self.tile))

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.stride == ONES and conv.groups == 1 and not conv.whole

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        conv = cast("Conv", layer)
        if conv.in_channels > MOST_CHANNELS:
            return f"{self.name} takes at most {MOST_CHANNELS} channels, not {conv.in_channels}"
        if (products := products_of(conv)) < FEWEST_PRODUCTS:
            return (
                f"{self.name} takes sums of at least {FEWEST_PRODUCTS} products, which lose less "
                f"so, not of {products}"
            )
        return planes.refusal(self._tile(conv))

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.PLAIN, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        return self.work(problem, threads=1).amount(TRANSFORMS, PRODUCTS)

    def work(self, problem: Problem, threads: int) -> Work:
        """Operations of transforms (half as many of real numbers) and of products (8), and what
        goes to and from memory."""
        conv, stacks = _conv(problem), self._stacks(problem, threads)
        tile, blocks = stacks.tile, ceil_divide(conv.out_channels, LANES)
        _, ny, nx = tile.size
        line_y, line_x = map(operations, (ny, nx))
        read, made = (stacks.count * n for n in (stacks.planes, stacks.planes_made))
        forward = LANES * (line_y + 4 * nx * ny)  # along x by the definition
        back = LANES * (tile.half * line_y + ny * line_x / 2)
        products = 8 * LANES * tile.columns * prod((conv.in_channels, conv.kernel[0]))
        traffic = Form.BLOCKED.nbytes(problem.output) + Form.PLAIN.nbytes(problem.inputs[0])
        transforms = read * conv.in_channels * forward + made * blocks * back
        return Work({TRANSFORMS: transforms, PRODUCTS: made * blocks * products}, {MEMORY: traffic})

    def is_compiled(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return planes.planes_kept(self._tile(conv), conv.relu)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        tile = self._tile(conv)
        values = 3 * tile.columns + volume(tile.size) // tile.size[0]  # of what one is made of
        made_of = LANES * conv.in_channels * values * np.dtype(np.complex128).itemsize
        return sum(map(allocated_bytes, self._prepared_bytes(conv))) + made_of

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        stacks = self._stacks(problem, threads)
        return threads * _thread_bytes(_conv(problem), stacks) + stacks.table_bytes

    def prepare(self, layer: Layer, weights: Weights) -> Prepared:
        """Spectra of the kernels, conjugate: a network's convolution is a correlation."""
        conv = cast("Conv", layer)
        tile, (kernels_bytes, _, biases_bytes) = self._tile(conv), self._prepared_bytes(conv)
        size = tile.size[1:]
        kernels = _floats(allocate(kernels_bytes)).reshape(
            -1, tile.half, size[0], conv.in_channels, conv.kernel[0], 2, LANES
        )
        kernels[...] = 0
        for first, z in product(range(0, conv.out_channels, LANES), range(conv.kernel[0])):
            taps = weights["weight"][first : first + LANES, :, z]
            spectra = np.fft.rfft2(taps.astype(np.float64), size).conj() / prod(size)
            ordered = spectra.transpose(3, 2, 1, 0)  # from output channel, channel, y, x
            there = kernels[first // LANES, :, :, :, z]
            there[..., 0, : len(taps)], there[..., 1, : len(taps)] = ordered.real, ordered.imag
        biases = _floats(allocate(biases_bytes))
        biases[:] = 0
        if conv.bias:
            biases[: conv.out_channels] = weights["bias"]
        waves = _floats(allocate(tile.size[2] * PAIR_BYTES))
        waves[:] = planes.waves(tile.size[2]).reshape(-1)
        return Prepared(kernels, waves, biases)

    def apply_planes(
        self,
        prepared: Prepared,
        problem: Problem,
        inputs: Sequence[Planes],
        out: Planes,
        team: Team,
    ) -> None:
        conv, stacks = _conv(problem), self._stacks(problem, team.threads)
        own_bytes = _thread_bytes(conv, stacks)
        memory = Each(team.scratch(team.threads * own_bytes).ctypes.data, own_bytes)
        kernels, waves, biases = (array.ctypes.data for array in prepared)
        at_once = replace(stacks, batch=stacks.count)  # of which tables are told
        (here,), (there,) = at_once.of_input(inputs[0]), at_once.of_output(out)
        team.run(
            planes.planes_library(stacks.tile, conv.relu)[planes.CONVOLVE],
            (
                *(memory, *here.addresses, waves, *there.addresses, kernels, biases),
                *(stacks.count, stacks.batch, conv.in_channels, stacks.planes),
                *(planes.line_bytes(stacks.planes), *here.strides),
                *(ceil_divide(conv.out_channels, LANES), stacks.planes_made, *there.strides),
            ),
            ceil_divide(stacks.count, stacks.batch),
        )

    def _tile(self, conv: Conv) -> Tile:
        return Tile(triple((conv.kernel[0], *self.tile)), conv.kernel)

    def _stacks(self, problem: Problem, threads: int) -> Stacks:
        """Of so many planes, and in batches of so many, that spectra of a batch stay near a core,
        and that there are batches for several turns of all threads."""
        conv = _conv(problem)
        tile, turns = self._tile(conv), TURNS * threads
        whole = stacks_of(problem, tile, conv.dilation, problem.output[2])
        plane_bytes = conv.in_channels * tile.columns * planes.COMPLEX_BYTES
        most = max(SPECTRA_BYTES // plane_bytes - conv.kernel[0] + 1, conv.kernel[0])
        most = min(most, ceil_divide(whole.tiles, ceil_divide(turns, whole.count)))
        stacks = stacks_of(problem, tile, conv.dilation, most)
        needed = ceil_divide(stacks.count * stacks.planes * plane_bytes, SPECTRA_BYTES)
        batches = min(stacks.count, round_up(max(needed, turns), threads))
        return replace(stacks, batch=ceil_divide(stacks.count, batches))

    def _prepared_bytes(self, conv: Conv) -> tuple[int, int, int]:
        """Memory of the kernels' spectra, of waves and of biases."""
        tile, blocks = self._tile(conv), ceil_divide(conv.out_channels, LANES)
        spectra = tile.columns * conv.in_channels * conv.kernel[0] * PAIR_BYTES
        return blocks * spectra, tile.size[2] * PAIR_BYTES, blocks * VECTOR_BYTES


def _thread_bytes(conv: Conv, stacks: Stacks) -> int:
    """Memory of a thread: spectra of a batch of stacks, and what they are computed in."""
    lines = stacks.batch * conv.in_channels * stacks.tile.columns
    buffer = round_up(planes.buffer_bytes(stacks.tile), VECTOR_BYTES)
    return lines * planes.line_bytes(stacks.planes) + buffer


def _floats(memory: Bytes) -> Array:
    return memory.view(np.float32)


def _conv(problem: Problem) -> Conv:
    return cast("Conv", problem.layer)
