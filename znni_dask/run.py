"""The run out of core: volume in, predictions as OME-Zarr out, block by block through dask.

One task per block reads its region with halo straight from the store, computes its patches and
writes whole output chunks. The client keeps a bounded number of blocks in flight, so nothing
grows with the volume. Network and executor live on the workers, in a plugin; tasks carry the
box of their block and return its number of voxels.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import dask
import numpy as np
from distributed import Client, as_completed

from znni_dask import planner, window_planner
from znni_dask.application import Application
from znni_dask.errors import OptionError, RunError
from znni_dask.geometry import Box, Size, triple, volume
from znni_dask.importers import load_network
from znni_dask.job import BlockMaker, Job, Target, make_block
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import MemoryMeter, anonymous_bytes, available_bytes, cores, parse_bytes
from znni_dask.network.network import Network
from znni_dask.plan import Plan
from znni_dask.recompute import HaloError, halo_error
from znni_dask.storage import output as store
from znni_dask.storage.output import Encoding, OutputLayout
from znni_dask.storage.volume import open_volume
from znni_dask.windows import Patchwise, WindowGrid

Progress = Callable[[int, int], None]
_SHOWN_FAILURES = 3
_LOOPBACK = "127.0.0.1:0"  # distributed's web servers listen to all the world unless told
_SHARE_OF_FREE = 0.8  # of the free memory, when no limit is given
_CHUNKS = (64, 64, 64)
_CHUNKS_OF_VECTORS = (8, 8, 8)  # of a classifier, whose every voxel is a window computed


@dataclass(frozen=True)
class Pass:
    """One pass over the volume: the network's outputs made in it, and how."""

    outputs: tuple[str, ...]
    size: Size
    channels: int
    blocks: int
    plan: Plan
    halo_error: HaloError | None = None


@dataclass(frozen=True)
class Summary:
    """What a run did. ``peak_bytes`` is the anonymous memory of this process and its children,
    measured while it ran; the plan says what was promised and allowed."""

    output: Path
    passes: tuple[Pass, ...]
    times: int
    seconds: float
    peak_bytes: int

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
        """Blocks made in all."""
        return sum(one.blocks for one in self.passes)

    @property
    def voxels_per_second(self) -> float:
        """Output voxels per second."""
        return self.times * sum(volume(one.size) for one in self.passes) / self.seconds


def run(
    network: str | Path | Network,
    input: str | Path,
    output: str | Path,
    *,
    boundary: str = "reflect",
    memory: str | float | None = None,
    patch: Size | int | None = None,
    threads: int | None = None,
    dtype: str = "float32",
    value_range: tuple[float, float] = (0.0, 1.0),
    chunks: Size | int | None = None,
    shards: Size | int | None = None,
    nan: float | None = None,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    outputs: Sequence[str] | None = None,
    patchwise: Size | int | None = None,
    overlap: float = 0.5,
    weights: str = "constant",
    step: Size | int | None = None,
    halo: Size | int | None = None,
    overwrite: bool = False,
    client: Client | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Apply ``network`` to the volume at ``input`` and write the answer to ``output`` as OME-Zarr.

    Parameters
    ----------
    network : an ONNX or ``.znni`` file, a `Network`, or the name of a paper's network.
    input : Zarr, OME-Zarr, TIFF stack or ``.npy``; axes out of t, c, z, y, x. Every time point is
        a volume of its own.
    output : the OME-Zarr 0.5 store to make; array ``0`` is (z, y, x), with t and c before it where
        there are several. Several outputs of the network make a group each.
    boundary : how the volume goes on beyond its faces: ``"reflect"`` (edge not repeated),
        ``"nearest"``, ``"constant"`` (zero), or ``"valid"`` (not at all: the output is smaller).
    memory : bound on the anonymous memory of the whole process, like ``"12GiB"``; by default 80 %
        of what the machine has free.
    patch : size (z, y, x), or one number for all axes, of the output computed at once; by default
        the fastest that fits.
    threads : computing threads; by default all cores this process may use.
    dtype : ``"float32"``, ``"float16"`` or ``"uint8"`` (``value_range`` mapped to 0 … 255).
    chunks, shards : of the output, (z, y, x).
    nan : replaces NaN and infinity in the volume; without it blocks that meet them fail.
    axes : what the input's axes mean, letters of ``"tczyx"``, whatever its file says.
    channels : the input's channels that the network takes, counted from 0.
    outputs : names of the network's outputs to compute; by default all.
    patchwise : size (z, y, x) of the windows to which a network that reduces over space is
        applied; the answer is approximate, and independent of blocks, memory and workers.
    overlap, weights : share of a window that its neighbour covers too, and ``"constant"`` or
        ``"gaussian"`` weights where they are averaged; as of MONAI's sliding window.
    step : distance (z, y, x) of windows of a network that makes one vector of a window.
    halo : voxels (z, y, x) that patches see beyond themselves, for a padded network whose field
        of view is needlessly large; the answer is approximate, its error is measured.
    overwrite : replace an existing Zarr store at ``output``.
    client : a dask client; by default an in-process one, closed afterwards.
    progress : called with the voxels done and the voxels in all, after every block.

    Raises
    ------
    InputError before anything is written; `RunError` at the end where blocks failed, after all
    others were written.
    """
    if nan is not None and not np.isfinite(nan):
        raise OptionError(f"nan={nan} replaces NaN by what is no number: give a finite value")
    window = _size_option("patchwise", patchwise)
    application = Application(
        load_network(network, window),
        open_volume(input, axes, channels),
        boundary,
        nan,
        _windows(window, overlap, weights, _size_option("step", step)),
        _size_option("halo", halo),
    )
    request = _Request(
        encoding=Encoding(dtype, *value_range),
        patch=_size_option("patch", patch),
        chunks=_size_option("chunks", chunks),
        shards=_size_option("shards", shards),
        allowed_bytes=(
            parse_bytes(memory) if memory is not None else int(_SHARE_OF_FREE * available_bytes())
        ),
        threads=computing_threads(threads),
    )
    place = store.check_place(output, input, overwrite)
    groups = application.passes(outputs)
    compile_kernels()
    with MemoryMeter() as meter, _client(client) as found:
        planned = [_planned(application, names, request) for names in groups]
        ready = _created(application, planned, request.encoding, place)
        begin = time.perf_counter()
        passes = _make_all(found, ready, progress)
    return Summary(
        output=Path(output),
        passes=passes,
        times=application.volume.times,
        seconds=time.perf_counter() - begin,
        peak_bytes=meter.peak_bytes,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Request:
    """What a run was asked for beside the answer."""

    encoding: Encoding
    patch: Size | None
    chunks: Size | None
    shards: Size | None
    allowed_bytes: int
    threads: int


@dataclass(frozen=True, eq=False)
class _Planned:
    """A pass that is planned: for each of its outputs how it is stored, and the work."""

    outputs: tuple[str, ...]
    stored: tuple[OutputLayout, ...]
    job: Job
    halo_error: HaloError | None


def _planned(application: Application, names: tuple[str, ...], request: _Request) -> _Planned:
    """Plan one pass."""
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
    )
    if isinstance(laid, WindowGrid):
        if request.patch is not None:
            raise OptionError("windows are the patches of patchwise inference: give no patch")
        plan = window_planner.plan(laid, resources)
    else:
        plan = planner.plan(planner.Request(**vars(resources), layout=laid, patch=request.patch))
    error = None
    if application.halo is not None:
        error = halo_error(application, names, resources, plan.patch)
    return _Planned(
        names, stored, Job(laid, source, application.nan, request.encoding, plan), error
    )


def _created(
    application: Application, planned: list[_Planned], encoding: Encoding, place: Path
) -> list[_Planned]:
    """The passes with the arrays that they write: one image, or a group of one for each output."""
    store.clear(place)
    several = sum(len(one.outputs) for one in planned) > 1
    if several:
        store.create_root(place, [name for one in planned for name in one.outputs])
    ready = []
    for one in planned:
        targets: list[Target] = []
        for name, layout in zip(one.outputs, one.stored, strict=True):
            array = store.create(
                place / store.group_name(name) if several else place,
                layout,
                encoding,
                **application.placed(name),
                attributes={"znni": application.described(name, encoding)},
            )
            first = targets[-1].last if targets else 0
            targets.append(Target(array, first, first + layout.channels))
        ready.append(replace(one, job=replace(one.job, targets=tuple(targets))))
    return ready


def _windows(
    window: Size | None, overlap: float, weights: str, step: Size | None
) -> Patchwise | None:
    if window is None:
        if step is not None:
            raise OptionError("step is the distance of windows: give their size with patchwise")
        return None
    return Patchwise(window, overlap, weights, step)


def computing_threads(threads: int | None) -> int:
    """The threads asked for, all cores where none are; raises `OptionError`."""
    if threads is None:
        return cores()
    if not isinstance(threads, int) or threads < 1:
        raise OptionError(f"threads {threads!r}: a whole number is wanted, at least one")
    return threads


def _size_option(name: str, value: Size | int | None) -> Size | None:
    """An option given as (z, y, x) or as one number."""
    if value is None:
        return None
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    least = 0 if name == "halo" else 1
    whole = all(isinstance(v, int | np.integer) and v >= least for v in values)
    if len(values) != 3 or not whole:
        raise OptionError(f"{name} {value!r} is no size: give three positive whole numbers z, y, x")
    return triple(values)


@contextmanager
def _client(client: Client | None) -> Iterator[Client]:
    """The client given, else one of a scheduler and a worker within this process."""
    if client is not None:
        yield client
        return
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        Client(
            processes=False,
            n_workers=1,
            threads_per_worker=planner.MOST_BLOCKS_IN_FLIGHT,
            memory_limit=0,
            dashboard_address=_LOOPBACK,
            worker_dashboard_address=_LOOPBACK,
            silence_logs=logging.CRITICAL,  # failures are collected and reported at the end
        ) as local,
    ):
        yield local


def _make_all(
    client: Client, passes: list[_Planned], progress: Progress | None
) -> tuple[Pass, ...]:
    """Make all blocks of all passes, one pass after another."""
    total = sum(volume(one.job.laid.output_size) * one.job.volume.times for one in passes)
    done = 0

    def advance(voxels: int) -> None:
        nonlocal done
        done += voxels
        if progress:
            progress(done, total)

    made: list[Pass] = []
    failures: list[tuple[Box, BaseException]] = []
    for one in passes:
        blocks, failed = _make_blocks(client, one.job, advance)
        failures += failed
        laid = one.job.laid
        channels = laid.network.out_channels
        made.append(
            Pass(one.outputs, laid.output_size, channels, blocks, one.job.plan, one.halo_error)
        )
    if failures:
        raise RunError(_failed(failures, sum(one.blocks for one in made)))
    return tuple(made)


def _make_blocks(
    client: Client, job: Job, advance: Callable[[int], None]
) -> tuple[int, list[tuple[Box, BaseException]]]:
    """Feed the blocks of one pass through a window of those in flight; returns how many were
    made, and which failed."""
    maker = BlockMaker(job)
    client.register_plugin(maker)
    workers = len(client.scheduler_info()["workers"])
    waiting = (
        (moment, block)
        for moment in range(job.volume.times)
        for block in job.laid.blocks(job.plan.block)
    )
    running = as_completed()
    places: dict[str, Box] = {}
    failures: list[tuple[Box, BaseException]] = []
    made = 0

    def submit(count: int) -> None:
        for moment, block in itertools.islice(waiting, count):
            future = client.submit(
                make_block,
                maker.name,
                moment,
                block,
                key=f"{maker.name}-{moment}-{block}",
                pure=False,
            )
            places[future.key] = block
            running.add(future)

    try:
        submit(job.plan.blocks_in_flight * max(workers, 1))
        for future in running:
            block = places.pop(future.key)
            if error := future.exception():
                failures.append((block, error))
            else:
                made += 1
            future.release()
            advance(block.voxels)
            submit(1)
    finally:
        client.unregister_worker_plugin(maker.name)
    return made, failures


def _failed(failures: list[tuple[Box, BaseException]], made: int) -> str:
    shown = "\n  ".join(
        f"block z, y, x = {box}: {error}" for box, error in failures[:_SHOWN_FAILURES]
    )
    more = len(failures) - _SHOWN_FAILURES
    return (
        f"{len(failures)} of {made + len(failures)} blocks failed, the others are written:"
        f"\n  {shown}" + (f"\n  and {more} more" if more > 0 else "")
    )
