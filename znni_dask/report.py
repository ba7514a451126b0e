"""What is shown to people: networks, runs and verifications as tables and lines.

Computes nothing beyond what it formats.
"""

from __future__ import annotations

from fractions import Fraction
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from znni_dask.geometry import AXES, Size, text, triple, volume
from znni_dask.machine import CPU, GPU, show_bytes
from znni_dask.network.field_of_view import NetworkGeometry
from znni_dask.network.layers import FULL
from znni_dask.network.network import Network

if TYPE_CHECKING:
    from znni_dask.forecast import Forecast
    from znni_dask.inspection import Facts
    from znni_dask.making import Pass
    from znni_dask.plan import Plan
    from znni_dask.recompute import MeasuredError
    from znni_dask.running import Summary
    from znni_dask.timings import Timings
    from znni_dask.verify import Verification

_SIZES_SHOWN = 4
_LAYERS_SHOWN = 3


def geometry_table(found: NetworkGeometry) -> Table:
    """Field of view, halo, stride, alignment and valid sizes per axis."""
    table = Table(
        title="geometry, in voxels of the volume", title_justify="left", box=box.SIMPLE_HEAD
    )
    for column in ("axis", "field of view", "halo (low, high)", "output stride", "alignment"):
        table.add_column(column)
    table.add_column('sizes for boundary="valid"')
    for name, axis in zip(AXES, found.axes, strict=True):
        sizes = axis.valid_sizes(_SIZES_SHOWN)
        table.add_row(
            name,
            str(axis.field_of_view),
            f"{axis.halo[0]}, {axis.halo[1]}",
            str(axis.output_stride),
            str(axis.alignment),
            ", ".join(map(str, sizes)) + ", …",
        )
    return table


def layer_table(network: Network) -> Table:
    """A row per layer: what it is, what it reads, channels, spacing, weights, and multiply-adds
    per voxel of its own output."""
    table = Table(title="layers", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("layer", "kind", "form", "reads"):
        table.add_column(column, overflow="fold")
    for column in ("channels", "spacing", "weights", "MACs/voxel"):
        table.add_column(column, justify="right")
    for node in network:
        weights = sum(w.size for w in network.weights.get(node.name, {}).values())
        work = node.layer.multiply_adds()
        table.add_row(
            node.name,
            node.layer.kind,
            node.layer.summary,
            ", ".join(node.inputs),
            str(network.channels[node.name]),
            _spacing(network.spacing[node.name]),
            f"{weights:,}" if weights else "",
            f"{float(work):,.0f}" if work else "",
        )
    return table


def timings_table(found: Timings) -> Table:
    """Of every family of primitives how many steps were measured, and how many times longer than
    estimated they took."""
    table = Table(
        title="seconds measured, over those estimated for 512-bit vectors",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("primitive")
    for column in ("threads", "steps", "median", "least", "most"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, int], list[float]] = {}
    for one in found.found:
        groups.setdefault((one.family, one.threads), []).append(one.ratio)
    for (family, threads), ratios in sorted(groups.items()):
        shown = (f"{n:.2f}" for n in (median(ratios), min(ratios), max(ratios)))
        table.add_row(family, str(threads), str(len(ratios)), *shown)
    return table


def network_lines(network: Network) -> list[str]:
    """What goes into a network and what comes out."""
    outputs = ", ".join(
        f"{name} ({network.channels[node]} channels)" for name, node in network.outputs.items()
    )
    return [
        f"input: {network.input.name} ({network.in_channels} channels); "
        f"{'outputs' if len(network.outputs) > 1 else 'output'}: {outputs}",
        f"{network.parameters:,} parameters in {len(network.nodes) - 1} layers",
    ]


def facts_lines(found: Facts) -> list[str]:
    """What one output of a network takes."""
    lines = [f"{found.output}: {found.locality}"]
    if (grid := found.geometry) is not None:
        if grid.dense:
            what = "slides: neither pads nor up-samples; evaluated at every voxel (dense)"
        elif any(s != 1 for s in grid.output_stride):
            what = f"keeps its own grid: output stride {_spacing(grid.output_stride)}"
        else:
            what = "one output voxel per voxel of the volume"
        lines[0] += f"; {what}"
    adds = float(found.multiply_adds)
    memory = f"{found.activation_bytes:,.0f} bytes of activations" if found.patch else "?"
    lines.append(f"{adds:,.0f} multiply-adds and {memory} per voxel of the volume")
    kind = "a patch" if found.geometry else "windows"
    if found.patch is None:
        lines.append("no window passes through it")
    else:
        lines.append(
            f"{kind} of {text(found.patch)} {'needs' if found.geometry else 'need'} "
            f"{show_bytes(found.needed_bytes)} beside the process itself"
        )
    return lines


def forecast_table(found: Forecast) -> Table:
    """A row per step of a patch: what computes it, what it makes, seconds and memory."""
    samples = max(stage.samples for stage in found.plan.stages)
    what = f"{samples} windows" if samples > 1 else "a patch"
    plan = found.plan
    told = f"{what} of {text(plan.patch)}"
    if plan.granules:
        blocks = f"a block of {text(plan.block)}"
        if (count := plan.blocks_in_column) > 1:
            blocks = f"a column of {count} blocks of {text(plan.block)}"
        told = f"{blocks}, in {_pieces(plan)}"
    if found.passes > 1:
        told += f", in {found.passes} passes"
    table = Table(
        title=f"{', '.join(found.outputs)}: {told}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("layer", "kind", "primitive"):
        table.add_column(column, overflow="fold")
    for column in ("output", "seconds", "share", "memory"):
        table.add_column(column, justify="right")
    total = sum(step.seconds for step in found.steps)
    for step in found.steps:
        batch, channels, *size = step.output
        shape = f"{batch} × {channels} × {text(triple(size))}"
        share = f"{step.seconds / total:.0%}"
        row = (step.layer, step.kind, step.primitive, shape, f"{step.seconds:.4f}", share)
        table.add_row(*row, show_bytes(step.bytes))
    return table


def alternatives_table(found: Forecast) -> Table:
    """Other plans, and why they are not the one."""
    table = Table(title="other plans", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("patch", "at once", "voxels/s", "memory"):
        table.add_column(column, justify="right")
    table.add_column("")
    for other in found.others:
        table.add_row(
            text(other.patch),
            str(other.samples),
            f"{other.voxels_per_second:,.0f}",
            show_bytes(other.needed_bytes),
            other.loses(found.plan),
        )
    return table


def forecast_lines(found: Forecast) -> list[str]:
    """What a pass is expected to take."""
    plan = found.plan
    channels = f"{found.channels} × " if found.channels > 1 else ""
    known = (
        "as measured on this machine"
        if found.measured
        else "estimated for another machine: znni measure measures this one"
    )
    return [
        f"{channels}{text(found.size)} voxels, {show_bytes(found.stored_bytes)} as stored, in "
        f"{volume(found.blocks)} blocks of {text(plan.block)}, {_pieces(plan)}, "
        f"{_by_whom(plan)}, {_in_flight(plan)}",
        f"direct arithmetic would be {found.work_ratio:.2f} times that of outputs without borders; "
        f"voxels needed are decoded {plan.reading.amplification:.2f} times at most",
        f"{plan.voxels_per_second:,.0f} voxels/s, {show_seconds(found.seconds)} in all ({known})",
        f"memory: {show_bytes(plan.predicted_bytes)} predicted, "
        f"{show_bytes(plan.allowed_bytes)} allowed{_device_memory(plan)}",
    ]


def _by_whom(plan: Plan) -> str:
    """Who computes."""
    host = f"{plan.threads} threads"
    return {CPU: host, GPU: "by the GPU"}.get(plan.device, f"{host} and the GPU ({plan.device})")


def _device_memory(plan: Plan) -> str:
    """Memory of the device that computes, if one does."""
    if plan.device == CPU:
        return ""
    predicted, allowed = map(show_bytes, (plan.device_bytes, plan.allowed_device_bytes))
    return f"; of the GPU {predicted} predicted, {allowed} allowed"


def _pieces(plan: Plan) -> str:
    """What blocks are made in."""
    if not plan.granules:
        return f"patches of {text(plan.patch)}"
    return f"slabs of {text(plan.patch)} along {AXES[plan.axis]}"


def _in_flight(plan: Plan) -> str:
    """How many blocks are in flight."""
    return f"{plan.blocks_in_flight} block{'s' * (plan.blocks_in_flight > 1)} in flight"


def run_lines(summary: Summary) -> list[str]:
    """What a run did."""
    if not summary.passes:
        return [f"{summary.output} is complete already: made as asked for, nothing is missing"]
    times = f"{summary.times} × " if summary.times > 1 else ""
    lines = []
    for one in summary.passes:
        plan = one.plan
        names = f" ({', '.join(one.outputs)})" if len(summary.passes) > 1 else ""
        channels = f"{one.channels} × " if one.channels > 1 else ""
        samples = max(stage.samples for stage in plan.stages)
        at_once = f" ({samples} at once)" if samples > 1 else ""
        lines.append(
            f"{summary.output}{names}: {times}{channels}{text(one.size)} voxels, "
            f"{one.voxels:,} made in {one.blocks} blocks of {text(plan.block)}, {_pieces(plan)}"
            f"{at_once}, "
            f"{plan.flops_per_voxel:,.0f} operations per voxel, {_by_whom(plan)}, "
            f"{_in_flight(plan)}"
            + (f"; levels of {', '.join(map(text, one.levels))}" if one.levels else "")
        )
        if one.unselected:
            lines.append(
                f"the mask selects nothing in {one.unselected} of "
                f"{one.blocks + one.unselected} blocks: they hold 0"
            )
        lines.append(
            f"reading: voxels needed were decoded {one.read_amplification:.2f} times (at most "
            f"{plan.reading.amplification:.2f} predicted), with up to "
            f"{show_bytes(plan.reading.cache_bytes)} of decoded chunks kept"
        )
        if one.shrunk:
            lines.append(
                f"others took of the GPU's memory: {one.shrunk} blocks were made by a smaller plan"
            )
        lines.extend(_computing_lines(one))
        if one.measured_error is not None:
            lines.append(_error_line(one.measured_error))
    predicted = max(summary.measured_bytes, *(p.plan.predicted_bytes for p in summary.passes))
    return [
        *lines,
        f"{show_seconds(summary.seconds)}, {summary.voxels_per_second:,.0f} voxels/s"
        f"{_by(summary)}: "
        f"{show_bytes(summary.peak_bytes)} measured, {show_bytes(predicted)} predicted, "
        f"{show_bytes(summary.plan.allowed_bytes)} allowed{_device_memory(summary.plan)}",
    ]


def _by(summary: Summary) -> str:
    """Whose memory is told."""
    count = summary.workers
    return f" by {count} workers; memory of each" if count > 1 else "; memory"


def verification_lines(found: Verification) -> list[str]:
    """What a verification found."""
    verdict = "holds" if found.holds else "DIFFERS"
    if found.halo is not None or found.precision != FULL:
        verdict = f"approximate, made {_approximated(found.halo, found.precision)}"
    return [
        f"{verdict}: largest difference {found.largest_difference:.3g} at z, y, x = {found.at} "
        f"among {found.voxels:,} values at {found.places} places",
        f"allowed {found.allowed:.3g}; standard deviation of the answer "
        f"{found.standard_deviation:.3g}",
    ]


def _computing_lines(one: Pass) -> list[str]:
    """What computing took, beside what was expected, and the layers that took most of it."""
    spent = sum(one.layer_seconds.values())
    if not spent:
        return []
    primitives, expected = one.plan.primitives, one.predicted_seconds
    predicted = show_seconds(sum(expected.values()))
    lines = [f"computing: {show_seconds(spent)}, {predicted} predicted"]
    longest = sorted(one.layer_seconds.items(), key=lambda item: -item[1])[:_LAYERS_SHOWN]
    for layer, seconds in longest:
        if layer in primitives:
            told = f"{show_seconds(seconds)} ({show_seconds(expected[layer])} predicted)"
            lines.append(f"  {layer} by {primitives[layer]}: {told}")
    return lines


def _error_line(error: MeasuredError) -> str:
    """How far an answer is from the exact one."""
    if error.halo is None and not error.lowered:
        return f"no layer is faster in {error.precision}: the answer is exact"
    how = _approximated(error.halo, error.precision)
    return (
        f"approximate: {how} the largest difference at {error.voxels:,} random voxels is "
        f"{error.largest:.3g}, the exact answer's standard deviation {error.standard_deviation:.3g}"
    )


def _approximated(halo: Size | None, precision: str) -> str:
    """What makes an answer approximate."""
    asked = f"with a halo of {text(halo)}" if halo is not None else ""
    lower = f"in {precision}" if precision != FULL else ""
    return ", ".join(filter(None, (asked, lower)))


def progress_line(done: int, total: int, seconds: float) -> str:
    """One line of plain progress."""
    rate = done / seconds if seconds > 0 else 0.0
    left = (total - done) / rate if rate else 0.0
    return f"{100 * done / total:5.1f} %  {rate:,.0f} voxels/s  {show_seconds(left)} left"


def show_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _spacing(values: tuple[Fraction, Fraction, Fraction]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "·".join(map(str, values))
