"""Blocks made slab by slab beside patches, of the networks of the ZNNi paper and a U-Net.

    python benchmarks/streaming.py [--only n537] [--limit 4GB] [--threads 2]

Within some limits the fastest plan in slabs and the fastest in patches are searched for a large
volume and run, each in a process of its own: slabs in the middle of a column, and a patch after the
first. Reading and writing do not count. Runs count only between two probes of the machine's rate
that agree within 10 %. The result is kept under `benchmarks/results/`.
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
from math import prod
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from machine import keep, kept
from planning import rate, steady, unet
from znni_dask import column_planner, planner, timings
from znni_dask.calibration import calibrate
from znni_dask.choices import chosen_primitives
from znni_dask.columns import Column, period_of
from znni_dask.costs import Costs
from znni_dask.cut import Cut
from znni_dask.errors import MemoryLimitError
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.machine import MemoryMeter, anonymous_bytes, cores, parse_bytes
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.field_of_view import Interval
from znni_dask.network.rewrites import simplify
from znni_dask.pages import memory_of_all
from znni_dask.patches import Layout, largest_box
from znni_dask.plan import Plan
from znni_dask.resources import Resources
from znni_dask.schedule import Schedules

LIMITS = ("2GB", "4GB", "12GB")
SIZE, SIZE_OF_OTHERS = (1024, 1024, 1024), (512, 512, 512)
NETWORKS = {**PAPER_NETWORKS, "U-Net 4, 32": partial(unet, 4, 32)}
BEFORE, SLABS = 1, 3  # thick slabs that do not count, and those that do
REPEATS = 2  # of a patch, of which the last counts


def one(name: str, limit: str, threads: int, way: str) -> dict[str, Any]:
    """A network within a limit, in slabs or in patches."""
    size = SIZE if name in PAPER_NETWORKS else SIZE_OF_OTHERS
    layout = Layout(simplify(NETWORKS[name]()), size, "reflect")
    baseline = anonymous_bytes()
    resources = unhindered(layout, parse_bytes(limit), threads, Costs(timings.kept()), baseline)
    plan: Plan | None = None
    if way == "slabs":
        plan = column_planner.search(layout, resources)
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


def in_patches(layout: Layout, plan: Plan) -> float:
    """Seconds for a voxel of a patch."""
    schedules = Schedules(layout, chosen_primitives(layout, plan))
    box = largest_box(layout, plan.patch)
    todo, arena = schedules.schedule(box), schedules.arena(schedules.sizes(box))
    shape = (1, *todo.input.size)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    answer = np.empty((layout.network.out_channels, *box.size), np.float32)
    begin = 0.0
    with SerialExecutor(layout.network, schedules.primitives, arena, plan.threads) as executor:
        for _ in range(REPEATS):
            begin = time.perf_counter()
            executor.run(todo, [values], [answer])
        return (time.perf_counter() - begin) / box.voxels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=[*NETWORKS], action="append")
    parser.add_argument("--limit", choices=LIMITS, action="append")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, limit, threads, way = given.one
        print(json.dumps(one(name, limit, int(threads), way)))
        return
    kept_as = f"streaming-{given.threads}-threads"
    rows = {(r["network"], r["limit"]): r for r in kept(kept_as).get("rows", ())}
    with tempfile.TemporaryDirectory() as place, Team(given.threads) as team:
        os.environ["ZNNI_TIMINGS"] = f"{place}/timings.json"
        before = rate(team)
        timings.keep_timings(calibrate(given.threads))
        reference = (before + rate(team)) / 2
        for name in given.only or NETWORKS:
            for limit in given.limit or LIMITS:
                row: dict[str, Any] = {"network": name, "limit": limit}
                for way in ("slabs", "patches"):
                    asked = (name, limit, str(given.threads), way)
                    row[way] = steady([sys.executable, __file__, "--one", *asked], team, reference)
                rows[name, limit] = row
                print(line(row), flush=True)
                keep(kept_as, {"rows": list(rows.values())})


def line(row: dict[str, Any]) -> str:
    """A row as it is told."""
    told = f"{row['network']} {row['limit']:>5}"
    for way in ("slabs", "patches"):
        found = row[way]
        if "voxels_per_second" not in found:
            told += f"; {way}: {found.get('refused', 'none fits')}"
            continue
        size = "·".join(map(str, found["patch"]))
        speed = found["voxels_per_second"]
        ratio = speed / found["predicted_voxels_per_second"] / found["rate"]
        unsteady = ", unsteady" if "unsteady" in found else ""
        told += f"; {way} {size}: {speed:,.0f} voxels/s, {ratio:.2f} of predicted{unsteady}"
    return told


if __name__ == "__main__":
    main()
