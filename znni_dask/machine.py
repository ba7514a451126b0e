"""What the machine offers: cores, NUMA nodes and memory, and what this process uses of them.

Memory is counted as anonymous memory, resident pages that no file backs (RssAnon + RssShmem):
what `--memory` bounds. Pages of mapped files can be dropped at any time and do not count.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path

import psutil
from dask.system import cpu_count

from znni_dask.errors import OptionError

CPU, GPU = "cpu", "gpu"  # devices that compute
GPU_RAM = "gpu+ram"  # a GPU, first layers of arrays that the host holds
CPU_GPU = "cpu+gpu"  # the CPU the first layers, a GPU the others
SHARED = (GPU_RAM, CPU_GPU)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NODES = Path("/sys/devices/system/node")
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def cores() -> int:
    """Cores this process may run on, by its affinity (``taskset``, cpusets, ``numactl``) and its
    cgroup's quota."""
    return int(cpu_count())


def nodes(folder: Path = _NODES) -> list[frozenset[int]]:
    """The cores of every NUMA node, as far as this process may run on them; nothing where the
    system tells of no nodes."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    ours = os.sched_getaffinity(0)
    lists = sorted(folder.glob("node[0-9]*/cpulist"), key=lambda p: int(p.parent.name[4:]))
    found = [frozenset(_numbers(path.read_text()) & ours) for path in lists]
    return [here for here in found if here]


def node_for(threads: int) -> frozenset[int] | None:
    """The cores of one node for so many threads: of the one that this thread runs on if it has as
    many, else of one that has. None where there is only one node, or none has so many."""
    found = nodes()
    large = [here for here in found if len(here) >= threads]
    if len(found) < 2 or not large:
        return None
    fields = Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()
    core = int(fields[36])  # the last on which it ran
    return next((here for here in large if core in here), large[0])


@contextmanager
def staying_on(chosen: frozenset[int] | None) -> Iterator[None]:
    """Keep this thread on these cores, and with it the threads that it starts meanwhile; None
    leaves it where it may be."""
    if chosen is None:
        yield
        return
    before = os.sched_getaffinity(0)
    with suppress(OSError):  # these cores have been taken from the process since
        os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def _numbers(text: str) -> set[int]:
    """Numbers as the system lists them, like 0-3,8."""
    spans = [part.split("-") for part in text.strip().split(",") if part]
    return {n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)}


def available_bytes() -> int:
    """Memory that this process may come to use, by the machine's state and its cgroup's limit."""
    limits = [int(psutil.virtual_memory().available) + anonymous_bytes()]
    for name in _CGROUP_LIMITS:
        path = Path(name)
        if path.is_file() and (value := path.read_text().strip()).isdigit():
            limits.append(int(value))
    return min(limits)


def anonymous_bytes(pid: int | None = None) -> int:
    """Anonymous memory of a process (this one unless named) and its children, in bytes."""
    process = psutil.Process(pid)
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += _anonymous_bytes_of(member)
        except psutil.NoSuchProcess:
            continue
    return total


def own_bytes() -> int:
    """Anonymous memory of this process alone, in bytes."""
    return _anonymous_bytes_of(psutil.Process())


def _anonymous_bytes_of(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    try:
        text = status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return int(process.memory_full_info().uss)
    found = re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * sum(int(value) for value in found)


class MemoryMeter:
    """Samples the anonymous memory of this process and its children while it is entered.

    >>> with MemoryMeter() as meter:
    ...     _ = bytearray(1 << 20)
    >>> meter.peak_bytes > 0
    True
    """

    def __init__(self, seconds: float = 0.02, measure: Callable[[], int] = anonymous_bytes) -> None:
        self.peak_bytes = 0
        self._seconds = seconds
        self._measure = measure
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="znni-memory", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._measure())

    def _sample(self) -> None:
        """Less and less often, to a tenth: of a long run that is often enough."""
        begin = time.monotonic()
        while True:
            self.peak_bytes = max(self.peak_bytes, self._measure())
            rarely = (time.monotonic() - begin) / 50
            if self._stop.wait(min(10 * self._seconds, max(self._seconds, rarely))):
                return


def parse_bytes(size: str | float) -> int:
    """``"12GiB"``, ``"512MB"``, ``"2e9"`` or a number, in bytes; raises `OptionError`."""
    number, unit = str(size), ""
    if match := re.fullmatch(r"\s*([0-9.]+(?:[eE][+]?\d+)?)\s*([kKmMgGtT]?[iI]?)[bB]?\s*", number):
        number, unit = match[1], match[2].upper()
    factor = (_UNITS | _BINARY).get(unit, 0)
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise OptionError(f"memory {size!r} is not a size: write it like 12GiB, 512MiB or 2e9")
    return int(value)


def show_bytes(value: float, enough: bool = False) -> str:
    """A size for people, in binary units; rounded up where it is to be ``enough``.

    >>> show_bytes(3 << 20), show_bytes(1.5 * 2**30), show_bytes(2**50)
    ('3 MiB', '1.50 GiB', '1024.00 TiB')
    >>> show_bytes((3 << 20) + 1, enough=True), show_bytes(1.501 * 2**30, enough=True)
    ('4 MiB', '1.51 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{ceil(value) if enough else value:.0f} {unit}"
        value /= 1024
    value, unit = (value, "GiB") if value < 1024 else (value / 1024, "TiB")
    return f"{ceil(100 * value) / 100 if enough else value:.2f} {unit}"
