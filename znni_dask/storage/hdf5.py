"""HDF5 datasets: ``file.h5:/path/to/dataset``, read chunk by chunk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from znni_dask.errors import VolumeError
from znni_dask.storage.stored import (
    Decoding,
    Found,
    Stored,
    Three,
    Units,
    axis_letters,
    listed,
)

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".ilp")
_DATASET = re.compile(rf"^(.*(?:{'|'.join(re.escape(s) for s in SUFFIXES)})):(.*)$", re.IGNORECASE)
_CACHE = 1 << 20  # HDF5's cache of decoded chunks; a read touches each chunk once
_FIXED = 4 << 20  # that cache, sieve and conversion buffers, and the free lists HDF5 keeps


def split(place: str) -> tuple[str, str]:
    """A file, and the dataset named behind the colon; "" where none is."""
    match = _DATASET.match(place)
    if match and not Path(place).exists():
        return match[1], match[2]
    return place, ""


def _open_file(path: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise VolumeError(
            f"{path} is HDF5, which needs the package h5py: pip install 'znni_dask[hdf5]'"
        ) from error
    with suppress(ImportError):
        import hdf5plugin  # noqa: F401  # makes its compression filters known to HDF5
    return h5py.File(path, "r", rdcc_nbytes=_CACHE)


def _open_dataset(path: str, dataset: str) -> Any:
    return _open_file(path)[dataset]


def find(path: str, dataset: str) -> Found:
    """A dataset of a file, the only one where none is named; raises `VolumeError`."""
    file = _open_file(path)
    name = _name(file, path, dataset)
    array = file[name]
    shown = f"{path}:{name}"
    if array.shape is None:
        raise VolumeError(f"{shown} holds no values")
    _check_sources(array, shown)
    decoding = Decoding(array.chunks, copies=3, fixed=_FIXED)
    stored = Stored.of(partial(_open_dataset, path, name), array, decoding)
    scale, translation, units = _placed(dict(array.attrs))
    return Found(stored, _axes(array), shown, scale, translation, units)


def _name(file: Any, path: str, asked: str) -> str:
    """The full name of the dataset meant."""
    import h5py

    there: list[str] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and len(node.shape or ()) >= 2:
            there.append("/" + name)

    if asked.strip("/") and isinstance(file.get(asked), h5py.Dataset):
        return str(file[asked].name)
    inside = file.get(asked or "/")
    if isinstance(inside, h5py.Group):
        inside.visititems(visit)
        base = str(inside.name).rstrip("/")
        there[:] = [base + name for name in there]
        if len(there) == 1:
            return there[0]
        problem = f"{path} holds {len(there)} datasets" + (f" in {asked}" if asked else "")
        advice = f": name one, like {path}:{there[0]}; there are " if there else ""
        raise VolumeError(problem + advice + (listed(there) if there else " of two axes or more"))
    file.visititems(visit)
    raise VolumeError(f"{path} has no dataset {asked}: there are {listed(there)}")


def _check_sources(array: Any, shown: str) -> None:
    """A virtual dataset reads as its fill value where a file behind it is missing."""
    if not array.is_virtual:
        return
    folder = Path(array.file.filename).parent
    names = {s.file_name for s in array.virtual_sources()} - {"."}
    missing = sorted(n for n in names if not (folder / n).exists() and not Path(n).exists())
    if missing:
        raise VolumeError(
            f"{shown} is put together of other files that are not there: {listed(missing, 3)}"
        )


def _axes(array: Any) -> str:
    """Axes as ilastik (`axistags`) or HDF5's own dimension labels tell them."""
    names = [tag.get("key") for tag in _tags(array.attrs)] or [dim.label for dim in array.dims]
    return axis_letters(names if len(names) == array.ndim else None, array.ndim)


def _tags(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ilastik's axes; none where there are none that can be read."""
    try:
        text = attributes.get("axistags", "{}")
        return list(json.loads(text).get("axes", []))
    except (TypeError, ValueError, AttributeError):
        return []


def _placed(attributes: Mapping[str, Any]) -> tuple[Three, Three, Units]:
    """Scale, translation and units: `element_size_um` (z, y, x), or `resolution` and `offset` in
    nanometers, as the CREMI challenge has them, or ilastik's resolutions."""
    size = _three(attributes.get("element_size_um"))
    if size is not None:
        return size, (0.0, 0.0, 0.0), ("micrometer",) * 3
    size = _three(attributes.get("resolution"))
    if size is not None:
        offset = _three(attributes.get("offset"), positive=False)
        return size, offset or (0.0, 0.0, 0.0), ("nanometer",) * 3
    tagged = {tag.get("key"): tag.get("resolution") for tag in _tags(attributes)}
    z, y, x = (float(tagged.get(axis) or 1.0) for axis in "zyx")
    return (z, y, x), (0.0, 0.0, 0.0), (None, None, None)


def _three(value: Any, positive: bool = True) -> Three | None:
    """An attribute of three numbers; None where it is absent or something else."""
    try:
        numbers = np.asarray(value, float).ravel()
    except (TypeError, ValueError):
        return None
    if numbers.size != 3 or not np.isfinite(numbers).all() or (positive and (numbers <= 0).any()):
        return None
    z, y, x = (float(n) for n in numbers)
    return z, y, x
