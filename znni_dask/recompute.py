"""Parts of an answer computed on their own, to be compared with what a run makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from znni_dask import planner
from znni_dask.application import Application, Laid
from znni_dask.errors import MemoryLimitError
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, Size, text, triple
from znni_dask.machine import show_bytes
from znni_dask.patches import Layout
from znni_dask.patchwise import WindowBlocks
from znni_dask.primitives.base import Array
from znni_dask.schedule import Schedules
from znni_dask.storage.output import Encoding
from znni_dask.storage.volume import Volume

_PLACES = 4
_LENGTHS = (32, 16, 8, 4, 1)  # of a place, largest first


def recompute(
    laid: Laid,
    source: Volume,
    box: Box,
    *,
    nan: float | None,
    threads: int,
    time: int = 0,
    fragments: bool = True,
) -> Array:
    """The answer within ``box`` (channel, z, y, x), in one patch of its own."""
    region = laid.region(box)
    values = source.read_extended(region, laid.boundary, nan, time)
    if not isinstance(laid, Layout):
        blocks = WindowBlocks(laid, threads)
        try:
            return np.asarray(blocks.make(box, values, region.start, Encoding()), np.float32)
        finally:
            blocks.close()
    primitives = planner.choose_primitives(laid, fragments)
    schedules = Schedules(laid, primitives)
    arena = schedules.arena(schedules.sizes(box))
    answer = np.empty((laid.network.out_channels, *box.size), np.float32)
    with SerialExecutor(laid.network, primitives, arena, threads) as executor:
        executor.run(schedules.schedule(box), values, answer)
    return answer


@dataclass(frozen=True)
class HaloError:
    """How far an answer with a halo of its own is from the exact one, at random places.

    ``largest`` difference and the exact answer's standard deviation, over ``voxels`` voxels.
    """

    largest: float
    standard_deviation: float
    voxels: int


def halo_error(
    application: Application, outputs: tuple[str, ...], resources: planner.Resources, patch: Size
) -> HaloError:
    """Measure what a halo of one's own costs, before a run.

    Raises `MemoryLimitError` where not even one voxel can be computed exactly within the memory
    allowed.
    """
    near = application.laid(*outputs)
    exact = Layout(near.network, near.size, near.boundary)
    length = next((n for n in _LENGTHS if _fits(exact, resources, n)), None)
    if length is None:
        raise MemoryLimitError(
            f"the error of a halo cannot be measured within {show_bytes(resources.allowed_bytes)}: "
            f"one exact voxel needs the field of view, {text(exact.geometry.field_of_view)}"
        )
    random = np.random.default_rng(0)
    largest, answers = 0.0, []
    for _ in range(_PLACES):
        size = triple(min(length, n) for n in exact.output_size)
        # around the border of a patch, where a halo that is too small shows first
        start = [
            min(max(int(random.integers(n)) // p * p - s // 2, 0), n - s)
            for n, s, p in zip(exact.output_size, size, patch, strict=True)
        ]
        box = Box(triple(start), triple(a + s for a, s in zip(start, size, strict=True)))
        answer = recompute(
            exact, application.volume, box, nan=application.nan, threads=resources.threads
        )
        made = np.empty_like(answer)
        for part in _parts(box, patch):
            here = (slice(None), *part.shifted(triple(-a for a in box.start)).slices)
            whole = _patch_around(part, patch, exact.output_size)
            around = recompute(
                near, application.volume, whole, nan=application.nan, threads=resources.threads
            )
            made[here] = around[
                (slice(None), *part.shifted(triple(-a for a in whole.start)).slices)
            ]
        largest = max(largest, float(np.abs(made - answer).max()))
        answers.append(answer)
    values = np.concatenate([a.ravel() for a in answers])
    return HaloError(largest, float(values.std()), values.size)


def _parts(box: Box, patch: Size) -> list[Box]:
    """A box cut along the borders of patches."""
    cuts = []
    for a, b, p in zip(box.start, box.stop, patch, strict=True):
        inner = list(range(a // p * p + p, b, p))
        cuts.append(list(zip([a, *inner], [*inner, b], strict=True)))
    return [
        Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))
        for z in cuts[0]
        for y in cuts[1]
        for x in cuts[2]
    ]


def _patch_around(part: Box, patch: Size, size: Size) -> Box:
    """The patch of a run in which a part lies."""
    start = triple(a // p * p for a, p in zip(part.start, patch, strict=True))
    return Box(start, triple(min(a + p, n) for a, p, n in zip(start, patch, size, strict=True)))


def _fits(layout: Layout, resources: planner.Resources, length: int) -> bool:
    """Whether a box of this length can be computed exactly within the memory allowed."""
    size = triple(min(length, n) for n in layout.output_size)
    schedules = Schedules(layout, planner.choose_primitives(layout))
    box = Box((0, 0, 0), size)
    needed = (
        resources.baseline_bytes
        + planner.computing_bytes(schedules, schedules.sizes(box), size, resources.threads)
        + resources.read_bytes(layout.region(box).size)
    )
    return needed <= resources.allowed_bytes
