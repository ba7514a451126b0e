"""Rates for estimates of what a GPU takes, from what was measured on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

import gpu_peers
from gpu_floors import told
from znni_dask.network.layers import LOWER
from znni_dask.primitives.gpu import rates
from znni_dask.primitives.gpu.conv_cudnn import RATES, TENSOR
from znni_dask.primitives.work import Rate


def rates_from(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `primitives.gpu.rates` should say: the rates by which estimates of all rows come nearest
    to what was measured, relatively; and how far they are off now, by family."""
    rows = list(_measured_rows(results))
    kinds = [rates.MEMORY, rates.PRODUCTS, rates.TRANSFORMS, rates.LAUNCHES]
    found: dict[str, Any] = {"off_by": _off_by(rows), "fitted": _fitted(rows, kinds)}
    lines = []
    for name, rate in zip(("MEMORY", "PRODUCTS", "TRANSFORMS", "LAUNCHES"), kinds, strict=True):
        value = found["fitted"].get(rate.name)
        text = f"{value:.2g}" if value else f"{rate.per_second:.2g}"
        lines.append(f'{name} = Rate("{rate.name}", {float(text):.3g})')
    for precision, peer in ((TENSOR, gpu_peers.TF32), (LOWER, gpu_peers.BF16)):
        made = [
            point["flops"] / point["peers"][peer]["seconds"]
            for part in ("layers", "ends")
            for point in results.get(part, {}).get("rows", [])
            if point["peers"][peer]["seconds"] > 0
        ]
        if made:
            lines.append(f'Rate("{RATES[precision].name}", {median(made):.2g})')
    found["lines"] = lines
    for line in lines:
        told(line)
    for family, ratio in found["off_by"].items():
        told(f"{family}: {ratio:.2f} times the seconds estimated now")
    return found


def _measured_rows(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All that primitives of the project took."""
    for part in ("layers", "ends"):
        for point in results.get(part, {}).get("rows", []):
            yield from (row for row in point["rows"].values() if "amounts" in row)
    yield from (row for row in results.get("moving", {}).get("rows", []) if "amounts" in row)


def _off_by(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    families: dict[str, list[float]] = {}
    for row in rows:
        if row["seconds"] > 0:
            ratio = row["seconds"] / row["estimated_seconds"]
            families.setdefault(row["family"], []).append(ratio)
    return {family: median(some) for family, some in families.items()}


def _fitted(rows: list[Mapping[str, Any]], kinds: list[Rate]) -> dict[str, float]:
    """Amounts in a second, of least relative squares; no rate is negative."""
    some = [
        row
        for row in rows
        if row["seconds"] > 0
        if set(row["amounts"]) <= {kind.name for kind in kinds}
        if "cudnn" not in row["family"]
    ]
    if not some:
        return {}
    shares = np.array(
        [[row["amounts"].get(kind.name, 0) / row["seconds"] for kind in kinds] for row in some]
    )
    best: tuple[float, dict[str, float]] = (float("inf"), {})
    numbers = range(len(kinds))
    for count in range(1, len(kinds) + 1):
        for chosen in combinations(numbers, count):
            scale = shares[:, chosen].max(axis=0)
            if not scale.all():
                continue
            solved = np.linalg.lstsq(shares[:, chosen] / scale, np.ones(len(some)), rcond=None)[0]
            off = float(np.linalg.norm(shares[:, chosen] / scale @ solved - 1))
            if (solved > 0).all() and off < best[0]:
                found = zip(chosen, scale / solved, strict=True)
                best = (off, {kinds[i].name: float(rate) for i, rate in found})
    return best[1]
