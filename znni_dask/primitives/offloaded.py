"""A convolution that a device computes, of arrays that the host holds.

The layer is cut into sub-layers that fit the device (Zlateski et al. 2016): some of
the batch, some of the output channels, some of the input channels, a box of the output. They go to
the device and back one after the other, each on its way while another is computed
(`znni_dask.devices.ferry`). Of a sub-layer that has not all input channels the sums are added up on
the device, so nothing is brought back that is not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from math import prod
from typing import Any, ClassVar, NamedTuple, cast

from znni_dask.devices.base import Device
from znni_dask.devices.ferry import Ferry, Load, Part
from znni_dask.geometry import Box, Size, ceil_divide, tiles, triple
from znni_dask.kernels.memory import floats
from znni_dask.machine import GPU_RAM
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import (
    ITEM_BYTES,
    Array,
    DevicePrimitive,
    Form,
    Primitive,
    Problem,
    Shape,
    weights_bytes,
)
from znni_dask.primitives.gpu.rates import BUS
from znni_dask.primitives.work import MEMORY, Work

PIECE_SECONDS = 3e-4  # in which the host hands a piece to a device and takes it back
_WORDS = " in sub-layers of "


class SubLayer(NamedTuple):
    """How large sub-layers are at most: of the batch, output and input channels, and the size of
    the output."""

    batch: int
    outputs: int
    inputs: int
    size: Size

    @classmethod
    def whole(cls, problem: Problem) -> SubLayer:
        """All of a problem."""
        (batch, inputs, *_), (_, outputs, *size) = problem.inputs[0], problem.output
        return cls(batch, outputs, inputs, triple(size))

    @property
    def smaller(self) -> Iterator[SubLayer]:
        """About half of it: the batch first, which costs nothing; then channels, of which every
        input goes there for all outputs, or space, where sub-layers overlap."""
        if self.batch > 1:
            yield self._replace(batch=ceil_divide(self.batch, 2))
            return
        if self.outputs > 1:
            yield self._replace(outputs=ceil_divide(self.outputs, 2))
        if self.inputs > 1:
            yield self._replace(inputs=ceil_divide(self.inputs, 2))
        longest = max(self.size)
        if longest > 1:
            axis = self.size.index(longest)
            halves = (ceil_divide(n, 2) if i == axis else n for i, n in enumerate(self.size))
            yield self._replace(size=triple(halves))

    def __str__(self) -> str:
        return "·".join(map(str, (*self[:3], *self.size)))


class PiecesSeconds(NamedTuple):
    """Of what is done piece by piece: at ``least``, however many pieces there are, and of ``all``
    of these."""

    least: float
    all: float


class Pieces(NamedTuple):
    """What a problem falls into: so many like ``problem``, the largest, by a primitive of a device,
    in so many ``rows``, for each of which kernels are prepared first; the bytes that all of them
    carry there, and back, and those of what is prepared."""

    primitive: DevicePrimitive
    problem: Problem
    times: int
    rows: int
    up_bytes: int
    down_bytes: int
    prepared_bytes: int

    def seconds(
        self, prepared: float, computing: float, up: float, down: float, host: float
    ) -> PiecesSeconds:
        """Where what is prepared takes so long, computing, the ways there and back, and the host
        that copies: all at the same time, but for the way there of the first piece of a row, and
        that back of the last one."""
        parts = computing, up, down, host
        longest = max(parts)
        return PiecesSeconds(
            prepared + longest,
            prepared + longest + (sum(parts) - longest) * self.rows / self.times,
        )


class Offloading(NamedTuple):
    """What a device that computes sub-layers must have room for, in bytes: what goes there and
    back, the kernels of a layer, scratch memory, and what is computed in ``beside`` that."""

    load: Load = Load()
    kernels: int = 0
    scratch: int = 0
    beside: int = 0

    @property
    def device_bytes(self) -> int:
        """All together."""
        return self.load.device_bytes + self.kernels + self.scratch + self.beside

    def or_more(self, other: Offloading) -> Offloading:
        """Enough for both, one after the other."""
        return Offloading(self.load.or_more(other.load), *map(max, self[1:], other[1:]))


@dataclass(frozen=True)
class Offloaded(Primitive):
    """Has ``inner``, a primitive of a device, compute ``sub`` layers. What `apply` is given to
    compute with is a `Ferry`."""

    inner: DevicePrimitive
    sub: SubLayer

    layer: ClassVar[type[Layer]] = Conv
    device: ClassVar[str] = GPU_RAM
    takes: ClassVar[str] = "convolutions that its device takes, of groups all at once"

    @classmethod
    def of(cls, name: str, inner: Primitive) -> Offloaded:
        """That of a name, which has sub-layers computed by ``inner``. Raises `ValueError`."""
        numbers = [int(n) for n in name.partition(_WORDS)[2].split("·")]
        batch, outputs, inputs, *size = numbers
        if min(numbers) < 1 or len(size) != 3 or not isinstance(inner, DevicePrimitive):
            raise ValueError(f"{name!r} are no sub-layers")
        return cls(inner, SubLayer(batch, outputs, inputs, triple(size)))

    @staticmethod
    def inner_name(name: str) -> str | None:
        """What computes sub-layers, by the name of the whole; None where that names no such."""
        inner, words, _ = name.partition(_WORDS)
        return inner if words else None

    @property
    def name(self) -> str:  # type: ignore[override]
        """By which `table.named` finds it."""
        return f"{self.inner.name}{_WORDS}{self.sub}"

    @property
    def family(self) -> str:
        return self.inner.family

    def fits(self, layer: Layer) -> bool:
        """Whether the device takes the layer, and all its sub-layers."""
        return _takes(self.inner, cast("Conv", layer), self.sub.outputs, self.sub.inputs)

    def flops(self, problem: Problem) -> int:
        return self._count(problem) * self.inner.flops(self._largest(problem))

    def work(self, problem: Problem, threads: int) -> Work:
        """By the rates that nothing has scaled; `Costs.pieces_seconds` knows better."""
        pieces = self.pieces(problem)
        computing = pieces.times * self.inner.work(pieces.problem, 1).seconds(1)
        up, down = pieces.up_bytes / BUS.per_second, pieces.down_bytes / BUS.per_second
        host = Work({MEMORY: 2 * (pieces.up_bytes + pieces.down_bytes)}).seconds(threads)
        host += PIECE_SECONDS * pieces.times
        kernels = pieces.prepared_bytes / BUS.per_second
        return Work({}, alone=pieces.seconds(kernels, computing, up, down, host).all)

    def pieces(self, problem: Problem) -> Pieces:
        """What a problem falls into; kernels are prepared anew for every problem."""
        conv, largest = cast("Conv", problem.layer), self._largest(problem)
        count = self._count(problem)
        return Pieces(
            self.inner,
            largest,
            count,
            ceil_divide(conv.out_channels, self.sub.outputs),
            up_bytes=ITEM_BYTES * count * prod(largest.inputs[0]),
            down_bytes=ITEM_BYTES * prod(problem.output),
            prepared_bytes=self.inner.prepared_bytes(conv) + weights_bytes(conv),
        )

    def prepared_bytes(self, layer: Layer) -> int:
        """None but the weights, which the network keeps."""
        return 0

    def needs(self, problem: Problem) -> Offloading:
        """What a device must have room for."""
        conv, largest = cast("Conv", problem.layer), self._largest(problem)
        given, made = (ITEM_BYTES * prod(shape) for shape in (largest.inputs[0], largest.output))
        several = self.sub.inputs < conv.in_channels
        outputs, *_ = _cuts(conv.out_channels, self.sub.outputs)
        first, *_ = _cuts(conv.in_channels, self.sub.inputs)
        most = self.inner.prepared_bytes(_conv(conv, outputs, first))
        kernels = ceil_divide(conv.in_channels, self.sub.inputs) * most
        scratch = self.inner.workspace_bytes(largest, 1)
        beside = scratch if self.inner.beside else 0
        return Offloading(Load(given, made, made if several else 0), kernels, scratch, beside)

    def prepare(self, layer: Layer, weights: Weights) -> Weights:
        return weights

    def apply(
        self, prepared: Weights, problem: Problem, inputs: Sequence[Array], out: Array, team: Ferry
    ) -> None:
        conv = cast("Conv", problem.layer)
        for outputs in _cuts(conv.out_channels, self.sub.outputs):
            kernels = [
                self._placed(conv, outputs, some, prepared, team)
                for some in _cuts(conv.in_channels, self.sub.inputs)
            ]
            team.carry(self._parts(problem, outputs, kernels, inputs[0], out, team.device))
            del kernels  # before there is room for the next

    def _placed(
        self, conv: Conv, outputs: slice, inputs: slice, weights: Weights, ferry: Ferry
    ) -> Any:
        own = {"weight": weights["weight"][outputs, :]}
        if conv.groups == 1:
            own["weight"] = own["weight"][:, inputs]
        cut = _conv(conv, outputs, inputs)
        if cut.bias:
            own["bias"] = weights["bias"][outputs]
        return self.inner.placed(cut, own, ferry.device)

    def _parts(
        self,
        problem: Problem,
        outputs: slice,
        kernels: Sequence[Any],
        given: Array,
        out: Array,
        device: Device,
    ) -> Iterator[Part]:
        """Those of some output channels."""
        relu = cast("Conv", problem.layer).relu
        all_inputs = [*_cuts(given.shape[1], self.sub.inputs)]

        def pieces(batch: slice, box: Box) -> Iterator[tuple[Array, Any]]:
            for number, inputs in enumerate(all_inputs):
                piece = _Piece(batch, outputs, inputs, box)
                part, (z, y, x) = self._problem(problem, piece), _behind(problem, box).slices
                last = relu and number == len(all_inputs) - 1 > 0
                work = partial(self._add, kernels[number], part, device, number > 0, last)
                yield given[batch, inputs, z, y, x], work

        for batch in _cuts(len(given), self.sub.batch):
            for box in tiles(triple(out.shape[2:]), self.sub.size):
                yield Part(out[(batch, outputs, *box.slices)], pieces(batch, box))

    def _add(
        self,
        kernels: Any,
        part: Problem,
        device: Device,
        again: bool,
        relu: bool,
        given: Any,
        made: Any,
        aside: Any,
    ) -> None:
        """Within a lane: a piece computed, and added to those before it."""
        target = made
        if again:
            target = floats(aside, part.output)
        self.inner.apply(kernels, part, [given], target, device)
        if again:
            device.xp.add(made, target, out=made)
        if relu:
            device.xp.maximum(made, 0, out=made)

    def _count(self, problem: Problem) -> int:
        """How many pieces a problem has."""
        (batch, inputs, *_), (_, outputs, *size) = problem.inputs[0], problem.output
        whole, most = (batch, outputs, inputs, *size), (*self.sub[:3], *self.sub.size)
        return prod(map(ceil_divide, whole, most))

    def _largest(self, problem: Problem) -> Problem:
        """That of the largest piece, wherever in a layer's whole output the problem lies."""
        (batch, inputs, *there), (_, outputs, *size) = problem.inputs[0], problem.output
        box = Box((0, 0, 0), triple(map(min, size, self.sub.size)))
        cuts = zip((batch, outputs, inputs), self.sub[:3], strict=True)
        b, f, g = (slice(0, min(n, most)) for n, most in cuts)
        piece = _Piece(b, f, g, box)
        seen = (
            min((n - 1) * window.stride + window.extent, most)
            for n, most, window in zip(
                box.size, there, map(problem.layer.window, range(3)), strict=True
            )
        )
        given: Shape = (_count(piece.batch), _count(piece.inputs), *triple(seen))
        return replace(self._problem(problem, piece), inputs=(given,), offsets=((0, 0, 0),))

    def _problem(self, problem: Problem, piece: _Piece) -> Problem:
        """That of a piece."""
        behind, conv = _behind(problem, piece.box), cast("Conv", problem.layer)
        strides = conv.stride
        batch, inputs = _count(piece.batch), _count(piece.inputs)
        offset = (
            o + first * s - start
            for o, first, s, start in zip(
                problem.offsets[0], piece.box.start, strides, behind.start, strict=True
            )
        )
        given: Shape = (batch, inputs, *behind.size)
        made: Shape = (batch, _count(piece.outputs), *piece.box.size)
        return replace(
            problem,
            layer=_conv(conv, piece.outputs, piece.inputs),
            inputs=(given,),
            output=made,
            offsets=(triple(offset),),
            start=triple(a + b for a, b in zip(problem.start, piece.box.start, strict=True)),
        )

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return Form.PLAIN, Form.PLAIN


class _Piece(NamedTuple):
    """A part of a problem."""

    batch: slice
    outputs: slice
    inputs: slice
    box: Box


@lru_cache(1 << 12)
def _takes(inner: DevicePrimitive, conv: Conv, outputs: int, inputs: int) -> bool:
    """Whether a primitive takes a convolution by so many channels at most."""
    if conv.groups > 1 and (outputs < conv.out_channels or inputs < conv.in_channels):
        return False
    return all(
        inner.refusal(_conv(conv, some, seen)) is None
        for some in _kinds(conv.out_channels, outputs)
        for seen in _kinds(conv.in_channels, inputs)
    )


def _conv(conv: Conv, outputs: slice, inputs: slice) -> Conv:
    """Of some channels; the first inputs bring the bias."""
    return replace(
        conv,
        in_channels=_count(inputs),
        out_channels=_count(outputs),
        bias=conv.bias and inputs.start == 0,
        relu=conv.relu and _count(inputs) == conv.in_channels,
    )


def _cuts(count: int, most: int) -> Iterator[slice]:
    for first in range(0, count, most):
        yield slice(first, min(first + most, count))


def _kinds(count: int, most: int) -> list[slice]:
    """Of the cuts those that differ: the first, others of its size, and the last."""
    cuts = [*_cuts(count, most)]
    return [cuts[0], cuts[len(cuts) // 2], cuts[-1]]


def _count(along: slice) -> int:
    return int(along.stop - along.start)


def _behind(problem: Problem, box: Box) -> Box:
    """The part of a problem's input that a box of its output sees; one voxel at least."""
    starts, stops = [], []
    for axis in range(3):
        window, n = problem.layer.window(axis), problem.inputs[0][2 + axis]
        first = problem.offsets[0][axis] + box.start[axis] * window.stride
        last = problem.offsets[0][axis] + (box.stop[axis] - 1) * window.stride + window.extent
        first = min(max(first, 0), n - 1)
        starts.append(first)
        stops.append(max(min(last, n), first + 1))
    return Box(triple(starts), triple(stops))


def offloading(problems: Iterable[tuple[Primitive, Problem]]) -> Offloading | None:
    """What a device needs for those that `Offloaded` has it compute; None where there are none."""
    needs = [p.needs(problem) for p, problem in problems if isinstance(p, Offloaded)]
    return reduce(Offloading.or_more, needs) if needs else None


def inner_of(primitives: Iterable[Primitive]) -> Iterator[DevicePrimitive]:
    """What a device computes sub-layers by."""
    return (p.inner for p in primitives if isinstance(p, Offloaded))
