"""The study of the ZNNi paper (Zlateski et al. 2016) on the machine at hand.

    python pipelines/study.py [--only n337] [--threads 2]
    python pipelines/study.py --draw

For the four networks of the paper: throughput against the size of the patch by every algorithm,
against the memory allowed, and of several patches at once, as the planner predicts it for this
machine, which is measured first as `znni measure` does. Of every algorithm the best patch that fits
12 GB and is predicted to take no longer than twenty seconds is run, too. Among them are those that
the paper compared with: pooling once per offset (its cuDNN baseline), fragments with direct
convolution (ELEKTRONN), and dilated convolution, direct (Caffe with strided kernels) and by FFT
(ZNN). Runs count between two probes of the machine's rate that agree within 10 %. The result is
kept under `benchmarks/results/`; the pictures are drawn from it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from znni_dask import column_planner, planner, timings
from znni_dask.choices import Menu, choose_primitives, planned
from znni_dask.costs import Costs
from znni_dask.errors import MemoryLimitError
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.machine import MemoryMeter, anonymous_bytes, cores
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.layers import Conv, MaxPool
from znni_dask.network.network import Network, Node
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.resources import computing_bytes
from znni_dask.schedule import Schedules

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import keep, kept
from planning import calibrated, steady
from streaming import unhindered

IMAGES = Path(__file__).parents[1] / "docs" / "images"
VOLUME = (1024, 1024, 1024)
EDGES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # of patches of the answer
AT_ONCE = (1, 2, 4, 8)
GIGABYTES = (1, 2, 4, 8, 12, 20)
ALLOWED_BYTES = 12 * 10**9  # of patches that are run
LONGEST_SECONDS = 20.0
REPEATS = 2  # of which the last counts


def dilated(network: Network) -> Network:
    """The same dense answer without fragments: windows of later layers are dilated instead, and
    poolings do not stride."""
    dilation = {network.input.name: 1}
    nodes = []
    for node in network:
        layer, name = node.layer, node.name
        if node.inputs:
            (source,) = node.inputs
            spread = dilation[name] = dilation[source]
            if isinstance(layer, Conv | MaxPool):
                dilation[name] = spread * layer.stride[0]
                layer = replace(layer, stride=(1, 1, 1), dilation=(spread,) * 3)
        nodes.append(Node(name, layer, node.inputs))
    return Network(tuple(nodes), network.outputs, network.weights)


def as_it_is(network: Network) -> Network:
    """Poolings make fragments, or are done once per offset."""
    return network


@dataclass(frozen=True)
class Algorithm:
    """A network made otherwise, with convolutions of a family, or of the fastest."""

    family: str | None = None
    fragments: bool = True
    made: Callable[[Network], Network] = as_it_is

    def layout(self, name: str) -> Layout:
        """One of the paper's networks over the volume."""
        return Layout(self.made(simplify(PAPER_NETWORKS[name]())), VOLUME, "valid")

    def schedules(
        self, layout: Layout, edge: int, samples: int, found: _Found, allowed_bytes: float = inf
    ) -> Schedules:
        """Of cubic patches, so many at once, with the primitives that are fastest for them; of
        those of no family, if any fit, within the memory allowed."""
        chosen = choose_primitives(layout, self.fragments)
        plain = Schedules(layout, chosen, samples)
        menu = Menu.of_patches(plain, _cube(edge), 1e6, found.threads, found.costs)
        if self.family is not None:
            return Schedules(layout, menu.of_family(self.family), samples)
        least = computing_bytes(plain, plain.sizes(_cube(edge)), (edge,) * 3, found.threads)
        fitting = menu.fastest_within(allowed_bytes - least)
        return Schedules(layout, fitting or menu.fastest(), samples)


ALGORITHMS = {
    "fastest of all": Algorithm(),
    "tiled FFT": Algorithm("tiled fft"),
    "FFT of patches": Algorithm("whole fft"),
    "direct": Algorithm("direct blocked"),
    "direct, once per offset": Algorithm("direct blocked", fragments=False),
    "direct, dilated": Algorithm("direct blocked", made=dilated),
    "tiled FFT, dilated": Algorithm("tiled fft", made=dilated),
}


@dataclass(frozen=True)
class _Found:
    """What the machine takes."""

    threads: int
    costs: Costs


def predicted(
    name: str,
    algorithm: str,
    edge: int,
    samples: int,
    found: _Found,
    allowed_bytes: float = inf,
) -> dict[str, Any]:
    """Throughput and memory of patches, none of which is computed."""
    how = ALGORITHMS[algorithm]
    layout = how.layout(name)
    schedules = how.schedules(layout, edge, samples, found, allowed_bytes)
    sizes = schedules.sizes(_cube(edge))
    choices = planned(schedules, sizes, samples * edge**3, found.threads, found.costs)
    return {
        "edge": edge,
        "samples": samples,
        "voxels_per_second": 1 / sum(choice.voxel_seconds for choice in choices),
        "bytes": computing_bytes(schedules, sizes, (edge,) * 3, found.threads),
    }


def measured(name: str, algorithm: str, edge: int, threads: int) -> dict[str, Any]:
    """A patch computed: seconds, once all memory was touched, and memory."""
    how = ALGORITHMS[algorithm]
    layout = how.layout(name)
    found = _Found(threads, Costs(timings.kept()))
    schedules = how.schedules(layout, edge, 1, found, ALLOWED_BYTES)
    box = _cube(edge)
    todo, sizes = schedules.schedule(box), schedules.sizes(box)
    values = np.random.default_rng(0).standard_normal((1, *todo.input.size), np.float32)
    answer = np.empty((layout.network.out_channels, *box.size), np.float32)
    before, begin = anonymous_bytes(), 0.0
    with (
        MemoryMeter() as meter,
        SerialExecutor(schedules, sizes, threads) as executor,
    ):
        for _ in range(REPEATS):
            begin = time.perf_counter()
            executor.run(todo, [values], [answer])
        seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "voxels_per_second": box.voxels / seconds,
        "peak_bytes": meter.peak_bytes - before,
        "primitives": {key: one.name for key, one in schedules.primitives.items()},
    }


def by_patch(name: str, found: _Found) -> dict[str, list[dict[str, Any]]]:
    """Throughput of every algorithm against the size of the patch."""
    return {
        algorithm: [predicted(name, algorithm, edge, 1, found) for edge in EDGES]
        for algorithm in ALGORITHMS
    }


def by_samples(name: str, found: _Found) -> dict[str, list[dict[str, Any]]]:
    """Of the fastest algorithm, several patches at once."""
    return {
        str(samples): [predicted(name, "fastest of all", edge, samples, found) for edge in EDGES]
        for samples in AT_ONCE
    }


def by_memory(name: str, found: _Found) -> dict[str, list[dict[str, Any]]]:
    """Throughput of the best plans within some memory: in patches, and in slabs."""
    layout = ALGORITHMS["fastest of all"].layout(name)
    told: dict[str, list[dict[str, Any]]] = {"patches": [], "slabs": []}
    for gigabytes in GIGABYTES:
        allowed_bytes = gigabytes * 10**9
        resources = unhindered(layout, allowed_bytes, found.threads, found.costs, baseline_bytes=0)
        plans: dict[str, Plan | None] = {"slabs": column_planner.search(layout, resources)}
        try:
            plans["patches"] = planner.plan(planner.Request(**vars(resources), layout=layout))
        except MemoryLimitError:
            plans["patches"] = None
        for way, plan in plans.items():
            rate = plan.voxels_per_second if plan else None
            told[way].append({"gigabytes": gigabytes, "voxels_per_second": rate})
    return told


def within_memory(name: str, algorithm: str, found: _Found) -> list[dict[str, Any]]:
    """Patches by primitives that fit the memory of those that are run."""
    return [predicted(name, algorithm, edge, 1, found, ALLOWED_BYTES) for edge in EDGES]


def worth_running(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of an algorithm's patches that fits and does not take too long."""
    fitting = [
        row
        for row in rows
        if row["bytes"] <= ALLOWED_BYTES
        and row["edge"] ** 3 / row["voxels_per_second"] <= LONGEST_SECONDS
    ]
    return max(fitting, key=lambda row: row["voxels_per_second"], default=None)


def study(name: str, found: _Found, team: Team, reference: float) -> dict[str, Any]:
    """All of it, of one network."""
    told: dict[str, Any] = {
        "by_patch": by_patch(name, found),
        "by_samples": by_samples(name, found),
        "by_memory": by_memory(name, found),
        "measured": {},
    }
    for algorithm in ALGORITHMS:
        rows = told["by_patch"][algorithm]
        if ALGORITHMS[algorithm].family is None:  # which chooses by memory, too
            rows = within_memory(name, algorithm, found)
        row, one = worth_running(rows), {}
        if row is not None:
            asked = (name, algorithm, str(row["edge"]), str(found.threads))
            command = [sys.executable, __file__, "--one", *asked]
            one = steady(command, team, reference, tries=1)
        row = row or rows[0]
        told["measured"][algorithm] = {
            **one,
            "patch": [row["edge"]] * 3,
            "predicted_voxels_per_second": row["voxels_per_second"],
            "predicted_bytes": row["bytes"],
        }
        rate = one.get("voxels_per_second")
        made = "not run" if rate is None else f"{rate:,.0f} voxels/s"
        print(f"{name} {algorithm}: {row['edge']}³, {made}", flush=True)
    return told


def draw(result: dict[str, Any]) -> None:
    """The pictures of a result."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 8})
    pictures = (
        ("study-patch", "by_patch", "edge", "edge of the patch, voxels", "algorithm"),
        ("study-samples", "by_samples", "bytes", "memory, GB", "patches at once"),
        ("study-memory", "by_memory", "gigabytes", "memory allowed, GB", "made in"),
    )
    for file, key, along, label, title in pictures:
        figure = Figure(figsize=(8, 6), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for axes, (name, told) in zip(panels, result["networks"].items(), strict=False):
            for line, rows in told[key].items():
                some = [row for row in rows if row["voxels_per_second"] is not None]
                places = [row[along] / (1e9 if along == "bytes" else 1) for row in some]
                rates = [row["voxels_per_second"] for row in some]
                axes.plot(places, rates, marker=".", linewidth=1, label=line)
            axes.set(title=name, xlabel=label, ylabel="voxels/s", yscale="log")
            if along == "bytes":
                axes.set(xscale="log")
        figure.axes[0].legend(title=title, fontsize=6, title_fontsize=6)
        figure.savefig(IMAGES / f"{file}.svg", metadata={"Date": None})
        print(f"drawn: {IMAGES / file}.svg")


def _cube(edge: int) -> Box:
    return Box((0, 0, 0), (edge,) * 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=[*PAPER_NETWORKS], action="append")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--draw", action="store_true", help="draw what was kept, run nothing")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, algorithm, edge, threads = given.one
        print(json.dumps(measured(name, algorithm, int(edge), int(threads))))
        return
    kept_as = f"study-{given.threads}-threads"
    networks: dict[str, Any] = kept(kept_as).get("networks", {})
    if not given.draw:
        with tempfile.TemporaryDirectory() as place, Team(given.threads) as team:
            os.environ["ZNNI_TIMINGS"] = f"{place}/timings.json"
            reference = calibrated(team)
            found = _Found(given.threads, Costs(timings.kept()))
            for name in given.only or PAPER_NETWORKS:
                networks[name] = study(name, found, team, reference)
                keep(kept_as, {"networks": networks})
    draw({"networks": networks})


if __name__ == "__main__":
    main()
