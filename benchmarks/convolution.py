"""Tiled FFT convolution beside PyTorch's best, layer by layer.

    python benchmarks/convolution.py [--threads N] [--quick]        (or: make bench)

Every point is run in turn with its peer, in rounds; medians count, and only of rounds between two
probes of the machine's rate that agree within 10 %. The peer is torch in float32, the better of
contiguous and channels-last memory. Where a layer is more than some 40 GFLOP the peer computes
part of it (fewer samples, or fewer planes), and its time is scaled; that is said in the result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import geometric_mean, median

import numpy as np
import torch
from machine import bytes_per_second, flops_per_second, keep

from znni_dask.choices import tiled
from znni_dask.costs import step_seconds
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network.layers import Conv
from znni_dask.primitives.base import Form, Problem

PEER_FLOPS = 4e10  # of a part that stands for a whole layer
ROUNDS, TRIES = 5, 12
AGREE = 0.1


@dataclass(frozen=True)
class Point:
    """A convolution of ``batch`` cubes of ``edge`` voxels."""

    fan_in: int
    fan_out: int
    kernel: int
    edge: int
    batch: int

    @property
    def made(self) -> int:
        """Edge of the output."""
        return self.edge - self.kernel + 1

    @property
    def flops(self) -> int:
        """Of direct convolution."""
        taps = self.fan_in * self.fan_out * self.kernel**3
        return 2 * taps * self.batch * self.made**3

    @property
    def layer(self) -> Conv:
        """With bias and ReLU."""
        return Conv(self.fan_in, self.fan_out, (self.kernel,) * 3, relu=True)

    def __str__(self) -> str:
        return f"{self.fan_in} → {self.fan_out}, {self.kernel}³, {self.batch} × {self.edge}³"


SIZES = [(24, 64), (24, 512), (36, 8), (36, 64), (66, 1), (66, 8), (100, 1)]
MIDDLE = [Point(80, 80, k, n, s) for k in (3, 5, 7, 9) for n, s in SIZES]
UNETS = [Point(f, f, 3, n, 1) for f, n in ((32, 130), (64, 66), (128, 34), (256, 26))]
QUICK = [Point(80, 80, k, 36, 8) for k in (3, 5, 7, 9)]


def own(point: Point, team: Team) -> tuple[Callable[[], None], str]:
    """The layer by the tile that is estimated fastest, as a call; and its name."""
    made = (point.made,) * 3
    shape = (point.batch, point.fan_in, *(point.edge,) * 3)
    problem = Problem(
        point.layer,
        (shape,),
        (point.batch, point.fan_out, *made),
        ((0, 0, 0),),
        (0, 0, 0),
        shape[2:],
    )
    best = min(tiled(problem), key=lambda p: step_seconds(p, problem, team.threads))
    random = np.random.default_rng(0)
    weights = {
        "weight": random.standard_normal((point.fan_out, point.fan_in, *point.layer.kernel), "f4"),
        "bias": np.zeros(point.fan_out, np.float32),
    }
    prepared = best.prepare(point.layer, weights)
    x, out = (
        allocate(Form.BLOCKED.nbytes(s)).view(np.float32).reshape(Form.BLOCKED.stored(s))
        for s in (shape, problem.output)
    )
    x[...] = random.standard_normal(x.shape, np.float32)
    out[...] = 0
    return lambda: best.apply(prepared, problem, [x], out, team), best.name


def peers(point: Point) -> tuple[dict[str, Callable[[], object]], float]:
    """PyTorch in both memory formats, as calls; and how many times as long the whole takes."""
    batch = max(1, min(point.batch, ceil(PEER_FLOPS / (point.flops / point.batch))))
    planes = point.made
    if batch == 1:
        planes = max(
            1, min(point.made, ceil(PEER_FLOPS / (point.flops / point.batch / point.made)))
        )
    x = torch.randn(batch, point.fan_in, planes + point.kernel - 1, point.edge, point.edge)
    weight = torch.randn(point.fan_out, point.fan_in, *point.layer.kernel)
    bias = torch.zeros(point.fan_out)

    def call(memory: torch.memory_format) -> Callable[[], object]:
        placed, kernel = x.contiguous(memory_format=memory), weight.contiguous(memory_format=memory)
        return lambda: torch.nn.functional.conv3d(placed, kernel, bias).relu_()

    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}
    share = point.batch / batch * point.made / planes
    return {name: call(memory) for name, memory in formats.items()}, share


def measure(point: Point, team: Team) -> dict[str, object] | None:
    """Medians of one point, side by side with its peer; None where no round was steady."""
    ours, tile = own(point, team)
    others, share = peers(point)
    calls = {"own": ours, **others}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(TRIES):
            before = flops_per_second(team)
            round_seconds = {}
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                round_seconds[name] = time.perf_counter() - begin
            after = flops_per_second(team)
            if abs(after / before - 1) <= AGREE:
                for name, found in round_seconds.items():
                    seconds[name].append(found)
            if len(seconds["own"]) == ROUNDS:
                break
    if not seconds["own"]:
        return None
    middle = {name: median(found) for name, found in seconds.items()}
    peer = share * min(middle[name] for name in others)
    return {
        "point": str(point),
        "kernel": point.kernel,
        "threads": team.threads,
        "tile": tile,
        "rounds": len(seconds["own"]),
        "seconds": middle["own"],
        "peer_seconds": peer,
        "peer_part": 1 / share,
        "times": peer / middle["own"],
        "direct_gflop_per_second": point.flops / middle["own"] / 1e9,
        "peer_gflop_per_second": point.flops / peer / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="one size of each kernel")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    print(f"{'':32} {'tile':>20} {'GFLOP/s':>8} {'torch':>6} {'times':>6}")
    with Team(options.threads) as team:
        rate, memory = flops_per_second(team), bytes_per_second()
        for point in QUICK if options.quick else [*MIDDLE, *UNETS]:
            if (row := measure(point, team)) is None:
                print(f"{point}: left out, the machine's rate changed during every round")
                continue
            rows.append(row)
            print(
                f"{row['point']:32} {row['tile']:>20} {row['direct_gflop_per_second']:8.0f} "
                f"{row['peer_gflop_per_second']:6.0f} {row['times']:6.1f}",
                flush=True,
            )
    means = {}
    for kernel in sorted({int(str(row["kernel"])) for row in rows}):
        chosen = [row for row in rows if row["kernel"] == kernel and str(row["point"])[:2] == "80"]
        means[f"{kernel}³"] = geometric_mean([float(str(row["times"])) for row in chosen])
    print("geometric means, 80 → 80:", {k: round(v, 1) for k, v in means.items()})
    found = {
        "register_gflop_per_second": rate / 1e9,
        "copy_gigabytes_per_second": memory / 1e9,
        "torch": torch.__version__,
        "geometric_means": means,
        "rows": rows,
    }
    if not options.quick:
        print(f"kept in {keep(f'convolution-{options.threads}-threads', found)}")


if __name__ == "__main__":
    main()
