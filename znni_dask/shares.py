"""What a patch takes of those who compute it: of the CPU, of a device, or of both.

Arithmetic on shapes and costs only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from znni_dask.choices import planned
from znni_dask.devices.ferry import Load
from znni_dask.geometry import Size, volume
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.machine import CPU, CPU_GPU, GPU, GPU_RAM
from znni_dask.plan import Stage
from znni_dask.primitives.base import ITEM_BYTES
from znni_dask.primitives.gpu.rates import BUS
from znni_dask.primitives.offloaded import Offloading, offloading
from znni_dask.resources import (
    DEVICE_SLACK_BYTES,
    OVERHEAD_BYTES,
    SLOTS,
    Need,
    Resources,
    computing_bytes,
    computing_need,
    device_need,
    layers_bytes,
)
from znni_dask.schedule import Schedules
from znni_dask.split import Split

Work: TypeAlias = Schedules | Split
WAITING = 1  # patches between the host and a device, as in the paper


class Seconds(NamedTuple):
    """Of a patch: where several are under way, so that those who compute it do so at the same time,
    and of one by itself."""

    under_way: float
    alone: float


def seconds_of(resources: Resources, work: Work, sizes: Mapping[str, Size]) -> Seconds:
    """What computing a patch takes, of which the layers' boxes are of ``sizes``."""
    if isinstance(work, Schedules):
        seconds = work.repeats * _seconds(resources, work, sizes)
        return Seconds(seconds, seconds)
    host, lent = _seconds(resources, work.head, sizes), _lent_seconds(resources, work, sizes)
    handed = work.handed_bytes(sizes)
    host += 2 * resources.costs.copying_seconds(handed, threads=1)
    device = work.groups * _seconds(resources, work.tail, sizes)
    tail = max(device, handed / BUS.per_second)
    return Seconds(max(host, lent + tail), host + tail)


def _seconds(resources: Resources, schedules: Schedules, sizes: Mapping[str, Size]) -> float:
    return resources.costs.estimated_seconds(schedules.steps(sizes), resources.threads)


def _lent_seconds(resources: Resources, split: Split, sizes: Mapping[str, Size]) -> float:
    """In which a device computes sub-layers for the host."""
    steps = (step for step in split.head.steps(sizes) if step.primitive.device == GPU_RAM)
    return resources.costs.estimated_seconds(steps, resources.threads)


def flops_of(work: Work, sizes: Mapping[str, Size]) -> int:
    """Operations for a patch."""
    if isinstance(work, Split):
        return flops_of(work.head, sizes) + work.groups * flops_of(work.tail, sizes)
    steps = work.steps(sizes)
    return work.repeats * sum(step.primitive.flops(step.problem) for step in steps)


def stages_of(
    resources: Resources, work: Work, sizes: Mapping[str, Size], voxels: float
) -> tuple[Stage, ...]:
    """The stages of a plan by which patches are computed that make so many ``voxels`` of use."""
    threads, costs = resources.threads, resources.costs
    if isinstance(work, Schedules):
        return (
            Stage(resources.device, planned(work, sizes, voxels, threads, costs), work.samples),
        )
    head = planned(work.head, sizes, voxels, threads, costs)
    tail = planned(work.tail, sizes, voxels / work.groups, threads, costs)
    first = CPU if resources.device == CPU_GPU else GPU_RAM
    return Stage(first, head), Stage(GPU, tail, work.tail.samples)


def need_of(resources: Resources, work: Work, sizes: Mapping[str, Size], patch: Size) -> Need:
    """Memory that the process and the device take while they compute patches, blocks in flight not
    counted."""
    if isinstance(work, Schedules):
        if resources.device != GPU_RAM:
            return computing_need(resources, work, sizes, patch)
        host = computing_bytes(work, sizes, patch, resources.threads)
        return _with_sub_layers(resources, work, sizes, Need(host))
    behind = device_need(work.tail, sizes, work.part(patch))
    host = OVERHEAD_BYTES + layers_bytes(work.head, sizes, resources.threads)
    host += (1 + WAITING) * allocated_bytes(work.handed_bytes(sizes))
    host += SLOTS * ITEM_BYTES * work.tail.layout.network.out_channels * volume(patch)
    return _with_sub_layers(resources, work.head, sizes, behind.plus(host), work.tail)


def _with_sub_layers(
    resources: Resources,
    head: Schedules,
    sizes: Mapping[str, Size],
    beside: Need,
    tail: Schedules | None = None,
) -> Need:
    """What sub-layers of the ``head`` take that a device computes, and scratch memory, which serves
    the ``tail``, too, ``beside`` what else is taken."""
    needed = offloading((step.primitive, step.problem) for step in head.steps(sizes))
    lent = needed or Offloading(Load(), 0, 0, 0)
    scratch, aside = lent.scratch, lent.beside
    if tail is not None:
        scratch = max(scratch, tail.workspace_bytes(sizes, threads=1))
        aside = max(aside, tail.workspace_bytes(sizes, threads=1, beside=True))
    device = DEVICE_SLACK_BYTES + lent.load.device_bytes + lent.kernels + scratch + aside
    host = resources.baseline_bytes + lent.load.host_bytes
    return Need(host + beside.process_bytes, device + beside.device_bytes)
