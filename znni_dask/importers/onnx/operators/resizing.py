"""Resize and Upsample: by whole factors, up or down."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import onnx

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import SPACE, Lengths, Value
from znni_dask.importers.onnx.operators.attributes import attributes_of, finite, text
from znni_dask.importers.onnx.operators.axes import broadcast
from znni_dask.network import layers
from znni_dask.network.layers import ONES, Placing
from znni_dask.network.window import LARGEST

_ROUNDING = 1e-6  # of a factor that is meant to be a whole number
_OF_TENSORFLOW = "tf_half_pixel_for_nn"
_HALF = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")


def _resize(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.source(proto)
    factors = _factors(reader, proto, value, attributes)
    sizes = reader.assembly.sizes(value)
    if any(isinstance(target, tuple) for target in factors.values()):
        if not all(isinstance(target, tuple) for target in factors.values()):
            raise UnsupportedNode("resizes axes that were reduced and others at once")
        return broadcast(
            reader,
            proto,
            value,
            tuple(
                triple(
                    target[p] if isinstance(target := factors.get(k), tuple) else size[i]
                    for i, k in enumerate(SPACE)
                )
                for p, size in enumerate(sizes)
            ),
        )
    found = [Fraction(factors.get(k, 1)) for k in SPACE]  # type: ignore[arg-type]
    if max(found) > LARGEST:
        raise UnsupportedNode(f"a factor of {max(found)} is taken for a mistake")
    if any(f != 1 and min(f, 1 / f) != Fraction(1, max(f, 1 / f).numerator) for f in found):
        shown = ", ".join(str(f) for f in found)
        raise UnsupportedNode(f"the factors {shown} (z, y, x) are not whole numbers")
    up = triple(max(1, f.numerator) if f >= 1 else 1 for f in found)
    down = triple(f.denominator if f < 1 else 1 for f in found)
    placing = _placing(attributes, up != ONES and down == ONES)
    if up != ONES:
        value = reader.layer(proto, layers.Resize(up, placing), [value])
        if _by_size(proto) and reader.assembly.probes > 1:
            reader.assembly.same_size(value)
    return value if down == ONES else _shrunk(reader, proto, value, down, placing, attributes)


def _by_size(proto: onnx.NodeProto) -> bool:
    """Whether a Resize names the sizes to come out, and no factors."""
    return len(proto.input) > 3 and bool(proto.input[3])


def _placing(attributes: dict[str, Any], up: bool) -> Placing:
    """Where outputs lie among the inputs; raises `UnsupportedNode` for what has no layer."""
    mode = text(attributes.get("mode"), "nearest")
    place = text(attributes.get("coordinate_transformation_mode"), "half_pixel")
    rounding = text(attributes.get("nearest_mode"), "round_prefer_floor")
    if mode == "nearest":
        by_half = place in _HALF and rounding in ("round_prefer_floor", "round_prefer_ceil")
        if by_half or (place in ("asymmetric", _OF_TENSORFLOW) and rounding == "floor"):
            return "nearest"
        raise UnsupportedNode(
            f"mode=nearest, {place}, {rounding}: only nearest neighbours by repeating"
        )
    if mode != "linear":
        raise UnsupportedNode(f"mode={mode} is not supported, only nearest and linear")
    if place in _HALF:
        return "half_pixel"
    if place == "asymmetric":
        return "asymmetric"
    if place == "align_corners" and up:
        return "align_corners"
    raise UnsupportedNode(f"mode=linear, {place} is not supported")


def _factors(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, attributes: dict[str, Any]
) -> dict[str, Fraction | Lengths]:
    """For every axis of space its factor; of a reduced axis, which is one voxel, its length."""
    if text(attributes.get("keep_aspect_ratio_policy"), "stretch") != "stretch":
        raise UnsupportedNode("keep_aspect_ratio_policy is not supported")
    upsample = proto.op_type == "Upsample"
    scales = reader.constant(proto, 1 if upsample else 2)
    chosen = [reader.axis(value, int(a)) for a in attributes.get("axes", range(value.rank))]
    found: dict[str, Fraction | Lengths] = {}
    by_scale = scales is not None and scales.size > 0
    listed = scales.ravel().tolist() if by_scale and scales is not None else None
    targets = None if by_scale else reader.whole_numbers(proto, 3)
    if len(listed or targets or ()) != len(chosen):
        raise UnsupportedNode(f"{len(listed or targets or ())} numbers for {len(chosen)} axes")
    for place, axis in enumerate(chosen):
        have = reader.assembly.lengths(value, axis)
        if listed is not None:
            scale = finite(listed[place], "its scale")
            ratio = Fraction(scale).limit_denominator(64)
            if abs(ratio - scale) > _ROUNDING * abs(scale):
                raise UnsupportedNode(f"the factor {scale} is not a whole number")
            ratios = {ratio}
        else:
            assert targets is not None
            ratios = {Fraction(t, n) for t, n in zip(targets[place], have, strict=True)}
        if ratios == {Fraction(1)}:
            continue
        kind = value.kinds()[axis]
        if kind not in SPACE:
            raise UnsupportedNode("batch and channels cannot be resized")
        if reader.assembly.reduced(value)[SPACE.index(kind)]:
            found[kind] = targets[place] if targets else tuple(int(n * min(ratios)) for n in have)
        elif len(ratios) > 1:
            raise UnsupportedNode("its sizes are no factor of the volume's size")
        elif (ratio := ratios.pop()) <= 0:
            raise UnsupportedNode(f"its scale is {ratio}")
        else:
            found[kind] = ratio
    return found


def _shrunk(
    reader: GraphReader,
    proto: onnx.NodeProto,
    value: Value,
    factor: Size,
    placing: Placing,
    attributes: dict[str, Any],
) -> Value:
    """Every ``factor``-th voxel, or the mean of the two in the middle of so many."""
    if attributes.get("antialias"):
        raise UnsupportedNode("antialias=1 is not supported")
    place = text(attributes.get("coordinate_transformation_mode"), "half_pixel")
    if place == "asymmetric":
        low, kernel = (0, 0, 0), ONES
    else:  # an even factor has two voxels in its middle, of which nearest takes the first
        low = triple((f - 1) // 2 for f in factor)
        two = placing != "nearest"
        rounding = text(attributes.get("nearest_mode"), "")
        if not two and (rounding == "round_prefer_ceil" or place == _OF_TENSORFLOW):
            low = triple(f // 2 for f in factor)
        sizes = reader.assembly.sizes(value)
        if place == "pytorch_half_pixel" and any(
            1 < n < 2 * f for size in sizes for n, f in zip(size, factor, strict=True) if f > 1
        ):
            raise UnsupportedNode("pytorch_half_pixel of a single voxel is not supported")
        kernel = triple(2 if two and f % 2 == 0 else 1 for f in factor)
    high = triple(f - k - a for f, k, a in zip(factor, kernel, low, strict=True))
    if any(low + high):
        value = reader.layer(proto, layers.Crop(low, high), [value])
    return reader.layer(proto, layers.AveragePool(kernel, factor), [value])


OPERATORS: dict[str, Operator] = {"Resize": _resize, "Upsample": _resize}
