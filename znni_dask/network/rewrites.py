"""Rewrites of a network that leave its answer as it is and its work smaller."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from znni_dask.geometry import AXES, Size, triple
from znni_dask.network.field_of_view import sizes_of
from znni_dask.network.layers import (
    FULL,
    ONES,
    Activation,
    Affine,
    Arithmetic,
    AveragePool,
    Conv,
    ConvTranspose,
    Layer,
    MaxPool,
    Reduce,
)
from znni_dask.network.network import Network, Node, Weights


def simplify(network: Network) -> Network:
    """Fold every affine map (batch normalisation) into the convolution before it, every ReLU into
    the convolution or the sum before it, and affine maps into one another, where there is no other
    reader."""
    nodes: list[Node] = []
    weights: dict[str, Weights] = dict(network.weights)
    renamed: dict[str, str] = {}
    for node in network:
        source = node.inputs[0] if node.inputs else ""
        target = renamed.get(source, source)
        index = next((i for i, n in enumerate(nodes) if n.name == target), 0)
        layer = nodes[index].layer if nodes else node.layer
        if _folds(network, node, layer):
            renamed[node.name] = target
            if isinstance(node.layer, Activation):
                before = cast("Conv | Arithmetic", layer)
                nodes[index] = replace(nodes[index], layer=replace(before, relu=True))
                continue
            affine = weights.pop(node.name)
            if isinstance(layer, Conv | ConvTranspose):
                layer = replace(layer, bias=True)
                weights[target] = _folded(layer, weights[target], affine)
            else:
                weights[target] = _chained(weights[target], affine)
            nodes[index] = replace(nodes[index], layer=layer)
            continue
        inputs = tuple(renamed.get(i, i) for i in node.inputs)
        nodes.append(Node(node.name, node.layer, inputs))
    outputs = {name: renamed.get(node, node) for name, node in network.outputs.items()}
    alike = tuple((renamed.get(a, a), renamed.get(b, b)) for a, b in network.alike)
    return Network(tuple(nodes), outputs, weights, alike)


def computed_in(network: Network, precision: str) -> Network:
    """The network whose convolutions may be computed in some precision."""
    if precision == FULL:
        return network
    nodes = (
        replace(node, layer=replace(node.layer, precision=precision))
        if isinstance(node.layer, Conv)
        else node
        for node in network
    )
    return Network(tuple(nodes), network.outputs, network.weights, network.alike)


def as_sliding(network: Network, window: Size) -> Network:
    """A classifier of windows of one size as a sliding network, where it is one.

    A valid network that ends by reducing what is left of its window to one voxel (a global pool,
    or a matrix on what was flattened) looks at that window alone. What reduces becomes a pool or
    a convolution as large as what it finds in a window of size ``window``; the network then
    slides. Networks that pad, or use what was reduced beside what was not, stay as they are.
    """
    windows = [[node.layer.window(axis) for axis in range(3)] for node in network]
    if not network.nonlocal_layers or any(w.pads or w.up > 1 for axes in windows for w in axes):
        return network
    found = [sizes_of(network, axis, window[axis]) for axis in range(3)]
    sizes = [size for size in found if size is not None]
    if len(sizes) < 3:
        return network
    nodes: list[Node] = []
    for node in network:
        layer = node.layer
        if node in network.nonlocal_layers:
            kernel = tuple(size[node.inputs[0]] for size in sizes)
            replaced = _sliding(layer, triple(kernel))
            if replaced is None:
                return network
            layer = replaced
        mixed = {tuple(network.reduced[i]) for i in node.inputs}
        if len(mixed) > 1:
            return network
        nodes.append(replace(node, layer=layer))
    return Network(tuple(nodes), network.outputs, network.weights, network.alike)


def _sliding(layer: Layer, kernel: Size) -> Layer | None:
    """What a layer that reduces a window to one voxel is on a larger volume."""
    if isinstance(layer, Conv):
        return replace(layer, whole="")
    if isinstance(layer, Reduce) and layer.function in ("mean", "max"):
        kernel = triple(
            k if name in layer.axes else 1 for name, k in zip(AXES, kernel, strict=True)
        )
        return (AveragePool if layer.function == "mean" else MaxPool)(kernel, ONES)
    return None


def _folds(network: Network, node: Node, before: Layer) -> bool:
    """Whether a layer becomes part of the one before it."""
    if not node.inputs:
        return False
    source = node.inputs[0]
    if len(network.readers[source]) > 1 or source in network.outputs.values():
        return False
    if isinstance(before, Conv | Arithmetic) and before.relu:
        return False
    if isinstance(node.layer, Activation):
        summed = isinstance(before, Arithmetic) and before.function == "add"
        return node.layer.function == "relu" and (isinstance(before, Conv) or summed)
    return isinstance(node.layer, Affine) and isinstance(before, Conv | ConvTranspose | Affine)


def _chained(first: Weights, second: Weights) -> Weights:
    """Two affine maps after one another, as one."""
    scale, shift = (second[key].astype(np.float64) for key in ("scale", "shift"))
    return {
        "scale": (first["scale"] * scale).astype(np.float32),
        "shift": (first["shift"] * scale + shift).astype(np.float32),
    }


def _folded(layer: Conv | ConvTranspose, convolution: Weights, affine: Weights) -> Weights:
    scale, shift = affine["scale"].astype(np.float64), affine["shift"].astype(np.float64)
    weight = convolution["weight"].astype(np.float64)
    if isinstance(layer, ConvTranspose):  # (in, out / groups, ...): out lies on two axes
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        per_group = scale.reshape(layer.groups, 1, -1, 1, 1, 1)
        weight = (grouped * per_group).reshape(weight.shape)
    else:
        weight = weight * scale[:, None, None, None, None]
    return {
        "weight": weight.astype(np.float32),
        "bias": (convolution.get("bias", 0.0) * scale + shift).astype(np.float32),
    }
