"""Volumes on disk, seen as (channel, z, y, x): opened lazily, read box by box.

`open_volume` finds out what a path or URL holds: Zarr v2 or v3, OME-Zarr 0.4 or 0.5 with its
levels, TIFF stacks (one file, or a folder of them), HDF5 datasets, `.npy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import RunError, VolumeError
from znni_dask.geometry import Box, Size, ceil_divide, round_up, triple, volume
from znni_dask.normalization import Statistics
from znni_dask.patches import source_box, source_index
from znni_dask.storage import opening
from znni_dask.storage.cells import Cells
from znni_dask.storage.patience import Patience, is_passing
from znni_dask.storage.stored import Stored, Three, Units, reason, unreadable

Values = NDArray[np.generic]
_PATIENCE = Patience(is_passing)  # of this process, whichever volume it is
_PROBED = 10_000  # chunks tried to find the one that is damaged


@dataclass(frozen=True, eq=False)
class Volume:
    """An array on disk with the meaning of its axes.

    ``axes`` names the stored array's axes, letters of ``tczyx``. ``scale`` and ``translation``
    are of voxel centres, (z, y, x), in ``units``. ``level`` is the path of the dataset taken of a
    multiscale image. ``chosen`` are the stored channels that count, in that order; None for all.
    With ``statistics`` the values that `read_extended` gives are normalised.
    """

    array: Stored
    axes: str
    path: str
    scale: Three = (1.0, 1.0, 1.0)
    translation: Three = (0.0, 0.0, 0.0)
    units: Units = (None, None, None)
    level: str | None = None
    chosen: tuple[int, ...] | None = None
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.array.shape, self.array.dtype
        if len(self.axes) != len(shape) or set(self.axes) - set("tczyx"):
            raise VolumeError(
                f"{self.path}: an array of shape {shape} with axes {self.axes!r}: wanted are "
                "two to five axes out of t, c, z, y, x: name each of its axes (axes, --axes)"
            )
        if not {"y", "x"} <= set(self.axes) or len(set(self.axes)) != len(self.axes):
            raise VolumeError(
                f"{self.path}: axes {self.axes!r} of an array of shape {shape} do not name y and "
                "x, and no axis twice: say what they mean (axes, --axes)"
            )
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

    @property
    def chunks(self) -> Size | None:
        """Voxels (z, y, x) that are stored together; None where that is no grid."""
        grid = self.array.decoding.chunks
        if grid is None:
            return None
        return triple(grid[self.axes.index(a)] if a in self.axes else 1 for a in "zyx")

    @property
    def cells(self) -> Cells | None:
        """The cells in which chunks are kept that were decoded; None where there are no chunks."""
        if self.chunks is None:
            return None
        return Cells.of(self.chunks, self.size, self.channels * self.dtype.itemsize)

    def decoded_box(self, box: Box) -> Box:
        """The voxels that are decoded where a box is read: those of whole chunks."""
        if self.chunks is None:
            return box
        start = (a // c * c for a, c in zip(box.start, self.chunks, strict=True))
        stop = (round_up(b, c) for b, c in zip(box.stop, self.chunks, strict=True))
        return Box(triple(start), triple(stop)).clipped(self.size)

    def read(self, box: Box, time: int = 0) -> Values:
        """The values within ``box`` at one time point, (channel, z, y, x), in the stored type; an
        array of the caller's own."""
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
        try:
            values = _PATIENCE(lambda: self._taken(box, time, channels))
        except unreadable() as error:
            where, cause = self._damaged(box, time, channels, error)
            notes = "".join(f" ({note})" for note in getattr(cause, "__notes__", ()))
            raise RunError(
                f"cannot read z, y, x = {where} of {self.path}: {reason(cause)}{notes}"
            ) from error
        kept = [a for a in self.axes if a != "t"]
        order = [kept.index(a) for a in "czyx" if a in kept]
        absent = [i for i, a in enumerate("czyx") if a not in kept]
        return np.expand_dims(values.transpose(order), absent)

    def _taken(self, box: Box, time: int, channels: slice) -> Values:
        window: dict[str, slice | int] = dict(zip("zyx", box.slices, strict=True))
        window |= {"c": channels, "t": time}
        return np.asarray(self.array[tuple(window[a] for a in self.axes)])

    def _damaged(
        self, box: Box, time: int, channels: slice, error: Exception
    ) -> tuple[Box, Exception]:
        """The first chunk of a box that cannot be read, and why; the box where that is unclear."""
        if self.chunks is None:
            return box, error
        ranges = [
            range(a // c * c, b, c)
            for a, b, c in zip(box.start, box.stop, self.chunks, strict=True)
        ]
        for _, corner in zip(range(_PROBED), product(*ranges), strict=False):
            stop = (a + c for a, c in zip(corner, self.chunks, strict=True))
            chunk = Box(triple(corner), triple(stop)).clipped(self.size)
            try:
                self._taken(chunk, time, channels)
            except unreadable() as found:
                return chunk, found
        return box, error

    def read_extended(
        self,
        box: Box,
        boundary: str,
        nan: float | None = None,
        time: int = 0,
        read: Callable[[Box, int], Values] | None = None,
    ) -> Values:
        """The values within ``box``, which may reach beyond the volume: there it is extended.

        NaN and infinity are replaced by ``nan``; without it they raise `RunError` with a place.
        Where there are `statistics`, what is extended is the normalised volume, in float32.
        ``read`` is what reads the volume in the place of its own `read`.
        """
        stored = source_box(box, self.size, boundary)
        if stored is None:  # all of it is the constant
            return np.zeros((self.channels, *box.size), self.dtype)
        values = self._finite((read or self.read)(stored, time), stored, nan)
        if self.statistics is not None:
            values = self.statistics.applied(values, time)
        spans = zip(box.start, box.stop, self.size, stored.start, strict=True)
        for axis, (start, stop, n, first) in enumerate(spans, start=1):
            index = np.asarray(source_index(start, stop, n, boundary), np.intp)
            if index.size == values.shape[axis] and np.array_equal(
                index, np.arange(first, first + index.size)
            ):
                continue
            values = np.take(values, np.maximum(index - first, 0), axis=axis)
            outside = np.moveaxis(values, axis, 0)
            outside[index < 0] = 0
        return values

    def read_bytes(self, size: Size, by_cells: bool = False) -> int:
        """Memory that `read_extended` takes at most for a box of ``size``, its result included.

        An extended box is copied once more, and so is what becomes float32; floats take a byte
        each for finding NaN. What decodes holds some chunks beside the result. ``by_cells`` that
        are kept, a group of them is decoded at a time: it is held as it was read and as it was
        taken from those kept, and one cell of it is copied.
        """
        result = 2 * self.channels * max(self.dtype.itemsize, 4) * volume(size)
        if by_cells and (cells := self.cells):
            chunks = cells.fetched * cells.chunks_each * self._channel_chunks
            group = (2 * cells.fetched + 1) * cells.bytes
            return result + group + self.array.chunks_bytes(chunks)
        lengths = dict(zip("zyx", size, strict=True)) | {"c": self.channels, "t": 1}
        return result + self.array.decoding_bytes([lengths[a] for a in self.axes])

    @property
    def _channel_chunks(self) -> int:
        """The chunks along the channels that a read touches at most."""
        grid = self.array.decoding.chunks
        if grid is None or "c" not in self.axes:
            return 1
        chunk = grid[self.axes.index("c")]
        return min(ceil_divide(self.channels, chunk) + 1, ceil_divide(self._length("c"), chunk))

    def _length(self, axis: str) -> int:
        return self.array.shape[self.axes.index(axis)] if axis in self.axes else 1

    def _finite(self, values: Values, box: Box, nan: float | None) -> Values:
        """Floats as float32, which is what networks compute in; all of them finite."""
        if self.dtype.kind != "f":
            return values
        with np.errstate(over="ignore"):
            floats = values.astype(np.float32, copy=False)
        bad = np.isfinite(floats)
        np.logical_not(bad, out=bad)
        if not bad.any():
            return floats
        if nan is None:
            c, *place = (int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            at = [a + b for a, b in zip(box.start, place, strict=True)]
            raise RunError(
                f"the volume holds {values[c, place[0], place[1], place[2]]} at z, y, x = {at} "
                f"(channel {c}) and {int(bad.sum())} such values in this block, which are no "
                "finite float32: replace them with --nan VALUE"
            )
        floats[bad] = nan  # in place: what was read belongs to nobody else
        return floats


def open_volume(
    path: str | Path,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    level: int | str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Volume:
    """Open what lies at ``path``, a path or URL; raises `VolumeError` where it is no volume.

    ``axes`` says what the array's axes mean (letters of "tczyx"), whatever the file says;
    ``channels`` which of its channels count; ``level`` which dataset of a multiscale image, by
    index or path; ``storage_options`` what fsspec is told of a URL.
    """
    if not isinstance(path, str | Path):
        raise VolumeError(f"a volume is given by its path, not as {type(path).__name__}")
    chosen = None if channels is None else tuple(int(c) for c in channels)
    if chosen is not None and not chosen:
        raise VolumeError("no channels are chosen: name at least one")
    found = opening.find(path, level, storage_options)
    shape = found.array.shape
    if axes is not None and len(axes) != len(shape):
        raise VolumeError(
            f"axes {axes!r} for {found.path}, an array of shape {shape}: name each of its axes "
            "once, with letters of t, c, z, y, x"
        )
    opened = Volume(
        found.array,
        axes or found.axes,
        found.path,
        found.scale,
        found.translation,
        found.units,
        found.level,
        chosen,
    )
    try:
        opened.read(Box((0, 0, 0), (1, 1, 1)))  # whether its values can be decoded at all
    except RunError as error:
        raise VolumeError(str(error)) from error
    return opened
