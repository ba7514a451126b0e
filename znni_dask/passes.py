"""Planning a run: which outputs are made together, by which plan, and where they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from typing import Any

from znni_dask import column_planner, planner, pyramid, split_planner, timings, window_planner
from znni_dask.application import Application
from znni_dask.cluster import Crew, Means
from znni_dask.costs import Costs
from znni_dask.devices.opening import AUTO, Wanted
from znni_dask.errors import MemoryLimitError, OptionError, OutputError
from znni_dask.geometry import Size
from znni_dask.job import Job, Target
from znni_dask.journal import in_json, is_unfinished
from znni_dask.machine import CPU, GPU, GPU_RAM, SHARED
from znni_dask.network.layers import FULL
from znni_dask.plan import Alternative, Plan
from znni_dask.pyramid import Pyramid
from znni_dask.recompute import MeasuredError, measured_error
from znni_dask.resources import OVERHEAD_BYTES, Resources, network_bytes
from znni_dask.storage import output as store
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.levels import spacing
from znni_dask.storage.output import OutputLayout
from znni_dask.storage.urls import Location
from znni_dask.windows import Laid, WindowGrid

_CHUNKS = (64, 64, 64)
_CHUNKS_OF_VECTORS = (8, 8, 8)  # of a classifier, whose every voxel is a window computed
_FOUND = ("measured_error", "statistics")  # what metadata tell that was not asked for
_SMALLER = (0.5, 0.2)  # of the memory of a GPU that a plan takes
_SEARCHED_SECONDS = 30.0  # of a run: of a shorter one slabs, or two devices, are not tried
_WORTH_SHARING = 1.05  # times faster
_OF_SLABS = (CPU, GPU, GPU_RAM)  # those who compute them
_WANTED_BYTES = 2  # of a voxel: whether it is wanted, kept, and once more where that is found out


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What a run was asked for beside the answer: ``memory`` and ``threads`` if they were said, the
    ``device``; ``plans`` that were given back for its passes."""

    encoding: Encoding
    patch: Size | None
    chunks: Size | None
    shards: Size | None
    memory: str | float | None
    threads: int | None
    device: Wanted
    version: str
    pyramid: bool
    plans: tuple[Plan, ...] = ()

    def planned(
        self, groups: Sequence[tuple[str, ...]]
    ) -> Iterator[tuple[tuple[str, ...], Plan | None]]:
        """The outputs of every pass with the plan that was given for it."""
        return zip(groups, self.plans or [None] * len(groups), strict=True)


@dataclass(frozen=True, eq=False)
class PlannedPass:
    """A pass that is planned: for each of its outputs how it is stored, and the work; ``others``
    are plans that it could have been."""

    outputs: tuple[str, ...]
    stored: tuple[OutputLayout, ...]
    job: Job
    pyramid: Pyramid
    resources: Resources
    others: tuple[Alternative, ...] = ()
    measured_error: MeasuredError | None = None


def plan_pass(
    application: Application,
    names: tuple[str, ...],
    request: Request,
    crew: Crew,
    block: Size | None,
    given: Plan | None = None,
) -> PlannedPass:
    """Plan one pass for every kind of worker of a crew, or check the plan that was ``given`` for
    it; ``block`` is that of a run that is resumed."""
    means, *stronger = crew.kinds
    laid, source, encoding = application.laid(*names), application.volume, request.encoding
    selection = application.selection
    stored = tuple(layout_of(application, name, request) for name in names)
    channels = [application.laid(name).network.out_channels for name in names]

    def read_bytes(size: Size, by_cells: bool = False) -> int:
        return max(source.read_bytes(size, by_cells), selection.read_bytes(size))

    resources = Resources(
        unit=stored[0].unit,
        voxel_bytes=sum(map(encoding.voxel_bytes, channels)),
        encoding_bytes=sum(map(encoding.encoding_bytes, channels)),
        read_bytes=read_bytes,
        write_bytes=max(s.write_bytes for s in stored),
        baseline_bytes=means.baseline_bytes,
        allowed_bytes=means.allowed_bytes,
        threads=given.threads if given else means.threads,
        cells=source.cells,
        block=block,
        hull=selection.hull(laid),
        selected_bytes=0 if selection.everything else _WANTED_BYTES,
        costs=Costs(timings.kept()),
        workers=crew.workers,
    )
    whole_blocks = selection.mask is None  # of which slabs leave nothing out
    alone = "" if application.precision == FULL else f"{application.precision} is"
    alone = "windows are" if isinstance(laid, WindowGrid) else alone
    ways = _ways(resources, means, request, alone, given)
    held = resources.baseline_bytes + OVERHEAD_BYTES + network_bytes(laid.network)
    levels = partial(pyramid.plan, stored, held, means.allowed_bytes)
    try:
        plan, others = _fastest(laid, ways, request.patch, given, slabs=whole_blocks)
    except MemoryLimitError as error:
        every = [error, *_refusals(levels)]  # what is not known may be most
        raise max(every, key=lambda one: one.needed_bytes or inf) from None
    coarser = levels()
    needed = max(plan.predicted_bytes, coarser.predicted_bytes)
    plan = replace(plan, predicted_bytes=needed)
    kinds = [] if given else stronger
    more = [_for_others(laid, resources, plan, kind, request, alone) for kind in kinds]
    smaller = [_smaller(laid, resources, one, request) for one in (plan, *more)]
    job = Job(
        *(laid, source, selection, application.nan, plan, tuple(more)), smaller=tuple(smaller)
    )
    resources = next(way for way in ways if way.device == plan.device)
    return PlannedPass(names, stored, job, coarser, resources, others)


def _refusals(planned: Callable[[], object]) -> list[MemoryLimitError]:
    """Whether that is refused as well: who allows more is not to be refused again."""
    try:
        planned()
    except MemoryLimitError as error:
        return [error]
    return []


def _ways(
    resources: Resources, means: Means, request: Request, alone: str, given: Plan | None = None
) -> list[Resources]:
    """What workers may compute with: the CPU, their GPU if they have one, both of them unless
    ``alone`` says of what one of them computes all, as was asked for; or what the plan that was
    ``given`` is for. Raises `OptionError` where that is not there."""
    if given is not None and given.device != CPU and not means.device_bytes:
        raise OptionError(f"the plan is for a GPU, and there is none: {means.no_device}")
    asked = given.device if given else request.device.name
    if asked not in (AUTO, CPU) and not means.device_bytes:
        raise OptionError(f"a GPU is asked for, and there is none: {means.no_device}")
    if alone and asked in SHARED:
        raise OptionError(f"{alone} computed by the CPU or by a GPU alone, not by {asked}")
    every = (CPU, GPU, *(() if alone else SHARED)) if means.device_bytes else (CPU,)
    return [
        replace(resources, device=name, device_bytes=0 if name == CPU else means.device_bytes)
        for name in (every if asked == AUTO else (asked,))
    ]


def _fastest(
    laid: Laid,
    ways: list[Resources],
    patch: Size | None,
    given: Plan | None = None,
    slabs: bool = True,
) -> tuple[Plan, tuple[Alternative, ...]]:
    """The fastest plan of all ways, and others that it could have been; of two devices only where
    that is worth it. Raises what `plan_for` does where there is none."""
    refused: list[MemoryLimitError] = []

    def best(some: list[Resources]) -> tuple[Plan, tuple[Alternative, ...]] | None:
        found = []
        for way in some:
            try:
                found.append(plan_for(laid, way, patch, given, slabs))
            except MemoryLimitError as error:
                refused.append(error)
        return max(found, key=lambda one: one[0].voxels_per_second, default=None)

    found = best([way for way in ways if way.device not in SHARED])
    if found is None or _is_long(found[0], ways[0]):
        shared = best([way for way in ways if way.device in SHARED])
        rate = _WORTH_SHARING * found[0].voxels_per_second if found else 0.0
        found = shared if shared and shared[0].voxels_per_second > rate else found
    if found is None:
        raise refused[0]
    return found


def _for_others(
    laid: Laid, resources: Resources, plan: Plan, means: Means, request: Request, alone: str
) -> Plan:
    """The plan of workers that have more than those of a ``plan``, for the same blocks in the same
    order."""
    others = replace(
        resources,
        threads=means.threads,
        allowed_bytes=means.allowed_bytes,
        baseline_bytes=means.baseline_bytes,
        block=plan.block,
        in_order=plan.blocks_in_column > 1,
    )
    try:
        ways = _ways(others, means, request, alone)
        found, _ = _fastest(laid, ways, request.patch, slabs=bool(plan.granules))
    except MemoryLimitError:  # more threads need more of it
        return plan
    return found if _may_make_blocks_of(plan, found) else plan


def _may_make_blocks_of(plan: Plan, other: Plan) -> bool:
    """Whether blocks in columns of a plan can be made by another one: its columns are the same, or
    every block is made for itself."""
    columns = other.blocks_in_column, other.axis
    return columns in ((1, 0), (plan.blocks_in_column, plan.axis))


def _smaller(laid: Laid, resources: Resources, plan: Plan, request: Request) -> tuple[Plan, ...]:
    """Plans for the same blocks in the same order that take less and less of a GPU's memory; none
    of a plan for the CPU."""
    found = []
    for part in _SMALLER if plan.device != CPU else ():
        room = replace(
            resources,
            block=plan.block,
            threads=plan.threads,
            device=plan.device,
            device_bytes=int(part * plan.device_bytes),
            allowed_bytes=plan.allowed_bytes,
            in_order=plan.blocks_in_column > 1,
        )
        with suppress(MemoryLimitError):
            found.append(plan_for(laid, room, request.patch, slabs=bool(plan.granules))[0])
    return tuple(one for one in found if _may_make_blocks_of(plan, one))


def read_by(
    application: Application, planned: list[PlannedPass], timeline: bool
) -> list[PlannedPass]:
    """The passes with the application's volume, whose statistics are known by now, and measured
    in it what a halo of one's own, or a lower precision, costs; with a ``timeline`` if wanted."""
    return [
        replace(
            one,
            job=replace(one.job, volume=application.volume, timeline=timeline),
            measured_error=(
                measured_error(application, one.outputs, one.resources, one.job.plan)
                if application.approximate
                else None
            ),
        )
        for one in planned
    ]


def layout_of(application: Application, name: str, request: Request) -> OutputLayout:
    """How one output is stored; raises `OptionError` where it cannot be as it was asked for."""
    laid, encoding = application.laid(name), request.encoding
    channels = laid.network.out_channels
    if encoding.labels and channels == 1:
        raise OptionError(
            f"labels are numbers of channels, and output {name!r} has but one: store it as uint8 "
            "and choose a threshold later, or choose other outputs with --output NAME"
        )
    vectors = isinstance(laid, WindowGrid) and laid.classifies
    placed = application.placed(name)
    return store.output_layout(
        encoding,
        channels,
        laid.output_size,
        request.chunks or (_CHUNKS_OF_VECTORS if vectors else _CHUNKS),
        request.shards,
        times=application.volume.times,
        version=request.version,
        spacing=spacing(placed["scale"], placed["units"]) if request.pyramid else None,
    )


def places(names: Iterable[str], root: Location) -> dict[str, Location]:
    """Where the image of every output lies: at the root where it is the only one, else in a group
    of its own."""
    outputs = [*names]
    if len(outputs) == 1:
        return {outputs[0]: root}
    return {name: root / group for name, group in store.group_names(outputs).items()}


def plan_for(
    laid: Laid,
    resources: Resources,
    patch: Size | None,
    given: Plan | None = None,
    slabs: bool = True,
) -> tuple[Plan, tuple[Alternative, ...]]:
    """The plan of an answer, in patches, in slabs if those are wanted, or in windows, and others
    that it could have been; or the one that was ``given``, checked, which keeps no more of what is
    decoded than it says. Raises `MemoryLimitError`, `OptionError`."""
    if given is not None:
        resources = replace(resources, most_cache_bytes=given.reading.cache_bytes)
    if isinstance(laid, WindowGrid):
        if patch is not None:
            raise OptionError("windows are the patches of patchwise inference: give no patch")
        if given is not None:
            return window_planner.checked(laid, resources, given), ()
        return window_planner.search(laid, resources)
    asked = planner.Request(**vars(resources), layout=laid, patch=patch)
    if given is not None:
        if given.granules and resources.device not in _OF_SLABS:
            raise OptionError(
                f"slabs are computed by {' or '.join(_OF_SLABS)}, not by {resources.device}"
            )
        if given.granules:
            return column_planner.checked(laid, resources, given), ()
        return planner.checked(asked, given), ()
    slabs = slabs and patch is None and resources.device in _OF_SLABS
    try:
        in_patches, others = _in_patches(asked)
    except MemoryLimitError:
        in_slabs = column_planner.search(laid, resources) if slabs else None
        if in_slabs is None:
            raise
        return in_slabs, ()
    if not slabs or not _is_long(in_patches, resources):
        return in_patches, others
    plans = in_patches, column_planner.search(laid, resources)
    found = (plan for plan in plans if plan is not None)
    return max(found, key=lambda plan: plan.voxels_per_second), others


def _in_patches(asked: planner.Request) -> tuple[Plan, tuple[Alternative, ...]]:
    if asked.device in SHARED:
        return split_planner.search(asked), ()
    return planner.search(asked)


def _is_long(plan: Plan, resources: Resources) -> bool:
    """Whether a run takes so long that a faster plan is worth searching for."""
    return resources.hull.voxels / plan.voxels_per_second > _SEARCHED_SECONDS


def create_outputs(
    application: Application,
    planned: list[PlannedPass],
    request: Request,
    root: Location,
    resumed: bool,
) -> list[PlannedPass]:
    """The passes with the arrays that they write: one image, or a group of one for each output.
    What is there already stays, and where a run with blocks written is ``resumed``, it must be."""
    images = places((name for one in planned for name in one.outputs), root)
    if len(images) > 1:
        store.create_root(root, [place.name for place in images.values()], request.version)
    ready = []
    found = application.volume.statistics
    statistics = {} if found is None else {"statistics": asdict(found)}
    for one in planned:
        targets: list[Target] = []
        found_error = one.measured_error
        error = {"measured_error": found_error.largest} if found_error else {}
        for name, layout in zip(one.outputs, one.stored, strict=True):
            place = images[name]
            image = store.existing(place, layout)
            if image is None and resumed:
                raise OutputError(
                    f"{place} is not as the unfinished run left it, some of its arrays are missing "
                    "or others: start anew with --overwrite"
                )
            told = application.described(name, request.encoding) | error | statistics
            image = image or store.create(
                place, layout, **application.placed(name), attributes={"znni": told}
            )
            first = targets[-1].last if targets else 0
            targets.append(Target(image, layout, first, first + layout.channels))
        ready.append(replace(one, job=replace(one.job, targets=tuple(targets))))
    return ready


def is_complete(
    application: Application, groups: list[tuple[str, ...]], request: Request, output: Location
) -> bool:
    """Whether all outputs are there, made as asked for, and no run of them is unfinished."""
    if is_unfinished(output.resolve()):
        return False
    images = places((name for group in groups for name in group), output)
    return all(
        store.existing(place, layout_of(application, name, request)) is not None
        and _told(place) == in_json(application.described(name, request.encoding))
        for name, place in images.items()
    )


def _told(place: Location) -> dict[str, Any]:
    """What an image's metadata tell of how it was made, but for what was measured meanwhile."""
    found = store.description(place) or {}
    return {key: value for key, value in found.items() if key not in _FOUND}
