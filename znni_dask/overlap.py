"""A kernel for one's own `dask.array.map_overlap`, exact at the volume's faces too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from znni_dask.application import Application
from znni_dask.errors import NetworkError, OptionError, VolumeError
from znni_dask.geometry import AXES, Box, Size, round_up, triple
from znni_dask.graph import Asked, Needed, axes_of, delayed_job
from znni_dask.importers import load_network
from znni_dask.lazy import LazyJob, Pieces, Values
from znni_dask.network.field_of_view import geometry
from znni_dask.network.network import Network
from znni_dask.options import check_replacement, size
from znni_dask.volume import opened
from znni_dask.windows import Laid

if TYPE_CHECKING:
    from dask.array import Array


class OverlapKernel:
    """What `overlap_kernel` makes.

    ``depth`` is the halo, (low, high) for every axis of the array; ``arguments`` are all that
    `dask.array.map_overlap` is to be told.
    """

    # no dataclass: dask would look into it for arrays, and make it anew for every chunk

    def __init__(self, depth: Mapping[int, tuple[int, int]], arguments: Mapping[str, Any]) -> None:
        self.depth, self.arguments = depth, arguments

    def __repr__(self) -> str:
        return f"<OverlapKernel of depth {dict(self.depth)}>"

    def __call__(self, chunk: Values, *, job: LazyJob, block_info: Mapping[int, Any]) -> Values:
        """The answer of one chunk, which stands in its halo; dask calls it."""
        place = block_info[0]
        axes = job.job.volume.axes
        corner, spans = [], {"z": (0, 1), "t": (0, 1)}
        for i, (axis, n) in enumerate(zip(axes, chunk.shape, strict=True)):
            number, count = place["chunk-location"][i], place["num-chunks"][i]
            low, high = self.depth[i]
            # within the array as dask handed it on, where chunks stand with their halos
            begin = place["array-location"][i][0] - number * (low + high)
            corner.append(begin)
            start = begin + (low if number else 0)
            spans[axis] = start, begin + n - (high if number < count - 1 else 0)
        pieces = Pieces(
            job.job.volume.array.shape, job.job.volume.dtype, [(tuple(corner), chunk.shape, chunk)]
        )
        block = Box(triple(spans[a][0] for a in AXES), triple(spans[a][1] for a in AXES))
        made = [job.make(time, block, pieces) for time in range(*spans["t"])]
        return made[0] if len(made) == 1 else np.concatenate(made, axis=job.axes.index("t"))

    def __getstate__(self) -> dict[str, Any]:
        # dask sends the kernel with every chunk; the network is in the arguments, and travels once
        return {"depth": self.depth, "arguments": {}}

    def __dask_tokenize__(self) -> object:
        return "znni-overlap-kernel", dict(self.depth)


def overlap_kernel(
    array: Array,
    network: str | Path | Network,
    *,
    output: str | None = None,
    boundary: str = "reflect",
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    nan: float | None = None,
    memory: str | float | None = None,
    patch: Size | int | None = None,
    threads: int | None = None,
) -> OverlapKernel:
    """A kernel for `dask.array.map_overlap` over ``array``, by which it gives the exact answer:

    >>> import dask.array as da
    >>> from znni_dask import Builder
    >>> b = Builder(channels=1)
    >>> network = b.network(b.conv(b.input, 1, kernel=3, padding="same"))
    >>> array = da.zeros((64, 64, 64), chunks=32, dtype="uint8")
    >>> kernel = overlap_kernel(array, network)
    >>> kernel.depth
    {0: (1, 1), 1: (1, 1), 2: (1, 1)}
    >>> da.map_overlap(kernel, array, **kernel.arguments).shape
    (64, 64, 64)

    It extends the volume at its faces itself, which dask cannot: dask's "reflect" repeats the
    edge, and a depth that differs on both sides needs boundary "none". Options are those of
    `infer`, which makes fewer tasks and takes any network and chunks. The array's chunks must be
    equal along every axis of space (the last may be smaller), no thinner than the depth, and hold
    all channels.

    Raises `NetworkError` where the answer is not of the volume's size, `VolumeError` where the
    chunks do not suit, and what `infer` does.
    """
    check_replacement(nan)
    source = opened(array, axes, channels, None)
    if source.array is None or source.labels is not None:
        raise VolumeError("map_overlap takes dask arrays: of a DataArray give its data")
    application = Application(load_network(network), source.volume, boundary, nan)
    names = list(application.network.outputs) if output is None else [output]
    if len(names) > 1:
        raise OptionError(f"choose one output of {', '.join(names)}: output={names[0]!r}")
    laid, letters = application.laid(names[0]), source.volume.axes
    moved = any(laid.translation) or laid.output_size != laid.size
    if moved or any(stride != 1 for stride in laid.output_stride):
        raise NetworkError(
            f"of a volume of {laid.size} the network makes {laid.output_size}, {_grid(laid)}: "
            "map_overlap is for answers that lie on the volume's own voxels; use infer"
        )
    chunks = _chunks(array, letters)
    asked = Asked(
        application=application,
        array=array,
        chunks=chunks,
        patch=size("patch", patch),
        memory=memory,
        threads=threads,
    )
    job = asked.job((names[0],), chunks, None)
    depth = {i: _depth(job, array, i) for i in range(array.ndim)}
    count = laid.network.out_channels
    made = axes_of(letters, count)
    sizes = dict(zip(letters, array.chunks, strict=True)) | {"c": (count,)}
    arguments = {
        "depth": depth,
        "boundary": "none",
        "trim": False,
        "allow_rechunk": False,
        "chunks": tuple(sizes[a] for a in made),
        "dtype": np.dtype(np.float32),
        "meta": np.empty((0,) * len(made), np.float32),
        "token": "znni-overlap",
        "job": delayed_job(job),
    }
    if len(made) > len(letters):
        arguments["new_axis"] = made.index("c")
    return OverlapKernel(depth, arguments)


def _grid(laid: Laid) -> str:
    strides = ", ".join(str(s) for s in laid.output_stride)
    return f"{strides} voxels apart"


def _chunks(array: Array, axes: str) -> Size:
    """The chunks of an array, (z, y, x); raises `VolumeError` where they are not equal."""
    lengths = dict(zip(axes, array.chunks, strict=True))
    if len(lengths.get("c", "1")) > 1:
        raise VolumeError(
            f"the array's channels are in {len(lengths['c'])} chunks, and every block needs all: "
            f"array.rechunk({{{axes.index('c')}: -1}})"
        )
    for axis, found in lengths.items():
        if axis in AXES and any(n != found[0] for n in found[:-1]) | (found[-1] > found[0]):
            raise VolumeError(
                f"the chunks along {axis} are {found}: all but the last must be equal: "
                f"array.rechunk({{{axes.index(axis)}: {max(found)}}}), or use infer"
            )
    return triple(lengths.get(a, (1,))[0] for a in AXES)


def _depth(job: LazyJob, array: Array, i: int) -> tuple[int, int]:
    """How far the chunks along an axis must see, rounded up to the network's alignment."""
    letter, lengths = job.job.volume.axes[i], array.chunks[i]
    if letter not in AXES or len(lengths) == 1:
        return 0, 0
    axis, needed = AXES.index(letter), Needed(job, array)
    low = high = start = 0
    for n in lengths:
        first, last = needed.behind(axis, start, start + n)
        low, high, start = max(low, start - first), max(high, last - start - n), start + n
    step = geometry(job.job.laid.network).alignment[axis]
    found = round_up(low, step), round_up(high, step)
    if min(lengths) < max(found):
        raise VolumeError(
            f"chunks of {min(lengths)} voxels along {letter} are thinner than the depth, "
            f"{max(found)}: rechunk the array to larger ones, or use infer, which takes any"
        )
    return found
