"""Plans of blocks that are made slab by slab along z: which cross-section, how thick slabs, which
primitive for every layer.

Passes, thickness and what else makes slabs are searched one after another. The cross-section
follows from the memory that pages may take, the primitives from what is left. Arithmetic on shapes
and costs only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple

from znni_dask.choices import Menu, choose_primitives, chosen_primitives
from znni_dask.columns import Branches, Column
from znni_dask.errors import OptionError
from znni_dask.geometry import AXES, Size, volume
from znni_dask.network.layers import ONES, Layer
from znni_dask.pages import Program, copied_bytes, memory_of
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.primitives.base import ITEM_BYTES, Primitive
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.table import candidates
from znni_dask.resources import (
    MOST_BLOCKS_IN_FLIGHT,
    Resources,
    check_given,
    check_room,
)
from znni_dask.schedule import Schedules
from znni_dask.slabs import (
    TURN_SECONDS,
    Programs,
    Slabs,
    across,
    beside_bytes,
    block_bytes,
    computed_voxels,
    granules_of,
    times_of,
    typical,
)

_THICKNESSES = (1, 2, 4, 8)  # of slabs, in fragments or alignments
_THICKEST = 128  # voxels
_THIN = (2, 4, 8, 16, 32)  # voxels of the volume that layers at full resolution make at once
_SHARES = (1.0, 0.85, 0.7)  # of the memory that pages take at most
_AGAIN = 3  # times that primitives are chosen for one, within less memory each time
_LONGEST, _WIDEST = 16, 32  # blocks, in chunks
_NARROWEST = 2  # times as long as wide
_NEAR = 16  # cross-sections of about one size, of which one computes least


class _Place(NamedTuple):
    """Where in the space that is searched: the number of a way to make fragments, the thickness of
    slabs, and of those at full resolution, and the share of the memory that pages take."""

    way: int
    thickness: int
    thin: int
    share: float


def streams(layout: Layout) -> bool:
    """Whether blocks can be made slab by slab: not where a halo of one's own makes the answer."""
    return layout.halo is None


def search(layout: Layout, resources: Resources) -> Plan | None:
    """The fastest plan in slabs that fits; None where none does, or none can be."""
    if not streams(layout):
        return None
    ways, thicknesses = _ways(layout), _thicknesses(layout)
    found: dict[_Place, _Found | None] = {}

    def seconds(place: _Place) -> float:
        if place not in found:
            granules = granules_of(layout, place.thickness, place.thin)
            found[place] = _tried(layout, resources, ways[place.way], granules, place.share)
        one = found[place]
        return inf if one is None else one.seconds

    def climbed(start: _Place) -> _Place:
        return _climb(seconds, start, [start._replace(thickness=n) for n in thicknesses])

    middle = thicknesses[len(thicknesses) // 2]
    starts = [_Place(way, middle, thin=4, share=0.85) for way in range(len(ways))]
    best = min(map(climbed, starts), key=seconds)
    best = min(best, climbed(best._replace(thin=16)), key=seconds)
    best = _climb(seconds, best, [best._replace(thin=n) for n in _THIN])
    best = _climb(seconds, best, [best._replace(share=share) for share in _SHARES])
    fitting = [one for one in found.values() if one is not None]
    for one in sorted(fitting, key=lambda one: one.seconds):
        for in_flight in range(MOST_BLOCKS_IN_FLIGHT, 0, -1):
            reading, needed_bytes = one.slabs.reading(in_flight)
            if needed_bytes <= resources.allowed_bytes:
                return one.slabs.plan(in_flight, reading, needed_bytes)
    return None


def checked(layout: Layout, resources: Resources, given: Plan) -> Plan:
    """A plan that was given back, with what it is expected to take now.

    Raises `OptionError` where it does not fit the network or the volume, `MemoryLimitError` where
    it needs more than is allowed.
    """
    check_given(resources, given)
    primitives = chosen_primitives(layout, given)
    schedules = Schedules(layout, primitives)
    if not streams(layout):
        raise OptionError("the plan makes blocks slab by slab, which this run cannot")
    if odd := set(primitives) - set(given.granules):
        raise OptionError(f"the plan does not say how many planes of {sorted(odd)[0]!r} are made")
    if any(stage.samples > 1 for stage in given.stages):
        raise OptionError("the plan computes several windows at once, and here are slabs")
    slabs = Slabs(resources, schedules, given.block, Programs(layout, given.granules))
    reading, needed_bytes = slabs.reading(given.blocks_in_flight)
    check_room(resources, needed_bytes)
    return slabs.plan(given.blocks_in_flight, reading, needed_bytes)


def _thicknesses(layout: Layout) -> list[int]:
    """Of slabs, in voxels."""
    unit = layout.geometry.alignment[0] if not layout.geometry.dense else layout.fragments[0]
    return [unit * n for n in _THICKNESSES if n == 1 or unit * n <= _THICKEST]


def _ways(layout: Layout) -> list[Schedules]:
    """Those of plain primitives: of all fragments at once, and where the first of them are made in
    several passes, in ever more of them."""
    chosen = choose_primitives(layout)
    found = [Schedules(layout, chosen)]
    parting, network = Branches(found[0]).parting, layout.network
    for first in range(1, len(AXES) + 1):
        fewer = {name: _apart_from(first, chosen[name], network[name].layer) for name in parting}
        some = {name: primitive for name, primitive in fewer.items() if primitive is not None}
        if parting and len(some) == len(parting):
            found.append(Schedules(layout, chosen | some))
    return [schedules for schedules in found if schedules.joins_agree]


def _apart_from(first: int, chosen: Primitive, layer: Layer) -> Primitive | None:
    """What makes fragments along the axes from the ``first`` on alone, as ``chosen`` does along
    all; None where along the axis before there are none to leave out."""
    apart = chosen.fragments_of(layer)
    wanted = (*ONES[:first], *apart[first:])
    found = (p for p in candidates(layer) if p.fragments_of(layer) == wanted)
    return next(found, None) if apart[first - 1] > 1 else None


def _climb(seconds: Callable[[_Place], float], start: _Place, line: Sequence[_Place]) -> _Place:
    """The place on a line that is faster than its neighbours, on the way from the nearest to
    ``start`` where anything fits; that where nothing does."""
    here = line.index(start)
    from_start = sorted(range(len(line)), key=lambda i: abs(i - here))
    best: int = next((i for i in from_start if seconds(line[i]) < inf), here)
    while True:
        near = range(max(best - 1, 0), min(best + 2, len(line)))
        here, best = best, min([best, *near], key=lambda i: seconds(line[i]))
        if best == here:
            return line[best]


def _tried(
    layout: Layout,
    resources: Resources,
    plain: Schedules,
    granules: Mapping[str, int],
    share: float,
) -> _Found | None:
    """The cross-section whose pages take such a share of the memory, with the primitives that are
    fastest there; None where none fits."""
    threads, programs = resources.threads, Programs(layout, granules)
    room_bytes = (1 - share) * resources.allowed_bytes

    @cache
    def block_of(section: tuple[int, int]) -> Size:
        return _block(layout, resources, plain, section)

    @cache
    def column_of(block: Size) -> tuple[Column, Program, int]:
        """The column of a block, what is done in it, and the memory left for what primitives keep
        and compute in."""
        column, program = programs.of(plain, min(block[0], layout.output_size[0]))
        wide = across(column, block)
        memory = memory_of(wide, threads, program)
        pages = memory.pages.all_bytes + memory.slab_bytes + memory.table_bytes
        beside = beside_bytes(layout, resources, block, granules, 1, by_cells=False)
        return wide, program, resources.allowed_bytes - beside - pages

    sections = _sections(layout, resources)
    first = bisect_left(sections, True, key=lambda s: column_of(block_of(s))[-1] > room_bytes)
    if first == len(sections):
        return None
    near = map(block_of, sections[first : first + _NEAR])
    block = min(near, key=lambda block: computed_voxels(layout, resources, block))
    wide, program, room = column_of(block)
    count = times_of(layout, resources, block)
    problems = {
        step.operation.node.name: (step.problem, count * times)
        for step, times in typical(wide, program)
        if not isinstance(step.primitive, FormChange)
    }
    menu = Menu(plain, problems, threads, resources.costs, copied_bytes)
    for _ in range(_AGAIN):
        if (found := menu.best_within(room)) is None:
            return None
        seconds, primitives = found
        schedules = Schedules(layout, primitives)
        slabs = Slabs(resources, schedules, block, programs)
        over = slabs.estimated_bytes - resources.allowed_bytes
        if over <= 0:
            turns = count * sum(task.times for task in program.tasks)
            return _Found(slabs, seconds + turns * TURN_SECONDS)
        room -= over  # what changes forms, and is handed copies, takes pages and copies, too
    return None


def _sections(layout: Layout, resources: Resources) -> list[tuple[int, int]]:
    """Cross-sections of blocks to try, in voxels: the largest first."""
    if resources.block is not None:
        return [resources.block[1:]]
    widths = [
        [u * m for m in range(1, _WIDEST + 1) if u * (m - 1) < n]
        for u, n in zip(resources.unit[1:], layout.output_size[1:], strict=True)
    ]
    narrowest = widths[0][0], widths[1][0]
    found = [
        (y, x)
        for y, x in product(*widths)
        if max(y, x) <= _NARROWEST * min(y, x) or (y, x) == narrowest
    ]
    _, high, wide = layout.geometry.field_of_view
    return sorted(found, key=lambda section: -(section[0] + high) * (section[1] + wide))


def _block(
    layout: Layout, resources: Resources, schedules: Schedules, section: tuple[int, int]
) -> Size:
    """The block of a cross-section: as long as does not take a quarter of the memory, with its
    answer where that waits for the last of several passes."""
    if resources.block is not None:
        return resources.block
    answer_bytes = ITEM_BYTES * layout.network.out_channels if schedules.repeats > 1 else 0
    along, n = resources.unit[0], layout.output_size[0]

    def is_long(z: int) -> bool:
        block = (z, *section)
        held = block_bytes(layout, resources, block, False) + answer_bytes * volume(block)
        return 4 * held > resources.allowed_bytes

    lengths = [along * m for m in range(1, _LONGEST + 1) if along * (m - 1) < n]
    return (lengths[max(0, bisect_left(lengths, True, key=is_long) - 1)], *section)


@dataclass(frozen=True, eq=False)
class _Found:
    """Slabs, and the seconds of all blocks, reading and writing not counted."""

    slabs: Slabs
    seconds: float
