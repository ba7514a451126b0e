"""A network in two runs of layers: those up to the split, the paper's θ, and those behind it.

Each run is a network of its own, so that each can have schedules, primitives and a device of its
own. Of a dense network whose first run makes fragments the second is applied to every fragment for
itself, to some of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from znni_dask.errors import OptionError
from znni_dask.geometry import Box, Size, ceil_divide, triple, volume
from znni_dask.network.field_of_view import Interval
from znni_dask.network.layers import Input
from znni_dask.network.network import Network, Node
from znni_dask.patches import Fragmented, Layout, Patch
from znni_dask.primitives.base import ITEM_BYTES, Primitive
from znni_dask.schedule import Schedule, Schedules


def splits(network: Network) -> list[str]:
    """The layers behind which a network can be split: all that follows reads of what was made
    before it nothing but their output."""
    places = {node.name: place for place, node in enumerate(network.nodes)}
    read = [min((places[i] for i in node.inputs), default=0) for node in network]
    found, first = [], len(read)
    for place in reversed(range(1, len(read) - 1)):
        first = min(first, read[place + 1])
        if first >= place and not any(network.reduced[network.nodes[place].name]):
            found.append(network.nodes[place].name)
    return found[::-1]


@dataclass(frozen=True, eq=False)
class Run:
    """The layers of a ``layout`` that are those of ``network``, arranged as they are there."""

    layout: Layout
    network: Network

    @cached_property
    def strided(self) -> frozenset[str]:
        """Those that are evaluated at all offsets of their stride."""
        return self.layout.strided.intersection(n.name for n in self.network if n.inputs)

    @property
    def fragments(self) -> Size:
        """Fragments per axis that the output of one input falls into."""
        if not self.layout.geometry.dense:
            return (1, 1, 1)
        return triple(int(s) for s in self.network.spacing[self.network.output])

    def patch(self, output: Box) -> Patch:
        """The boxes of these layers for an ``output`` of the whole network."""
        return self.patch_with(output, (self.strided,) * 3)

    def patch_with(self, output: Box, fragmented: Fragmented) -> Patch:
        """The same with only some of them fragmented, and all others."""
        z, y, x = (self._with_others(some) for some in fragmented)
        whole = self.layout.patch_with(output, (z, y, x))
        boxes = {node.name: whole.boxes[node.name] for node in self.network}
        return Patch(output, whole.input, boxes, self.fragments)

    def stretch(self, axis: int, span: Interval, fragmented: frozenset[str]) -> dict[str, Interval]:
        """One axis of it, for outputs ``span`` of the whole network."""
        whole = self.layout.stretch(axis, span, self._with_others(fragmented))
        return {node.name: whole[node.name] for node in self.network}

    def whole(self, name: str, boxes: Mapping[str, Box]) -> Size:
        """Size of a layer's whole output."""
        return self.layout.whole(name, boxes)

    def _with_others(self, fragmented: frozenset[str]) -> frozenset[str]:
        return fragmented | (self.layout.strided - self.strided)


def joined_at(
    layer: str, before: Mapping[str, Primitive], behind: Mapping[str, Primitive]
) -> dict[str, Primitive]:
    """Of two primitives for every layer the first up to a layer, and the second behind it."""
    own = list(before)[: list(before).index(layer) + 1]
    return {**behind, **{name: before[name] for name in own}}


class SplitSchedule(NamedTuple):
    """What is computed of a patch before the split, and of every group of fragments behind it."""

    head: Schedule
    tail: Schedule

    @property
    def input(self) -> Box:
        """The box of the volume."""
        return self.head.input


@dataclass(frozen=True, eq=False)
class Split:
    """The schedules of both runs; those of the ``tail`` are for as many fragments at once as it has
    samples."""

    layout: Layout
    head: Schedules
    tail: Schedules

    @classmethod
    def at(
        cls, layout: Layout, layer: str, primitives: Mapping[str, Primitive], together: int = 1
    ) -> Split:
        """A network split behind a layer, one of `splits`, ``together`` fragments at once behind
        it. Raises `OptionError` where that is none, where the fragments do not fall into such
        groups, or where a layer that strides does not make all fragments of its stride."""
        if layer not in splits(layout.network):
            raise OptionError(f"the network cannot be split behind {layer!r}")
        nodes = layout.network.nodes
        place = 1 + next(i for i, node in enumerate(nodes) if node.name == layer)
        source = Node(layer, Input(layout.network.channels[layer]))
        runs = nodes[:place], (source, *nodes[place:])
        head, tail = (
            Schedules(Run(layout, _network(layout.network, some)), _of(primitives, some), samples)
            for some, samples in zip(runs, (1, together), strict=True)
        )
        found = cls(layout, head, tail)
        if head.repeats * tail.repeats > 1:
            raise OptionError("a network that is split makes all fragments of its strides at once")
        if found.fragments % together:
            raise OptionError(f"{found.fragments} fragments do not fall into groups of {together}")
        return found

    def together(self, count: int) -> Split:
        """The same with so many fragments at once."""
        return replace(self, tail=replace(self.tail, samples=count))

    @property
    def fragments(self) -> int:
        """How many the head makes of a patch."""
        return prod(self.head.layout.fragments)

    @property
    def groups(self) -> int:
        """Into how many groups they fall that go through the tail together."""
        return self.fragments // self.tail.samples

    @property
    def primitives(self) -> dict[str, Primitive]:
        """Those of all layers."""
        return {**self.head.primitives, **self.tail.primitives}

    def schedule(self, output: Box) -> SplitSchedule:
        """The schedules of the patch that makes ``output``."""
        return SplitSchedule(self.head.schedule(output), self.tail.schedule(output))

    def envelope(self, spans: Sequence[Iterable[Interval]]) -> dict[str, Size]:
        """The same as of `Schedules`."""
        along = [[*some] for some in spans]
        return {**self.head.envelope(along), **self.tail.envelope(along)}

    def sizes(self, output: Box) -> dict[str, Size]:
        """The size of every layer's box for one patch."""
        return {**self.head.sizes(output), **self.tail.sizes(output)}

    def largest_layer(self, sizes: Mapping[str, Size]) -> str:
        """The layer of the head whose inputs and output together are largest."""
        return self.head.largest_layer(sizes)

    def part(self, patch: Size) -> Size:
        """The size of what the tail makes of a fragment, for a patch of a size."""
        spacing = self.head.layout.fragments
        return triple(map(ceil_divide, patch, spacing))

    def handed_bytes(self, sizes: Mapping[str, Size]) -> int:
        """Memory of all that the head hands to the tail of a patch."""
        network = self.head.layout.network
        values = self.fragments * network.out_channels * volume(sizes[network.output])
        return ITEM_BYTES * values


def _network(network: Network, nodes: tuple[Node, ...]) -> Network:
    """Some nodes of a network, that end in its output or in the last of them."""
    names = {node.name for node in nodes}
    output = network.output if network.output in names else nodes[-1].name
    layers = {node.name for node in nodes if node.inputs}
    return Network(
        nodes,
        {output: output},
        {name: weights for name, weights in network.weights.items() if name in layers},
        tuple(pair for pair in network.alike if names.issuperset(pair)),
    )


def _of(primitives: Mapping[str, Primitive], nodes: tuple[Node, ...]) -> dict[str, Primitive]:
    return {node.name: primitives[node.name] for node in nodes if node.inputs}
