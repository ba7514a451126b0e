"""Layers that only move data, beside the rate at which this machine copies.

    python benchmarks/bandwidth.py [--threads N]        (or: make bench)

What a layer must read and write once, over its seconds, is its bandwidth; beside it stands numpy's
copy of as many bytes, shared by as many threads, in the same rounds (`rounds.py`). Arrays lie in
blocks of channels, as they do between convolutions. The result is kept under
`benchmarks/results/` with the machine's fingerprint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from layer import empty
from machine import copy, keep
from rounds import side_by_side
from znni_dask.choices import choose_primitives
from znni_dask.geometry import Box, Size, triple
from znni_dask.kernels.team import Team
from znni_dask.machine import cores
from znni_dask.network import layers
from znni_dask.network.build import Builder
from znni_dask.network.layers import Layer
from znni_dask.patches import Layout
from znni_dask.primitives.base import Array, Form, Primitive, Problem, Shape
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.fragments import recombine
from znni_dask.primitives.table import candidates
from znni_dask.schedule import Schedules

ONE, TWO, THREE, SECTIONS = (1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 2, 2)


@dataclass(frozen=True)
class Case:
    """A layer on arrays of ``channels`` (of each input) and ``edge`` voxels along each axis."""

    name: str
    layer: Layer
    channels: tuple[int, ...] = (80,)
    edge: int = 64
    fragments: bool = False
    into: Form | None = None  # a change of form

    @property
    def primitive(self) -> Primitive:
        """What computes it."""
        if self.into:
            return FormChange(self.into)
        return next(p for p in candidates(self.layer) if p.fragments == self.fragments)

    @property
    def problem(self) -> Problem:
        """The whole of it; fragments are all of one size."""
        windows = [self.layer.window(axis) for axis in range(3)]
        size = triple(w.size(self.edge - (w.stride - 1) * self.fragments) for w in windows)
        inputs: tuple[Shape, ...] = tuple((1, c, *(self.edge,) * 3) for c in self.channels)
        made = self.channels[0] if self.into else self.layer.channels(list(self.channels))
        output = (prod(self.primitive.fragments_of(self.layer)), made, *size)
        offset = triple(window.offset(0, 0) for window in windows)
        whole = triple(inputs[0][2:])
        return Problem(self.layer, inputs, output, (offset,) * len(inputs), (0, 0, 0), whole)

    @property
    def forms(self) -> tuple[Form, Form]:
        """Of inputs and output: blocked where the layer allows."""
        takes, makes = self.primitive.forms(self.layer, list(self.channels))
        takes = takes or Form.BLOCKED
        return takes, makes or takes


def pool(window: Size) -> layers.MaxPool:
    return layers.MaxPool(window, window)


def change(channels: int, into: Form) -> Case:
    name = f"{channels} channels into {'blocks' if into is Form.BLOCKED else 'plain form'}"
    return Case(name, layers.Input(channels), (channels,), into=into)


CASES = [
    Case("max-pooling 2³", pool(TWO)),
    Case("max-pooling 3³", pool(THREE), edge=63),
    Case("fragments 2³", pool(TWO), edge=65, fragments=True),
    Case("fragments 3³", pool(THREE), edge=65, fragments=True),
    Case("fragments 1·2·2", pool(SECTIONS), edge=65, fragments=True),
    *(change(n, form) for n in (80, 3, 1) for form in (Form.BLOCKED, Form.PLAIN)),
    Case("nearest resizing by 2", layers.Resize(TWO), (16,)),
    Case("linear resizing by 2", layers.Resize(TWO, "half_pixel"), (16,)),
    Case("padding by 1", layers.Pad((ONE, ONE))),
    Case("cropping by 4", layers.Crop((4, 4, 4), (4, 4, 4))),
    Case("concatenation of 32 and 32", layers.Concat(), (32, 32)),
    Case("concatenation of 24 and 24", layers.Concat(), (24, 24)),
    Case("relu", layers.Activation("relu")),
    Case("affine", layers.Affine(80)),
    Case("sum of two", layers.Arithmetic("add"), (80, 80)),
]


def recombination(team: Team) -> tuple[Callable[[], None], int]:
    """The fragments of two poolings put together to an answer of three channels, as an executor
    does, and the bytes read and written."""
    builder = Builder(3)
    x = builder.max_pool(builder.max_pool(builder.input, TWO), TWO)
    layout = Layout(builder.network(x), (131, 131, 131), "valid")
    schedules = Schedules(layout, choose_primitives(layout))
    todo = schedules.schedule(Box((0, 0, 0), layout.output_size))
    fragments = empty(todo.steps[-1].problem.output)
    fragments[...] = 1
    out = empty((3, *layout.output_size))
    out[...] = 0
    numbers = {position: i for i, position in enumerate(todo.positions)}
    moved = fragments.nbytes + out.nbytes
    return lambda: recombine(fragments, numbers, todo.spacing, out, team), moved


def ready(case: Case, team: Team) -> tuple[Callable[[], None], int]:
    """The case as a call, and the bytes that it must read and write."""
    random, problem, (takes, makes) = np.random.default_rng(0), case.problem, case.forms
    inputs: list[Array] = []
    for shape in problem.inputs:
        inputs.append(empty(takes.stored(shape)))
        random.standard_normal(dtype=np.float32, out=inputs[-1])
    out = empty(makes.stored(problem.output))
    out[...] = 0
    weights = {
        key: random.standard_normal(shape, np.float32)
        for key, shape in case.layer.weight_shapes().items()
    }
    primitive, prepared = case.primitive, case.primitive.prepare(case.layer, weights)

    def call() -> None:
        primitive.apply(prepared, problem, inputs, out, team)

    return call, sum(x.nbytes for x in inputs) + out.nbytes


def calls(team: Team) -> Iterator[tuple[str, Form, Callable[[], None], int]]:
    """All that is measured: name, form of the input, call, bytes to read and write."""
    for case in CASES:
        yield case.name, case.forms[0], *ready(case, team)
    yield "recombination of 4³ fragments", Form.PLAIN, *recombination(team)


def measure(call: Callable[[], None], moved: int, team: Team) -> dict[str, Any] | None:
    """How fast so many bytes are moved, beside a copy; None where no round was steady."""
    copied, copy_bytes = copy(team, moved // 2 // 64 * 64)
    timings = side_by_side({"layer": call, "copy": copied}, team)
    if not timings:
        return None
    rate, copy_rate = moved / timings["layer"].seconds, copy_bytes / timings["copy"].seconds
    return {
        "threads": team.threads,
        "megabytes": moved / 1e6,
        "seconds": timings["layer"].seconds,
        "gigabytes_per_second": rate / 1e9,
        "copy_gigabytes_per_second": copy_rate / 1e9,
        "share_of_copy": rate / copy_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    rows = []
    print(f"{'':28} {'form':>8} {'GB/s':>6} {'copy':>6} {'share':>6}   {options.threads} threads")
    with Team(options.threads) as team:
        for name, form, call, moved in calls(team):
            if (found := measure(call, moved, team)) is None:
                print(f"{name}: left out, the machine's rate changed during every round")
                continue
            row = {"layer": name, "form": form.value, **found}
            rows.append(row)
            print(
                f"{row['layer']:28} {row['form']:>8} {row['gigabytes_per_second']:6.1f} "
                f"{row['copy_gigabytes_per_second']:6.1f} {row['share_of_copy']:6.0%}",
                flush=True,
            )
    print(f"kept in {keep(f'bandwidth-{options.threads}-threads', {'rows': rows})}")


if __name__ == "__main__":
    main()
