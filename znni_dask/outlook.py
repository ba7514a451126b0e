"""What a run would take on a cluster that is told of on paper: planned for its workers as for those
of a real one, and simulated block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, inf, isfinite, prod
from pathlib import Path
from typing import Any, Unpack

from znni_dask.asking import Options, asked
from znni_dask.cluster import Crew, Means
from znni_dask.errors import OptionError
from znni_dask.forecast import Forecast, forecast, plan_all
from znni_dask.geometry import volume
from znni_dask.job import LONGEST_RUN, Job
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import anonymous_bytes
from znni_dask.network.network import Network
from znni_dask.passes import PlannedPass
from znni_dask.simulation import (
    COMPUTING,
    READING,
    SCHEDULER,
    WRITING,
    Blocks,
    Group,
    Shared,
    Simulated,
    simulate,
)
from znni_dask.sketch import Sketch, Store, Workers
from znni_dask.tasks import HANDED_OUT, MOST_ITEMS

_NO_DEVICE = "a cluster on paper computes on CPUs"
BLOCKS = "blocks"  # what limits a volume that has few of them


@dataclass(frozen=True)
class GroupOutlook:
    """What a group of ``count`` workers does: each computes ``voxels_per_second``, a block in
    ``block_seconds``; together they make ``blocks``, are there for ``there_seconds`` and cost
    ``price``."""

    count: int
    threads: int
    block_seconds: float
    voxels_per_second: float
    blocks: int
    there_seconds: float
    price: float


@dataclass(frozen=True)
class Outlook:
    """What one pass is expected to take on a cluster.

    ``seconds`` in all; ``busy`` shares of it, and what was busiest, the ``bottleneck``, as of
    `Simulated`. ``alone_seconds`` are those that each of computing, reading, writing and the
    scheduler would take were there nothing else to wait for. ``useful_workers`` are those, mixed as
    these are, that each of the others can keep busy: None where there is no limit. The scheduler
    limits where blocks have fewer than ``least_block_voxels``. Blocks were simulated in bundles of
    ``bundle``.
    """

    groups: tuple[GroupOutlook, ...]
    blocks: int
    block_voxels: float
    read_bytes: float
    write_bytes: float
    seconds: float
    voxels_per_second: float
    busy: Mapping[str, float]
    bottleneck: str
    alone_seconds: Mapping[str, float]
    useful_workers: Mapping[str, float | None]
    least_block_voxels: float
    bundle: int

    @property
    def workers(self) -> int:
        """Of all groups."""
        return sum(group.count for group in self.groups)

    @property
    def worker_seconds(self) -> float:
        """Those that workers are there, all together."""
        return sum(group.there_seconds for group in self.groups)

    @property
    def price(self) -> float:
        """Of all workers, from when they are there."""
        return sum(group.price for group in self.groups)

    @property
    def most_useful(self) -> tuple[int, str] | None:
        """How many workers like these can be kept busy, and what for more there is too little of;
        None where there is enough of all."""
        some = [(number, what) for what, number in self.useful_workers.items() if number]
        if not some:
            return None
        number, what = min(some)
        return max(int(number), 1), what

    def described(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        more = {"worker_seconds": self.worker_seconds, "price": self.price}
        return {**asdict(self), **more}


def outlooks(
    network: str | Path | Network,
    input: str | Path,
    sketch: Sketch,
    **options: Unpack[Options],
) -> tuple[tuple[Forecast, Outlook], ...]:
    """What `run` would take with these options on a cluster, pass by pass: on its weakest workers,
    and on all together. Raises `InputError` where `run` would before it writes anything, and where
    ``memory`` or ``threads`` are said, which the cluster tells of."""
    for name in ("memory", "threads"):
        if options.get(name) is not None:
            raise OptionError(
                f"{name} {options.get(name)!r} is given, and a cluster, which tells of what every "
                "worker has: give either"
            )
    found = asked(network, input, **options)
    compile_kernels()  # as for a forecast
    baseline = anonymous_bytes()
    crew = Crew.of(
        {
            str(number): Means(group.threads, group.memory_bytes, baseline, no_device=_NO_DEVICE)
            for number, group in enumerate(sketch.workers)
        },
        {str(number): group.count for number, group in enumerate(sketch.workers)},
    )
    told, begun = [], 0.0
    for planned in plan_all(found, crew):
        expected = outlook(planned, crew, sketch, begun)
        told.append((forecast(planned), expected))
        begun += expected.seconds
    return tuple(told)


def outlook(planned: PlannedPass, crew: Crew, sketch: Sketch, begun: float = 0.0) -> Outlook:
    """What a pass takes that begins so many seconds after the first one."""
    job, store = planned.job, sketch.store
    count = volume(job.reads.blocks) * job.volume.times
    voxels = job.selection.hull(job.laid).voxels * job.volume.times
    blocks = _blocks(planned, store, voxels, count)
    rates = [_voxels_per_second(planned, crew, n, one) for n, one in enumerate(sketch.workers)]
    groups = [
        Group(
            one.count,
            voxels / count / rate,
            max(one.after_seconds - begun, 0.0),
            one.read_bytes_per_second,
            one.write_bytes_per_second,
        )
        for one, rate in zip(sketch.workers, rates, strict=True)
    ]
    shared = Shared(
        store.read_bytes_per_second,
        store.write_bytes_per_second,
        1 / sketch.scheduler.tasks_per_second,
        sketch.scheduler.latency_seconds,
    )
    return _told(groups, blocks, shared, simulate(groups, blocks, shared), sketch, voxels)


def _voxels_per_second(planned: PlannedPass, crew: Crew, number: int, group: Workers) -> float:
    """Of a worker of a group while it works: as planned for its kind, decoding and encoding
    included; that others wait in the end is for the simulation to find."""
    kind, plans = crew.kind[str(number)], planned.job.plans
    plan = plans[kind if kind < len(plans) else 0]
    return group.speed * plan.voxels_per_second * planned.resources.waiting(plan.block)


def _blocks(planned: PlannedPass, store: Store, voxels: int, count: int) -> Blocks:
    """The blocks of a pass, and what is moved for each, in the mean."""
    job = planned.job
    plan, source = job.plan, job.volume
    decoded = _voxels_behind(job) * plan.reading.amplification / count
    in_chunk = volume(source.chunks) if source.chunks else inf
    reads = ceil(max(decoded / in_chunk, 1) / store.at_once)
    value_bytes = sum(one.encoding.voxel_bytes(one.channels) for one in planned.stored)
    chunks = sum(
        one.encoding.stored_channels(one.channels) * voxels / count / volume(one.unit)
        for one in planned.stored
    )
    writes = ceil(max(chunks, 1) / store.at_once)
    return Blocks(
        count=count,
        run=plan.blocks_in_column if plan.blocks_in_column > 1 else LONGEST_RUN,
        in_flight=min(one.blocks_in_flight for one in job.plans),
        read_bytes=decoded * source.channels * source.dtype.itemsize * store.read_ratio,
        write_bytes=value_bytes * voxels / count * store.write_ratio,
        read_seconds=reads * store.latency_seconds,
        write_seconds=writes * store.latency_seconds,
        in_order=plan.blocks_in_column > 1,
    )


def _voxels_behind(job: Job) -> int:
    """Voxels of the volume that lie behind all that is wanted."""
    hull, laid = job.selection.hull(job.laid), job.laid
    spans = (laid.reach(axis, hull.start[axis], hull.stop[axis]) for axis in range(3))
    inside = (min(b, n) - max(a, 0) for (a, b), n in zip(spans, laid.size, strict=True))
    return prod(inside) * job.volume.times


def _told(
    groups: list[Group],
    blocks: Blocks,
    shared: Shared,
    found: Simulated,
    sketch: Sketch,
    voxels: int,
) -> Outlook:
    rates = paces(groups, blocks, shared)
    pace = min(rates[what] for what in (COMPUTING, READING, WRITING))
    useful = useful_workers(groups, blocks, shared)
    block_voxels = voxels / blocks.count
    return Outlook(
        groups=tuple(
            GroupOutlook(
                count=one.count,
                threads=one.threads,
                block_seconds=group.block_seconds,
                voxels_per_second=block_voxels / group.block_seconds,
                blocks=made,
                there_seconds=there,
                price=one.price * there / 3600,
            )
            for one, group, made, there in zip(
                sketch.workers, groups, found.made, found.there_seconds, strict=True
            )
        ),
        blocks=blocks.count,
        block_voxels=block_voxels,
        read_bytes=blocks.read_bytes * blocks.count,
        write_bytes=blocks.write_bytes * blocks.count,
        seconds=found.seconds,
        voxels_per_second=voxels / found.seconds,
        busy=found.busy,
        bottleneck=found.bottleneck,
        alone_seconds={what: blocks.count / rate for what, rate in rates.items()},
        useful_workers={w: number if isfinite(number) else None for w, number in useful.items()},
        least_block_voxels=block_voxels * pace / rates[SCHEDULER],
        bundle=found.bundle,
    )


def paces(groups: list[Group], blocks: Blocks, shared: Shared) -> dict[str, float]:
    """Blocks a second that each of computing, reading, writing and the scheduler could do, all
    workers there and nothing else to wait for."""
    read = sum(group.count * group.read_bytes_per_second for group in groups)
    written = sum(group.count * group.write_bytes_per_second for group in groups)
    return {
        COMPUTING: sum(group.count / group.block_seconds for group in groups),
        READING: _over(min(shared.read_bytes_per_second, read), blocks.read_bytes),
        WRITING: _over(min(shared.write_bytes_per_second, written), blocks.write_bytes),
        SCHEDULER: _over(_most_in_a_task(blocks), shared.task_seconds),
    }


def _most_in_a_task(blocks: Blocks) -> int:
    """Blocks that are sent together where workers are many."""
    return 1 if blocks.in_order else min(MOST_ITEMS, blocks.run)


def useful_workers(groups: list[Group], blocks: Blocks, shared: Shared) -> dict[str, float]:
    """How many workers, mixed as these are, what they share can keep busy, and so many blocks."""
    slow = shared.task_seconds * HANDED_OUT > 1  # then more workers make no more of a task
    together = 1 if slow else _most_in_a_task(blocks)
    alone = sum(
        group.count
        * min(
            1 / group.block_seconds,
            _over(group.read_bytes_per_second, blocks.read_bytes),
            _over(group.write_bytes_per_second, blocks.write_bytes),
        )
        for group in groups
    )  # blocks a second, were nothing shared
    each = alone / sum(group.count for group in groups)
    return {
        READING: _over(shared.read_bytes_per_second, blocks.read_bytes) / each,
        WRITING: _over(shared.write_bytes_per_second, blocks.write_bytes) / each,
        SCHEDULER: _over(together, shared.task_seconds) / each,
        BLOCKS: float(max(blocks.count // blocks.in_flight, 1)),
    }


def _over(rate: float, amount: float) -> float:
    """How many of so much go at a rate."""
    return rate / amount if amount else inf
