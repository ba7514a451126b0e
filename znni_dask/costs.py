"""Seconds of steps: estimated for a machine that is known well, and scaled to this one by what was
measured on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log2

from znni_dask.machine import GPU
from znni_dask.network.layers import Layer
from znni_dask.primitives.base import Primitive, Problem
from znni_dask.primitives.gpu.joining import GpuConcatenation
from znni_dask.primitives.gpu.rates import BUS, LAUNCHES
from znni_dask.primitives.gpu.rates import MEMORY as OF_GPU
from znni_dask.primitives.offloaded import PIECE_SECONDS, Offloaded, Pieces, PiecesSeconds
from znni_dask.primitives.work import COMPILE_SECONDS, MEMORY, READING, TOUCHING, WRITING, Work
from znni_dask.schedule import Step
from znni_dask.timings import Timings

STEP_SECONDS = 5e-5  # calling a primitive
_COPY = GpuConcatenation()  # which does nothing else


@dataclass(frozen=True)
class Costs:
    """What a machine takes for what primitives do, by its ``timings``."""

    timings: Timings = field(default_factory=Timings)
    _setups: dict[tuple[Primitive, Layer], float] = field(default_factory=dict, compare=False)

    def step_seconds(self, primitive: Primitive, problem: Problem, threads: int) -> float:
        """Seconds of one step; a device is one, however many threads there are."""
        if isinstance(primitive, Offloaded):
            return STEP_SECONDS + self.pieces_seconds(primitive.pieces(problem), threads).all
        threads = 1 if primitive.device == GPU else threads
        features = primitive.features(problem)
        ratio = self.timings.ratio(primitive.family, threads, features)
        return ratio * model_seconds(primitive, problem, threads)

    def estimated_seconds(self, steps: Iterable[Step], threads: int) -> float:
        """Seconds to compute these steps once."""
        return sum(self.step_seconds(step.primitive, step.problem, threads) for step in steps)

    def moving_seconds(self, read: float, written: float, threads: int) -> float:
        """Seconds that reading and writing so many values of chunks adds to computing: all threads
        are at work then, and those that move values take their turns."""
        return (read / READING.per_second + written / WRITING.per_second) / threads

    def copying_seconds(self, nbytes: int, threads: int) -> float:
        """Seconds to read and write so much memory."""
        return 2 * nbytes / MEMORY.per_second / threads

    def handing_seconds(
        self, primitive: Primitive, problem: Problem, nbytes: int, threads: int
    ) -> float:
        """Seconds to copy so much that a primitive is handed instead of its arrays, or makes."""
        if primitive.device != GPU:
            return self.copying_seconds(nbytes, threads)
        copying = Work({OF_GPU: 2 * nbytes, LAUNCHES: 1 + len(problem.inputs)}).seconds(1)
        return self.timings.ratio(_COPY.family, 1, _COPY.features(problem)) * copying

    def bus_seconds(self, nbytes: int) -> float:
        """Seconds to copy so much to a device, or back."""
        return self.timings.ratio(BUS.name, 1, bus_features(nbytes)) * nbytes / BUS.per_second

    def touching_seconds(self, nbytes: int, threads: int) -> float:
        """Seconds until so much memory was touched once."""
        ratio = self.timings.ratio(TOUCHING.name, threads, ())
        return ratio * nbytes / TOUCHING.per_second / threads

    def setup_seconds(self, primitive: Primitive, layer: Layer) -> float:
        """Seconds before a layer can be computed for the first time."""
        about = primitive, layer
        if about not in self._setups:
            compiling = 0.0 if primitive.is_compiled(layer) else COMPILE_SECONDS
            preparing = primitive.prepared_bytes(layer) / MEMORY.per_second
            self._setups[about] = primitive.setup_seconds + compiling + preparing
        return self._setups[about]

    def pieces_seconds(self, pieces: Pieces, threads: int) -> PiecesSeconds:
        """Of what a device computes of arrays that the host holds."""
        one = self.step_seconds(pieces.primitive, pieces.problem, threads)
        up, down = pieces.up_bytes // pieces.times, pieces.down_bytes // pieces.times
        return pieces.seconds(
            self.bus_seconds(pieces.prepared_bytes),
            pieces.times * one,
            pieces.times * self.bus_seconds(up),
            pieces.times * self.bus_seconds(down),
            pieces.times * (PIECE_SECONDS + self.copying_seconds(up + down, threads)),
        )


def bus_features(nbytes: int) -> tuple[float, ...]:
    """By which copies to a device are alike."""
    return (log2(max(nbytes, 1)) / 2,)


def model_seconds(primitive: Primitive, problem: Problem, threads: int) -> float:
    """Seconds of one step on the machine that `work.Rate` tells of. What a device does is asked for
    while it does what comes before."""
    calling = 0.0 if primitive.device == GPU else STEP_SECONDS
    return calling + primitive.work(problem, threads).seconds(threads)
