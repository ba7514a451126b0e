"""What a patch takes of those who compute it: of the CPU, of a device, or of both.

Arithmetic on shapes and costs only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from znni_dask.apart import Apart
from znni_dask.choices import Work, planned
from znni_dask.geometry import Size, volume
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.machine import CPU, CPU_GPU, GPU, GPU_RAM
from znni_dask.plan import Stage
from znni_dask.primitives.base import ITEM_BYTES, Primitive
from znni_dask.primitives.offloaded import Offloading, inner_of, offloading
from znni_dask.resources import (
    OVERHEAD_BYTES,
    SLOTS,
    Need,
    Resources,
    computing_bytes,
    computing_need,
    device_need,
    layers_bytes,
    lent_need,
    network_bytes,
    slot_bytes,
)
from znni_dask.schedule import Schedules
from znni_dask.split import Split

WAITING = 1  # patches between the host and a device, as in the paper


class Seconds(NamedTuple):
    """Of a patch: where several are under way, so that those who compute it do so at the same time,
    and of one by itself."""

    under_way: float
    alone: float


def seconds_of(
    resources: Resources, work: Work, sizes: Mapping[str, Size], patch: Size, patches: float
) -> Seconds:
    """What computing one of so many patches takes, of which the layers' boxes are of ``sizes``."""
    if isinstance(work, Split):
        return _split_seconds(resources, work, sizes)
    if isinstance(work, Apart):
        host, device = _apart_seconds(resources, work, sizes, patch)
        together = 1 / (1 / host.under_way + 1 / device.under_way)
        last = host.under_way / 2 / patches  # which the device may wait for, in the mean
        return Seconds(together + last, device.alone)
    seconds = work.repeats * _seconds(resources, work, sizes)
    if resources.device != GPU:
        return Seconds(seconds, seconds)
    given, made = map(resources.costs.bus_seconds, slot_bytes(work, sizes, patch))
    return Seconds(max(seconds, given, made), given + seconds + made)


def _split_seconds(resources: Resources, work: Split, sizes: Mapping[str, Size]) -> Seconds:
    costs, handed = resources.costs, work.handed_bytes(sizes)
    host, lent = _seconds(resources, work.head, sizes), _lent_seconds(resources, work, sizes)
    host += 2 * costs.copying_seconds(handed, threads=1)
    given = work.groups * costs.bus_seconds(handed // work.groups)
    device = work.groups * _seconds(resources, work.tail, sizes)
    tail = max(device, given) + min(device, given) / work.groups
    return Seconds(max(host, lent + max(device, given)), host + tail)


def host_share(resources: Resources, work: Apart, sizes: Mapping[str, Size], patch: Size) -> float:
    """Of patches that whoever is free takes those that the host computes."""
    host, device = (one.under_way for one in _apart_seconds(resources, work, sizes, patch))
    return device / (host + device)


def _apart_seconds(
    resources: Resources, work: Apart, sizes: Mapping[str, Size], patch: Size
) -> tuple[Seconds, Seconds]:
    """Of a patch by the host, and by the device."""
    host, device = (
        seconds_of(replace(resources, device=name), schedules, sizes, patch, 1)
        for name, schedules in ((CPU, work.host), (GPU, work.device))
    )
    return host, device


def _seconds(resources: Resources, schedules: Schedules, sizes: Mapping[str, Size]) -> float:
    return resources.costs.estimated_seconds(schedules.steps(sizes), resources.threads)


def _lent_seconds(resources: Resources, split: Split, sizes: Mapping[str, Size]) -> float:
    """In which a device computes sub-layers for the host."""
    steps = (step for step in split.head.steps(sizes) if step.primitive.device == GPU_RAM)
    return resources.costs.estimated_seconds(steps, resources.threads)


def flops_of(work: Work, sizes: Mapping[str, Size]) -> int:
    """Operations for a patch, by the device where it may be computed by either."""
    if isinstance(work, Apart):
        return flops_of(work.device, sizes)
    if isinstance(work, Split):
        return flops_of(work.head, sizes) + work.groups * flops_of(work.tail, sizes)
    steps = work.steps(sizes)
    return work.repeats * sum(step.primitive.flops(step.problem) for step in steps)


def stages_of(
    resources: Resources, work: Work, sizes: Mapping[str, Size], patch: Size, voxels: float
) -> tuple[Stage, ...]:
    """The stages of a plan by which patches are computed that make so many ``voxels`` of use."""
    threads, costs = resources.threads, resources.costs
    if isinstance(work, Schedules):
        return (
            Stage(resources.device, planned(work, sizes, voxels, threads, costs), work.samples),
        )
    if isinstance(work, Apart):
        share = host_share(resources, work, sizes, patch)
        return (
            Stage(CPU, planned(work.host, sizes, voxels / share, threads, costs)),
            Stage(GPU, planned(work.device, sizes, voxels / (1 - share), threads, costs)),
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
    if isinstance(work, Apart):
        device = computing_need(replace(resources, device=GPU), work.device, sizes, patch)
        shared = OVERHEAD_BYTES + network_bytes(work.host.layout.network)
        return device.plus(computing_bytes(work.host, sizes, patch, resources.threads) - shared)
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
    """What sub-layers of the ``head`` take that a device computes, and scratch memory and
    libraries, which serve the ``tail``, too, ``beside`` what else is taken."""
    lent = offloading((step.primitive, step.problem) for step in head.steps(sizes)) or Offloading()
    told: set[type[Primitive]] = set()
    if tail is not None:
        scratch, aside = tail.workspace_bytes(sizes, threads=1)
        lent = lent.or_more(Offloading(scratch=scratch, beside=aside))
        told = {type(p) for p in tail.primitives.values()}
    inner = (p for p in inner_of(head.primitives.values()) if type(p) not in told)
    host, device = lent_need(lent, inner).plus(resources.baseline_bytes + beside.process_bytes)
    return Need(host, device + beside.device_bytes)
