"""Conv and ConvTranspose."""

from __future__ import annotations

from typing import Any

import onnx

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import SPACE, Value
from znni_dask.importers.onnx.operators.attributes import (
    attributes_of,
    padding,
    pads_same,
    per_axis,
    text,
)
from znni_dask.importers.onnx.tensors import Constant
from znni_dask.network import layers
from znni_dask.network.layers import Padding, extent


def _kernels(
    reader: GraphReader, proto: onnx.NodeProto, attributes: dict[str, Any], value: Value
) -> Constant:
    """The weights with all three axes of space."""
    weight = reader.weights(proto, 1)
    if weight.ndim != value.rank:
        raise UnsupportedNode(f"kernels of rank {weight.ndim} on arrays of rank {value.rank}")
    if weight.size == 0:
        raise UnsupportedNode(f"kernels of shape {list(weight.shape)} are empty")
    own = tuple(weight.shape[2:])
    if tuple(attributes.get("kernel_shape", own)) != own:
        raise UnsupportedNode("its kernel_shape is not that of its weights")
    kinds = value.kinds()[2:]
    if list(kinds) != sorted(kinds, key=SPACE.index):
        order = sorted(range(len(kinds)), key=lambda i: SPACE.index(kinds[i]))
        weight = weight.transpose(0, 1, *(2 + i for i in order))
    return weight.reshape(*weight.shape[:2], *reader.spatial(list(own), value, 1))


def _with_bias(reader: GraphReader, proto: onnx.NodeProto, weight: Constant) -> dict[str, Constant]:
    if reader.constant(proto, 2) is None:
        return {"weight": weight}
    return {"weight": weight, "bias": reader.weights(proto, 2)}


def _conv(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.source(proto)
    weights = _with_bias(reader, proto, _kernels(reader, proto, attributes, value))
    weight = weights["weight"]
    groups = int(attributes.get("group", 1))
    kernel = triple(weight.shape[2:])
    stride = per_axis(reader, attributes, "strides", value)
    dilation = per_axis(reader, attributes, "dilations", value)
    layer = layers.Conv(
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        stride,
        dilation,
        padding(reader, attributes, value, kernel, stride, dilation),
        groups,
        bias="bias" in weights,
        same=pads_same(attributes),
    )
    return reader.layer(proto, layer, [value], weights)


def _conv_transpose(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.source(proto)
    weights = _with_bias(reader, proto, _kernels(reader, proto, attributes, value))
    weight = weights["weight"]
    groups = int(attributes.get("group", 1))
    kernel = triple(weight.shape[2:])
    stride = per_axis(reader, attributes, "strides", value)
    dilation = per_axis(reader, attributes, "dilations", value)
    extra = reader.spatial(list(attributes.get("output_padding", [0] * (value.rank - 2))), value, 0)
    low, high = _trimming(reader, attributes, value, kernel, stride, dilation, extra)
    layer = layers.ConvTranspose(
        weight.shape[0],
        weight.shape[1] * groups,
        kernel,
        stride,
        dilation,
        (low, triple(h - e for h, e in zip(high, extra, strict=True))),
        groups,
        bias="bias" in weights,
    )
    return reader.layer(proto, layer, [value], weights)


def _trimming(
    reader: GraphReader,
    attributes: dict[str, Any],
    value: Value,
    kernel: Size,
    stride: Size,
    dilation: Size,
    extra: Size,
) -> Padding:
    """What a transposed convolution takes off its output, before ``output_padding``."""
    auto = text(attributes.get("auto_pad"), "NOTSET")
    wanted = attributes.get("output_shape")
    if wanted is None and not pads_same(attributes):
        return padding(reader, attributes, value, kernel, stride, dilation)
    totals = []
    for axis in range(3):
        reach = extent(kernel[axis], dilation[axis])
        if SPACE[axis] not in value.kinds()[2:]:
            totals.append(0)
            continue
        place = value.kinds()[2:].index(SPACE[axis])
        found = {
            stride[axis] * (n - 1)
            + extra[axis]
            + reach
            - (n * stride[axis] if wanted is None else int(wanted[place]))
            for n in (size[axis] for size in reader.assembly.sizes(value))
        }
        if len(found) > 1:
            raise UnsupportedNode("its output_shape depends on the volume's size")
        totals.append(found.pop())
    if min(totals) < 0:
        raise UnsupportedNode(f"output_shape {wanted} is larger than what it computes")
    less, more = triple(t // 2 for t in totals), triple(t - t // 2 for t in totals)
    return (less, more) if auto == "SAME_UPPER" else (more, less)


OPERATORS: dict[str, Operator] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
