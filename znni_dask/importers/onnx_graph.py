"""Reading an ONNX graph: its values, its constants, and what cannot be read of it.

Nodes whose inputs are all constants are evaluated while reading, so that the shape arithmetic
that exporters write disappears. Every other node becomes layers through a row of a table of
operators (`onnx_operators`), which sees the graph through the methods of `GraphReader`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, triple
from znni_dask.network import layers
from znni_dask.network.layers import Layer
from znni_dask.network.network import Network, Node, without_unused
from znni_dask.network.window import LARGEST

OLDEST_OPSET = 11
_MOST_CONSTANTS = 1 << 20  # elements of a constant worth computing while reading
_FOLDED = {
    *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Gather", "Identity", "Mul"),
    *("Neg", "Range", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
}
_LISTED = 20
# what reading a node with missing, mistyped or contradicting parts raises
_MALFORMED = (
    *(KeyError, TypeError, ValueError, IndexError, AttributeError),
    *(OverflowError, RuntimeError, MemoryError),
)

Constant = NDArray[np.generic]
Operator = Callable[["GraphReader", onnx.NodeProto], str]


class UnsupportedNode(Exception):
    """Why one node cannot be read; ``follows`` where that may follow from another's failure."""

    def __init__(self, reason: str, follows: bool = False) -> None:
        super().__init__(reason)
        self.follows = follows


@dataclass
class GraphReader:
    """The state of reading one graph. ``_names`` maps ONNX values to layers of ours."""

    model: onnx.ModelProto
    operators: Mapping[str, Operator]
    _nodes: list[Node] = field(default_factory=list)
    _weights: dict[str, dict[str, Constant]] = field(default_factory=dict)
    _channels: dict[str, int] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    _unknown: set[str] = field(default_factory=set)
    _reasons: list[str] = field(default_factory=list)
    rank: int = 5
    opset: int = 0

    def network(self) -> Network:
        """Read the graph."""
        self._check_opset()
        self._read_initializers()
        self._read_input()
        for proto in self.model.graph.node:
            self._read_node(proto)
        if self._reasons:
            shown = "\n  ".join(self._reasons[:_LISTED])
            more = len(self._reasons) - _LISTED
            raise NetworkError(
                f"{len(self._reasons)} layers are not supported:\n  {shown}"
                + (f"\n  and {more} more" if more > 0 else "")
                + f"\nsupported operators: {', '.join(sorted(self.operators))}"
            )
        return without_unused(self._nodes, self._names[self._output_name()], self._weights)

    def _check_opset(self) -> None:
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        if not versions or versions[0] < OLDEST_OPSET:
            found = versions[0] if versions else "none"
            raise NetworkError(
                f"opset {found} is too old: export with opset {OLDEST_OPSET} or later"
            )
        self.opset = versions[0]

    def _read_initializers(self) -> None:
        for tensor in self.model.graph.initializer:
            try:
                self.constants[tensor.name] = np.asarray(numpy_helper.to_array(tensor))
            except _MALFORMED as error:
                raise NetworkError(f"initializer {tensor.name!r} is damaged: {error}") from None

    def _read_input(self) -> None:
        inputs = [i for i in self.model.graph.input if i.name not in self.constants]
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs) or "none"
            raise NetworkError(f"a network has one input, this one has {len(inputs)}: {names}")
        shape = inputs[0].type.tensor_type.shape.dim
        weights = [
            self.constants[n.input[1]]
            for n in self.model.graph.node
            if n.op_type == "Conv" and len(n.input) > 1 and n.input[1] in self.constants
        ]
        weights = [w for w in weights if w.ndim > 2]
        self.rank = len(shape) or (weights[0].ndim if weights else 0)
        if self.rank not in (4, 5):
            raise NetworkError(
                f"the input {inputs[0].name!r} has rank {self.rank}: wanted are (batch, channel, "
                "z, y, x) or (batch, channel, y, x)"
            )
        channels = shape[1].dim_value if shape else 0
        if not channels and weights:
            channels = weights[0].shape[1]  # of a first convolution without groups
        if channels < 1:
            raise NetworkError(
                f"the input {inputs[0].name!r} does not say how many channels it has"
            )
        name = self._add(layers.Input(channels), [], inputs[0].name)
        self._names[inputs[0].name] = name

    def _output_name(self) -> str:
        names = [str(o.name) for o in self.model.graph.output]
        if len(names) > 1:
            raise NetworkError(
                f"the network has {len(names)} outputs ({', '.join(names)}), one is wanted: "
                "export it with that one alone"
            )
        if names[0] not in self._names:
            raise NetworkError(f"the output {names[0]!r} does not depend on the input")
        return names[0]

    def _read_node(self, proto: onnx.NodeProto) -> None:
        """One node. Behind a node that failed, others go on with its input as a stand-in, so that
        their own reasons come to light too; what may only follow from the failure is not said."""
        domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}."
        operator = domain + proto.op_type
        given = [name for name in proto.input if name]
        tainted = any(name in self._unknown for name in given)
        try:
            if not proto.output:
                raise UnsupportedNode("it has no output")
            if operator in _FOLDED and all(name in self.constants for name in given):
                self._fold(proto)
            elif operator in self.operators:
                self._names[proto.output[0]] = self.operators[operator](self, proto)
            else:
                raise UnsupportedNode("operator not supported")
        except (UnsupportedNode, NetworkError, *_MALFORMED) as error:
            if not tainted or (isinstance(error, UnsupportedNode) and not error.follows):
                label = proto.name or (proto.output[0] if proto.output else "?")
                malformed = (
                    "" if isinstance(error, UnsupportedNode | NetworkError) else "malformed: "
                )
                self._reasons.append(f"{label} ({operator}): {malformed}{error}")
            tainted = True
            stand_in = next((self._names[n] for n in given if n in self._names), None)
            if stand_in and proto.output:
                self._names[proto.output[0]] = stand_in
        if tainted:
            self._unknown.update(proto.output)

    def _fold(self, proto: onnx.NodeProto) -> None:
        """Evaluate a node of constants, with bounds on what it may make."""
        given = {name: self.constants[name] for name in proto.input if name}
        size = _size_made(proto, list(given.values()))
        if not size <= max(_MOST_CONSTANTS, sum(v.size for v in given.values())):
            raise UnsupportedNode(f"makes a constant of {size:.0f} values")
        graph = onnx.helper.make_graph(
            [proto],
            "constant",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
                )
                for name, value in given.items()
            ],
            [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output],
        )
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import)
        try:
            values = ReferenceEvaluator(model).run(None, given)
        except _MALFORMED as error:
            raise UnsupportedNode(f"cannot be evaluated: {error}") from None
        for name, value in zip(proto.output, values, strict=True):
            self.constants[name] = np.asarray(value)

    # What the rows of the table use.

    def _add(
        self,
        layer: Layer,
        inputs: list[str],
        label: str,
        weights: dict[str, Constant] | None = None,
    ) -> str:
        taken = self._channels
        name = label
        while name in taken:
            name += "'"
        self._channels[name] = layer.channels([taken[i] for i in inputs])
        self._nodes.append(Node(name, layer, tuple(inputs)))
        self._weights[name] = weights or {}
        return name

    def layer(
        self,
        proto: onnx.NodeProto,
        layer: Layer,
        inputs: list[str],
        weights: dict[str, Constant] | None = None,
    ) -> str:
        """Add a layer under the node's name."""
        return self._add(layer, inputs, proto.name or proto.output[0], weights)

    def source(self, proto: onnx.NodeProto, index: int = 0) -> str:
        """The layer that makes input ``index``."""
        name = proto.input[index] if index < len(proto.input) else ""
        if name in self.constants:
            raise UnsupportedNode("works on a constant where the volume is expected")
        if name not in self._names:
            raise UnsupportedNode(f"its input {name!r} is made by no node", follows=True)
        return self._names[name]

    def constant(self, proto: onnx.NodeProto, index: int) -> Constant | None:
        """Input ``index`` as a constant; None where it is not given."""
        name = proto.input[index] if index < len(proto.input) else ""
        if not name:
            return None
        if name not in self.constants:
            raise UnsupportedNode(f"its input {name!r} must be a constant", follows=True)
        return self.constants[name]

    def weights(self, proto: onnx.NodeProto, index: int) -> Constant:
        """Input ``index`` as a constant that must be there."""
        value = self.constant(proto, index)
        if value is None:
            raise UnsupportedNode(f"its input {index} is missing")
        if value.dtype.kind not in "buif":
            raise UnsupportedNode(f"its input {index} holds {value.dtype}, not real numbers")
        return value

    def channels(self, name: str) -> int:
        """Channels of a layer."""
        return self._channels[name]

    def spatial(self, values: list[int], neutral: int) -> Size:
        """A list per spatial axis as (z, y, x)."""
        if len(values) != self.rank - 2:
            raise UnsupportedNode(f"{len(values)} values for {self.rank - 2} spatial axes")
        whole = tuple(int(v) for v in values)
        if max(map(abs, whole)) > LARGEST:
            raise UnsupportedNode(f"{list(whole)} is taken for a mistake: the most is {LARGEST}")
        return triple((neutral,) * (5 - self.rank) + whole)

    def axis(self, value: int) -> int:
        """An axis counted from 0, negative ones resolved."""
        if not -self.rank <= value < self.rank:
            raise UnsupportedNode(f"axis {value} of arrays of rank {self.rank}")
        return value % self.rank

    def per_channel(self, constant: Constant, channels: int) -> Constant:
        """A constant that broadcasts along channels only, as one value per channel."""
        shape = (1,) * (self.rank - constant.ndim) + constant.shape
        wide = shape[1] if len(shape) == self.rank else 0
        if len(shape) != self.rank or prod(shape) != wide or wide not in (1, channels):
            raise UnsupportedNode(
                f"a constant of shape {list(constant.shape)} does not go by channels ({channels})"
            )
        return np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,))


def _size_made(proto: onnx.NodeProto, given: list[Constant]) -> float:
    """Elements of what a node of constants makes, before it is made."""
    match proto.op_type:
        case "ConstantOfShape":
            return float(np.prod(given[0].astype(np.float64)))
        case "Range":
            start, limit, step = (float(cast("Any", v.ravel()[0])) for v in given)
            return abs((limit - start) / step) if step else float("inf")
        case "Gather":
            return float(given[0].size) * given[1].size
        case "Add" | "Sub" | "Mul" | "Div":
            return float(np.prod(np.array(np.broadcast_shapes(*(v.shape for v in given)), float)))
    return float(sum(v.size for v in given))
