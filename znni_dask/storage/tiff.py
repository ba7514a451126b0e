"""TIFF stacks, lazily: one file or a folder of sections, checked when opened.

tifffile reads the headers and decodes strips and tiles. What it would pass over in silence
(truncated files, pages of different size, several images in one file, colour maps, planes that
are missing) is refused here. Rows of uncompressed pages are read as they lie, strips and tiles one
at a time, so memory stays small however large a page is.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import VolumeError
from znni_dask.geometry import ceil_divide
from znni_dask.storage.stored import Decoding, Found, Stored
from znni_dask.storage.tiff_metadata import placed

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
_ROWS = 1 << 20  # bytes of rows read at once
_JPEG = (6, 7, 34892, 33007)


@dataclass(frozen=True)
class _Page:
    """Where the data of a page lie: strips or tiles, or, where ``raw``, rows from one offset on."""

    file: str
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    raw: bool
    tables: bytes | None = None


class Pages:
    """The pages of a TIFF image as one array of shape ``frames + page``.

    Files are opened for each page that is read: nothing is shared between threads.
    """

    def __init__(self, keyframe: Any, pages: Sequence[_Page], frames: tuple[int, ...]) -> None:
        self._keyframe = keyframe
        self._decode = keyframe.decode
        self._pages = pages
        self._frames = frames
        self.shape = (*frames, *keyframe.shape)
        self.dtype = np.dtype(keyframe.dtype).newbyteorder("=")
        self._stored_dtype = self.dtype.newbyteorder(keyframe.parent.byteorder)

    @property
    def decoding(self) -> Decoding:
        """The memory that reading takes beside the values."""
        keyframe = self._keyframe
        _, _, _, width, samples = keyframe.shaped
        fixed = 2 * max(_ROWS, width * samples * self.dtype.itemsize)
        if all(page.raw for page in self._pages):
            return Decoding(fixed=fixed)
        one = (1,) * len(self._frames)
        return Decoding((*one, *keyframe.chunks), copies=3, fixed=fixed)

    def __getitem__(self, index: tuple[slice | int, ...]) -> NDArray[np.generic]:
        ranges = [
            range(n)[i] if isinstance(i, slice) else range(i, i + 1)
            for i, n in zip(index, self.shape, strict=True)
        ]
        values = np.empty([len(r) for r in ranges], self.dtype)
        count = len(self._frames)
        letters = dict(zip(self._keyframe.axes, ranges[count:], strict=True))
        samples = letters.get("S", range(1))
        first, last = (samples, range(1)) if self._planar else (range(1), samples)
        window = (first, letters.get("Z", range(1)), letters["Y"], letters["X"], last)
        for place in itertools.product(*(range(len(r)) for r in ranges[:count])):
            frame = [r[i] for r, i in zip(ranges, place, strict=False)]
            number = int(np.ravel_multi_index(frame, self._frames)) if frame else 0
            self._read(number, window, values[place].reshape([len(r) for r in window]))
        return values[tuple(0 if isinstance(i, int) else slice(None) for i in index)]

    @property
    def _planar(self) -> bool:
        """Whether samples are stored as planes of their own."""
        return bool(self._keyframe.shaped[0] > 1)

    def _read(self, number: int, window: tuple[range, ...], values: NDArray[np.generic]) -> None:
        """Fill ``values``, (sample plane, depth, row, column, sample), from one page."""
        page = self._pages[number]
        with Path(page.file).open("rb", buffering=0) as file:
            try:
                if page.raw:
                    self._read_rows(file, page, window, values)
                else:
                    self._read_segments(file, page, window, values)
            except Exception as error:
                error.add_note(f"page {number} of {page.file}")
                raise

    def _read_rows(
        self,
        file: BinaryIO,
        page: _Page,
        window: tuple[range, ...],
        values: NDArray[np.generic],
    ) -> None:
        planes, depths, rows, columns, samples = window
        _, depth, height, width, contiguous = self._keyframe.shaped
        row_bytes = width * contiguous * self.dtype.itemsize
        step = max(1, _ROWS // row_bytes)
        for (i, s), (j, d) in itertools.product(enumerate(planes), enumerate(depths)):
            for k in range(0, len(rows), step):
                some = rows[k : k + step]
                start = int(page.offsets[0]) + ((s * depth + d) * height + some[0]) * row_bytes
                data = np.frombuffer(
                    _bytes(file, start, len(some) * row_bytes), self._stored_dtype
                ).reshape(len(some), width, contiguous)
                values[i, j, k : k + step] = data[:, _slice(columns), _slice(samples)]

    def _read_segments(
        self,
        file: BinaryIO,
        page: _Page,
        window: tuple[range, ...],
        values: NDArray[np.generic],
    ) -> None:
        planes, *space, samples = window
        whole = self._keyframe.shaped[1:4]
        segment = self._segment
        grid = [ceil_divide(n, t) for n, t in zip(whole, segment, strict=True)]
        touched = [
            range(r.start // t, (r.stop - 1) // t + 1) for r, t in zip(space, segment, strict=True)
        ]
        for (i, plane), place in itertools.product(enumerate(planes), itertools.product(*touched)):
            number = plane * math.prod(grid) + int(np.ravel_multi_index(place, grid))
            start = [p * t for p, t in zip(place, segment, strict=True)]
            stop = [min(a + t, n) for a, t, n in zip(start, segment, whole, strict=True)]
            data = self._segment_data(file, page, number, (plane, *start))
            low = [max(a, r.start) for a, r in zip(start, space, strict=True)]
            high = [min(b, r.stop) for b, r in zip(stop, space, strict=True)]
            into: tuple[Any, ...] = (
                i,
                *(
                    slice(a - r.start, b - r.start)
                    for a, b, r in zip(low, high, space, strict=True)
                ),
            )
            taken = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, start, strict=True))
            part: Any = self._keyframe.nodata if data is None else data[(*taken, _slice(samples))]
            values[into] = part

    @property
    def _segment(self) -> tuple[int, int, int]:
        """Depth, rows and columns of a strip or tile."""
        keyframe = self._keyframe
        if keyframe.is_tiled:
            return keyframe.tiledepth, keyframe.tilelength, keyframe.tilewidth
        _, _, height, width, _ = keyframe.shaped
        return 1, min(keyframe.rowsperstrip, height), width

    def _segment_data(
        self, file: BinaryIO, page: _Page, number: int, place: tuple[int, ...]
    ) -> NDArray[np.generic] | None:
        """A decoded strip or tile; None where the file has none, which stands for "no data"."""
        if number >= len(page.offsets) or 0 in (page.offsets[number], page.counts[number]):
            return None
        encoded = _bytes(file, int(page.offsets[number]), int(page.counts[number]))
        options = {"jpegheader": self._keyframe.jpegheader} if self._jpeg else {}
        if page.tables is not None:
            options["jpegtables"] = page.tables
        data, found, _ = self._decode(encoded, number, **options)
        if tuple(found[:4]) != place:
            raise ValueError(f"strip or tile {number} lies at {found[:4]}, not at {place}")
        decoded: NDArray[np.generic] = data
        return decoded

    @property
    def _jpeg(self) -> bool:
        return self._keyframe.compression in _JPEG


class Sections:
    """Files of one grey page each as an array (z, y, x); a file is open only while it is read."""

    def __init__(self, files: Sequence[str], first: Pages) -> None:
        self._files = files
        self._page = first.shape, first.dtype
        self.shape = (len(files), *first.shape)
        self.dtype = first.dtype

    def __getitem__(self, index: tuple[slice | int, ...]) -> NDArray[np.generic]:
        z, *rest = index
        numbers = range(len(self._files))[z] if isinstance(z, slice) else range(z, z + 1)
        sections = []
        for number in numbers:
            pages, _ = _open_file(self._files[number])
            if (pages.shape, pages.dtype) != self._page:
                raise ValueError(f"{self._files[number]} changed: it is {pages.shape} now")
            sections.append(pages[tuple(rest)])
        values = np.stack(sections)
        return values if isinstance(z, slice) else values[0]


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _bytes(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    parts: list[bytes] = []
    while count > 0:
        part = file.read(count)
        if not part:
            raise EOFError(f"the file is truncated: it ends {count:,} bytes too early")
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def find(path: str) -> Found:
    """The stack in a file or folder; raises `VolumeError` where it is damaged or no stack."""
    if Path(path).is_dir():
        return _find_folder(path)
    pages, found = _open_file(path)
    stored = Stored.of(partial(_opened, path), pages, pages.decoding)
    # tifffile's letters for pages, images and other mean z in a stack; samples are channels
    letters = ("z" if a in "IQR" else "c" if a == "S" else a.lower() for a in found.axes)
    scale, translation, units = found.placed
    return Found(stored, "".join(letters), path, scale, translation, units)


def _opened(path: str) -> Pages:
    return _open_file(path)[0]


@dataclass(frozen=True)
class _Told:
    """What a file tells of its image: tifffile's axis letters, and where it lies in space."""

    axes: str
    placed: Any


def _open_file(path: str) -> tuple[Pages, _Told]:
    import tifffile

    with _complaints() as said, tifffile.TiffFile(path) as tiff:
        _ = len(tiff.pages)
        several = tiff.series
        if said:
            raise VolumeError(f"{path} is damaged or truncated: {said[0]}")
        _check_alike(path, several)
        series = several[0]
        keyframe = series.keyframe
        pages = [page for one in several for page in _pages(path, one)]
        _check_ends(path, tiff, several, pages)
        leading = tuple(series.shape[: len(series.shape) - len(keyframe.shape)])
        if series.transform is not None or (*leading, *keyframe.shape) != tuple(series.shape):
            raise VolumeError(
                f"{path}: pages of shape {keyframe.shape} make an image of shape {series.shape} "
                "in a way that is not known here: save it as a plain stack, or as OME-Zarr"
            )
        if len(several) > 1:
            return Pages(keyframe, pages, (len(several),)), _Told("I" + series.axes, placed(tiff))
        return Pages(keyframe, pages, leading), _Told(series.axes, placed(tiff))


def _check_alike(path: str, several: Sequence[Any]) -> None:
    """One image, or grey pages that are alike: what writes page by page makes an image of each."""
    first = several[0]
    alike = {(one.axes, one.keyframe.hash) for one in several} == {("YX", first.keyframe.hash)}
    if len(several) > 1 and not alike:
        shapes = ", ".join(str(one.shape) for one in several[:10])
        raise VolumeError(
            f"{path} holds {len(several)} images of shapes {shapes}: save the one wanted alone"
        )
    kind = first.keyframe.photometric
    if kind is not None and kind.name == "PALETTE":
        raise VolumeError(f"{path} holds colours of a palette, not values: convert it to grey")


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What tifffile says of offsets and damage meanwhile; it only logs them, and goes on."""
    said: list[str] = []
    here = threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.thread == here and ("offset" in text or "corrupt" in text):
                said.append(text)

    logger, listener = logging.getLogger("tifffile"), Listener()
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def _pages(path: str, series: Any) -> list[_Page]:
    """Where the data of every page lie."""
    keyframe = series.keyframe
    count = math.prod(series.shape) // max(1, math.prod(keyframe.shape))
    if series.dataoffset is not None:  # one stretch of uncompressed data, be it of one page
        path = keyframe.parent.filehandle.path
        size = np.array([keyframe.nbytes], np.int64)
        return [_Page(path, series.dataoffset + i * size, size, raw=True) for i in range(count)]
    found: list[_Page] = []
    for page in series.pages:
        if page is None:
            raise VolumeError(f"{path} lacks plane {len(found)} of {count} that its metadata name")
        offsets = np.array(page.dataoffsets, np.int64)
        counts = np.array(page.databytecounts, np.int64)
        raw = bool(keyframe.is_final and page.is_final) and bool(
            (offsets[:-1] + counts[:-1] == offsets[1:]).all()
        )
        tables = page.jpegtables if keyframe.compression in _JPEG else None
        found.append(_Page(page.parent.filehandle.path, offsets, counts, raw, tables))
    return found


def _check_ends(path: str, tiff: Any, several: Sequence[Any], pages: Sequence[_Page]) -> None:
    """Every page's data must lie within its file, and no page be missing."""
    declared = (tiff.imagej_metadata or {}).get("images", 1)
    wanted = sum(math.prod(one.shape) // max(1, math.prod(one.keyframe.shape)) for one in several)
    if declared > wanted or len(pages) != wanted:
        raise VolumeError(f"{path} is truncated: it has {min(len(pages), wanted)} pages")
    sizes: dict[str, int] = {}
    for page in pages:
        size = sizes.setdefault(page.file, Path(page.file).stat().st_size)
        end = int((page.offsets + page.counts).max(initial=0))
        if end > size:
            raise VolumeError(
                f"{page.file} is truncated: it has {size:,} bytes of at least {end:,}"
            )


def _files(path: str) -> list[str]:
    import tifffile

    names = (str(p) for p in Path(path).iterdir() if p.suffix.lower() in SUFFIXES)
    return list(tifffile.natural_sorted(names))


def _find_folder(path: str) -> Found:
    kinds: dict[tuple[Any, ...], str] = {}
    decodings = set()
    for name in (files := _files(path)):
        pages, told = _open_file(name)
        kinds.setdefault((told.axes, pages.shape, str(pages.dtype)), name)
        decodings.add(pages.decoding)
    if len(kinds) > 1:
        (one, a), (other, b) = list(kinds.items())[:2]
        raise VolumeError(f"sections of {path} differ: {a} is {one}, {b} is {other}")
    axes, shape, _ = next(iter(kinds))
    if axes != "YX":
        raise VolumeError(
            f"the files in {path} have axes {axes} and shape {shape}: wanted is one grey section "
            "each"
        )
    largest = max(decodings, key=lambda d: math.prod(d.chunks or ()) if d.chunks else 0)
    chunks = None if largest.chunks is None else (1, *largest.chunks)
    decoding = replace(largest, chunks=chunks)
    opened = partial(_open_folder, path, tuple(files))
    return Found(Stored.of(opened, decoding=decoding), "zyx", path)


def _open_folder(path: str, files: tuple[str, ...]) -> Sections:
    return Sections(files, _opened(files[0]))
