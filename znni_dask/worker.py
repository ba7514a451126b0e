"""Workers for a dask scheduler: one for every NUMA node, or GPU, on its cores alone.

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
from distributed.comm import get_address_host
from distributed.utils import get_ip

from znni_dask.cluster import QUIET, Means
from znni_dask.devices.opening import gpus
from znni_dask.errors import OptionError
from znni_dask.machine import cores, nodes
from znni_dask.options import allowed_bytes, computing_threads
from znni_dask.resources import MOST_BLOCKS_IN_FLIGHT


@dataclass(frozen=True)
class Place:
    """Where a worker lives: its cores (None: wherever it may), what it has, and by what CUDA knows
    its GPU (None: it has none)."""

    cores: frozenset[int] | None
    means: Means
    gpu: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What tells the worker's process, when it begins."""
        told = self.means.environment | {"CUDA_VISIBLE_DEVICES": self.gpu or ""}
        if self.cores is None:
            return told
        return told | {"DASK_ZNNI__CORES": " ".join(map(str, sorted(self.cores)))}

    @property
    def resources(self) -> dict[str, float]:
        """What tasks may ask for that must run on such a worker, as dask counts it."""
        return {"CPU": 1} if self.gpu is None else {"CPU": 1, "GPU": 1}


def places(memory: str | float | None = None, threads: int | None = None) -> list[Place]:
    """One for every NUMA node of this machine, or for every GPU where there are more of these,
    which share ``memory``; or a single one with so many ``threads``. Raises `OptionError`."""
    allowed, known = allowed_bytes(memory), gpus()
    found: list[frozenset[int] | None] = [*nodes()]
    if len(found) < 2 or cores() < sum(len(node or ()) for node in found):
        found = [None]  # or limited to fewer by its cgroup
    if threads is not None:
        return [Place(None, Means(computing_threads(threads), allowed, 0), next(iter(known), None))]
    count = max(len(found), len(known))
    whose = [found[i * len(found) // count] for i in range(count)]
    workers = []
    for number, node in enumerate(whose):
        first, beside = whose.index(node), whose.count(node)
        own = None if node is None else frozenset(sorted(node)[number - first :: beside])
        has = max(1, cores() // beside) if own is None else len(own)
        gpu = known[number] if number < len(known) else None
        workers.append(Place(own, Means(has, allowed // count, 0), gpu))
    return workers


def serve(
    address: str,
    memory: str | float | None = None,
    threads: int | None = None,
    name: str | None = None,
) -> None:
    """Work for the scheduler at ``address`` until it ends, or this process is interrupted.

    Raises `OptionError` where no scheduler answers.
    """
    with dask.config.set(QUIET), suppress(asyncio.CancelledError):  # told to end
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
                    host=get_ip(get_address_host(address)),  # else it listens to all the world
                    dashboard_address="127.0.0.1:0",
                    nthreads=MOST_BLOCKS_IN_FLIGHT,
                    memory_limit=0,  # what is planned is what is used: dask has nothing to bound
                    resources=place.resources,
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
