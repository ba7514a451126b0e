"""Whole networks beside PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/networks.py [--threads N] [--only NAME] [--whole]

The papers' networks n337 to n926 make one patch of the answer behind 212 to 226³ voxels, within
12 GB. Their peer is PyTorch in float32 by the same algorithm, pooling into fragments: every layer
is timed on some of its fragments, of at least 10 GFLOP, in the better of two memory formats, and
scaled; ``--whole`` runs it on the whole patch, fragment by fragment, too, to check that. The other
networks are computed whole by everybody: a U-Net for patches of 128³, and two classifiers of video,
for one clip and for eight. Times count only between two probes of the machine's rate that agree
within 10 %; of the papers' networks the project's own are taken before and after the peer's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_network import FORMATS, TorchNetwork, fragments

from layer import Point
from machine import keep, kept
from peers import Peers, sessions, versions
from rounds import side_by_side
from znni_dask.choices import Menu, choose_primitives, chosen_primitives
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, Size, volume
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.kernels.team import Team
from znni_dask.machine import MemoryMeter, anonymous_bytes, cores
from znni_dask.network.build import Builder
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.layers import Conv, MaxPool
from znni_dask.network.network import Network
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.patchwise import WindowExecutor
from znni_dask.planner import Request, plan
from znni_dask.primitives.base import Array, Shape
from znni_dask.primitives.forms import FormChange
from znni_dask.schedule import Schedules
from znni_dask.windows import WholeWindow

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from video_networks import c3d, resnet34

ALLOWED_BYTES = 12 * 10**9
OUTPUTS = {"n337": 128, "n537": 64, "n726": 96, "n926": 60}  # edge of a patch of the answer
PEER_FLOPS, POOLED = 1e10, 2**26  # operations, and values, of a layer's part that is timed
CLIP: Size = (16, 112, 112)
CLIPS = 8
ROUNDS = 3
RUNS = 100_000  # of a network, over which what it takes to begin is spread
LARGEST_DIFFERENCE = 1e-4  # relative L2, between float32 and float32


def unet(widths: tuple[int, ...] = (32, 64, 128, 256)) -> Network:
    """Two convolutions of 3³ with ReLU (and batch normalisation folded into them) at each
    resolution, padded, transposed convolutions up."""
    b = Builder(1)
    x, skips = b.input, []

    def two(x: str, width: int) -> str:
        for _ in range(2):
            x = b.relu(b.conv(x, width, 3, padding=1))
        return x

    for width in widths[:-1]:
        x = two(x, width)
        skips.append(x)
        x = b.max_pool(x, 2)
    x = two(x, widths[-1])
    for width, skip in zip(widths[-2::-1], reversed(skips), strict=True):
        x = two(b.concat(skip, b.conv_transpose(x, width, 2, stride=2)), width)
    return b.network(b.conv(x, 3, 1))


class Dense:
    """One patch of a dense network, planned within the memory allowed."""

    def __init__(self, network: Network, edge: int, threads: int) -> None:
        layout = Layout(network, (1024,) * 3, "valid")
        patch: Size = (edge,) * 3
        made = plan(
            Request(
                layout=layout,
                patch=patch,
                unit=patch,
                voxel_bytes=4,
                encoding_bytes=0,
                read_bytes=lambda region, by_cells=False: 4 * volume(region),
                write_bytes=0,
                baseline_bytes=0,
                allowed_bytes=ALLOWED_BYTES,
                threads=threads,
                hull=Box((0, 0, 0), layout.output_size),
            )
        )
        primitives = chosen_primitives(layout, made)
        self.names = {name: p.name for name, p in primitives.items()}
        self.predicted_bytes = made.predicted_bytes
        schedules = Schedules(layout, primitives)
        self.todo = schedules.schedule(Box((0, 0, 0), patch))
        sizes = schedules.sizes(self.todo.output)
        self._executor = SerialExecutor(schedules, sizes, threads)
        random = np.random.default_rng(0)
        self.x = random.standard_normal((1, *self.todo.input.size), np.float32)
        self.out = np.empty((network.out_channels, *patch), np.float32)

    def run(self) -> None:
        """Make the patch."""
        self._executor.run(self.todo, [self.x], [self.out])

    def close(self) -> None:
        """End the threads and free the memory."""
        self._executor.close()
        del self._executor


def published(name: str, team: Team, whole: bool) -> dict[str, Any]:
    """One of the papers' networks beside PyTorch."""
    network = simplify(PAPER_NETWORKS[name]())
    before = anonymous_bytes()
    with MemoryMeter() as meter:
        own = Dense(network, OUTPUTS[name], team.threads)
        before_peer = timed(own, team)
    own.close()
    layers = dict(layers_by_torch(network, OUTPUTS[name], team))
    again = Dense(network, OUTPUTS[name], team.threads)
    seconds = (before_peer + timed(again, team)) / 2
    again.close()
    voxels = volume(own.out.shape[1:])
    print(f"{name}: {voxels / seconds:,.0f} voxels/s", flush=True)
    peer = sum(layers.values())
    found: dict[str, Any] = {
        "input": own.x.shape[1:],
        "output": own.out.shape[1:],
        "threads": team.threads,
        "primitives": own.names,
        "allowed_bytes": ALLOWED_BYTES,
        "predicted_bytes": own.predicted_bytes,
        "peak_bytes": meter.peak_bytes - before,
        "seconds": seconds,
        "voxels_per_second": voxels / seconds,
        "peer_seconds": peer,
        "peer_voxels_per_second": voxels / peer,
        "peer_seconds_of_layers": layers,
        "times": peer / seconds,
    }
    if whole:
        found["peer_whole"] = checked_whole(network, own, team)
    return found


def timed(own: Dense, team: Team) -> float:
    """Seconds of a patch."""
    timings = side_by_side({"own": own.run}, team, ROUNDS)
    if not timings:
        raise SystemExit("the machine's rate changed during every round")
    return timings["own"].seconds


def layers_by_torch(network: Network, made: int, team: Team) -> Iterator[tuple[str, float]]:
    """Seconds by PyTorch of every layer behind a patch of the answer, ``made`` voxels long along
    every axis, scaled from a part of its fragments."""
    torch.set_num_threads(team.threads)
    layout = Layout(network, (1024,) * 3, "valid")
    patch = Box((0, 0, 0), (made,) * 3)
    for step in Schedules(layout, choose_primitives(layout)).schedule(patch).steps:
        if isinstance(step.primitive, FormChange):
            continue  # of this project's own
        problem, node = step.problem, step.operation.node
        layer = node.layer
        batch, channels, edge, *_ = problem.inputs[0]
        if isinstance(layer, Conv):
            point = Point(layer, channels, edge, batch)
            part = point.part(PEER_FLOPS)
            calls = Peers(part, team.threads, only=("torch", "torch channels last")).calls
            share = part.flops / point.flops
        else:
            assert isinstance(layer, MaxPool)
            some = max(1, min(batch, POOLED // (channels * edge**3)))
            depth = min(edge, max(8, POOLED // (some * channels * edge**2)))
            calls = dict(pooling_by_torch(layer, (some, channels, depth, edge, edge)))
            share = some / batch * depth / edge
        with torch.inference_mode():
            timings = side_by_side(calls, team, ROUNDS)
        if not timings:
            raise SystemExit(f"{node.name}: the machine's rate changed during every round")
        print(f"  {node.name}", end="", flush=True)
        yield node.name, min(t.seconds for t in timings.values()) / share


def pooling_by_torch(layer: MaxPool, shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """Pooling into fragments, in both memory formats."""
    x = torch.randn(shape)
    for name, memory in FORMATS.items():
        placed = x.contiguous(memory_format=memory)
        yield f"torch{name}", partial(fragments, layer, placed)


def checked_whole(network: Network, own: Dense, team: Team) -> dict[str, float]:
    """PyTorch on the whole patch, once: its seconds, and how far its answer is."""
    peer = TorchNetwork(network, team.threads, FORMATS[""])
    begin = time.perf_counter()
    made = peer.fragments(own.x[None])
    seconds = time.perf_counter() - begin
    answer = np.empty_like(own.out)
    for fragment, start in zip(made, own.todo.positions, strict=True):
        here = (slice(a, None, s) for a, s in zip(start, own.todo.spacing, strict=True))
        answer[(slice(None), *here)] = fragment
    difference = float(np.linalg.norm(answer - own.out) / np.linalg.norm(answer))
    if not difference <= LARGEST_DIFFERENCE:
        raise SystemExit(f"PyTorch differs by {difference:.1e}: one of the two is wrong")
    return {"seconds": seconds, "difference": difference}


def complete(network: Network, size: Size, batch: int, team: Team) -> dict[str, Any]:
    """A network on ``batch`` arrays of one size at once, by everybody."""
    layout = WholeWindow(network, size)
    plain = Schedules(layout, choose_primitives(layout), batch)
    patch = Box((0, 0, 0), layout.output_size)
    primitives = Menu.of_patches(plain, patch, RUNS, team.threads).fastest()
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, network.in_channels, *size), np.float32)
    apply: dict[str, Callable[[Array], Array]] = {
        f"torch{name}": TorchNetwork(network, team.threads, memory).apply
        for name, memory in FORMATS.items()
    }
    apply |= sessions(to_onnx(network).SerializeToString(), x.shape, team.threads)
    with WindowExecutor(layout, primitives, team.threads, batch) as executor:
        apply["own"] = lambda x: executor.apply(list(x))
        answers = {name: call(x) for name, call in apply.items()}
        for name, answer in answers.items():
            difference = np.linalg.norm(answer - answers["own"]) / np.linalg.norm(answers["own"])
            if not difference <= LARGEST_DIFFERENCE:
                raise SystemExit(f"{name} differs by {difference:.1e}: one of the two is wrong")
        calls = {name: partial(call, x) for name, call in apply.items()}
        timings = side_by_side(calls, team, ROUNDS)
    if not timings:
        raise SystemExit("the machine's rate changed during every round")
    seconds = {name: timing.seconds for name, timing in timings.items()}
    own = seconds.pop("own")
    best = min(seconds, key=seconds.__getitem__)
    return {
        "input": size,
        "batch": batch,
        "threads": team.threads,
        "primitives": {name: p.name for name, p in primitives.items()},
        "seconds": own,
        "peers": seconds,
        "best_peer": best,
        "times": seconds[best] / own,
    }


COMPLETE: dict[str, tuple[Callable[[], Network], Size, int]] = {
    "U-Net": (unet, (128, 128, 128), 1),
    "C3D": (c3d, CLIP, 1),
    "C3D, batch": (c3d, CLIP, CLIPS),
    "3D-ResNet-34": (resnet34, CLIP, 1),
    "3D-ResNet-34, batch": (resnet34, CLIP, CLIPS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--only", choices=[*OUTPUTS, *COMPLETE], action="append")
    parser.add_argument("--whole", action="store_true", help="run PyTorch on whole patches, too")
    options = parser.parse_args()
    name = f"networks-{options.threads}-threads"
    rows = {row["network"]: row for row in kept(name).get("rows", [])}
    with Team(options.threads) as team:
        for each in options.only or [*OUTPUTS, *COMPLETE]:
            if each in OUTPUTS:
                row = published(each, team, options.whole)
            else:
                make, size, batch = COMPLETE[each]
                row = complete(simplify(make()), size, batch, team)
            whole = {k: v for k, v in rows.get(each, {}).items() if k == "peer_whole"}
            rows[each] = {"network": each, **whole, **row}  # that stays of an earlier run
            print(f"{each:20} {row['seconds']:8.3f} s, {row['times']:6.2f} times", flush=True)
            keep(name, {"versions": versions(), "rows": list(rows.values())})


if __name__ == "__main__":
    main()
