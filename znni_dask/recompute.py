"""Parts of an answer computed on their own, to be compared with what a run makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from znni_dask.application import Application
from znni_dask.behind import Behind
from znni_dask.choices import choose_primitives, chosen_primitives
from znni_dask.devices.base import Device
from znni_dask.devices.opening import opened_here
from znni_dask.errors import MemoryLimitError, RunError, VolumeError
from znni_dask.executors.device import executor_of
from znni_dask.geometry import Box, Size, add, text, tiles, triple
from znni_dask.machine import GPU, show_bytes
from znni_dask.network.layers import FULL
from znni_dask.patches import Layout, patches_of
from znni_dask.patchwise import WindowBlocks
from znni_dask.plan import Plan
from znni_dask.primitives.base import Array, Primitive
from znni_dask.resources import Resources, computing_bytes
from znni_dask.schedule import Arrangement, Schedules
from znni_dask.storage.volume import Volume
from znni_dask.windows import Laid

_MEASURING = "measuring what an approximation on a GPU costs"
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
    primitives: Mapping[str, Primitive] | None = None,
    device: Device | None = None,
) -> Array:
    """The answer within ``box`` (channel, z, y, x), in one patch of its own; by the plain
    primitives where no others are given, which may be those of a ``device``: it is closed."""
    behind = Behind.of(
        time, laid.region(box), lambda here: source.read_extended(here, laid.boundary, nan, time)
    )
    if primitives is None:
        primitives = choose_primitives(_arranged(laid), fragments)
    if not isinstance(laid, Layout):
        with WindowBlocks(laid, primitives, threads, device=device) as blocks:
            return blocks.blended(box, behind)
    schedules = Schedules(laid, primitives)
    answer = np.empty((laid.network.out_channels, *box.size), np.float32)
    with executor_of(schedules, schedules.sizes(box), box.size, threads, device) as executor:
        executor.run(schedules.schedule(box), [behind.values], [answer])
    return answer


def _arranged(laid: Laid) -> Arrangement:
    return laid if isinstance(laid, Layout) else laid.layout


@dataclass(frozen=True)
class MeasuredError:
    """How far an approximate answer is from the exact one, at random places.

    It is so for a ``halo`` less than the derived one, and for ``lowered`` layers that are computed
    in a lower precision. ``largest`` difference and the exact answer's standard deviation, over
    ``voxels`` voxels.
    """

    halo: Size | None
    precision: str
    lowered: int
    largest: float
    standard_deviation: float
    voxels: int


def measured_error(
    application: Application, outputs: tuple[str, ...], resources: Resources, plan: Plan
) -> MeasuredError:
    """Measure what a halo of one's own and a lower precision cost in the patches of a plan, before
    the run.

    Raises `MemoryLimitError` where not even one voxel can be computed exactly within the memory
    allowed, `VolumeError` where the volume cannot be read there, `OptionError` where a GPU is to
    compute, and this process has none.
    """
    near, source = application.laid(*outputs), application.volume
    exact = application.exact.laid(*outputs)
    length, lower = _length(exact, resources), _lower(near, plan)
    on_device = plan.device == GPU  # whose patches may be too large for this process
    if on_device:
        primitives = chosen_primitives(_arranged(near), plan)
    else:
        primitives = choose_primitives(_arranged(near)) | lower
    random, hull = np.random.default_rng(0), application.selection.hull(exact)
    largest, answers = 0.0, []
    for _ in range(_PLACES):
        box = _place(random, hull, exact.output_size, length, plan.patch)
        how: dict[str, Any] = {
            "nan": application.nan,
            "threads": resources.threads,
            "time": int(random.integers(source.times)),
        }
        try:
            answer = recompute(exact, source, box, **how)
            made = np.full_like(answer, np.nan)
            for patch in _made_with(box, near, plan):
                device = None
                if on_device:
                    device = opened_here(plan.allowed_device_bytes, _MEASURING)
                around = recompute(near, source, patch, primitives=primitives, device=device, **how)
                part = box.shared(patch)
                assert part is not None
                here, there = part.seen_from(box.start), part.seen_from(patch.start)
                made[(slice(None), *here.slices)] = around[(slice(None), *there.slices)]
        except RunError as error:
            raise VolumeError(f"where the error is measured, {error}") from None
        largest = max(largest, float(np.abs(made - answer).max()))
        answers.append(answer)
    values = np.concatenate([a.ravel() for a in answers])
    asked = application.halo, application.precision
    return MeasuredError(*asked, len(lower), largest, float(values.std()), values.size)


def _lower(laid: Laid, plan: Plan) -> dict[str, Primitive]:
    """Of the plan the primitives of lower precision."""
    planned = chosen_primitives(_arranged(laid), plan)
    return {name: p for name, p in planned.items() if p.precision != FULL}


def _place(random: np.random.Generator, hull: Box, size: Size, length: int, patch: Size) -> Box:
    """A random box around the border of a patch, where a halo that is too small shows first, of
    those that touch ``hull``."""
    edges = triple(min(length, n) for n in size)
    start = triple(
        min(max(int(random.integers(a, b)) // p * p - e // 2, 0), n - e)
        for a, b, n, e, p in zip(hull.start, hull.stop, size, edges, patch, strict=True)
    )
    return Box(start, add(start, edges))


def _made_with(box: Box, laid: Laid, plan: Plan) -> Iterator[Box]:
    """The patches of a run that lie over a box; windows are where they are, and where slabs end
    changes nothing."""
    if not isinstance(laid, Layout) or plan.granules:
        yield box
        return
    for block in tiles(laid.output_size, plan.block, box):
        for patch in patches_of(block, plan.patch):
            if patch.shared(box):
                yield patch


def _length(laid: Laid, resources: Resources) -> int:
    """Of the boxes where an error is measured; raises `MemoryLimitError`."""
    if not isinstance(laid, Layout):
        return 1 if laid.classifies else _LENGTHS[-2]  # all windows that touch it are computed
    length = next((n for n in _LENGTHS if _fits(laid, resources, n)), None)
    if length is None:
        raise MemoryLimitError(
            f"the error cannot be measured within {show_bytes(resources.allowed_bytes)}: "
            f"one exact voxel needs the field of view, {text(laid.geometry.field_of_view)}"
        )
    return length


def _fits(layout: Layout, resources: Resources, length: int) -> bool:
    """Whether a box of this length can be computed exactly within the memory allowed."""
    size = triple(min(length, n) for n in layout.output_size)
    schedules = Schedules(layout, choose_primitives(layout))
    box = Box((0, 0, 0), size)
    needed = (
        resources.baseline_bytes
        + computing_bytes(schedules, schedules.sizes(box), size, resources.threads)
        + resources.read_bytes(layout.region(box).size)
    )
    return needed <= resources.allowed_bytes
