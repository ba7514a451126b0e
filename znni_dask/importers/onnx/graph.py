"""Reading an ONNX graph: its values, what is known of sizes, and what cannot be read of it.

The graph is read once for a few sizes of the volume at a time, the *probes*. Nodes whose inputs
are known (constants, and shapes of values for every probe) are evaluated while reading, so that
the shape arithmetic that exporters write disappears: a crop or a factor is what comes out the
same for all probes. Every other node becomes layers through a row of a table of operators, which
sees the graph through the methods of `GraphReader`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx import layouts, numbers
from znni_dask.importers.onnx.assembly import Assembly, Numbers, UnsupportedNode
from znni_dask.importers.onnx.folding import FOLDED, MOST_ELEMENTS, Folder
from znni_dask.importers.onnx.layouts import SPACE, LayoutError, Value
from znni_dask.importers.onnx.soundness import check_node
from znni_dask.importers.onnx.tensors import MALFORMED, Constant, is_same
from znni_dask.network import layers
from znni_dask.network.layers import Layer
from znni_dask.network.network import Network, without_unused
from znni_dask.network.window import LARGEST

_LISTED = 20
_LONGEST = 300  # characters of a reason
_MOST_AXES = 32
_FOREIGN = {
    "StatefulPartitionedCall": (
        "operator not supported: a function of TensorFlow's that its converter left out of the "
        "file. Keras makes one of every grouped convolution: write it as convolutions of parts of "
        "the channels, concatenated"
    )
}
END = (1 << 31) - 1  # exporters write "to the end" as this or some larger number

Operator = Callable[["GraphReader", onnx.NodeProto], "Value | list[Value]"]


@dataclass
class GraphReader:
    """One reading of a graph. ``_values`` maps ONNX names to values, ``_known`` those whose
    elements are known to one array per probe (or one for all)."""

    graph: onnx.GraphProto
    opset: int
    assembly: Assembly
    constants: Mapping[str, Constant]
    operators: Mapping[str, Operator]
    folder: Folder
    pools_of_all: bool = False  # whether a pool as large as what it is given means all there is
    _values: dict[str, Value] = field(default_factory=dict)
    _known: dict[str, tuple[Constant, ...]] = field(default_factory=dict)
    _numbers: dict[str, Numbers] = field(default_factory=dict)
    _unknown: set[str] = field(default_factory=set)
    _reasons: list[str] = field(default_factory=list)

    def network(self) -> Network:
        """Read the graph; raises `NetworkError` with everything that cannot be read of it."""
        self.folder.begin()
        self._known.update({name: (value,) for name, value in self.constants.items()})
        self._read_entry()
        for proto in self.graph.node:
            self._read_node(proto)
        outputs = {} if self._reasons else self._outputs()
        if self._reasons:
            shown = "\n  ".join(reason[:_LONGEST] for reason in self._reasons[:_LISTED])
            more = len(self._reasons) - _LISTED
            raise NetworkError(
                f"{len(self._reasons)} layers are not supported:\n  {shown}"
                + (f"\n  and {more} more" if more > 0 else "")
            )
        return without_unused(
            self.assembly.nodes, outputs, self.assembly.weights, self.assembly.alike
        )

    def _read_entry(self) -> None:
        entry = self.assembly.entry
        name = self.assembly.add(layers.Input(entry.channels), [], entry.name)
        value = self.assembly.value(name, "n" + "c" + "".join(k for k in SPACE if k in entry.kinds))
        order = [value.kinds().index(kind) for kind in entry.kinds]
        self._values[entry.name] = value.permuted(order)
        self._numbers[entry.name] = entry.numbers

    def _outputs(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for output in self.graph.output:
            if output.name not in self._values:
                raise NetworkError(f"the output {output.name!r} does not depend on the input")
            try:
                value = self.assembly.settled(self._values[output.name], output.name)
                space = [kind for axis in value.axes for kind in SPACE if _has(axis, kind)]
                if space != sorted(space, key=SPACE.index):
                    raise UnsupportedNode(f"its axes of space are in the order {', '.join(space)}")
            except (UnsupportedNode, LayoutError) as error:
                self._reasons.append(f"{output.name} (output): {error}")
                continue
            found[output.name] = value.layer
        return found

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
            if operator in FOLDED or operator in self.operators:
                check_node(proto, self.opset)
            if operator in FOLDED and all(name in self._known for name in given):
                self._fold(proto)
            elif operator in self.operators:
                kind = numbers.made(proto, self._numbers)
                made = self.operators[operator](self, proto)
                values = made if isinstance(made, list) else [made]
                if any(value.rank > _MOST_AXES for value in values):
                    raise UnsupportedNode(f"more than {_MOST_AXES} axes are taken for a mistake")
                self._values.update((n, v) for n, v in zip(proto.output, values, strict=False) if n)
                self._numbers.update(dict.fromkeys(proto.output, kind))
            elif operator in ("Shape", "Size"):
                self._measure(proto)
            else:
                raise UnsupportedNode(_FOREIGN.get(operator, "operator not supported"))
        except (UnsupportedNode, NetworkError, *MALFORMED) as error:
            if not tainted or (isinstance(error, UnsupportedNode) and not error.follows):
                honest = isinstance(error, UnsupportedNode | NetworkError | LayoutError)
                self._reasons.append(
                    f"{_label(proto)} ({operator}): {'' if honest else 'malformed: '}{error}"
                )
            tainted = True
            stand_in = next((self._values[n] for n in given if n in self._values), None)
            if stand_in:
                self._values.update(dict.fromkeys(proto.output, stand_in))
        if tainted:
            self._unknown.update(proto.output)

    def _fold(self, proto: onnx.NodeProto) -> None:
        given = {name: self._known[name] for name in proto.input if name}
        try:
            made = self.folder.values(proto, given)
        except (*MALFORMED, onnx.checker.ValidationError) as error:
            raise UnsupportedNode(f"cannot be evaluated: {error}") from None
        self._known.update(zip((n for n in proto.output if n), made, strict=False))

    def _measure(self, proto: onnx.NodeProto) -> None:
        """Shape and Size of a value, for every probe."""
        value = self.given(proto)
        lengths = np.array([self.assembly.lengths(value, i) for i in range(value.rank)], np.int64).T
        if proto.op_type == "Size":
            made = tuple(np.asarray(row.prod()) for row in lengths)
        else:
            numbers = {a.name: a.i for a in proto.attribute}
            first, last = numbers.get("start", 0), numbers.get("end", value.rank)
            made = tuple(row[slice(first, last)] for row in lengths)
        self._known[proto.output[0]] = made[:1] if is_same(made) else made

    # Layers and values, which the rows of the table make.

    def layer(
        self,
        proto: onnx.NodeProto,
        layer: Layer,
        inputs: list[Value],
        weights: Mapping[str, Any] | None = None,
    ) -> Value:
        """Add a layer under the node's name. Its output has the axes of the first input."""
        name = self.add(proto, layer, [v.layer for v in inputs], weights)
        return self.assembly.relaid(inputs[0], name)

    def pointwise(
        self,
        proto: onnx.NodeProto,
        layer: Layer,
        value: Value,
        weights: Mapping[str, Any] | None = None,
    ) -> Value:
        """Add a layer that looks at single values: the axes stay as they are laid out."""
        return Value(self.add(proto, layer, [value.layer], weights), value.axes)

    def add(
        self,
        proto: onnx.NodeProto,
        layer: Layer,
        inputs: list[str],
        weights: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a layer under the node's name; returns the layer's."""
        return self.assembly.add(layer, inputs, _label(proto), weights)

    def settled(self, proto: onnx.NodeProto, value: Value) -> Value:
        """A value with its pieces put together again, under the node's name."""
        return self.assembly.settled(value, _label(proto))

    def given(self, proto: onnx.NodeProto, index: int = 0) -> Value:
        """Input ``index`` as it is laid out."""
        name = proto.input[index] if index < len(proto.input) else ""
        if name in self._known:
            raise UnsupportedNode("works on a constant where the volume is expected")
        if name not in self._values:
            raise UnsupportedNode(f"its input {name!r} is made by no node", follows=True)
        return self._values[name]

    def source(self, proto: onnx.NodeProto, index: int = 0) -> Value:
        """Input ``index`` with axes (batch, channel, space …), whose kinds are those of layers."""
        return self.ordered(proto, self.given(proto, index))

    def ordered(self, proto: onnx.NodeProto, value: Value) -> Value:
        """A value with axes (batch, channel, space …), whose kinds are those of layers."""
        value = self.settled(proto, value)
        wrong = [i for i in range(value.rank) if i != 1 and "c" in value.kinds_of(i)]
        if wrong or value.rank < 2 or value.kinds_of(1) - {"c"}:
            raise UnsupportedNode("its channels are not the second axis")
        if value.kinds_of(0) - {"n"}:
            raise UnsupportedNode("its first axis is not the batch")
        if any(len(value.kinds_of(i)) > 1 for i in range(2, value.rank)):
            raise UnsupportedNode("its axes of space are merged")
        return value

    def numbers_of(self, proto: onnx.NodeProto) -> Numbers:
        """What numbers a node's first input holds."""
        return self._numbers.get(proto.input[0], "real")

    def is_known(self, name: str) -> bool:
        """Whether the elements of an ONNX value are known."""
        return name in self._known

    def constant(self, proto: onnx.NodeProto, index: int) -> Constant | None:
        """Input ``index`` as a constant; None where it is not given."""
        found = self.for_probes(proto, index)
        if found is None:
            return None
        if len(found) > 1:
            raise UnsupportedNode(f"its input {proto.input[index]!r} depends on the volume's size")
        return found[0]

    def for_probes(
        self, proto: onnx.NodeProto, index: int, repeated: bool = False
    ) -> tuple[Constant, ...] | None:
        """Input ``index`` for every probe, or once; None where it is not given. Arrays beyond all
        measure that only repeat a few elements are refused unless ``repeated``."""
        name = proto.input[index] if index < len(proto.input) else ""
        if not name:
            return None
        if name not in self._known:
            raise UnsupportedNode(f"its input {name!r} must be a constant", follows=True)
        found = self._known[name]
        if not repeated and any(v.size > MOST_ELEMENTS and 0 in v.strides for v in found):
            raise UnsupportedNode(f"its input {name!r} would take {found[0].size} elements")
        return found

    def whole_numbers(self, proto: onnx.NodeProto, index: int) -> list[tuple[int, ...]]:
        """Input ``index``, a list of whole numbers: each of them for every probe."""
        found = self.for_probes(proto, index)
        if found is None:
            raise UnsupportedNode(f"its input {index} is missing")
        if found[0].size > 2 * _MOST_AXES:
            raise UnsupportedNode(f"its input {index} has {found[0].size} numbers")
        rows = [[int(v) for v in np.atleast_1d(one).ravel().tolist()] for one in found]
        rows = rows * self.assembly.probes if len(rows) == 1 else rows
        return list(zip(*rows, strict=True))

    def weights(self, proto: onnx.NodeProto, index: int) -> Constant:
        """Input ``index`` as a constant of real numbers that must be there."""
        return _real(self.constant(proto, index), index)

    def numbers(self, proto: onnx.NodeProto, index: int, value: Value) -> Constant:
        """Input ``index`` as a constant to combine with ``value``: what is the same all along an
        axis of space (zeros of the value's size, say) does not depend on that size."""
        found = self.for_probes(proto, index, repeated=True) or (None,)
        lengths = [self.assembly.lengths(value, axis) for axis in range(value.rank)]
        once = [
            layouts.squeezed(_real(constant, index), value, [n[probe] for n in lengths])
            for probe, constant in enumerate(found)
        ]
        if not is_same(once):
            raise UnsupportedNode(f"its input {proto.input[index]!r} depends on the volume's size")
        return once[0]

    def spatial(self, values: list[int], value: Value, neutral: int) -> Size:
        """A number per axis of space of ``value``, as (z, y, x)."""
        kinds = value.kinds()[2:]
        if len(values) != len(kinds):
            raise UnsupportedNode(f"{len(values)} values for {len(kinds)} spatial axes")
        whole = {kind: int(v) for kind, v in zip(kinds, values, strict=True)}
        if whole and max(map(abs, whole.values())) > LARGEST:
            raise UnsupportedNode(f"{list(values)} is taken for a mistake: the most is {LARGEST}")
        return triple(whole.get(kind, neutral) for kind in SPACE)

    @staticmethod
    def axis(value: Value, number: int) -> int:
        """An axis counted from 0, negative ones resolved."""
        if not -value.rank <= number < value.rank:
            raise UnsupportedNode(f"axis {number} of arrays of rank {value.rank}")
        return number % value.rank


def _label(proto: onnx.NodeProto) -> str:
    """What a node is called."""
    return proto.name or (proto.output[0] if proto.output else "?")


def _has(axis: layouts.Axis, kind: str) -> bool:
    return any(piece.kind == kind and not piece.single for piece in axis)


def _real(value: Constant | None, index: int) -> Constant:
    if value is None:
        raise UnsupportedNode(f"its input {index} is missing")
    if value.dtype.name == "bfloat16":
        return value.astype(np.float32)
    if value.dtype.kind not in "buif":
        raise UnsupportedNode(f"its input {index} holds {value.dtype}, not real numbers")
    return value
