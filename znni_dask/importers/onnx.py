"""ONNX files → `Network`.

Nodes whose inputs are all constants are evaluated while reading, so that the shape arithmetic
that exporters write disappears. Every other node becomes layers through one row of `_OPERATORS`.
What cannot be read is collected and reported together, by node name and operator.

2D networks (arrays of rank 4) become 3D ones with z = 1 in every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, triple
from znni_dask.network import layers
from znni_dask.network.layers import Function, Layer, Padding
from znni_dask.network.network import Network, Node, without_unused

OLDEST_OPSET = 11
_END = 1 << 31  # exporters write "to the end" as some number beyond this
_MOST_CONSTANTS = 1 << 20  # elements of a constant worth computing while reading
_FOLDED = {
    *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Gather", "Identity", "Mul"),
    *("Neg", "Range", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
}
_LISTED = 20

Constant = NDArray[np.generic]


class _Unsupported(Exception):
    """Why one node cannot be read."""


def load(path: str | Path, output: str | None = None) -> Network:
    """Read an ONNX file, external data beside it included.

    ``output`` names the output wanted where the file has several. Raises `NetworkError` where
    the file is not ONNX, is truncated, contradicts itself or uses what is not supported.
    """
    path = Path(path)
    try:
        model = onnx.load(path)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise NetworkError(f"cannot read {path} as ONNX: {error}") from None
    if not model.graph.node or not model.graph.output:
        raise NetworkError(f"{path} is not an ONNX network, or is truncated: it holds no layers")
    try:
        return _Reader(model, output).network()
    except NetworkError as error:
        raise NetworkError(f"{path}: {error}") from None


@dataclass
class _Reader:
    """The state of reading one graph. ``_names`` maps ONNX values to layers of ours."""

    model: onnx.ModelProto
    output: str | None
    _nodes: list[Node] = field(default_factory=list)
    _weights: dict[str, dict[str, Constant]] = field(default_factory=dict)
    _channels: dict[str, int] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _constants: dict[str, Constant] = field(default_factory=dict)
    _unknown: set[str] = field(default_factory=set)
    _reasons: list[str] = field(default_factory=list)
    rank: int = 5

    def network(self) -> Network:
        """Read the graph."""
        self._check_opset()
        self._read_initializers()
        self._read_input()
        for proto in self.model.graph.node:
            self._read_node(proto)
        if self._reasons:
            shown = "\n  ".join(self._reasons[:_LISTED])
            more = len(self._reasons) - _LISTED
            raise NetworkError(
                f"{len(self._reasons)} layers are not supported:\n  {shown}"
                + (f"\n  and {more} more" if more > 0 else "")
                + f"\nsupported operators: {', '.join(sorted(_OPERATORS))}"
            )
        return without_unused(self._nodes, self._names[self._output_name()], self._weights)

    def _check_opset(self) -> None:
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        if not versions or versions[0] < OLDEST_OPSET:
            found = versions[0] if versions else "none"
            raise NetworkError(
                f"opset {found} is too old: export with opset {OLDEST_OPSET} or later"
            )
        self._opset = versions[0]

    def _read_initializers(self) -> None:
        for tensor in self.model.graph.initializer:
            try:
                self._constants[tensor.name] = np.asarray(numpy_helper.to_array(tensor))
            except (ValueError, TypeError) as error:
                raise NetworkError(f"initializer {tensor.name!r} is damaged: {error}") from None

    def _read_input(self) -> None:
        inputs = [i for i in self.model.graph.input if i.name not in self._constants]
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs) or "none"
            raise NetworkError(f"a network has one input, this one has {len(inputs)}: {names}")
        shape = inputs[0].type.tensor_type.shape.dim
        weights = [
            self._constants[n.input[1]]
            for n in self.model.graph.node
            if n.op_type == "Conv" and len(n.input) > 1 and n.input[1] in self._constants
        ]
        self.rank = len(shape) or (weights[0].ndim if weights else 0)
        if self.rank not in (4, 5):
            raise NetworkError(
                f"the input {inputs[0].name!r} has rank {self.rank}: wanted are (batch, channel, "
                "z, y, x) or (batch, channel, y, x)"
            )
        channels = shape[1].dim_value if shape else 0
        if not channels and weights:
            channels = weights[0].shape[1]
        if channels < 1:
            raise NetworkError(
                f"the input {inputs[0].name!r} does not say how many channels it has"
            )
        name = self._add(layers.Input(channels), [], inputs[0].name)
        self._names[inputs[0].name] = name

    def _output_name(self) -> str:
        names = [o.name for o in self.model.graph.output]
        if self.output is None and len(names) > 1:
            raise NetworkError(
                f"the network has {len(names)} outputs ({', '.join(names)}): choose one of them"
            )
        name = self.output or names[0]
        if name not in names:
            raise NetworkError(f"no output {name!r}: the network has {', '.join(names)}")
        if name not in self._names:
            raise NetworkError(f"the output {name!r} does not depend on the input")
        return name

    def _read_node(self, proto: onnx.NodeProto) -> None:
        operator = (
            proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        )
        given = [name for name in proto.input if name]
        if any(name in self._unknown for name in given):
            self._unknown.update(proto.output)
            if operator in _OPERATORS or operator in _FOLDED:
                return  # what it lacks has been reported
        try:
            if operator in _FOLDED and all(name in self._constants for name in given):
                self._fold(proto)
            elif operator in _OPERATORS:
                self._names[proto.output[0]] = _OPERATORS[operator](self, proto)
            else:
                raise _Unsupported("operator not supported")
        except (_Unsupported, NetworkError) as error:
            label = proto.name or (proto.output[0] if proto.output else "?")
            self._reasons.append(f"{label} ({operator}): {error}")
            self._unknown.update(proto.output)

    def _fold(self, proto: onnx.NodeProto) -> None:
        """Evaluate a node of constants, with bounds on what it may make."""
        given = {name: self._constants[name] for name in proto.input if name}
        if proto.op_type in ("ConstantOfShape", "Range"):
            wanted = np.concatenate([np.ravel(v).astype(np.float64) for v in given.values()])
            size = prod(wanted) if proto.op_type == "ConstantOfShape" else np.abs(wanted).max()
            if not 0 <= size <= _MOST_CONSTANTS:
                raise _Unsupported(f"makes a constant of {size:.0f} values")
        graph = onnx.helper.make_graph(
            [proto],
            "constant",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
                )
                for name, value in given.items()
            ],
            [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output],
        )
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import)
        try:
            values = ReferenceEvaluator(model).run(None, given)
        except (ValueError, TypeError, IndexError, RuntimeError, KeyError) as error:
            raise _Unsupported(f"cannot be evaluated: {error}") from None
        for name, value in zip(proto.output, values, strict=True):
            self._constants[name] = np.asarray(value)

    # What the rows of the table use.

    def _add(
        self,
        layer: Layer,
        inputs: list[str],
        label: str,
        weights: dict[str, Constant] | None = None,
    ) -> str:
        taken = self._channels
        name = label
        while name in taken:
            name += "'"
        self._channels[name] = layer.channels([taken[i] for i in inputs])
        self._nodes.append(Node(name, layer, tuple(inputs)))
        self._weights[name] = weights or {}
        return name

    def layer(
        self,
        proto: onnx.NodeProto,
        layer: Layer,
        inputs: list[str],
        weights: dict[str, Constant] | None = None,
    ) -> str:
        """Add a layer under the node's name."""
        return self._add(layer, inputs, proto.name or proto.output[0], weights)

    def source(self, proto: onnx.NodeProto, index: int = 0) -> str:
        """The layer that makes input ``index``."""
        name = proto.input[index] if index < len(proto.input) else ""
        if name in self._constants:
            raise _Unsupported("works on a constant where the volume is expected")
        if name not in self._names:
            raise _Unsupported(f"its input {name!r} is made by no node")
        return self._names[name]

    def constant(self, proto: onnx.NodeProto, index: int) -> Constant | None:
        """Input ``index`` as a constant; None where it is not given."""
        name = proto.input[index] if index < len(proto.input) else ""
        if not name:
            return None
        if name not in self._constants:
            raise _Unsupported(f"its input {name!r} must be a constant")
        return self._constants[name]

    def weights(self, proto: onnx.NodeProto, index: int) -> Constant:
        """Input ``index`` as a constant that must be there."""
        value = self.constant(proto, index)
        if value is None:
            raise _Unsupported(f"its input {index} is missing")
        return value

    def channels(self, name: str) -> int:
        """Channels of a layer."""
        return self._channels[name]

    def spatial(self, values: list[int], neutral: int) -> Size:
        """A list per spatial axis as (z, y, x)."""
        if len(values) != self.rank - 2:
            raise _Unsupported(f"{len(values)} values for {self.rank - 2} spatial axes")
        return triple((neutral,) * (5 - self.rank) + tuple(int(v) for v in values))

    def axis(self, value: int) -> int:
        """An axis counted from 0, negative ones resolved."""
        return value + self.rank if value < 0 else value

    def per_channel(self, constant: Constant, channels: int) -> Constant:
        """A constant that broadcasts along channels only, as one value per channel."""
        shape = (1,) * (self.rank - constant.ndim) + constant.shape
        wide = shape[1] if len(shape) == self.rank else 0
        if len(shape) != self.rank or prod(shape) != wide or wide not in (1, channels):
            raise _Unsupported(
                f"a constant of shape {list(constant.shape)} does not go by channels ({channels})"
            )
        return np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,))


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}


def _text(value: Any, default: str) -> str:
    return value.decode() if isinstance(value, bytes) else default


def _padding(reader: _Reader, attributes: dict[str, Any], kernel: Size) -> Padding:
    rank = reader.rank - 2
    pads = list(attributes.get("pads", [0] * 2 * rank))
    auto = _text(attributes.get("auto_pad"), "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        stride = attributes.get("strides", [1] * rank)
        if any(s != 1 for s in stride):
            raise _Unsupported(f"auto_pad={auto} with a stride: its padding depends on the size")
        dilation = attributes.get("dilations", [1] * rank)
        total = [(k - 1) * d for k, d in zip(kernel[-rank:], dilation, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + more if auto == "SAME_UPPER" else more + less
    elif auto not in ("NOTSET", "VALID"):
        raise _Unsupported(f"auto_pad={auto} is not known")
    if any(p < 0 for p in pads):
        raise _Unsupported(f"negative pads {pads}")
    return reader.spatial(pads[:rank], 0), reader.spatial(pads[rank:], 0)


def _three(reader: _Reader, attributes: dict[str, Any], name: str) -> Size:
    values = reader.spatial(list(attributes.get(name, [1] * (reader.rank - 2))), 1)
    if min(values) < 1:
        raise _Unsupported(f"{name} {list(values)} must be positive")
    return values


def _kernels(reader: _Reader, proto: onnx.NodeProto) -> Constant:
    weight = reader.weights(proto, 1)
    if weight.ndim != reader.rank:
        raise _Unsupported(f"kernels of rank {weight.ndim} on arrays of rank {reader.rank}")
    if weight.size == 0:
        raise _Unsupported(f"kernels of shape {list(weight.shape)} are empty")
    return weight.reshape(*weight.shape[:2], *(1,) * (5 - reader.rank), *weight.shape[2:])


def _bias(reader: _Reader, proto: onnx.NodeProto, channels: int) -> Constant:
    bias = reader.constant(proto, 2)
    return np.zeros(channels) if bias is None else bias


def _conv(reader: _Reader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    weight = _kernels(reader, proto)
    groups = int(attributes.get("group", 1))
    kernel = triple(weight.shape[2:])
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


def _conv_transpose(reader: _Reader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    if "output_shape" in attributes:
        raise _Unsupported("output_shape is not supported: export with pads")
    if _text(attributes.get("auto_pad"), "NOTSET") not in ("NOTSET", "VALID"):
        raise _Unsupported("auto_pad is not supported: export with pads")
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


def _max_pool(reader: _Reader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    if attributes.get("ceil_mode"):
        raise _Unsupported("ceil_mode=1 is not supported")
    if len([o for o in proto.output if o]) > 1:
        raise _Unsupported("its output of indices is not supported")
    kernel = reader.spatial(list(attributes["kernel_shape"]), 1)
    layer = layers.MaxPool(
        kernel,
        _three(reader, attributes, "strides"),
        _three(reader, attributes, "dilations"),
        _padding(reader, attributes, kernel),
    )
    return reader.layer(proto, layer, [reader.source(proto)])


def _batch_normalization(reader: _Reader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    if attributes.get("training_mode"):
        raise _Unsupported("training_mode=1: export the network in evaluation mode")
    scale, shift, mean, variance = (
        reader.weights(proto, i).astype(np.float64) for i in range(1, 5)
    )
    scale = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return _affine(reader, proto, reader.source(proto), scale, shift - mean * scale)


def _affine(
    reader: _Reader, proto: onnx.NodeProto, source: str, scale: Constant, shift: Constant
) -> str:
    layer = layers.Affine(reader.channels(source))
    return reader.layer(proto, layer, [source], {"scale": scale, "shift": shift})


def _activation(function: Function, alpha: float = 0.0) -> Callable[[_Reader, onnx.NodeProto], str]:
    def read(reader: _Reader, proto: onnx.NodeProto) -> str:
        slope = float(_attributes(proto).get("alpha", alpha))
        return reader.layer(proto, layers.Activation(function, slope), [reader.source(proto)])

    return read


def _prelu(reader: _Reader, proto: onnx.NodeProto) -> str:
    source = reader.source(proto)
    channels = reader.channels(source)
    slope = reader.per_channel(reader.weights(proto, 1), channels)
    layer = layers.Activation("prelu", width=channels)
    return reader.layer(proto, layer, [source], {"slope": slope})


def _softmax(reader: _Reader, proto: onnx.NodeProto) -> str:
    axis = reader.axis(int(_attributes(proto).get("axis", -1 if reader._opset >= 13 else 1)))
    if axis != 1 or reader._opset < 13:
        raise _Unsupported(f"axis {axis} in opset {reader._opset}: only channels from opset 13 on")
    return reader.layer(proto, layers.Softmax(), [reader.source(proto)])


def _arithmetic(
    combine: type[layers.Add] | type[layers.Mul] | None, sign: int, power: int
) -> Callable[[_Reader, onnx.NodeProto], str]:
    """Sum (``power`` 0; ``sign`` -1 subtracts) or product (``power`` 1; -1 divides)."""

    def read(reader: _Reader, proto: onnx.NodeProto) -> str:
        constants = [name in reader._constants for name in proto.input]
        if not any(constants):
            if combine is None:
                raise _Unsupported("of two arrays is not supported, only with a constant")
            inputs = [reader.source(proto, i) for i in range(len(proto.input))]
            return reader.layer(proto, combine(), inputs)
        if constants[0] and (sign < 0 or power < 0):
            raise _Unsupported("with the constant first is not supported")
        source = reader.source(proto, int(constants[0]))
        channels = reader.channels(source)
        value = reader.per_channel(reader.weights(proto, int(not constants[0])), channels)
        neutral = np.zeros(channels)
        if power == 0:
            return _affine(reader, proto, source, neutral + 1, sign * value)
        with np.errstate(divide="ignore"):
            return _affine(reader, proto, source, value.astype(np.float64) ** power, neutral)

    return read


def _concat(reader: _Reader, proto: onnx.NodeProto) -> str:
    if reader.axis(int(_attributes(proto)["axis"])) != 1:
        raise _Unsupported("only channels can be concatenated")
    inputs = [reader.source(proto, i) for i in range(len(proto.input))]
    return reader.layer(proto, layers.Concat(), inputs)


def _pad(reader: _Reader, proto: onnx.NodeProto) -> str:
    if (mode := _text(_attributes(proto).get("mode"), "constant")) != "constant":
        raise _Unsupported(f"mode={mode} is not supported, only constant")
    pads = [int(p) for p in reader.weights(proto, 1).ravel()]
    value = reader.constant(proto, 2)
    axes = reader.constant(proto, 3)
    chosen = range(reader.rank) if axes is None else [reader.axis(int(a)) for a in axes.ravel()]
    low, high = [0] * reader.rank, [0] * reader.rank
    for index, axis in enumerate(chosen):
        low[axis], high[axis] = pads[index], pads[len(chosen) + index]
    if any(low[:2] + high[:2]):
        raise _Unsupported("batch and channels cannot be padded")
    source = reader.source(proto)
    below, above = reader.spatial(low[2:], 0), reader.spatial(high[2:], 0)
    if min(*below, *above) < 0:
        cropped = triple(max(0, -p) for p in below), triple(max(0, -p) for p in above)
        source = reader.layer(proto, layers.Crop(*cropped), [source])
    padding = triple(max(0, p) for p in below), triple(max(0, p) for p in above)
    number = 0.0 if value is None or value.size == 0 else float(cast("Any", value.ravel()[0]))
    return reader.layer(proto, layers.Pad(padding, number), [source])


def _slice(reader: _Reader, proto: onnx.NodeProto) -> str:
    starts, ends = (reader.weights(proto, i).ravel().tolist() for i in (1, 2))
    axes, steps = reader.constant(proto, 3), reader.constant(proto, 4)
    chosen = range(len(starts)) if axes is None else [int(a) for a in axes.ravel()]
    if steps is not None and any(int(s) != 1 for s in steps.ravel()):
        raise _Unsupported("steps other than 1 are not supported")
    source = reader.source(proto)
    low, high = [0] * reader.rank, [0] * reader.rank
    for axis, start, end in zip(map(reader.axis, chosen), starts, ends, strict=True):
        if axis == 1:
            channels = reader.channels(source)
            first, last, _ = slice(start, min(end, channels)).indices(channels)
            source = reader.layer(proto, layers.ChannelSlice(first, last), [source])
        elif start < 0 or 0 <= end < _END:
            raise _Unsupported(
                f"{start}:{end} of axis {axis} depends on the size: write it like 2:-2"
            )
        else:
            low[axis], high[axis] = start, -end if end < 0 else 0
    if low[0] or high[0]:
        raise _Unsupported("the batch cannot be sliced")
    if any(low + high):
        crop = layers.Crop(reader.spatial(low[2:], 0), reader.spatial(high[2:], 0))
        source = reader.layer(proto, crop, [source])
    return source


def _resize(reader: _Reader, proto: onnx.NodeProto) -> str:
    attributes = _attributes(proto)
    mode = _text(attributes.get("mode"), "nearest")
    place = _text(attributes.get("coordinate_transformation_mode"), "half_pixel")
    rounding = _text(attributes.get("nearest_mode"), "round_prefer_floor")
    repeats = (place == "asymmetric" and rounding == "floor") or (
        place in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
        and rounding in ("round_prefer_floor", "round_prefer_ceil")
    )
    if mode != "nearest" or not repeats:
        raise _Unsupported(
            f"mode={mode}, {place}, {rounding}: only nearest neighbours by repeating"
        )
    scales = reader.constant(proto, 2)
    if scales is None or scales.size != reader.rank:
        raise _Unsupported("resizing to sizes instead of by factors is not supported")
    factors = [float(cast("Any", s)) for s in scales.ravel()]
    if factors[:2] != [1.0, 1.0] or any(f != round(f) or f < 1 for f in factors):
        raise _Unsupported(f"factors {factors} are not whole numbers per spatial axis")
    factor = reader.spatial([int(f) for f in factors[2:]], 1)
    return reader.layer(proto, layers.Resize(factor), [reader.source(proto)])


def _pass(reader: _Reader, proto: onnx.NodeProto) -> str:
    return reader.source(proto)


_OPERATORS: dict[str, Callable[[_Reader, onnx.NodeProto], str]] = {
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
