"""One page of HTML about a plan, or about a run: what is told on a terminal, and pictures.

Those of a plan show its seconds and its memory, those of a run when what was done, and what layers
took. Pictures need matplotlib, the extra ``viz``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from znni_dask import report
from znni_dask.errors import OptionError
from znni_dask.geometry import text, volume
from znni_dask.timeline import Span, spans_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from znni_dask.forecast import Forecast
    from znni_dask.making import Pass
    from znni_dask.running import Summary

_WIDTH = 160  # letters of a table's line
_STYLE = (
    "body{font-family:sans-serif;margin:2em;max-width:80em}"
    "pre{overflow-x:auto}svg{width:100%;height:auto}"
)
_CHOSEN, _OTHERS, _TOO_LARGE = "tab:red", "tab:blue", "none"
_MOST_SPANS = 3000  # of a timeline that is drawn: the first


def require_pictures() -> None:
    """Raises `OptionError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise OptionError("pictures need matplotlib: pip install 'znni_dask[viz]'")


def page_of_plans(title: str, found: Sequence[Forecast]) -> str:
    """A page that needs nothing else; raises `OptionError` where matplotlib is not installed."""
    require_pictures()
    parts = (
        f"<h2>{escape(', '.join(one.outputs))}</h2>{_tables(one)}{_pictures(one)}" for one in found
    )
    return _page(title, "".join(parts))


def page_of_run(title: str, summary: Summary, trace: Path) -> str:
    """A page about what a run did, of which this is the trace; as `page_of_plans`."""
    require_pictures()
    told = _console()
    for line in report.run_lines(summary):
        told.print(line, soft_wrap=True)
    figures = [_layers(one) for one in summary.passes if one.layer_seconds]
    if summary.blocks:  # else nothing was missing, and no trace is there
        figures.insert(0, _timeline([*islice(spans_of(trace), _MOST_SPANS)]))
    return _page(title, _exported(told) + "".join(map(_svg, figures)))


def _page(title: str, content: str) -> str:
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{content}</body></html>\n"
    )


def _console() -> Console:
    """One that keeps what is told."""
    return Console(record=True, file=StringIO(), width=_WIDTH, highlight=False, markup=False)


def _exported(console: Console) -> str:
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _svg(figure: Figure) -> str:
    made = StringIO()
    figure.savefig(made, format="svg")
    drawn = made.getvalue()
    return drawn[drawn.index("<svg") :]


def _timeline(spans: Sequence[tuple[str, Span]]) -> Figure:
    """A bar for everything that was done, a line for every lane of every worker."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    workers = [*dict.fromkeys(worker for worker, _ in spans)]
    places = sorted({(workers.index(worker), span.lane) for worker, span in spans})
    kinds = [*dict.fromkeys(span.what for _, span in spans)]
    bars: dict[tuple[tuple[int, str], str], list[tuple[float, float]]] = {}
    for worker, span in spans:
        place = workers.index(worker), span.lane
        bars.setdefault((place, span.what), []).append((span.start_seconds, span.seconds))
    figure = Figure(figsize=(14, 1.5 + 0.3 * len(places)), layout="constrained")
    axes = figure.subplots()
    for (place, what), found in bars.items():
        color = colormaps["tab10"](kinds.index(what) % 10)
        axes.broken_barh(found, (places.index(place) - 0.4, 0.8), color=color, linewidth=0)
    for number, what in enumerate(kinds):
        axes.plot([], [], color=colormaps["tab10"](number % 10), linewidth=6, label=what)
    several = len(workers) > 1
    names = [f"{workers[w]}: {lane}" if several else lane for w, lane in places]
    axes.set_yticks(range(len(places)), names)
    axes.invert_yaxis()
    axes.set(xlabel="seconds since the run began", title="when what was done, at first")
    figure.legend(loc="outside right upper")
    return figure


def _layers(one: Pass) -> Figure:
    """What every layer took, beside what was predicted."""
    from matplotlib.figure import Figure

    predicted, names = one.predicted_seconds, [*one.layer_seconds]
    figure = Figure(figsize=(14, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for shift, label, color, seconds in (
        (-0.2, "predicted", _OTHERS, predicted),
        (0.2, "measured", _CHOSEN, one.layer_seconds),
    ):
        lengths = [seconds.get(name, 0.0) for name in names]
        axes.barh([n + shift for n in range(len(names))], lengths, 0.4, color=color, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=f"layers of {', '.join(one.outputs)}")
    axes.legend()
    return figure


def _tables(found: Forecast) -> str:
    """What is told on a terminal, too."""
    console = _console()
    for line in report.forecast_lines(found):
        console.print(line, soft_wrap=True)
    console.print(report.forecast_table(found))
    if found.others:
        console.print(report.alternatives_table(found))
    return _exported(console)


def _pictures(found: Forecast) -> str:
    """Four of them, as one SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    ((seconds, memory), (patches, needs)) = figure.subplots(2, 2)
    _draw_seconds(seconds, found)
    _draw_memory(memory, found)
    _draw_others(patches, found, [volume(other.patch) for other in found.others])
    patches.plot([volume(found.plan.patch)], [found.plan.voxels_per_second], "o", color=_CHOSEN)
    patches.set(xscale="log", xlabel="voxels of a patch", title="throughput against patch size")
    gib = 1 / (1 << 30)
    _draw_others(needs, found, [other.needed_bytes * gib for other in found.others])
    needs.plot(
        [found.plan.predicted_bytes * gib], [found.plan.voxels_per_second], "o", color=_CHOSEN
    )
    needs.axvline(found.plan.allowed_bytes * gib, color="black", linestyle="--")
    needs.set(xlabel="GiB (dashed: allowed)", title="throughput against memory")
    return _svg(figure)


def _draw_seconds(axes: Axes, found: Forecast) -> None:
    """Of every step."""
    names = [f"{step.layer} ({step.primitive})" for step in found.steps]
    axes.barh(range(len(names)), [step.seconds for step in found.steps], color=_OTHERS)
    axes.set_yticks(range(len(names)), names, fontsize=max(3, min(9, 250 // len(names))))
    axes.invert_yaxis()
    plan = found.plan
    what = f"block of {text(plan.block)}" if plan.granules else f"patch of {text(plan.patch)}"
    axes.set(xlabel="seconds", title=f"a {what}, step by step")


def _draw_memory(axes: Axes, found: Forecast) -> None:
    """Of the process, while every step is computed."""
    gib = [step.peak_bytes / (1 << 30) for step in found.steps]
    axes.step(range(len(gib)), gib, where="mid", color=_OTHERS)
    for value, style in ((found.plan.predicted_bytes, ":"), (found.plan.allowed_bytes, "--")):
        axes.axhline(value / (1 << 30), color="black", linestyle=style)
    axes.set(ylim=(0, None), xlabel="step", ylabel="GiB")
    axes.set_title("memory of the process (dotted: predicted, dashed: allowed)")


def _draw_others(axes: Axes, found: Forecast, places: Sequence[float]) -> None:
    """The other plans; those that are too large are hollow."""
    for place, other in zip(places, found.others, strict=True):
        fits = other.needed_bytes <= found.plan.allowed_bytes
        style: dict[str, Any] = {"markerfacecolor": _OTHERS if fits else _TOO_LARGE}
        axes.plot([place], [other.voxels_per_second], "o", color=_OTHERS, **style)
    axes.set(ylim=(0, None), ylabel="voxels/s (red: the plan; hollow: too large)")
