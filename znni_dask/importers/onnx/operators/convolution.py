"""Conv and ConvTranspose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx import phases
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
from znni_dask.network.layers import ONES, Padding, extent


@dataclass(frozen=True)
class _Filters:
    """What the node of a convolution says: its weights, and how they are laid over the input."""

    attributes: dict[str, Any]
    weights: dict[str, Constant]
    groups: int
    stride: Size
    dilation: Size

    @classmethod
    def of(cls, reader: GraphReader, proto: onnx.NodeProto, value: Value) -> _Filters:
        """As ``proto`` has it for its input ``value``."""
        attributes = attributes_of(proto)
        weights = {"weight": _kernels(reader, proto, attributes, value)}
        if reader.constant(proto, 2) is not None:
            weights["bias"] = reader.weights(proto, 2)
        return cls(
            attributes,
            weights,
            int(attributes.get("group", 1)),
            per_axis(reader, attributes, "strides", value),
            per_axis(reader, attributes, "dilations", value),
        )

    @property
    def channels(self) -> tuple[int, int]:
        """The first two lengths of the weights; which are those of a group depends on the layer."""
        first, second = self.weights["weight"].shape[:2]
        return first, second

    @property
    def kernel(self) -> Size:
        """Taps along z, y, x."""
        return triple(self.weights["weight"].shape[2:])

    @property
    def bias(self) -> bool:
        """Whether there is one."""
        return "bias" in self.weights


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


def _conv(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    given = reader.given(proto)
    steps = phases.steps_of(given)
    value = reader.ordered(proto, phases.together(given, steps))
    found = _Filters.of(reader, proto, value)
    if steps != ONES and found.stride != ONES:
        raise UnsupportedNode("strides over axes whose phases lie in the batch")
    window = found.kernel, found.stride, found.dilation
    low, high = padding(reader, found.attributes, value, *window)
    out, fan_in = found.channels
    layer = layers.Conv(
        fan_in * found.groups,
        out,
        found.kernel,
        found.stride,
        _times(found.dilation, steps),
        (_times(low, steps), _times(high, steps)),
        found.groups,
        bias=found.bias,
        same=pads_same(found.attributes),
    )
    made = reader.layer(proto, layer, [value], found.weights)
    return made if steps == ONES else phases.apart(made, given, steps)


def _conv_transpose(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.source(proto)
    found = _Filters.of(reader, proto, value)
    listed = found.attributes.get("output_padding", [0] * (value.rank - 2))
    extra = reader.spatial(list(listed), value, 0)
    low, high = _trimming(reader, found, value, extra)
    fan_in, out = found.channels
    layer = layers.ConvTranspose(
        fan_in,
        out * found.groups,
        found.kernel,
        found.stride,
        found.dilation,
        (low, triple(h - e for h, e in zip(high, extra, strict=True))),
        found.groups,
        bias=found.bias,
    )
    return reader.layer(proto, layer, [value], found.weights)


def _times(size: Size, factor: Size) -> Size:
    return triple(n * f for n, f in zip(size, factor, strict=True))


def _trimming(reader: GraphReader, found: _Filters, value: Value, extra: Size) -> Padding:
    """What a transposed convolution takes off its output, before ``output_padding``."""
    attributes, kernel, stride = found.attributes, found.kernel, found.stride
    auto = text(attributes.get("auto_pad"), "NOTSET")
    wanted = attributes.get("output_shape")
    if wanted is None and not pads_same(attributes):
        return padding(reader, attributes, value, kernel, stride, found.dilation)
    totals = []
    for axis in range(3):
        reach = extent(kernel[axis], found.dilation[axis])
        if SPACE[axis] not in value.kinds()[2:]:
            totals.append(0)
            continue
        place = value.kinds()[2:].index(SPACE[axis])
        cut = {
            stride[axis] * (n - 1)
            + extra[axis]
            + reach
            - (n * stride[axis] if wanted is None else int(wanted[place]))
            for n in (size[axis] for size in reader.assembly.sizes(value))
        }
        if len(cut) > 1:
            raise UnsupportedNode("its output_shape depends on the volume's size")
        totals.append(cut.pop())
    if min(totals) < 0:
        raise UnsupportedNode(f"output_shape {wanted} is larger than what it computes")
    less, more = triple(t // 2 for t in totals), triple(t - t // 2 for t in totals)
    return (less, more) if auto == "SAME_UPPER" else (more, less)


OPERATORS: dict[str, Operator] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
