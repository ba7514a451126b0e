"""How fast the CPU primitives run here: operations and bytes per second, one thread and all.

    python benchmarks/primitives.py            (or: make bench)

Cases are run in turn, several rounds of all, and medians are reported, so that a slow moment of
the machine meets every case alike. The result is kept under `benchmarks/results/` with the
machine's fingerprint; `znni_dask/costs.py` ranks plans by figures like these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from machine import keep

from znni_dask.geometry import triple
from znni_dask.kernels.direct import SLACK_BYTES
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network import layers
from znni_dask.primitives.base import Array, Problem
from znni_dask.primitives.table import named

ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """A layer on an input of ``shape`` (batch, channel, z, y, x)."""

    name: str
    primitive: str
    layer: layers.Layer
    shape: tuple[int, int, int, int, int]


def conv(fan_in: int, fan_out: int, kernel: int, pad: int = 0) -> layers.Conv:
    padding = ((pad,) * 3, (pad,) * 3)
    return layers.Conv(fan_in, fan_out, (kernel,) * 3, padding=padding)


POOL = layers.MaxPool((2, 2, 2), (2, 2, 2))
UP = layers.ConvTranspose(32, 16, (2, 2, 2), (2, 2, 2))
CASES = [
    Case("first layer 1 → 16, 3³, 66³", "direct", conv(1, 16, 3), (1, 1, 66, 66, 66)),
    Case("16 → 16, 3³, 66³", "direct", conv(16, 16, 3), (1, 16, 66, 66, 66)),
    Case("16 → 16, 3³ padded, 64³", "direct", conv(16, 16, 3, 1), (1, 16, 64, 64, 64)),
    Case("32 → 32, 3³, 8 fragments of 34³", "direct", conv(32, 32, 3), (8, 32, 34, 34, 34)),
    Case("32 → 32, 3³, 64 fragments of 12³", "direct", conv(32, 32, 3), (64, 32, 12, 12, 12)),
    Case("80 → 80, 5³, 24³", "direct", conv(80, 80, 5), (1, 80, 24, 24, 24)),
    Case("32 → 32, 1³, 64³", "direct", conv(32, 32, 1), (1, 32, 64, 64, 64)),
    Case("32 → 16, up by 2, 32³", "direct transposed", UP, (1, 32, 32, 32, 32)),
    Case("pooling 2³, 16 channels, 64³", "pooling", POOL, (1, 16, 64, 64, 64)),
    Case("fragments 2³, 16 channels, 65³", "fragments", POOL, (1, 16, 65, 65, 65)),
]


def prepared(case: Case, team: Team) -> tuple[Callable[[], None], Problem]:
    """The case as a call without arguments."""
    random = np.random.default_rng(0)
    primitive = named(case.primitive, case.layer)
    z, y, x = (case.layer.window(axis).size(case.shape[2 + axis]) for axis in range(3))
    fragments = int(np.prod(primitive.fragments_of(case.layer)))
    channels = case.layer.channels([case.shape[1]])
    offset = triple(-case.layer.window(axis).low for axis in range(3))
    size = triple(case.shape[2:])
    output = (case.shape[0] * fragments, channels, z, y, x)
    problem = Problem(case.layer, (case.shape,), output, (offset,), (0, 0, 0), size)
    volume, out = with_slack(case.shape), with_slack(output)
    volume[...] = random.standard_normal(case.shape, np.float32)
    weights = {
        key: random.standard_normal(shape).astype(np.float32)
        for key, shape in case.layer.weight_shapes().items()
    }
    kept = primitive.prepare(case.layer, weights)
    return lambda: primitive.apply(kept, problem, [volume], out, team), problem


def with_slack(shape: tuple[int, ...]) -> Array:
    """An array that may be read a little beyond its end."""
    nbytes = 4 * int(np.prod(shape))
    memory = np.zeros(nbytes + SLACK_BYTES, np.uint8)
    return memory[:nbytes].view(np.float32).reshape(shape)


def measure(threads: int) -> list[dict[str, object]]:
    """Median seconds of every case, and of a copy of 64 MiB, with rates."""
    source, target = np.ones(1 << 24, np.float32), np.empty(1 << 24, np.float32)
    with Team(threads) as team:
        calls = {case.name: prepared(case, team) for case in CASES}
        seconds: dict[str, list[float]] = {name: [] for name in [*calls, "copy"]}
        for round_number in range(ROUNDS + 1):  # the first warms up
            for name in seconds:
                begin = time.perf_counter()
                if name == "copy":
                    np.copyto(target, source)
                else:
                    calls[name][0]()
                if round_number:
                    seconds[name].append(time.perf_counter() - begin)
    rows: list[dict[str, object]] = []
    for case in CASES:
        _, problem = calls[case.name]
        middle = median(seconds[case.name])
        flops = named(case.primitive, case.layer).flops(problem)
        moved = 4 * (np.prod(problem.inputs[0]) + np.prod(problem.output))
        rows.append(
            {
                "case": case.name,
                "primitive": case.primitive,
                "threads": threads,
                "seconds": middle,
                "gflop_per_second": flops / middle / 1e9,
                "gigabytes_per_second": float(moved / middle / 1e9),
            }
        )
    rate = 2 * source.nbytes / median(seconds["copy"]) / 1e9
    rows.append({"case": "copy of 64 MiB, one thread", "gigabytes_per_second": rate})
    return rows


def main() -> None:
    rows = [row for threads in sorted({1, cores()}) for row in measure(threads)]
    print(f"{'case':36} {'threads':>7} {'GFLOP/s':>8} {'GB/s':>6}")
    for row in rows:
        rate = row.get("gflop_per_second")
        shown = f"{rate:8.1f}" if isinstance(rate, float) else " " * 8
        print(
            f"{row['case']:36} {row.get('threads', ''):>7} {shown} "
            f"{row['gigabytes_per_second']:6.1f}"
        )
    print(f"kept in {keep('primitives', {'rows': rows})}")


if __name__ == "__main__":
    main()
