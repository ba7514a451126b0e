"""Trained 3D ConvNets applied to volumes far larger than memory: exact, seamless, fast."""

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
from znni_dask.overlap import OverlapKernel, overlap_kernel
from znni_dask.run import Summary, run
from znni_dask.volume import infer, keep_annotations

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
