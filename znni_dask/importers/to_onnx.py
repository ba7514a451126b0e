"""`Network` → ONNX file: the format in which networks are kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from znni_dask.errors import OutputError
from znni_dask.geometry import Size
from znni_dask.network import layers
from znni_dask.network.layers import Padding
from znni_dask.network.network import Network, Node

OPSET = 17
IR_VERSION = 8
_ACTIVATIONS = {
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "elu": "Elu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
}


def save(network: Network, path: str | Path) -> None:
    """Write ``network`` with its weights as one ONNX file; batch and space stay open."""
    model = to_onnx(network)
    try:
        onnx.save(model, path)
    except OSError as error:
        raise OutputError(f"cannot write network {path}: {error}") from None


def to_onnx(network: Network) -> onnx.ModelProto:
    """The network as an ONNX model of opset 17; `importers.onnx` reads it back as it was."""
    graph = _Graph()
    for node in network:
        if node.inputs:
            graph.add(node, network)
    dimensions = ["batch", None, "z", "y", "x"]
    values = [
        helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, [d or network.channels[name] for d in dimensions]
        )
        for name in (network.input.name, network.output)
    ]
    return helper.make_model(
        helper.make_graph(graph.nodes, "network", values[:1], values[1:], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="znni_dask",
    )


class _Graph:
    """Nodes and constants of the graph being written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, node: Node, network: Network) -> None:
        """Write one layer; its output is named after it."""
        layer, name = node.layer, node.name
        weights = network.weights.get(name, {})
        inputs = list(node.inputs)
        operator, attributes = layer.kind, {}
        match layer:
            case layers.Conv() | layers.ConvTranspose():
                inputs += [self._constant(f"{name}.{k}", weights[k]) for k in ("weight", "bias")]
                attributes = _convolution(layer)
            case layers.MaxPool():
                attributes = {
                    "kernel_shape": layer.kernel,
                    "strides": layer.stride,
                    "dilations": layer.dilation,
                    "pads": _pads(layer.padding),
                }
            case layers.Affine():
                operator, attributes = "BatchNormalization", {"epsilon": 0.0}
                ones, zeros = np.ones(layer.width, "f4"), np.zeros(layer.width, "f4")
                values = (weights["scale"], weights["shift"], zeros, ones)
                keys = ("scale", "shift", "mean", "variance")
                inputs += [
                    self._constant(f"{name}.{k}", v) for k, v in zip(keys, values, strict=True)
                ]
            case layers.Activation(function="prelu"):
                operator = "PRelu"
                inputs.append(
                    self._constant(f"{name}.slope", weights["slope"].reshape(-1, 1, 1, 1))
                )
            case layers.Activation():
                operator = _ACTIVATIONS[layer.function]
                if layer.function in ("leaky_relu", "elu"):
                    attributes = {"alpha": layer.alpha}
            case layers.Softmax() | layers.Concat():
                attributes = {"axis": 1}
            case layers.Pad():
                pads = (0, 0, *layer.padding[0], 0, 0, *layer.padding[1])
                inputs.append(self._constant(f"{name}.pads", np.array(pads, np.int64)))
                inputs.append(self._constant(f"{name}.value", np.array(layer.value, np.float32)))
            case layers.Crop():
                operator = "Slice"
                ends = [-h if h else np.iinfo(np.int64).max for h in layer.high]
                inputs += self._slice(name, list(layer.low), ends, [2, 3, 4])
            case layers.ChannelSlice():
                operator = "Slice"
                inputs += self._slice(name, [layer.start], [layer.stop], [1])
            case layers.Resize():
                attributes = {
                    "mode": "nearest",
                    "coordinate_transformation_mode": "asymmetric",
                    "nearest_mode": "floor",
                }
                scales = np.array((1, 1, *layer.factor), np.float32)
                inputs += ["", self._constant(f"{name}.scales", scales)]
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _slice(self, name: str, starts: list[int], ends: list[int], axes: list[int]) -> list[str]:
        return [
            self._constant(f"{name}.{key}", np.array(value, np.int64))
            for key, value in (("starts", starts), ("ends", ends), ("axes", axes))
        ]


def _pads(padding: Padding) -> tuple[int, ...]:
    return padding[0] + padding[1]


def _convolution(layer: layers.Conv | layers.ConvTranspose) -> dict[str, object]:
    low, high = layer.padding
    attributes: dict[str, object] = {
        "kernel_shape": layer.kernel,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": layer.groups,
        "pads": low + high,
    }
    if isinstance(layer, layers.ConvTranspose) and min(high) < 0:
        extra: Size = (max(0, -high[0]), max(0, -high[1]), max(0, -high[2]))
        attributes["output_padding"] = extra
        attributes["pads"] = low + tuple(max(0, h) for h in high)
    return attributes
