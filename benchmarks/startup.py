"""What comes before the first patch, and the product that all tiles end up in.

    python benchmarks/startup.py [--threads 2]        (or: make bench-full)

From `import znni_dask` to a first computed patch, in processes of their own: with an empty cache,
then with kernels compiled. Preparation of the kernels' spectra beside writing as many bytes. The
complex product as stages of columns run it, spectra from memory, beside what registers give. The
result is kept under `benchmarks/results/` with the machine's fingerprint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from llvmlite import ir

from layer import Point, fastest
from machine import flops_per_second, keep
from znni_dask.kernels.code import LANES, VECTOR_BYTES, Function
from znni_dask.kernels.compiled import compiled_library, host
from znni_dask.kernels.complex_product import PAIR_BYTES, TRIPLE_BYTES, Ahead, Product
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network.layers import Conv

NETWORK = Path(__file__).parent.parent / "examples" / "networks" / "boundary_valid.onnx"
STARTS = 3
ROUNDS = 5
CHANNELS, KERNELS, EDGE = 80, (3, 5, 7, 9), 66
ROWS, FREQUENCIES = 64, 1000
START = """
import sys, time
begin = time.perf_counter()
import znni_dask
imported = time.perf_counter()
import numpy as np
from znni_dask.choices import Menu, choose_primitives
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.warm import compile_kernels
from znni_dask.patches import Layout
from znni_dask.schedule import Schedules
threads = int(sys.argv[1])
network = znni_dask.load_network(sys.argv[2])
layout = Layout(network, (64, 64, 64), "valid")
patch = Box((0, 0, 0), layout.output_size)
plain = Schedules(layout, choose_primitives(layout))
primitives = Menu.of_patches(plain, patch, 1000, threads).fastest()
schedules = Schedules(layout, primitives)
todo = schedules.schedule(patch)
x = np.ones((1, *todo.input.size), np.float32)
planned = time.perf_counter()
compile_kernels()
compiled = time.perf_counter()
out = np.empty((network.out_channels, *layout.output_size), np.float32)
with SerialExecutor(schedules, schedules.sizes(patch), threads) as one:
    prepared = time.perf_counter()
    one.run(todo, [x], [out])
    print(imported - begin, planned - imported, compiled - planned, prepared - compiled,
          time.perf_counter() - prepared)
"""
STEPS = ("import", "plan", "kernels", "prepare", "first patch")


def started(threads: int, cache: str) -> dict[str, float]:
    """Seconds of the steps of a process that computes one patch, by an empty or filled cache."""
    found = subprocess.run(
        [sys.executable, "-c", START, str(threads), str(NETWORK)],
        env={**os.environ, "ZNNI_CACHE": cache, "NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(STEPS, map(float, found.stdout.split()), strict=True))


def starts(threads: int) -> dict[str, dict[str, float]]:
    """Of a machine that never ran, and of one that did (medians)."""
    with tempfile.TemporaryDirectory() as cache:
        cold = started(threads, cache)
        warm = [started(threads, cache) for _ in range(STARTS)]
    return {"cold": cold, "warm": {step: median(one[step] for one in warm) for step in STEPS}}


def preparation(kernel: int, threads: int) -> dict[str, object]:
    """Seconds to prepare a layer by the tile that is chosen, beside those to write as much."""
    point = Point(Conv(CHANNELS, CHANNELS, (kernel,) * 3, relu=True), CHANNELS, EDGE)
    primitive = fastest(point, threads)
    primitive.prepare(point.layer, point.weights)  # compiled now
    nbytes = primitive.prepare(point.layer, point.weights).kernels.nbytes
    prepared, written = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        primitive.prepare(point.layer, point.weights)
        middle = time.perf_counter()
        allocate(nbytes)[:] = 1  # fresh pages, as those of spectra are
        prepared.append(middle - begin)
        written.append(time.perf_counter() - middle)
    return {
        "kernel": kernel,
        "primitive": primitive.name,
        "megabytes": nbytes / 1e6,
        "seconds": median(prepared),
        "seconds_of_writing": median(written),
        "times_writing": median(p / w for p, w in zip(prepared, written, strict=True)),
    }


def product_library():
    """The product of all rows with the spectra of one frequency after another."""
    module = ir.Module("product in place")
    product = Product(module, host().wide)
    code = Function(module, "multiply", ("a", "b", "c"), ("rows", "channels", "first", "last"))
    (a, b, c), (rows, channels, first, last) = code.addresses, code.numbers
    blocks = (channels + (LANES - 1)) // LANES
    nbytes = channels * PAIR_BYTES
    lines = blocks * nbytes // VECTOR_BYTES // product.turns(rows, blocks) + 1
    with code.loop(first, last) as frequency:
        kernel = b + frequency * blocks * nbytes
        ahead = Ahead(kernel + nbytes * (product.blocks_at_once + 1), lines)
        strides = (blocks * TRIPLE_BYTES, blocks * PAIR_BYTES)
        product.write(code, (a, kernel, c), rows, blocks, strides, channels, (ahead,))
    code.finish()
    return compiled_library(module)


def product_rate(team: Team) -> dict[str, float]:
    """Of the product as stages of columns run it. Three real multiply-adds are done for a complex
    one, which is worth four."""
    blocks = -(-CHANNELS // LANES)
    spectra = allocate((FREQUENCIES + 1) * blocks * CHANNELS * PAIR_BYTES).view(np.float32)
    spectra[:] = 1
    made = [
        (allocate(ROWS * blocks * TRIPLE_BYTES), allocate(ROWS * blocks * PAIR_BYTES))
        for _ in range(team.threads)
    ]
    for a, c in made:
        a.view(np.float32)[:], c[:] = 1, 0
    multiply = product_library()["multiply"]

    def work(first: int, last: int) -> None:
        a, c = made.pop()  # there are some for every thread
        places = (array.ctypes.data for array in (a, spectra, c))
        multiply(*places, ROWS, CHANNELS, first, last)
        made.append((a, c))

    multiply_adds = 3 * FREQUENCIES * ROWS * CHANNELS * LANES * blocks
    shares, rates = [], []
    for _ in range(ROUNDS):
        peak = flops_per_second(team)
        begin = time.perf_counter()
        team.share(work, FREQUENCIES)
        rates.append(2 * multiply_adds / (time.perf_counter() - begin))
        shares.append(rates[-1] / peak)
    return {
        "gflops": median(rates) / 1e9,
        "gflops_of_four_products": median(rates) / 1e9 * 4 / 3,
        "share_of_registers": median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=cores())
    threads = parser.parse_args().threads
    found = starts(threads)
    for name, steps in found.items():
        parts = ", ".join(f"{step} {seconds:.2f}" for step, seconds in steps.items())
        print(f"{name} start: {parts}; {sum(steps.values()):.2f} s", flush=True)
    rows = [preparation(kernel, threads) for kernel in KERNELS]
    for row in rows:
        print(
            f"{row['kernel']}³ {row['primitive']}: {row['megabytes']:.0f} MB prepared in "
            f"{row['seconds']:.3f} s, {row['times_writing']:.2f} times as long as writing them",
            flush=True,
        )
    with Team(threads) as team:
        rate = product_rate(team)
    print(
        f"complex product: {rate['gflops']:.0f} GFLOP/s done, {rate['share_of_registers']:.0%} of "
        f"registers, as {rate['gflops_of_four_products']:.0f} with four real products"
    )
    kept = keep(
        f"startup-{threads}-threads",
        {"starts": found, "preparation": rows, "product": rate},
    )
    print(f"kept in {kept}")


if __name__ == "__main__":
    main()
