"""What layers took in a run, kept beside what `znni measure` found: the next plan knows it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain

from znni_dask import timings
from znni_dask.choices import chosen_primitives
from znni_dask.cut import Cut
from znni_dask.errors import OutputError
from znni_dask.machine import CPU
from znni_dask.making import Pass
from znni_dask.passes import PlannedPass
from znni_dask.patches import Layout, largest_box
from znni_dask.schedule import Schedules, Step
from znni_dask.slabs import Programs, Slabs
from znni_dask.timings import Timing
from znni_dask.windows import WindowGrid

LOG = logging.getLogger(__name__)

LEAST_SECONDS = 60.0  # of computing: what is shorter tells as much of the machine's mood
_TOUCHING = 0.05  # of them at most until memory was touched, which layers that come first take
_LEAST_OF_LAYER = 0.1  # seconds


def refine(planned: Iterable[PlannedPass], made: Iterable[Pass]) -> None:
    """Keep what the CPU of this process took for passes, where this machine was measured: of one
    that was not, plans say so as long as that is true."""
    known = timings.kept()
    if not known.tell_of(CPU):
        return
    found = [*chain.from_iterable(map(_timings, planned, made))]
    if found:
        try:
            timings.keep_timings(known.refined(found))
        except OutputError as error:
            LOG.info("what this run took is not kept: %s", error)


def _timings(planned: PlannedPass, made: Pass) -> Iterator[Timing]:
    """Of steps of every layer that are not nearly the same: each as much longer than was expected
    as the layer."""
    plan, costs = planned.job.plan, planned.resources.costs
    touching = planned.resources.touching_seconds(plan.predicted_bytes)
    taken = sum(made.layer_seconds.values())
    if plan.device != CPU or taken < max(LEAST_SECONDS, touching / _TOUCHING):
        return
    expected, found = made.predicted_seconds, list[Timing]()
    for step, _ in sorted(_steps(planned), key=lambda one: -one[1]):  # most often first
        name = step.operation.node.name
        seconds = made.layer_seconds.get(name, 0.0)
        if not expected[name] or seconds < _LEAST_OF_LAYER:
            continue
        family, features = step.primitive.family, step.primitive.features(step.problem)
        before = costs.timings.ratio(family, plan.threads, features)
        one = Timing(family, plan.threads, features, before * seconds / expected[name])
        if not any(map(one.is_like, found)):
            found.append(one)
            yield one


def _steps(planned: PlannedPass) -> list[tuple[Step, float]]:
    """The steps of a patch, of windows, or of a block that is made slab by slab, and how often each
    is done."""
    laid, plan = planned.job.laid, planned.job.plan
    (stage,) = plan.stages
    layout = laid.layout if isinstance(laid, WindowGrid) else laid.turned(plan.axis)
    schedules = Schedules(layout, chosen_primitives(layout, plan), stage.samples)
    if isinstance(layout, Layout) and plan.granules:
        programs = Programs(layout, plan.granules)
        return Slabs(planned.resources, schedules, Cut.of(plan), programs).steps()
    if isinstance(laid, WindowGrid):
        sizes = laid.layout.sizes
    else:
        sizes = schedules.sizes(largest_box(laid, plan.patch))
    return [(step, float(schedules.repeats)) for step in schedules.steps(sizes)]
