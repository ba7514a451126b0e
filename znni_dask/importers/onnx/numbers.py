"""Which values hold whole numbers or truth values: layers compute with real ones.

What comes out the same is let through (sums, comparisons, choices); what does not, such as a
quotient of whole numbers, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from znni_dask.importers.onnx.assembly import Numbers, UnsupportedNode

_REALS = {
    *(onnx.TensorProto.UNDEFINED, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE),
    *(onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16),
}
_TRUTHS = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"}
_ALIKE = {  # what whole numbers and real ones have in common
    *("Abs", "Add", "ArgMax", "Cast", "CastLike", "Clip", "Concat", "DepthToSpace", "Expand"),
    *("Flatten", "Gather", "Identity", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "ReduceMax"),
    *("ReduceMin", "ReduceSum", "Relu", "Reshape", "Shape", "Sign", "Size", "Slice"),
    *("SpaceToDepth", "Split", "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Unsqueeze", "Where"),
}


def of_type(number: int) -> Numbers:
    """The numbers of one of ONNX's types."""
    if number == onnx.TensorProto.BOOL:
        return "truth"
    return "real" if number in _REALS else "whole"


def made(proto: onnx.NodeProto, given: Mapping[str, Numbers]) -> Numbers:
    """What numbers a node makes of what is ``given``, the values that are no constants; raises
    `UnsupportedNode` where layers would make others."""
    operator = proto.op_type
    inputs = proto.input[1:] if operator == "Where" else proto.input
    found: Numbers = next((given[name] for name in inputs if name in given), "real")
    if operator not in _ALIKE | _TRUTHS and found != "real":
        raise UnsupportedNode("reckons with whole numbers, where layers reckon with real ones")
    if operator == "Cast":
        return of_type(next((a.i for a in proto.attribute if a.name == "to"), 0))
    if operator == "ArgMax":
        return "whole"
    return "truth" if operator in _TRUTHS else found
