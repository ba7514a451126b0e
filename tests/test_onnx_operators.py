"""ONNX in: every operator against ONNX's own reference, and every refusal."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import oracle
from znni_dask.errors import NetworkError
from znni_dask.importers.onnx import load
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.network.field_of_view import geometry
from znni_dask.network.rewrites import simplify

RANDOM = np.random.default_rng(0)


def model(nodes, constants, *, rank=5, channels=2, opset=17, inputs=1, outputs=1, size=None):
    names = [f"x{i}" if i else "x" for i in range(inputs)]
    shape = ["n", channels, *(size or (f"d{i}" for i in range(rank - 2)))]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names]
    made = [
        helper.make_tensor_value_info(f"y{i}" if i else "y", onnx.TensorProto.FLOAT, None)
        for i in range(outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", values, made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(operator, inputs, output="y", **attributes):
    return helper.make_node(
        operator, inputs.split(), output.split(), f"the_{operator}", **attributes
    )


def loaded(proto, tmp_path):
    onnx.save(proto, tmp_path / "m.onnx")
    return load(tmp_path / "m.onnx")


def f4(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


W3, W2, B = f4(3, 2, 3, 3, 3), f4(3, 2, 3, 3), f4(3)
T3 = f4(2, 3, 2, 2, 2)
END = np.iinfo(np.int64).max
OPERATORS = {
    "Conv": ([node("Conv", "x w b", pads=[1] * 6)], {"w": W3, "b": B}),
    "Conv strided": (
        [node("Conv", "x w", strides=[1, 2, 2], dilations=[2, 1, 1])],
        {"w": W3},
    ),
    "Conv grouped": ([node("Conv", "x w", group=2)], {"w": f4(4, 1, 1, 3, 3)}),
    "Conv same upper": ([node("Conv", "x w", auto_pad="SAME_UPPER")], {"w": f4(3, 2, 2, 4, 3)}),
    "Conv same lower": ([node("Conv", "x w", auto_pad="SAME_LOWER")], {"w": f4(3, 2, 2, 4, 3)}),
    "ConvTranspose": ([node("ConvTranspose", "x w", strides=[2, 2, 2])], {"w": T3}),
    "ConvTranspose output_padding": (
        [
            node(
                "ConvTranspose",
                "x w",
                strides=[2, 2, 2],
                pads=[1, 1, 1, 0, 0, 0],
                output_padding=[0, 1, 1],
            )
        ],
        {"w": f4(2, 3, 3, 3, 3)},
    ),
    "MaxPool": (
        [node("MaxPool", "x", kernel_shape=[1, 2, 2], strides=[1, 2, 2])],
        {},
    ),
    "MaxPool padded": (
        [node("MaxPool", "x", kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6)],
        {},
    ),
    "BatchNormalization": (
        [node("BatchNormalization", "x s b m v", epsilon=1e-3)],
        {"s": f4(2), "b": f4(2), "m": f4(2), "v": np.abs(f4(2)) + 0.1},
    ),
    "Relu": ([node("Relu", "x")], {}),
    "LeakyRelu": ([node("LeakyRelu", "x", alpha=0.2)], {}),
    "LeakyRelu default": ([node("LeakyRelu", "x")], {}),
    "PRelu": ([node("PRelu", "x s")], {"s": f4(2, 1, 1, 1)}),
    "PRelu one slope": ([node("PRelu", "x s")], {"s": f4(1)}),
    "Elu": ([node("Elu", "x", alpha=0.7)], {}),
    "Tanh": ([node("Tanh", "x")], {}),
    "Sigmoid": ([node("Sigmoid", "x")], {}),
    "Softmax": ([node("Softmax", "x", axis=1)], {}),
    "Softmax negative axis": ([node("Softmax", "x", axis=-4)], {}),
    "Add": ([node("Relu", "x", "r"), node("Add", "x r")], {}),
    "Add constant": ([node("Add", "c x")], {"c": f4(1, 2, 1, 1, 1)}),
    "Sub constant": ([node("Sub", "x c")], {"c": np.float32(3)}),
    "Mul": ([node("Tanh", "x", "r"), node("Mul", "x r")], {}),
    "Mul constant": ([node("Mul", "x c")], {"c": f4(2, 1, 1, 1)}),
    "Div constant": ([node("Div", "x c")], {"c": np.float32(255)}),
    "Concat": ([node("Relu", "x", "r"), node("Concat", "x r x", axis=1)], {}),
    "Pad": (
        [node("Pad", "x p v")],
        {"p": np.array([0, 0, 1, 0, 2, 0, 0, 0, 1, 1]), "v": np.float32(0.5)},
    ),
    "Crop": (
        [node("Slice", "x s e a")],
        {"s": np.array([1, 2]), "e": np.array([-2, END]), "a": np.array([3, 4])},
    ),
    "Slice channels": (
        [node("Slice", "x s e a")],
        {"s": np.array([1]), "e": np.array([2]), "a": np.array([1])},
    ),
    "Resize asymmetric": (
        [
            node(
                "Resize",
                "x  s".replace("  ", " r "),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        ],
        {"s": np.array([1, 1, 1, 2, 3], np.float32), "r": np.zeros(0, np.float32)},
    ),
    "Resize half pixel": (
        [node("Resize", "x r s", mode="nearest")],
        {"s": np.array([1, 1, 2, 2, 3], np.float32), "r": np.zeros(0, np.float32)},
    ),
    "Identity, Dropout": ([node("Identity", "x", "i"), node("Dropout", "i")], {}),
    "Slice to the 32-bit end": (
        [node("Slice", "x s e a")],
        {"s": np.array([1]), "e": np.array([2**31 - 1]), "a": np.array([-1])},
    ),
    "Pad nothing": ([node("Pad", "x p")], {"p": np.zeros(10, np.int64)}),
    "Conv same upper strided": (
        [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2, 2])],
        {"w": f4(3, 2, 3, 3, 2)},
    ),
    "Conv same lower strided": (
        [node("Conv", "x w", auto_pad="SAME_LOWER", strides=[1, 2, 1])],
        {"w": f4(3, 2, 2, 3, 4)},
    ),
    "ConvTranspose same": (
        [node("ConvTranspose", "x w", auto_pad="SAME_UPPER", strides=[2, 2, 2])],
        {"w": f4(2, 3, 3, 3, 2)},
    ),
    "MaxPool rounded up": (
        [node("MaxPool", "x", kernel_shape=[3, 2, 3], strides=[3, 3, 2], ceil_mode=1)],
        {},
    ),
    "MaxPool dilated": (
        [node("MaxPool", "x", kernel_shape=[2, 2, 3], dilations=[3, 1, 2])],
        {},
    ),
    "AveragePool": ([node("AveragePool", "x", kernel_shape=[1, 2, 3], strides=[1, 2, 2])], {}),
    "AveragePool padded": (
        [node("AveragePool", "x", kernel_shape=[3] * 3, strides=[2] * 3, pads=[1, 0, 1, 1, 1, 0])],
        {},
    ),
    "AveragePool of padding": (
        [node("AveragePool", "x", kernel_shape=[3] * 3, pads=[1] * 6, count_include_pad=1)],
        {},
    ),
    "AveragePool same": (
        [node("AveragePool", "x", kernel_shape=[3, 2, 3], auto_pad="SAME_UPPER")],
        {},
    ),
    "GlobalAveragePool": ([node("GlobalAveragePool", "x")], {}),
    "InstanceNormalization": (
        [node("InstanceNormalization", "x s b", epsilon=0.01)],
        {"s": f4(2), "b": f4(2)},
    ),
    "GroupNormalization of 18": (
        [node("GroupNormalization", "x s b", num_groups=1)],
        {"s": f4(1), "b": f4(1)},
        18,
    ),
    "GroupNormalization": (
        [node("GroupNormalization", "x s b", num_groups=2)],
        {"s": f4(2), "b": f4(2)},
        21,
    ),
    "group normalisation spelt out": (
        [
            node("Concat", "x x", "xx", axis=1),
            node("Shape", "xx", "shape"),
            node("Reshape", "xx three", "grouped"),
            node("InstanceNormalization", "grouped s b", "normal"),
            node("Reshape", "normal shape", "back"),
            node("Mul", "back g"),
        ],
        {
            "three": np.array([0, 2, -1]),
            "s": np.ones(2, np.float32),
            "b": np.zeros(2, np.float32),
            "g": f4(4, 1, 1, 1),
        },
    ),
    "LayerNormalization of channels": (
        [
            node("Transpose", "x", "last", perm=[0, 2, 3, 4, 1]),
            node("LayerNormalization", "last s b", "normal", axis=-1),
            node("Transpose", "normal", perm=[0, 4, 1, 2, 3]),
        ],
        {"s": f4(2), "b": f4(2)},
    ),
    "LayerNormalization of everything": (
        [node("LayerNormalization", "x s", axis=1)],
        {"s": np.ones((2, 8, 10, 12), np.float32)},
    ),
    "normalisation spelt out": (
        [
            node("ReduceMean", "x", "mean", axes=[1], keepdims=1),
            node("Sub", "x mean", "centred"),
            node("Pow", "centred two", "squares"),
            node("ReduceMean", "squares", "variance", axes=[1], keepdims=1),
            node("Add", "variance tiny", "above"),
            node("Sqrt", "above", "deviation"),
            node("Div", "centred deviation"),
        ],
        {"two": np.float32(2), "tiny": np.float32(0.1)},
    ),
    "RMSNormalization": (
        [
            node("Transpose", "x", "last", perm=[0, 2, 3, 4, 1]),
            node("RMSNormalization", "last s", "normal", axis=-1),
            node("Transpose", "normal", perm=[0, 4, 1, 2, 3]),
        ],
        {"s": f4(2)},
        23,
    ),
    "LpNormalization": ([node("LpNormalization", "x", axis=1, p=2)], {}),
    **{
        name: ([node(name, "x")], {}, 20)
        for name in (
            *("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
            *("HardSwish", "Mish", "Neg", "Reciprocal", "Round", "Selu", "Sign", "Sin"),
            *("Softplus", "Softsign", "ThresholdedRelu", "Celu"),
        )
    },
    "Gelu by tanh": ([node("Gelu", "x", approximate="tanh")], {}, 20),
    "Gelu spelt out": (
        [
            node("Div", "x root", "scaled"),
            node("Erf", "scaled", "e"),
            node("Add", "e one", "above"),
            node("Mul", "x above", "twice"),
            node("Mul", "twice half"),
        ],
        {"root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "Silu spelt out": ([node("Sigmoid", "x", "s"), node("Mul", "x s")], {}),
    "Clip": ([node("Clip", "x low high")], {"low": np.float32(-0.5), "high": np.float32(0.7)}),
    "Clip from above": (
        [helper.make_node("Clip", ["x", "", "high"], ["y"])],
        {"high": np.float32(0.7)},
    ),
    "LogSoftmax": ([node("LogSoftmax", "x", axis=1)], {}),
    "Softmax over a line": ([node("Softmax", "x", axis=-1)], {}),
    "Sub": ([node("Relu", "x", "r"), node("Sub", "x r")], {}),
    "Sub from a constant": ([node("Sub", "c x")], {"c": f4(1, 2, 1, 1, 1)}),
    "Div": ([node("Exp", "x", "r"), node("Div", "x r")], {}),
    "Div of a constant": ([node("Exp", "x", "r"), node("Div", "c r")], {"c": f4(2, 1, 1, 1)}),
    "Min, Max, Sum, Mean": (
        [
            node("Relu", "x", "r"),
            node("Neg", "x", "n"),
            node("Min", "x r", "a"),
            node("Max", "a n x", "b"),
            node("Sum", "a b x", "s"),
            node("Mean", "s r"),
        ],
        {},
    ),
    "Min and Max with constants": (
        [node("Min", "x c", "a"), node("Max", "d a")],
        {"c": np.float32(0.3), "d": f4(2, 1, 1, 1)},
    ),
    "Pow": ([node("Pow", "x three")], {"three": np.float32(3)}),
    "Pow of arrays": ([node("Exp", "x", "e"), node("Pow", "e x")], {}),
    "Sqrt and Log": ([node("Exp", "x", "e"), node("Sqrt", "e", "s"), node("Log", "s")], {}),
    "Where": (
        [
            node("Greater", "x c", "m"),
            node("Less", "x d", "l"),
            node("Or", "m l", "o"),
            node("Not", "o", "n"),
            node("Where", "n x z"),
        ],
        {"c": np.float32(0.5), "d": np.float32(-0.5), "z": np.float32(0)},
    ),
    "Where either is": (
        [
            node("GreaterOrEqual", "x c", "m"),
            node("LessOrEqual", "x d", "l"),
            node("And", "m l", "o"),
            node("Where", "o c x"),
        ],
        {"c": np.float32(-0.5), "d": np.float32(0.5)},
    ),
    **{
        f"{name} of channels": ([node(name, "x", axes=[1], keepdims=1)], {}, 12)
        for name in (
            *("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"),
            "ReduceSumSquare",
        )
    },
    "ReduceMean of all": (
        [node("ReduceMean", "x a", keepdims=1)],
        {"a": np.array([1, 2, 3, 4])},
        18,
    ),
    "ReduceMax of planes": (
        [node("ReduceMax", "x a", "m", keepdims=0), node("Unsqueeze", "m u")],
        {"a": np.array([-1, -2]), "u": np.array([3, 4])},
        18,
    ),
    "ArgMax": ([node("ArgMax", "x", "i", axis=1), node("Cast", "i", to=1)], {}),
    "Split": (
        [node("Concat", "x x", "c", axis=1), node("Split", "c n", "a y", axis=1)],
        {"n": np.array([1, 3])},
    ),
    "Slice every second": (
        [node("Slice", "x s e a t")],
        {
            "s": np.array([1, 0]),
            "e": np.array([END] * 2),
            "a": np.array([2, 4]),
            "t": np.array([2, 3]),
        },
    ),
    "Slice channels backwards": (
        [node("Slice", "x s e a t")],
        {"s": np.array([-1]), "e": np.array([-END]), "a": np.array([1]), "t": np.array([-1])},
    ),
    "Gather channels": ([node("Gather", "x i", axis=1)], {"i": np.array([1, 1, 0])}),
    "Gather one channel": (
        [node("Gather", "x i", "g", axis=1), node("Unsqueeze", "g u")],
        {"i": np.array(1), "u": np.array([1])},
    ),
    "Tile": ([node("Tile", "x t")], {"t": np.array([1, 2, 1, 1, 1])}),
    "Expand": (
        [node("ReduceMean", "x", "m", axes=[1]), node("Expand", "m s")],
        {"s": np.array([1, 3, 1, 1, 1])},
        13,
    ),
    "Pad reflect": (
        [node("Pad", "x p", mode="reflect")],
        {"p": np.array([0, 0, 1, 0, 3, 0, 0, 2, 1, 4])},
    ),
    "Pad edge": (
        [node("Pad", "x p", mode="edge")],
        {"p": np.array([0, 0, 1, 0, 3, 0, 0, 2, 1, 4])},
    ),
    "Pad some axes": (
        [node("Pad", "x p v a")],
        {"p": np.array([1, 2, 0, 3]), "v": np.float32(1), "a": np.array([-1, 2])},
        18,
    ),
    "Pad channels": ([node("Pad", "x p")], {"p": np.array([0, 1, 0, 0, 0, 0, 2, 0, 0, 0])}),
    **{
        f"Resize {place}": (
            [
                node("Resize", "x r s", mode="linear", coordinate_transformation_mode=place),
            ],
            {"s": np.array([1, 1, 2, 3, 4], np.float32), "r": np.zeros(0, np.float32)},
        )
        for place in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    },
    **{
        f"Resize down {mode} {place}": (
            [
                node(
                    "Resize",
                    "x r s",
                    mode=mode,
                    coordinate_transformation_mode=place,
                    nearest_mode=nearest,
                ),
            ],
            {"s": np.array([1, 1, 0.5, 1, 0.25], np.float32), "r": np.zeros(0, np.float32)},
        )
        for mode, place, nearest in (
            ("linear", "half_pixel", "floor"),
            ("linear", "asymmetric", "floor"),
            ("nearest", "asymmetric", "floor"),
            ("nearest", "half_pixel", "round_prefer_floor"),
        )
    },
    "Resize to the size of a skip": (
        [
            node("MaxPool", "x", "p", kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
            node("Shape", "x", "shape"),
            node("Slice", "shape first last", "space"),
            node("Shape", "p", "lead"),
            node("Slice", "lead zero first", "two"),
            node("Concat", "two space", "sizes", axis=0),
            helper.make_node("Resize", ["p", "", "", "sizes"], ["u"], mode="linear"),
            node("Add", "u x"),
        ],
        {"first": np.array([2]), "last": np.array([5]), "zero": np.array([0])},
    ),
    "a pooled value of the size of a skip": (
        [
            node("GlobalAveragePool", "x", "p"),
            node("Shape", "x", "shape"),
            helper.make_node(
                "Resize",
                ["p", "", "", "shape"],
                ["u"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            node("Concat", "u x", axis=1),
        ],
        {},
    ),
    "channel shuffle": (
        [
            node("Concat", "x x x", "c", axis=1),
            node("Reshape", "c split", "s"),
            node("Transpose", "s", "t", perm=[0, 2, 1, 3, 4, 5]),
            node("Reshape", "t joined", "j"),
            node("Conv", "j w"),
        ],
        {
            "split": np.array([1, 3, 2, 8, 10, 12]),
            "joined": np.array([1, 6, 8, 10, 12]),
            "w": f4(2, 6, 1, 1, 1),
        },
    ),
    "pixel shuffle": (
        [
            node("Conv", "x w", "c"),
            node("Reshape", "c split", "s"),
            node("Transpose", "s", "t", perm=[0, 1, 5, 2, 6, 3, 7, 4]),
            node("Reshape", "t joined"),
        ],
        {
            "w": f4(12, 2, 1, 1, 1),
            "split": np.array([1, 1, 2, 3, 2, 8, 10, 12]),
            "joined": np.array([1, 1, 16, 30, 24]),
        },
    ),
    "space to depth": (
        [
            node("Reshape", "x split", "s"),
            node("Transpose", "s", "t", perm=[0, 1, 3, 5, 7, 2, 4, 6]),
            node("Reshape", "t joined", "j"),
            node("Conv", "j w"),
        ],
        {
            "split": np.array([1, 2, 4, 2, 5, 2, 4, 3]),
            "joined": np.array([1, 24, 4, 5, 4]),
            "w": f4(2, 24, 1, 1, 1),
        },
    ),
    "a matrix on channels": (
        [
            node("Transpose", "x", "last", perm=[0, 2, 3, 4, 1]),
            node("MatMul", "last m", "p"),
            node("Add", "p b", "q"),
            node("Transpose", "q", perm=[0, 4, 1, 2, 3]),
        ],
        {"m": f4(2, 5), "b": f4(5)},
    ),
    "a matrix on one axis of space": (
        [
            node("ReduceMean", "x", "one", axes=[1]),
            node("MatMul", "one m", "p"),
            node("Transpose", "p", perm=[0, 4, 2, 3, 1]),
        ],
        {"m": f4(12, 3)},
    ),
    "a matrix on whole sections": (
        [
            node("Transpose", "x", "sections", perm=[0, 2, 1, 3, 4]),
            node("Reshape", "sections flat", "f"),
            node("MatMul", "f m", "p"),
            node("Transpose", "p", "q", perm=[0, 2, 1]),
            node("Unsqueeze", "q axes"),
        ],
        {"flat": np.array([0, 0, -1]), "m": f4(240, 3), "axes": np.array([3, 4])},
    ),
    "dilation as phases in the batch": (
        [
            node("Reshape", "x split", "s"),
            node("Transpose", "s", "t", perm=[3, 5, 0, 1, 2, 4, 6]),
            node("Reshape", "t phases", "p"),
            node("Conv", "p w b", "c", pads=[1, 0, 0, 1, 1, 0]),
            node("Relu", "c", "r"),
            node("Conv", "r v", "r2", pads=[1, 1, 1, 1, 1, 1]),
            node("Reshape", "r2 apart", "a"),
            node("Transpose", "a", "o", perm=[2, 3, 4, 0, 5, 1, 6]),
            node("Reshape", "o joined"),
        ],
        {
            "split": np.array([1, 2, 4, 2, 5, 2, 12]),
            "phases": np.array([4, 2, 4, 5, 12]),
            "w": f4(3, 2, 2, 3, 3),
            "b": B,
            "v": f4(3, 3, 3, 3, 3),
            "apart": np.array([2, 2, 1, 3, 5, 4, 10]),
            "joined": np.array([1, 3, 10, 8, 10]),
        },
    ),
    "group normalisation by means of groups": (
        [
            node("Concat", "x x x", "six", axis=1),
            node("Reshape", "six groups", "g"),
            node("ReduceMean", "g", "mean", axes=[2, 3, 4, 5]),
            node("Sub", "g mean", "d"),
            node("Mul", "d d", "squares"),
            node("ReduceMean", "squares", "variance", axes=[2, 3, 4, 5]),
            node("Add", "variance tiny", "v"),
            node("Sqrt", "v", "root"),
            node("Reciprocal", "root", "one"),
            node("Mul", "one gamma", "scale"),
            node("Mul", "d scale", "n"),
            node("Reshape", "n whole"),
        ],
        {
            "groups": np.array([1, 2, 3, 8, 10, 12]),
            "tiny": np.float32(1e-3),
            "gamma": f4(1, 2, 3, 1, 1, 1),
            "whole": np.array([1, 6, 8, 10, 12]),
        },
    ),
    "less the means over a middle part of the channels": (
        [
            node("Concat", "x x x x x x", "many", axis=1),
            node("Mul", "many b", "m"),
            node("Reshape", "m groups", "g"),
            node("ReduceMean", "g", "mean", axes=[2]),
            node("Sub", "g mean", "d"),
            node("Reshape", "d whole"),
        ],
        {
            "b": f4(12, 1, 1, 1),
            "groups": np.array([1, 2, 2, 3, 8, 10, 12]),
            "whole": np.array([1, 12, 8, 10, 12]),
        },
    ),
    "sums of inner groups of channels": (
        [
            node("Concat", "x x x", "six", axis=1),
            node("Add", "six b", "a"),
            node("Reshape", "a groups", "g"),
            node("ReduceSum", "g axis", "s", keepdims=0),
            node("Concat", "s six", axis=1),
        ],
        {
            "b": f4(6, 1, 1, 1),
            "groups": np.array([1, 2, 3, 8, 10, 12]),
            "axis": np.array([1]),
        },
    ),
    "squeeze and excitation": (
        [
            node("GlobalAveragePool", "x", "p"),
            node("Flatten", "p", "f"),
            node("Gemm", "f m b", "g", transB=1),
            node("Sigmoid", "g", "s"),
            node("Reshape", "s shape", "gate"),
            node("Mul", "x gate"),
        ],
        {"m": f4(2, 2), "b": f4(2), "shape": np.array([0, 0, 1, 1, 1])},
    ),
    "Flatten and Gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f m b", "g", alpha=0.5), node("Reshape", "g s")],
        {"m": f4(1920, 3), "b": f4(3), "s": np.array([1, 3, 1, 1, 1])},
    ),
    "repeated as numpy does": (
        [
            node("Unsqueeze", "x three", "u"),
            node("Tile", "u thrice", "t"),
            node("Reshape", "t tall", "v"),
            node("Unsqueeze", "v five", "w"),
            node("Expand", "w double", "e"),
            node("Reshape", "e wide", "r"),
            node("Conv", "r k", auto_pad="SAME_UPPER"),
        ],
        {
            "three": np.array([3]),
            "thrice": np.array([1, 1, 1, 3, 1, 1]),
            "tall": np.array([1, 2, 24, 10, 12]),
            "five": np.array([5]),
            "double": np.array([1, 2, 24, 10, 12, 2]),
            "wide": np.array([0, 0, 0, 0, -1]),
            "k": f4(3, 2, 3, 1, 3),
        },
    ),
    "channels last": (
        [
            node("Transpose", "x", "last", perm=[0, 2, 3, 4, 1]),
            node("Relu", "last", "r"),
            node("Mul", "r g", "scaled"),
            node("Add", "scaled last", "sum"),
            node("Concat", "sum last", "both", axis=4),
            node("Transpose", "both", "c", perm=[0, 4, 1, 2, 3]),
            node("Conv", "c w", auto_pad="SAME_UPPER"),
        ],
        {"g": f4(2), "w": f4(3, 4, 3, 3, 3)},
    ),
    "constants folded": (
        [
            node("Concat", "p q", "c", axis=0),
            node("Cast", "c", "pads", to=7),
            node("Pad", "x pads"),
        ],
        {"p": np.array([0, 0, 1, 1, 1], np.int32), "q": np.array([0, 0, 0, 2, 0], np.int32)},
    ),
}


def test_resize_honours_its_axes(tmp_path):
    """opset 18 lets scales name their axes, in any order."""
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
    resize = node("Resize", "x r s", nearest_mode="floor", axes=[4, 2, 3], **nearest)
    constants = {"r": np.zeros(0, np.float32), "s": np.array([3, 1, 2], np.float32)}
    network = loaded(model([resize], constants, opset=18), tmp_path)
    assert network.nodes[-1].layer.factor == (1, 2, 3)


MALFORMED = {
    "MaxPool without kernel_shape": [node("MaxPool", "x")],
    "Concat without axis": [node("Concat", "x x")],
    "kernel_shape a number": [node("MaxPool", "x", kernel_shape=2)],
    "strides too few": [node("Conv", "x w", strides=[1, 1])],
    "group a string": [node("Conv", "x w", group="two")],
    "groups that do not divide": [node("Conv", "x u", group=2)],
    "kernel_shape of another size": [node("Conv", "x w", kernel_shape=[5, 5, 5])],
    "no output": [helper.make_node("Relu", ["x"], [], "none")],
    "pooling windows in the padding": [node("MaxPool", "x", kernel_shape=[2] * 3, pads=[2] * 6)],
    "kernel of zero": [node("MaxPool", "x", kernel_shape=[0, 2, 2])],
    "huge window": [node("MaxPool", "x", kernel_shape=[1 << 40] * 3)],
    "huge dilation": [node("Conv", "x w", dilations=[1 << 40] * 3)],
    "slice of axis 9": [node("Slice", "x one two nine")],
    "slice of axis -9": [node("Slice", "x one two minus")],
    "pads too few": [node("Pad", "x one")],
    "infinite scale": [node("Resize", "x r inf")],
    "sum of three": [node("Sub", "x o o")],
    "alpha not a number": [node("LeakyRelu", "x", alpha=float("nan"))],
    "text for weights": [node("Conv", "x text")],
    "statistics of unequal length": [node("BatchNormalization", "x o o o w")],
    "endless range": [node("Range", "zero many tiny", "c"), node("Add", "x c")],
}


@pytest.mark.parametrize("label", MALFORMED)
def test_malformed_nodes_are_refused_with_a_message(label, tmp_path):
    constants = {
        **CONSTANTS,
        "u": f4(3, 1, 1, 1, 1),
        "nine": np.array([9]),
        "minus": np.array([-9]),
        "inf": np.array([1, 1, np.inf, 1, 1], np.float32),
        "text": np.array(["a"] * 4, object),
        "zero": np.float64(0),
        "many": np.float64(1),
        "tiny": np.float64(1e-12),
    }
    with pytest.raises(NetworkError, match="layers are not supported"):
        loaded(model(MALFORMED[label], constants), tmp_path)


def test_reasons_behind_a_failed_node_are_listed_too(tmp_path):
    nodes = [
        helper.make_node("Acosh", ["x"], ["a"], "first"),
        helper.make_node("MaxPool", ["a"], ["b", "i"], "second", kernel_shape=[2] * 3),
        helper.make_node("Conv", ["b", "w"], ["c"], "fine"),
        helper.make_node("Resize", ["c", "r", "s"], ["y"], "third", mode="cubic"),
    ]
    with pytest.raises(NetworkError) as found:
        loaded(model(nodes, CONSTANTS), tmp_path)
    text = str(found.value)
    assert "3 layers" in text
    for name in (
        "first (Acosh)",
        "second (MaxPool): its output of indices",
        "third (Resize): mode=cubic",
    ):
        assert name in text


@pytest.mark.parametrize("label", OPERATORS)
def test_every_operator_means_what_onnx_says(label, tmp_path):
    nodes, constants, *opset = OPERATORS[label]
    proto = model(nodes, constants, opset=opset[0] if opset else 17, size=(8, 10, 12))
    network = loaded(proto, tmp_path)
    x = f4(1, 2, 8, 10, 12)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0][0]
    assert np.abs(want).max() > 0.001
    for same in (network, simplify(network)):
        np.testing.assert_allclose(oracle.whole(same, x[0]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", OPERATORS)
def test_every_operator_is_written_as_it_is_read(label, tmp_path):
    """What ONNX's reference makes of the file we write is what our oracle makes of the network."""
    nodes, constants, *opset = OPERATORS[label]
    proto = model(nodes, constants, opset=opset[0] if opset else 17, size=(8, 10, 12))
    network = loaded(proto, tmp_path)
    x = f4(1, 2, 8, 10, 12)
    written = to_onnx(network)
    onnx.checker.check_model(written)
    got = ReferenceEvaluator(written).run(None, {network.input.name: x})[0][0]
    np.testing.assert_allclose(got, oracle.whole(network, x[0]), rtol=1e-4, atol=1e-5)


def test_pooling_everything_by_the_largest(tmp_path):
    network = loaded(model([node("GlobalMaxPool", "x")], {}), tmp_path)
    x = f4(2, 8, 10, 12)
    np.testing.assert_array_equal(oracle.whole(network, x), x.max(axis=(1, 2, 3), keepdims=True))


def test_a_transposed_convolution_can_be_asked_for_a_shape(tmp_path):
    proto = model(
        [node("ConvTranspose", "x w", strides=[2, 2, 2], output_shape=[16, 20, 24])],
        {"w": f4(2, 3, 3, 3, 2)},
        size=(8, 10, 12),
    )
    layer = loaded(proto, tmp_path).nodes[-1].layer
    assert layer.padding == ((1, 1, 0), (0, 0, 0))  # of an odd total more is cut at the start
    assert [layer.window(a).size(n) for a, n in enumerate((8, 10, 12))] == [16, 20, 24]


def test_what_is_resized_to_a_size_has_that_size_or_the_size_is_not_mapped(tmp_path):
    """Written and read back too."""
    proto = model(
        [
            node("Conv", "x w", "c", strides=[1, 1, 4], pads=[0, 0, 1, 0, 0, 1]),
            node("Shape", "x", "space", start=2),
            node("Shape", "c", "lead", end=2),
            node("Concat", "lead space", "sizes", axis=0),
            helper.make_node("Resize", ["c", "", "", "sizes"], ["y"], mode="linear"),
        ],
        {"w": f4(3, 2, 1, 1, 3)},
    )
    network = loaded(proto, tmp_path)
    for same in (network, loaded(to_onnx(network), tmp_path)):
        assert geometry(same).axes[2].valid_sizes(3) == [4, 8, 12]
        assert same.fingerprint == network.fingerprint


@pytest.mark.parametrize("where", ["SAME_UPPER", "SAME_LOWER"])
def test_same_padding_of_a_stride_is_that_of_sizes_it_divides(where, tmp_path):
    """How much is padded, and where, depends on the size: others than multiples are not mapped,
    though a shortcut's window of one voxel would lose nothing at odd ones. Written and read back
    too."""
    same = {"auto_pad": where, "strides": [2, 2, 2]}
    proto = model(
        [
            node("Conv", "x w", "c", **same),
            node("MaxPool", "x", "p", kernel_shape=[4, 4, 4], **same),
            node("Conv", "p v", "q", auto_pad=where),
            node("Conv", "x v", "s", **same),
            node("Sum", "c q s"),
        ],
        {"w": f4(3, 2, 3, 2, 4), "v": f4(3, 2, 1, 1, 1)},
    )
    network = loaded(proto, tmp_path)
    x = f4(1, 2, 6, 8, 10)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0][0]
    for again in (network, loaded(to_onnx(network), tmp_path)):
        assert again.fingerprint == network.fingerprint
        np.testing.assert_allclose(oracle.whole(again, x[0]), want, rtol=1e-4, atol=1e-5)
        for axis in geometry(again).axes:
            assert axis.valid_sizes(3) == [2, 4, 6]
            assert axis.extension(9, "reflect").size == 10
    alone = loaded(model([node("Conv", "x w", **same)], {"w": f4(3, 2, 3, 3, 3)}), tmp_path)
    assert geometry(alone).axes[0].valid_sizes(3) == [2, 4, 6]


def test_sizes_reckoned_with_in_32_bits_do_not_overflow(tmp_path):
    """As TensorFlow has them, when a matrix is put on the last axis of an array of open size."""
    nodes = [
        node("Transpose", "x", "last", perm=[0, 2, 3, 4, 1]),
        node("Shape", "last", "shape"),
        node("Gather", "shape lead", "dims"),
        node("Cast", "dims", "short", to=onnx.TensorProto.INT32),
        node("Mul", "short once", "same"),
        node("ReduceProd", "same", "rows"),
        node("Cast", "rows", "long", to=onnx.TensorProto.INT64),
        node("Concat", "long two", "flat", axis=0),
        node("Reshape", "last flat", "f"),
        node("MatMul", "f m", "p"),
        node("Concat", "dims five", "wide", axis=0),
        node("Reshape", "p wide", "w"),
        node("Transpose", "w", perm=[0, 4, 1, 2, 3]),
    ]
    constants = {"lead": np.arange(4), "two": np.array([2]), "five": np.array([5]), "m": f4(2, 5)}
    constants["once"] = np.array([1], np.int32)
    network = loaded(model(nodes, constants), tmp_path)
    x = f4(2, 3, 4, 5)
    want = np.einsum("czyx,cd->dzyx", x, constants["m"])
    np.testing.assert_allclose(oracle.whole(network, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_channels_may_lie_last(mode, tmp_path):
    pads = np.array([0, 1, 2, 0, 0, 0, 3, 0, 1, 0])
    nodes = [
        node("Pad", "x pads", "p", mode=mode),
        node("Transpose", "p", "t", perm=[0, 4, 1, 2, 3]),
        node("Conv", "t w b", "c"),
        node("Transpose", "c", perm=[0, 2, 3, 4, 1]),
    ]
    constants = {"pads": pads, "w": W3, "b": B}
    proto = model(nodes, constants, channels=8, size=(10, 12, 2))
    x = f4(1, 8, 10, 12, 2)
    want = np.moveaxis(ReferenceEvaluator(proto).run(None, {"x": x})[0][0], -1, 0)
    got = oracle.whole(loaded(proto, tmp_path), np.moveaxis(x[0], -1, 0))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_every_nth_voxel_as_tensorflow_takes_it(tmp_path):
    """The one in the middle, of an even number the second of two."""
    options = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["y"], "the_Resize", **options)]
    scales = np.array([1, 1, 1, 1 / 2, 1 / 3], np.float32)
    network = loaded(model(nodes, {"scales": scales}, opset=11), tmp_path)
    x = f4(2, 4, 6, 9)
    np.testing.assert_array_equal(oracle.whole(network, x), x[:, :, 1::2, 1::3])


def test_responses_are_normalised_by_their_neighbours(tmp_path):
    """From the definition: what stands for it in ONNX's reference goes over the batch."""
    options = {"size": 4, "alpha": 0.3, "beta": 0.6, "bias": 1.5}
    network = loaded(model([node("LRN", "x", **options)], {}, channels=6), tmp_path)
    x = f4(6, 2, 3, 4)
    squares = [np.sum(x[max(0, c - 1) : c + 3] ** 2, axis=0) for c in range(6)]
    want = x / (1.5 + 0.3 / 4 * np.array(squares)) ** 0.6
    np.testing.assert_allclose(oracle.whole(network, x), want, rtol=1e-5, atol=1e-6)


def test_negative_pads_crop(tmp_path):
    pads = np.array([0, 0, 1, -1, 0, 0, 0, 0, -2, 1])
    network = loaded(model([node("Pad", "x p")], {"p": pads}), tmp_path)
    x = f4(2, 8, 10, 12)
    want = np.pad(x[:, :, 1:-2], [(0, 0), (1, 0), (0, 0), (0, 1)])
    np.testing.assert_array_equal(oracle.whole(network, x), want)


def test_a_2d_network_becomes_a_3d_one_of_flat_kernels(tmp_path):
    proto = model(
        [
            node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
            node("MaxPool", "c", kernel_shape=[2, 2], strides=[2, 2]),
        ],
        {"w": W2, "b": B},
        rank=4,
    )
    network = loaded(proto, tmp_path)
    x = f4(1, 2, 8, 10)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0][0]
    np.testing.assert_allclose(
        oracle.whole(network, x[0][:, None])[:, 0], want, rtol=1e-4, atol=1e-5
    )
    assert geometry(network).field_of_view[0] == 1


UNSUPPORTED = {
    "mode=cubic": [node("Resize", "x r s", mode="cubic")],
    "factors": [node("Resize", "x r h", mode="nearest")],
    "only nearest neighbours by repeating": [node("Resize", "x r s", nearest_mode="ceil")],
    "mode=wrap": [node("Pad", "x q", mode="wrap")],
    "a place that depends": [node("Slice", "x one five two")],
    "turns an axis of space round": [node("Slice", "x minus far two minus")],
    "only channels": [node("Concat", "x x", axis=2)],
    "only channels can be split": [node("Split", "x", "y z", axis=2, num_outputs=2)],
    "single places": [node("Gather", "x one", axis=2)],
    "training_mode": [node("BatchNormalization", "x o o o o", "y a b", training_mode=1)],
    "does not go by channels": [node("Add", "x s")],
    "operator not supported": [node("Cosh", "x")],
    "must be a constant": [node("Conv", "x x")],
    "two computed arrays (attention)": [node("MatMul", "x x")],
    "whose length is open": [node("Flatten", "x", "f", axis=1), node("Gemm", "f w2")],
    "are merged": [node("Reshape", "x flat", "f"), node("Conv", "f w1")],
    "rounds to whole numbers": [node("Cast", "x", to=7)],
    "divides by a constant that is zero": [node("Div", "x zero")],
    "indices is not supported": [node("MaxPool", "x", "y i", kernel_shape=[2] * 3)],
}
CONSTANTS = {
    "r": np.zeros(0, np.float32),
    "s": np.array([1, 1, 2, 2, 2], np.float32),
    "h": np.array([1, 1, 1.5, 2, 2], np.float32),
    "p": np.zeros(10, np.int64),
    "one": np.array([1]),
    "two": np.array([2]),
    "five": np.array([5]),
    "w": W3,
    "t": T3,
    "o": np.ones(2, np.float32),
    "q": np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 1]),
    "minus": np.array([-1]),
    "far": np.array([-END]),
    "zero": np.float32(0),
    "flat": np.array([0, 0, -1]),
    "w1": f4(2, 2, 3),
    "w2": f4(4, 4),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name_with_its_reason(reason, tmp_path):
    nodes = UNSUPPORTED[reason]
    with pytest.raises(NetworkError) as found:
        loaded(model(nodes, CONSTANTS, opset=19), tmp_path)
    assert reason in str(found.value)
    assert f"the_{nodes[-1].op_type} ({nodes[-1].op_type})" in str(found.value)


def test_everything_unsupported_is_listed_at_once(tmp_path):
    nodes = [
        helper.make_node("Acosh", ["x"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "fine"),
        helper.make_node("Cosh", ["b"], ["c"], "second"),
        helper.make_node("Mystery", ["c"], ["y"], "third", domain="com.example"),
    ]
    with pytest.raises(NetworkError) as found:
        loaded(model(nodes, {}), tmp_path)
    text = str(found.value)
    assert "3 layers are not supported" in text
    for name in ("first (Acosh)", "second (Cosh)", "third (com.example.Mystery)"):
        assert name in text
    assert "fine" not in text


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (model([node("Add", "x x1")], {}, inputs=2), "one input, this one has 2: 'x', 'x1'"),
        (model([node("Relu", "x")], {}, opset=9), "opset 9 is too old"),
        (model([node("Relu", "x")], {}, rank=6), "rank 6"),
        (model([node("Relu", "x")], {}, channels="c"), "how many channels"),
        (model([node("HardSwish", "c")], {"c": f4(1, 2, 3, 3, 3)}), "constant where the volume"),
        (model([node("Conv", "x w")], {"w": f4(3, 5, 1, 1, 1)}), "wants 5 channels"),
        (
            model(
                [node("ConstantOfShape", "s", "d"), node("Tile", "d s", "c"), node("Add", "x c")],
                {"s": np.array([1 << 40])},
            ),
            "makes a constant of",
        ),
    ],
)
def test_a_network_of_another_form_is_refused(proto, message, tmp_path):
    with pytest.raises(NetworkError, match=message):
        loaded(proto, tmp_path)
