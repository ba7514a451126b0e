"""Convolutions beside PyTorch, ONNX Runtime and OpenVINO, layer by layer.

    python benchmarks/convolution.py [--threads N] [--only GROUP] [--quick]     (or: make bench)

Each layer is computed by the primitive that the planner's own estimates say is fastest, between
arrays as networks have them: the volume and the answer plain, all others in blocks of channels.
Every peer gets the same values and weights in float32, and its answer must be the same; PyTorch
takes the better of contiguous and channels-last memory, and computes in bfloat16 too, which is
compared apart. Where a layer is more than some 40 GFLOP a peer computes part of it (fewer samples,
or fewer planes), and its time is scaled; the part is in the result. How rounds are timed:
`rounds.py`. Results of a group replace those of an earlier run.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from math import inf
from statistics import geometric_mean
from typing import Any

from layer import Point, Ready, fastest
from machine import bytes_per_second, described, flops_per_second, keep, kept
from peers import Peers, versions
from rounds import side_by_side
from znni_dask.geometry import Size
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network.layers import Conv, ConvTranspose
from znni_dask.primitives.base import Form

PEER_FLOPS = 4e10  # of a part that stands for a whole layer
LARGEST_DIFFERENCE = 1e-4  # of answers in float32, relative L2


def cube(edge: int) -> Size:
    return (edge, edge, edge)


def points(layer: Conv | ConvTranspose, sizes: list[tuple[int, int]], **forms: Form) -> list[Point]:
    """A layer on (edge, batch) of every size."""
    return [Point(layer, layer.in_channels, edge, batch, **forms) for edge, batch in sizes]


def conv(fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1) -> Conv:
    return Conv(fan_in, fan_out, cube(kernel), cube(stride), groups=groups, relu=True)


def up(fan_in: int, fan_out: int) -> ConvTranspose:
    return ConvTranspose(fan_in, fan_out, cube(2), cube(2))


FRAGMENTS = [(24, 64), (24, 512), (36, 8), (36, 64), (66, 1), (66, 8), (100, 1)]
PATCHES = [(26, 1), (34, 1), (66, 1), (130, 1)]
FIRST = [*((80, k) for k in (2, 4, 6, 8)), (48, 3), (48, 5)]
GROUPS: dict[str, list[Point]] = {
    "middle": [p for k in (3, 5, 7, 9) for p in points(conv(80, 80, k), FRAGMENTS)],
    "alone": [p for k in (3, 5, 7, 9) for p in points(conv(80, 80, k), [(24, 1)])],
    "unets": [
        p
        for f, most in ((32, 4), (64, 4), (128, 3), (256, 3))
        for p in points(conv(f, f, 3), PATCHES[:most])
    ],
    "first": [
        p for f, k in FIRST for p in points(conv(1, f, k), [(66, 1), (130, 1)], given=Form.PLAIN)
    ],
    "last": [
        p
        for k in (3, 5, 7, 9)
        for p in points(conv(80, 3, k), [(24, 64), (36, 8), (66, 1)], wanted=Form.PLAIN)
    ],
    "ones": [
        *points(conv(80, 80, 1), [(24, 64), (64, 1), (128, 1)]),
        *points(conv(256, 64, 1), [(32, 1), (64, 1)]),
        *points(conv(80, 3, 1), [(64, 1), (128, 1)], wanted=Form.PLAIN),
    ],
    "strided": [
        *points(conv(64, 128, 3, stride=2), [(25, 1), (49, 1), (65, 1), (129, 1)]),
        *points(conv(32, 64, 2, stride=2), [(24, 1), (48, 1), (64, 1), (128, 1)]),
    ],
    "transposed": [
        *points(up(128, 64), [(12, 1), (24, 1), (32, 1)]),
        *points(up(64, 32), [(24, 1), (32, 1), (64, 1)]),
    ],
    "groups": [
        *points(conv(64, 64, 3, groups=64), [(34, 1), (66, 1)]),
        *points(conv(64, 64, 5, groups=64), [(34, 1), (66, 1)]),
        *points(conv(64, 64, 3, groups=4), [(34, 1), (66, 1)]),
    ],
}


def measure(point: Point, team: Team, rates: dict[str, float]) -> dict[str, Any] | None:
    """One row, side by side with all peers; None where no round was steady."""
    primitive = fastest(point, team.threads)
    own, part = Ready(point, primitive, team), point.part(PEER_FLOPS)
    peers, whole = Peers(part, team.threads), point.flops / part.flops
    timings = side_by_side({"own": own.run, **peers.calls}, team)
    if not timings:
        return None
    differences = peers.differences(own.answer(part))
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": None, "reason": reason} for name, reason in peers.reasons.items()
    }
    for name in peers.calls:
        if not name.endswith("bf16") and not differences[name] <= LARGEST_DIFFERENCE:
            raise SystemExit(
                f"{point.name}, {point.size}: {name} differs by {differences[name]:.1e} from "
                f"{primitive.name}, more than {LARGEST_DIFFERENCE:g}: one of them is wrong"
            )
        found[name] = {
            "seconds": timings[name].seconds * whole,
            "part": 1 / whole,
            "cores": round(timings[name].cores, 2),
            "difference": differences[name],
        }
    seconds = timings["own"].seconds
    return {
        "layer": point.name,
        "size": point.size,
        "threads": team.threads,
        "primitive": primitive.name,
        "rounds": timings["own"].rounds,
        "cores": round(timings["own"].cores, 2),
        "seconds": seconds,
        "gflop_per_second": point.flops / seconds / 1e9,
        "seconds_to_move": own.moved_bytes / rates["copy_gigabytes_per_second"] / 1e9,
        "peers": found,
        **compared(seconds, found),
    }


def compared(seconds: float, peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The best peer in float32, and times as fast as it and as the best in bfloat16; None where
    there is none."""

    def best(bf16: bool) -> tuple[float, str | None]:
        able = {name: p["seconds"] for name, p in peers.items() if p["seconds"] is not None}
        return min(
            ((s, name) for name, s in able.items() if name.endswith("bf16") == bf16),
            default=(inf, None),
        )

    (best_seconds, name), (bf16_seconds, bf16_name) = best(False), best(True)
    return {
        "best_peer": name,
        "times": best_seconds / seconds if name else None,
        "times_bf16": bf16_seconds / seconds if bf16_name else None,
    }


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of every layer the geometric mean of times as fast as the best peer."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["times"] is not None:
            times[row["layer"]].append(row["times"])
    return {layer: geometric_mean(found) for layer, found in times.items()}


def smallest(group: list[Point]) -> list[Point]:
    """Of every layer the point with the fewest operations."""
    layers = dict.fromkeys(point.name for point in group)
    return [min((p for p in group if p.name == n), key=lambda p: p.flops) for n in layers]


def run(group: str, quick: bool, team: Team) -> dict[str, Any]:
    """Measure a group, and print its rows."""
    rates = {
        "register_gflop_per_second": flops_per_second(team) / 1e9,
        "copy_gigabytes_per_second": bytes_per_second(team) / 1e9,
    }
    rows = []
    print(f"{group:28} {'':>10} {'primitive':>24} {'GFLOP/s':>8} {'times':>6} {'bf16':>6}  peer")
    for point in smallest(GROUPS[group]) if quick else GROUPS[group]:
        if (row := measure(point, team, rates)) is None:
            print(f"{point.name}, {point.size}: left out, the machine's rate changed every round")
            continue
        rows.append(row)
        ratios = (f"{row[key]:6.2f}" if row[key] else "     –" for key in ("times", "times_bf16"))
        print(
            f"{row['layer']:28} {row['size']:>10} {row['primitive']:>24} "
            f"{row['gflop_per_second']:8.0f} {' '.join(ratios)}  {row['best_peer']}",
            flush=True,
        )
    print("geometric means:", {k: round(v, 2) for k, v in means(rows).items()})
    of_cores = described()["vectors"]  # machines of one name may have others
    return {
        "vectors": of_cores,
        **rates,
        "versions": versions(),
        "geometric_means": means(rows),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--only", choices=GROUPS, action="append", help="a group of layers")
    parser.add_argument("--quick", action="store_true", help="one size of each layer; not kept")
    options = parser.parse_args()
    name = f"convolution-{options.threads}-threads"
    groups = kept(name).get("groups", {})
    with Team(options.threads) as team:
        for group in options.only or GROUPS:
            groups[group] = run(group, options.quick, team)
            if not options.quick:
                print(f"kept in {keep(name, {'groups': groups})}")


if __name__ == "__main__":
    main()
