"""Workers for a dask scheduler: one for every NUMA node, on its cores alone.

A worker's few task threads read, compress and write beside the one that computes, which has all
cores of its node; so its `nthreads` say nothing of its cores, which its environment tells instead.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import dask
from distributed import Nanny

from znni_dask.cluster import Means
from znni_dask.errors import OptionError
from znni_dask.machine import cores, nodes
from znni_dask.options import allowed_bytes, computing_threads
from znni_dask.resources import MOST_BLOCKS_IN_FLIGHT

DEVICE = "CPU"  # the resource that tasks may ask for which must run on one


@dataclass(frozen=True)
class Place:
    """Where a worker lives: its cores (None: wherever it may), and what it has."""

    cores: frozenset[int] | None
    means: Means

    @property
    def environment(self) -> dict[str, str]:
        """What tells the worker's process, when it begins."""
        if self.cores is None:
            return self.means.environment
        cores = " ".join(map(str, sorted(self.cores)))
        return self.means.environment | {"DASK_ZNNI__CORES": cores}


def places(memory: str | float | None = None, threads: int | None = None) -> list[Place]:
    """One for every NUMA node of this machine, which share ``memory``; or a single one with so
    many ``threads``. Raises `OptionError`."""
    allowed = allowed_bytes(memory)
    found = nodes()
    whole = len(found) < 2 or cores() < sum(map(len, found))  # or limited to fewer by its cgroup
    if threads is not None or whole:
        return [Place(None, Means(computing_threads(threads), allowed, 0))]
    each = allowed // len(found)
    return [Place(node, Means(len(node), each, 0)) for node in found]


def serve(
    address: str,
    memory: str | float | None = None,
    threads: int | None = None,
    name: str | None = None,
) -> None:
    """Work for the scheduler at ``address`` until it ends, or this process is interrupted.

    Raises `OptionError` where no scheduler answers.
    """
    with suppress(asyncio.CancelledError):  # told to end
        asyncio.run(_serve(address, places(memory, threads), name))


async def _serve(address: str, wanted: list[Place], name: str | None) -> None:
    (this,) = asyncio.all_tasks()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    async with AsyncExitStack() as stack:
        nannies = []
        for number, place in enumerate(wanted):
            try:
                nanny = Nanny(
                    address,
                    nthreads=MOST_BLOCKS_IN_FLIGHT,
                    memory_limit=0,  # what is planned is what is used: dask has nothing to bound
                    resources={DEVICE: 1},
                    name=f"{name}-{number}" if name and len(wanted) > 1 else name,
                    env=place.environment,
                    preload=[__name__],
                )
                nannies.append(await stack.enter_async_context(nanny))
            except (OSError, RuntimeError, ValueError) as error:
                why = error.__cause__ or error
                raise OptionError(f"no worker could begin for {address}: {why}") from None
        await asyncio.gather(*(nanny.finished() for nanny in nannies))


def dask_setup(worker: Any) -> None:
    """Keep the worker's process on its cores. Dask calls this where a worker begins, and begins
    anew: threads that it starts from then on stay there, too."""
    if told := dask.config.get("znni.cores", None):
        os.sched_setaffinity(0, {int(core) for core in str(told).split(" ")})
