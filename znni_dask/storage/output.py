"""OME-Zarr output: an array made once, written block by block, each block whole chunks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray

from znni_dask.errors import OptionError, OutputError
from znni_dask.geometry import Box, Size, round_up, text, triple, volume
from znni_dask.storage import ngff

_ENCODED_AT_ONCE = 10  # zarr's default `async.concurrency`


@dataclass(frozen=True)
class OutputLayout:
    """Shape, chunks and type of an output: ``size``, ``chunks`` and ``shards`` in (z, y, x)."""

    channels: int
    size: Size
    chunks: Size
    shards: Size | None
    times: int = 1
    dtype: str = "float32"

    @property
    def axes(self) -> str:
        """The stored axes: times and channels only where there are several."""
        return ("t" if self.times > 1 else "") + ("c" if self.channels > 1 else "") + "zyx"

    @property
    def lead(self) -> tuple[int, ...]:
        """Lengths of the axes before those of space."""
        return tuple(n for n in (self.times, self.channels) if n > 1)

    @property
    def unit(self) -> Size:
        """What one writer must write whole: a shard, else a chunk."""
        return self.shards or self.chunks

    @property
    def write_bytes(self) -> int:
        """Memory that writing takes at most beside the values: chunks copied and compressed."""
        return 2 * _ENCODED_AT_ONCE * volume(self.unit) * np.dtype(self.dtype).itemsize


def output_layout(
    channels: int,
    size: Size,
    chunks: Size | None,
    shards: Size | None,
    times: int = 1,
    default: Size = (64, 64, 64),
    dtype: str = "float32",
) -> OutputLayout:
    """Chunks of ``default`` unless given, clipped to the output; raises `OptionError` on
    contradictions."""
    wanted = chunks or default
    if min(wanted) < 1:
        raise OptionError(f"chunks {text(wanted)} must be positive")
    if shards is not None:
        if any(s % c or s < 1 for s, c in zip(shards, wanted, strict=True)):
            raise OptionError(
                f"shards {text(shards)} are not whole numbers of chunks {text(wanted)}"
            )
        return OutputLayout(channels, size, wanted, shards, times, dtype)
    clipped = triple(min(c, n) for c, n in zip(wanted, size, strict=True))
    return OutputLayout(channels, size, clipped, None, times, dtype)


def check_place(
    path: str | Path, sources: Sequence[str | Path], overwrite: bool, begun: bool = False
) -> Path:
    """Where the output goes, of a run that reads ``sources``; raises `OutputError` where it must
    not go there. What is there may be replaced with ``overwrite``, or completed where it was
    ``begun``."""
    if "://" in str(path):
        raise OutputError(f"{path}: only local paths can be written")
    place = Path(path).resolve()
    for source in sources:
        found = Path(source).resolve()
        if place == found or found in place.parents:
            raise OutputError(
                f"the output {path} is, or lies in, the input {source}: choose another place"
            )
        if place in found.parents:
            raise OutputError(f"the input {source} lies in the output {path}: choose another place")
    if place.exists():
        if not overwrite and not begun:
            raise OutputError(f"the output {path} exists: choose another place, or overwrite it")
        if not any((place / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
            raise OutputError(
                f"{path} is not a Zarr store: it will not be overwritten; move it away"
            )
    existing = next(parent for parent in place.parents if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"the output {path} cannot be made: {existing} is a file")
    return place


def clear(place: Path) -> None:
    """Take away the store that is to be replaced, if there is one."""
    try:
        if place.exists():
            shutil.rmtree(place)
    except OSError as error:
        raise OutputError(f"cannot replace {place}: {error}") from None


def create(
    place: Path,
    layout: OutputLayout,
    *,
    scale: ngff.Three,
    translation: ngff.Three,
    units: tuple[str | None, str | None, str | None],
    attributes: Mapping[str, Any],
) -> zarr.Array[Any]:
    """Make an image at ``place`` and return its array ``0``. An image of that form that is there
    already, of a run that is resumed, stays as it is."""
    if (found := existing(place, layout)) is not None:
        return found
    one = (1,) * len(layout.lead)
    try:
        group = zarr.create_group(
            str(place),
            zarr_format=3,
            overwrite=True,
            attributes={
                "ome": ngff.multiscales(place.stem, layout.axes, scale, translation, units),
                **attributes,
            },
        )
        return group.create_array(
            "0",
            shape=layout.lead + layout.size,
            chunks=one + layout.chunks,
            shards=one + layout.shards if layout.shards else None,
            dtype=layout.dtype,
            dimension_names=list(layout.axes),
        )
    except (OSError, ValueError) as error:  # what zarr itself raises is a ValueError
        raise OutputError(f"cannot write {place}: {error}") from None


def existing(place: Path, layout: OutputLayout) -> zarr.Array[Any] | None:
    """The array of an image that was made before; None where it is missing or of another form."""
    try:
        array = zarr.open_array(str(place / "0"), mode="r+")
    except (OSError, ValueError, KeyError):
        return None
    one = (1,) * len(layout.lead)
    found = (array.shape, array.dtype, array.chunks, array.shards)
    asked = (
        layout.lead + layout.size,
        np.dtype(layout.dtype),
        one + layout.chunks,
        one + layout.shards if layout.shards else None,
    )
    return array if found == asked else None


def description(place: Path) -> dict[str, Any] | None:
    """What an image's metadata tell of how it was made; None where there is none."""
    try:
        told = zarr.open_group(str(place), mode="r").attrs.get("znni")
    except (OSError, ValueError, KeyError):
        return None
    return dict(told) if isinstance(told, Mapping) else None


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


def create_root(place: Path, outputs: Sequence[str]) -> None:
    """Make the group that holds an image for each of several outputs."""
    attributes = {"znni": {"outputs": [*outputs]}}
    try:
        if not (place / "zarr.json").exists():
            zarr.create_group(str(place), zarr_format=3, attributes=attributes)
    except OSError as error:
        raise OutputError(f"cannot write {place}: {error}") from None


def write(array: zarr.Array[Any], box: Box, values: NDArray[np.generic], time: int = 0) -> None:
    """Write ``values`` (channel, z, y, x) at one time point to ``box``, which must be whole
    chunks or shards."""
    unit = (array.shards or array.chunks)[-3:]
    size = array.shape[-3:]
    for start, stop, u, n in zip(box.start, box.stop, unit, size, strict=True):
        if start % u or stop != min(round_up(stop, u), n):
            raise ValueError(f"box {box} is not a whole number of chunks or shards {unit}")
    names = cast("Any", array.metadata).dimension_names or ()
    lead: tuple[slice | int, ...] = ((time,) if "t" in names else ()) + (
        (slice(None),) if "c" in names else ()
    )
    array[(*lead, *box.slices)] = values if "c" in names else values[0]
