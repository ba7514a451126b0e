"""What makes a graph unsound whatever its operators mean: checked before it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import onnx

from znni_dask.errors import NetworkError
from znni_dask.importers.onnx.assembly import UnsupportedNode

OLDEST_OPSET = 11
_MOST_NODES = 1 << 17
_NESTED = (
    *(onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS, onnx.AttributeProto.TENSORS),
    *(onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS),
    *(onnx.AttributeProto.TYPE_PROTO, onnx.AttributeProto.TYPE_PROTOS),
)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's operators that a model uses."""
    versions = sorted({o.version for o in model.opset_import if o.domain in ("", "ai.onnx")})
    if len(versions) > 1:
        raise NetworkError(f"it uses several opsets at once: {', '.join(map(str, versions))}")
    newest = onnx.defs.onnx_opset_version()
    if not versions or versions[0] < OLDEST_OPSET:
        found = versions[0] if versions else "none"
        raise NetworkError(f"opset {found} is too old: export with opset {OLDEST_OPSET} or later")
    if versions[0] > newest:
        raise NetworkError(f"opset {versions[0]} is not known: export with opset {newest} at most")
    return int(versions[0])


def check_graph(model: onnx.ModelProto) -> None:
    """Raise `NetworkError` where values are made twice, or operators are redefined."""
    graph = model.graph
    if len(graph.node) > _MOST_NODES:
        raise NetworkError(f"{len(graph.node)} nodes are taken for a mistake")
    if any(isinstance(name, bytes) for name in _names(graph)):
        raise NetworkError("names in it are no text: the file is damaged")
    own = {f.name for f in model.functions if f.domain in ("", "ai.onnx")}
    if redefined := sorted(own & {n.op_type for n in graph.node}):
        raise NetworkError(f"functions of the model's own are not supported: {redefined[0]!r}")
    inputs = {value.name for value in graph.input}
    made = inputs | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made:
                raise NetworkError(f"the value {name!r} is made twice")
            made.add(name)
    outputs: set[str] = set()
    for name in (value.name for value in graph.output):
        if not name or name in outputs:
            raise NetworkError(f"an output has no name, or two have the name {name!r}")
        if name in inputs:
            raise NetworkError(f"the output {name!r} is the input itself")
        outputs.add(name)


def _names(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    """All names that a graph uses; protobuf hands out as bytes what is no text."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def check_node(proto: onnx.NodeProto, opset: int) -> None:
    """Raise `UnsupportedNode` where a node's inputs, outputs or attributes are not those that
    its operator has."""
    schema = _schema(proto.op_type, opset)
    if schema is None:
        return
    if len(proto.input) > schema.max_input or len(proto.output) > schema.max_output:
        raise UnsupportedNode(
            f"more than it takes: {len(proto.input)} inputs, {len(proto.output)} outputs"
        )
    if len(proto.input) < schema.min_input:
        raise UnsupportedNode(f"{len(proto.input)} inputs where {schema.min_input} are wanted")
    types = _attribute_types(proto.op_type, opset)
    seen: set[str] = set()
    for attribute in proto.attribute:
        wanted = types.get(attribute.name, attribute.type)
        if attribute.type != wanted or attribute.ref_attr_name:
            raise UnsupportedNode(f"its attribute {attribute.name!r} is of another type")
        if attribute.type in _NESTED:
            raise UnsupportedNode(f"its attribute {attribute.name!r} holds what is not supported")
        if attribute.name in seen:
            raise UnsupportedNode(f"its attribute {attribute.name!r} is given twice")
        seen.add(attribute.name)


@lru_cache(maxsize=1024)
def _schema(operator: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return None


@lru_cache(maxsize=1024)
def _attribute_types(operator: str, opset: int) -> Mapping[str, int]:
    attributes = _schema(operator, opset).attributes
    return {name: int(attribute.type.value) for name, attribute in attributes.items()}
