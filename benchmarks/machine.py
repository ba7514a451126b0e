"""What a measurement belongs to: the machine, and how fast it was at that moment."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from llvmlite import ir

from znni_dask.kernels.code import LANES, VECTOR_BYTES, Function
from znni_dask.kernels.compiled import compiled_library
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.team import Team
from znni_dask.machine import cores

RESULTS = Path(__file__).parent / "results"
_SUMS = 20
_TURNS = 2_000_000


def described() -> dict[str, object]:
    """The machine's fingerprint."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "processor": model[1] if model else platform.processor(),
        "vectors": sorted(set(re.findall(r"\b(avx2|avx512f|amx_bf16)\b", text))),
        "cores": cores(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def keep(name: str, found: dict[str, object]) -> Path:
    """Write a result beside the others, under the machine's name."""
    RESULTS.mkdir(exist_ok=True)
    path = _path(name)
    path.write_text(json.dumps({"machine": described(), **found}, indent=1) + "\n")
    return path


def kept(name: str) -> dict[str, Any]:
    """What was kept of an earlier run on such a machine; nothing where there was none."""
    path = _path(name)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _path(name: str) -> Path:
    machine = described()
    processor = re.sub(r"\W+", "-", str(machine["processor"])).strip("-").lower()
    return RESULTS / f"{name}-{processor}-{machine['cores']}-cores.json"


def flops_per_second(team: Team) -> float:
    """Multiply-adds in registers by all threads of a team: what the machine gives just now."""
    module = ir.Module("rate")
    code = Function(module, "rate", ("place",), ("first", "last"))
    (place,), (first, last) = code.addresses, code.numbers
    factor, term = place.load(), place.load(VECTOR_BYTES)
    sums = [code.variable(factor) for _ in range(_SUMS)]
    with code.loop(first, last):
        for total in sums:
            total.set(total.get() * factor + term)
    for number, total in enumerate(sums):
        place.store(total.get(), (number + 2) * VECTOR_BYTES)
    code.finish()
    run = compiled_library(module)["rate"]
    places = [allocate((_SUMS + 2) * VECTOR_BYTES) for _ in range(team.threads)]
    for place_ in places:
        place_[:] = 0
    begin = time.perf_counter()

    def work(thread: int, _: int) -> None:
        run(places[thread].ctypes.data, 0, _TURNS)

    team.share(work, team.threads)
    seconds = time.perf_counter() - begin
    return team.threads * _TURNS * _SUMS * 2 * LANES / seconds


def bytes_per_second(team: Team) -> float:
    """Read and written by a copy of 256 MiB by all threads of a team."""
    copied, nbytes = copy(team, 256 << 20)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        copied()
        seconds.append(time.perf_counter() - begin)
    return nbytes / median(seconds)


def copy(team: Team, nbytes: int) -> tuple[Callable[[], None], int]:
    """numpy's copy of so many bytes, shared by a team, as a call; and the bytes it reads and
    writes."""
    source, target = (allocate(nbytes).view(np.float32) for _ in range(2))
    source[:], target[:] = 1, 0

    def work(first: int, last: int) -> None:
        np.copyto(target[first:last], source[first:last])

    return lambda: team.share(work, source.size), 2 * source.nbytes
