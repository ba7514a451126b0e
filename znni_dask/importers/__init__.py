"""Anything a user has → `Network`: ONNX files, `.znni` text files, the papers' networks by name."""

from __future__ import annotations

from pathlib import Path

from znni_dask.errors import NetworkError
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.network import Network


def load_network(source: str | Path | Network, size: tuple[int, int, int] | None = None) -> Network:
    """The network in a file (``.onnx``, ``.znni``), by a paper's name (``n337`` …), or itself.

    ``size`` (z, y, x): the windows to which the network is to be applied, where it is applied to
    windows of one size only.

    Raises `NetworkError` where it cannot be read.
    """
    if isinstance(source, Network):
        return source
    if str(source) in PAPER_NETWORKS:
        return PAPER_NETWORKS[str(source)]()
    if not isinstance(source, str | Path):
        raise NetworkError(f"a network is a file or a Network, not a {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        names = ", ".join(PAPER_NETWORKS)
        raise NetworkError(f"no network at {path}: give an .onnx or .znni file, or one of {names}")
    if path.suffix == ".znni":
        from znni_dask.importers import znni

        return znni.load(path)
    from znni_dask.importers import onnx

    return onnx.load(path, size)
