"""One layer by itself: what it is applied to, what may compute it, and that as a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Any

import numpy as np

from znni_dask.choices import tiled
from znni_dask.costs import Costs
from znni_dask.geometry import triple
from znni_dask.kernels.direct import SLACK_BYTES
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.team import Team
from znni_dask.network.layers import ConvTranspose, Input, Layer
from znni_dask.primitives.base import Array, Form, Primitive, Problem, Shape
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.table import candidates

_PEERS_OWN = ("torch",)  # primitives whose work is a peer's


@dataclass(frozen=True)
class Point:
    """A layer on ``batch`` cubes of ``edge`` voxels, of which it may be given ``planes`` only.

    Arrays come from the layer before it in the form ``given`` and are left in ``wanted`` to the
    next; changes of form count.
    """

    layer: Layer
    channels: int
    edge: int
    batch: int = 1
    planes: int | None = None
    given: Form = Form.BLOCKED
    wanted: Form = Form.BLOCKED

    @property
    def shape(self) -> Shape:
        """Of the input: (batch, channel, z, y, x)."""
        return (self.batch, self.channels, self.planes or self.edge, self.edge, self.edge)

    @property
    def output(self) -> Shape:
        """Shape of the output."""
        size = triple(self.layer.window(axis).size(self.shape[2 + axis]) for axis in range(3))
        return (self.batch, self.layer.channels([self.channels]), *size)

    @property
    def flops(self) -> int:
        """Of direct convolution, a multiply-add counting as two."""
        return int(2 * self.layer.multiply_adds() * self.batch * prod(self.output[2:]))

    @property
    def name(self) -> str:
        """The layer, like ``80 → 80, 3³``."""
        made = self.layer.channels([self.channels])
        kind = "transposed " if isinstance(self.layer, ConvTranspose) else ""
        return f"{self.channels} → {made}, {kind}{self.layer.summary.removesuffix(', relu')}"

    @property
    def size(self) -> str:
        """The input, like ``8 × 36³``."""
        return f"{self.batch} × {self.edge}³"

    def part(self, flops: float) -> Point:
        """As much of it as takes about so many operations, at least one plane of output."""
        batch = max(1, min(self.batch, ceil(flops / (self.flops / self.batch))))
        part = replace(self, batch=batch)
        if batch > 1 or part.flops <= flops:
            return part
        planes = (replace(part, planes=n) for n in range(1, self.edge + 1))
        return next(p for p in planes if p.output[2] >= 1 and p.flops >= flops)

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Random weights, that leave values as large as they are."""
        random = np.random.default_rng(0)
        found = {
            key: random.standard_normal(shape, np.float32)
            for key, shape in self.layer.weight_shapes().items()
        }
        return found | {"weight": found["weight"] / np.float32(self._taps**0.5)}

    @property
    def _taps(self) -> float:
        return float(self.layer.multiply_adds()) / self.layer.channels([self.channels])

    @property
    def x(self) -> Array:
        """A random input: one cube for all of the batch, and of a part the same values."""
        random = np.random.default_rng(1)
        cube = random.standard_normal((1, self.channels, *(self.edge,) * 3), np.float32)
        return np.repeat(cube[:, :, : self.planes], self.batch, axis=0)

    @property
    def problem(self) -> Problem:
        """What a primitive is given."""
        windows = [self.layer.window(axis) for axis in range(3)]
        offset = triple(window.offset(0, 0) for window in windows)
        size = triple(self.shape[2:])
        return Problem(self.layer, (self.shape,), self.output, (offset,), (0, 0, 0), size)


def fastest(point: Point, threads: int) -> Primitive:
    """The project's own primitive that is estimated fastest, changes of form counted."""
    problem = point.problem
    options = [*candidates(point.layer), *tiled(problem)]
    own = [p for p in options if not p.name.startswith(_PEERS_OWN) and not p.fragments]

    def seconds(primitive: Primitive) -> float:
        steps = _steps(point, primitive)
        return sum(Costs().step_seconds(*step, threads) for step in steps)

    return min(own, key=seconds)


def _steps(point: Point, primitive: Primitive) -> Iterator[tuple[Primitive, Problem]]:
    """The primitive between the changes of form that it asks for."""
    takes, makes = primitive.forms(point.layer, [point.channels])
    takes = takes or point.given
    if takes is not point.given:
        yield FormChange(takes), changed(point.layer, point.shape)
    yield primitive, point.problem
    if (makes or takes) is not point.wanted:
        yield FormChange(point.wanted), changed(point.layer, point.output)


def changed(layer: Layer, shape: Shape) -> Problem:
    """A change of form as a problem."""
    return Problem(layer, (shape,), shape, ((0, 0, 0),), (0, 0, 0), triple(shape[2:]))


class Ready:
    """A point made ready to be computed by a primitive, and the arrays it uses."""

    def __init__(self, point: Point, primitive: Primitive, team: Team) -> None:
        self.point, self._team = point, team
        self.prepared = primitive.prepare(point.layer, point.weights)
        self._steps = list(_steps(point, primitive))
        self.arrays = [formed(point.x, point.given, team)]
        for step, problem in self._steps:
            there = Form.PLAIN if self.arrays[-1].ndim == 5 else Form.BLOCKED
            takes, makes = step.forms(problem.layer, [problem.inputs[0][1]])
            self.arrays.append(empty((makes or takes or there).stored(problem.output)))
            self.arrays[-1][...] = 0

    def run(self) -> None:
        """Compute it."""
        for number, (step, problem) in enumerate(self._steps):
            x, out = self.arrays[number : number + 2]
            step.apply(self.prepared, problem, [x], out, self._team)

    def answer(self, part: Point) -> Array:
        """Of a part of the point, in plain form."""
        batch, channels, planes, *_ = part.output
        out = self.arrays[-1]
        if out.ndim == 5:
            return out[:batch, :, :planes]
        apart = np.moveaxis(out[:batch, :, :planes], -1, 2)
        return apart.reshape(batch, -1, *apart.shape[3:])[:, :channels]

    @property
    def moved_bytes(self) -> int:
        """What must be read or written at least once: input, output, and what is prepared."""
        return self.arrays[0].nbytes + self.arrays[-1].nbytes + _nbytes(self.prepared)


def _nbytes(prepared: Any) -> int:
    """Memory of the arrays in what a primitive prepared."""
    if isinstance(prepared, np.ndarray):
        return prepared.nbytes
    if isinstance(prepared, dict):
        return _nbytes(tuple(prepared.values()))
    return sum(map(_nbytes, prepared)) if isinstance(prepared, (tuple, list)) else 0


def empty(shape: tuple[int, ...]) -> Array:
    """An array as an arena holds them: aligned, and read a little beyond its end."""
    nbytes = 4 * prod(shape)
    return allocate(nbytes + SLACK_BYTES)[:nbytes].view(np.float32).reshape(shape)


def formed(x: Array, form: Form, team: Team) -> Array:
    """A plain array in a form."""
    batch, channels, z, y, x_ = x.shape
    shape = (batch, channels, z, y, x_)
    out = empty(form.stored(shape))
    if form is Form.PLAIN:
        out[...] = x
    else:
        FormChange(form).apply(None, changed(Input(channels), shape), [x], out, team)
    return out
