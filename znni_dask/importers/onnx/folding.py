"""Evaluating nodes whose inputs are known: constants, and sizes that exporters compute with.

Bounded in memory and time, because files are not trusted: only operators that are listed here,
and only where what they make is not much larger than what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from znni_dask.importers.onnx.tensors import Constant, array_of, is_same

MOST_ELEMENTS = 1 << 20  # of a constant worth computing while reading
_MOST_IN_ALL = 32 * MOST_ELEMENTS  # of all that is computed in one reading of a graph
_MOST_AXES = 32
_ELEMENTWISE = {
    *("Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Div", "Equal", "Erf", "Exp"),
    *("Floor", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max"),
    *("Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round"),
    *("Sigmoid", "Sign", "Sqrt", "Sub", "Sum", "Tanh", "Where", "Xor"),
}
_MOVING = {
    *("Concat", "Constant", "Flatten", "Gather", "Pad", "Reshape", "Shape", "Size", "Slice"),
    *("Split", "Squeeze", "Transpose", "Unsqueeze"),
}
_REDUCING = {
    *("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    *("ReduceSumSquare", "ArgMax"),
}
FOLDED = _ELEMENTWISE | _MOVING | _REDUCING | {"ConstantOfShape", "Expand", "Range", "Tile"}


class Folder:
    """Evaluates nodes of one model, whose constants are ``fixed``: what depends on them alone is
    evaluated once, however often the graph is read."""

    def __init__(
        self, opsets: Sequence[onnx.OperatorSetIdProto], fixed: Mapping[str, Constant]
    ) -> None:
        self._opsets = opsets
        self._fixed = dict(fixed)
        self._held = sum(value.size for value in fixed.values())
        self._left = 0
        self.work = 0  # nodes evaluated, large ones counting for many
        self.begin()

    def begin(self) -> None:
        """A new reading begins."""
        self._left = _MOST_IN_ALL

    def values(
        self, proto: onnx.NodeProto, given: Mapping[str, tuple[Constant, ...]]
    ) -> list[tuple[Constant, ...]]:
        """For every output of the node its value for every probe; raises `ValueError` where it
        cannot be evaluated. Inputs that are the same for all probes are given once."""
        names = [name for name in proto.output if name]
        if all(name in self._fixed for name in names):
            return [(self._fixed[name],) for name in names]
        probes = max((len(v) for v in given.values()), default=1)
        evaluate: Any = None
        made: list[list[Constant]] = []
        for probe in range(probes):
            inputs = {name: _wide(v[probe % len(v)]) for name, v in given.items()}
            listed = [inputs[name] for name in proto.input if name]
            self._check_size(proto, listed)
            quick = _quickly(proto, listed)
            if quick is None:
                evaluate = evaluate or ReferenceEvaluator(self._model(proto, inputs))
                with np.errstate(all="ignore"):
                    results = [np.asarray(v) for v in evaluate.run(None, inputs)]
            else:
                results = [quick]
                self._held += quick.size if proto.op_type == "Constant" else 0
            made.append(results)
        found = [_once(tuple(one)) for one in zip(*made, strict=True)]
        if all(name in self._fixed for name in given):
            self._fixed.update((name, v[0]) for name, v in zip(names, found, strict=False))
        return found

    def _check_size(self, proto: onnx.NodeProto, given: list[Constant]) -> None:
        size = _size_made(proto, given)
        if not size <= max(MOST_ELEMENTS, self._held):
            raise ValueError(f"makes a constant of {size:.0f} values")
        self._left -= int(size)
        self.work += 1 + (int(size) >> 10)
        if self._left + 4 * self._held < 0:
            raise ValueError("more is computed of constants than a network needs")

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


def _wide(value: Constant) -> Constant:
    """Whole numbers of 64 bits: those of 32 do not hold the voxels of the sizes read for."""
    return value.astype(np.int64) if value.dtype == np.int32 else value


def _once(values: tuple[Constant, ...]) -> tuple[Constant, ...]:
    """One value where all probes have the same."""
    return values[:1] if is_same(values) else values


def _quickly(proto: onnx.NodeProto, given: list[Constant]) -> Constant | None:
    """What the reference evaluator takes long for, things repeated without being copied; and what
    it does not check, arrays that a node brings with it."""
    tensors = [a.t for a in proto.attribute if a.HasField("t")]
    value = array_of(tensors[0], "its value") if tensors else np.zeros(1, np.float32)
    if proto.op_type == "Constant" and tensors:
        return value
    if proto.op_type == "Cast" and given[0].dtype == np.int64:
        to = [a.i for a in proto.attribute if a.name == "to"]
        return given[0] if to == [onnx.TensorProto.INT32] else None
    if proto.op_type == "Expand":
        return np.broadcast_to(given[0], np.broadcast_shapes(given[0].shape, _shape(given[1])))
    if proto.op_type == "ConstantOfShape":
        return np.broadcast_to(value.reshape(()), _shape(given[0]))
    return None


def _shape(given: Constant) -> tuple[int, ...]:
    if given.ndim != 1 or given.size > _MOST_AXES or given.dtype.kind not in "iu":
        raise ValueError(f"a shape that is an array of {list(given.shape)} {given.dtype}")
    return tuple(int(n) for n in given)


def _size_made(proto: onnx.NodeProto, given: list[Constant]) -> float:
    """Elements of what a node makes, before it is made; what is only repeated takes no memory."""
    operator = proto.op_type
    if operator in ("Shape", "Size", "Expand", "ConstantOfShape"):
        return 0.0
    if operator == "Range":
        start, limit, step = (float(v.flat[0]) for v in given)
        return abs((limit - start) / step) if step else float("inf")
    if operator == "Tile":
        times = np.prod([float(n) for n in _shape(given[1])])
        return float(given[0].size) * abs(float(times))
    if operator == "Pad":
        pads = np.asarray(given[1], float).reshape(2, -1).sum(0) if len(given) < 4 else np.inf
        return float(np.prod(np.abs(np.array(given[0].shape) + pads)))
    if operator == "Gather":
        return float(given[0].size) * given[1].size
    if operator == "Split":
        parts = [a.i for a in proto.attribute if a.name == "num_outputs"]
        if any(n != len(proto.output) for n in parts):
            raise ValueError(f"{parts[0]} parts for {len(proto.output)} outputs")
    if operator in _ELEMENTWISE and len(given) > 1:
        return float(np.prod(np.array(np.broadcast_shapes(*(v.shape for v in given)), float)))
    return float(sum(v.size for v in given))
