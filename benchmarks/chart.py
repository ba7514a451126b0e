"""The results that are kept, as tables in the documents and as a picture.

    python benchmarks/chart.py

A table stands in a document between `<!-- table: WHAT of FILE -->` and `<!-- end of table -->`;
what lies between is written anew from that file of `results/`. The picture shows, for every layer,
how many times as fast it is as the best of its peers in float32.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from machine import RESULTS

DOCUMENTS = Path(__file__).parent.parent / "docs"
PICTURE = DOCUMENTS / "images" / "convolution.svg"
PICTURED = RESULTS / "convolution-1-threads-amd-epyc-2-cores.json"
_TABLE = re.compile(r"(<!-- table: (.+?) of (\S+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
ALONE = "alone"  # a group that is shown beside its bound only
_COLOUR = "#3b6ea5"

Row = dict[str, Any]
Line = list[str]


def written(text: str) -> str:
    """A document with all its tables written anew."""

    def table(found: re.Match[str]) -> str:
        opening, what, file = found.groups()
        lines = list(TABLES[what](json.loads((RESULTS / file).read_text())))
        ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        return opening + "".join(f"| {' | '.join(line)} |\n" for line in ruled)

    return _TABLE.sub(table, text)


def by_layer(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of every layer, in order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["layer"]].append(row)
    return found


def sizes(result: Row) -> Iterator[Line]:
    """Times as fast for every size of 80 → 80."""
    group = result["groups"]["middle"]
    layers = by_layer(group["rows"])
    yield ["input", *(layer.rpartition(", ")[2] for layer in layers)]
    for size in dict.fromkeys(row["size"] for row in group["rows"]):
        found = [next((r for r in rows if r["size"] == size), None) for rows in layers.values()]
        yield [size, *(_number(row and row["times"]) for row in found)]
    yield ["geometric mean", *(_number(group["geometric_means"][layer]) for layer in layers)]


def layers(result: Row) -> Iterator[Line]:
    """Every layer: geometric means over its sizes, the least and the most."""
    yield [
        *("layer", "sizes", "GFLOP/s", "times the best in float32", "least – most", "the best"),
        "times the best in bfloat16",
    ]
    for name, group in result["groups"].items():
        for layer, rows in by_layer(group["rows"] if name != ALONE else []).items():
            times = [row["times"] for row in rows if row["times"]]
            bf16 = [row["times_bf16"] for row in rows if row["times_bf16"]]
            rates = [row["gflop_per_second"] for row in rows]
            yield [
                *(layer, str(len(rows)), f"{geometric_mean(rates):.0f}"),
                _number(_mean(times)),
                f"{_number(min(times))} – {_number(max(times))}" if times else "–",
                ", ".join(sorted({row["best_peer"] for row in rows if row["best_peer"]})),
                _number(_mean(bf16)),
            ]


def alone(result: Row) -> Iterator[Line]:
    """One patch of 24³ by itself, beside the time that its data and prepared kernels take to be
    copied."""
    yield ["layer", "primitive", "ms", "ms to move it", "times the best in float32"]
    for row in result["groups"][ALONE]["rows"]:
        spent = (f"{1e3 * row[key]:.1f}" for key in ("seconds", "seconds_to_move"))
        yield [row["layer"], row["primitive"], *spent, _number(row["times"])]


def bandwidth(result: Row) -> Iterator[Line]:
    """Layers that only move data."""
    yield ["layer", "form", "GB/s", "of a copy"]
    for row in result["rows"]:
        rate = f"{row['gigabytes_per_second']:.1f}"
        yield [row["layer"], row["form"], rate, f"{row['share_of_copy']:.0%}"]


def accuracy(result: Row) -> Iterator[Line]:
    """Primitives of convolution: the largest error over all kernel sizes, of every input."""
    rows = result["primitives"]
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    yield ["primitive", *inputs]
    for primitive in dict.fromkeys(row["primitive"] for row in rows):
        own = [r for r in rows if r["primitive"] == primitive]
        worst = (max((r["error"] for r in own if r["input"] == i), default=None) for i in inputs)
        yield [primitive, *("–" if error is None else f"{error:.1e}" for error in worst)]


def networks(result: Row) -> Iterator[Line]:
    """Whole networks."""
    yield ["network", "relative L2 error"]
    for row in result["networks"]:
        yield [row["network"], f"{row['error']:.1e}"]


def throughput(result: Row) -> Iterator[Line]:
    """Patches of the papers' networks."""
    yield ["network", "patch", "memory", "voxels/s", "PyTorch", "times"]
    for row in result["rows"]:
        if "peer_voxels_per_second" not in row:
            continue
        rates = (row[f"{who}voxels_per_second"] for who in ("", "peer_"))
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB"
        patch = f"{row['input'][0]}³ → {row['output'][0]}³"
        yield [
            row["network"],
            patch,
            memory,
            *(f"{rate:,.0f}" for rate in rates),
            f"{row['times']:.1f}",
        ]


def complete(result: Row) -> Iterator[Line]:
    """Networks that everybody computes whole."""
    yield ["network", "input", "ms", "best peer", "ms", "times"]
    for row in result["rows"]:
        if "best_peer" not in row:
            continue
        size = "·".join(map(str, row["input"]))
        peer = row["best_peer"]
        own, other = (f"{1e3 * s:.0f}" for s in (row["seconds"], row["peers"][peer]))
        name = row["network"].removesuffix(", batch")
        yield [name, f"{row['batch']} × {size}", own, peer, other, f"{row['times']:.2f}"]


def streaming(result: Row) -> Iterator[Line]:
    """Slabs beside patches within some limits; compared where the machine was steady for both."""
    yield [
        *("network", "within", "slabs", "memory", "voxels/s", "of predicted", "products"),
        *("patches", "memory", "voxels/s", "times", "times PyTorch"),
    ]
    networks = [*dict.fromkeys(row["network"] for row in result["rows"])]
    for row in sorted(
        result["rows"], key=lambda r: (networks.index(r["network"]), int(r["limit"][:-2]))
    ):
        told = [_plan(row.get(way, {})) for way in ("slabs", "patches")]
        products = _number(row["slabs"].get("products_over_least"))
        times = [_number(_times(row, other)) for other in ("patches", "torch")]
        yield [row["network"], row["limit"], *told[0], products, *told[1][:-1], *times]


def fewest(result: Row) -> Iterator[Line]:
    """The fastest slabs beside those of fewest products."""
    told = "memory", "voxels/s", "of predicted", "products"
    yield ["network", "fastest: slabs", *told, "fewest: slabs", *told]
    for row in result["rows"]:
        if "fewest" in row:
            both = (row["slabs"], row["fewest"])
            found = ([*_plan(one), f"{one['products_over_least']:.2f}"] for one in both)
            yield [row["network"], *chain(*found)]


def _times(row: Row, other: str) -> float | None:
    """Rate of slabs over another one; None where the machine was not steady for both."""
    found = [row.get(way, {}) for way in ("slabs", other)]
    if not all("voxels_per_second" in one and "unsteady" not in one for one in found):
        return None
    own, peer = (one["voxels_per_second"] for one in found)
    return float(own / peer)


def study(result: Row) -> Iterator[Line]:
    """Patches of the paper's networks by every algorithm; of what was not run the smallest."""
    yield ["network", "algorithm", "patch", "memory", "voxels/s", "predicted voxels/s"]
    for name, told in result["networks"].items():
        for algorithm, found in told["measured"].items():
            predicted = found["predicted_voxels_per_second"] * found.get("rate", 1)
            shown = f"{predicted:,.0f}" if predicted >= 1 else f"{predicted:.1g}"
            size = "·".join(map(str, found["patch"]))
            yield [name, algorithm, size, *_plan(found)[1:3], shown]


def planning(result: Row) -> Iterator[Line]:
    """Voxels a second over those predicted, for every network within every limit; and for how many
    they are within a fifth, of those that ran on a machine that was steady."""
    limits = [*dict.fromkeys(row["limit"] for row in result["rows"])]
    yield ["network", *limits]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    good: dict[str, list[bool]] = {limit: [] for limit in limits}
    for row in result["rows"]:
        told = "refused" if "refused" in row else "–"
        if "seconds" in row:
            ratio = row["voxels_per_second"] / row["predicted_voxels_per_second"] / row["rate"]
            told = f"{'≈ ' if 'unsteady' in row else ''}{ratio:.2f}"
            if "unsteady" not in row:
                good[row["limit"]].append(abs(ratio - 1) <= 0.2)
        found[row["network"]][row["limit"]] = told
    for network, cells in found.items():
        yield [network, *(cells.get(limit, "–") for limit in limits)]
    yield ["within a fifth", *(f"{sum(one)} of {len(one)}" for one in good.values())]


def promise(result: Row) -> Iterator[Line]:
    """How many cases ended how, and what they took of what was allowed, and predicted."""
    yield ["", "cases", "of them 8 blocks or more", "peak over predicted", "over allowed"]
    kept = [row for row in result["rows"] if "peak_bytes" in row]
    for name in ("kept", "refused", "died"):
        count = str(result["ends"].get(name, 0))
        if name != "kept":
            yield [name, count, "–", "–", "–"]
            continue
        shares = (
            sorted(row["peak_bytes"] / row[key] for row in kept)
            for key in ("predicted_bytes", "allowed_bytes")
        )
        spans = (
            f"{one[0]:.2f} to {one[-1]:.2f}, median {one[len(one) // 2]:.2f}" for one in shares
        )
        yield [name, count, str(result["many_blocks"]), *spans]


def simulation(result: Row) -> Iterator[Line]:
    """Runs on paper beside those that sleep, and real ones."""
    yield ["workers", "case", "blocks", "in flight", "predicted", "measured", "ratio", "limits"]
    for row in result["rows"]:
        if "seconds" not in row:
            continue
        seconds, predicted = row["seconds"], row["predicted_seconds"]
        about = "≈ " if "unsteady" in row else ""
        counts = (str(row[key]) for key in ("blocks", "in_flight"))
        times = f"{predicted:.1f} s", f"{about}{seconds:.1f} s", f"{seconds / predicted:.2f}"
        yield [str(row["workers"]), row["case"], *counts, *times, row["limits"]]


def cluster(result: Row) -> Iterator[Line]:
    """What is made through dask, over what bare loops make."""
    yield ["by", "cores each", "blocks of", "a block takes", "rate over that of loops", "rounds"]
    for row in result["rows"]:
        for way, share in row.get("of_the_loop", {}).items():
            if way != "loop":
                size, seconds = "·".join(map(str, row["block"])), f"{row['block_seconds']:.1f} s"
                rounds = (f"{one[way] / one['loop']:.2f}" for one in row["blocks_per_second"])
                rate = f"{share:.2f}"
                yield [f"`{way}`", str(row["threads"]), size, seconds, rate, ", ".join(rounds)]


def _plan(found: Row) -> Line:
    """What it makes at once, the memory that it took, its rate (about, where the machine gave more
    or less meanwhile), and that over the one predicted for what the machine gave."""
    if "voxels_per_second" not in found:
        return ["–"] * 4
    rate, predicted = found["voxels_per_second"], found["predicted_voxels_per_second"]
    size, memory = "·".join(map(str, found["patch"])), f"{found['peak_bytes'] / 1e9:.1f} GB"
    about = "≈ " if "unsteady" in found else ""
    return [size, memory, f"{about}{rate:,.0f}", f"{rate / predicted / found['rate']:.2f}"]


def pipeline(result: Row) -> Iterator[Line]:
    """Patches over the longer of two stages and the time until the first one arrives."""
    yield ["split behind", "host, s", "device, s", "over the longer one"]
    for row in result["groups"]["pipeline"]:
        seconds = (f"{row[key]:.2f}" for key in ("host_seconds", "device_seconds"))
        yield [row["behind"], *seconds, f"{row['ratio']:.2f}"]


def sublayers(result: Row) -> Iterator[Line]:
    """A convolution in pieces over what takes longest of the ways and computing."""
    yield ["cut", "bus, MB/s", "there, s", "computing, s", "back, s", "over the longest"]
    for row in result["groups"]["sublayers"]:
        seconds = (f"{row[key]:.2f}" for key in ("up", "compute", "down"))
        rate = f"{row['bytes_per_second'] / 1e6:,.0f}"
        yield [row["cut"], rate, *seconds, f"{row['ratio']:.2f}"]


def ways(result: Row) -> Iterator[Line]:
    """Every way to use a GPU that computes nothing: what was planned, and what was made."""
    yield ["network", "of the GPU's memory", "by", "how", "planned, voxels/s", "made", "of planned"]
    for row in result["rows"]:
        if "refused" in row:
            yield [row["network"], *_part(row), row["way"], "refused", "–", "–", "–"]
            continue
        made = row.get("voxels_per_second")
        told = [f"{made:,.0f}", f"{made / row['predicted_voxels_per_second']:.2f}"] if made else []
        planned = f"{row['predicted_voxels_per_second']:,.0f}"
        yield [row["network"], *_part(row), row["way"], _how(row), planned, *(told or ["–", "–"])]


def _part(row: Row) -> Line:
    return ["all" if row["share"] == 1 else f"1/{row['share']}"]


def _how(row: Row) -> str:
    """What the plan of one of the ways is."""
    who = f"{row['device']}: " if row["way"] == "auto" else ""
    if row["apart"]:
        return f"{who}patches by either"
    first, *rest = row["stages"]
    lent = sum("sub-layers" in primitive for primitive in first.values())
    found = "slabs" if row["slabs"] else "patches"
    found += f", {lent} layers lent" if lent else ""
    return f"{who}{found}, split behind {[*first][-1]}" if rest else f"{who}{found}"


TABLES: dict[str, Callable[[Row], Iterator[Line]]] = {
    "sizes": sizes,
    "layers": layers,
    "alone": alone,
    "bandwidth": bandwidth,
    "accuracy": accuracy,
    "networks": networks,
    "throughput": throughput,
    "complete": complete,
    "streaming": streaming,
    "fewest": fewest,
    "study": study,
    "planning": planning,
    "promise": promise,
    "simulation": simulation,
    "cluster": cluster,
    "pipeline": pipeline,
    "sublayers": sublayers,
    "ways": ways,
}


def _mean(values: list[float]) -> float | None:
    return geometric_mean(values) if values else None


def _number(value: float | None) -> str:
    """Two digits that count, of what is below ten; one decimal at least."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def draw(result: Row, path: Path) -> None:
    """Times as fast as the best peer: geometric mean of every layer, from the least to the most."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    groups = (group for name, group in result["groups"].items() if name != ALONE)
    rows = [row for group in groups for row in group["rows"] if row["times"]]
    found = {
        layer: [row["times"] for row in of_layer] for layer, of_layer in by_layer(rows).items()
    }
    figure = Figure(figsize=(7, 0.9 + 0.24 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, times in enumerate(found.values()):
        mean = geometric_mean(times)
        axes.barh(place, mean - 1, left=1, height=0.62, color=_COLOUR)
        axes.plot([min(times), max(times)], [place, place], color="black", linewidth=0.8)
        shown = {"va": "center", "xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(f"{_number(mean)}×", (max(mean, *times), place), **shown)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=1.6 * max(map(max, found.values())))
    axes.axvline(1, color="black", linewidth=0.8)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    machine, threads = result["machine"], rows[0]["threads"]
    of_them = "1 thread" if threads == 1 else f"{threads} threads"
    axes.set_xlabel(
        f"times as fast as the best peer in float32 ({of_them}, {machine['processor']})"
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    for path in sorted(DOCUMENTS.glob("*.md")):
        text = path.read_text()
        if (new := written(text)) != text:
            path.write_text(new)
            print(f"{path.name}: tables written")
    draw(json.loads(PICTURED.read_text()), PICTURE)
    print(f"drawn: {PICTURE}")


if __name__ == "__main__":
    main()
