"""Check an output: recompute random places of it, each in one large patch of its own.

Half of the places are put across corners of the chunks in which a run writes, where a wrong
halo would show; the others anywhere. Of a dense network one voxel in every place is computed by
definition, the network on that voxel's field of view, so that fragments are checked too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from znni_dask.application import Application, patchwise_of
from znni_dask.errors import OptionError, OutputError
from znni_dask.geometry import Box, Size, add, tiles, triple
from znni_dask.importers import load_network
from znni_dask.network.layers import FULL
from znni_dask.network.network import Network
from znni_dask.normalization import Statistics
from znni_dask.options import computing_threads
from znni_dask.patches import Layout
from znni_dask.primitives.base import Array
from znni_dask.recompute import recompute
from znni_dask.selection import Wanted
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.output import description
from znni_dask.storage.urls import location
from znni_dask.storage.volume import Volume, open_volume
from znni_dask.windows import Laid, WindowGrid

TOLERANCE = 1e-4  # largest difference allowed, in standard deviations of the answer
_OF_MEASURED_ERROR = 4.0  # times the largest difference measured at a few places
_TRIES = 64  # to find a place that holds something selected, before the mask is searched
_SEARCHED = (128, 128, 128)  # of the mask at a time
_TOLD = {
    *("network", "output", "boundary", "nan", "dtype", "range", "axes", "channels", "level"),
    *("patchwise", "halo", "precision", "roi", "mask", "normalize"),
}


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Differences are between stored and recomputed values.

    ``allowed`` is 1e-4 standard deviations of the recomputed values, plus one step of the stored
    type (values that differ by less may be rounded apart). The difference of a stored label is how
    far the answer of its channel lies below that of the best one: another label is wrong only where
    the two channels differ by more than is allowed. An output made with a ``halo`` of its own
    or in a lower ``precision`` is compared with the exact answer, from which it differs by design:
    a few times the error that was measured is allowed.
    """

    places: int
    voxels: int
    largest_difference: float
    at: Size
    standard_deviation: float
    allowed: float
    halo: Size | None = None
    precision: str = FULL

    @property
    def holds(self) -> bool:
        """Whether nothing differs by more than is allowed."""
        return self.largest_difference <= self.allowed


def verify(
    network: str | Path | Network,
    input: str | Path,
    output: str | Path,
    *,
    places: int = 8,
    size: Size | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Verification:
    """Recompute ``places`` boxes of ``size`` (z, y, x) of ``output`` and compare; by default 32³,
    or 2³ of a classifier, of which every voxel is a window. Where a part of the volume was
    selected, places hold something of it, and voxels that were not selected must be 0.

    Raises `OutputError` where the output was not made by `run` from this network and volume.
    """
    if places < 1 or (size is not None and min(size) < 1) or seed < 0:
        raise OptionError(
            f"{places} places of size {size}, seed {seed}: places and size must be positive, the "
            "seed not negative"
        )
    team = computing_threads(threads)
    written, made = _open_output(output)
    application = _repeated(network, input, made)
    layout, source = application.laid(str(made["output"])), application.volume
    if layout.network.fingerprint != made["network"]:
        raise OutputError(f"{output} was made by another network, or one with other weights")
    if (written.size, written.times) != (layout.output_size, source.times):
        raise OutputError(
            f"{output} has the size {written.size}, this network makes {layout.output_size} of "
            "this volume: was it made from another one?"
        )
    encoding = Encoding(str(made["dtype"]), *made["range"])
    random = np.random.default_rng(seed)
    found = []
    for index in range(places):
        time = int(random.integers(source.times))
        chunks = written.chunks if index % 2 else None
        box = _selected(random, application, layout, size or _size(layout), chunks, time)
        wanted = application.selection.wanted(layout, box, time)
        options: dict[str, Any] = {"nan": application.nan, "threads": team, "time": time}
        answer = recompute(layout, source, box, **options)
        if isinstance(layout, Layout) and layout.geometry.dense:
            _slide(layout, source, box, random, answer, options, wanted)
        found.append(_Compared(box, written.read(box, time), answer, wanted))
    return _compare(found, encoding, made)


@dataclass(frozen=True, eq=False)
class _Compared:
    """A place: what is stored there, the answer, and which voxels are selected (None: all)."""

    box: Box
    stored: Any
    fresh: Array
    wanted: Wanted | None


def _open_output(path: str | Path) -> tuple[Volume, dict[str, Any]]:
    """An output, and what its metadata tell of how it was made."""
    made = description(location(path))
    if made is not None and "outputs" in made:
        raise OutputError(
            f"{path} holds several outputs: verify one of its groups, " + ", ".join(made["outputs"])
        )
    if made is None or not set(made) >= _TOLD:
        raise OutputError(f"{path} was not made by znni infer: how it was made is not known")
    return open_volume(path), made


def _repeated(
    network: str | Path | Network, input: str | Path, made: Mapping[str, Any]
) -> Application:
    """What an output's metadata say it was made of; of an approximate answer the exact one."""
    patchwise = patchwise_of(made)
    repeated = Application(
        load_network(network, patchwise.window if patchwise else None),
        open_volume(input, made["axes"], made["channels"], made["level"]),
        str(made["boundary"]),
        made["nan"],
        patchwise,
        roi=None if made["roi"] is None else Box(*(triple(end) for end in made["roi"])),
        mask=None if made["mask"] is None else open_volume(made["mask"]),
    )
    if made["normalize"] is None:
        return repeated
    return repeated.normalized(Statistics.told(made["statistics"]))


def _selected(
    random: np.random.Generator,
    application: Application,
    laid: Laid,
    size: Size,
    chunks: Size | None,
    time: int,
) -> Box:
    """A random place that holds something selected; anywhere where nothing is."""
    selection, whole = application.selection, laid.output_size
    hull = selection.hull(laid)
    for _ in range(_TRIES):
        box = _place(random, hull, whole, size, chunks)
        if _holds(selection.wanted(laid, box, time)):
            return box
    for part in tiles(whole, _SEARCHED, hull):
        wanted = selection.wanted(laid, part, time)
        if wanted is None:
            return _place(random, part, whole, size, None)
        if wanted.any():
            start = add(part.start, triple(random.choice(np.argwhere(wanted))))
            return _place(random, Box(start, add(start, (1, 1, 1))), whole, size, None)
    return box


def _holds(wanted: Wanted | None) -> bool:
    return wanted is None or bool(wanted.any())


def _place(
    random: np.random.Generator, hull: Box, whole: Size, size: Size, chunks: Size | None
) -> Box:
    """A random box that touches ``hull``, a little beyond it at most, or around it where it is
    smaller; or across corners of chunks."""
    start = []
    for axis, (first, stop) in enumerate(zip(hull.start, hull.stop, strict=True)):
        n, s = whole[axis], size[axis]
        last = max(n - s, 0)
        low, high = sorted((max(first - s // 4, 0), max(stop + s // 4 - s, 0)))
        begin = min(int(random.integers(low, high + 1)), last)
        if chunks is not None:
            corners = range(first // chunks[axis] + 1, -(-stop // chunks[axis]))
            if corners:
                corner = chunks[axis] * int(random.choice(corners))
                begin = min(max(corner - s // 2, 0), last)
        start.append(begin)
    ends = (min(a + s, n) for a, s, n in zip(start, size, whole, strict=True))
    return Box(triple(start), triple(ends))


def _slide(
    layout: Layout,
    source: Volume,
    box: Box,
    random: np.random.Generator,
    answer: Array,
    options: Mapping[str, Any],
    wanted: Wanted | None,
) -> None:
    """Put one voxel of a place in by definition: the network on that voxel's field of view, no
    fragments. So fragments are checked by what does without them."""
    place = triple(int(random.integers(n)) for n in box.size)
    if wanted is not None and wanted.any():
        place = triple(random.choice(np.argwhere(wanted)))
    start = add(box.start, place)
    one = Box(start, add(start, (1, 1, 1)))
    z, y, x = place
    voxel = recompute(layout, source, one, fragments=False, **options)
    answer[:, z, y, x] = voxel[:, 0, 0, 0]


def _apart(one: _Compared, encoding: Encoding) -> Any:
    """How far what is stored is from what is right, (z, y, x); infinitely far where something is
    stored that is not selected."""
    if one.wanted is None:
        return encoding.difference(one.stored, one.fresh)
    out = ~one.wanted
    apart = encoding.difference(one.stored, np.where(out, np.float32(0), one.fresh))
    apart[out] = np.where((one.stored != 0).any(axis=0)[out], np.inf, 0)
    return apart


def _size(layout: Laid) -> Size:
    """The size of places where none is given."""
    vectors = isinstance(layout, WindowGrid) and layout.classifies
    return (2, 2, 2) if vectors else (32, 32, 32)


def _compare(found: list[_Compared], encoding: Encoding, made: Mapping[str, Any]) -> Verification:
    differences = [_apart(one, encoding) for one in found]
    worst = int(np.argmax([d.max() for d in differences]))
    place = np.unravel_index(int(differences[worst].argmax()), differences[worst].shape)
    values = np.concatenate(
        [(f.fresh if f.wanted is None else f.fresh[:, f.wanted]).ravel() for f in found]
    )
    finite = values[np.isfinite(values)]
    deviation = float(finite.std()) if finite.size else 0.0
    allowed = TOLERANCE * deviation + encoding.step(float(np.abs(finite).max(initial=0)))
    halo, precision = made["halo"], str(made["precision"])
    approximate = halo is not None or precision != FULL
    error = float(made["measured_error"]) if approximate else 0.0
    return Verification(
        places=len(found),
        voxels=sum(one.fresh.size for one in found),
        largest_difference=float(differences[worst].max()),
        at=triple(int(a + b) for a, b in zip(found[worst].box.start, place, strict=True)),
        standard_deviation=deviation,
        allowed=allowed + _OF_MEASURED_ERROR * error,
        halo=None if halo is None else triple(halo),
        precision=precision,
    )
