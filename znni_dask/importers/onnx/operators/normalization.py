"""Normalisations, reductions and softmax: told apart by the axes they reduce."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx

from znni_dask.importers.onnx import layouts
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.folding import MOST_ELEMENTS
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import SPACE, Piece, Value
from znni_dask.importers.onnx.operators.attributes import attributes_of, finite, listed_axes
from znni_dask.importers.onnx.operators.joining import affine, joined
from znni_dask.importers.onnx.tensors import Constant
from znni_dask.network import layers
from znni_dask.network.layers import Arithmetic, Reduction


def _batch_normalization(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    if attributes.get("training_mode"):
        raise UnsupportedNode("training_mode=1: export the network in evaluation mode")
    value = reader.given(proto)
    numbers = [_on_axis(reader, value, 1, reader.weights(proto, i)) for i in range(1, 5)]
    scale, shift, mean, variance = numbers
    spread = variance + attributes.get("epsilon", 1e-5)
    if not (spread > 0).all():
        raise UnsupportedNode(f"its variances plus epsilon go down to {spread.min():g}")
    scale = scale / np.sqrt(spread)
    return affine(reader, proto, value, scale, shift - mean * scale)


def _on_axis(reader: GraphReader, value: Value, axis: int, numbers: Constant) -> Constant:
    """Numbers along one axis, as one per channel."""
    shape = [1] * value.rank
    shape[axis] = numbers.size
    if numbers.size not in (1, reader.assembly.lengths(value, axis)[0]):
        raise UnsupportedNode(
            f"{numbers.size} numbers for {reader.assembly.lengths(value, axis)[0]} channels"
        )
    return layouts.per_channel(numbers.reshape(shape), value, reader.assembly.channels(value))


def _reduced_space(reader: GraphReader, value: Value, axes: list[int]) -> str:
    """The axes of space that lie on some axes of a value; they must lie there whole."""
    found = ""
    for kind in SPACE:
        here = [p for i in axes for p in value.axes[i] if p.kind == kind]
        if not here:
            continue
        if len(here) > 1 or here[0].stride != 1 or len(value.pieces(kind)) > 1:
            raise UnsupportedNode(f"reduces over a part of the axis {kind}")
        found += kind
    return found


def _normalize(
    reader: GraphReader,
    proto: onnx.NodeProto,
    value: Value,
    axes: list[int],
    scale: Constant | None,
    shift: Constant | None,
    epsilon: float,
) -> Value:
    """Normalise over ``axes``; scale and shift are one number per channel."""
    channels = reader.assembly.channels(value)
    reduced = [p for i in axes for p in value.axes[i] if p.kind == "c" and not p.single]
    size = prod(p.length for p in reduced)
    # the channels of a group must lie side by side
    if any(p.stride * p.length > size for p in reduced):
        raise UnsupportedNode("normalises over channels that do not lie side by side")
    layer = layers.Normalize(
        channels, channels // size, _reduced_space(reader, value, axes), float(epsilon)
    )
    weights = {
        "scale": np.ones(channels) if scale is None else scale,
        "shift": np.zeros(channels) if shift is None else shift,
    }
    if layer.groups == channels and not layer.space:
        raise UnsupportedNode("normalises single values")
    return reader.pointwise(proto, layer, value, weights)


def _instance_normalization(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    scale, shift = (_on_axis(reader, value, 1, reader.weights(proto, i)) for i in (1, 2))
    epsilon = attributes_of(proto).get("epsilon", 1e-5)
    return _normalize(reader, proto, value, list(range(2, value.rank)), scale, shift, epsilon)


def _group_normalization(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.source(proto)
    channels, groups = reader.assembly.channels(value), int(attributes["num_groups"])
    numbers = [reader.weights(proto, i).ravel().astype(np.float64) for i in (1, 2)]
    if groups < 1 or channels % groups:
        raise UnsupportedNode(f"{channels} channels do not fall into {groups} groups")
    if reader.opset < 21:  # before, there was one number for a group
        numbers = [np.repeat(n, channels // groups) if n.size == groups else n for n in numbers]
    layer = layers.Normalize(
        channels, groups, "".join(value.kinds()[2:]), float(attributes.get("epsilon", 1e-5))
    )
    return reader.layer(proto, layer, [value], {"scale": numbers[0], "shift": numbers[1]})


def _layer_normalization(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.given(proto)
    first = reader.axis(value, int(attributes.get("axis", -1)))
    scale, shift = (
        layouts.per_channel(reader.numbers(proto, i, value), value, reader.assembly.channels(value))
        if i < len(proto.input) and proto.input[i]
        else None
        for i in (1, 2)
    )
    epsilon = attributes.get("epsilon", 1e-5)
    axes = list(range(first, value.rank))
    return _normalize(reader, proto, value, axes, scale, shift, epsilon)


def _rms_normalization(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    """Divided by the root of the mean square, then scaled."""
    attributes = attributes_of(proto)
    value = reader.given(proto)
    axes = list(range(reader.axis(value, int(attributes.get("axis", -1))), value.rank))
    squares = joined(reader, proto, Arithmetic("mul"), [value, value])
    mean = reduce(reader, proto, squares, "mean", axes)
    ones = np.ones(reader.assembly.channels(mean))
    mean = affine(reader, proto, mean, ones, ones * attributes.get("epsilon", 1e-5))
    root = reader.pointwise(proto, layers.Activation("sqrt"), mean)
    normal = joined(reader, proto, Arithmetic("div"), [value, root])
    scale = layouts.per_channel(reader.weights(proto, 1), normal, reader.assembly.channels(normal))
    return affine(reader, proto, normal, scale, np.zeros_like(scale))


def _axes(reader: GraphReader, proto: onnx.NodeProto, value: Value) -> list[int]:
    """The axes that a reduction names; all where it names none."""
    listed = listed_axes(reader, proto)
    if not listed:
        keeps = attributes_of(proto).get("noop_with_empty_axes")
        return [] if keeps else list(range(value.rank))
    return [reader.axis(value, a) for a in listed]


def reduce(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, function: Reduction, axes: list[int]
) -> Value:
    """Reduce over channels, over axes of space, or over both one after the other."""
    pieces = [p for i in axes for p in value.axes[i] if p.kind == "c" and not p.single]
    partly = bool(pieces) and pieces != value.pieces("c")
    space = _reduced_space(reader, value, axes)
    name = value.layer
    if pieces and not partly:
        name = reader.add(proto, layers.Reduce(function, "c"), [name])
    if space:
        name = reader.add(proto, layers.Reduce(function, space), [name])
    if any(p.kind == "n" and not p.single for i in axes for p in value.axes[i]):
        raise UnsupportedNode("reduces over the batch")
    if name == value.layer and axes and function in ("l1", "l2"):  # of single elements
        name = reader.add(proto, layers.Activation("abs"), [name])
    if partly:
        return _grouped(reader, proto, replace(value, layer=name), function, axes)
    return Value(name, tuple(() if i in axes else a for i, a in enumerate(value.axes)))


def _grouped(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, function: Reduction, axes: list[int]
) -> Value:
    """Sum or mean over some of the axes that channels lie on: a matrix, one row for each group."""
    channels = reader.assembly.channels(value)
    if function not in ("sum", "mean") or prod(p.length for p in value.pieces("c")) != channels:
        raise UnsupportedNode("reduces over a part of the channels")
    kept = [p for i, axis in enumerate(value.axes) if i not in axes for p in axis if p.kind == "c"]
    _check_matrix(prod(p.length for p in kept), channels)
    group, groups, moved = np.zeros(channels, np.int64), 1, dict[Piece, Piece]()
    for piece in sorted(kept, key=lambda p: p.stride):
        group += np.arange(channels) // piece.stride % piece.length * groups
        moved[piece] = replace(piece, stride=groups)
        groups *= piece.length
    matrix = (group == np.arange(groups)[:, None]).astype(np.float64)
    if function == "mean":
        matrix *= groups / channels
    return Value(
        over_channels(reader, proto, value, matrix),
        tuple(
            () if i in axes else tuple(moved.get(p, p) for p in axis)
            for i, axis in enumerate(value.axes)
        ),
    )


def _check_matrix(rows: int, columns: int) -> None:
    if rows * columns > MOST_ELEMENTS:
        raise UnsupportedNode(f"it would take a matrix of {rows} × {columns} on the channels")


def over_channels(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, matrix: Constant, bias: float = 0.0
) -> str:
    """The layer that a matrix (out, in) on the channels of a value is."""
    out, fan_in = matrix.shape
    layer = layers.Conv(fan_in, out, layers.ONES, bias=bias != 0)
    weights = {"weight": matrix.reshape(out, fan_in, 1, 1, 1)}
    if layer.bias:
        weights["bias"] = np.full(out, bias)
    return reader.add(proto, layer, [value.layer], weights)


def _reduction(function: Reduction) -> Operator:
    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        value = reader.given(proto)
        axes = _axes(reader, proto, value)
        made = reduce(reader, proto, value, function, axes)
        return _kept(made, axes, bool(attributes_of(proto).get("keepdims", 1)))

    return read


def _kept(value: Value, axes: list[int], keep: bool) -> Value:
    """Without the axes that were reduced, unless they are kept."""
    if keep:
        return value
    return Value(value.layer, tuple(a for i, a in enumerate(value.axes) if i not in axes))


def _sum_of_squares(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    axes = _axes(reader, proto, value)
    squares = joined(reader, proto, Arithmetic("mul"), [value, value])
    made = reduce(reader, proto, squares, "sum", axes)
    return _kept(made, axes, bool(attributes_of(proto).get("keepdims", 1)))


def _argmax(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.given(proto)
    axis = reader.axis(value, int(attributes.get("axis", 0)))
    if value.kinds_of(axis) != {"c"} or attributes.get("select_last_index"):
        raise UnsupportedNode("only the first largest channel is supported")
    made = reduce(reader, proto, value, "argmax", [axis])
    return _kept(made, [axis], bool(attributes.get("keepdims", 1)))


def _lp_normalization(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value = reader.given(proto)
    axis = reader.axis(value, int(attributes.get("axis", -1)))
    if (power := int(attributes.get("p", 2))) not in (1, 2):
        raise UnsupportedNode(f"p={power} is not supported, only 1 and 2")
    norm = reduce(reader, proto, value, "l1" if power == 1 else "l2", [axis])
    tiny = float(np.finfo(np.float32).tiny)  # where all is zero it stays zero
    norm = reader.pointwise(proto, layers.Activation("clip", tiny, np.inf), norm)
    return joined(reader, proto, Arithmetic("div"), [value, norm])


def _local_response(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    """Divided by a power of the mean square of the neighbouring channels."""
    attributes = attributes_of(proto)
    value, size = reader.source(proto), int(attributes["size"])
    if size < 1:
        raise UnsupportedNode(f"size={size} must be positive")
    channels = reader.assembly.channels(value)
    _check_matrix(channels, channels)
    squares = joined(reader, proto, Arithmetic("mul"), [value, value])
    place = np.arange(channels)
    beyond = place - place[:, None]
    near = (beyond >= -((size - 1) // 2)) & (beyond <= size // 2)
    share = finite(attributes.get("alpha", 1e-4), "alpha") / size
    bias = finite(attributes.get("bias", 1.0), "bias")
    name = over_channels(reader, proto, squares, near * share, bias)
    exponent = -finite(attributes.get("beta", 0.75), "beta")
    root = reader.pointwise(proto, layers.Activation("pow", exponent), Value(name, squares.axes))
    return joined(reader, proto, Arithmetic("mul"), [value, root])


def _softmax(log: bool) -> Operator:
    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        value = reader.given(proto)
        late = reader.opset >= 13  # before, all axes from the one named on were taken together
        axis = reader.axis(value, int(attributes_of(proto).get("axis", -1 if late else 1)))
        axes = [axis] if late else list(range(axis, value.rank))
        pieces = [p for i in axes for p in value.axes[i] if p.kind == "c" and not p.single]
        space = _reduced_space(reader, value, axes)
        if space and not all(p.single for k in space for p in value.pieces(k)) and pieces:
            raise UnsupportedNode("over channels and space together")
        if pieces and pieces != value.pieces("c"):
            raise UnsupportedNode("over a part of the channels")
        if not pieces and not space and reader.assembly.channels(value) > 1:
            raise UnsupportedNode("over an axis of one element, or over the batch")
        over = "c" if pieces or not space else space
        return reader.pointwise(proto, layers.Softmax(over, log), value)

    return read


OPERATORS: dict[str, Operator] = {
    "ArgMax": _argmax,
    "BatchNormalization": _batch_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax(log=True),
    "LRN": _local_response,
    "LpNormalization": _lp_normalization,
    "RMSNormalization": _rms_normalization,
    "ReduceL1": _reduction("l1"),
    "ReduceL2": _reduction("l2"),
    "ReduceMax": _reduction("max"),
    "ReduceMean": _reduction("mean"),
    "ReduceMin": _reduction("min"),
    "ReduceSum": _reduction("sum"),
    "ReduceSumSquare": _sum_of_squares,
    "Softmax": _softmax(log=False),
}
