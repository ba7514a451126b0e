"""Evaluating nodes whose inputs are known: constants, and sizes that exporters compute with.

Bounded in memory and time, because files are not trusted: only operators that are listed here,
and only where what they make is not much larger than what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Constant = NDArray[np.generic]
MOST_ELEMENTS = 1 << 20  # of a constant worth computing while reading
MALFORMED = (  # what evaluating or reading a node with missing or contradicting parts raises
    *(KeyError, TypeError, ValueError, IndexError, AttributeError),
    *(OverflowError, RuntimeError, MemoryError, ZeroDivisionError),
)
_ELEMENTWISE = {
    *("Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Div", "Equal", "Erf", "Exp"),
    *("Floor", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max"),
    *("Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid"),
    *("Sign", "Sqrt", "Sub", "Sum", "Tanh", "Where", "Xor", "Dropout"),
}
_MOVING = {
    *("Concat", "Constant", "Flatten", "Gather", "Reshape", "Shape", "Size", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
}
_REDUCING = {
    *("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    *("ReduceSumSquare", "ArgMax"),
}
_GROWING = {"ConstantOfShape", "Expand", "Range", "Tile"}
FOLDED = _ELEMENTWISE | _MOVING | _REDUCING | _GROWING


class Folder:
    """Evaluates nodes of one model."""

    def __init__(self, opsets: Sequence[onnx.OperatorSetIdProto]) -> None:
        self._opsets = opsets

    def values(
        self, proto: onnx.NodeProto, given: Mapping[str, tuple[Constant, ...]]
    ) -> list[tuple[Constant, ...]]:
        """For every output of the node its value for every probe; raises `ValueError` where it
        cannot be evaluated. Inputs that are the same for all probes are given once."""
        probes = max((len(v) for v in given.values()), default=1)
        evaluate: Any = None
        made: list[list[Constant]] = []
        for probe in range(probes):
            inputs = {name: v[probe % len(v)] for name, v in given.items()}
            _check_size(proto, list(inputs.values()))
            quick = _quickly(proto, list(inputs.values()))
            if quick is not None:
                made.append([quick])
                continue
            evaluate = evaluate or ReferenceEvaluator(self._model(proto, inputs))
            made.append([np.asarray(v) for v in evaluate.run(None, inputs)])
        return [_once(tuple(one)) for one in zip(*made, strict=True)]

    def _model(self, proto: onnx.NodeProto, inputs: Mapping[str, Constant]) -> onnx.ModelProto:
        helper = onnx.helper
        values = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for name, value in inputs.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output if name]
        graph = helper.make_graph([proto], "constant", values, outputs)
        return helper.make_model(graph, opset_imports=self._opsets)


def _once(values: tuple[Constant, ...]) -> tuple[Constant, ...]:
    """One value where all probes have the same."""
    first = values[0]
    if all(v is first or np.array_equal(v, first) for v in values[1:]):
        return (first,)
    return values


def _quickly(proto: onnx.NodeProto, given: list[Constant]) -> Constant | None:
    """What the reference evaluator takes long for: things repeated without being copied."""
    if proto.op_type == "Expand":
        return np.broadcast_to(
            given[0], np.broadcast_shapes(given[0].shape, tuple(int(n) for n in given[1]))
        )
    if proto.op_type == "ConstantOfShape":
        value = np.zeros(1, np.float32)
        for attribute in proto.attribute:
            value = onnx.numpy_helper.to_array(attribute.t)
        return np.broadcast_to(value.reshape(()), tuple(int(n) for n in given[0]))
    return None


def _check_size(proto: onnx.NodeProto, given: list[Constant]) -> None:
    size = _size_made(proto, given)
    if not size <= max(MOST_ELEMENTS, sum(v.size for v in given if 0 not in v.strides)):
        raise ValueError(f"makes a constant of {size:.0f} values")


def _size_made(proto: onnx.NodeProto, given: list[Constant]) -> float:
    """Elements of what a node makes, before it is made; what is only repeated takes no memory."""
    operator = proto.op_type
    if operator == "Range":
        start, limit, step = (float(cast("Any", v.ravel()[0])) for v in given)
        return abs((limit - start) / step) if step else float("inf")
    if operator == "Tile":
        return float(given[0].size) * float(np.prod(given[1].astype(np.float64)))
    if operator == "Gather":
        return float(given[0].size) * given[1].size
    if operator in _ELEMENTWISE and len(given) > 1:
        return float(np.prod(np.array(np.broadcast_shapes(*(v.shape for v in given)), float)))
    return 0.0 if operator in _GROWING else float(sum(v.size for v in given))
