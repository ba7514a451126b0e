"""Check an output: recompute random places of it, each in one large patch of its own.

Half of the places are put across corners of the chunks in which a run writes, where a wrong
halo would show; the others anywhere. Of a dense network one voxel in every place is computed by
definition, the network on that voxel's field of view, so that fragments are checked too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from znni_dask.application import Application, patchwise_of
from znni_dask.errors import OptionError, OutputError
from znni_dask.geometry import Box, Size, add, triple
from znni_dask.importers import load_network
from znni_dask.network.network import Network
from znni_dask.options import computing_threads
from znni_dask.patches import Layout
from znni_dask.primitives.base import Array
from znni_dask.recompute import recompute
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.volume import Volume, open_volume
from znni_dask.windows import WindowGrid

TOLERANCE = 1e-4  # largest difference allowed, in standard deviations of the answer
_OF_HALO_ERROR = 4.0  # times the largest difference measured at a few places
_TOLD = {
    *("network", "output", "boundary", "nan", "dtype", "range", "axes", "channels", "level"),
    *("patchwise", "halo"),
}


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Differences are between stored and recomputed values.

    ``allowed`` is 1e-4 standard deviations of the recomputed values, plus one step of the stored
    type (values that differ by less may be rounded apart). The difference of a stored label is how
    far the answer of its channel lies below that of the best one: another label is wrong only where
    the two channels differ by more than is allowed. An output made with a ``halo`` of its own is
    compared with the exact answer, from which it differs by design: a few times the error that was
    measured is allowed.
    """

    places: int
    voxels: int
    largest_difference: float
    at: Size
    standard_deviation: float
    allowed: float
    halo: Size | None = None

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
    or 2³ of a classifier, of which every voxel is a window.

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
    stored, fresh, boxes = [], [], []
    for index in range(places):
        time = int(random.integers(source.times))
        box = _place(
            random, layout.output_size, size or _size(layout), written.chunks if index % 2 else None
        )
        stored.append(written.read(box, time))
        options: dict[str, Any] = {"nan": application.nan, "threads": team, "time": time}
        answer = recompute(layout, source, box, **options)
        if isinstance(layout, Layout) and layout.geometry.dense:
            _slide(layout, source, box, random, answer, options)
        fresh.append(answer)
        boxes.append(box)
    return _compare(stored, fresh, boxes, encoding, made)


def _open_output(path: str | Path) -> tuple[Volume, dict[str, Any]]:
    """An output, and what its metadata tell of how it was made."""
    made = None
    if (Path(path) / "zarr.json").is_file():
        node = zarr.open(str(path), mode="r")
        made = cast("dict[str, Any] | None", node.attrs.get("znni"))
    if isinstance(made, dict) and "outputs" in made:
        raise OutputError(
            f"{path} holds several outputs: verify one of its groups, " + ", ".join(made["outputs"])
        )
    if not isinstance(made, dict) or not set(made) >= _TOLD:
        raise OutputError(f"{path} was not made by znni infer: how it was made is not known")
    return open_volume(path), made


def _repeated(
    network: str | Path | Network, input: str | Path, made: Mapping[str, Any]
) -> Application:
    """What an output's metadata say it was made of; of an answer with a halo of its own the exact
    one, without."""
    patchwise = patchwise_of(made)
    return Application(
        load_network(network, patchwise.window if patchwise else None),
        open_volume(input, made["axes"], made["channels"], made["level"]),
        str(made["boundary"]),
        made["nan"],
        patchwise,
    )


def _place(random: np.random.Generator, whole: Size, size: Size, chunks: Size | None) -> Box:
    start = []
    for axis, (n, s) in enumerate(zip(whole, size, strict=True)):
        last = max(n - s, 0)
        begin = int(random.integers(last + 1))
        if chunks is not None and n > chunks[axis]:
            corner = chunks[axis] * int(random.integers(1, -(-n // chunks[axis])))
            begin = min(max(corner - s // 2, 0), last)
        start.append(begin)
    stop = (min(a + s, n) for a, s, n in zip(start, size, whole, strict=True))
    return Box(triple(start), triple(stop))


def _slide(
    layout: Layout,
    source: Volume,
    box: Box,
    random: np.random.Generator,
    answer: Array,
    options: Mapping[str, Any],
) -> None:
    """Put one voxel of a place in by definition: the network on that voxel's field of view, no
    fragments. So fragments are checked by what does without them."""
    place = triple(int(random.integers(n)) for n in box.size)
    start = add(box.start, place)
    one = Box(start, add(start, (1, 1, 1)))
    z, y, x = place
    voxel = recompute(layout, source, one, fragments=False, **options)
    answer[:, z, y, x] = voxel[:, 0, 0, 0]


def _size(layout: Layout | WindowGrid) -> Size:
    """The size of places where none is given."""
    vectors = isinstance(layout, WindowGrid) and layout.classifies
    return (2, 2, 2) if vectors else (32, 32, 32)


def _compare(
    stored: list[Any],
    fresh: list[Any],
    boxes: list[Box],
    encoding: Encoding,
    made: Mapping[str, Any],
) -> Verification:
    differences = [encoding.difference(a, b) for a, b in zip(stored, fresh, strict=True)]
    worst = int(np.argmax([d.max() for d in differences]))
    place = np.unravel_index(int(differences[worst].argmax()), differences[worst].shape)
    values = np.concatenate([f.ravel() for f in fresh])
    finite = values[np.isfinite(values)]
    deviation = float(finite.std()) if finite.size else 0.0
    allowed = TOLERANCE * deviation + encoding.step(float(np.abs(finite).max(initial=0)))
    halo = made["halo"]
    return Verification(
        places=len(boxes),
        voxels=values.size,
        largest_difference=float(differences[worst].max()),
        at=triple(int(a + b) for a, b in zip(boxes[worst].start, place, strict=True)),
        standard_deviation=deviation,
        allowed=allowed + (_OF_HALO_ERROR * float(made["halo_error"]) if halo else 0.0),
        halo=None if halo is None else triple(halo),
    )
