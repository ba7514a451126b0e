"""Trained 3D ConvNets applied to volumes far larger than memory: exact, seamless, fast."""

from importlib import import_module
from typing import TYPE_CHECKING

from znni_dask.errors import (
    InputError,
    MemoryLimitError,
    NetworkError,
    OptionError,
    OutputError,
    RunError,
    VolumeError,
    ZnniError,
)
from znni_dask.importers import load_network
from znni_dask.network.build import Builder
from znni_dask.network.field_of_view import geometry
from znni_dask.network.network import Network

if TYPE_CHECKING:
    from znni_dask.overlap import OverlapKernel, overlap_kernel
    from znni_dask.running import Summary, run
    from znni_dask.volume import infer, keep_annotations

# What needs dask's schedulers and stores is imported when it is first asked for.
_LATER = {
    "OverlapKernel": "overlap",
    "Summary": "running",
    "infer": "volume",
    "keep_annotations": "volume",
    "overlap_kernel": "overlap",
    "run": "running",
}

__all__ = [
    "Builder",
    "InputError",
    "MemoryLimitError",
    "Network",
    "NetworkError",
    "OptionError",
    "OutputError",
    "OverlapKernel",
    "RunError",
    "Summary",
    "VolumeError",
    "ZnniError",
    "geometry",
    "infer",
    "keep_annotations",
    "load_network",
    "overlap_kernel",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
