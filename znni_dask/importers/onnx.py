"""ONNX files → `Network`: the format in which networks travel and are kept on disk."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from znni_dask.errors import NetworkError
from znni_dask.importers.onnx_graph import GraphReader
from znni_dask.importers.onnx_operators import OPERATORS
from znni_dask.network.network import Network


def load(path: str | Path) -> Network:
    """Read an ONNX file, external data beside it included.

    Raises `NetworkError` where the file is not ONNX, is truncated, contradicts itself or uses
    what is not supported.
    """
    path = Path(path)
    try:
        model = onnx.load(path, format="protobuf")
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise NetworkError(f"cannot read {path} as ONNX: {error}") from None
    if not model.graph.node or not model.graph.output:
        raise NetworkError(f"{path} is not an ONNX network, or is truncated: it holds no layers")
    try:
        return GraphReader(model, OPERATORS).network()
    except NetworkError as error:
        raise NetworkError(f"{path}: {error}") from None
