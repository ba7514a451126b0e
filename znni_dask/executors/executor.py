"""What computes the patches of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, overload

from znni_dask.devices.base import Device
from znni_dask.executors.device import DeviceExecutor
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.split import SplitExecutor
from znni_dask.geometry import Size
from znni_dask.machine import GPU
from znni_dask.schedule import Schedules
from znni_dask.split import Split

Executor: TypeAlias = SerialExecutor | DeviceExecutor | SplitExecutor


@overload
def executor_of(
    schedules: Schedules,
    sizes: Mapping[str, Size],
    patch: Size,
    threads: int,
    device: Device | None,
) -> SerialExecutor | DeviceExecutor: ...


@overload
def executor_of(
    schedules: Schedules | Split,
    sizes: Mapping[str, Size],
    patch: Size,
    threads: int,
    device: Device | None,
) -> Executor: ...


def executor_of(
    schedules: Schedules | Split,
    sizes: Mapping[str, Size],
    patch: Size,
    threads: int,
    device: Device | None,
) -> Executor:
    """On a device, with so many threads of the CPU, or by both."""
    if isinstance(schedules, Split):
        assert device is not None
        return SplitExecutor(schedules, sizes, patch, threads, device)
    if device is not None and all(p.device == GPU for p in schedules.primitives.values()):
        return DeviceExecutor(schedules, sizes, patch, device)
    return SerialExecutor(schedules, sizes, threads, device)
