"""Rewrites of a network that leave its answer as it is and its work smaller."""

from __future__ import annotations

import numpy as np

from znni_dask.network.layers import Affine, Conv, ConvTranspose
from znni_dask.network.network import Network, Node, Weights


def simplify(network: Network) -> Network:
    """Fold every affine map (batch normalisation) into the convolution before it, where that
    convolution has no other reader."""
    nodes: list[Node] = []
    weights: dict[str, Weights] = dict(network.weights)
    renamed: dict[str, str] = {}
    for node in network:
        source = node.inputs[0] if node.inputs else ""
        if isinstance(node.layer, Affine) and _folds(network, source):
            target = renamed.get(source, source)
            layer = network[source].layer
            weights[target] = _folded(layer, weights[target], weights.pop(node.name))
            renamed[node.name] = target
            continue
        inputs = tuple(renamed.get(i, i) for i in node.inputs)
        nodes.append(Node(node.name, node.layer, inputs))
    return Network(tuple(nodes), renamed.get(network.output, network.output), weights)


def _folds(network: Network, source: str) -> bool:
    return (
        isinstance(network[source].layer, Conv | ConvTranspose)
        and len(network.readers[source]) == 1
        and source != network.output
    )


def _folded(layer: object, convolution: Weights, affine: Weights) -> Weights:
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
        "bias": (convolution["bias"] * scale + shift).astype(np.float32),
    }
