"""Estimated seconds of a schedule, before anything was measured.

The figures are those of the plain CPU primitives on one core with 512-bit vectors (`make bench`).
They rank plans; they promise nothing about another machine.
"""

from __future__ import annotations

from collections.abc import Iterable

from znni_dask.schedule import Step

FLOPS_PER_SECOND = 1.6e10  # one core
RUN_OVERHEAD = 64  # voxels: what starting a plane costs, in voxels of that plane
STEP_SECONDS = 5e-5  # calling a primitive


def estimated_seconds(steps: Iterable[Step], threads: int) -> float:
    """Seconds to compute these steps once."""
    return sum(_step_seconds(step, threads) for step in steps)


def _step_seconds(step: Step, threads: int) -> float:
    *_, y, x = step.problem.output
    slowdown = 1 + RUN_OVERHEAD / (y * x)
    flops = step.primitive.flops(step.problem)
    return STEP_SECONDS + slowdown * flops / (FLOPS_PER_SECOND * threads)
