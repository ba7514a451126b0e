"""OME-Zarr output: arrays made once, written block by block, each block whole chunks.

It lies in a folder, or behind the URL of an object store, where credentials are those of the
environment of every process that writes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from znni_dask.errors import OptionError, OutputError, RunError, is_full
from znni_dask.geometry import Box, Size, round_up, text, triple, volume
from znni_dask.storage import ngff
from znni_dask.storage.clouds import refusals
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.forced import ForcedStore
from znni_dask.storage.levels import Level, levels
from znni_dask.storage.patience import Patience, is_passing
from znni_dask.storage.stored import Three, Units, reason, refused
from znni_dask.storage.urls import Location, Url, is_url, local_path, location, without_secrets

T = TypeVar("T")
ENCODED_AT_ONCE = 10  # zarr's default `async.concurrency`
_MOST_OF_LAST_LEVEL = 256**3
_BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}  # every reader of Zarr 2 has it

_METADATA = ("zarr.json", ".zgroup", ".zarray")  # one of them is at the root of every store
_LAST = frozenset({*_METADATA, ".zattrs"})  # at the root: taken away last

_PATIENCE = Patience()  # of this process, whichever folder it is that refuses
_PATIENCE_ELSEWHERE = Patience(is_passing)  # whichever object store: it says what is for good


@dataclass(frozen=True)
class OutputLayout:
    """How an output of so many ``channels`` is stored: type, levels, chunks and shards (z, y, x),
    in which ``version`` of OME-Zarr."""

    encoding: Encoding
    channels: int
    levels: tuple[Level, ...]
    chunks: Size
    shards: Size | None = None
    times: int = 1
    version: str = ngff.VERSIONS[-1]

    @property
    def size(self) -> Size:
        """Voxels of the first level."""
        return self.levels[0].size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""
        return self.encoding.stored_dtype(self.channels)

    @property
    def axes(self) -> str:
        """The stored axes: times and channels only where there are several."""
        channels = self.encoding.stored_channels(self.channels)
        return ("t" if self.times > 1 else "") + ("c" if channels > 1 else "") + "zyx"

    @property
    def lead(self) -> tuple[int, ...]:
        """Lengths of the axes before those of space."""
        lengths = {"t": self.times, "c": self.encoding.stored_channels(self.channels)}
        return tuple(lengths[a] for a in self.axes[:-3])

    def chunks_of(self, level: Level) -> Size:
        """Chunks of a level: clipped to it, but within shards."""
        if self.shards:
            return self.chunks
        return triple(min(c, n) for c, n in zip(self.chunks, level.size, strict=True))

    @property
    def unit(self) -> Size:
        """What one writer must write whole: a shard, else a chunk."""
        return self.shards or self.chunks

    @property
    def write_bytes(self) -> int:
        """Memory that writing takes at most beside the values: chunks copied and compressed."""
        return 2 * ENCODED_AT_ONCE * volume(self.unit) * self.dtype.itemsize


def output_layout(
    encoding: Encoding,
    channels: int,
    size: Size,
    chunks: Size,
    shards: Size | None = None,
    *,
    times: int = 1,
    version: str = ngff.VERSIONS[-1],
    spacing: Three | None = None,
) -> OutputLayout:
    """Chunks are clipped to the output; where the ``spacing`` of voxels is given, it has coarser
    levels until one has no more voxels than a chunk (or than 256³). Raises `OptionError` on
    contradictions."""
    if min(chunks) < 1:
        raise OptionError(f"chunks {text(chunks)} must be positive")
    if version not in ngff.VERSIONS:
        raise OptionError(f"OME-Zarr {version!r} is not known: choose {', '.join(ngff.VERSIONS)}")
    if shards is None:
        chunks = triple(min(c, n) for c, n in zip(chunks, size, strict=True))
    elif any(s % c or s < 1 for s, c in zip(shards, chunks, strict=True)):
        raise OptionError(f"shards {text(shards)} are not whole numbers of chunks {text(chunks)}")
    elif version == "0.4":
        raise OptionError(
            "OME-Zarr 0.4 knows no shards: choose larger chunks instead, or OME-Zarr 0.5"
        )
    made = levels(size, spacing, min(volume(chunks), _MOST_OF_LAST_LEVEL)) if spacing else None
    return OutputLayout(encoding, channels, made or (Level(size),), chunks, shards, times, version)


def check_place(
    asked: str | Location, sources: Sequence[str | Path], overwrite: bool, begun: bool = False
) -> Location:
    """Where the output goes, of a run that reads ``sources``; raises `OutputError` where it must
    not go there. What is there may be replaced with ``overwrite``, or completed where it was
    ``begun``."""
    place = location(asked).resolve()
    for source in sources:
        shown, found = without_secrets(str(source)), _source(source)
        if place == found or found in place.parents:
            raise OutputError(
                f"the output {asked} is, or lies in, the input {shown}: choose another place"
            )
        if place in found.parents:
            raise OutputError(f"the input {shown} lies in the output {asked}: choose another place")
    with refused("write", asked):
        if place.exists():
            _check_replaced(place, asked, overwrite, begun)
        elif isinstance(place, Url) and not place.has_bucket():
            raise OutputError(f"the output {asked} cannot be made: there is no such bucket")
    if isinstance(place, Path):
        existing = next(parent for parent in place.parents if parent.exists())
        if not existing.is_dir():
            raise OutputError(f"the output {asked} cannot be made: {existing} is a file")
    return place


def _source(source: str | Path) -> Location:
    """Where an input lies."""
    return Url(str(source).rstrip("/")) if is_url(source) else local_path(source).resolve()


def _check_replaced(place: Location, asked: str | Location, overwrite: bool, begun: bool) -> None:
    """Raise `OutputError` where what is there must stay."""
    if not overwrite and not begun:
        raise OutputError(f"the output {asked} exists: choose another place, or overwrite it")
    if not any((place / name).exists() for name in _METADATA):
        raise OutputError(f"{asked} is not a Zarr store: it will not be overwritten; move it away")
    if overwrite and isinstance(place, Url) and description(place) is None:
        raise OutputError(
            f"{asked} was not made by znni infer: in object stores nothing else is overwritten; "
            "move it away"
        )


def clear(place: Location) -> None:
    """Take away the store that is to be replaced, if there is one: first what makes it look
    complete, so that this can be begun again."""
    if isinstance(place, Url):
        with refused("replace", place):
            _clear_below(place)
        return
    try:
        if place.exists():
            _clear_folder(place)
    except OSError as error:
        raise OutputError(f"cannot replace {place}: {error}") from None


def _clear_folder(place: Path) -> None:
    """Last goes what tells that it is a store."""
    for name in _METADATA:
        for found in (*place.glob(f"*/{name}"), *place.glob(f"*/*/{name}")):
            found.unlink()
    for part in place.iterdir():
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        elif part.name not in _LAST:
            part.unlink()
    shutil.rmtree(place)


def _clear_below(place: Url) -> None:
    """The same of objects."""
    names = _PATIENCE_ELSEWHERE(place.below)
    first = {name for name in names if name.rpartition("/")[2] in _LAST} - _LAST
    for some in (first, {*names} - first - _LAST, _LAST.intersection(names)):
        _PATIENCE_ELSEWHERE(partial(place.remove, sorted(some)))


@dataclass(frozen=True, eq=False)
class Image:
    """An output that is stored: an array for every level, of ``axes`` out of t, c, z, y, x;
    ``place`` is where."""

    arrays: tuple[zarr.Array[Any], ...]
    axes: str
    place: Location = Path()

    def read(self, level: int, box: Box, time: int, channel: int) -> NDArray[np.generic]:
        """The values (z, y, x) of one channel within ``box``."""
        index = self._index(box, time, channel)
        return _asked_again(self.place, lambda: np.asarray(self.arrays[level][index]))

    def write(
        self,
        box: Box,
        values: NDArray[np.generic],
        time: int = 0,
        *,
        level: int = 0,
        channel: int | None = None,
    ) -> None:
        """Write ``values`` (channel, z, y, x), or (z, y, x) of one channel, to ``box``, which must
        be whole chunks or shards. Raises `RunError` where the store refuses them for a minute, or
        for good, and what it says where it is full."""
        array = self.arrays[level]
        unit = (array.shards or array.chunks)[-3:]
        size = array.shape[-3:]
        for start, stop, u, n in zip(box.start, box.stop, unit, size, strict=True):
            if start % u or stop != min(round_up(stop, u), n):
                raise ValueError(f"box {box} is not a whole number of chunks or shards {unit}")
        if channel is None and "c" not in self.axes:
            values = values[0]
        index = self._index(box, time, channel)
        try:
            _patience(self.place)(lambda: array.__setitem__(index, values))
        except refusals() as error:
            if is_full(error):
                raise
            raise RunError(f"it cannot be written: {reason(error, 'write')}") from error

    def _index(self, box: Box, time: int, channel: int | None) -> tuple[slice | int, ...]:
        places: dict[str, slice | int] = dict(zip("zyx", box.slices, strict=True))
        places |= {"t": time, "c": slice(None) if channel is None else channel}
        return tuple(places[axis] for axis in self.axes)


def create(
    place: Location,
    layout: OutputLayout,
    *,
    scale: Three,
    translation: Three,
    units: Units,
    attributes: Mapping[str, Any],
) -> Image:
    """Make an image at ``place``; what was there is replaced."""
    told = ngff.image_attributes(
        layout.version,
        place.stem,
        layout.axes,
        [(m.scaled(scale), m.moved(scale, translation)) for m in layout.levels],
        units,
        labels=layout.encoding.labels,
    )

    def made() -> tuple[zarr.Array[Any], ...]:
        group = zarr.create_group(
            _store(place),
            zarr_format=ngff.ZARR_FORMAT[layout.version],
            overwrite=True,
            attributes={**told, **attributes},
        )
        return tuple(
            group.create_array(str(number), **_form(layout, level))
            for number, level in enumerate(layout.levels)
        )

    with refused("write", place):
        try:
            return Image(_asked_again(place, made), layout.axes, place)
        except ValueError as error:  # what zarr itself raises
            raise OutputError(f"cannot write {place}: {error}") from None


def _store(place: Location) -> ForcedStore | str:
    """What zarr is told of a place that is written."""
    return ForcedStore.at(place) if isinstance(place, Path) else str(place)


def _there(place: Location) -> ForcedStore | str:
    """The same of one that must be there: who opens a store to write it makes its folder."""
    if isinstance(place, Path) and not place.exists():
        raise FileNotFoundError(place)
    return _store(place)


def _patience(place: Location) -> Patience:
    """With which a place is asked again to take what is written."""
    return _PATIENCE_ELSEWHERE if isinstance(place, Url) else _PATIENCE


def _asked_again(place: Location, do: Callable[[], T]) -> T:
    """What an object store gives, if it refuses for a while; of a folder at once."""
    return _PATIENCE_ELSEWHERE(do) if isinstance(place, Url) else do()


def _form(layout: OutputLayout, level: Level) -> dict[str, Any]:
    """What zarr is told of the array of a level."""
    one = (1,) * len(layout.lead)
    form = {
        "shape": layout.lead + level.size,
        "chunks": one + layout.chunks_of(level),
        "shards": one + layout.shards if layout.shards else None,
        "dtype": layout.dtype,
        "fill_value": 0,
    }
    if layout.version == "0.4":
        return form | {
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
            "compressors": _BLOSC,
            "attributes": {"_ARRAY_DIMENSIONS": list(layout.axes)},  # as xarray names them
        }
    return form | {"dimension_names": list(layout.axes)}


def existing(place: Location, layout: OutputLayout) -> Image | None:
    """An image that was made before; None where it is missing or of another form. Raises
    `OutputError` where an object store does not tell."""
    arrays: list[zarr.Array[Any]] = []
    for number, level in enumerate(layout.levels):
        array = _found(place, partial(_written_array, place / str(number)))
        asked = _form(layout, level)
        if (
            array is None
            or array.metadata.zarr_format != ngff.ZARR_FORMAT[layout.version]
            or any(
                getattr(array, key) != asked[key] for key in ("shape", "chunks", "shards", "dtype")
            )
        ):
            return None
        arrays.append(array)
    return Image(tuple(arrays), layout.axes, place)


def _written_array(place: Location) -> zarr.Array[Any]:
    """An array that is there, to be written."""
    return zarr.open_array(_there(place), mode="r+")


def description(place: Location) -> dict[str, Any] | None:
    """What an image's metadata tell of how it was made; None where there is none."""
    group = _found(place, partial(zarr.open_group, str(place), mode="r"))
    told = None if group is None else group.attrs.get("znni")
    return dict(told) if isinstance(told, Mapping) else None


def _found(place: Location, opened: Callable[[], T]) -> T | None:
    """What is there; None where it is missing, or damaged."""
    try:
        return _asked_again(place, opened)
    except (FileNotFoundError, ValueError, KeyError):
        return None
    except refusals() as error:
        if isinstance(place, Path):
            return None
        raise OutputError(f"cannot read {place}: {reason(error)}") from None


def note(place: Location, found: Mapping[str, Any]) -> None:
    """Add to an image's metadata; what was there by these names is replaced. Raises `RunError`
    where the store refuses it."""

    def noted() -> None:
        zarr.open_group(_there(place), mode="r+").attrs.update(found)

    try:
        _patience(place)(noted)
    except refusals() as error:
        raise RunError(
            f"the metadata of {place} cannot be written: {reason(error, 'write')}. All blocks are: "
            "the same command ends the run"
        ) from error


def group_names(outputs: Sequence[str]) -> dict[str, str]:
    """The group of every output: its name, what paths cannot hold replaced. No two are alike,
    whatever the case of letters, and none is that of zarr's own files."""
    taken, found = {"zarr.json"}, dict[str, str]()
    for output in outputs:
        plain = re.sub(r"[^\w.+-]+", "_", output).strip("._") or "output"
        name, number = plain, 2
        while name.lower() in taken:
            name, number = f"{plain}_{number}", number + 1
        taken.add(name.lower())
        found[output] = name
    return found


def create_root(place: Location, outputs: Sequence[str], version: str) -> None:
    """Make the group that holds an image for each of several outputs."""
    attributes = {"znni": {"outputs": [*outputs]}}

    def made() -> None:
        if description(place) is None:
            zarr.create_group(
                _store(place), zarr_format=ngff.ZARR_FORMAT[version], attributes=attributes
            )

    with refused("write", place):
        _asked_again(place, made)
