"""``import znni_dask.xarray`` gives every DataArray ``.znni``: ``raw.znni.infer("network.onnx")``.

A module of its own, so that ``import znni_dask`` does not wait for xarray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xarray

from znni_dask.network.network import Network
from znni_dask.volume import infer


@xarray.register_dataarray_accessor("znni")  # type: ignore[no-untyped-call]
class Accessor:
    """What znni_dask does with a DataArray."""

    def __init__(self, array: xarray.DataArray) -> None:
        self._array = array

    def infer(self, network: str | Path | Network, **options: Any) -> Any:
        """The answer of a network, lazily; options and errors are those of `znni_dask.infer`."""
        return infer(self._array, network, **options)
