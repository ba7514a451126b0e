"""Blocks made slab by slab beside patches, of the networks of the ZNNi paper and a U-Net.

    python benchmarks/streaming.py [--only n537] [--limit 4GB] [--threads 2] [--way slabs]

Within some limits the fastest plan in slabs is searched for a large volume and run in the middle of
a column; within the largest the fastest in patches, too, of which one after the first counts, and
PyTorch is timed on patches of the papers' networks, as `benchmarks/networks.py` does: each in a
process of its own. Reading and writing do not count. Runs count only between two probes of the
machine's rate that agree within 10 %; the machine is measured anew for every network, so that what
is predicted is of the same hour. The result is kept under `benchmarks/results/`.

``products_over_least`` are the products of spectra of slabs in the middle of a column over those of
the best cubic tiles, if nothing were computed but the answer; `fewest` is the plan in slabs that
has fewest, of all ways to make fragments, thicknesses and shares of the memory that pages take.
`--way` makes some ways alone; the others are kept as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import inf, prod
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from machine import keep, kept
from networks import OUTPUTS, layers_by_torch
from planning import Probe, calibrated, steady, unet
from znni_dask import column_planner, planner, timings
from znni_dask.choices import chosen_primitives
from znni_dask.columns import Column, period_of
from znni_dask.costs import Costs
from znni_dask.cut import Cut
from znni_dask.errors import MemoryLimitError
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.codelets import LONGEST
from znni_dask.kernels.team import Team
from znni_dask.machine import MemoryMeter, anonymous_bytes, cores, parse_bytes
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.field_of_view import Interval
from znni_dask.network.rewrites import simplify
from znni_dask.pages import STEADY, memory_of_all
from znni_dask.patches import Layout, largest_box
from znni_dask.plan import Plan
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_fft_tiles import PRODUCTS, ConvTiledFFT
from znni_dask.resources import Resources
from znni_dask.schedule import Schedules
from znni_dask.slabs import Programs, across, typical

LIMITS = ("2GB", "4GB", "12GB")
SIZE, SIZE_OF_OTHERS = (1024, 1024, 1024), (512, 512, 512)
UNETS = {f"U-Net {depth}, {base}": partial(unet, depth, base) for depth, base in ((4, 32), (5, 16))}
NETWORKS = {**PAPER_NETWORKS, **UNETS}
BEFORE, SLABS = 1, 3  # thick slabs that do not count, and those that do
WAYS = ("slabs", "patches", "fewest", "torch")  # the last ones of the papers' networks
REPEATS = 2  # of a patch, of which the last counts


def one(name: str, limit: str, threads: int, way: str) -> dict[str, Any]:
    """A network within a limit, in slabs or in patches."""
    size = SIZE if name in PAPER_NETWORKS else SIZE_OF_OTHERS
    if way == "torch":
        return by_torch(name, threads)
    layout = Layout(simplify(NETWORKS[name]()), size, "reflect")
    baseline = anonymous_bytes()
    resources = unhindered(layout, parse_bytes(limit), threads, Costs(timings.kept()), baseline)
    plan: Plan | None = None
    if way == "slabs":
        plan = column_planner.search(layout, resources)
    elif way == "fewest":
        plan = fewest_products(layout, resources)
    else:
        try:
            plan = planner.plan(planner.Request(**vars(resources), layout=layout))
        except MemoryLimitError:
            plan = None
    if plan is None:
        return {"none fits": True}
    with MemoryMeter() as meter:
        seconds = (in_slabs if plan.granules else in_patches)(layout, plan)
    computing = sum(choice.voxel_seconds for choice in plan.stages[0].choices)
    return {
        "patch": plan.patch,
        "block": plan.block,
        "primitives": plan.primitives,
        "planes": plan.granules,
        "seconds": seconds,
        "voxels_per_second": 1 / seconds,
        "predicted_voxels_per_second": 1 / computing,
        "flops_per_voxel": plan.flops_per_voxel,
        "products_over_least": products_over_least(layout, plan),
        "peak_bytes": meter.peak_bytes,
        "predicted_bytes": plan.predicted_bytes,
    }


def unhindered(
    layout: Layout, allowed_bytes: int, threads: int, costs: Costs, baseline_bytes: int
) -> Resources:
    """What there is for a run of which reading and writing take nothing."""
    return Resources(
        unit=(32, 32, 32),
        voxel_bytes=0,
        encoding_bytes=0,
        read_bytes=lambda size, by_cells=False: 0,
        write_bytes=0,
        baseline_bytes=baseline_bytes,
        allowed_bytes=allowed_bytes,
        threads=threads,
        hull=Box((0, 0, 0), layout.output_size),
        costs=costs,
    )


def in_slabs(layout: Layout, plan: Plan) -> float:
    """Seconds for a voxel in the middle of a column, of whose passes, which are alike, one is
    timed."""
    schedules = Schedules(layout, chosen_primitives(layout, plan))
    box = largest_box(layout, plan.block)
    depth = period_of(layout, plan.granules) * (BEFORE + SLABS + 1)
    output = Box((0, *box.start[1:]), (depth, *box.stop[1:]))
    column = Column.of(schedules, output, plan.granules)
    passes = len(column.offsets)
    column = replace(column, offsets=column.offsets[:1])
    memory = memory_of_all(schedules, Cut.of(plan), plan.granules, plan.threads)
    values = np.random.default_rng(0).standard_normal((1, 1, *column.input.size[1:]))
    plane = values.astype(np.float32)

    def read(planes: Interval) -> NDArray[np.float32]:
        return np.broadcast_to(plane, (1, planes[1] - planes[0], *plane.shape[2:]))

    primitives = schedules.primitives
    ends = [time.perf_counter()]
    with ColumnExecutor(layout.network, primitives, memory, plan.threads) as executor:
        for slab, _ in executor.slabs(column, read):
            if (slab.stop[0] - output.start[0]) % column.period == 0:
                ends.append(time.perf_counter())
            if len(ends) > BEFORE + SLABS:
                break
    voxels = column.period * prod(output.size[1:])
    return passes * median(b - a for a, b in pairwise(ends[BEFORE:])) / voxels


def products_over_least(layout: Layout, plan: Plan) -> float | None:
    """Of a plan in slabs; None of others, and where nothing is computed in tiles."""
    if not plan.granules:
        return None
    schedules = Schedules(layout, chosen_primitives(layout, plan))
    period, cut = period_of(layout, plan.granules), Cut.of(plan)
    column, program = Programs(layout, plan.granules).of(schedules, STEADY * period)
    both = zip(program.tasks, program.steady, strict=True)
    program = replace(program, tasks=tuple(task._replace(times=times) for task, times in both))
    made = period * prod(largest_box(layout, cut.block).size[1:])
    done = least = 0.0
    for step, times in typical(across(column, cut), program):
        if isinstance(step.primitive, ConvTiledFFT):
            done += times * step.primitive.work(step.problem, 1).amount(PRODUCTS) / made
            spacing = prod(layout.network.spacing[step.operation.node.name])
            # of this layer behind a voxel of the answer
            voxels = 1.0 if layout.geometry.dense else 1 / float(spacing)
            least += voxels * least_products(step.problem)
    return done / least if least else None


def fewest_products(layout: Layout, resources: Resources) -> Plan | None:
    """The plan in slabs along z that has fewest, of all that fit."""
    plans = column_planner.every(layout, resources)
    return min(plans, key=lambda plan: products_over_least(layout, plan) or inf, default=None)


def least_products(problem: Problem) -> float:
    """Of a voxel of a convolution's output, by the best cubic tile."""
    found = []
    for edge in range(2, LONGEST + 1, 2):
        primitive = ConvTiledFFT((edge, edge, edge))
        if primitive.refusal(problem.layer) is None:
            made = [edge - k + 1 for k in problem.layer.kernel]
            shape = (1, problem.inputs[0][1], edge, edge, edge)
            output = (1, problem.output[1], *made)
            one = Problem(problem.layer, (shape,), output, ((0, 0, 0),), (0, 0, 0), shape[2:])
            found.append(primitive.work(one, 1).amount(PRODUCTS) / prod(made))
    return min(found)


def by_torch(name: str, threads: int) -> dict[str, Any]:
    """Patches of the answer behind 212 to 226³ voxels, by PyTorch."""
    with Team(threads) as team:
        layers = dict(layers_by_torch(simplify(PAPER_NETWORKS[name]()), OUTPUTS[name], team))
    seconds = sum(layers.values()) / OUTPUTS[name] ** 3
    return {"seconds": seconds, "voxels_per_second": 1 / seconds}


def in_patches(layout: Layout, plan: Plan) -> float:
    """Seconds for a voxel of a patch."""
    schedules = Schedules(layout, chosen_primitives(layout, plan))
    box = largest_box(layout, plan.patch)
    todo, sizes = schedules.schedule(box), schedules.sizes(box)
    shape = (1, *todo.input.size)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    answer = np.empty((layout.network.out_channels, *box.size), np.float32)
    begin = 0.0
    with SerialExecutor(schedules, sizes, plan.threads) as executor:
        for _ in range(REPEATS):
            begin = time.perf_counter()
            executor.run(todo, [values], [answer])
        return (time.perf_counter() - begin) / box.voxels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=[*NETWORKS], action="append")
    parser.add_argument("--limit", choices=LIMITS, action="append")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, limit, threads, way = given.one
        told = one(name, limit, int(threads), way)
        print()  # after what was told meanwhile
        print(json.dumps(told))
        return
    kept_as = f"streaming-{given.threads}-threads"
    rows = {(r["network"], r["limit"]): r for r in kept(kept_as).get("rows", ())}
    with tempfile.TemporaryDirectory() as place, Team(given.threads) as team:
        os.environ["ZNNI_TIMINGS"] = f"{place}/timings.json"
        for name in given.only or NETWORKS:
            probe = Probe(team)
            reference = calibrated(probe)
            for limit in given.limit or LIMITS:
                row: dict[str, Any] = rows.get((name, limit), {"network": name, "limit": limit})
                ways = WAYS if name in PAPER_NETWORKS else WAYS[:2]
                for way in ways if limit == LIMITS[-1] else WAYS[:1]:
                    if given.way and way not in given.way:
                        continue
                    asked = (name, limit, str(given.threads), way)
                    row[way] = steady([sys.executable, __file__, "--one", *asked], probe, reference)
                rows[name, limit] = row
                print(line(row), flush=True)
                keep(kept_as, {"rows": list(rows.values())})


def line(row: dict[str, Any]) -> str:
    """A row as it is told."""
    told = f"{row['network']} {row['limit']:>5}"
    for way in WAYS:
        found = row.get(way, {"refused": "not run"})
        if "voxels_per_second" not in found:
            told += f"; {way}: {found.get('refused', 'none fits')}"
            continue
        speed = found["voxels_per_second"]
        if way == "torch":
            told += f"; torch: {speed:,.0f} voxels/s"
            continue
        size = "·".join(map(str, found["patch"]))
        ratio = speed / found["predicted_voxels_per_second"] / found["rate"]
        unsteady = ", unsteady" if "unsteady" in found else ""
        told += f"; {way} {size}: {speed:,.0f} voxels/s, {ratio:.2f} of predicted{unsteady}"
    return told


if __name__ == "__main__":
    main()
