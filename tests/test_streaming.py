"""Columns made slab by slab: the right answer, whatever the slabs."""

from __future__ import annotations

import numpy as np
import pytest

import graphs
from test_identity import assert_same, at_once, extended, in_tiles, volume_for
from znni_dask.choices import choose_primitives
from znni_dask.columns import Column
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.geometry import Box, tiles
from znni_dask.network.rewrites import simplify
from znni_dask.pages import memory_of
from znni_dask.patches import Layout
from znni_dask.schedule import Schedules


def in_columns(network, volume, boundary, block, granules, apart=True, primitives=None):
    """The answer in columns of blocks (z, y, x), each made slab by slab; and their inputs."""
    layout = Layout(network, volume.shape[1:], boundary)
    chosen = primitives or choose_primitives(layout)
    schedules = Schedules(layout, chosen)
    if not callable(granules):
        granules = {node.name: granules for node in network}.get
    planes = {node.name: granules(node.name) for node in network}
    out = np.full((network.out_channels, *layout.output_size), np.nan, np.float32)
    for box in tiles(layout.output_size, block):
        column = Column.of(schedules, box, planes, apart)
        read = []

        def planes_of(span, column=column, read=read):
            read.append(span)
            first = column.input.start[0]
            here = Box(
                (first + span[0], *column.input.start[1:]),
                (first + span[1], *column.input.stop[1:]),
            )
            return extended(volume, here, boundary)

        with ColumnExecutor(network, chosen, memory_of(column, 2), 2) as executor:
            for slab, answer in executor.slabs(column, planes_of):
                out[(slice(None), *slab.slices)] = answer
        starts, stops = zip(*read, strict=True)
        assert starts == (0, *stops[:-1])  # each plane once
        assert stops[-1] <= column.input.size[0]
    return out


@pytest.mark.parametrize(("family", "seed"), graphs.ALL)
def test_every_graph_in_slabs_of_every_thickness_equals_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    if (
        Schedules(
            Layout(network, volume.shape[1:], "reflect"),
            choose_primitives(Layout(network, volume.shape[1:], "reflect")),
        ).repeats
        > 1
    ):
        pytest.skip()
    ways = [(1, (99, 99, 99)), (3, (64, 16, 16)), (5, (13, 20, 31)), (99, (99, 40, 9))]
    for granule, block in ways:
        assert_same(in_columns(network, volume, "reflect", block, granule), want)


@pytest.mark.parametrize("boundary", ["reflect", "nearest", "constant", "valid"])
@pytest.mark.parametrize(
    ("family", "seed"),
    [("chain", 0), ("residual", 1), ("unet", 2), ("valid_unet", 0), ("strided", 0), ("finer", 0)],
)
def test_every_boundary_equals_the_oracle(family, seed, boundary):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    got = in_columns(network, volume, boundary, (99, 17, 32), 2)
    assert_same(got, at_once(network, volume, boundary))


@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 2), ("residual", 1)])
def test_tiles_read_and_make_planes_wherever_they_lie(family, seed):
    network = simplify(graphs.graph(family, seed))
    volume = volume_for(network)
    primitives = in_tiles(network, Layout(network, volume.shape[1:], "reflect"))
    got = in_columns(network, volume, "reflect", (99, 24, 32), 3, primitives=primitives)
    assert_same(got, at_once(network, volume, "reflect"))
