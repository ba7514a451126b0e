"""One page of HTML about a plan: its tables, and pictures of its seconds and its memory.

The pictures need matplotlib, the extra ``viz``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console

from znni_dask import report
from znni_dask.errors import OptionError
from znni_dask.geometry import text, volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from znni_dask.forecast import Forecast

_WIDTH = 160  # letters of a table's line
_STYLE = "body{font-family:sans-serif;margin:2em;max-width:80em}svg{width:100%;height:auto}"
_CHOSEN, _OTHERS, _TOO_LARGE = "tab:red", "tab:blue", "none"


def page(title: str, found: Sequence[Forecast]) -> str:
    """A page that needs nothing else; raises `OptionError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise OptionError("pictures need matplotlib: pip install 'znni_dask[viz]'")
    parts = (
        f"<h2>{escape(', '.join(one.outputs))}</h2>{_tables(one)}{_pictures(one)}" for one in found
    )
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _tables(found: Forecast) -> str:
    """What is told on a terminal, too."""
    console = Console(record=True, file=StringIO(), width=_WIDTH, highlight=False, markup=False)
    for line in report.forecast_lines(found):
        console.print(line, soft_wrap=True)
    console.print(report.forecast_table(found))
    if found.others:
        console.print(report.alternatives_table(found))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


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
    made = StringIO()
    figure.savefig(made, format="svg")
    drawn = made.getvalue()
    return drawn[drawn.index("<svg") :]


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
