"""Plans of blocks that are made slab by slab along z: which cross-section, how thick slabs, which
primitive for every layer.

Passes, thickness and what else makes slabs are searched one after another. The cross-section
follows from the memory that pages may take, the primitives from what is left. Arithmetic on shapes
and costs only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple, cast

from znni_dask.choices import Menu, choose_primitives, chosen_primitives
from znni_dask.columns import Branches, Column, thickness_of
from znni_dask.cut import Cut
from znni_dask.errors import OptionError
from znni_dask.geometry import AXES, ceil_divide
from znni_dask.lent import lent_to
from znni_dask.machine import GPU, GPU_RAM
from znni_dask.network.layers import ONES, Layer
from znni_dask.network.turned import can_be_turned
from znni_dask.pages import Program, copied_bytes, memory_of
from znni_dask.patches import Layout, largest_box
from znni_dask.plan import Plan
from znni_dask.primitives.base import ITEM_BYTES, Primitive
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.table import candidates
from znni_dask.resources import Need, Resources, check_given, check_room
from znni_dask.schedule import Schedules
from znni_dask.slabs import (
    TURN_SECONDS,
    Programs,
    Slabs,
    across,
    computed_voxels,
    granules_of,
    halo_of,
    on_device,
    times_of,
    typical,
    wanted_bytes,
)

_THICKNESSES = (1, 2, 4, 8, 12, 16, 24)  # of slabs, in fragments or alignments
_FIRST = slice(2, 4)  # of these, where the search begins
_THICKEST = 128  # voxels
_THIN = (2, 4, 8, 16, 32)  # voxels of the volume that layers at full resolution make at once
_SHARES = (1.0, 0.85, 0.7, 0.55)  # of the memory that pages take at most
_FIRST_SHARES = (0.85, 0.7)  # of the memory, there
_AGAIN = 3  # times that primitives are chosen for one, within less memory each time
_LONGEST, _WIDEST = 16, 32  # blocks, in chunks
_LESS_TWICE = 1.05  # times, along another axis, for which that is tried, too
_LONGEST_COLUMN = 4096  # voxels: tables of addresses are as long
_IN_FLIGHT = 2  # blocks that memory is left for where there is enough
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
    found = [
        plan.turned(axis)
        for axis in _axes(layout)
        if (plan := _along_z(*_turned(layout, resources, axis)))
    ]
    return max(found, key=lambda plan: plan.voxels_per_second, default=None)


def _axes(layout: Layout) -> list[int]:
    """Of columns that are tried: z, and one along which less is made twice at their beginnings."""
    twice = [1 + halo_of(layout, axis) / layout.output_size[axis] for axis in range(3)]
    possible = [axis for axis in range(3) if can_be_turned(layout.network, axis)]
    best = min(possible, key=twice.__getitem__)
    return [0, best] if twice[best] * _LESS_TWICE < twice[0] else [0]


def _turned(layout: Layout, resources: Resources, axis: int) -> tuple[Layout, Resources]:
    """Both where axes 0 and ``axis`` are swapped."""
    weights_bytes = ITEM_BYTES * layout.network.parameters
    return layout.turned(axis), resources.turned(axis, weights_bytes)


def every(layout: Layout, resources: Resources) -> Iterator[Plan]:
    """Those of columns along z for every place in the space that `search` goes through, where one
    fits."""
    ways = _ways(layout, resources.device)
    for thickness, thin in product(_thicknesses(layout), _THIN):
        programs = Programs(layout, granules_of(layout, thickness, thin))
        for way, share in product(ways, _SHARES):
            found = _tried(resources, way, programs, share, in_flight=1)
            if found and (plan := _planned(resources, found.slabs, in_flight=1)):
                yield plan


def _along_z(layout: Layout, resources: Resources) -> Plan | None:
    """The fastest in columns along z."""
    for in_flight in (_IN_FLIGHT, 1):
        for slabs in _searched(layout, resources, in_flight):
            if plan := _planned(resources, slabs, in_flight):
                return plan
    return None


def _planned(resources: Resources, slabs: Slabs, in_flight: int) -> Plan | None:
    """With as many blocks in flight as fit, so many at most; None where not one does."""
    for count in range(in_flight, 0, -1):
        reading, needed_bytes = slabs.reading(count)
        need = Need(needed_bytes, slabs.computing.device_bytes)
        if resources.limit(need).over_bytes <= 0:
            return slabs.plan(count, reading, needed_bytes)
    return None


def _searched(layout: Layout, resources: Resources, in_flight: int) -> list[Slabs]:
    """Those that were tried, and fit as far as a few slabs tell: the fastest first."""
    ways, thicknesses = _ways(layout, resources.device), _thicknesses(layout)
    found: dict[_Place, _Found | None] = {}

    @cache
    def programs(thickness: int, thin: int) -> Programs:
        return Programs(layout, granules_of(layout, thickness, thin))

    def seconds(place: _Place) -> float:
        if place not in found:
            made = programs(place.thickness, place.thin)
            found[place] = _tried(resources, ways[place.way], made, place.share, in_flight)
        one = found[place]
        return inf if one is None else one.seconds

    def climbed(start: _Place) -> _Place:
        return _climb(seconds, start, [start._replace(thickness=n) for n in thicknesses])

    first = [*product(thicknesses[_FIRST] or thicknesses[-1:], _FIRST_SHARES)]
    starts = [
        min((_Place(way, thick, thin=4, share=share) for thick, share in first), key=seconds)
        for way in range(len(ways))
    ]
    best = min(map(climbed, starts), key=seconds)
    best = min(best, climbed(best._replace(thin=16)), key=seconds)
    best = climbed(_climb(seconds, best, [best._replace(thin=n) for n in _THIN]))
    _climb(seconds, best, [best._replace(share=share) for share in _SHARES])
    fitting = [one for one in found.values() if one is not None]
    return [one.slabs for one in sorted(fitting, key=lambda one: one.seconds)]


def checked(layout: Layout, resources: Resources, given: Plan) -> Plan:
    """A plan that was given back, with what it is expected to take now.

    Raises `OptionError` where it does not fit the network or the volume, `MemoryLimitError` where
    it needs more than is allowed.
    """
    check_given(resources, given)
    axis = given.axis
    if not (streams(layout) and can_be_turned(layout.network, axis)):
        raise OptionError(
            f"the plan makes columns along {AXES[axis]} slab by slab, which this run cannot"
        )
    layout, resources = _turned(layout, resources, axis)
    return _checked_along_z(layout, resources, given.turned(axis)).turned(axis)


def _checked_along_z(layout: Layout, resources: Resources, given: Plan) -> Plan:
    primitives = chosen_primitives(layout, given)
    schedules = Schedules(layout, primitives)
    if odd := set(primitives) - set(given.granules):
        raise OptionError(f"the plan does not say how many planes of {sorted(odd)[0]!r} are made")
    if len(given.stages) > 1 or any(stage.samples > 1 for stage in given.stages):
        raise OptionError(
            "the plan has several stages, or several windows at once, and here are slabs"
        )
    cut = Cut.of(given)
    if cut.in_column > 1 and (schedules.repeats > 1 or not resources.in_order):
        raise OptionError(
            f"the plan makes columns of {cut.in_column} blocks in one go, which neither goes in "
            "several passes, nor where blocks are made in any order: blocks_in_column must be 1"
        )
    slabs = Slabs(resources, schedules, cut, Programs(layout, given.granules))
    reading, needed_bytes = slabs.reading(given.blocks_in_flight)
    check_room(resources, Need(needed_bytes, slabs.computing.device_bytes))
    return slabs.plan(given.blocks_in_flight, reading, needed_bytes)


def _thicknesses(layout: Layout) -> list[int]:
    """Of slabs, in voxels."""
    unit = layout.geometry.alignment[0] if not layout.geometry.dense else layout.fragments[0]
    return [unit * n for n in _THICKNESSES if n == 1 or unit * n <= _THICKEST]


def _ways(layout: Layout, device: str) -> list[Schedules]:
    """Those of plain primitives: of all fragments at once, and where the first of them are made in
    several passes, in ever more of them; by a GPU in one pass alone."""
    if device == GPU:
        plain = Schedules(layout, choose_primitives(layout, device=GPU))
        return [plain] if plain.repeats == 1 else []
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
    resources: Resources, plain: Schedules, programs: Programs, share: float, in_flight: int
) -> _Found | None:
    """The cross-section whose pages take such a share of the memory, with the primitives that are
    fastest there; None where none fits."""
    layout, threads = programs.layout, resources.threads
    on_gpu = resources.device == GPU
    room_bytes = (1 - share) * (resources.device_bytes if on_gpu else resources.allowed_bytes)

    @cache
    def cut_of(section: tuple[int, int]) -> Cut:
        return _cut(resources, plain, programs, section)

    @cache
    def column_of(cut: Cut) -> tuple[Column, Program, int]:
        """The column of a cut, what is done in it, and the memory left for what primitives keep
        and compute in."""
        column, program = programs.of(plain, min(cut.column[0], layout.output_size[0]))
        wide = across(column, cut)
        memory = memory_of(wide, threads, program)
        left = resources.allowed_bytes - wanted_bytes(programs, resources, cut, in_flight)
        if on_gpu:
            process, device = on_device(memory)
            return wide, program, resources.device_bytes - device if process <= left else 0
        pages = memory.pages.all_bytes + memory.slab_bytes + memory.table_bytes
        return wide, program, left - pages

    sections = _sections(layout, resources)
    first = bisect_left(sections, True, key=lambda s: column_of(cut_of(s))[-1] > room_bytes)
    if first == len(sections):
        return None
    near = map(cut_of, sections[first : first + _NEAR])
    cut = min(near, key=lambda cut: computed_voxels(layout, resources, cut))
    wide, program, room = column_of(cut)
    count = times_of(layout, resources, cut)
    problems = {
        step.operation.node.name: (step.problem, count * times)
        for step, times in typical(wide, program)
        if not isinstance(step.primitive, FormChange)
    }
    menu = Menu(plain, problems, threads, resources.costs, copied_bytes)
    if resources.device == GPU_RAM:
        menu = replace(menu, lent=lent_to(menu, resources.device_bytes))
    for _ in range(_AGAIN):
        if (found := menu.best_within(room)) is None:
            return None
        seconds, primitives = found
        slabs = Slabs(resources, Schedules(layout, primitives), cut, programs)
        need = slabs.estimated_need(in_flight)
        of_process = need.process_bytes - resources.allowed_bytes
        of_device = need.device_bytes - resources.device_bytes
        over, elsewhere = (of_device, of_process) if on_gpu else (of_process, of_device)
        if elsewhere > 0:
            return None
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


def _cut(
    resources: Resources, schedules: Schedules, programs: Programs, section: tuple[int, int]
) -> Cut:
    """Blocks of a cross-section, and how many of them are a column."""
    layout, unit = programs.layout, resources.unit[0]
    hull, block = resources.hull, resources.block
    lengths = [unit * m for m in range(1, _LONGEST + 1) if unit * (m - 1) < layout.output_size[0]]
    if not resources.in_order or schedules.repeats > 1:
        return Cut(block or (_whole(resources, schedules, lengths, section), *section))
    if block is None:
        slab = thickness_of(layout, programs.granules)
        thick = [length for length in lengths if length >= slab] or lengths[-1:]
        block = next((length for length in thick if length % slab == 0), thick[0]), *section
    count = ceil_divide(hull.stop[0], block[0]) - hull.start[0] // block[0]
    return Cut(block, ceil_divide(count, ceil_divide(count * block[0], _LONGEST_COLUMN)))


def _whole(
    resources: Resources, schedules: Schedules, lengths: list[int], section: tuple[int, int]
) -> int:
    """How long blocks are that are made each for itself: as does not take a quarter of the memory,
    with the answer where that waits for the last of several passes."""
    layout = cast("Layout", schedules.layout)
    answer_bytes = ITEM_BYTES * layout.network.out_channels if schedules.repeats > 1 else 0

    def is_long(z: int) -> bool:
        largest = largest_box(layout, (z, *section))
        held = resources.block_bytes(largest.size, layout.region(largest).size, False)
        return 4 * (held + answer_bytes * largest.voxels) > resources.allowed_bytes

    return lengths[max(0, bisect_left(lengths, True, key=is_long) - 1)]


@dataclass(frozen=True, eq=False)
class _Found:
    """Slabs, and the seconds of all blocks, reading and writing not counted."""

    slabs: Slabs
    seconds: float
