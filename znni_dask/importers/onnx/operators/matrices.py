"""Gemm and MatMul: a matrix on channels is a convolution of one voxel, on everything that was
flattened one as large as what was flattened."""

from __future__ import annotations

import numpy as np
import onnx

from znni_dask.geometry import triple
from znni_dask.importers.onnx.assembly import UnsupportedNode
from znni_dask.importers.onnx.graph import GraphReader, Operator
from znni_dask.importers.onnx.layouts import SPACE, Piece, Value
from znni_dask.importers.onnx.operators.attributes import attributes_of
from znni_dask.importers.onnx.tensors import Constant
from znni_dask.network import layers


def _matmul(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    if reader.is_known(proto.input[0]):
        raise UnsupportedNode("a matrix from the left is not supported")
    value = reader.given(proto)
    if not reader.is_known(proto.input[1]):
        raise UnsupportedNode(
            "the product of two computed arrays (attention) is not supported, in windows neither"
        )
    return multiplied(reader, proto, value, reader.weights(proto, 1), None)


def _gemm(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value, matrix = reader.given(proto), reader.weights(proto, 1)
    if attributes.get("transA") or value.rank != 2:
        raise UnsupportedNode("transA=1 is not supported")
    if attributes.get("transB"):
        matrix = matrix.T
    bias = None if reader.constant(proto, 2) is None else reader.weights(proto, 2)
    if bias is not None:
        bias = np.broadcast_to(bias * attributes.get("beta", 1.0), (1, matrix.shape[1]))[0]
    return multiplied(reader, proto, value, matrix * attributes.get("alpha", 1.0), bias)


def multiplied(
    reader: GraphReader,
    proto: onnx.NodeProto,
    value: Value,
    matrix: Constant,
    bias: Constant | None,
) -> Value:
    """The last axis of a value times a matrix (in, out)."""
    last = value.axes[-1]
    kinds = [p.kind for p in last if not p.single]
    _check_whole(reader, value, [p.kind for p in last])
    if matrix.ndim != 2 or set(reader.assembly.lengths(value, value.rank - 1)) != {matrix.shape[0]}:
        raise UnsupportedNode(
            f"a matrix of shape {list(matrix.shape)} on an axis of "
            f"{reader.assembly.lengths(value, value.rank - 1)[0]} elements"
        )
    channels = reader.assembly.channels(value)
    if [p for p in last if p.kind == "c" and not p.single] != value.pieces("c"):
        raise UnsupportedNode("a matrix on a part of the channels")
    sizes = [next((p.length for p in last if p.kind == k), 1) for k in SPACE]
    order = [p.kind for p in last if p.kind == "c" or p.kind in SPACE]
    if sorted(set(order)) != sorted(order) or (kinds and "c" not in kinds and channels > 1):
        raise UnsupportedNode("a matrix on an axis whose parts are mixed")
    lengths = {"c": channels, **dict(zip(SPACE, sizes, strict=True))}
    kernel = matrix.T.reshape(-1, *(lengths[k] for k in order))
    places = [order.index(k) for k in ("c", *SPACE) if k in order]
    kernel = kernel.transpose(0, *(1 + i for i in places))
    kernel = kernel.reshape(-1, channels, *sizes)
    whole = "".join(k for k in SPACE if k in order) if max(sizes) > 1 else ""
    layer = layers.Conv(
        channels, kernel.shape[0], triple(sizes), bias=bias is not None, whole=whole
    )
    weights = {"weight": kernel} if bias is None else {"weight": kernel, "bias": bias}
    name = reader.add(proto, layer, [value.layer], weights)
    made = Piece("c", (kernel.shape[0],) * reader.assembly.probes)
    return Value(name, (*value.axes[:-1], (made,)))


def _check_whole(reader: GraphReader, value: Value, order: list[str]) -> None:
    """Axes of space that a matrix takes in must be flattened whole, and of known length."""
    for kind in order:
        if kind not in SPACE:
            continue
        number = SPACE.index(kind)
        whole = {size[number] for size in reader.assembly.sizes(value)}
        mine = next(p for p in value.axes[-1] if p.kind == kind)
        if len(whole) > 1 or mine.length not in whole:
            raise UnsupportedNode(
                "flattens an axis of space whose length is open: export with fixed sizes"
            )


OPERATORS: dict[str, Operator] = {"Gemm": _gemm, "MatMul": _matmul}
