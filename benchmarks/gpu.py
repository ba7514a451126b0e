"""Everything that is measured on a GPU, in parts that are kept one by one.

    python benchmarks/gpu.py [--only PART] [--seconds LIMIT] [--out FOLDER]     (or: make gpu-bench)

Parts: what the device does at best (``floors``), layers of 80 channels (``layers``), first, last
and other layers (``ends``), layers that move data (``moving``), the papers' networks
(``networks``), a U-Net (``unets``), runs from a Zarr store to another (``overlap``), and rates for
estimates (``rates``). Each ends after its share of time, what is left out is said, and after each
the result is written. PyTorch's answers and the project's are compared with those in double
precision. ``--device simulated --quick`` runs every line of it anywhere.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_device
import gpu_floors
import gpu_layers
import gpu_moving
import gpu_networks
import gpu_rates
from gpu_device import Bench
from machine import RESULTS
from machine import described as host

Part = Callable[[Bench], dict[str, Any]]
PARTS: dict[str, tuple[Part, float]] = {  # and the seconds after which each begins nothing new
    "floors": (gpu_floors.floors, 30),
    "layers": (gpu_layers.middle, 140),
    "networks": (gpu_networks.dense, 120),
    "ends": (gpu_layers.ends, 60),
    "moving": (gpu_moving.moving, 15),
    "unets": (gpu_networks.unets, 30),
    "overlap": (gpu_networks.overlap, 40),
}
RATES = "rates"


def run(bench: Bench, names: list[str], seconds: float | None, folder: Path) -> Path:
    """Measure some parts, each in its time, and keep each with what was kept before."""
    told = gpu_device.described(bench)
    name = re.sub(r"\W+", "-", str(told["device"])).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"machine": host(), "device": told}
    bench.floors |= results.get("floors", {}).get("floors", {})
    for part in names:
        begin = time.monotonic()
        print(f"---- {part}", flush=True)
        try:
            if part == RATES:
                results[part] = gpu_rates.rates_from(results)
            else:
                measure, limit = PARTS[part]
                bench.end = begin + (limit if seconds is None else seconds)
                results[part] = measure(bench)
        except Exception:  # the other parts are measured all the same
            results[part] = {"failed": traceback.format_exc()}
            print(results[part]["failed"], flush=True)
        results[part]["took_seconds"] = time.monotonic() - begin
        path.write_text(json.dumps(results, indent=1, default=str) + "\n")
        print(f"{part}: {results[part]['took_seconds']:.0f} s, kept in {path}", flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*PARTS, RATES], action="append", help="a part")
    parser.add_argument("--seconds", type=float, help="after which a part begins nothing new")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", choices=("gpu", "simulated"), default="gpu")
    parser.add_argument("--quick", action="store_true", help="small arrays, once")
    options = parser.parse_args()
    bench = Bench(simulated=options.device == "simulated", quick=options.quick)
    run(bench, options.only or [*PARTS, RATES], options.seconds, options.out)


if __name__ == "__main__":
    main()
