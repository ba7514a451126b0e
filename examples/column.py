"""What is kept where while a column is made slab by slab: a picture of the program itself.

    python examples/column.py [--output docs/images/column.svg]

For a small padded U-Net and for a chain of convolutions and poolings as fragments: every array's
planes along z, those made by now and dropped, those kept, and those that the last slab made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from znni_dask.choices import choose_primitives
from znni_dask.columns import Column
from znni_dask.geometry import Box
from znni_dask.network.build import Builder
from znni_dask.network.network import Network
from znni_dask.patches import Layout
from znni_dask.schedule import Schedules
from znni_dask.slabs import granules_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
DROPPED, KEPT, NEW = "#dddddd", "#4c78a8", "#f58518"
SLABS, THICKNESS = 10, 8


def unet() -> Network:
    """Two resolutions and a skip between them."""
    b = Builder(1)
    skip = b.conv(b.input, 8, 3, padding="same")
    deep = b.conv(b.max_pool(skip, 4), 8, 3, padding="same")
    up = b.conv_transpose(deep, 8, 4, stride=4)
    return b.network(b.conv(b.concat(up, skip), 2, 3, padding="same"))


def chain() -> Network:
    """Two poolings, whose fragments are made at every offset."""
    b = Builder(1)
    x = b.max_pool(b.conv(b.input, 8, 3), 2)
    x = b.max_pool(b.conv(x, 8, 3), 2)
    return b.network(b.conv(x, 2, 5))


def draw(axes: Axes, network: Network, title: str) -> None:
    """Every array after half of the slabs: its planes where they lie in the volume."""
    layout = Layout(network, (THICKNESS * SLABS + 40, 64, 64), "reflect")
    schedules = Schedules(layout, choose_primitives(layout))
    granules = granules_of(layout, THICKNESS, 4)
    output = Box((0, 0, 0), (THICKNESS * SLABS, 32, 32))
    column = Column.of(schedules, output, granules)
    made: dict[str, int] = {}
    before: dict[str, int] = {}
    first = {node.name: column.boxes[node.name].start[0] for node in network}
    kept = dict(first)
    given = 0
    for turn in column.turns():
        for strand, (_, stop) in turn.makes:
            if strand.branch == 0:
                made[strand.array.name] = stop
        for strand, (_, stop) in turn.freed:
            if strand.branch == 0:
                kept[strand.array.name] = stop
        if turn.operation is None and turn.reads:
            branch = turn.reads[0].strand.branch
            given += branch == column.branches.count - 1
            if given == SLABS // 2 - 1 and branch == column.branches.count - 1:
                before = dict(made)
            if given == SLABS // 2:
                break
    names = [node.name for node in network]
    for row, name in enumerate(names):
        spacing = float(network.spacing[name][0])
        bars = [
            (first[name], kept[name], DROPPED),
            (kept[name], max(kept[name], before[name]), KEPT),
            (max(kept[name], before[name]), made[name], NEW),
        ]
        for start, stop, colour in bars:
            axes.barh(row, (stop - start) * spacing, left=start * spacing, color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="z, voxels of the volume", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs/images/column.svg")
    options = parser.parse_args()

    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    plt.rcParams["svg.hashsalt"] = "column"  # that the picture is the same every time
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    draw(left, unet(), "a padded U-Net, its skip waiting")
    draw(right, chain(), "fragments: one of eight branches")
    told = {DROPPED: "made and dropped", KEPT: "kept", NEW: "made by the last slab, still read"}
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in told.items()],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(options.output, metadata={"Date": None})
    print(options.output)


if __name__ == "__main__":
    main()
