"""What lies at a path or URL: which kind of volume, and who opens it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from znni_dask.errors import VolumeError, ZnniError
from znni_dask.storage import hdf5, tiff
from znni_dask.storage.stored import Decoding, Found, Stored, axis_letters, reason, unreadable
from znni_dask.storage.urls import check_secrets, is_url, local_path, without_secrets

_ZARR = ("zarr.json", ".zarray", ".zgroup")
_WITH_PASSWORDS = ("http://", "https://")  # whose servers know no other credentials


def find(path: str | Path, level: int | str | None, options: Mapping[str, Any] | None) -> Found:
    """The volume at a path or URL; raises `VolumeError` where there is none that can be read."""
    place = str(path if is_url(path) else local_path(path))
    shown = without_secrets(place) if is_url(place) else place
    if is_url(place) and not place.startswith(_WITH_PASSWORDS):
        check_secrets(place, VolumeError)
    try:
        if is_url(place):
            return _find_remote(place, shown, level, options)
        if options:
            raise VolumeError(f"storage_options are for URLs, and {place} is a local path")
        return _find_local(place, level)
    except ZnniError:
        raise
    except unreadable() as error:
        raise VolumeError(f"cannot read {shown}: {reason(error)}") from error


def _find_remote(
    place: str, shown: str, level: int | str | None, options: Mapping[str, Any] | None
) -> Found:
    from znni_dask.storage import zarrs

    suffix = Path(hdf5.split(urlsplit(place).path)[0]).suffix.lower()
    if suffix in (*tiff.SUFFIXES, *hdf5.SUFFIXES, ".npy"):
        raise VolumeError(
            f"{shown}: {suffix} files are read from local or mounted folders only: copy it, or "
            "store it as OME-Zarr, which is read from URLs chunk by chunk"
        )
    return zarrs.find(place.rstrip("/"), shown, level, options)


def _find_local(place: str, level: int | str | None) -> Found:
    name, dataset = hdf5.split(place)
    path = Path(name).absolute()  # workers may be elsewhere
    if not path.exists():
        raise VolumeError(f"there is no volume at {path}")
    if path.is_dir() and any((path / n).exists() for n in _ZARR):
        from znni_dask.storage import zarrs

        return zarrs.find(str(path), str(path), level, None)
    if level is not None:
        raise VolumeError(f"level {level} of {path}: only images in OME-Zarr have levels")
    if path.is_dir():
        if any(p.suffix.lower() in tiff.SUFFIXES for p in path.iterdir()):
            return tiff.find(str(path))
        raise VolumeError(f"the folder {path} holds neither a Zarr array nor TIFF files")
    if path.suffix == ".npy":
        return _find_npy(str(path))
    if path.suffix.lower() in tiff.SUFFIXES:
        return tiff.find(str(path))
    if path.suffix.lower() in hdf5.SUFFIXES:
        return hdf5.find(str(path), dataset)
    raise VolumeError(
        f"{path}: not a kind of volume known (Zarr, OME-Zarr, .tif, .tiff, .h5, .hdf5, .npy)"
    )


class _Mapped:
    """A `.npy` file mapped into memory; what is read of it is copied."""

    def __init__(self, path: str) -> None:
        self._values = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape = self._values.shape
        self.dtype = self._values.dtype

    def __getitem__(self, index: tuple[slice | int, ...]) -> Any:
        return np.array(self._values[index])


def _find_npy(path: str) -> Found:
    stored = Stored.of(partial(_Mapped, path), decoding=Decoding())
    return Found(stored, axis_letters(None, len(stored.shape)), path)
