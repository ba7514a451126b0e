"""The plan that is chosen, beside others that were run: is there a faster one?

    python benchmarks/neighbours.py [--only NAME] [--limit 2GiB] [--seconds 4]

For some networks a volume of noise is made by the plan that is chosen. Within some limits also by
the ten patches that were predicted to be the next best, and by twenty plans that differ from the
chosen one in a single place: a primitive, a tile, planes at once, a block or a patch. Within what
is free, which is what `infer` takes without any option, by patches of `GRID`, as one would try by
hand, with all else chosen for them. All are run once, the fastest again beside the chosen one, in
turns. The result is kept under `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from machine import keep, kept
from planning import FIRST, LEAST, MOST, NETWORKS, STEP, Probe, calibrated, noise
from znni_dask import run
from znni_dask.asking import Options
from znni_dask.forecast import Forecast, forecasts
from znni_dask.geometry import Size, text, triple
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network.network import Network
from znni_dask.network.rewrites import simplify
from znni_dask.plan import Choice, Plan
from znni_dask.primitives.table import candidates

KEPT_AS = "neighbours"
CHOSEN = "chosen"
NAMES = ("n337", "n726", "U-Net 3, 16", "residual 32, stride 2", "sliding 24, anisotropic")
FREE = "free"
LIMITS = ("2GiB", "8GiB", FREE)
GRID = (32, 48, 64, 96, 128, 160, 192, 256)
NEXT, NEIGHBOURS = 10, 20
WORTH = 1 / 3  # of what is predicted of the chosen one: what is slower is not run
AGAIN, TURNS = 2, 3  # of the fastest, run as often beside the chosen one
_TILES = re.compile(r"\d+")


def options_of(limit: str) -> Options:
    """How all is asked for."""
    options: Options = {"dtype": "uint8", "pyramid": False}
    return options if limit == FREE else options | {"memory": limit}


def others(network: Network, found: Forecast, limit: str) -> Iterator[tuple[str, Options]]:
    """What else is run, and how it is asked for."""
    if limit == FREE:
        for edge in (edge for edge in GRID if edge <= max(found.size)):
            yield f"by hand: patch {edge}", {"patch": edge}
        return
    least = WORTH * found.plan.voxels_per_second
    fitting = [a for a in found.others if a.needed_bytes <= found.plan.allowed_bytes]
    some = (a for a in fitting if a.voxels_per_second >= least)
    for other in sorted(some, key=lambda a: -a.voxels_per_second)[:NEXT]:
        yield f"next: patch {text(other.patch)}", {"patch": other.patch}
    for what, plan in neighbours(network, found.plan):
        yield f"neighbour: {what}", {"plan": [plan]}


def neighbours(network: Network, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans that differ from one in a single place, drawn at random; some may not be possible."""
    random = np.random.default_rng(0)
    while True:
        match random.choice(["layer", "layer", "tile", "tile", "planes", "size"]):
            case "layer":
                yield from _layer(network, plan, random)
            case "tile":
                yield from _tile(plan, random)
            case "planes":
                yield from _planes(plan, random)
            case _:
                yield _size(plan, random)


def _layer(network: Network, plan: Plan, random: np.random.Generator) -> Iterator[tuple[str, Plan]]:
    """Another primitive for a layer."""
    known = {node.name for node in network}
    choices = [choice for choice in plan.stages[0].choices if choice.layer in known]
    choice = random.choice(np.array(choices, object))
    names = {p.name for p in candidates(network[choice.layer].layer)} - {choice.primitive}
    if names:
        name = str(random.choice(sorted(names)))
        yield f"{choice.layer} by {name}", _with(plan, replace(choice, primitive=name))


def _tile(plan: Plan, random: np.random.Generator) -> Iterator[tuple[str, Plan]]:
    """A tile that is shorter or longer along an axis."""
    choice = random.choice(np.array(plan.stages[0].choices, object))
    numbers = [*_TILES.finditer(choice.primitive)]
    if numbers and "fft" in choice.primitive:
        at = numbers[random.integers(len(numbers))]
        longer = max(2, int(at[0]) + int(random.choice([-8, -4, -2, 2, 4, 8])))
        name = choice.primitive[: at.start()] + str(longer) + choice.primitive[at.end() :]
        yield f"{choice.layer} by {name}", _with(plan, replace(choice, primitive=name))


def _planes(plan: Plan, random: np.random.Generator) -> Iterator[tuple[str, Plan]]:
    """Half or twice as many planes of a layer at once."""
    if plan.granules:
        choice = random.choice(np.array(plan.stages[0].choices, object))
        planes = max(1, int(choice.planes * random.choice([0.5, 2])))
        yield f"{planes} planes of {choice.layer}", _with(plan, replace(choice, planes=planes))


def _size(plan: Plan, random: np.random.Generator) -> tuple[str, Plan]:
    """A block, or a patch, that is smaller or larger along an axis."""
    axis, more = int(random.integers(3)), float(random.choice([0.5, 0.75, 1.25, 1.5, 2]))

    def changed(size: Size) -> Size:
        step = 32 if plan.granules else 8
        return triple(
            max(step, round(n * more / step) * step) if i == axis else n for i, n in enumerate(size)
        )

    if plan.granules:
        return f"block {text(changed(plan.block))}", replace(plan, block=changed(plan.block))
    return f"patch {text(changed(plan.patch))}", replace(plan, patch=changed(plan.patch))


def _with(plan: Plan, other: Choice) -> Plan:
    (stage,) = plan.stages
    choices = tuple(other if c.layer == other.layer else c for c in stage.choices)
    return replace(plan, stages=(replace(stage, choices=choices),))


def one(network: str, volume: str, output: str, limit: str, asked: str) -> dict[str, Any]:
    """Made as one of the ways asks."""
    how = json.loads(asked)
    options = options_of(limit)
    if "plan" in how:
        options["plan"] = [Plan.from_json(how["plan"])]
    elif "patch" in how:
        options["patch"] = how["patch"] if isinstance(how["patch"], int) else triple(how["patch"])
    made = run(network, volume, output, overwrite=True, **options)
    return {"voxels_per_second": made.voxels_per_second}


def compared(name: str, limit: str, seconds: float, folder: str) -> dict[str, Any]:
    """A network within a limit: the rates of all that was run."""
    network = simplify(NETWORKS[name]())
    path = Path(folder) / "network.onnx"
    path.write_bytes(to_onnx(network).SerializeToString())
    edge, options = FIRST, options_of(limit)
    for _ in range(2):
        volume = noise(folder, edge)
        (found,) = forecasts(path, volume, **options)
        wanted = edge * (seconds / found.seconds) ** (1 / 3)
        edge = max(LEAST, min(MOST, round(wanted / STEP) * STEP))
    (found,) = forecasts(path, noise(folder, edge), **options)

    def rate(how: Options) -> float | None:
        told = {k: v[0].to_json() if k == "plan" else v for k, v in how.items()}
        files = str(path), noise(folder, edge), f"{folder}/out.zarr"
        command = [sys.executable, __file__, "--one", *files, limit, json.dumps(told)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # not possible, or too large
            return None
        return float(json.loads(done.stdout.splitlines()[-1])["voxels_per_second"])

    asked: dict[str, Options] = {CHOSEN: {"plan": [found.plan]}}
    rates: dict[str, float] = {}
    counts = {"next": 0, "by hand": 0, "neighbour": 0}
    for what, how in others(network, found, limit):
        kind = what.partition(":")[0]
        if what not in rates and (made := rate(how)) is not None:
            asked[what], rates[what] = how, made
            counts[kind] += 1
            print(f"  {what}: {made:,.0f}", flush=True)
        if counts["neighbour"] == NEIGHBOURS:
            break
    best = {
        kind: sorted((w for w in rates if w.startswith(kind)), key=lambda w: -rates[w])[:AGAIN]
        for kind in counts
    }
    again = [CHOSEN, *(what for some in best.values() for what in some)]
    turns: dict[str, list[float]] = {what: [] for what in again}
    for _ in range(TURNS):
        for what in again:
            turns[what].append(rate(asked[what]) or 0.0)
    medians = {what: median(found) for what, found in turns.items()}
    return {
        "network": name,
        "limit": limit,
        "edge": edge,
        "patch": found.plan.patch,
        "slabs": bool(found.plan.granules),
        "run": counts,
        "voxels_per_second": medians[CHOSEN],
        "predicted_voxels_per_second": found.plan.voxels_per_second,
        "best": {
            kind: {"what": what, "voxels_per_second": medians[what]}
            for kind, some in best.items()
            if some
            for what in [max(some, key=medians.__getitem__)]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--limit", choices=LIMITS, action="append")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        return
    rows = {(r["network"], r["limit"]): r for r in kept(KEPT_AS).get("rows", ())}
    with tempfile.TemporaryDirectory() as place:
        os.environ["ZNNI_TIMINGS"] = f"{place}/timings.json"
        with Team(cores()) as team:
            calibrated(Probe(team))
        for name in given.only or NAMES:
            with tempfile.TemporaryDirectory() as folder:
                for limit in given.limit or LIMITS:
                    row = rows[name, limit] = compared(name, limit, given.seconds, folder)
                    print(line(row), flush=True)
                    keep(KEPT_AS, {"rows": list(rows.values())})


def line(row: dict[str, Any]) -> str:
    """What came of it as it is told."""
    chosen = row["voxels_per_second"]
    best = (
        f"{chosen / found['voxels_per_second']:.2f} of {found['what']}"
        for found in row["best"].values()
    )
    return f"{row['network']:26} {row['limit']:>5} {chosen:12,.0f} voxels/s; {'; '.join(best)}"


if __name__ == "__main__":
    main()
