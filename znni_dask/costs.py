"""Estimated seconds of a schedule, before anything was measured.

The figures are those of the plain CPU primitives on one core with 512-bit vectors
(`benchmarks/primitives.py`). They rank plans; they promise nothing about another machine.
"""

from __future__ import annotations

from znni_dask.schedule import Schedule, Step

FLOPS_PER_SECOND = 3e10  # one core, long rows
ROW_OVERHEAD = 16  # voxels: what starting a row costs, in voxels of that row
STEP_SECONDS = 5e-5  # calling a primitive


def estimated_seconds(schedule: Schedule, threads: int) -> float:
    """Seconds for one patch."""
    once = sum(_step_seconds(step, threads) for step in schedule.steps)
    return once * len(schedule.offsets)


def _step_seconds(step: Step, threads: int) -> float:
    width = step.problem.output[-1]
    slowdown = 1 + ROW_OVERHEAD / max(width, 1)
    flops = step.primitive.flops(step.problem)
    return STEP_SECONDS + slowdown * flops / (FLOPS_PER_SECOND * threads)
