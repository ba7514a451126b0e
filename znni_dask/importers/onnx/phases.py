"""Axes of space taken apart into phases that lie in the batch: how TensorFlow writes dilation.

Every ``steps``-th voxel from every offset is an image of its own there. A window that slides over
these images is a window over the whole with its taps ``steps`` times as far apart.
"""

from __future__ import annotations

from dataclasses import replace

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx.layouts import SPACE, Axis, LayoutError, Piece, Value


def steps_of(value: Value) -> Size:
    """Into how many phases each axis (z, y, x) is taken apart, their numbers lying on the first
    axis of ``value``; raises `LayoutError` where they lie in other ways."""
    found = dict.fromkeys(SPACE, 1)
    for piece in value.axes[0]:
        if piece.kind not in SPACE or piece.single:
            continue
        outer = [p for axis in value.axes[1:] for p in axis if p.kind == piece.kind]
        if piece.stride != 1 or [p.stride for p in outer] != [piece.length]:
            raise LayoutError(f"the axis {piece.kind} lies in the batch")
        found[piece.kind] = piece.length
    return triple(found[kind] for kind in SPACE)


def together(value: Value, steps: Size) -> Value:
    """The value with its phases put together."""
    batch = tuple(p for p in value.axes[0] if p.kind not in SPACE)
    return replace(value, axes=(batch, *(_put(axis, steps) for axis in value.axes[1:])))


def _put(axis: Axis, steps: Size) -> Axis:
    factors = dict(zip(SPACE, steps, strict=True))
    return tuple(
        Piece(p.kind, tuple(n * p.stride for n in p.lengths)) if factors.get(p.kind, 1) > 1 else p
        for p in axis
    )


def apart(value: Value, like: Value, steps: Size) -> Value:
    """What was made of `together`, its axes taken apart again as those of ``like``."""
    factors = dict(zip(SPACE, steps, strict=True))
    axes: list[Axis] = [like.axes[0]]
    for axis in value.axes[1:]:
        pieces = []
        for piece in axis:
            step = factors.get(piece.kind, 1)
            if any(n % step for n in piece.lengths):
                raise LayoutError(f"the phases of the axis {piece.kind} are of different lengths")
            pieces.append(Piece(piece.kind, tuple(n // step for n in piece.lengths), step))
        axes.append(tuple(pieces))
    return replace(value, axes=tuple(axes))
