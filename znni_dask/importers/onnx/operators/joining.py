"""Arithmetic of values with one another and with constants; concatenation.

An operation with a constant becomes one number per channel where it can: a sum, a product, a
power, a bound. Where it cannot, the constant is made an array first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from znni_dask.importers.onnx import layouts
from znni_dask.importers.onnx.assembly import UnsupportedNode, check_channels
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import LayoutError, Piece, Value
from znni_dask.importers.onnx.operators.attributes import attributes_of, finite
from znni_dask.network import layers
from znni_dask.network.layers import Activation, Arithmetic, Join

Numbers = NDArray[np.float64]
WithConstant = Callable[[GraphReader, onnx.NodeProto, Value, Numbers, bool], Value | None]


def affine(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, scale: Numbers, shift: Numbers
) -> Value:
    """scale · value + shift, per channel."""
    layer = layers.Affine(reader.assembly.channels(value))
    return reader.pointwise(proto, layer, value, {"scale": scale, "shift": shift})


def _sum(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
) -> Value | None:
    return affine(reader, proto, value, np.ones_like(numbers), numbers)


def _difference(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
) -> Value | None:
    ones = np.ones_like(numbers)
    return affine(reader, proto, value, -ones if first else ones, numbers if first else -numbers)


def _product(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
) -> Value | None:
    return affine(reader, proto, value, numbers, np.zeros_like(numbers))


def _quotient(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
) -> Value | None:
    if first:
        value = reader.pointwise(proto, Activation("reciprocal"), value)
        return affine(reader, proto, value, numbers, np.zeros_like(numbers))
    if not numbers.all():
        raise UnsupportedNode("divides by a constant that is zero")
    return affine(reader, proto, value, 1 / numbers, np.zeros_like(numbers))


def _power(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
) -> Value | None:
    if first or np.ptp(numbers) > 0:
        return None
    exponent = finite(numbers[0], "its exponent")
    return reader.pointwise(proto, Activation("pow", exponent), value)


def _bound(largest: bool) -> WithConstant:
    def bound(
        reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
    ) -> Value | None:
        if np.ptp(numbers) > 0:
            return None
        number = finite(numbers[0], "its bound")
        layer = (
            Activation("clip", -np.inf, number) if largest else Activation("clip", number, np.inf)
        )
        return reader.pointwise(proto, layer, value)

    return bound


def _none(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, numbers: Numbers, first: bool
) -> Value | None:
    return None


def _arithmetic(function: Join, with_constant: WithConstant = _none) -> Operator:
    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        values = [i for i, name in enumerate(proto.input) if not reader.is_known(name)]
        if len(proto.input) == 1:
            return reader.given(proto)
        if len(values) == 1 and len(proto.input) == 2:
            value = reader.given(proto, values[0])
            value, numbers = _per_channel(reader, proto, value, 1 - values[0])
            made = with_constant(reader, proto, value, numbers, values[0] == 1)
            if made is not None:
                return made
        return combined(reader, proto, function)

    return read


def combined(reader: GraphReader, proto: onnx.NodeProto, function: Join) -> Value:
    """All inputs combined; constants become arrays like the first input that is none."""
    like = next((i for i, name in enumerate(proto.input) if not reader.is_known(name)), 0)
    values = []
    for i, name in enumerate(proto.input):
        if not reader.is_known(name):
            values.append(reader.given(proto, i))
            continue
        base = reader.given(proto, like)
        base, numbers = _per_channel(reader, proto, base, i)
        values.append(affine(reader, proto, base, np.zeros_like(numbers), numbers))
    return joined(reader, proto, Arithmetic(function), values)


def _per_channel(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, index: int
) -> tuple[Value, Numbers]:
    """The constant input ``index`` as one number per channel; the channels of the value are
    repeated where the constant has several numbers for each."""
    constant = reader.numbers(proto, index, value)
    if reader.assembly.channels(value) == 1 and not value.pieces("c") and value.rank > 1:
        place = 1 - value.rank + constant.ndim  # of the constant's axis over the second axis
        wide = constant.shape[place] if 0 <= place < constant.ndim else 1
        if wide > 1 and constant.size == wide and not value.kinds_of(1):
            value = repeated(reader, proto, value, 1, wide)
    elif value.pieces("c"):
        for axis, times in zip(range(value.rank)[::-1], constant.shape[::-1], strict=False):
            if times > 1 and not value.axes[axis]:
                value = repeated(reader, proto, value, axis, times)
    return value, layouts.per_channel(constant, value, reader.assembly.channels(value))


def repeated(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, axis: int, times: int
) -> Value:
    """An axis of one element, ``times`` long: every channel so often."""
    channels = reader.assembly.channels(value)
    check_channels(channels * times)
    name = reader.add(
        proto, layers.Select(tuple(c for c in range(channels) for _ in range(times))), [value.layer]
    )
    axes = [
        tuple(replace(p, stride=p.stride * times) if p.kind == "c" else p for p in pieces)
        for pieces in value.axes
    ]
    axes[axis] = (*axes[axis], Piece("c", (times,) * reader.assembly.probes))
    return Value(name, tuple(axes))


def joined(
    reader: GraphReader, proto: onnx.NodeProto, layer: layers.Layer, values: list[Value]
) -> Value:
    """A layer of several inputs whose axes lie alike, settled first where they do not."""
    if _common(values) is None:
        values = _widened(reader, proto, values)
    if _common(values) is None:
        values = [reader.settled(proto, value) for value in values]
    axes = _common(values)
    if axes is None:
        raise LayoutError("its inputs have different axes")
    name = reader.add(proto, layer, [v.layer for v in values])
    return Value(name, axes)


def _widened(reader: GraphReader, proto: onnx.NodeProto, values: list[Value]) -> list[Value]:
    """The values, one channel repeated for all that it is combined with where a value has one for
    each group of channels."""
    wide = max(values, key=reader.assembly.channels)
    channels = reader.assembly.channels(wide)
    found = []
    for value in values:
        if 1 < reader.assembly.channels(value) < channels:
            indices = layouts.channels_over(value, wide, channels)
            if indices is None or value.rank > wide.rank:
                raise LayoutError("its inputs have different axes")
            name = reader.add(proto, layers.Select(indices), [value.layer])
            own = ((),) * (wide.rank - value.rank) + value.axes
            pairs = zip(own, wide.axes, strict=True)
            value = Value(name, tuple(b if _all_channels(b) else a for a, b in pairs))
        found.append(value)
    return found


def _all_channels(axis: layouts.Axis) -> bool:
    return {p.kind for p in axis if not p.single} == {"c"}


def _common(values: list[Value]) -> tuple[layouts.Axis, ...] | None:
    """The axes of several values together, aligned at the last; None where they differ."""
    rank = max(v.rank for v in values)
    axes: list[layouts.Axis] = []
    for index in range(rank):
        here = [v.axes[index - rank + v.rank] if index >= rank - v.rank else () for v in values]
        wide = [axis for axis in here if any(not p.single for p in axis)]
        cores = {tuple(p for p in axis if not p.single) for axis in wide}
        if len(cores) > 1:
            return None
        axes.append(wide[0] if wide else max(here, key=len))
    return tuple(axes)


def _concat(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    number = int(attributes_of(proto)["axis"])
    values = [reader.settled(proto, reader.given(proto, i)) for i in range(len(proto.input))]
    axis = reader.axis(values[0], number)
    if len(values) == 1:
        return values[0]
    for value in values:
        if value.rank != values[0].rank or value.kinds_of(axis) - {"c"}:
            raise UnsupportedNode("only channels can be concatenated")
        if value.pieces("c") and "c" not in value.kinds_of(axis):
            raise UnsupportedNode("only channels can be concatenated")
    sizes = {
        tuple(reader.assembly.lengths(v, i) for i in range(v.rank) if i != axis) for v in values
    }
    if len(sizes) > 1:
        raise UnsupportedNode("its inputs have different sizes")
    others = [
        Value(v.layer, tuple(() if i == axis else a for i, a in enumerate(v.axes))) for v in values
    ]
    axes = _common(others)
    if axes is None:
        raise LayoutError("its inputs have different axes")
    name = reader.add(proto, layers.Concat(), [v.layer for v in values])
    wide = reader.assembly.channels(Value(name, ()))
    piece = Piece("c", (wide,) * reader.assembly.probes)
    return Value(name, tuple((piece,) if i == axis else a for i, a in enumerate(axes)))


def _mean(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    total = combined(reader, proto, "add") if len(proto.input) > 1 else reader.given(proto)
    share = np.full(reader.assembly.channels(total), 1 / len(proto.input))
    return affine(reader, proto, total, share, np.zeros_like(share))


def _or_equal(function: Join) -> Operator:
    """1 where ``function`` is or both are equal; of NaN neither is true."""

    def read(reader: GraphReader, proto: onnx.NodeProto) -> Value:
        values = [combined(reader, proto, join) for join in (function, "equal")]
        return joined(reader, proto, Arithmetic("max"), values)

    return read


def _not(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    ones = np.ones(reader.assembly.channels(value))
    return affine(reader, proto, value, -ones, ones)


OPERATORS: dict[str, Operator] = {
    "Add": _arithmetic("add", _sum),
    "And": _arithmetic("mul"),
    "Concat": _concat,
    "Div": _arithmetic("div", _quotient),
    "Equal": _arithmetic("equal"),
    "Greater": _arithmetic("greater"),
    "GreaterOrEqual": _or_equal("greater"),
    "Less": _arithmetic("less"),
    "LessOrEqual": _or_equal("less"),
    "Max": _arithmetic("max", _bound(largest=False)),
    "Mean": _mean,
    "Min": _arithmetic("min", _bound(largest=True)),
    "Mul": _arithmetic("mul", _product),
    "Not": _not,
    "Or": _arithmetic("max"),
    "Pow": _arithmetic("pow", _power),
    "Sub": _arithmetic("sub", _difference),
    "Sum": _arithmetic("add", _sum),
    "Where": _arithmetic("where"),
}
