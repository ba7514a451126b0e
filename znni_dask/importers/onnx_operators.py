"""The table of ONNX operators: how each becomes layers, and when it cannot.

2D networks (arrays of rank 4) become 3D ones with z = 1 in every kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx_graph import Constant, GraphReader, Operator, UnsupportedNode
from znni_dask.network import layers
from znni_dask.network.layers import Function, Padding

_END = (1 << 31) - 1  # exporters write "to the end" as this or some larger number


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}


def _text(value: Any, default: str) -> str:
    return value.decode() if isinstance(value, bytes) else default


def _finite(value: Any, what: str) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise UnsupportedNode(f"{what} is {number}")
    return number


def _padding(reader: GraphReader, attributes: dict[str, Any], kernel: Size) -> Padding:
    rank = reader.rank - 2
    pads = list(attributes.get("pads", [0] * 2 * rank))
    auto = _text(attributes.get("auto_pad"), "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        stride = attributes.get("strides", [1] * rank)
        if any(s != 1 for s in stride):
            raise UnsupportedNode(f"auto_pad={auto} with a stride: its padding depends on the size")
        dilation = attributes.get("dilations", [1] * rank)
        total = [(k - 1) * d for k, d in zip(kernel[-rank:], dilation, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + more if auto == "SAME_UPPER" else more + less
    elif auto not in ("NOTSET", "VALID"):
        raise UnsupportedNode(f"auto_pad={auto} is not known")
    if any(p < 0 for p in pads):
        raise UnsupportedNode(f"negative pads {pads}")
    return reader.spatial(pads[:rank], 0), reader.spatial(pads[rank:], 0)


def _three(reader: GraphReader, attributes: dict[str, Any], name: str) -> Size:
    values = reader.spatial(list(attributes.get(name, [1] * (reader.rank - 2))), 1)
    if min(values) < 1:
        raise UnsupportedNode(f"{name} {list(values)} must be positive")
    return values


def _kernels(reader: GraphReader, proto: onnx.NodeProto) -> Constant:
    weight = reader.weights(proto, 1)
    if weight.ndim != reader.rank:
        raise UnsupportedNode(f"kernels of rank {weight.ndim} on arrays of rank {reader.rank}")
    if weight.size == 0:
        raise UnsupportedNode(f"kernels of shape {list(weight.shape)} are empty")
    return weight.reshape(*weight.shape[:2], *(1,) * (5 - reader.rank), *weight.shape[2:])


def _bias(reader: GraphReader, proto: onnx.NodeProto, channels: int) -> Constant:
    bias = reader.constant(proto, 2)
    return np.zeros(channels) if bias is None else bias


def _conv(reader: GraphReader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    weight = _kernels(reader, proto)
    groups = int(attributes.get("group", 1))
    kernel = triple(weight.shape[2:])
    if (
        reader.spatial(list(attributes.get("kernel_shape", weight.shape[5 - reader.rank + 2 :])), 1)
        != kernel
    ):
        raise UnsupportedNode("its kernel_shape is not that of its weights")
    layer = layers.Conv(
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        _three(reader, attributes, "strides"),
        _three(reader, attributes, "dilations"),
        _padding(reader, attributes, kernel),
        groups,
    )
    bias = _bias(reader, proto, weight.shape[0])
    return reader.layer(proto, layer, [reader.source(proto)], {"weight": weight, "bias": bias})


def _conv_transpose(reader: GraphReader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    if "output_shape" in attributes:
        raise UnsupportedNode("output_shape is not supported: export with pads")
    if _text(attributes.get("auto_pad"), "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedNode("auto_pad is not supported: export with pads")
    weight = _kernels(reader, proto)
    groups = int(attributes.get("group", 1))
    low, high = _padding(reader, attributes, triple(weight.shape[2:]))
    extra = reader.spatial(list(attributes.get("output_padding", [0] * (reader.rank - 2))), 0)
    channels = weight.shape[1] * groups
    layer = layers.ConvTranspose(
        weight.shape[0],
        channels,
        triple(weight.shape[2:]),
        _three(reader, attributes, "strides"),
        _three(reader, attributes, "dilations"),
        (low, triple(h - e for h, e in zip(high, extra, strict=True))),
        groups,
    )
    bias = _bias(reader, proto, channels)
    return reader.layer(proto, layer, [reader.source(proto)], {"weight": weight, "bias": bias})


def _max_pool(reader: GraphReader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    if attributes.get("ceil_mode"):
        raise UnsupportedNode("ceil_mode=1 is not supported")
    if len([o for o in proto.output if o]) > 1:
        raise UnsupportedNode("its output of indices is not supported")
    kernel = reader.spatial(list(attributes["kernel_shape"]), 1)
    layer = layers.MaxPool(
        kernel,
        _three(reader, attributes, "strides"),
        _three(reader, attributes, "dilations"),
        _padding(reader, attributes, kernel),
    )
    return reader.layer(proto, layer, [reader.source(proto)])


def _batch_normalization(reader: GraphReader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    if attributes.get("training_mode"):
        raise UnsupportedNode("training_mode=1: export the network in evaluation mode")
    scale, shift, mean, variance = (
        reader.weights(proto, i).astype(np.float64) for i in range(1, 5)
    )
    spread = variance + attributes.get("epsilon", 1e-5)
    if not (spread > 0).all():
        raise UnsupportedNode(f"its variances plus epsilon go down to {spread.min():g}")
    scale = scale / np.sqrt(spread)
    return _affine(reader, proto, reader.source(proto), scale, shift - mean * scale)


def _affine(
    reader: GraphReader, proto: onnx.NodeProto, source: str, scale: Constant, shift: Constant
) -> str:
    layer = layers.Affine(reader.channels(source))
    return reader.layer(proto, layer, [source], {"scale": scale, "shift": shift})


def _activation(function: Function, alpha: float = 0.0) -> Operator:
    def read(reader: GraphReader, proto: onnx.NodeProto) -> str:
        slope = _finite(_attributes(proto).get("alpha", alpha), "alpha")
        return reader.layer(proto, layers.Activation(function, slope), [reader.source(proto)])

    return read


def _prelu(reader: GraphReader, proto: onnx.NodeProto) -> str:
    source = reader.source(proto)
    channels = reader.channels(source)
    slope = reader.per_channel(reader.weights(proto, 1), channels)
    layer = layers.Activation("prelu", width=channels)
    return reader.layer(proto, layer, [source], {"slope": slope})


def _softmax(reader: GraphReader, proto: onnx.NodeProto) -> str:
    axis = reader.axis(int(_attributes(proto).get("axis", -1 if reader.opset >= 13 else 1)))
    if axis != 1 or reader.opset < 13:
        raise UnsupportedNode(
            f"axis {axis} in opset {reader.opset}: only channels from opset 13 on"
        )
    return reader.layer(proto, layers.Softmax(), [reader.source(proto)])


def _arithmetic(
    combine: type[layers.Add] | type[layers.Mul] | None, sign: int, power: int
) -> Operator:
    """Sum (``power`` 0; ``sign`` -1 subtracts) or product (``power`` 1; -1 divides)."""

    def read(reader: GraphReader, proto: onnx.NodeProto) -> str:
        if len(proto.input) != 2:
            raise UnsupportedNode(f"takes two inputs, {len(proto.input)} are given")
        constants = [name in reader.constants for name in proto.input]
        if not any(constants):
            if combine is None:
                raise UnsupportedNode("of two arrays is not supported, only with a constant")
            inputs = [reader.source(proto, i) for i in range(len(proto.input))]
            return reader.layer(proto, combine(), inputs)
        if constants[0] and (sign < 0 or power < 0):
            raise UnsupportedNode("with the constant first is not supported")
        source = reader.source(proto, int(constants[0]))
        channels = reader.channels(source)
        value = reader.per_channel(reader.weights(proto, int(not constants[0])), channels)
        neutral = np.zeros(channels)
        if power == 0:
            return _affine(reader, proto, source, neutral + 1, sign * value)
        with np.errstate(divide="ignore"):
            return _affine(reader, proto, source, value.astype(np.float64) ** power, neutral)

    return read


def _concat(reader: GraphReader, proto: onnx.NodeProto) -> str:
    if reader.axis(int(_attributes(proto)["axis"])) != 1:
        raise UnsupportedNode("only channels can be concatenated")
    inputs = [reader.source(proto, i) for i in range(len(proto.input))]
    return reader.layer(proto, layers.Concat(), inputs)


def _pad(reader: GraphReader, proto: onnx.NodeProto) -> str:
    if (mode := _text(_attributes(proto).get("mode"), "constant")) != "constant":
        raise UnsupportedNode(f"mode={mode} is not supported, only constant")
    pads = [int(p) for p in reader.weights(proto, 1).ravel()]
    value = reader.constant(proto, 2)
    axes = reader.constant(proto, 3)
    chosen = range(reader.rank) if axes is None else [reader.axis(int(a)) for a in axes.ravel()]
    low, high = [0] * reader.rank, [0] * reader.rank
    for index, axis in enumerate(chosen):
        low[axis], high[axis] = pads[index], pads[len(chosen) + index]
    if any(low[:2] + high[:2]):
        raise UnsupportedNode("batch and channels cannot be padded")
    source = reader.source(proto)
    below, above = reader.spatial(low[2:], 0), reader.spatial(high[2:], 0)
    if min(*below, *above) < 0:
        cropped = triple(max(0, -p) for p in below), triple(max(0, -p) for p in above)
        source = reader.layer(proto, layers.Crop(*cropped), [source])
    padding = triple(max(0, p) for p in below), triple(max(0, p) for p in above)
    if padding == layers.NO_PADDING:
        return source
    number = 0.0 if value is None or value.size == 0 else _finite(value.ravel()[0], "its value")
    return reader.layer(proto, layers.Pad(padding, number), [source])


def _slice(reader: GraphReader, proto: onnx.NodeProto) -> str:
    starts, ends = (reader.weights(proto, i).ravel().tolist() for i in (1, 2))
    axes, steps = reader.constant(proto, 3), reader.constant(proto, 4)
    chosen = range(len(starts)) if axes is None else [int(a) for a in axes.ravel()]
    if steps is not None and any(int(s) != 1 for s in steps.ravel()):
        raise UnsupportedNode("steps other than 1 are not supported")
    source = reader.source(proto)
    low, high = [0] * reader.rank, [0] * reader.rank
    for axis, start, end in zip(map(reader.axis, chosen), starts, ends, strict=True):
        if axis == 1:
            channels = reader.channels(source)
            first, last, _ = slice(start, min(end, channels)).indices(channels)
            source = reader.layer(proto, layers.ChannelSlice(first, last), [source])
        elif start < 0 or 0 <= end < _END:
            raise UnsupportedNode(
                f"{start}:{end} of axis {axis} depends on the size: write it like 2:-2"
            )
        else:
            low[axis], high[axis] = start, -end if end < 0 else 0
    if low[0] or high[0]:
        raise UnsupportedNode("the batch cannot be sliced")
    if any(low + high):
        crop = layers.Crop(reader.spatial(low[2:], 0), reader.spatial(high[2:], 0))
        source = reader.layer(proto, crop, [source])
    return source


def _resize(reader: GraphReader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    mode = _text(attributes.get("mode"), "nearest")
    place = _text(attributes.get("coordinate_transformation_mode"), "half_pixel")
    rounding = _text(attributes.get("nearest_mode"), "round_prefer_floor")
    repeats = (place == "asymmetric" and rounding == "floor") or (
        place in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
        and rounding in ("round_prefer_floor", "round_prefer_ceil")
    )
    if mode != "nearest" or not repeats:
        raise UnsupportedNode(
            f"mode={mode}, {place}, {rounding}: only nearest neighbours by repeating"
        )
    scales = reader.constant(proto, 2)
    if scales is None or scales.size == 0:
        raise UnsupportedNode("resizing to sizes instead of by factors is not supported")
    axes = [reader.axis(int(a)) for a in attributes.get("axes", range(reader.rank))]
    factors = [1.0] * reader.rank
    for axis, scale in zip(axes, scales.ravel(), strict=True):
        factors[axis] = _finite(scale, "its scale")
    if factors[:2] != [1.0, 1.0] or any(f != round(f) or f < 1 for f in factors):
        raise UnsupportedNode(f"factors {factors} are not whole numbers per spatial axis")
    factor = reader.spatial([int(f) for f in factors[2:]], 1)
    return reader.layer(proto, layers.Resize(factor), [reader.source(proto)])


def _pass(reader: GraphReader, proto: onnx.NodeProto) -> str:
    return reader.source(proto)


OPERATORS: dict[str, Operator] = {
    "Add": _arithmetic(layers.Add, 1, 0),
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _arithmetic(None, 1, -1),
    "Dropout": _pass,
    "Elu": _activation("elu", 1.0),
    "Identity": _pass,
    "LeakyRelu": _activation("leaky_relu", 0.01),
    "MaxPool": _max_pool,
    "Mul": _arithmetic(layers.Mul, 1, 1),
    "PRelu": _prelu,
    "Pad": _pad,
    "Relu": _activation("relu"),
    "Resize": _resize,
    "Sigmoid": _activation("sigmoid"),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sub": _arithmetic(None, -1, 0),
    "Tanh": _activation("tanh"),
}
