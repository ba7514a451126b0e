"""What a plan is expected to take, layer by layer, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from znni_dask.apart import Apart
from znni_dask.asking import Asked, Options, asked
from znni_dask.choices import chosen_primitives, schedules_of
from znni_dask.cluster import Crew, connected
from znni_dask.cut import Cut
from znni_dask.geometry import Size, triple, turned, volume
from znni_dask.inspection import multiply_adds
from znni_dask.kernels.warm import compile_kernels
from znni_dask.machine import GPU
from znni_dask.network.network import Network
from znni_dask.passes import PlannedPass, plan_pass
from znni_dask.patches import Layout, largest_box
from znni_dask.plan import Alternative, Plan
from znni_dask.primitives.base import Shape
from znni_dask.primitives.forms import FormChange
from znni_dask.resources import Resources, computing_bytes, computing_need
from znni_dask.schedule import Schedules, Step
from znni_dask.shares import host_share, need_of
from znni_dask.slabs import Programs, Slabs
from znni_dask.split import Split
from znni_dask.windows import WindowGrid


@dataclass(frozen=True)
class StepForecast:
    """A step of a patch, or of a block that is made slab by slab: a layer, or a change of the form
    of its output. ``seconds`` are those of all offsets, or slabs; ``output`` is what is made at
    once, ``bytes`` are those of that and of what it computes in, ``peak_bytes`` those of the whole
    process meanwhile."""

    layer: str
    kind: str
    primitive: str
    output: Shape
    seconds: float
    bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What one pass is expected to take.

    ``work_ratio`` is the direct arithmetic of a patch over that of its outputs were they part of
    an endless volume: what is computed more than once, as patches overlap, and what padding saves.
    ``passes`` are gone through for each of them: one for every offset that no fragment is made at.
    ``computing_bytes`` are those of computing, of ``plan.predicted_bytes``. ``measured``: whether
    seconds rest on timings of this machine.
    """

    outputs: tuple[str, ...]
    size: Size
    channels: int
    voxels: int
    blocks: Size
    stored_bytes: int
    plan: Plan
    steps: tuple[StepForecast, ...]
    work_ratio: float
    passes: int
    computing_bytes: int
    measured: bool
    others: tuple[Alternative, ...]

    @property
    def seconds(self) -> float:
        """Of reading, computing and writing all of it."""
        return self.voxels / self.plan.voxels_per_second

    def described(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {**asdict(self), "seconds": self.seconds}


def forecasts(
    network: str | Path | Network, input: str | Path, **options: Unpack[Options]
) -> tuple[Forecast, ...]:
    """What `run` would take with these options, pass by pass; nothing is computed or written.

    Raises `InputError` where `run` would before it writes anything.
    """
    found = asked(network, input, **options)
    compile_kernels()  # which a run does too, before its process is measured
    request = found.request
    with connected(None, None, request.memory, request.threads, request.device) as cluster:
        planned = plan_all(found, cluster.crew())
    return tuple(map(forecast, planned))


def plan_all(found: Asked, crew: Crew) -> list[PlannedPass]:
    """All passes of what is asked, planned for a crew."""
    return [
        plan_pass(found.application, names, found.request, crew, None, given)
        for names, given in found.request.planned(found.groups)
    ]


def forecast(planned: PlannedPass) -> Forecast:
    """What a pass is expected to take."""
    job, resources = planned.job, planned.resources
    laid, plan = job.laid, job.plan
    samples = max(stage.samples for stage in plan.stages)
    layout = laid.layout if isinstance(laid, WindowGrid) else laid.turned(plan.axis)
    if len(plan.stages) > 1 and isinstance(layout, Layout):
        passes, samples, computed = 1, 1, _computed_by_both(planned, layout)
    else:
        schedules = Schedules(layout, chosen_primitives(layout, plan), samples)
        passes, computed = schedules.repeats, _computed(planned, schedules)
    dense = not isinstance(laid, WindowGrid) and laid.geometry.dense
    needed = multiply_adds(layout.network, dense) * volume(computed.made) * samples
    done = sum(times * float(_adds(step)) for step, times in computed.steps)
    told = zip(computed.steps, computed.beside_bytes, strict=True)
    values = sum(layout.encoding.voxel_bytes(layout.channels) for layout in planned.stored)
    return Forecast(
        outputs=planned.outputs,
        size=laid.output_size,
        channels=layout.network.out_channels,
        voxels=job.selection.hull(laid).voxels * job.volume.times,
        blocks=job.reads.blocks,
        stored_bytes=values * volume(laid.output_size) * job.volume.times,
        plan=plan,
        steps=tuple(
            _step(step, times, resources, beside, plan.axis) for (step, times), beside in told
        ),
        work_ratio=done / float(needed) if needed else 1.0,
        passes=passes,
        computing_bytes=computed.nbytes,
        measured=resources.costs.timings.tell_of(plan.device),
        others=planned.others,
    )


class _Computed(NamedTuple):
    """The ``steps`` of a patch, of windows, or of a block that is made slab by slab, and how often
    each is done; the size of what is made; memory of computing it, and what the process or the
    device takes beside the workspace of every step."""

    steps: list[tuple[Step, float]]
    made: Size
    nbytes: int
    beside_bytes: list[int]


def _computed(planned: PlannedPass, schedules: Schedules) -> _Computed:
    laid, plan, resources = planned.job.laid, planned.job.plan, planned.resources
    layout = schedules.layout
    if isinstance(layout, Layout) and plan.granules:
        cut = Cut.of(plan)
        slabs = Slabs(resources, schedules, cut, Programs(layout, plan.granules))
        steps, made = slabs.steps(), largest_box(layout, cut.column).size
        process, device = slabs.computing
        on_gpu = resources.device == GPU
        whole = plan.device_bytes if on_gpu else plan.predicted_bytes
        beside = _beside(steps, resources, whole, 0, [0] * len(steps))
        return _Computed(steps, made, device if on_gpu else process, beside)
    if isinstance(laid, WindowGrid):
        sizes, made = laid.layout.sizes, laid.layout.output_size
    else:
        box = largest_box(laid, plan.patch)
        sizes, made = schedules.sizes(box), box.size
    if resources.device == GPU:
        computing = computing_need(resources, schedules, sizes, made).device_bytes
    else:
        computing = computing_bytes(schedules, sizes, made, resources.threads)
    steps = [(step, float(schedules.repeats)) for step in schedules.steps(sizes)]
    whole = plan.device_bytes if resources.device == GPU else plan.predicted_bytes
    return _Computed(steps, made, computing, _besides(steps, resources, whole, schedules, sizes))


def _computed_by_both(planned: PlannedPass, layout: Layout) -> _Computed:
    """Of a plan in two stages: what the second one takes is of the device. Where each computes
    whole patches the mean one is told of."""
    plan, resources = planned.job.plan, planned.resources
    work, box = schedules_of(layout, plan), largest_box(layout, plan.patch)
    sizes = work.sizes(box)
    if isinstance(work, Split):
        parts = (work.head, 1.0), (work.tail, float(work.groups))
    else:
        assert isinstance(work, Apart)
        share = host_share(resources, work, sizes, box.size)
        parts = (work.host, share), (work.device, 1 - share)
    head, tail = ([(step, times) for step in some.steps(sizes)] for some, times in parts)
    (first, _), (last, _) = parts
    beside = [
        *_besides(head, resources, plan.predicted_bytes, first, sizes),
        *_besides(tail, resources, plan.device_bytes, last, sizes),
    ]
    needed = need_of(resources, work, sizes, box.size)
    return _Computed([*head, *tail], box.size, needed.device_bytes, beside)


def _besides(
    steps: list[tuple[Step, float]],
    resources: Resources,
    whole_bytes: int,
    schedules: Schedules,
    sizes: Mapping[str, Size],
) -> list[int]:
    """What is taken beside the workspace of every step, of so much that is taken in all."""
    arena, alive = schedules.arena(sizes).bytes, schedules.alive_bytes(sizes)
    return _beside(steps, resources, whole_bytes, arena, alive)


def _beside(
    steps: list[tuple[Step, float]],
    resources: Resources,
    whole_bytes: int,
    arena_bytes: int,
    alive_bytes: list[int],
) -> list[int]:
    largest = max(_workspace_bytes(step, resources) for step, _ in steps)
    return [whole_bytes - arena_bytes - largest + alive for alive in alive_bytes]


def _workspace_bytes(step: Step, resources: Resources) -> int:
    return step.primitive.workspace_bytes(step.problem, resources.threads)


def _step(
    step: Step,
    times: float,
    resources: Resources,
    beside_bytes: int,
    axis: int,
) -> StepForecast:
    """A step of a patch, or of a column along ``axis``; beside its workspace the process needs
    ``beside_bytes`` meanwhile."""
    seconds = resources.costs.step_seconds(step.primitive, step.problem, resources.threads)
    workspace_bytes = _workspace_bytes(step, resources)
    batch, channels, *size = step.problem.output
    output = batch, channels, *turned(triple(size), axis)
    return StepForecast(
        layer=step.operation.node.name,
        kind=step.operation.node.layer.kind,
        primitive=step.primitive.name,
        output=output,
        seconds=times * seconds,
        bytes=step.operation.output.form.nbytes(output) + workspace_bytes,
        peak_bytes=beside_bytes + workspace_bytes,
    )


def _adds(step: Step) -> Fraction:
    """Multiply-adds of a step, computed directly."""
    if isinstance(step.primitive, FormChange):
        return Fraction(0)
    batch, _, *size = step.problem.output
    return step.problem.layer.multiply_adds() * batch * prod(size)
