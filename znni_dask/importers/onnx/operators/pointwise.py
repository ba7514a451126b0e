"""Functions of every value, and what leaves values as they are."""

from __future__ import annotations

import numpy as np
import onnx

from znni_dask.importers.onnx import layouts, numbers
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import Value
from znni_dask.importers.onnx.operators.attributes import attributes_of, finite, text
from znni_dask.importers.onnx.operators.joining import affine
from znni_dask.network.layers import Activation, Function


def _plain(function: Function, *parameters: tuple[str, float]) -> Operator:
    """A function whose parameters are attributes with these defaults."""

    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        attributes = attributes_of(proto)
        values = [finite(attributes.get(name, default), name) for name, default in parameters]
        alpha, beta = [*values, 0.0, 0.0][:2]
        return reader.pointwise(proto, Activation(function, alpha, beta), reader.given(proto))

    return read


def _gelu(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    approximate = text(attributes_of(proto).get("approximate"), "none")
    layer = Activation("gelu_tanh" if approximate == "tanh" else "gelu")
    return reader.pointwise(proto, layer, reader.given(proto))


def _then(function: Function, scale: float, shift: float) -> Operator:
    """A function, scaled and shifted: what TensorFlow has and ONNX has not."""

    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        value = reader.pointwise(proto, Activation(function), reader.given(proto))
        ones = np.ones(reader.assembly.channels(value))
        return affine(reader, proto, value, scale * ones, shift * ones)

    return read


def _swish(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    if (alpha := attributes_of(proto).get("alpha", 1.0)) != 1.0:
        raise UnsupportedNode(f"alpha={alpha} is not supported, only 1")
    return reader.pointwise(proto, Activation("silu"), reader.given(proto))


def _clip(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    bounds = []
    for index, none in ((1, -np.inf), (2, np.inf)):
        bound = reader.constant(proto, index)
        bounds.append(none if bound is None or bound.size == 0 else float(bound.ravel()[0]))
    if np.isnan(bounds).any():
        raise UnsupportedNode(f"its bounds are {bounds}")
    layer = Activation("clip", alpha=bounds[0], beta=bounds[1])
    return reader.pointwise(proto, layer, reader.given(proto))


def _prelu(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    channels = reader.assembly.channels(value)
    slope = layouts.per_channel(reader.weights(proto, 1), value, channels)
    layer = Activation("prelu", width=channels)
    return reader.pointwise(proto, layer, value, {"slope": slope})


def _cast(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    """To real numbers of any precision is nothing: networks compute in float32. What is a whole
    number already may be called one."""
    value = reader.given(proto)
    wanted, given = numbers.of_type(attributes_of(proto)["to"]), reader.numbers_of(proto)
    if wanted == "truth" and given != "truth":
        raise UnsupportedNode("asks where numbers are not zero: write it as a comparison")
    if wanted == "whole" and given == "real" and not reader.assembly.whole(value):
        raise UnsupportedNode("rounds to whole numbers in the middle of the network")
    return value


def _cast_like(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    if reader.is_known(proto.input[1]):
        like = reader.constant(proto, 1)
        kind = "real" if like is None or like.dtype.kind in "fV" else like.dtype.name
    else:
        kind = reader.numbers_of(onnx.NodeProto(input=proto.input[1:]))
    if kind != "real" or reader.numbers_of(proto) != "real":
        raise UnsupportedNode("makes other than real numbers")
    return reader.given(proto)


def _dropout(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    training = reader.constant(proto, 2)
    if training is not None and training.any():
        raise UnsupportedNode("training_mode=1: export the network in evaluation mode")
    return reader.given(proto)


def _pass(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    return reader.given(proto)


OPERATORS: dict[str, Operator] = {
    "Abs": _plain("abs"),
    "Atan": _plain("atan"),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _plain("ceil"),
    "Celu": _plain("celu", ("alpha", 1.0)),
    "Clip": _clip,
    "Cos": _plain("cos"),
    "Dropout": _dropout,
    "Elu": _plain("elu", ("alpha", 1.0)),
    "Erf": _plain("erf"),
    "Erfc": _then("erf", -1.0, 1.0),
    "Exp": _plain("exp"),
    "Expm1": _then("exp", 1.0, -1.0),
    "Floor": _plain("floor"),
    "Gelu": _gelu,
    "HardSigmoid": _plain("hard_sigmoid", ("alpha", 0.2), ("beta", 0.5)),
    "HardSwish": _plain("hard_swish"),
    "Identity": _pass,
    "LeakyRelu": _plain("leaky_relu", ("alpha", 0.01)),
    "Log": _plain("log"),
    "Mish": _plain("mish"),
    "Neg": _plain("neg"),
    "PRelu": _prelu,
    "Reciprocal": _plain("reciprocal"),
    "Relu": _plain("relu"),
    "Round": _plain("round"),
    "Selu": _plain("selu", ("alpha", 1.6732632), ("gamma", 1.0507010)),
    "Sigmoid": _plain("sigmoid"),
    "Sign": _plain("sign"),
    "Sin": _plain("sin"),
    "Softplus": _plain("softplus"),
    "Softsign": _plain("softsign"),
    "Sqrt": _plain("sqrt"),
    "Swish": _swish,
    "Tanh": _plain("tanh"),
    "ThresholdedRelu": _plain("thresholded_relu", ("alpha", 1.0)),
}
