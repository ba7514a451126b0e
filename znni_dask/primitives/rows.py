"""Direct convolution in rows of outputs: passes of the compiled functions of `kernels.rows`.

A pass makes some of the channels, or some of the voxels, of an output. Passes that read the same
input take turns, a few rows at a time, so that these are read from the caches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import Size, ceil_divide
from znni_dask.kernels import rows
from znni_dask.kernels.axes import Axis, Lanes, Rows, Strides, flat
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.compiled import Compiled
from znni_dask.kernels.memory import allocate, allocated_bytes
from znni_dask.kernels.team import Team
from znni_dask.kernels.turns import TAKE, Turn, turns_library
from znni_dask.network.layers import Conv, Layer
from znni_dask.primitives.base import (
    ITEM_BYTES,
    Array,
    Form,
    Primitive,
    Problem,
    Shape,
    direct_flops,
    weights_bytes,
)
from znni_dask.primitives.work import MEMORY, Rate, Work

PASS_BYTES = 2 << 10  # what a pass holds beside arrays
PART_BYTES = 40 << 10  # of weights that stay in the first-level cache
SHARED_BYTES = 1 << 18  # of input that passes take turns on
VOXELS_TOGETHER = 128  # whose sums take parts of the taps in turn, where a row has fewer
PIECES_PER_THREAD = 8
_ALONE = Axis(1, 1, 1, 0, 1, 1)


class Place(NamedTuple):
    """Where an array lies."""

    address: int
    strides: Strides[int]

    @classmethod
    def of(cls, array: Array) -> Place:
        """Where an array in either form lies."""
        batch, block, z, y, x, *lane = array.strides
        if lane:
            return cls(array.ctypes.data, Strides(batch, block, z, y, x, *lane))
        return cls(array.ctypes.data, Strides(batch, LANES * block, z, y, x, block))

    def every(self, steps: Size, first: Size) -> Place:
        """Every so many-th voxel (z, y, x), from a first one on."""
        _, _, *strides, _ = self.strides
        moved = self.on(sum(s * n for s, n in zip(strides, first, strict=True)))
        z, y, x = (s * n for s, n in zip(strides, steps, strict=True))
        return moved._replace(strides=self.strides._replace(z=z, y=y, x=x))

    def on(self, nbytes: int) -> Place:
        """The same so many bytes further on."""
        return self._replace(address=self.address + nbytes)


class Part(NamedTuple):
    """Some output blocks (outputs, where lanes are input channels): their weights in the order in
    which they are read, and their biases."""

    made: int
    weights: Array
    biases: Array


class Told(NamedTuple):
    """What compiled code is told of a pass wherever its arrays lie: the same from patch to patch.

    ``planes_items`` are the items of a sample, ``item_bytes`` of the input of one; ``together``
    take parts of the taps in turn.
    """

    numbers: NDArray[np.int64]
    planes_items: int
    item_bytes: int
    together: int

    @classmethod
    @lru_cache(maxsize=1 << 12)
    def of(
        cls,
        lanes: Lanes,
        made: int,
        axes: tuple[Axis[int], ...],
        source: Strides[int],
        out: Strides[int],
        channels: int,
        relu: bool,
    ) -> Told:
        """Of so many output blocks, or outputs, at once."""
        needed = [_needed(axis) for axis in axes]
        kept = [axis.taps for axis in axes]
        apart = [prod(kept[number + 1 :]) for number in range(3)]
        first = sum(skipped * step for (skipped, _), step in zip(needed, apart, strict=True))
        z, y, x = _joined([axis for _, axis in needed], source, out)
        parts = _at_once(lanes, made, channels, (z.taps, y.taps, x.taps))
        together = max(1, VOXELS_TOGETHER // max(1, x.outputs))
        tap_bytes = VECTOR_BYTES * made * (min(channels, LANES) if lanes is Lanes.OUTPUTS else 1)
        ahead = prod(parts) * x.taps * tap_bytes if together > 1 else 0
        whole = Rows(
            *(z, y, x, source, out),
            *(channels, *_inside(x), prod(kept), first, *apart, *parts, together, ahead, int(relu)),
        )
        begin, end = _inside(y)
        columns = whole.turned._replace(begin=begin, end=end)
        numbers = np.array(flat(whole) + flat(columns), np.int64)
        return cls(numbers, z.outputs * y.outputs, channels * x.size * ITEM_BYTES, together)


class Pass(NamedTuple):
    """Items (batch, z, y) of some output blocks (outputs, where lanes are input channels)."""

    lanes: Lanes
    part: Part
    told: Told
    source: int
    out: int
    items: int

    @classmethod
    def of(
        cls,
        lanes: Lanes,
        part: Part,
        axes: Sequence[Axis[int]],
        batch: int,
        channels: int,
        source: Place,
        out: Place,
        relu: bool = False,
    ) -> Pass:
        """The pass for so many channels of input; ``axes`` are z, y and x."""
        strides = source.strides, out.strides
        told = Told.of(lanes, part.made, tuple(axes), *strides, channels, relu)
        return cls(lanes, part, told, source.address, out.address, batch * told.planes_items)

    @property
    def turn(self) -> Turn:
        """It as compiled code is told it."""
        return Turn(
            self._function.address,
            self.told.numbers.ctypes.data,
            self.source,
            self.part.weights.ctypes.data,
            self.part.biases.ctypes.data,
            self.out,
            self.items,
        )

    def run(self, first: int, last: int) -> None:
        """Compute some items, in this thread."""
        _, *addresses, _ = self.turn
        self._function(*addresses, first, last)

    @property
    def _function(self) -> Compiled:
        return rows.rows_library(self.lanes, self.part.made)[rows.CONVOLVE]


class InRows(Primitive):
    """Abstract: a convolution that is passes over the rows of its output, of which operations are
    done at some ``rate``."""

    rate: ClassVar[Rate]

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        return work_of(self.rate, problem, lanes=problem.output)

    @abstractmethod
    def count(self, layer: Layer) -> int:
        """How many passes there are at most."""

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        return PASS_BYTES * self.count(problem.layer)

    @abstractmethod
    def passes(self, prepared: Any, problem: Problem, source: Place, out: Place) -> Iterator[Pass]:
        """Those that make the output; neighbours of the same source take turns."""

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        passes = self.passes(prepared, problem, Place.of(inputs[0]), Place.of(out))
        for _, turns in groupby(passes, key=lambda one: one.source):
            share(list(turns), team)


def work_of(rate: Rate, problem: Problem, lanes: Shape, wasted: float = 1) -> Work:
    """What direct convolution takes, whose vectors are channels of an array of the shape ``lanes``,
    and that is ``wasted`` times more than needed."""
    wasted *= prod(Form.BLOCKED.stored(lanes)) / prod(lanes)
    if isinstance(problem.layer, Conv):
        wasted *= _share_inside(problem.layer, problem)
    arrays = Form.BLOCKED.nbytes(problem.inputs[0]) + Form.BLOCKED.nbytes(problem.output)
    moved = arrays + weights_bytes(problem.layer)
    return Work({rate: wasted * direct_flops(problem)}, {MEMORY: moved})


def passes_into(
    parts: Sequence[Part],
    lanes: Lanes,
    axes: Sequence[Axis[int]],
    shape: Sequence[int],
    source: Place,
    out: Place,
    relu: bool = False,
) -> Iterator[Pass]:
    """Passes over an input of a shape (batch, channels, ...) that make parts one after another."""
    batch, channels, *_ = shape
    for part in parts:
        yield Pass.of(lanes, part, axes, batch, channels, source, out, relu)
        out = out.on(part.made * out.strides.block)


def products(
    parts: Sequence[Part],
    count: int,
    channels: int,
    source: Place,
    out: Place,
    relu: bool = False,
) -> list[Pass]:
    """Products of matrices: of so many rows of numbers, as voxels of so many channels, with each
    part, whose kernels are one voxel."""
    axes = (_ALONE, _ALONE, Axis(count, 1, 1, 0, count, 1))
    return list(passes_into(parts, Lanes.OUTPUTS, axes, (1, channels), source, out, relu))


def share(passes: Sequence[Pass], team: Team) -> None:
    """Run passes over the same input: some rows of it by one after the other, while they are near;
    so many that sums take parts of the taps together, and that there is work for all threads."""
    items = max(one.items for one in passes)
    size = ceil_divide(items, PIECES_PER_THREAD * team.threads)
    if len(passes) > 1:
        size = min(size, max(1, SHARED_BYTES // max(one.told.item_bytes for one in passes)))
    size = max(size, *(one.told.together for one in passes))
    turns = np.array([one.turn for one in passes], np.int64)
    told = turns.ctypes.data, len(passes), items, size
    team.run(turns_library()[TAKE], told, ceil_divide(items, size) * len(passes))


def axes_of(problem: Problem, conv: Conv) -> list[Axis[int]]:
    """The axes of a convolution."""
    return [
        Axis(
            problem.output[2 + axis],
            conv.stride[axis],
            conv.dilation[axis],
            problem.offsets[0][axis],
            problem.inputs[0][2 + axis],
            conv.kernel[axis],
        )
        for axis in range(3)
    ]


def equal_parts(count: int, most: int) -> list[int]:
    """``count`` in as few parts of at most ``most`` as there can be, as equal as may be."""
    parts = ceil_divide(count, most)
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


def blocks_at_once(outputs: int) -> list[int]:
    """The blocks of so many output channels, those together that are computed at once."""
    return equal_parts(ceil_divide(outputs, LANES), rows.most_at_once(Lanes.OUTPUTS))


def kept(arrays: Iterable[Array]) -> Array:
    """Arrays one after the other, aligned."""
    flat = [np.ravel(array) for array in arrays]
    memory = allocate(ITEM_BYTES * sum(array.size for array in flat)).view(np.float32)
    return np.concatenate(flat, out=memory)


def kept_bytes(sizes: Sequence[int]) -> int:
    """Memory of `kept` arrays of so many bytes, and what each is made of."""
    return sum(map(allocated_bytes, sizes)) + 2 * max(sizes)


def padded(array: Array, count: int) -> Array:
    """An array with zeros after it along its first axis, to ``count``."""
    found = np.zeros((count, *array.shape[1:]), np.float32)
    found[: len(array)] = array
    return found


def dense_parts(weight: Array, bias: Array | None) -> list[Part]:
    """Of weights (output channel, channel, z, y, x): parts of whole blocks of output channels."""
    found, begin = [], 0
    for made in blocks_at_once(len(weight)):
        part = slice(begin * LANES, (begin + made) * LANES)
        begin += made
        outputs = padded(weight[part], made * LANES)
        pieces = (
            outputs[:, first : first + LANES].transpose(2, 3, 4, 1, 0)
            for first in range(0, weight.shape[1], LANES)
        )
        biases = np.zeros(0, np.float32) if bias is None else bias[part]
        found.append(Part(made, kept(pieces), kept([padded(biases, made * LANES)])))
    return found


def dense_count(outputs: int) -> int:
    """How many `dense_parts` there are."""
    return ceil_divide(ceil_divide(outputs, LANES), rows.most_at_once(Lanes.OUTPUTS))


def dense_bytes(outputs: int, fan_ins: Sequence[int]) -> int:
    """Memory of `dense_parts` of some convolutions to so many output channels, each with so many
    weights, and of what they are made of."""
    made = blocks_at_once(outputs)
    biases = [VECTOR_BYTES * blocks for blocks in made]
    weights = [size * fan_in for size in biases for fan_in in fan_ins]
    return len(fan_ins) * sum(map(allocated_bytes, biases)) + kept_bytes(weights)


def _share_inside(conv: Conv, problem: Problem) -> float:
    """Of all products those behind which is not only padding: the others are left out."""
    share = 1.0
    for axis in axes_of(problem, conv):
        inside = 0
        for tap in range(axis.taps):
            first = axis.offset + tap * axis.dilation
            end = ceil_divide(axis.size - first, axis.stride)
            inside += max(0, min(end, axis.outputs) - max(0, ceil_divide(-first, axis.stride)))
        share *= inside / (axis.taps * axis.outputs)
    return share


def _needed(axis: Axis[int]) -> tuple[int, Axis[int]]:
    """How many taps of an axis are skipped, as only padding is behind them, and the axis of the
    others; those at its end are left out, too."""
    last = axis.offset + (axis.outputs - 1) * axis.stride
    behind = [
        t
        for t in range(axis.taps)
        if axis.offset + t * axis.dilation < axis.size and last + t * axis.dilation >= 0
    ]
    if not behind:
        return 0, axis._replace(taps=0)
    offset = axis.offset + behind[0] * axis.dilation
    return behind[0], axis._replace(offset=offset, taps=len(behind))


def _joined(
    axes: Sequence[Axis[int]], source: Strides[int], out: Strides[int]
) -> tuple[Axis[int], Axis[int], Axis[int]]:
    """The axes, rows that simply follow one another being one."""
    z, y, x = axes
    plain = all(a == Axis(a.size, 1, a.dilation, 0, a.size, 1) for a in (y, x))
    follow = source.y == x.size * source.x and out.y == x.outputs * out.x
    if not (plain and follow):
        return z, y, x
    length = y.size * x.size
    return z, _ALONE, Axis(length, 1, 1, 0, length, 1)


def _inside(x: Axis[int]) -> tuple[int, int]:
    """First and end of the outputs that no padding reaches."""
    if not x.taps:
        return 0, x.outputs
    begin = min(ceil_divide(max(0, -x.offset), x.stride), x.outputs)
    room = x.size - (x.taps - 1) * x.dilation - 1 - x.offset  # for the last start
    return begin, max(begin, min(x.outputs, room // x.stride + 1))


def _at_once(
    lanes: Lanes, made: int, channels: int, taps: tuple[int, int, int]
) -> tuple[int, int, int]:
    """How many blocks of channels, taps along z and taps along y have weights that stay near."""
    vectors = taps[2] * made * (min(channels, LANES) if lanes is Lanes.OUTPUTS else 1)
    left = PART_BYTES // max(1, vectors * VECTOR_BYTES)
    y = max(1, min(left, taps[1]))
    z = max(1, min(left // y, taps[0]))
    whole = y >= taps[1] and z >= taps[0]
    return max(1, left // (y * z)) if whole else 1, z, y
