"""A network: layers as a directed acyclic graph, with their weights beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import NetworkError
from znni_dask.network.layers import Input, Layer

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Node:
    """A layer with its name and the names of the nodes it reads."""

    name: str
    layer: Layer
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in an order in which every node follows its inputs; one input, one output.

    ``weights[node][array]`` are float32. Raises `NetworkError` where nodes, channels, sampling
    or weights contradict each other; where a network is built, it is sound.

    >>> from znni_dask.network.build import Builder
    >>> b = Builder(channels=1)
    >>> network = b.network(b.conv(b.input, 4, kernel=3))
    >>> network.out_channels
    4
    """

    nodes: tuple[Node, ...]
    output: str
    weights: Mapping[str, Weights]

    def __post_init__(self) -> None:
        self._check_names()
        for node in self:
            self._check_weights(node)
        _ = self.channels, self.spacing

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def __repr__(self) -> str:
        return (
            f"<Network of {len(self.nodes) - 1} layers, {self.in_channels} → "
            f"{self.out_channels} channels, {self.parameters:,} parameters>"
        )

    @property
    def input(self) -> Node:
        """The node that stands for the volume."""
        return self.nodes[0]

    @property
    def in_channels(self) -> int:
        """Channels of the volume."""
        return self.channels[self.input.name]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.channels[self.output]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(array.size for arrays in self.weights.values() for array in arrays.values())

    @cached_property
    def channels(self) -> dict[str, int]:
        """Channels of every node's output."""
        found: dict[str, int] = {}
        for node in self:
            try:
                found[node.name] = node.layer.channels([found[i] for i in node.inputs])
            except NetworkError as error:
                raise NetworkError(f"layer {node.name!r}: {error}") from None
        return found

    @cached_property
    def spacing(self) -> dict[str, tuple[Fraction, Fraction, Fraction]]:
        """Distance of neighbouring voxels of every node's output, in voxels of the volume."""
        found: dict[str, tuple[Fraction, Fraction, Fraction]] = {}
        for node in self:
            sources = {found[i] for i in node.inputs} or {(Fraction(1),) * 3}
            if len(sources) > 1:
                shown = " and ".join("·".join(map(str, s)) for s in sorted(sources))
                raise NetworkError(
                    f"layer {node.name!r} joins arrays of voxel spacing {shown}: "
                    "branches must be down- and up-sampled alike"
                )
            source = sources.pop()
            z, y, x = (source[axis] * node.layer.window(axis).step for axis in range(3))
            found[node.name] = (z, y, x)
        return found

    @cached_property
    def readers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each node."""
        return {
            node.name: tuple(other for other in self if node.name in other.inputs) for node in self
        }

    @cached_property
    def fingerprint(self) -> str:
        """A hash of layers, their names and weights: who has it gives the same answers."""
        digest = hashlib.sha256(repr((self.nodes, self.output)).encode())
        for name in sorted(self.weights):
            for key in sorted(self.weights[name]):
                digest.update(f"{name}/{key}".encode())
                digest.update(np.ascontiguousarray(self.weights[name][key]).data)
        return digest.hexdigest()

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self}

    def _check_names(self) -> None:
        if not self.nodes or not isinstance(self.nodes[0].layer, Input):
            raise NetworkError("a network begins with its Input node")
        seen: set[str] = set()
        for node in self:
            if node.name in seen:
                raise NetworkError(f"two layers are named {node.name!r}")
            missing = [i for i in node.inputs if i not in seen]
            if missing:
                raise NetworkError(
                    f"layer {node.name!r} reads {missing[0]!r}, which no layer before it makes"
                )
            if isinstance(node.layer, Input) and node is not self.nodes[0]:
                raise NetworkError(f"a second Input, {node.name!r}: a network has one")
            seen.add(node.name)
        if self.output not in seen:
            raise NetworkError(f"the output {self.output!r} is not a layer of the network")
        read = {self.output, self.nodes[0].name}.union(*(node.inputs for node in self))
        if unread := seen - read:
            raise NetworkError(f"nothing reads the layer {sorted(unread)[0]!r}")

    def _check_weights(self, node: Node) -> None:
        found = {key: array.shape for key, array in self.weights.get(node.name, {}).items()}
        if found != (wanted := node.layer.weight_shapes()):
            raise NetworkError(
                f"layer {node.name!r} ({node.layer.kind}) wants weights {wanted}, got {found}"
            )
        for key, array in self.weights.get(node.name, {}).items():
            if array.dtype != np.float32:
                raise NetworkError(f"weights {node.name}/{key} are {array.dtype}, not float32")
            if not np.isfinite(array).all():
                raise NetworkError(f"weights {node.name}/{key} hold NaN or infinity")


def without_unused(
    nodes: list[Node], output: str, weights: Mapping[str, Mapping[str, NDArray[np.generic]]]
) -> Network:
    """A network of the nodes that the output depends on, its weights made float32."""
    needed = {output, nodes[0].name}
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    kept = tuple(node for node in nodes if node.name in needed)
    as_float = {
        node.name: {
            key: cast("NDArray[np.float32]", np.ascontiguousarray(array, np.float32))
            for key, array in weights[node.name].items()
        }
        for node in kept
        if weights.get(node.name)
    }
    return Network(kept, output, as_float)
