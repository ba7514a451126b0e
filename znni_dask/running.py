"""The run out of core: volume in, predictions as OME-Zarr out, block by block through dask.

One task per block reads its region with halo straight from the store, computes its patches and
writes whole output chunks. The client keeps a bounded number of blocks in flight, so nothing
grows with the volume. Network and executor live on the workers, in a plugin; tasks carry the
box of their block and return its number of voxels.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Unpack

from distributed import Client

from znni_dask.application import Application
from znni_dask.asking import Options, asked
from znni_dask.cluster import Cluster, Crew, connected
from znni_dask.geometry import Size
from znni_dask.journal import Journal, forget, journal_of
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import MemoryMeter, own_bytes
from znni_dask.making import Pass, Progress, make_all
from znni_dask.network.network import Network
from znni_dask.passes import (
    PlannedPass,
    Request,
    create_outputs,
    is_complete,
    places,
    plan_pass,
    read_by,
)
from znni_dask.plan import Plan
from znni_dask.refining import refine
from znni_dask.statistics import measure
from znni_dask.storage import output as store
from znni_dask.storage.urls import Location, location
from znni_dask.storage.volume import Volume
from znni_dask.timeline import Timeline

_RECORD = "znni_run"  # of an image's metadata: what its last run took, beside what was predicted


@dataclass(frozen=True)
class Summary:
    """What a run did, on so many ``workers`` as it was planned for. ``peak_bytes`` is the
    anonymous memory that a worker took at most; of one in this process, all that this process took.
    The plan says what was promised and allowed, ``measured_bytes`` what was predicted while
    statistics were taken (0 where they were not). There are no passes where the output was complete
    before."""

    output: Location
    passes: tuple[Pass, ...]
    times: int
    seconds: float
    peak_bytes: int
    measured_bytes: int = 0
    workers: int = 1

    @property
    def plan(self) -> Plan:
        """The plan of the first pass; of a network with one output the only one."""
        return self.passes[0].plan

    @property
    def size(self) -> Size:
        """Size of the answer of the first pass."""
        return self.passes[0].size

    @property
    def blocks(self) -> int:
        """Blocks made in all, of first levels."""
        return sum(one.blocks for one in self.passes)

    @property
    def read_amplification(self) -> float:
        """How often a voxel that is needed was decoded on average; 0 where nothing was made."""
        needed = sum(one.needed_voxels for one in self.passes)
        return sum(one.decoded_voxels for one in self.passes) / needed if needed else 0.0

    @property
    def voxels_per_second(self) -> float:
        """Output voxels made per second."""
        made = sum(one.voxels for one in self.passes)
        return made / self.seconds if self.passes else 0.0


def run(
    network: str | Path | Network,
    input: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    client: Client | str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    timeline: str | Path | None = None,
    **options: Unpack[Options],
) -> Summary:
    """Apply ``network`` to the volume at ``input`` and write the answer to ``output`` as OME-Zarr.

    Parameters
    ----------
    network : an ONNX or ``.znni`` file, a `Network`, or the name of a paper's network.
    input : Zarr, OME-Zarr, TIFF stack, HDF5 (``file.h5:/dataset``) or ``.npy``, or the URL of a
        Zarr store; axes out of t, c, z, y, x. Every time point is a volume of its own.
    output : the OME-Zarr store to make, a path or a URL (``s3://bucket/out.zarr``, with
        credentials from the environment or the files of the cloud's own tools); array ``0`` is
        (z, y, x), with t and c before it where there are several. Several outputs of the network
        make a group each.
    boundary : how the volume goes on beyond its faces: ``"reflect"`` (edge not repeated),
        ``"nearest"``, ``"constant"`` (zero), or ``"valid"`` (not at all: the output is smaller).
    memory : bound on the anonymous memory of the whole process, like ``"12GiB"``; by default 80 %
        of what the machine has free.
    patch : size (z, y, x), or one number for all axes, of the output computed at once; by default
        the fastest that fits.
    threads : computing threads; by default all cores this process may use.
    device : what computes: ``"cpu"``, ``"gpu"`` (through CuPy, the extra ``cuda13`` or ``cuda12``;
        of a cluster then only workers that have one take part), ``"cpu+gpu"`` (first layers by the
        CPU, the rest by the GPU), ``"gpu+ram"`` (first layers by the GPU, of arrays that the host
        holds), or ``"auto"``: the CPU or the GPU, whatever is faster on a worker. Answers of
        different devices agree to the precision of float32.
    device_memory : bound on what is taken of a GPU's memory; by default 90 % of what is free.
    dtype : ``"float32"``, ``"float16"``, ``"uint8"`` (``value_range`` mapped to 0 … 255), or
        ``"labels"``: the number of each output's channel with the largest value.
    chunks, shards : of the output, (z, y, x).
    ome : version of OME-Zarr, ``"0.5"`` (in Zarr 3) or ``"0.4"`` (in Zarr 2, which has no shards).
    pyramid : whether coarser levels are made too, down to one of no more voxels than a chunk.
    nan : replaces NaN and infinity in the volume; without it blocks that meet them fail.
    axes : what the input's axes mean, letters of ``"tczyx"``, whatever its file says.
    channels : the input's channels that the network takes, counted from 0.
    level : which resolution of an OME-Zarr image to read, by number or path; by default the first.
    outputs : names of the network's outputs to compute; by default all.
    patchwise : size (z, y, x) of the windows to which a network that reduces over space is
        applied; the answer is approximate, and independent of blocks, memory and workers.
    overlap, weights : share of a window that its neighbour covers too, and ``"constant"`` or
        ``"gaussian"`` weights where they are averaged; as of MONAI's sliding window.
    step : distance (z, y, x) of windows of a network that makes one vector of a window.
    halo : voxels (z, y, x) that patches see beyond themselves, for a padded network whose field
        of view is needlessly large; the answer is approximate, its error is measured.
    precision : ``"float32"``, or ``"bfloat16"`` where convolutions may be computed in that (by
        PyTorch, the extra ``torch``) if it is faster; the answer is approximate, its error is
        measured.
    roi : the part of the volume that is wanted, ``"z0:z1,y0:y1,x0:x1"`` (ends may be left open)
        or three slices, in voxels of the volume. The output keeps its whole grid; what is not
        wanted is not computed, and 0.
    mask : a volume of any kind that ``input`` may be, of the same size: wanted is where it is not
        zero, and within ``roi`` where that is given too.
    normalize : ``"zscore"``, ``"percentile"`` or ``"range"``: every channel is moved and scaled by
        its mean and standard deviation, by two ``percentiles``, or by minimum and maximum, of the
        whole volume at a time point, whatever is selected of it. Nothing is clipped.
    stats_level : the level of the OME-Zarr image of which these statistics are taken instead.
    plan : a file that ``znni plan --format json`` made, or a `Plan` (one for every pass), perhaps
        edited; by default the fastest is searched. It says what ``patch`` and ``threads`` are.
    overwrite : replace an existing Zarr store at ``output`` (behind a URL only one that this has
        made), or start an unfinished run anew; otherwise the same command finishes what an
        interrupted run left.
    client : a dask client, or the address of a scheduler: what ``memory`` and ``threads`` say is
        then said of each of its workers; by default they have what dask gave them, the memory 60 %
        of their limit. Without a client one worker lives in this process.
    workers : that many processes on this machine instead, which share memory and threads.
    progress : called with the voxels done and the voxels in all, after every block.
    timeline : a file to write when every worker and its device read, copied, computed and wrote
        what, as Chrome (chrome://tracing) and Perfetto show it.

    Raises
    ------
    InputError before anything is written; `RunError` at the end where blocks failed, after all
    others were written.
    """
    asked_place = location(output)
    found = asked(network, input, **options)
    application, request, groups = found.application, found.request, found.groups
    described = _described(application, groups, request)
    if not overwrite and is_complete(application, groups, request, asked_place):
        return Summary(asked_place, (), application.volume.times, 0.0, 0)
    place, journal = _begun(asked_place, found.sources, described, overwrite)
    compile_kernels()
    with (
        nullcontext() if timeline is None else Timeline(Path(timeline)) as line,
        connected(client, workers, request.memory, request.threads, request.device) as cluster,
        MemoryMeter(measure=own_bytes) if cluster.alone else nullcontext() as meter,
    ):
        cluster.forget(place)
        crew = cluster.crew()
        begun = journal.blocks if journal else repeat(None, len(groups))
        planned = [
            plan_pass(application, names, request, crew, block, given)
            for (names, given), block in zip(request.planned(groups), begun, strict=True)
        ]
        application, measured_bytes = _normalized(
            cluster, crew, application, found.surveyed, journal
        )
        planned = read_by(application, planned, timeline is not None)
        if journal is None:
            store.clear(place)  # before its journal: what is half made never looks complete
            forget(place)
            journal = _new_journal(place, described, planned)
        with journal:
            ready = create_outputs(application, planned, request, place, journal.resumed)
            begin = time.perf_counter()
            passes = make_all(cluster, crew, ready, journal, progress, line)
            seconds = time.perf_counter() - begin
            if cluster.alone:
                refine(planned, passes)
            images = places((name for one in passes for name in one.outputs), place)
            for one in passes:
                for name in one.outputs:
                    store.note(images[name], {_RECORD: {**one.record, "seconds": seconds}})
            journal.end()
    return Summary(
        output=asked_place,
        passes=passes,
        times=application.volume.times,
        seconds=seconds,
        peak_bytes=meter.peak_bytes if meter else max(p.peak_bytes for p in passes),
        measured_bytes=measured_bytes,
        workers=len(crew.kind),
    )


def _described(
    application: Application, groups: list[tuple[str, ...]], request: Request
) -> dict[str, Any]:
    """What defines the answer and how it is stored: a run that is resumed must have it alike."""
    names = [name for group in groups for name in group]
    return {
        **application.defining,
        "chunks": request.chunks,
        "shards": request.shards,
        "ome": request.version,
        "pyramid": request.pyramid,
        "outputs": names,
        **{
            f"{key} of {name}" if len(names) > 1 else key: value
            for name in names
            for key, value in application.described(name, request.encoding).items()
        },
    }


def _normalized(
    cluster: Cluster,
    crew: Crew,
    application: Application,
    surveyed: Volume,
    journal: Journal | None,
) -> tuple[Application, int]:
    """The application on the normalised volume, if it is to be one, and the memory predicted for
    its statistics; those that a journal tells are not taken again."""
    wanted = application.normalization
    if wanted is None:
        return application, 0
    if journal is not None:
        return application.normalized(journal.known_statistics()), 0
    found = measure(cluster, crew, surveyed, application.nan, wanted)
    return application.normalized(found.statistics), found.predicted_bytes


def _new_journal(place: Location, described: dict[str, Any], planned: list[PlannedPass]) -> Journal:
    found = planned[0].job.volume.statistics
    blocks = [one.job.plan.block for one in planned]
    return Journal(journal_of(place), described, blocks, asdict(found) if found else None)


def _begun(
    output: Location, sources: list[str | Path], described: dict[str, Any], overwrite: bool
) -> tuple[Location, Journal | None]:
    """Where the output goes, and the journal of a run that was begun there and can be finished."""
    path = journal_of(output.resolve())
    if overwrite:
        return store.check_place(output, sources, overwrite), None
    journal = Journal.begun(path)
    place = store.check_place(output, sources, overwrite, begun=journal is not None)
    if journal is not None:
        journal.check(described)
    return place, journal
