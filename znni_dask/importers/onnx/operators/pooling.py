"""MaxPool, AveragePool and the pools over everything."""

from __future__ import annotations

import onnx

from znni_dask.geometry import Size
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import Value
from znni_dask.importers.onnx.operators.attributes import (
    attributes_of,
    padding,
    pads_same,
    per_axis,
    text,
)
from znni_dask.network import layers
from znni_dask.network.layers import Reduction


def _pool(kind: type[layers.MaxPool] | type[layers.AveragePool]) -> Operator:
    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        attributes = attributes_of(proto)
        if len([o for o in proto.output if o]) > 1:
            raise UnsupportedNode("its output of indices is not supported")
        value = reader.source(proto)
        kernel = reader.spatial(list(attributes["kernel_shape"]), value, 1)
        stride = per_axis(reader, attributes, "strides", value)
        dilation = per_axis(reader, attributes, "dilations", value)
        pads = padding(reader, attributes, value, kernel, stride, dilation)
        more = {"same": pads_same(attributes)}
        if attributes.get("count_include_pad"):
            more["count_padding"] = True
        ceil = bool(attributes.get("ceil_mode"))
        if ceil and text(attributes.get("auto_pad"), "NOTSET") == "VALID":
            raise UnsupportedNode("ceil_mode=1 with auto_pad=VALID means different things")
        if reader.pools_of_all and _of_all(reader, value, kernel, pads):
            reduce = layers.Reduce("max" if kind is layers.MaxPool else "mean", _axes(value))
            return reader.layer(proto, reduce, [value])
        return reader.layer(proto, kind(kernel, stride, dilation, pads, ceil, **more), [value])

    return read


def _axes(value: Value) -> str:
    return "".join(value.kinds()[2:])


def _of_all(reader: GraphReader, value: Value, kernel: Size, pads: layers.Padding) -> bool:
    """Whether a pool's window is all there is."""
    return pads == layers.NO_PADDING and all(
        size == kernel for size in reader.assembly.sizes(value)
    )


def _global(function: Reduction) -> Operator:
    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        value = reader.source(proto)
        return reader.layer(proto, layers.Reduce(function, _axes(value)), [value])

    return read


OPERATORS: dict[str, Operator] = {
    "AveragePool": _pool(layers.AveragePool),
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("max"),
    "MaxPool": _pool(layers.MaxPool),
}
