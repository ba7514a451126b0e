"""How the axes of an ONNX value lie over the axes of a layer's output.

Layers compute arrays (batch, channel, z, y, x). ONNX graphs flatten, split, merge and permute
axes in between, mostly in ways that cancel. So a value is a layer's output together with a
*layout*: for every axis of the value the pieces of the layer's axes that it is made of, outermost
first. Reshape, Transpose, Squeeze … only change the layout; `settled` says what is left to do to
bring a value back into the layers' order.

Sizes are known for a few *probes*, sizes of the volume that the graph is read for all at once:
what comes out equal for all of them does not depend on the size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from znni_dask.importers.onnx.tensors import held
from znni_dask.network.window import LARGEST

SPACE = ("z", "y", "x")
Lengths = tuple[int, ...]  # of one axis, for every probe


class LayoutError(ValueError):
    """Axes are rearranged in a way that has no meaning for layers."""


@dataclass(frozen=True)
class Piece:
    """A piece of one axis of a layer's output: ``kind`` is n, c, z, y or x. Of an axis that was
    split, ``stride`` is the distance of the piece's neighbours in the whole axis; of channels
    that are only repeated it is 0."""

    kind: str
    lengths: Lengths
    stride: int = 1

    @property
    def length(self) -> int:
        """The length, where it does not depend on the probe."""
        return self.lengths[0]

    @property
    def single(self) -> bool:
        """Whether the piece has one element, for every probe."""
        return set(self.lengths) == {1}


Axis = tuple[Piece, ...]


@dataclass(frozen=True)
class Value:
    """The output of a layer, its axes laid out as ``axes``."""

    layer: str
    axes: tuple[Axis, ...]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.axes)

    def lengths(self, axis: int, probes: int) -> Lengths:
        """Length of an axis for every probe."""
        return _product([piece.lengths for piece in self.axes[axis]], probes)

    def pieces(self, kind: str) -> list[Piece]:
        """All pieces of one kind, in order, those of one element left out."""
        return [p for axis in self.axes for p in axis if p.kind == kind and not p.single]

    def kinds(self) -> tuple[str, ...]:
        """What each axis stands for: what lies on it, where that tells all axes apart; else batch
        and channels come first, and axes without pieces go by their place among the others."""
        told = ["".join({p.kind for p in axis}) for axis in self.axes]
        if all(len(kind) == 1 for kind in told) and len(set(told)) == self.rank:
            return tuple(told)
        spatial = [
            next((p.kind for p in axis if p.kind in SPACE), None) if index > 1 else None
            for index, axis in enumerate(self.axes)
        ]
        free = [
            kind
            for kind in (SPACE[-(self.rank - 2) :] if self.rank > 2 else ())
            if kind not in spatial and not self.pieces(kind)
        ]
        named = [
            kind or (free.pop(0) if index > 1 and free else "")
            for index, kind in enumerate(spatial)
        ]
        return tuple(["n", "c", *named[2:]][: self.rank])

    def kinds_of(self, axis: int) -> set[str]:
        """The kinds that lie on an axis."""
        return {p.kind for p in self.axes[axis] if not p.single}

    def permuted(self, order: Sequence[int]) -> Value:
        """The axes in another order."""
        if sorted(order) != list(range(self.rank)):
            raise LayoutError(f"axes {list(order)} are no order of {self.rank}")
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def reshaped(self, target: Sequence[Lengths]) -> Value:
        """The axes split and merged so that they have the lengths ``target``."""
        waiting = [piece for axis in self.axes for piece in axis]
        axes = []
        for wanted in target:
            axis, waiting = _take(waiting, wanted)
            axes.append(_merged(axis))
        if any(not piece.single for piece in waiting):
            raise LayoutError("reshaping to another number of elements")
        if waiting and axes:
            axes[-1] = _merged([*axes[-1], *waiting])
        return replace(self, axes=tuple(axes))


@dataclass(frozen=True)
class Settling:
    """What brings a value's axes into the order of layers.

    First ``subsample`` (a factor per axis z, y, x) moves voxels into channels, then ``channels``
    is the order in which channels are taken, then ``spread`` moves channels into voxels, then
    every voxel is taken ``repeat`` times.
    """

    subsample: tuple[int, int, int] = (1, 1, 1)
    channels: tuple[int, ...] | None = None
    spread: tuple[int, int, int] = (1, 1, 1)
    repeat: tuple[int, int, int] = (1, 1, 1)


def settling(value: Value, channels: int) -> Settling:
    """How to settle ``value``; raises `LayoutError` where it cannot be."""
    value, repeat = _unrepeated(value)
    home: dict[str, int] = {}
    for index, axis in enumerate(value.axes):
        for piece in axis:
            if piece.kind not in SPACE or piece.single or piece.stride < _outermost(value, piece):
                continue
            if home.setdefault(piece.kind, index) != index:
                raise LayoutError(f"the axis {piece.kind} is split over several axes")
    beside = [i for i in home.values() if list(home.values()).count(i) > 1]
    if beside:
        kinds = sorted(k for k, i in home.items() if i in beside)
        raise LayoutError(f"the axes {', '.join(kinds)} are merged into one")
    subsample = _subsampling(value, home)
    inner = [i for i in home.values() if any(p.kind == "c" for p in value.axes[i])]
    order: list[Piece] = [
        p
        for index, axis in enumerate(value.axes)
        if index not in inner
        for p in axis
        if not p.single and (p.kind == "c" or (p.kind in SPACE and index != home.get(p.kind)))
    ]
    spread = [1, 1, 1]
    for axis_index, kind in enumerate(SPACE):
        if home.get(kind) in inner:
            pieces = [p for p in value.axes[home[kind]] if not p.single]
            if pieces[0].kind != kind or any(p.kind != "c" for p in pieces[1:]):
                raise LayoutError(f"channels lie before the axis {kind}")
            spread[axis_index] = prod(p.length for p in pieces[1:])
            order += pieces[1:]
    z, y, x = spread
    return Settling(subsample, _channel_order(order, channels, subsample), (z, y, x), repeat)


def _unrepeated(value: Value) -> tuple[Value, tuple[int, int, int]]:
    """The value without what only repeats the voxels before it, and how often it repeats them."""
    axes, repeat = [], dict.fromkeys(SPACE, 1)
    for axis in value.axes:
        kept = list(axis)
        kind = next((p.kind for p in kept if p.kind in SPACE), None)
        while kind and len(kept) > 1 and kept[-1].kind == "c" and kept[-1].stride == 0:
            repeat[kind] *= kept.pop().length
        axes.append(tuple(kept))
    return Value(value.layer, tuple(axes)), (repeat["z"], repeat["y"], repeat["x"])


def _outermost(value: Value, piece: Piece) -> int:
    return max(p.stride for p in value.pieces(piece.kind))


def _subsampling(value: Value, home: dict[str, int]) -> tuple[int, int, int]:
    """By which factor each axis of space was split, its inner piece now among the channels."""
    factors = []
    for kind in SPACE:
        pieces = value.pieces(kind)
        inner = [p for p in pieces if p.stride != max(q.stride for q in pieces)]
        if len(inner) > 1 or any(p in value.axes[home[kind]] for p in inner):
            raise LayoutError(f"the axis {kind} is split")
        factors.append(inner[0].length if inner else 1)
    z, y, x = factors
    return z, y, x


def _channel_order(
    order: list[Piece], channels: int, subsample: tuple[int, int, int]
) -> tuple[int, ...] | None:
    """The source of every channel of ``order``, where channels that were made by subsampling
    count as ((c · fz + i) · fy + j) · fx + k; None where nothing moves."""
    strides = {"c": prod(subsample), "z": subsample[1] * subsample[2], "y": subsample[2], "x": 1}
    total = channels * prod(subsample)
    if total > LARGEST or prod(piece.length for piece in order) != total:
        raise LayoutError(f"{total} channels do not lie together, or are too many")
    index = np.zeros((), np.int64)
    for piece in order:
        steps = np.arange(piece.length) * piece.stride * strides[piece.kind]
        index = index[..., None] + steps
    found, whole = index.ravel(), np.arange(total)
    if np.array_equal(found, whole):
        return None
    if not np.array_equal(np.sort(found), whole):
        raise LayoutError("the channels lie on several axes")
    return tuple(found.tolist())


def per_channel(constant: NDArray[np.generic], value: Value, channels: int) -> NDArray[np.float64]:
    """A constant that is combined with ``value`` element by element, as one number per channel.

    Raises `LayoutError` where it varies over space or has axes that the value lacks.
    """
    index: list[NDArray[np.int64] | int] = []
    numbers = np.arange(channels)
    for i, length in enumerate(constant.shape):
        axis = value.axes[i - constant.ndim] if constant.ndim - i <= value.rank else ()
        pieces = [p for p in axis if not p.single]
        if length == 1:
            index.append(0)
            continue
        if any(p.kind != "c" for p in pieces) or prod(p.length for p in pieces) != length:
            raise LayoutError(
                f"a constant of shape {list(constant.shape)} does not go by channels ({channels})"
            )
        place = np.zeros(channels, np.int64)
        for piece in pieces:
            place = place * piece.length + numbers // piece.stride % piece.length
        index.append(place)
    return np.broadcast_to(constant[tuple(index)].astype(np.float64), (channels,))


def channels_over(narrow: Value, wide: Value, channels: int) -> tuple[int, ...] | None:
    """For each of the ``channels`` of ``wide`` the channel of ``narrow`` that is combined with it
    element by element; None where their axes do not match."""
    found, numbers = np.zeros(channels, np.int64), np.arange(channels)
    for mine, other in zip(narrow.axes[::-1], wide.axes[::-1], strict=False):
        own = [p for p in mine if p.kind == "c" and not p.single]
        over = [p for p in other if not p.single]
        if not own:
            continue
        left = prod(p.length for p in own)
        if any(p.kind != "c" for p in over) or prod(p.length for p in over) != left:
            return None
        place = np.zeros(channels, np.int64)
        for piece in over:
            place = place * piece.length + numbers // piece.stride % piece.length
        for piece in own:
            left //= piece.length
            found += place // left % piece.length * piece.stride
    return tuple(found.tolist())


def squeezed(
    constant: NDArray[np.generic], value: Value, lengths: Sequence[int]
) -> NDArray[np.generic]:
    """A constant that is combined with ``value``, one element long where it is the same all along
    an axis of space of the value, whose axes have ``lengths``."""
    for i in range(constant.ndim):
        axis = i - constant.ndim + value.rank
        if axis < 0 or constant.shape[i] != lengths[axis] or value.kinds_of(axis) == {"c"}:
            continue
        first, core = constant[(slice(None),) * i + (slice(0, 1),)], held(constant)
        if constant.strides[i] == 0 or bool((core == held(first)).all()):
            constant = first
    return constant


def _take(waiting: list[Piece], wanted: Lengths) -> tuple[list[Piece], list[Piece]]:
    """The first pieces that make up an axis of length ``wanted``, and the rest."""
    if set(wanted) == {1}:
        if waiting and waiting[0].single:
            return waiting[:1], waiting[1:]
        return [], waiting
    taken: list[Piece] = []
    left = wanted
    while set(left) != {1}:
        if not waiting:
            raise LayoutError("reshaping to another number of elements")
        piece, waiting = waiting[0], waiting[1:]
        if all(a % b == 0 for a, b in zip(left, piece.lengths, strict=True)):
            taken.append(piece)
            left = tuple(a // b for a, b in zip(left, piece.lengths, strict=True))
            continue
        if any(b % a for a, b in zip(left, piece.lengths, strict=True)):
            raise LayoutError("an axis is split into parts that are not whole")
        inner = tuple(b // a for a, b in zip(left, piece.lengths, strict=True))
        if len(set(inner)) > 1:
            raise LayoutError(f"the axis {piece.kind} is split in a way that depends on the size")
        taken.append(Piece(piece.kind, left, piece.stride * inner[0]))
        waiting = [Piece(piece.kind, inner, piece.stride), *waiting]
        left = (1,) * len(wanted)
    return taken, waiting


def _merged(axis: Iterable[Piece]) -> Axis:
    """Pieces that were split and lie side by side again, as one."""
    found: list[Piece] = []
    for piece in axis:
        last = found[-1] if found else None
        whole = len(set(piece.lengths)) == 1
        if (
            last
            and last.kind == piece.kind
            and whole
            and last.stride == piece.stride * piece.length
        ):
            lengths = tuple(a * piece.length for a in last.lengths)
            found[-1] = Piece(piece.kind, lengths, piece.stride)
        else:
            found.append(piece)
    return tuple(found)


def _product(lengths: Sequence[Lengths], probes: int) -> Lengths:
    return tuple(prod(one[i] for one in lengths) for i in range(probes))
