"""Planning a run: which outputs are made together, by which plan, and where they are stored."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from znni_dask import planner, window_planner
from znni_dask.application import Application
from znni_dask.errors import OptionError
from znni_dask.geometry import Size
from znni_dask.job import Job, Target
from znni_dask.journal import journal_of
from znni_dask.machine import anonymous_bytes
from znni_dask.recompute import HaloError, halo_error
from znni_dask.storage import output as store
from znni_dask.storage.output import Encoding, OutputLayout
from znni_dask.windows import WindowGrid

_CHUNKS = (64, 64, 64)
_CHUNKS_OF_VECTORS = (8, 8, 8)  # of a classifier, whose every voxel is a window computed


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What a run was asked for beside the answer."""

    encoding: Encoding
    patch: Size | None
    chunks: Size | None
    shards: Size | None
    allowed_bytes: int
    threads: int


@dataclass(frozen=True, eq=False)
class PlannedPass:
    """A pass that is planned: for each of its outputs how it is stored, and the work."""

    outputs: tuple[str, ...]
    stored: tuple[OutputLayout, ...]
    job: Job
    halo_error: HaloError | None


def plan_pass(
    application: Application, names: tuple[str, ...], request: Request, block: Size | None
) -> PlannedPass:
    """Plan one pass; ``block`` is that of a run that is resumed."""
    laid, source = application.laid(*names), application.volume
    vectors = isinstance(laid, WindowGrid) and laid.classifies
    stored = tuple(
        store.output_layout(
            application.laid(name).network.out_channels,
            laid.output_size,
            request.chunks,
            request.shards,
            source.times,
            _CHUNKS_OF_VECTORS if vectors else _CHUNKS,
        )
        for name in names
    )
    resources = planner.Resources(
        unit=stored[0].unit,
        item_bytes=request.encoding.item_bytes,
        read_bytes=source.read_bytes,
        write_bytes=max(s.write_bytes(request.encoding.item_bytes) for s in stored),
        baseline_bytes=anonymous_bytes(),
        allowed_bytes=request.allowed_bytes,
        threads=request.threads,
        block=block,
    )
    if isinstance(laid, WindowGrid):
        if request.patch is not None:
            raise OptionError("windows are the patches of patchwise inference: give no patch")
        plan = window_planner.plan(laid, resources)
    else:
        plan = planner.plan(planner.Request(**vars(resources), layout=laid, patch=request.patch))
    error = None
    if application.halo is not None:
        error = halo_error(application, names, resources, plan)
    return PlannedPass(
        names, stored, Job(laid, source, application.nan, request.encoding, plan), error
    )


def create_outputs(
    application: Application, planned: list[PlannedPass], encoding: Encoding, place: Path
) -> list[PlannedPass]:
    """The passes with the arrays that they write: one image, or a group of one for each output.
    What is there already, of a run that is resumed, stays."""
    names = [name for one in planned for name in one.outputs]
    groups = store.group_names(names) if len(names) > 1 else {}
    if groups:
        store.create_root(place, list(groups.values()))
    ready = []
    for one in planned:
        targets: list[Target] = []
        error = {"halo_error": one.halo_error.largest} if one.halo_error else {}
        for name, layout in zip(one.outputs, one.stored, strict=True):
            array = store.create(
                place / groups[name] if groups else place,
                layout,
                encoding,
                **application.placed(name),
                attributes={"znni": application.described(name, encoding) | error},
            )
            first = targets[-1].last if targets else 0
            targets.append(Target(array, first, first + layout.channels))
        ready.append(replace(one, job=replace(one.job, targets=tuple(targets))))
    return ready


def is_complete(
    application: Application, groups: list[tuple[str, ...]], encoding: Encoding, output: Path
) -> bool:
    """Whether all outputs are there, made as asked for, and no run of them is unfinished."""
    names = [name for group in groups for name in group]
    if journal_of(output.resolve()).exists():
        return False
    places = store.group_names(names) if len(names) > 1 else dict.fromkeys(names, "")
    for name in names:
        found = store.description(output / places[name])
        asked = json.loads(json.dumps(application.described(name, encoding)))
        if found is None or asked != {k: v for k, v in found.items() if k != "halo_error"}:
            return False
    return True
