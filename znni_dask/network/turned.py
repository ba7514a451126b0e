"""A network with two axes of space swapped: z, along which columns are made, and another."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from znni_dask.geometry import turned as turned_size
from znni_dask.network.layers import Conv, ConvTranspose, DepthToSpace, Layer
from znni_dask.network.network import Network, Node, Weights

_SIZES = ("kernel", "stride", "dilation", "factor", "low", "high")


def can_be_turned(network: Network, axis: int) -> bool:
    """Whether `turned` can turn it: not where channels become voxels along both axes, whose order
    would be another; nor where layers reduce over space."""
    if axis == 0:
        return True
    factors = [node.layer.factor for node in network if isinstance(node.layer, DepthToSpace)]
    return not network.nonlocal_layers and all(min(f[0], f[axis]) == 1 for f in factors)


def turned(network: Network, axis: int) -> Network:
    """The network that makes of a volume whose axes 0 and ``axis`` are swapped the answer, swapped
    too."""
    nodes = tuple(Node(n.name, _layer(n.layer, axis), n.inputs) for n in network)
    weights = {
        name: _weights(network[name].layer, found, axis) for name, found in network.weights.items()
    }
    return Network(nodes, network.outputs, weights, network.alike)


def _layer(layer: Layer, axis: int) -> Layer:
    changed: dict[str, Any] = {}
    for field in fields(layer):  # type: ignore[arg-type]  # all layers are dataclasses
        value = getattr(layer, field.name)
        if field.name in _SIZES:
            changed[field.name] = turned_size(value, axis)
        elif field.name == "padding":
            changed[field.name] = tuple(turned_size(side, axis) for side in value)
    return replace(layer, **changed)  # type: ignore[type-var]


def _weights(layer: Layer, found: Weights, axis: int) -> Weights:
    if not isinstance(layer, Conv | ConvTranspose):
        return found
    kernels = np.ascontiguousarray(found["weight"].swapaxes(2, 2 + axis))
    return {**found, "weight": kernels}
