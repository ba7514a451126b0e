"""The planner: which patch and block, which primitive for every layer, within the memory allowed.

Arithmetic on shapes and costs only. Every candidate's memory is computed from the schedules of
the patches it would run, so what is promised is what will be allocated. Candidates are blocks of
whole output chunks, computed in one patch, and single chunks, cut into smaller patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from math import gcd
from typing import TypeVar

from znni_dask.costs import estimated_seconds
from znni_dask.errors import MemoryLimitError, NetworkError, OptionError
from znni_dask.geometry import (
    Box,
    Size,
    ceil_divide,
    hull,
    multiply,
    round_up,
    text,
    tiles,
    triple,
    volume,
)
from znni_dask.machine import show_bytes
from znni_dask.network.field_of_view import Interval
from znni_dask.network.layers import Layer
from znni_dask.patches import Layout
from znni_dask.plan import Choice, Plan, Stage
from znni_dask.primitives.base import ITEM_BYTES, Primitive
from znni_dask.primitives.table import candidates, named
from znni_dask.schedule import ALIGN, Arrangement, Schedules

OVERHEAD_BYTES = 48 << 20  # scheduler, messages and allocator slack beside what is counted
WEIGHT_COPIES = 4  # the plugin as sent, as kept by the scheduler, as received, as prepared
MOST_BLOCKS_IN_FLIGHT = 3  # one being read, one computed, one written
_WORTH_FEWER_IN_FLIGHT = 1.1  # times slower that overlapping reads and writes may make computing
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16)
_PARTS = (2, 3, 4, 6, 8, 12, 16)


C = TypeVar("C")


@dataclass(frozen=True, eq=False, kw_only=True)
class Resources:
    """What a run has, and what its reading and writing takes.

    ``unit`` is the output's chunk or shard; ``read_bytes`` the memory that reading a box of a
    size takes, ``write_bytes`` the memory that writing takes beside the values. A voxel as it is
    stored, with all outputs, takes ``voxel_bytes``, and ``encoding_bytes`` while it is encoded.
    ``baseline_bytes`` is what the process uses before it computes. ``block`` is that of a run that
    is resumed. Only the outputs within ``hull`` are made; to tell which of them are selected takes
    ``selected_bytes`` for each voxel of a block.
    """

    unit: Size
    voxel_bytes: int
    encoding_bytes: int
    read_bytes: Callable[[Size], int]
    write_bytes: int
    baseline_bytes: int
    allowed_bytes: int
    threads: int
    hull: Box
    block: Size | None = None
    selected_bytes: int = 0

    def block_bytes(self, size: Size, region: Size) -> int:
        """Memory that a block of ``size`` takes while it is in flight, its computing not counted;
        ``region`` is the size of what it reads."""
        written = self.voxel_bytes * volume(size)
        most = max(self.read_bytes(region) + written, written + self.write_bytes)
        return most + self.selected_bytes * volume(size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Request(Resources):
    """What a plan is asked for: a network laid over a volume, and perhaps the patch."""

    layout: Layout
    patch: Size | None = None


@dataclass(frozen=True)
class _Candidate:
    block: Size
    patch: Size
    seconds_per_voxel: float
    flops_per_voxel: float


def plan(request: Request) -> Plan:
    """The fastest plan that fits; raises `MemoryLimitError` where none does."""
    primitives = choose_primitives(request.layout)
    schedules = Schedules(request.layout, primitives)
    ranked = sorted(
        (_rate(request, schedules, block, patch) for block, patch in _sizes(request)),
        key=lambda c: (c.seconds_per_voxel, -volume(c.patch), -volume(c.block)),
    )
    least = cache(partial(_least_bytes, request, schedules))
    best = most_in_flight(
        lambda in_flight: _first_that_fits(request, schedules, ranked, least, in_flight),
        lambda candidate: candidate.seconds_per_voxel,
    )
    if best is None:
        smallest = min(ranked, key=lambda c: (least(c.patch), volume(c.block)))
        raise MemoryLimitError(_refusal(request, schedules, smallest))
    candidate, in_flight, needed = best
    choices = tuple(Choice(name, primitive.name) for name, primitive in primitives.items())
    return Plan(
        patch=candidate.patch,
        block=candidate.block,
        stages=(Stage("cpu", choices),),
        threads=request.threads,
        blocks_in_flight=in_flight,
        predicted_bytes=needed,
        allowed_bytes=request.allowed_bytes,
        flops_per_voxel=candidate.flops_per_voxel,
    )


def most_in_flight(
    find: Callable[[int], tuple[C, int] | None], cost: Callable[[C], float]
) -> tuple[C, int, int] | None:
    """The best candidate, the blocks in flight and the bytes it needs.

    ``find`` gives the best candidate that fits with so many blocks in flight, and its bytes. More
    in flight, which hides reading and writing, is given up only for what computes much faster.
    """
    best: tuple[C, int, int] | None = None
    for in_flight in range(MOST_BLOCKS_IN_FLIGHT, 0, -1):
        found = find(in_flight)
        if found and (best is None or cost(found[0]) * _WORTH_FEWER_IN_FLIGHT < cost(best[0])):
            best = (found[0], in_flight, found[1])
    return best


def _first_that_fits(
    request: Request,
    schedules: Schedules,
    ranked: list[_Candidate],
    least: Callable[[Size], int],
    in_flight: int,
) -> tuple[_Candidate, int] | None:
    """The best candidate within the memory allowed, and its predicted bytes.

    What one patch inside the volume needs is a lower bound that is cheap to have, so the exact
    figure, over all patches of the run, is computed only for those that pass it.
    """
    for candidate in ranked:
        if least(candidate.patch) <= request.allowed_bytes:
            needed = predicted_bytes(
                request, schedules, candidate.block, candidate.patch, in_flight
            )
            if needed <= request.allowed_bytes:
                return candidate, needed
    return None


def choose_primitives(layout: Arrangement, fragments: bool = True) -> dict[str, Primitive]:
    """For every layer the first primitive of the table that takes it.

    Fragments are for dense networks alone, and only where all branches that meet bring the same
    ones; the other strided layers of a dense network run once per offset (all of them where
    ``fragments`` is false).
    """
    chosen = {
        node.name: _first(node.layer, fragments and node.name in layout.strided)
        for node in layout.network
        if node.inputs
    }
    if fragments and not Schedules(layout, chosen).joins_agree:
        return choose_primitives(layout, fragments=False)
    return chosen


def chosen_primitives(layout: Arrangement, plan: Plan) -> dict[str, Primitive]:
    """The primitives that a plan names; raises `OptionError` where it does not fit the network."""
    names = plan.primitives
    layers = {node.name: node.layer for node in layout.network if node.inputs}
    if set(names) != set(layers):
        odd = sorted(set(names) ^ set(layers))[0]
        raise OptionError(f"the plan is for another network: they differ in layer {odd!r}")
    unknown = [n for n in layers if all(p.name != names[n] for p in candidates(layers[n]))]
    if unknown:
        raise OptionError(f"the plan's primitive {names[unknown[0]]!r} cannot take {unknown[0]!r}")
    chosen = {name: named(names[name], layer) for name, layer in layers.items()}
    for name, primitive in chosen.items():
        if primitive.fragments and name not in layout.strided:
            raise OptionError(
                f"the plan makes fragments in {name!r}, which is not of a dense network"
            )
    if not Schedules(layout, chosen).joins_agree:
        raise OptionError("the plan's fragments do not fit where branches of the network meet")
    return chosen


def predicted_bytes(
    request: Request, schedules: Schedules, block: Size, patch: Size, in_flight: int
) -> int:
    """Peak memory of the whole process for this block and patch."""
    sizes = schedules.envelope(spans(request.layout, block, patch))
    largest = _largest_box(request.layout, block)
    region = region_of(request.layout, largest, patch)
    per_block = request.block_bytes(largest.size, region.size)
    encoded = request.encoding_bytes * volume(patch)
    return _computing_bytes(request, schedules, sizes, patch) + encoded + in_flight * per_block


def _least_bytes(request: Request, schedules: Schedules, patch: Size) -> int:
    """Memory of the process that one patch inside the volume takes, blocks not counted."""
    sizes = schedules.sizes(_largest_box(request.layout, patch))
    return _computing_bytes(request, schedules, sizes, patch)


def _computing_bytes(
    request: Request, schedules: Schedules, sizes: Mapping[str, Size], patch: Size
) -> int:
    """Memory of the process while it computes a patch, blocks in flight not counted."""
    return request.baseline_bytes + computing_bytes(schedules, sizes, patch, request.threads)


def computing_bytes(
    schedules: Schedules, sizes: Mapping[str, Size], patch: Size, threads: int
) -> int:
    """Memory that computing one patch takes, and what the network takes all the time."""
    network = schedules.layout.network
    return (
        OVERHEAD_BYTES
        + WEIGHT_COPIES * ITEM_BYTES * network.parameters
        + schedules.arena(sizes).bytes
        + ALIGN
        + schedules.workspace_bytes(sizes, threads)
        + ITEM_BYTES * network.out_channels * volume(patch)
    )


def patches_of(block: Box, patch: Size) -> Iterator[Box]:
    """The patches of one block, covering it exactly once."""
    for box in tiles(block.size, patch):
        yield box.shifted(block.start)


def region_of(layout: Layout, block: Box, patch: Size) -> Box:
    """The box of the volume behind the patches of a block. It may be larger than that behind the
    block as one patch: each patch of a dense network is computed in whole fragments."""
    along = [
        [(start, min(start + p, last)) for start in range(first, last, p)]
        for first, last, p in zip(block.start, block.stop, patch, strict=True)
    ]
    diagonal = [
        [spans[min(number, len(spans) - 1)] for spans in along]
        for number in range(max(len(spans) for spans in along))
    ]
    return hull(
        layout.region(Box(triple(a for a, _ in ends), triple(b for _, b in ends)))
        for ends in diagonal
    )


def spans(layout: Layout, block: Size, patch: Size) -> list[list[Interval]]:
    """Along every axis the extents (start, stop) of the patches of a run; of blocks that lie
    alike, far from both ends of the answer, a few stand for all."""
    found: list[list[Interval]] = []
    for axis, n in enumerate(layout.output_size):
        period = layout.periods[axis]
        few = ceil_divide(layout.reaches[axis], block[axis]) + period // gcd(period, block[axis])
        starts = range(0, n, block[axis])
        chosen = sorted({*starts[: few + 1], *starts[-few - 1 :]})
        found.append(
            [
                (start, min(start + patch[axis], first + block[axis], n))
                for first in chosen
                for start in range(first, min(first + block[axis], n), patch[axis])
            ]
        )
    return found


def _largest_box(layout: Layout, block: Size) -> Box:
    """A block in the middle of the answer, clipped to it."""
    size = triple(min(b, n) for b, n in zip(block, layout.output_size, strict=True))
    start = triple(
        min(n // 2 // s * s, n - s) for n, s in zip(layout.output_size, size, strict=True)
    )
    return Box(start, triple(a + s for a, s in zip(start, size, strict=True)))


def _sizes(request: Request) -> list[tuple[Size, Size]]:
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


def _rate(request: Request, schedules: Schedules, block: Size, patch: Size) -> _Candidate:
    box = _largest_box(request.layout, patch)
    steps = schedules.steps(schedules.sizes(box))
    seconds = schedules.repeats * estimated_seconds(steps, request.threads)
    flops = schedules.repeats * sum(s.primitive.flops(s.problem) for s in steps)
    # patches at the ragged end make fewer voxels, but cost nearly as much; so do those that are
    # wanted in part
    used = 1.0
    for axis, (n, b) in enumerate(zip(request.layout.output_size, block, strict=True)):
        start, stop = request.hull.start[axis], request.hull.stop[axis]
        used *= n / (ceil_divide(n, b) * min(b, n))
        used *= (stop - start) / min(_made(start, stop, b, box.size[axis]), n)
    return _Candidate(
        block,
        patch,
        seconds / (box.voxels * used),
        flops / box.voxels,
    )


def _made(start: int, stop: int, block: int, patch: int) -> int:
    """Outputs along an axis in the patches that touch ``[start, stop)``, were all of them whole.

    >>> _made(60, 70, 64, 16)
    32
    """

    def number(output: int) -> int:
        """Of the patch that holds an output."""
        return output // block * ceil_divide(block, patch) + output % block // patch

    return (number(stop - 1) - number(start) + 1) * patch


def _refusal(request: Request, schedules: Schedules, smallest: _Candidate) -> str:
    sizes = schedules.sizes(_largest_box(request.layout, smallest.patch))
    layer = schedules.largest_layer(sizes)
    needed = predicted_bytes(request, schedules, smallest.block, smallest.patch, 1)
    remedy = f"allow at least {show_bytes(needed)}"
    if request.patch is not None:
        remedy += ", or a smaller patch"
    elif volume(request.unit) > 32**3:
        remedy += ", or choose smaller chunks for the output"
    return (
        f"no plan fits {show_bytes(request.allowed_bytes)}: the smallest patch "
        f"(output {text(smallest.patch)}, in blocks of {text(smallest.block)}) needs "
        f"{show_bytes(needed)}, of which {show_bytes(request.baseline_bytes)} the process already "
        f"uses; its largest layer is {layer!r} ({request.layout.network[layer].layer.kind}). "
        f"To go on, {remedy}"
    )


def _first(layer: Layer, fragment: bool) -> Primitive:
    found = candidates(layer)
    if not found:
        raise NetworkError(f"no primitive computes {layer.kind} ({layer.summary})")
    fitting = [p for p in found if p.fragments == fragment] or [p for p in found if not p.fragments]
    return fitting[0]
