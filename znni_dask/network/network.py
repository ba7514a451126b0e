"""A network: layers as a directed acyclic graph, with their weights beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import NetworkError
from znni_dask.geometry import AXES
from znni_dask.network.layers import Concat, Input, Layer

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Node:
    """A layer with its name and the names of the nodes it reads."""

    name: str
    layer: Layer
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in an order in which every node follows its inputs; one input.

    ``outputs`` says under which name which node is handed out; what is computed has one output,
    `only` picks it. ``weights[node][array]`` are float32. Raises `NetworkError` where nodes,
    channels, sampling or weights contradict each other; where a network is built, it is sound.

    ``alike`` are pairs of nodes that have the same size by definition (an array resized to the
    size of another): sizes of the volume at which they would not are not mapped exactly.

    >>> from znni_dask.network.build import Builder
    >>> b = Builder(channels=1)
    >>> network = b.network(b.conv(b.input, 4, kernel=3))
    >>> network.out_channels
    4
    """

    nodes: tuple[Node, ...]
    outputs: Mapping[str, str]
    weights: Mapping[str, Weights]
    alike: tuple[tuple[str, str], ...] = ()

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
            f"{' and '.join(str(self.channels[o]) for o in self.outputs.values())} channels, "
            f"{self.parameters:,} parameters>"
        )

    @property
    def input(self) -> Node:
        """The node that stands for the volume."""
        return self.nodes[0]

    @property
    def output(self) -> str:
        """The node that is the answer; raises `NetworkError` where there are several."""
        if len(self.outputs) > 1:
            raise NetworkError(
                f"the network has {len(self.outputs)} outputs ({', '.join(self.outputs)}): "
                "choose one of them"
            )
        return next(iter(self.outputs.values()))

    def only(self, *names: str) -> Network:
        """The network with one of its outputs, or with some joined as channels of one."""
        for name in names:
            if name not in self.outputs:
                raise NetworkError(
                    f"the network has no output {name!r}: it has {', '.join(self.outputs)}"
                )
        chosen = [self.outputs[name] for name in names]
        nodes, output = list(self.nodes), chosen[0]
        if len(chosen) > 1:
            output = unused_name("outputs", self._by_name)
            nodes.append(Node(output, Concat(), tuple(chosen)))
        return without_unused(nodes, {"+".join(names): output}, self.weights, self.alike)

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
            z, y, x = (
                self._source_spacing(node, axis, found) * node.layer.window(axis).step
                for axis in range(3)
            )
            found[node.name] = (z, y, x)
        return found

    def _source_spacing(
        self, node: Node, axis: int, found: Mapping[str, tuple[Fraction, Fraction, Fraction]]
    ) -> Fraction:
        """The spacing that a node's inputs have in common, those of one voxel left aside."""
        extended = not_reduced(node.inputs, self.reduced, axis)
        sources = {found[i][axis] for i in extended} or {Fraction(1)}
        if len(sources) > 1:
            raise NetworkError(
                f"layer {node.name!r} joins arrays of voxel spacing "
                f"{' and '.join(map(str, sorted(sources)))} along {AXES[axis]}: "
                "branches must be down- and up-sampled alike"
            )
        return sources.pop()

    @cached_property
    def reduced(self) -> dict[str, tuple[bool, bool, bool]]:
        """For every node the axes along which it is one voxel, whatever the volume's size."""
        found: dict[str, tuple[bool, bool, bool]] = {}
        for node in self:
            found[node.name] = reduces(node.layer, node.inputs, found)
        return found

    @cached_property
    def nonlocal_layers(self) -> tuple[Node, ...]:
        """The layers whose outputs depend on all of an axis: with any of them the network has no
        answer in patches."""
        return tuple(
            node for node in self if any(node.layer.window(axis).whole for axis in range(3))
        )

    @cached_property
    def readers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each node."""
        return {
            node.name: tuple(other for other in self if node.name in other.inputs) for node in self
        }

    @cached_property
    def fingerprint(self) -> str:
        """A hash of layers, their names and weights: who has it gives the same answers."""
        described = (self.nodes, dict(self.outputs), self.alike)
        digest = hashlib.sha256(repr(described).encode())
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
        if not self.outputs:
            raise NetworkError("a network has at least one output")
        ends = set(self.outputs.values())
        if missing := sorted(ends - seen):
            raise NetworkError(f"the output {missing[0]!r} is not a layer of the network")
        read = ends.union({self.nodes[0].name}, *(node.inputs for node in self))
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


def reduces(
    layer: Layer, inputs: Sequence[str], reduced: Mapping[str, tuple[bool, bool, bool]]
) -> tuple[bool, bool, bool]:
    """Along which axes a layer's output is one voxel: that it reduces, or that all its inputs,
    of which ``reduced`` tells the same, were reduced to."""
    z, y, x = (
        layer.window(axis).single or (bool(inputs) and all(reduced[i][axis] for i in inputs))
        for axis in range(3)
    )
    return z, y, x


def not_reduced(
    inputs: Sequence[str], reduced: Mapping[str, tuple[bool, bool, bool]], axis: int
) -> Sequence[str]:
    """The inputs that an axis of a layer's output comes from: one voxel is repeated along the
    others', unless all are one voxel."""
    return [i for i in inputs if not reduced[i][axis]] or inputs


def unused_name(name: str, taken: Container[str]) -> str:
    """``name``, with dashes behind it where it is taken."""
    while name in taken:
        name += "'"
    return name


def without_unused(
    nodes: list[Node],
    outputs: Mapping[str, str],
    weights: Mapping[str, Mapping[str, NDArray[np.generic]]],
    alike: Sequence[tuple[str, str]] = (),
) -> Network:
    """A network of the nodes that the outputs depend on, its weights made float32."""
    needed = {*outputs.values(), nodes[0].name}
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
    return Network(kept, outputs, as_float, tuple(p for p in alike if needed.issuperset(p)))
