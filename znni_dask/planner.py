"""The planner: which patch and block, which primitive for every layer, within the memory allowed.

Arithmetic on shapes and costs only. Every candidate's memory is computed from the schedules of
the patches it would run, so what is promised is what will be allocated. Candidates are blocks of
whole output chunks, computed in one patch, and single chunks, cut into smaller patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, log, prod

from znni_dask.choices import Menu, Work, choose_primitives, schedules_of
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.geometry import Size, ceil_divide, multiply, round_up, text, triple, volume
from znni_dask.machine import show_bytes
from znni_dask.patches import Layout, largest_box, region_of, spans
from znni_dask.plan import Alternative, Plan, Reading
from znni_dask.reading import Reads
from znni_dask.resources import (
    Need,
    Resources,
    check_given,
    check_room,
    most_in_flight,
    moving_seconds,
    shared_reading,
)
from znni_dask.schedule import Schedules
from znni_dask.shares import flops_of, need_of, seconds_of, stages_of

_ABOUT_AS_FAST = 1.05  # times slower that computing may become
_SEVERAL_BLOCKS = 8  # so that reading and computing overlap, and little is lost where a run ends
_LITTLE_READ_AGAIN = 1.2  # amplification not worth a slower plan
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16)
_PARTS = (2, 3, 4, 6, 8, 12, 16)
_EDGES = (8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512)  # of patches for which
# primitives are chosen
_NEAR = 8**0.25  # times as many voxels
_TRIED = 12  # pairs of about the same size
Pair = tuple[Size, Size]  # a block and its patches


@dataclass(frozen=True, eq=False, kw_only=True)
class Request(Resources):
    """What a plan is asked for: a network laid over a volume, and perhaps the patch."""

    layout: Layout
    patch: Size | None = None


@dataclass(frozen=True)
class _Candidate:
    """A block, its patch, and seconds for a voxel; of these ``hidden`` ones are not seen only as
    long as several blocks are in flight."""

    block: Size
    patch: Size
    seconds_per_voxel: float
    hidden_seconds: float = 0.0


def plan(request: Request) -> Plan:
    """The fastest plan that fits; raises `MemoryLimitError` where none does."""
    return search(request)[0]


def search(request: Request) -> tuple[Plan, tuple[Alternative, ...]]:
    """The fastest plan that fits, and others, from small patches to large ones; raises
    `MemoryLimitError` where none fits.

    Of patches of about the same size those are tried that read least beyond what they make, with
    the primitives that are fastest for a cube of that size, and with the plain ones, which need
    least memory; of the best patch those that are fastest for itself. Where none fits the plain
    primitives are tried with every patch.
    """
    sizes = _sizes(request)
    primitives = choose_primitives(request.layout, device=request.device)
    plain = Fits(request, Schedules(request.layout, primitives))
    fast = list(_fast(plain, sizes))
    tried = [(fits, near) for near, own, _ in fast for fits in (plain, own) if fits is not None]
    found = [best for fits, some in tried if (best := best_of(fits, some)) is not None]
    if not found and (least := best_of(plain, sizes)) is not None:
        found.append(least)
    if not found:
        raise _refusal(plain, sizes)
    _, fit, _ = preferred(found)
    pair = fit.candidate.block, fit.candidate.patch
    fits, _ = _fastest(plain, *pair)
    if fits is not None and (best := best_of(fits, [pair])) is not None:
        found.append(best)
    return told(*preferred(found)), tuple(alternative for *_, alternative in fast)


def checked(request: Request, given: Plan) -> Plan:
    """A plan that was given back, with what it is expected to take now.

    Raises `OptionError` where it does not fit the network or the volume, `MemoryLimitError` where
    it needs more than is allowed.
    """
    check_given(request, given)
    block, patch, in_flight = given.block, given.patch, given.blocks_in_flight
    if any(not 1 <= p <= b for p, b in zip(patch, block, strict=True)):
        raise OptionError(f"the plan's patch {text(patch)} is none of its block {text(block)}")
    if given.stages[0].samples > 1:
        raise OptionError("the plan computes several windows at once, and here are patches")
    fits = Fits(request, schedules_of(request.layout, given))
    candidate = _rate(request, fits.schedules, block, patch)
    check_room(request, predicted_need(request, fits.schedules, block, patch, in_flight))
    return told(fits, fits.with_reading(candidate, in_flight), in_flight)


def told(fits: Fits, fit: _Fit, in_flight: int) -> Plan:
    """The plan as a value."""
    request = fits.request
    sizes = fits.schedules.sizes(largest_box(request.layout, fit.candidate.patch))
    voxels = useful_voxels(request, fit.candidate.block, fit.candidate.patch)
    return Plan(
        patch=fit.candidate.patch,
        block=fit.candidate.block,
        stages=stages_of(request, fits.schedules, sizes, fit.candidate.patch, voxels),
        threads=request.threads,
        blocks_in_flight=in_flight,
        reading=fit.reading,
        predicted_bytes=fit.need.process_bytes,
        allowed_bytes=request.allowed_bytes,
        flops_per_voxel=_flops_per_voxel(fits, fit.candidate.patch),
        voxels_per_second=1 / fit.candidate.seconds_per_voxel,
        device_bytes=fit.need.device_bytes,
        allowed_device_bytes=request.device_bytes or 0,
    )


Found = tuple["Fits", "_Fit", int]  # what fits, the best of it, and its blocks in flight


def cubes(request: Request) -> Iterator[Pair]:
    """Of patches of about the same size those that are nearest to cubes, from small to large."""
    sizes = _sizes(request)
    for edge in _EDGES:
        if near := _near(edge, sizes):
            yield _cube(edge, near)


def _near(edge: int, sizes: list[Pair]) -> list[Pair]:
    return [s for s in sizes if edge**3 / _NEAR <= volume(s[1]) < edge**3 * _NEAR]


def _cube(edge: int, near: list[Pair]) -> Pair:
    return min(near, key=lambda s: sum(abs(log(n / edge)) for n in s[1]))


def preferred(found: list[Found]) -> Found:
    """Of those that are about as fast as the fastest the one that is best otherwise."""
    limit = _ABOUT_AS_FAST * min(fit.candidate.seconds_per_voxel for _, fit, _ in found)
    about_as_fast = [f for f in found if f[1].candidate.seconds_per_voxel <= limit]
    return min(about_as_fast, key=lambda f: (f[0].worse(f[1]), f[1].candidate.seconds_per_voxel))


def _fast(plain: Fits, sizes: list[Pair]) -> Iterator[tuple[list[Pair], Fits | None, Alternative]]:
    """For patches of some sizes the pairs that read least beyond what they make, what is fastest
    for about a cube of that size, and what that would be like."""
    request, layout = plain.request, plain.request.layout
    lengths = [
        {n: _read_length(layout, axis, n) for n in {patch[axis] for _, patch in sizes}}
        for axis in range(3)
    ]

    def read_again(pair: Pair) -> float:
        read = prod(lengths[axis][n] for axis, n in enumerate(pair[1]))
        return read / useful_voxels(request, *pair)

    for edge in _EDGES:
        if near := _near(edge, sizes):
            cube = _cube(edge, near)
            few = sorted(near, key=read_again)[:_TRIED]
            yield list(dict.fromkeys([cube, *few])), *_fastest(plain, *cube)


def _fastest(plain: Fits, block: Size, patch: Size) -> tuple[Fits | None, Alternative]:
    """The primitives that are fastest for a patch within the memory that it leaves them, None where
    there are none or these are the plain ones; and what it would be like were there memory
    enough."""
    request = plain.request
    box = largest_box(request.layout, patch)
    patches = request.hull.voxels / box.voxels
    assert isinstance(plain.schedules, Schedules)
    menu = Menu.of_patches(plain.schedules, box, patches, request.threads, request.costs)
    schedules = Schedules(request.layout, menu.fastest())
    need = predicted_need(request, schedules, block, patch, 1)
    rate = 1 / _rate(request, schedules, block, patch).seconds_per_voxel
    alternative = Alternative(patch, block, 1, rate, need.process_bytes)
    if (over := request.limit(need).over_bytes) > 0:
        spent = schedules.spent_bytes(schedules.sizes(box), request.threads)
        primitives = menu.fastest_within(spent - over)
        if primitives is None:
            return None, alternative
        schedules = Schedules(request.layout, primitives)
    plainly = schedules.primitives == plain.schedules.primitives
    return None if plainly else Fits(request, schedules), alternative


def best_of(fits: Fits, sizes: list[Pair]) -> Found | None:
    """The best block and patch with some primitives, and the blocks in flight."""
    ranked = sorted(
        (_rate(fits.request, fits.schedules, block, patch) for block, patch in sizes),
        key=lambda c: (c.seconds_per_voxel, -volume(c.patch), -volume(c.block)),
    )
    best = most_in_flight(
        lambda in_flight: fits.best(ranked, in_flight),
        lambda fit: fit.candidate.seconds_per_voxel,
    )
    return None if best is None else (fits, *best)


@dataclass(frozen=True)
class _Fit:
    """A candidate that fits, how its blocks share reading, and the memory that it needs."""

    candidate: _Candidate
    reading: Reading
    need: Need


@dataclass(frozen=True, eq=False)
class Fits:
    """What fits within the memory allowed, and the best of it."""

    request: Request
    schedules: Work
    _least: dict[Size, Need] = field(default_factory=dict)
    _reads: dict[Size, Reads] = field(default_factory=dict)

    def best(self, ranked: list[_Candidate], in_flight: int) -> _Fit | None:
        """Of the candidates that compute about as fast as the fastest that fits, the one that
        makes several blocks, and decodes little twice."""
        found: dict[Size, _Fit] = {}
        limit = inf
        for candidate in ranked:
            if candidate.seconds_per_voxel > limit:
                break
            if candidate.block not in found and self._fits(candidate, in_flight):
                fit = found[candidate.block] = self.with_reading(candidate, in_flight)
                limit = min(limit, _ABOUT_AS_FAST * fit.candidate.seconds_per_voxel)
        fits = [f for f in found.values() if f.candidate.seconds_per_voxel <= limit]
        return min(fits, key=self.worse, default=None)

    def worse(self, fit: _Fit) -> tuple[bool, float, int]:
        """What makes one of two plans that are about as fast the worse."""
        blocks = volume(self._reads[fit.candidate.block].blocks)
        several = min(blocks, _SEVERAL_BLOCKS)
        read = max(fit.reading.amplification, _LITTLE_READ_AGAIN)
        return several < _SEVERAL_BLOCKS, read, -several

    def _fits(self, candidate: _Candidate, in_flight: int) -> bool:
        """What one patch inside the volume needs is a lower bound that is cheap to have, so the
        exact figure, over all patches of the run, is computed only for those that pass it."""
        limit = self.request.limit
        if limit(self.least(candidate.patch)).over_bytes > 0:
            return False
        return limit(self._need(candidate, in_flight, by_cells=False)).over_bytes <= 0

    def least(self, patch: Size) -> Need:
        """Memory that one patch inside the volume takes, blocks not counted."""
        if patch not in self._least:
            sizes = self.schedules.sizes(largest_box(self.request.layout, patch))
            self._least[patch] = need_of(self.request, self.schedules, sizes, patch)
        return self._least[patch]

    def _need(self, candidate: _Candidate, in_flight: int, by_cells: bool) -> Need:
        block, patch = candidate.block, candidate.patch
        return predicted_need(self.request, self.schedules, block, patch, in_flight, by_cells)

    def with_reading(self, candidate: _Candidate, in_flight: int) -> _Fit:
        """A candidate with the order of its blocks, and the memory that it needs; its seconds with
        those of decoding more than once, and of touching that memory."""
        block = candidate.block
        if block not in self._reads:
            request = self.request
            self._reads[block] = Reads(request.layout, block, request.cells, request.hull)
        by_cells, directly = (self._need(candidate, in_flight, cells) for cells in (True, False))
        needed = {True: by_cells.process_bytes, False: directly.process_bytes}
        reading, nbytes = shared_reading(self.request, self._reads[block], needed.__getitem__)
        again = moving_seconds(self.request.layout, self.request, reading.amplification - 1, 0)
        once = again + self.request.touching_seconds(nbytes) / self.request.hull.voxels
        once += candidate.hidden_seconds if in_flight == 1 else 0.0
        slower = replace(candidate, seconds_per_voxel=candidate.seconds_per_voxel + once)
        return _Fit(slower, reading, Need(nbytes, directly.device_bytes))


def predicted_need(
    request: Request,
    schedules: Work,
    block: Size,
    patch: Size,
    in_flight: int,
    by_cells: bool = False,
) -> Need:
    """Peak memory for this block and patch, cells that are kept apart."""
    sizes = schedules.envelope(spans(request.layout, block, patch))
    largest = largest_box(request.layout, block)
    region = region_of(request.layout, largest, patch)
    per_block = request.block_bytes(largest.size, region.size, by_cells)
    encoded = request.encoding_bytes * volume(patch)
    computing = need_of(request, schedules, sizes, patch)
    return computing.plus(request.answers * encoded + in_flight * per_block)


def _sizes(request: Request) -> list[Pair]:
    """Pairs (block, patch) to consider."""
    layout, unit = request.layout, request.unit
    if request.patch is not None:
        if min(request.patch) < 1:
            raise OptionError(f"patch {text(request.patch)} must be positive")
        patch = triple(min(p, n) for p, n in zip(request.patch, layout.output_size, strict=True))
        block = request.block or triple(round_up(p, u) for p, u in zip(patch, unit, strict=True))
        return [(block, triple(min(p, b) for p, b in zip(patch, block, strict=True)))]
    granules = multiply(layout.fragments, layout.periods)
    if request.block is None:
        per_axis = [
            _axis_sizes(n, u, granule)
            for n, u, granule in zip(layout.output_size, unit, granules, strict=True)
        ]
    else:
        per_axis = [
            [(b, patch) for patch in {min(b, n), *_parts(min(b, n), granule)}]
            for n, b, granule in zip(layout.output_size, request.block, granules, strict=True)
        ]
    return [
        (triple(b for b, _ in chosen), triple(p for _, p in chosen))
        for chosen in product(*per_axis)
    ]


def _axis_sizes(n: int, unit: int, granule: int) -> list[tuple[int, int]]:
    """(block, patch) along one axis: whole chunks at once, or one chunk in parts."""
    found = {(unit * m, min(unit * m, n)) for m in MULTIPLES if unit * (m - 1) < n}
    return sorted(found | {(unit, part) for part in _parts(min(unit, n), granule)})


def _parts(length: int, granule: int) -> set[int]:
    """Lengths of patches that a block may be cut into."""
    parts = {min(round_up(ceil_divide(length, k), granule), length) for k in _PARTS}
    return parts | {min(granule, length)}


def _read_length(layout: Layout, axis: int, length: int) -> int:
    """Voxels of the volume along an axis behind so many outputs in its middle."""
    start = (layout.output_size[axis] - length) // 2
    begin, end = layout.reach(axis, start, start + length)
    return end - begin


def _rate(request: Request, work: Work, block: Size, patch: Size) -> _Candidate:
    voxels = useful_voxels(request, block, patch)
    sizes = work.sizes(largest_box(request.layout, patch))
    seconds = seconds_of(request, work, sizes, patch, request.hull.voxels / voxels)
    moving = moving_seconds(request.layout, request, 1, 1)
    working = request.together(seconds.under_way / voxels, moving)
    waiting, alone = request.waiting(block), seconds.alone / voxels + moving
    return _Candidate(block, patch, waiting * working, waiting * (alone - working))


def useful_voxels(request: Request, block: Size, patch: Size) -> float:
    """The wanted outputs of a patch, in the mean over a run: patches at the ragged end make fewer,
    and so do those that are wanted in part, but cost nearly as much."""
    hull, size = request.hull, request.layout.output_size
    patches = (
        _patches(start, stop, b, min(p, n))
        for start, stop, b, p, n in zip(hull.start, hull.stop, block, patch, size, strict=True)
    )
    return hull.voxels / prod(patches)


def _flops_per_voxel(fits: Fits, patch: Size) -> float:
    """Operations for an output of a patch inside the volume."""
    box = largest_box(fits.request.layout, patch)
    return flops_of(fits.schedules, fits.schedules.sizes(box)) / box.voxels


def _patches(start: int, stop: int, block: int, patch: int) -> int:
    """How many patches of blocks touch ``[start, stop)`` along an axis.

    >>> _patches(60, 70, 64, 16)
    2
    """

    def number(output: int) -> int:
        """Of the patch that holds an output."""
        return output // block * ceil_divide(block, patch) + output % block // patch

    return number(stop - 1) - number(start) + 1


def _refusal(fits: Fits, sizes: list[Pair]) -> MemoryLimitError:
    request, schedules = fits.request, fits.schedules
    block, patch = min(
        sizes, key=lambda s: (request.limit(fits.least(s[1])).over_bytes, volume(s[0]))
    )
    layer = schedules.largest_layer(schedules.sizes(largest_box(request.layout, patch)))
    limit = request.limit(predicted_need(request, schedules, block, patch, 1))
    needed = show_bytes(limit.needed_bytes, enough=True)
    remedy = f"allow at least {needed}{limit.where}"
    if request.patch is not None:
        remedy += ", or a smaller patch"
    elif volume(request.unit) > 32**3:
        remedy += ", or choose smaller chunks for the output"
    used = f", of which {show_bytes(request.baseline_bytes)} the process already uses"
    return limit.refusal(
        f"no plan fits {show_bytes(limit.allowed_bytes)}{limit.where}: the smallest patch "
        f"(output {text(patch)}, in blocks of {text(block)}) needs "
        f"{needed}{'' if limit.where else used}; its largest layer is "
        f"{layer!r} ({request.layout.network[layer].layer.kind}). To go on, {remedy}"
    )
