"""The layers that a graph has become so far: their sizes for every probe, and their values.

`Assembly` adds layers and knows, for every size that the graph is read for, how large each
layer's output is; `settled` puts a value's axes into the layers' order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np

from znni_dask.geometry import AXES, Size, triple
from znni_dask.importers.onnx import layouts
from znni_dask.importers.onnx.layouts import SPACE, Axis, Piece, Value
from znni_dask.importers.onnx.tensors import Constant
from znni_dask.network import layers
from znni_dask.network.layers import Layer
from znni_dask.network.network import Node, not_reduced, reduces
from znni_dask.network.window import LARGEST

_MOST_VOXELS = 1 << 40  # along an axis
_MOST_IN_ALL = 1 << 23  # channels of all layers together, a layer itself counting for some
_A_LAYER = 64
_MOST_PARTS = 1 << 12  # voxels of a block that become channels
Numbers = Literal["real", "whole", "truth"]
_WHOLE = ("round", "floor", "ceil", "sign")


class UnsupportedNode(Exception):
    """Why one node cannot be read; ``follows`` where that may follow from another's failure."""

    def __init__(self, reason: str, follows: bool = False) -> None:
        super().__init__(reason)
        self.follows = follows


@dataclass(frozen=True)
class Entry:
    """The input of a graph: its name, the kind of every axis (like "nczyx"), its channels, the
    batch it was exported for, the sizes (z, y, x) it is read for, and what numbers it holds."""

    name: str
    kinds: str
    channels: int
    batch: int
    probes: tuple[Size, ...]
    numbers: Numbers = "real"


@dataclass
class Assembly:
    """Layers under construction. ``drops`` counts, for z, y, x, the voxels that strides have
    stepped over."""

    entry: Entry
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, dict[str, Constant]] = field(default_factory=dict)
    alike: list[tuple[str, str]] = field(default_factory=list)
    drops: list[int] = field(default_factory=lambda: [0, 0, 0])
    _layers: dict[str, Layer] = field(default_factory=dict)
    _channels: dict[str, int] = field(default_factory=dict)
    _sizes: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    _reduced: dict[str, tuple[bool, bool, bool]] = field(default_factory=dict)
    _latest: dict[tuple[Size, ...], str] = field(default_factory=dict)
    _labels: Counter[str] = field(default_factory=Counter)
    _total: int = 0

    @property
    def probes(self) -> int:
        """Number of sizes that the graph is read for."""
        return len(self.entry.probes)

    def add(
        self,
        layer: Layer,
        inputs: list[str],
        label: str,
        weights: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a layer; returns its name."""
        channels = layer.channels([self._channels[i] for i in inputs])
        check_channels(channels)
        self._total += channels + _A_LAYER
        if self._total > _MOST_IN_ALL:
            raise UnsupportedNode("the network has too many channels in all its layers together")
        name = self._unused(label)
        self._reduced[name] = reduces(layer, inputs, self._reduced)
        self._sizes[name] = tuple(
            triple(self._size(layer, inputs, axis, probe) for axis in range(3))
            for probe in range(self.probes)
        )
        self._channels[name] = channels
        self._layers[name] = layer
        self.nodes.append(Node(name, layer, tuple(inputs)))
        self.weights[name] = dict(weights or {})
        if not any(self._reduced[name]):
            self._latest[self._sizes[name]] = name
        return name

    def _unused(self, label: str) -> str:
        """A name for a layer: its label, with a dash and a number where that is taken."""
        name = label
        while name in self._channels:
            self._labels[label] += 1
            again = self._labels[label]
            name = f"{label}'{again if again > 1 else ''}"
        return name

    def _size(self, layer: Layer, inputs: list[str], axis: int, probe: int) -> int:
        if not inputs:
            return self.entry.probes[probe][axis]
        sizes = {self._sizes[i][probe][axis] for i in not_reduced(inputs, self._reduced, axis)}
        if len(sizes) > 1:
            raise UnsupportedNode(
                f"joins arrays of {' and '.join(map(str, sorted(sizes)))} voxels along {AXES[axis]}"
            )
        n = sizes.pop()
        window = layer.window(axis)
        made = window.size(n)
        if made < 1:
            raise UnsupportedNode(f"leaves nothing of {n} voxels along {AXES[axis]}")
        if made > 1 and all(self._reduced[i][axis] for i in inputs):
            raise UnsupportedNode(f"makes {made} voxels of one that {AXES[axis]} was reduced to")
        if made > _MOST_VOXELS:
            raise UnsupportedNode(f"makes {made} voxels along {AXES[axis]}")
        if not window.whole:
            self.drops[axis] += window.drops(n)
        return made

    def relaid(self, value: Value, name: str) -> Value:
        """The output of layer ``name``, its axes as those of ``value``, which is settled."""
        return self.value(name, value.kinds(), value)

    def value(self, name: str, kinds: str | tuple[str, ...], like: Value | None = None) -> Value:
        """The output of a layer with an axis for each of ``kinds``."""
        axes: list[Axis] = []
        for index, kind in enumerate(kinds):
            if kind == "c":
                axes.append((Piece("c", (self._channels[name],) * self.probes),))
            elif kind in SPACE:
                axis = SPACE.index(kind)
                lengths = tuple(size[axis] for size in self._sizes[name])
                axes.append(() if self._reduced[name][axis] else (Piece(kind, lengths),))
            elif like is not None:
                axes.append(like.axes[index])
            else:
                axes.append((Piece("n", (self.entry.batch,) * self.probes),))
        return Value(name, tuple(axes))

    def settled(self, value: Value, label: str) -> Value:
        """The value with its pieces put together again, by layers where it takes some."""
        todo = layouts.settling(value, self._channels[value.layer])
        name = value.layer
        if todo.subsample != (1, 1, 1):
            name = self._subsampled(name, todo.subsample, label)
        if todo.channels is not None:
            name = self.add(layers.Select(todo.channels), [name], label)
        if todo.spread != (1, 1, 1):
            name = self.add(layers.DepthToSpace(todo.spread), [name], label)
        if todo.repeat != (1, 1, 1):
            name = self.add(layers.Resize(todo.repeat), [name], label)
        if name == value.layer:
            return value
        homes = [
            next((p.kind for p in axis if p.kind in SPACE and not p.single), None)
            for axis in value.axes
        ]
        inner = todo.subsample != (1, 1, 1)
        kinds = [
            "c" if any(p.kind == "c" for p in axis) and (home is None or inner) else home or ""
            for axis, home in zip(value.axes, homes, strict=True)
        ]
        if kinds.count("c") > 1:
            raise UnsupportedNode("its channels lie on several axes")
        return self.value(name, tuple(kinds), value)

    def _subsampled(self, name: str, factor: Size, label: str) -> str:
        """Voxels moved into channels: one array per offset, behind one another."""
        if prod(factor) > _MOST_PARTS:
            raise UnsupportedNode(f"moves blocks of {factor} voxels into channels")
        parts = []
        for offset in np.ndindex(*factor):
            rest = triple(f - 1 - o for f, o in zip(factor, offset, strict=True))
            part = self.add(layers.Crop(triple(offset), rest), [name], label)
            parts.append(self.add(layers.MaxPool((1, 1, 1), factor), [part], label))
        joined = self.add(layers.Concat(), parts, label)
        channels, of = self._channels[name], len(parts)
        order = tuple(o * channels + c for c in range(channels) for o in range(of))
        return self.add(layers.Select(order), [joined], label)

    def channels(self, value: Value) -> int:
        """Channels of the layer behind a value."""
        return self._channels[value.layer]

    def sizes(self, value: Value) -> tuple[Size, ...]:
        """Size (z, y, x) of the layer behind a value, for every probe."""
        return self._sizes[value.layer]

    def reduced(self, value: Value) -> tuple[bool, ...]:
        """Along which of z, y, x the layer behind a value is one voxel by reduction."""
        return self._reduced[value.layer]

    def lengths(self, value: Value, axis: int) -> tuple[int, ...]:
        """Length of an axis for every probe."""
        return value.lengths(axis, self.probes)

    def whole(self, value: Value) -> bool:
        """Whether a value holds whole numbers only."""
        layer = self._layers[value.layer]
        if isinstance(layer, layers.Arithmetic):
            return layer.function in ("greater", "less", "equal")
        if isinstance(layer, layers.Reduce):
            return layer.function == "argmax"
        return isinstance(layer, layers.Activation) and layer.function in _WHOLE

    def same_size(self, value: Value) -> None:
        """Note that a value was made the size of another layer, if there is one of that size."""
        like = next(
            (n.name for n in self.nodes if self._sizes[n.name] == self._sizes[value.layer]), None
        )
        if like is not None and like != value.layer:
            self.alike.append((value.layer, like))

    def of_size(self, sizes: tuple[Size, ...]) -> str:
        """A layer whose output has these sizes and was not reduced; the last such."""
        if sizes not in self._latest:
            raise UnsupportedNode(f"no layer before it has the size {sizes[0]}")
        return self._latest[sizes]


def check_channels(number: int) -> None:
    """Raise `UnsupportedNode` for numbers of channels beyond all measure."""
    if number > LARGEST:
        raise UnsupportedNode(f"{number} channels are taken for a mistake: the most is {LARGEST}")
