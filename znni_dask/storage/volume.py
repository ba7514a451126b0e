"""Volumes on disk, seen as (channel, z, y, x): opened lazily, read box by box.

`open_volume` finds out what a path holds: Zarr v2 or v3, OME-Zarr 0.4 or 0.5 with its axes, scale
and translation, TIFF stacks (one file, or a folder of them), `.npy`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import RunError, VolumeError
from znni_dask.geometry import Box, Size, ceil_divide, triple, volume
from znni_dask.patches import source_index
from znni_dask.storage import ngff
from znni_dask.storage.tiff import SUFFIXES, TiffStack

Values = NDArray[np.generic]
_DECODED_AT_ONCE = 10  # zarr's default `async.concurrency`
# what zarr, tifffile and numpy raise on damaged files
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    RuntimeError,
    struct.error,
)


class Stored(Protocol):
    """What a `Volume` needs of an array: zarr arrays, memory maps and numpy arrays have it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def __getitem__(self, index: tuple[slice | int, ...], /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Volume:
    """An array on disk with the meaning of its axes.

    ``axes`` names the stored array's axes, letters of ``tczyx``. ``scale`` and ``translation``
    are of voxel centres, (z, y, x), in ``units``. ``chosen`` are the stored channels that count,
    in that order; None for all.
    """

    array: Stored
    axes: str
    path: str
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    units: tuple[str | None, str | None, str | None] = (None, None, None)
    chunks: Size | None = None
    chosen: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.array.shape, self.array.dtype
        if len(self.axes) != len(shape) or set(self.axes) - set("tczyx"):
            raise VolumeError(
                f"{self.path}: an array of shape {shape} with axes {self.axes!r}: wanted are "
                "two to five axes out of t, c, z, y, x"
            )
        if not {"y", "x"} <= set(self.axes) or len(set(self.axes)) != len(self.axes):
            raise VolumeError(f"{self.path}: axes {self.axes!r} do not name y and x once each")
        if dtype.kind not in "buif":
            raise VolumeError(
                f"{self.path} holds values of type {dtype}: a network takes real numbers "
                "(integers or floats); convert the volume first"
            )
        if 0 in shape:
            raise VolumeError(f"{self.path} is empty: its shape is {shape}")
        stored = self._length("c")
        if self.chosen is not None and not all(0 <= c < stored for c in self.chosen):
            raise VolumeError(
                f"{self.path} has {stored} channels, counted from 0 (axes {self.axes}, shape "
                f"{tuple(shape)}): channels {', '.join(map(str, self.chosen))} are not all there"
            )

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self._length("c") if self.chosen is None else len(self.chosen)

    @property
    def times(self) -> int:
        """Number of time points; each is a volume of its own."""
        return self._length("t")

    @property
    def size(self) -> Size:
        """Voxels along (z, y, x)."""
        return triple(self._length(axis) for axis in "zyx")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""
        return self.array.dtype

    def read(self, box: Box, time: int = 0) -> Values:
        """The values within ``box`` at one time point, (channel, z, y, x), in the stored type."""
        if not box.within(self.size) or not 0 <= time < self.times:
            raise ValueError(
                f"box {box} at time {time} reaches out of a volume of size {self.size} at "
                f"{self.times} times"
            )
        chosen = self.chosen
        if chosen is None or "c" not in self.axes:
            return self._read(box, time, slice(None))
        first = chosen[0]
        if chosen == tuple(range(first, first + len(chosen))):
            return self._read(box, time, slice(first, first + len(chosen)))
        values = np.empty((len(chosen), *box.size), self.dtype)
        for place, channel in enumerate(chosen):
            values[place] = self._read(box, time, slice(channel, channel + 1))[0]
        return values

    def _read(self, box: Box, time: int, channels: slice) -> Values:
        window: dict[str, slice | int] = dict(zip("zyx", box.slices, strict=True))
        window |= {"c": channels, "t": time}
        try:
            values = np.asarray(self.array[tuple(window[a] for a in self.axes)])
        except _DAMAGED as error:
            raise RunError(
                f"cannot read z, y, x = {box} of {self.path}: {type(error).__name__}: {error}"
            ) from error
        kept = [a for a in self.axes if a != "t"]
        order = [kept.index(a) for a in "czyx" if a in kept]
        absent = [i for i, a in enumerate("czyx") if a not in kept]
        return np.expand_dims(values.transpose(order), absent)

    def read_extended(
        self, box: Box, boundary: str, nan: float | None = None, time: int = 0
    ) -> Values:
        """The values within ``box``, which may reach beyond the volume: there it is extended.

        NaN and infinity are replaced by ``nan``; without it they raise `RunError` with a place.
        """
        places = [
            np.asarray(source_index(a, b, n, boundary), np.intp)
            for a, b, n in zip(box.start, box.stop, self.size, strict=True)
        ]
        inside = [p[p >= 0] for p in places]
        if any(p.size == 0 for p in inside):  # all of it is the constant
            return np.zeros((self.channels, *box.size), self.dtype)
        stored = Box(triple(int(p.min()) for p in inside), triple(int(p.max()) + 1 for p in inside))
        values = self._finite(self.read(stored, time), stored, nan)
        for axis, (index, first) in enumerate(zip(places, stored.start, strict=True), start=1):
            if index.size == values.shape[axis] and np.array_equal(
                index, np.arange(first, first + index.size)
            ):
                continue
            values = np.take(values, np.maximum(index - first, 0), axis=axis)
            outside = np.moveaxis(values, axis, 0)
            outside[index < 0] = 0
        return values

    def read_bytes(self, size: Size) -> int:
        """Memory that `read_extended` takes at most for a box of ``size``, its result included.

        An extended box is copied once more, and so are floats other than float32; zarr holds
        some decoded chunks beside the result.
        """
        item = self.channels * self.dtype.itemsize
        result = max(item, 4 * self.channels) * volume(size)
        chunk = volume(self.chunks or (1, 1, 1))
        touched = 1
        for n, c in zip(size, self.chunks or (1, 1, 1), strict=True):
            touched *= ceil_divide(n, c) + 1
        decoding = item * chunk * min(touched, _DECODED_AT_ONCE) if self.chunks else 0
        return 2 * result + 2 * decoding

    def _length(self, axis: str) -> int:
        return self.array.shape[self.axes.index(axis)] if axis in self.axes else 1

    def _finite(self, values: Values, box: Box, nan: float | None) -> Values:
        """Floats as float32, which is what networks compute in; all of them finite."""
        if self.dtype.kind != "f":
            return values
        with np.errstate(over="ignore"):
            floats = values.astype(np.float32, copy=False)
        bad = ~np.isfinite(floats)
        if not bad.any():
            return floats
        if nan is None:
            c, *place = (int(i[0]) for i in np.nonzero(bad))
            at = [a + b for a, b in zip(box.start, place, strict=True)]
            raise RunError(
                f"the volume holds {values[c, place[0], place[1], place[2]]} at z, y, x = {at} "
                f"(channel {c}) and {int(bad.sum())} such values in this block, which are no "
                "finite float32: replace them with --nan VALUE"
            )
        if floats is values:
            floats = values.astype(np.float32)
        floats[bad] = nan
        return floats


def open_volume(
    path: str | Path, axes: str | None = None, channels: Sequence[int] | None = None
) -> Volume:
    """Open what lies at ``path``; raises `VolumeError` where it is no volume.

    ``axes`` says what the array's axes mean (letters of "tczyx"), whatever the file says;
    ``channels`` which of its channels count.
    """
    if not isinstance(path, str | Path):
        raise VolumeError(f"a volume is given by its path, not as {type(path).__name__}")
    if "://" in str(path):
        raise VolumeError(f"{path}: only local paths can be read; copy or mount the volume")
    place = Path(path).absolute()  # workers may be elsewhere
    if not place.exists():
        raise VolumeError(f"there is no volume at {place}")
    try:
        found = _opener(place)(place)
        if axes is not None or channels is not None:
            found = _told(found, axes, channels)
        found.read(Box((0, 0, 0), (1, 1, 1)))  # whether its values can be decoded at all
        return found
    except RunError as error:
        raise VolumeError(str(error)) from error
    except _DAMAGED as error:
        raise VolumeError(f"cannot read {place}: {type(error).__name__}: {error}") from error


def _told(found: Volume, axes: str | None, channels: Sequence[int] | None) -> Volume:
    """The volume with what the user says of it."""
    chosen = None if channels is None else tuple(int(c) for c in channels)
    if chosen is not None and not chosen:
        raise VolumeError("no channels are chosen: name at least one")
    if axes is None or axes == found.axes:
        return replace(found, chosen=chosen)
    if len(axes) != len(found.axes):
        raise VolumeError(
            f"axes {axes!r} for {found.path}, an array of shape {tuple(found.array.shape)}: "
            "name each of its axes once, with letters of t, c, z, y, x"
        )
    along = dict(zip(found.axes, axes, strict=True))  # what was called so before
    grid = dict(zip((along.get(a) for a in "zyx"), found.chunks or (1, 1, 1), strict=True))
    return replace(found, axes=axes, chosen=chosen, chunks=triple(grid.get(a, 1) for a in "zyx"))


def _opener(path: Path) -> Callable[[Path], Volume]:
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
            return _open_zarr
        if any(p.suffix.lower() in SUFFIXES for p in path.iterdir()):
            return _open_tiff
        raise VolumeError(f"the folder {path} holds neither a Zarr array nor TIFF files")
    if path.suffix == ".npy":
        return _open_npy
    if path.suffix.lower() in SUFFIXES:
        return _open_tiff
    raise VolumeError(f"{path}: not a kind of volume known (Zarr, OME-Zarr, .tif, .tiff, .npy)")


def _axes(names: list[str] | tuple[str | None, ...] | None, shape: tuple[int, ...]) -> str:
    """Letters for the axes: as named, else the last ones of czyx."""
    letters = [str(name).lower() for name in names or ()]
    if letters and all(letter in "tczyx" for letter in letters):
        return "".join(letters)
    return "tczyx"[-len(shape) :] if 2 <= len(shape) <= 5 else "?"


def _open_zarr(path: Path) -> Volume:
    import zarr

    node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Group):
        level = ngff.first_level(node, str(path))
        array = node[level.path]
        if not isinstance(array, zarr.Array):
            raise VolumeError(f"{path}: {level.path!r} is not an array")
        found = _zarr_volume(array, path, level.axes)
        return replace(found, scale=level.scale, translation=level.translation, units=level.units)
    return _zarr_volume(node, path, None)


def _zarr_volume(array: Any, path: Path, axes: str | None) -> Volume:
    names = axes or _axes(getattr(array.metadata, "dimension_names", None), array.shape)
    grid = dict(zip(names, array.chunks, strict=True)) if len(names) == array.ndim else {}
    chunks = triple(grid.get(a, 1) for a in "zyx")
    return Volume(array, names, str(path), chunks=chunks)


def _open_npy(path: Path) -> Volume:
    array = _NpyFile(str(path))
    return Volume(array, _axes(None, array.shape), str(path))


@dataclass(frozen=True)
class _NpyFile:
    """A `.npy` file, mapped where it is first read: a memory map that travels takes its data
    along."""

    path: str

    @cached_property
    def mapped(self) -> Values:
        """The file as a read-only memory map."""
        mapped: Values = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.mapped.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its values."""
        return self.mapped.dtype

    def __getitem__(self, index: tuple[slice | int, ...]) -> Any:
        return np.array(self.mapped[index])

    def __reduce__(self) -> tuple[type[_NpyFile], tuple[str]]:
        return _NpyFile, (self.path,)


def _open_tiff(path: Path) -> Volume:
    stack = TiffStack(str(path))
    # tifffile's letters for pages, images and other mean z in a stack; samples are channels
    letters = ["z" if a in "IQR" else "c" if a == "S" else a.lower() for a in stack.opened.axes]
    axes = _axes(letters if len(set(letters)) == len(letters) else None, stack.shape)
    chunks = dict(zip(axes, stack.opened.array.chunks, strict=True))
    return Volume(stack, axes, str(path), chunks=triple(chunks.get(a, 1) for a in "zyx"))
