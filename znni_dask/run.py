"""The run out of core: volume in, predictions as OME-Zarr out, block by block through dask.

One task per block reads its region with halo straight from the store, computes its patches and
writes whole output chunks. The client keeps a bounded number of blocks in flight, so nothing
grows with the volume. Network and executor live on the workers, in a plugin; tasks carry the
box of their block and return its number of voxels.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from distributed import Client, WorkerPlugin, as_completed, get_worker

from znni_dask import planner
from znni_dask.errors import NetworkError, OptionError, RunError
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, Size, triple, volume
from znni_dask.importers import load_network
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import MemoryMeter, anonymous_bytes, available_bytes, cores, parse_bytes
from znni_dask.network.network import Network
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.schedule import Schedules
from znni_dask.storage import output as store
from znni_dask.storage.output import Encoding
from znni_dask.storage.volume import Volume, open_volume

if TYPE_CHECKING:
    import zarr

Progress = Callable[[int, int], None]
_SHOWN_FAILURES = 3
_LOOPBACK = "127.0.0.1:0"  # distributed's web servers listen to all the world unless told
_SHARE_OF_FREE = 0.8  # of the free memory, when no limit is given


@dataclass(frozen=True, eq=False)
class Job:
    """Everything a worker needs to make any block; it travels to the workers once."""

    network: Network
    volume: Volume
    boundary: str
    nan: float | None
    encoding: Encoding
    plan: Plan
    output: zarr.Array[Any] | None = None

    @property
    def layout(self) -> Layout:
        """The network laid over the volume."""
        return Layout(self.network, self.volume.size, self.boundary)


@dataclass(frozen=True)
class Summary:
    """What a run did. ``peak_bytes`` is the anonymous memory of this process and its children,
    measured while it ran; the plan says what was promised and allowed."""

    output: Path
    size: Size
    channels: int
    blocks: int
    seconds: float
    peak_bytes: int
    plan: Plan

    @property
    def voxels_per_second(self) -> float:
        """Output voxels per second."""
        return volume(self.size) / self.seconds


class BlockMaker(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped
    """Lives on a worker and makes blocks there.

    Several tasks may read and write at a time; one computes, with all threads of the plan.
    """

    def __init__(self, job: Job) -> None:
        self.name = f"znni-{uuid.uuid4().hex}"
        self.job = job

    def setup(self, worker: Any) -> None:
        """Prepare what all blocks share."""
        self._computing = threading.Lock()
        self._layout = self.job.layout
        primitives = planner.chosen_primitives(self._layout, self.job.plan)
        self._schedules = Schedules(self._layout, primitives)
        sizes = self._schedules.envelope(
            planner.spans(self._layout, self.job.plan.block, self.job.plan.patch)
        )
        self._executor = SerialExecutor(
            self.job.network, primitives, self._schedules.arena(sizes), self.job.plan.threads
        )

    def teardown(self, worker: Any) -> None:
        """End the executor's threads."""
        self._executor.close()

    def make(self, block: Box) -> int:
        """Read, compute and write one block; returns its number of voxels."""
        region = self._layout.patch(block).input
        values = self.job.volume.read_extended(region, self.job.boundary, self.job.nan)
        with self._computing:
            made = self._compute(block, values, region.start)
        assert self.job.output is not None
        store.write(self.job.output, block, made)
        return block.voxels

    def _compute(
        self, block: Box, values: np.ndarray[Any, Any], corner: Size
    ) -> np.ndarray[Any, Any]:
        channels = self.job.network.out_channels
        made = np.empty((channels, *block.size), self.job.encoding.dtype)
        for box in planner.patches_of(block, self.job.plan.patch):
            todo = self._schedules.schedule(box)
            z, y, x = todo.input.shifted((-corner[0], -corner[1], -corner[2])).slices
            answer = np.empty((channels, *box.size), np.float32)
            self._executor.run(todo, values[:, z, y, x], answer)
            here = box.shifted((-block.start[0], -block.start[1], -block.start[2])).slices
            made[(slice(None), *here)] = self.job.encoding.encode(answer)
        return made


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
    overwrite: bool = False,
    client: Client | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Apply ``network`` to the volume at ``input`` and write the answer to ``output`` as OME-Zarr.

    Parameters
    ----------
    network : an ONNX or ``.znni`` file, a `Network`, or the name of a paper's network.
    input : Zarr, OME-Zarr, TIFF stack or ``.npy``; (z, y, x) or (c, z, y, x).
    output : the OME-Zarr 0.5 store to make; array ``0`` is (z, y, x), or (c, z, y, x) where the
        network has several outputs.
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
    patch, chunks, shards = (
        _size_option(name, value)
        for name, value in (("patch", patch), ("chunks", chunks), ("shards", shards))
    )
    source = open_volume(input)
    graph = simplify(load_network(network))
    place = store.check_place(output, input, overwrite)
    encoding = Encoding(dtype, *value_range)
    layout = lay(graph, source, boundary)
    stored = store.output_layout(graph.out_channels, layout.output_size, chunks, shards)
    allowed = parse_bytes(memory) if memory is not None else int(_SHARE_OF_FREE * available_bytes())
    team = computing_threads(threads)
    compile_kernels()
    with MemoryMeter() as meter, _client(client) as found:
        plan = planner.plan(
            planner.Request(
                layout=layout,
                unit=stored.unit,
                item_bytes=encoding.item_bytes,
                read_bytes=source.read_bytes,
                write_bytes=stored.write_bytes(encoding.item_bytes),
                baseline_bytes=anonymous_bytes(),
                allowed_bytes=allowed,
                threads=team,
                patch=patch,
            )
        )
        job = Job(graph, source, boundary, nan, encoding, plan)
        array = store.create(place, stored, encoding, **_described(job, layout))
        begin = time.perf_counter()
        blocks = _make_all(found, replace(job, output=array), layout, progress)
    return Summary(
        output=Path(output),
        size=stored.size,
        channels=stored.channels,
        blocks=blocks,
        seconds=time.perf_counter() - begin,
        peak_bytes=meter.peak_bytes,
        plan=plan,
    )


def lay(network: Network, source: Volume, boundary: str) -> Layout:
    """The network laid over a volume; raises `NetworkError` where they do not fit."""
    if source.channels != network.in_channels:
        raise NetworkError(
            f"the network takes {network.in_channels} channels, the volume {source.path} has "
            f"{source.channels} (axes {source.axes}, shape {tuple(source.array.shape)})"
        )
    return Layout(network, source.size, boundary)


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
    if len(values) != 3 or not all(isinstance(v, int | np.integer) and v > 0 for v in values):
        raise OptionError(f"{name} {value!r} is no size: give three positive whole numbers z, y, x")
    return triple(values)


def _described(job: Job, layout: Layout) -> dict[str, Any]:
    """Where the answer lies in the world, and what `znni verify` must know to repeat it."""
    source = job.volume
    strides = [float(s) for s in layout.geometry.output_stride]
    shifts = [float(t) for t in layout.translation]
    return {
        "scale": tuple(s * k for s, k in zip(source.scale, strides, strict=True)),
        "translation": tuple(
            t + s * d for t, s, d in zip(source.translation, source.scale, shifts, strict=True)
        ),
        "units": source.units,
        "attributes": {
            "znni": {
                "network": job.network.fingerprint,
                "boundary": job.boundary,
                "nan": job.nan,
                "range": [job.encoding.low, job.encoding.high],
            }
        },
    }


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


def _make_all(client: Client, job: Job, layout: Layout, progress: Progress | None) -> int:
    """Feed all blocks through a window of those in flight; returns how many were made."""
    maker = BlockMaker(job)
    client.register_plugin(maker)
    workers = len(client.scheduler_info()["workers"])
    waiting = layout.blocks(job.plan.block)
    running = as_completed()
    places: dict[str, Box] = {}
    failures: list[tuple[Box, BaseException]] = []
    made = done = 0

    def submit(count: int) -> None:
        for block in itertools.islice(waiting, count):
            future = client.submit(
                _make_block, maker.name, block, key=f"{maker.name}-{block}", pure=False
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
            done += block.voxels
            if progress:
                progress(done, volume(layout.output_size))
            submit(1)
    finally:
        client.unregister_worker_plugin(maker.name)
    if failures:
        raise RunError(_failed(failures, made))
    return made


def _make_block(name: str, block: Box) -> int:
    """The task: runs on a worker, where the plugin lives."""
    maker: BlockMaker = get_worker().plugins[name]
    return maker.make(block)


def _failed(failures: list[tuple[Box, BaseException]], made: int) -> str:
    shown = "\n  ".join(
        f"block z, y, x = {box}: {error}" for box, error in failures[:_SHOWN_FAILURES]
    )
    more = len(failures) - _SHOWN_FAILURES
    return (
        f"{len(failures)} of {made + len(failures)} blocks failed, the others are written:"
        f"\n  {shown}" + (f"\n  and {more} more" if more > 0 else "")
    )
