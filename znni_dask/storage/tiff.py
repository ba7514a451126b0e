"""TIFF stacks, lazily: one file or a folder of sections, checked when opened.

tifffile reads; what it would pass over in silence (truncated files, pages of different size,
several images in one file, colour maps) is refused here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from znni_dask.errors import VolumeError

SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class OpenTiff:
    """A TIFF stack as a zarr array over its pages, strips or tiles; tifffile's axis letters."""

    array: Any
    axes: str


@dataclass(frozen=True)
class TiffStack:
    """A TIFF file or folder, opened where it is first read: file handles do not travel."""

    path: str

    @cached_property
    def opened(self) -> OpenTiff:
        """The open stack; raises `VolumeError` where it is damaged or no stack."""
        path = Path(self.path)
        return _open_folder(path) if path.is_dir() else _open_file(path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return tuple(self.opened.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its values."""
        dtype: np.dtype[Any] = self.opened.array.dtype
        return dtype

    def __getitem__(self, index: tuple[slice | int, ...]) -> Any:
        return self.opened.array[index]

    def __reduce__(self) -> tuple[type[TiffStack], tuple[str]]:
        return TiffStack, (self.path,)


def _open_file(path: Path) -> OpenTiff:
    import tifffile
    import zarr

    with _complaints() as said:
        tiff = tifffile.TiffFile(path)
        _ = len(tiff.pages)
        count = len(tiff.series)
    if said:
        raise VolumeError(f"{path} is damaged or truncated: {said[0]}")
    if count != 1:
        shapes = ", ".join(str(series.shape) for series in tiff.series)
        raise VolumeError(
            f"{path} holds {count} images of shapes {shapes}: save the one wanted alone"
        )
    series = tiff.series[0]
    _check_pages(path, tiff, series)
    return OpenTiff(zarr.open_array(series.aszarr(level=0), mode="r"), series.axes)


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What tifffile says of offsets and damage meanwhile; it only logs them, and goes on."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "offset" in text or "corrupt" in text:
                said.append(text)

    logger, listener = logging.getLogger("tifffile"), Listener()
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def _check_pages(path: Path, tiff: Any, series: Any) -> None:
    """Every page's data must lie within the file, and be grey values."""
    size = path.stat().st_size
    first = series.keyframe
    if first.photometric.name == "PALETTE":
        raise VolumeError(f"{path} holds colours of a palette, not values: convert it to grey")
    declared = (tiff.imagej_metadata or {}).get("images", 1)
    pages = int(np.prod(series.shape)) // max(1, int(np.prod(first.shape)))
    end = 0
    if series.dataoffset is not None:  # one stretch of uncompressed data
        end = series.dataoffset + series.nbytes
    else:
        for page in series.pages:
            if page is not None:
                offsets, counts = page.dataoffsets, page.databytecounts
                end = max([end, *(o + n for o, n in zip(offsets, counts, strict=True))])
    if end > size or declared > pages:
        raise VolumeError(
            f"{path} is truncated: it has {size:,} bytes of at least {end:,}, and {pages} pages"
        )


def _open_folder(path: Path) -> OpenTiff:
    import tifffile
    import zarr

    files = tifffile.natural_sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    kinds: dict[tuple[Any, ...], str] = {}
    for name in files:
        with tifffile.TiffFile(name) as tiff:
            page = tiff.series[0]
            kinds.setdefault((page.axes, page.shape, str(page.dtype), len(tiff.pages)), name)
    if len(kinds) > 1:
        (one, a), (other, b) = list(kinds.items())[:2]
        raise VolumeError(f"sections of {path} differ: {a} is {one[:3]}, {b} is {other[:3]}")
    axes, _, _, pages = next(iter(kinds))
    if axes != "YX" or pages != 1:
        raise VolumeError(
            f"the files in {path} have axes {axes} and {pages} pages: wanted is one grey section "
            "each"
        )
    sequence = tifffile.TiffSequence(files)
    return OpenTiff(zarr.open_array(sequence.aszarr(), mode="r"), "ZYX")
