"""Attributes of nodes, and the windows that several operators share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.graph import GraphReader
from znni_dask.importers.onnx.layouts import SPACE, Value
from znni_dask.network.layers import Padding, extent
from znni_dask.network.window import same_padding


def attributes_of(proto: onnx.NodeProto) -> dict[str, Any]:
    """All attributes by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}


def listed_axes(reader: GraphReader, proto: onnx.NodeProto) -> list[int] | None:
    """Axes as an attribute (to opset 12) or as the second input."""
    axes = attributes_of(proto).get("axes")
    if axes is None and len(proto.input) > 1:
        found = reader.constant(proto, 1)
        axes = None if found is None else np.atleast_1d(found).ravel().tolist()
    return None if axes is None else [int(a) for a in axes]


def text(value: Any, default: str) -> str:
    """A text attribute."""
    if value is None:
        return default
    if not isinstance(value, bytes):
        raise UnsupportedNode(f"{value!r} where text is wanted")
    return value.decode()


def finite(value: Any, what: str) -> float:
    """A number that is neither NaN nor infinite."""
    number = float(value)
    if not np.isfinite(number):
        raise UnsupportedNode(f"{what} is {number}")
    return number


def per_axis(
    reader: GraphReader, attributes: dict[str, Any], name: str, value: Value, default: int = 1
) -> Size:
    """A positive number per axis of space, as (z, y, x)."""
    found = attributes.get(name)
    listed = [default] * (value.rank - 2) if found is None else list(found)
    sizes = reader.spatial(listed, value, 1)
    if min(sizes) < 1:
        raise UnsupportedNode(f"{name} {listed} must be positive")
    return sizes


def pads_same(attributes: dict[str, Any]) -> bool:
    """Whether a window pads for an output every ``strides`` voxels."""
    return text(attributes.get("auto_pad"), "NOTSET") in ("SAME_UPPER", "SAME_LOWER")


def padding(
    reader: GraphReader,
    attributes: dict[str, Any],
    value: Value,
    kernel: Size,
    stride: Size,
    dilation: Size,
) -> Padding:
    """The padding of a sliding window, ``auto_pad`` spelt out for the sizes being read."""
    axes = value.rank - 2
    pads = [int(p) for p in attributes.get("pads", [0] * 2 * axes)]
    auto = text(attributes.get("auto_pad"), "NOTSET")
    if pads_same(attributes):
        totals = [_same(reader, value, i, kernel, stride, dilation) for i in range(3)]
        less, more = triple(t // 2 for t in totals), triple(t - t // 2 for t in totals)
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    if auto == "VALID":
        pads = [0] * 2 * axes
    elif auto != "NOTSET":
        raise UnsupportedNode(f"auto_pad={auto} is not known")
    if len(pads) != 2 * axes:
        raise UnsupportedNode(f"{len(pads)} pads for {axes} spatial axes")
    if any(p < 0 for p in pads):
        raise UnsupportedNode(f"negative pads {pads}")
    return reader.spatial(pads[:axes], value, 0), reader.spatial(pads[axes:], value, 0)


def _same(
    reader: GraphReader, value: Value, axis: int, kernel: Size, stride: Size, dilation: Size
) -> int:
    """Voxels to add along an axis so that there is an output for every ``stride`` inputs."""
    if SPACE[axis] not in value.kinds()[2:]:
        return 0
    reach = extent(kernel[axis], dilation[axis])
    totals = {
        same_padding(size[axis], reach, stride[axis]) for size in reader.assembly.sizes(value)
    }
    if len(totals) > 1:
        raise UnsupportedNode("the padding of auto_pad depends on the volume's size")
    return totals.pop()
