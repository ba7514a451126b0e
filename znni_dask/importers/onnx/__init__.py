"""ONNX files → `Network`: the format in which networks travel and are kept on disk."""

from znni_dask.importers.onnx.load import load

__all__ = ["load"]
