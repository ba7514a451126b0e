"""The dask face: lazy answers to dask arrays, xarray's DataArrays and stored volumes.

Every block of an answer is one task. It is handed the chunks of the source that it needs, halo
included, or reads them itself where the volume is given by its path. Nothing is computed before
the answer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from znni_dask import coordinates, options
from znni_dask.application import Application
from znni_dask.errors import OptionError, VolumeError
from znni_dask.geometry import Size
from znni_dask.graph import Asked, axes_of
from znni_dask.importers import load_network
from znni_dask.network.network import Network
from znni_dask.storage.stored import Stored, axis_letters
from znni_dask.storage.volume import Volume, open_volume

if TYPE_CHECKING:
    import xarray
    from dask.array import Array


def infer(
    volume: Any,
    network: str | Path | Network,
    *,
    outputs: str | Sequence[str] | None = None,
    boundary: str = "reflect",
    chunks: Size | int | None = None,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    level: int | str | None = None,
    nan: float | None = None,
    patchwise: Size | int | None = None,
    overlap: float = 0.5,
    weights: str = "constant",
    step: Size | int | None = None,
    memory: str | float | None = None,
    patch: Size | int | None = None,
    threads: int | None = None,
) -> Any:
    """Apply ``network`` to ``volume`` lazily: the same answer as of `run`, as an array.

    Parameters
    ----------
    volume : a dask array, an `xarray.DataArray` of one, or what `run` takes as a path.
    network : an ONNX or ``.znni`` file, a `Network`, or the name of a paper's network.
    outputs : name of the network's output to compute, or several names; by default all.
    boundary : how the volume goes on beyond its faces: ``"reflect"`` (edge not repeated),
        ``"nearest"``, ``"constant"`` (zero), or ``"valid"`` (not at all: the answer is smaller).
    chunks : of the answer, (z, y, x) or one number; by default a whole number of the source's
        chunks, at least the field of view and 128 voxels.
    axes : what the axes mean, letters of ``"tczyx"``; by default the names of a DataArray's
        dimensions, and of a dask array the last ones of ``"tczyx"``.
    channels : the channels that the network takes, counted from 0.
    level : which resolution of an OME-Zarr image to read, where ``volume`` is a path.
    nan : replaces NaN and infinity; without it computing raises where it meets them.
    patchwise, overlap, weights, step : windows, for networks that reduce over space; see `run`.
    memory : what the process that computes may use, by which patches are planned; by default
        80 % of what this machine has free. What dask itself holds is dask's to bound.
    patch : size (z, y, x), or one number, of the output computed at once; by default as memory
        allows.
    threads : computing threads of a process; by default all cores, on a worker of a cluster as
        many as it has. One block computes at a time.

    Returns
    -------
    The same kind, float32: of a dask array a dask array, of a DataArray or a path a DataArray,
    with the source's axes in their order. There is a channel axis where the source has one, or
    the answer several channels (then before the first axis of space). Where the network has
    several outputs and none is chosen by its name, or where several are, a dict of them.

    Raises
    ------
    InputError at once; `RunError` when blocks are computed that hold NaN or are not as announced.
    """
    options.check_replacement(nan)
    window = options.size("patchwise", patchwise)
    used = load_network(network, window)
    source = opened(volume, axes, channels, level)
    windows = options.windows(window, overlap, weights, options.size("step", step))
    asked = Asked(
        application=Application(used, source.volume, boundary, nan, windows),
        array=source.array,
        chunks=options.size("chunks", chunks),
        patch=options.size("patch", patch),
        memory=memory,
        threads=threads,
    )
    names = [outputs] if isinstance(outputs, str) else outputs
    answers: dict[str, Any] = {}
    for group in asked.application.passes(names):
        answers |= asked.answer(group)
    single = isinstance(outputs, str) or (outputs is None and len(answers) == 1)
    if source.labelled:
        answers = {
            output: source.described(made, asked.application, output, single)
            for output, made in answers.items()
        }
    return next(iter(answers.values())) if single else answers


@dataclass(frozen=True, eq=False)
class Source:
    """What was handed in: as a volume, and the arrays that it is, if any."""

    volume: Volume
    array: Array | None = None
    labels: xarray.DataArray | None = None
    dims: dict[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether the answer is a DataArray."""
        return self.array is None or self.labels is not None

    def described(
        self, made: Array, application: Application, output: str, single: bool
    ) -> xarray.DataArray:
        """The answer of one output with dimensions, coordinates, attributes and a name."""
        import xarray

        laid = application.laid(output)
        axes = axes_of(self.volume.axes, laid.network.out_channels)
        if self.labels is None:
            found = coordinates.of_stored(axes, made.shape, application.placed(output))
            return xarray.DataArray(made, dims=list(axes), coords=found, name=output)
        return xarray.DataArray(
            made,
            dims=[self.dims.get(a, a) for a in axes],
            coords=coordinates.of_answer(self.labels, self.dims, laid),
            attrs=dict(self.labels.attrs),
            name=self.labels.name if single else output,
        )


def opened(
    volume: Any, axes: str | None, channels: Sequence[int] | None, level: int | str | None
) -> Source:
    """What was handed in; raises `VolumeError` where it is nothing that can be computed lazily."""
    import dask.array
    from dask.array.core import Array

    if dask.array.Array is not Array:
        raise OptionError(
            "dask's array.query-planning is on, which forgets annotations and cannot hold the "
            "graphs of lazy answers: set array.query-planning to False (or "
            "DASK_ARRAY__QUERY_PLANNING=False) before dask.array is imported"
        )
    if isinstance(volume, str | Path):
        return Source(open_volume(volume, axes, channels, level))
    if level is not None:
        raise OptionError(f"level {level!r} is for volumes given by their path")
    if isinstance(volume, Array):
        letters = axis_letters(None, volume.ndim) if axes is None else axes
        return Source(_volume_of(volume, letters, channels, "the dask array"), volume)
    import xarray

    if not isinstance(volume, xarray.DataArray):
        _refuse(volume)
    if not isinstance(volume.variable._data, Array):
        raise VolumeError(
            f"the DataArray {volume.name!r} is not made of a dask array: chunk it first, "
            "volume.chunk(), or open it with chunks={}"
        )
    letters = _letters(volume) if axes is None else axes
    seen = _volume_of(volume.data, letters, channels, f"the DataArray {volume.name!r}")
    return Source(seen, volume.data, volume, dict(zip(letters, volume.dims, strict=True)))


def _refuse(volume: Any) -> NoReturn:
    kind = f"{type(volume).__module__}.{type(volume).__qualname__}"
    remedy = "give one of these"
    if isinstance(volume, np.ndarray):
        remedy = "wrap it, dask.array.from_array(volume, chunks=128)"
    elif hasattr(volume, "data_vars"):
        remedy = "choose one of its variables, dataset[name]"
    raise VolumeError(
        "lazy answers are made of a dask array, a DataArray of one, or a path, and this is a "
        f"{kind}: {remedy}"
    )


def _letters(volume: xarray.DataArray) -> str:
    """The axes that a DataArray's dimensions name; raises `VolumeError` where they do not."""
    letters = "".join(str(dim).lower() for dim in volume.dims)
    if any(str(dim).lower() not in tuple("tczyx") for dim in volume.dims):
        raise VolumeError(
            f"the DataArray {volume.name!r} has dimensions {', '.join(map(str, volume.dims))}: "
            'name them t, c, z, y, x, or say which is which (axes="zyx")'
        )
    return letters


def _volume_of(array: Array, axes: str, channels: Sequence[int] | None, name: str) -> Volume:
    """A dask array as a volume that cannot be read here: its chunks come when they are computed."""
    if any(np.isnan(n) for n in array.shape):
        raise VolumeError(
            f"{name} does not know its shape, {array.shape}: compute_chunk_sizes() finds it out"
        )
    if type(array._meta) is not np.ndarray:
        kind = type(array._meta)
        raise VolumeError(
            f"{name} is made of {kind.__module__}.{kind.__qualname__}, not of numpy arrays: map "
            "its blocks to those first (map_blocks)"
        )
    if len(axes) != array.ndim or axes == "?":
        told = "two to five are wanted" if axes == "?" else f"axes {axes!r} are named"
        raise VolumeError(
            f"{name} has {array.ndim} dimensions, shape {array.shape}, and {told}: give it those "
            "and name each of them once, with letters of t, c, z, y, x (axes)"
        )
    chosen = None if channels is None else tuple(int(c) for c in channels)
    if chosen is not None and not chosen:
        raise VolumeError("no channels are chosen: name at least one")
    return Volume(Stored(_unread, array.shape, array.dtype), axes, name, chosen=chosen)


def _unread() -> NoReturn:
    raise NotImplementedError("the chunks of a dask array are handed to tasks, never read")


def keep_annotations() -> AbstractContextManager[None]:
    """Within it dask computes arrays as they were annotated.

    By default dask fuses the tasks of arrays and forgets what they were annotated with, such as
    the resources that they need:

    >>> import dask
    >>> with dask.annotate(resources={"GPU": 1}):
    ...     pass  # answer = znni_dask.infer(...)
    >>> with keep_annotations():
    ...     pass  # answer.compute()

    Blocks that come to a worker without those resources raise `RunError`.
    """
    import dask

    kept: AbstractContextManager[None] = dask.config.set(
        {"optimization.fuse.active": False, "optimization.annotations.fuse": False}
    )
    return kept
