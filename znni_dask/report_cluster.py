"""What a plan would take on a cluster, as people read it; computes nothing."""

from __future__ import annotations

from rich import box
from rich.table import Table

from znni_dask.machine import show_bytes
from znni_dask.outlook import Outlook
from znni_dask.report import show_seconds
from znni_dask.simulation import END, SCHEDULER


def groups_table(found: Outlook) -> Table:
    """A row per group of workers of a cluster."""
    table = Table(title="workers", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("workers", "threads", "s a block", "voxels/s each", "blocks", "hours", "cost"):
        table.add_column(column, justify="right")
    for group in found.groups:
        table.add_row(
            f"{group.count:,}",
            str(group.threads),
            f"{group.block_seconds:.3g}",
            f"{group.voxels_per_second:,.0f}",
            f"{group.blocks:,}",
            f"{group.there_seconds / 3600:,.1f}",
            f"{group.price:,.2f}",
        )
    return table


def outlook_table(found: Outlook) -> Table:
    """A row for everything that may limit a run: how busy it is, what it would take were there
    nothing else to wait for, and how many workers it can keep busy."""
    table = Table(title="what limits", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("busy", "alone", "enough for workers"):
        table.add_column(column, justify="right")
    for what in sorted(found.busy, key=lambda what: -found.busy[what]):
        alone, useful = found.alone_seconds.get(what), found.useful_workers.get(what)
        table.add_row(
            what,
            f"{found.busy[what]:.1%}",
            "" if alone is None else show_seconds(alone),
            "" if useful is None else f"{useful:,.0f}",
        )
    return table


def outlook_lines(found: Outlook) -> list[str]:
    """What a pass is expected to take on a cluster."""
    hours = found.worker_seconds / 3600
    lines = [
        f"{found.workers:,} workers: {show_seconds(found.seconds)}, {hours:,.1f} worker-hours, "
        f"costs {found.price:,.2f}; {found.voxels_per_second:,.0f} voxels/s; most busy: "
        f"{found.bottleneck}",
        f"{found.blocks:,} blocks of {found.block_voxels:,.0f} voxels in the mean; "
        f"{show_bytes(found.read_bytes)} are read, {show_bytes(found.write_bytes)} written",
        _growth(found),
    ]
    if found.most_useful:
        number, what = found.most_useful
        lines.append(f"no more than {number:,} workers like these are kept busy, by {what}")
    if found.bundle > 1:
        lines.append(f"simulated in bundles of {found.bundle} blocks")
    return [
        *lines,
        "not counted: coarser levels, statistics, what workers prepare, and chunks that are "
        "decoded again because several workers read them",
    ]


def _growth(found: Outlook) -> str:
    """From which size on blocks should be larger."""
    told = (
        "the scheduler limits these workers where blocks have fewer than "
        f"{found.least_block_voxels:,.0f} voxels"
    )
    if found.bottleneck == SCHEDULER:
        grow = found.least_block_voxels / found.block_voxels
        return f"{told}: let blocks grow {grow:.1f} times, by larger chunks or shards of the output"
    if found.bottleneck == END:
        return f"{told}; there are few blocks for so many workers: fewer will be about as fast"
    return told
