"""The workers of a run: one in this process, some on this machine, or those of a dask cluster.

What a worker has is what dask was told: its number of threads, and 60 % of its memory limit, from
where on dask would spill and pause it. Where the configuration of the worker's process says more
(``znni.threads`` and ``znni.memory``, as of those that `serve` starts), that holds.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.security import Security

from znni_dask.devices.opening import AUTO, Found, Wanted, gpu_of
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.job import PLUGIN
from znni_dask.machine import CPU, anonymous_bytes, available_bytes, parse_bytes, show_bytes
from znni_dask.options import SHARE_OF_FREE, allowed_bytes, computing_threads
from znni_dask.resources import MOST_BLOCKS_IN_FLIGHT
from znni_dask.storage.urls import Location

_LOOPBACK = "127.0.0.1:0"  # distributed's web servers listen to all the world unless told
QUIET = {  # every wake-up of dask's loops takes a core from what is computed
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
}
_HERE: dict[str, Any] = {  # of workers on this machine
    "threads_per_worker": MOST_BLOCKS_IN_FLIGHT,
    "memory_limit": 0,  # what is planned is what is used: dask has nothing to bound
    "dashboard_address": _LOOPBACK,
    "worker_dashboard_address": _LOOPBACK,
    "silence_logs": logging.CRITICAL,  # failures are collected and reported at the end
}
_SHARE_OF_LIMIT = 0.6  # of a worker's memory limit: from there on dask spills, and then pauses it
_SHARE_OF_FREE_LATER = 0.9  # of a worker that comes later: what is free changes
_MORE, _MOST_KINDS = 1.5, 3  # times as much memory; kinds of workers planned for, and the weakest
_FIRST_WORKER_SECONDS = 60
_SCHEDULER_BYTES = 256 << 20  # that this process comes to hold beside its workers


@dataclass(frozen=True)
class Means:
    """What a worker has to compute with: ``threads``, and of ``allowed_bytes`` those that its
    process held before; what it may take of a GPU's memory, 0 where it has none, or why not."""

    threads: int
    allowed_bytes: int
    baseline_bytes: int
    device_bytes: int = 0
    no_device: str = ""

    @property
    def room_bytes(self) -> int:
        """Memory that is left."""
        return self.allowed_bytes - self.baseline_bytes

    def suffice_for(self, planned: Means) -> bool:
        """Whether what was planned for others can be done with these."""
        device = self.device_bytes >= planned.device_bytes
        return device and self.threads >= planned.threads and self.room_bytes >= planned.room_bytes

    def is_more_than(self, weakest: Means) -> bool:
        """Whether it pays to plan for these apart."""
        room = self.allowed_bytes > _MORE * weakest.allowed_bytes
        device = self.device_bytes > _MORE * weakest.device_bytes
        return device or self.threads > weakest.threads or room

    @property
    def environment(self) -> dict[str, str]:
        """What tells the process of a worker, when it begins, that it has these."""
        return {
            "DASK_ZNNI__THREADS": str(self.threads),
            "DASK_ZNNI__MEMORY": str(self.allowed_bytes),
        }


@dataclass(frozen=True, eq=False)
class Crew:
    """The ``workers`` that a run is planned for: means of ``kinds`` of them, the first of the
    weakest, others of those that have more; and the kind of every worker, or of every group of
    workers that are alike."""

    kinds: tuple[Means, ...]
    kind: Mapping[str, int]
    workers: int

    @classmethod
    def of(cls, found: Mapping[str, Means], counts: Mapping[str, int] | None = None) -> Crew:
        """Those of which these are the means: of every one, or of groups of so many."""
        many = counts or dict.fromkeys(found, 1)
        weakest = _least(found.values())
        alike: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
        for worker, means in found.items():
            if means.is_more_than(weakest):
                much = means.allowed_bytes.bit_length(), means.device_bytes.bit_length()
                alike[means.threads, *much].append(worker)
        groups = sorted(alike.values(), key=lambda some: -sum(many[one] for one in some))
        groups = groups[:_MOST_KINDS]
        return cls(
            (weakest, *(_least(found[worker] for worker in group) for group in groups)),
            dict.fromkeys(found, 0)
            | {worker: 1 + i for i, group in enumerate(groups) for worker in group},
            sum(many.values()),
        )


def _least(some: Iterable[Means]) -> Means:
    """What all have."""
    found = [*some]
    return Means(
        min(means.threads for means in found),
        min(means.allowed_bytes for means in found),
        max(means.baseline_bytes for means in found),
        min(means.device_bytes for means in found),
        next((means.no_device for means in found if means.no_device), ""),
    )


@dataclass(frozen=True, eq=False)
class Cluster:
    """Workers that a client reaches. How they were asked for: ``memory`` and ``threads`` of each,
    if that was said, and the ``device``."""

    client: Client
    memory: str | float | None = None
    threads: int | None = None
    device: Wanted = Wanted()  # noqa: RUF009  # a named tuple
    alone: bool = False  # in this process

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return str(self.client.scheduler.address)

    def forget(self, place: Location) -> None:
        """Let workers give back what a run to this place, whose client was killed, left there."""
        if not self.alone:
            self.client.run(_forget, str(place), on_error="ignore")

    def workers(self) -> set[str]:
        """The addresses of those that are there."""
        told = self.client.sync(self.client.scheduler.identity, n_workers=-1)
        return set(told["workers"])

    def crew(self) -> Crew:
        """Who is there. Raises `OptionError` where nobody is, or a worker of another version."""
        if self.alone:
            threads, gpu = computing_threads(self.threads), gpu_of(self.device)
            means = Means(
                threads,
                allowed_bytes(self.memory),
                anonymous_bytes(),
                gpu.allowed_bytes(self.device),
                gpu.why,
            )
            return Crew.of(self._with_device(dict.fromkeys(self.workers(), means)))
        self._wait()
        found = self.means()
        if not found:
            raise OptionError("the cluster's workers have left: start some, then the same command")
        return Crew.of(self._with_device(found))

    def _with_device(self, found: Mapping[str, Means]) -> Mapping[str, Means]:
        """Those that have a GPU, where it must be one; raises `OptionError` where none has."""
        if self.device.name in (AUTO, CPU):
            return found
        some = {worker: means for worker, means in found.items() if means.device_bytes}
        if not some:
            why = next(iter(found.values())).no_device
            raise OptionError(f"a GPU was asked for, and there is none: {why}")
        return some

    def means(self, workers: list[str] | None = None) -> dict[str, Means]:
        """Those of all workers, or of some, that answer. Raises `OptionError` where one runs
        another version."""
        told = self.client.run(_told, self.device, workers=workers, on_error="return")
        return self._understood(told, SHARE_OF_FREE)

    async def means_of(self, worker: str) -> Means | None:
        """Those of one worker, asked in the client's own thread; None where it has left."""
        asked = self.client.run(
            _told, self.device, workers=[worker], on_error="return", asynchronous=True
        )
        return self._understood(await asked, _SHARE_OF_FREE_LATER).get(worker)

    def _understood(self, told: Mapping[str, Any], share: float) -> dict[str, Means]:
        here = version("znni_dask")
        told = {w: t for w, t in told.items() if not isinstance(t, OSError)}  # it has left
        if odd := {w: t for w, t in told.items() if not isinstance(t, _Told)}:
            worker, error = next(iter(odd.items()))
            raise OptionError(
                f"the worker {worker} cannot take part, znni_dask {here} is wanted there as "
                f"here: {type(error).__name__}: {error}"
            )
        for worker, one in told.items():
            if one.version != here:
                raise OptionError(
                    f"the worker {worker} has znni_dask {one.version}, here is {here}: install one "
                    "version everywhere"
                )
        on_host = Counter(one.host for one in told.values())
        in_process = Counter((one.host, one.process) for one in told.values())
        on_gpu = Counter((one.host, one.gpu.known_by) for one in told.values())
        return {
            worker: self._means(
                one,
                share / on_host[one.host],
                in_process[one.host, one.process],
                on_gpu[one.host, one.gpu.known_by],
            )
            for worker, one in told.items()
        }

    def _means(self, told: _Told, share: float, in_process: int, on_gpu: int) -> Means:
        """Those of a worker that has such a share of what is free, where nobody limited it, and
        shares its process and its GPU with so many."""
        threads = self.threads or told.threads
        allowed = told.allowed_bytes or int(share * told.available_bytes)
        if self.memory is not None:
            allowed = parse_bytes(self.memory)
        room = (allowed - told.baseline_bytes) // in_process
        return Means(
            threads,
            told.baseline_bytes + room,
            told.baseline_bytes,
            told.gpu.allowed_bytes(self.device, on_gpu),
            told.gpu.why,
        )

    def _wait(self) -> None:
        try:
            self.client.wait_for_workers(1, timeout=_FIRST_WORKER_SECONDS)
        except TimeoutError:
            raise OptionError(
                f"no worker came to {self.address} within "
                f"{_FIRST_WORKER_SECONDS} s: start some, as by znni worker ADDRESS"
            ) from None


@dataclass(frozen=True)
class _Told:
    """What a worker tells of itself; ``allowed_bytes`` is None where nobody limited it."""

    version: str
    host: str
    process: int
    threads: int
    allowed_bytes: int | None
    available_bytes: int
    baseline_bytes: int
    gpu: Found


def _told(device: Wanted, dask_worker: Any) -> _Told:
    """Runs on the worker."""
    gpu = gpu_of(device)  # before memory is looked at: CUDA takes some of the process's
    threads, memory = dask.config.get("znni.threads", None), dask.config.get("znni.memory", None)
    limit = dask_worker.memory_manager.memory_limit
    return _Told(
        version=version("znni_dask"),
        host=os.uname().nodename,
        process=os.getpid(),
        threads=int(threads or dask_worker.state.nthreads),
        allowed_bytes=int(memory or _SHARE_OF_LIMIT * limit) if memory or limit else None,
        available_bytes=available_bytes(),
        baseline_bytes=anonymous_bytes(),
        gpu=gpu,
    )


async def _forget(place: str, dask_worker: Any) -> None:
    """Runs on the worker."""
    left = [name for name in dask_worker.plugins if name.startswith(PLUGIN)]
    for name in [name for name in left if f"//{place}/" in name]:
        await dask_worker.plugin_remove(name=name)


@contextmanager
def connected(
    client: Client | str | None = None,
    workers: int | None = None,
    memory: str | float | None = None,
    threads: int | None = None,
    device: Wanted = Wanted(),  # noqa: B008  # a named tuple
) -> Iterator[Cluster]:
    """The workers that a client, or a scheduler at an address, has: each with so much ``memory``
    and ``threads``, if that is said, and computing on this ``device``. Without a client, so many
    ``workers`` on this machine, which share memory and threads; or one in this process.

    Raises `OptionError` where there are none.
    """
    if client is not None and workers is not None:
        raise OptionError("workers are those of the cluster: give either a client or their number")
    if isinstance(client, str):
        with _client_of(client) as reached:
            yield Cluster(reached, memory, threads, device)
    elif client is not None:
        yield Cluster(client, memory, threads, device)
    elif workers is None:
        with _in_process() as local:
            yield Cluster(local, memory, threads, device, alone=True)
    else:
        with _on_this_machine(workers, memory, threads) as local:
            yield Cluster(local, device=device)


def _client_of(address: str) -> Client:
    try:
        if address.startswith("tls://") and not _has_keys():
            raise ValueError(
                "it is encrypted, and dask is configured with no certificate and key "
                "(distributed.comm.tls, or DASK_DISTRIBUTED__COMM__TLS__…)"
            )
        return Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise OptionError(f"no scheduler answers at {address}: {error}") from None


def _has_keys() -> bool:
    """Whether dask is configured to reach what is encrypted. Where it is not, distributed raises a
    TypeError, and leaves a client that waits for a minute when the process ends."""
    return Security().get_connection_args("client")["ssl_context"] is not None


@contextmanager
def _in_process() -> Iterator[Client]:
    with (
        dask.config.set(QUIET),
        Client(processes=False, n_workers=1, **_HERE) as local,
    ):
        yield local


@contextmanager
def _on_this_machine(
    workers: int, memory: str | float | None, threads: int | None
) -> Iterator[Client]:
    """Processes of their own, which share what there is."""
    each = share(workers, memory, threads)
    with (
        dask.config.set(QUIET),
        LocalCluster(processes=True, n_workers=workers, env=each.environment, **_HERE) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def share(workers: int, memory: str | float | None, threads: int | None) -> Means:
    """What each of several workers on this machine has; raises `OptionError`,
    `MemoryLimitError`."""
    if not isinstance(workers, int) or workers < 1:
        raise OptionError(f"workers {workers!r}: a whole number is wanted, at least one")
    total = computing_threads(threads)
    if total < workers:
        raise OptionError(
            f"{workers} workers and {total} threads: every worker computes with at least one"
        )
    allowed = allowed_bytes(memory)
    own = anonymous_bytes() + _SCHEDULER_BYTES
    if allowed <= own:
        raise MemoryLimitError(
            f"{show_bytes(allowed)} are allowed, {show_bytes(own)} are needed beside the workers: "
            "allow more, or leave --workers out"
        )
    return Means(total // workers, (allowed - own) // workers, 0)


@contextmanager
def on_workers(client: Client, plugin: Any) -> Iterator[None]:
    """The plugin lives on all workers, also on those that come later, until this is left."""
    try:
        for last in (False, False, True):
            try:
                client.register_plugin(plugin)
                break
            except OSError:  # of a worker that was leaving meanwhile
                if last or client.status != "running":
                    raise
        yield
    finally:
        if client.status == "running":  # else the scheduler has gone
            with suppress(OSError, KeyError):  # of a worker that is leaving, with all it has
                client.unregister_worker_plugin(plugin.name)
