"""`Network` → ONNX file: the format in which networks are kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from znni_dask.errors import OutputError
from znni_dask.geometry import AXES, Size
from znni_dask.network import layers
from znni_dask.network.network import Network, Node, Weights

OPSET = 21  # the first in which a group normalisation has a scale per channel
IR_VERSION = 10
_ACTIVATIONS: dict[str, tuple[str, ...]] = {  # the operator, and what alpha and beta are called
    "abs": ("Abs",),
    "atan": ("Atan",),
    "ceil": ("Ceil",),
    "celu": ("Celu", "alpha"),
    "cos": ("Cos",),
    "elu": ("Elu", "alpha"),
    "erf": ("Erf",),
    "exp": ("Exp",),
    "floor": ("Floor",),
    "gelu": ("Gelu",),
    "gelu_tanh": ("Gelu",),
    "hard_sigmoid": ("HardSigmoid", "alpha", "beta"),
    "hard_swish": ("HardSwish",),
    "leaky_relu": ("LeakyRelu", "alpha"),
    "log": ("Log",),
    "mish": ("Mish",),
    "neg": ("Neg",),
    "reciprocal": ("Reciprocal",),
    "relu": ("Relu",),
    "round": ("Round",),
    "selu": ("Selu", "alpha", "gamma"),
    "sigmoid": ("Sigmoid",),
    "sign": ("Sign",),
    "sin": ("Sin",),
    "softplus": ("Softplus",),
    "softsign": ("Softsign",),
    "sqrt": ("Sqrt",),
    "tanh": ("Tanh",),
    "thresholded_relu": ("ThresholdedRelu", "alpha"),
}
_JOINS = {
    "add": "Sum",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "min": "Min",
    "max": "Max",
    "pow": "Pow",
    "greater": "Greater",
    "less": "Less",
    "equal": "Equal",
}
_REDUCTIONS = {
    "mean": "ReduceMean",
    "sum": "ReduceSum",
    "max": "ReduceMax",
    "min": "ReduceMin",
    "l1": "ReduceL1",
    "l2": "ReduceL2",
}


def save(network: Network, path: str | Path) -> None:
    """Write ``network`` with its weights as one ONNX file; batch and space stay open."""
    model = to_onnx(network)
    try:
        onnx.save(model, path)
    except OSError as error:
        raise OutputError(f"cannot write network {path}: {error}") from None


def to_onnx(network: Network) -> onnx.ModelProto:
    """The network as an ONNX model of opset 21; `importers.onnx` reads back what computes the
    same."""
    graph = _Graph(dict(network.alike))
    for node in network:
        if node.inputs:
            graph.add(node, network.weights.get(node.name, {}))
    dimensions = ["batch", None, "z", "y", "x"]
    values = [
        helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, [d or network.channels[name] for d in dimensions]
        )
        for name in (network.input.name, *network.outputs.values())
    ]
    outputs = []
    for (name, layer), value in zip(network.outputs.items(), values[1:], strict=True):
        if name not in network.channels:  # where it is not a layer's, the output has its own name
            graph.nodes.append(helper.make_node("Identity", [layer], [name], f"{name} (output)"))
            value.name = name
        outputs.append(value)
    return helper.make_model(
        helper.make_graph(graph.nodes, "network", values[:1], outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="znni_dask",
    )


class _Graph:
    """Nodes and constants of the graph being written."""

    def __init__(self, alike: Mapping[str, str]) -> None:
        self._alike = alike
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, node: Node, weights: Weights) -> None:
        """Write one layer; its output is named after it."""
        name = node.name
        match node.layer:
            case layers.Conv(relu=True) | layers.Arithmetic(relu=True) as layer:
                self.add(Node(f"{name}.sum", replace(layer, relu=False), node.inputs), weights)
                self._emit("Relu", [f"{name}.sum"], name)
            case layers.Conv() as layer if layer.whole:
                self._linear(layer, node, weights)
            case layers.Conv() | layers.ConvTranspose() as layer:
                arrays = [self._constant(f"{name}.{k}", v) for k, v in weights.items()]
                self._node(node, layer.kind, *arrays, **_convolution(layer))
            case layers.MaxPool() | layers.AveragePool() as layer:
                self._node(node, layer.kind, **_pooling(layer))
            case layers.Affine(width=width):
                ones, zeros = np.ones(width, "f4"), np.zeros(width, "f4")
                values = (weights["scale"], weights["shift"], zeros, ones)
                keys = ("scale", "shift", "mean", "variance")
                arrays = [
                    self._constant(f"{name}.{k}", v) for k, v in zip(keys, values, strict=True)
                ]
                self._node(node, "BatchNormalization", *arrays, epsilon=0.0)
            case layers.Activation() as layer:
                self._activation(layer, node, weights)
            case layers.Softmax() as layer:
                self._softmax(layer, node)
            case layers.Reduce() as layer:
                self._reduce(layer, node)
            case layers.Normalize() as layer:
                self._normalize(layer, node, weights)
            case layers.Arithmetic(function="where"):
                self._emit("Cast", [node.inputs[0]], f"{name}.mask", to=onnx.TensorProto.BOOL)
                self._emit("Where", [f"{name}.mask", *node.inputs[1:]], name)
            case layers.Arithmetic(function="greater" | "less" | "equal" as function):
                self._emit(_JOINS[function], list(node.inputs), f"{name}.mask")
                self._emit("Cast", [f"{name}.mask"], name, to=onnx.TensorProto.FLOAT)
            case layers.Arithmetic(function=function):
                self._node(node, _JOINS[function])
            case layers.Concat():
                self._node(node, "Concat", axis=1)
            case layers.Broadcast():
                self._emit("Shape", [node.inputs[1]], f"{name}.space", start=2)
                lead = self._constant(f"{name}.ones", np.array([1, 1], np.int64))
                self._emit("Concat", [lead, f"{name}.space"], f"{name}.shape", axis=0)
                self._emit("Expand", [node.inputs[0], f"{name}.shape"], name)
            case layer:
                self._rearranging(layer, node)

    def _rearranging(self, layer: layers.Layer, node: Node) -> None:
        name = node.name
        match layer:
            case layers.Pad():
                pads = (0, 0, *layer.padding[0], 0, 0, *layer.padding[1])
                arrays = [self._constant(f"{name}.pads", np.array(pads, np.int64))]
                if layer.mode == "constant":
                    value = np.array(layer.value, np.float32)
                    arrays.append(self._constant(f"{name}.value", value))
                self._node(node, "Pad", *arrays, mode=layer.mode)
            case layers.Crop():
                ends = [-h if h else np.iinfo(np.int64).max for h in layer.high]
                self._node(node, "Slice", *self._slice(name, list(layer.low), ends, [2, 3, 4]))
            case layers.Select():
                indices = self._constant(f"{name}.indices", np.array(layer.indices, np.int64))
                self._node(node, "Gather", indices, axis=1)
            case layers.DepthToSpace(factor=(fz, fy, fx)):
                split = np.array([0, -1, fz, fy, fx], np.int64)
                self._emit("Shape", [node.inputs[0]], f"{name}.space", start=2)
                pieces = self._constant(f"{name}.split", split)
                self._emit("Concat", [pieces, f"{name}.space"], f"{name}.shape", axis=0)
                self._emit("Reshape", [node.inputs[0], f"{name}.shape"], f"{name}.parts")
                order = [0, 1, 5, 2, 6, 3, 7, 4]
                self._emit("Transpose", [f"{name}.parts"], f"{name}.moved", perm=order)
                factors = self._constant(f"{name}.factor", np.array([fz, fy, fx], np.int64))
                self._emit("Mul", [f"{name}.space", factors], f"{name}.larger")
                kept = self._constant(f"{name}.lead", np.array([0, -1], np.int64))
                self._emit("Concat", [kept, f"{name}.larger"], f"{name}.whole", axis=0)
                self._emit("Reshape", [f"{name}.moved", f"{name}.whole"], name)
            case layers.Resize():
                nearest = layer.placing == "nearest"
                self._node(
                    node,
                    "Resize",
                    "",
                    *self._target(layer, node),
                    mode="nearest" if nearest else "linear",
                    coordinate_transformation_mode="asymmetric" if nearest else layer.placing,
                    nearest_mode="floor",
                )
            case _:
                raise TypeError(f"no ONNX is known for {layer.kind}")

    def _target(self, layer: layers.Resize, node: Node) -> list[str]:
        """To what a Resize resizes: by factors, or to the size of another layer."""
        name = node.name
        if name not in self._alike:
            scales = np.array((1, 1, *layer.factor), np.float32)
            return [self._constant(f"{name}.scales", scales)]
        self._emit("Shape", [node.inputs[0]], f"{name}.lead", start=0, end=2)
        self._emit("Shape", [self._alike[name]], f"{name}.space", start=2)
        self._emit("Concat", [f"{name}.lead", f"{name}.space"], f"{name}.sizes", axis=0)
        return ["", f"{name}.sizes"]

    def _activation(self, layer: layers.Activation, node: Node, weights: Weights) -> None:
        name = node.name
        match layer.function:
            case "prelu":
                slope = weights["slope"].reshape(-1, 1, 1, 1)
                self._node(node, "PRelu", self._constant(f"{name}.slope", slope))
            case "clip":
                bounds = [
                    self._constant(f"{name}.{k}", np.array(v, np.float32))
                    for k, v in (("low", layer.alpha), ("high", layer.beta))
                ]
                self._node(node, "Clip", *bounds)
            case "pow":
                exponent = np.array(layer.alpha, np.float32)
                self._node(node, "Pow", self._constant(f"{name}.exponent", exponent))
            case "silu":
                self._emit("Sigmoid", [node.inputs[0]], f"{name}.gate")
                self._node(node, "Mul", f"{name}.gate")
            case function:
                operator, *keys = _ACTIVATIONS[function]
                attributes: dict[str, object] = dict(
                    zip(keys, (layer.alpha, layer.beta), strict=False)
                )
                if function == "gelu_tanh":
                    attributes = {"approximate": "tanh"}
                self._node(node, operator, **attributes)

    def _linear(self, layer: layers.Conv, node: Node, weights: Weights) -> None:
        """What a matrix takes in moved last and flattened, the matrix, and the axes back."""
        name = node.name
        taken = [2 + AXES.index(axis) for axis in layer.whole]
        kept = [axis for axis in (2, 3, 4) if axis not in taken]
        shape = self._constant(f"{name}.shape", np.array([*(0 for _ in (0, *kept)), -1], np.int64))
        matrix = self._constant(
            f"{name}.matrix", weights["weight"].reshape(layer.out_channels, -1).T
        )
        bias = self._constant(
            f"{name}.bias", weights.get("bias", np.zeros(layer.out_channels, np.float32))
        )
        axes = self._constant(f"{name}.axes", np.array(taken, np.int64))
        self._emit("Transpose", [node.inputs[0]], f"{name}.last", perm=[0, *kept, 1, *taken])
        self._emit("Reshape", [f"{name}.last", shape], f"{name}.flat")
        self._emit("MatMul", [f"{name}.flat", matrix], f"{name}.product")
        self._emit("Add", [f"{name}.product", bias], f"{name}.sum")
        order = [0, 1 + len(kept), *range(1, 1 + len(kept))]
        self._emit("Transpose", [f"{name}.sum"], f"{name}.first", perm=order)
        self._emit("Unsqueeze", [f"{name}.first", axes], name)

    def _softmax(self, layer: layers.Softmax, node: Node) -> None:
        if len(layer.axes) > 1:
            raise OutputError(f"{node.name}: a softmax over {layer.axes} cannot be written as ONNX")
        self._node(node, layer.kind, axis="nczyx".index(layer.axes))

    def _reduce(self, layer: layers.Reduce, node: Node) -> None:
        if layer.function == "argmax":
            self._emit("ArgMax", [node.inputs[0]], f"{node.name}.index", axis=1, keepdims=1)
            self._emit("Cast", [f"{node.name}.index"], node.name, to=onnx.TensorProto.FLOAT)
            return
        axes = np.array(["nczyx".index(a) for a in layer.axes], np.int64)
        array = self._constant(f"{node.name}.axes", axes)
        self._node(node, _REDUCTIONS[layer.function], array, keepdims=1)

    def _normalize(self, layer: layers.Normalize, node: Node, weights: Weights) -> None:
        name = node.name
        arrays = [self._constant(f"{name}.{k}", weights[k]) for k in ("scale", "shift")]
        if layer.space == "zyx":
            self._node(
                node,
                "GroupNormalization",
                *arrays,
                epsilon=layer.epsilon,
                num_groups=layer.groups,
            )
        elif not layer.space and layer.groups == 1:
            self._emit("Transpose", [node.inputs[0]], f"{name}.last", perm=[0, 2, 3, 4, 1])
            inputs = [f"{name}.last", *arrays]
            self._emit("LayerNormalization", inputs, f"{name}.normal", epsilon=layer.epsilon)
            self._emit("Transpose", [f"{name}.normal"], name, perm=[0, 4, 1, 2, 3])
        else:
            raise OutputError(f"{name}: {layer.kind} {layer.summary} cannot be written as ONNX")

    def _node(self, node: Node, operator: str, *arrays: str, **attributes: object) -> None:
        """The node that makes a layer's output from its inputs and constants."""
        self._emit(operator, [*node.inputs, *arrays], node.name, **attributes)

    def _emit(self, operator: str, inputs: list[str], name: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _slice(self, name: str, starts: list[int], ends: list[int], axes: list[int]) -> list[str]:
        return [
            self._constant(f"{name}.{key}", np.array(value, np.int64))
            for key, value in (("starts", starts), ("ends", ends), ("axes", axes))
        ]


def _pooling(layer: layers.MaxPool | layers.AveragePool) -> dict[str, object]:
    attributes: dict[str, object] = {
        "kernel_shape": layer.kernel,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "ceil_mode": int(layer.ceil),
        **_pads(layer),
    }
    if isinstance(layer, layers.AveragePool):
        attributes["count_include_pad"] = int(layer.count_padding)
    return attributes


def _pads(
    layer: layers.MaxPool | layers.AveragePool | layers.Conv | layers.ConvTranspose,
) -> dict[str, object]:
    low, high = layer.padding
    if isinstance(layer, layers.ConvTranspose) or not layer.same:
        return {"pads": low + high}
    return {"auto_pad": "SAME_LOWER" if low > high else "SAME_UPPER"}


def _convolution(layer: layers.Conv | layers.ConvTranspose) -> dict[str, object]:
    low, high = layer.padding
    attributes: dict[str, object] = {
        "kernel_shape": layer.kernel,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": layer.groups,
        **_pads(layer),
    }
    if isinstance(layer, layers.ConvTranspose) and min(high) < 0:
        extra: Size = (max(0, -high[0]), max(0, -high[1]), max(0, -high[2]))
        attributes["output_padding"] = extra
        attributes["pads"] = low + tuple(max(0, h) for h in high)
    return attributes
