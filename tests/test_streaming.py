"""Columns made slab by slab: the right answer, whatever the slabs, within the memory told."""

from __future__ import annotations

import numpy as np
import pytest

import graphs
from peaks import traced_peak
from test_identity import (
    apart_along_fewer_axes,
    assert_same,
    at_once,
    extended,
    in_tiles,
    shorten_windows,
    volume_for,
)
from znni_dask import columns
from znni_dask.choices import choose_primitives
from znni_dask.columns import Branches, Column
from znni_dask.cut import Cut
from znni_dask.executors import streaming
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.geometry import Box, tiles
from znni_dask.kernels import team
from znni_dask.network.build import Builder
from znni_dask.network.chains import n337
from znni_dask.network.field_of_view import geometry
from znni_dask.network.rewrites import simplify
from znni_dask.pages import Program, memory_of, memory_of_all
from znni_dask.patches import Layout
from znni_dask.primitives.conv_direct_from_few import ConvDirectFromFew
from znni_dask.schedule import Schedules
from znni_dask.slabs import granules_of


def in_columns(network, volume, boundary, block, granules, primitives=None, device=None):
    """The answer in columns of blocks (z, y, x), each made slab by slab; every plane of the volume
    is read once for each."""
    layout = Layout(network, volume.shape[1:], boundary)
    chosen = primitives or choose_primitives(layout)
    schedules = Schedules(layout, chosen)
    planes = granules
    if not isinstance(granules, dict):
        planes = {node.name: granules for node in network}
    out = np.full((network.out_channels, *layout.output_size), np.nan, np.float32)
    memory = memory_of_all(schedules, Cut(block), planes, 2)
    with ColumnExecutor(network, chosen, memory, 2, device) as executor:
        for box in tiles(layout.output_size, block):
            column = Column.of(schedules, box, planes)
            read = []

            def planes_of(span, column=column, read=read):
                read.append(span)
                return extended(volume, planes_of_input(column, span), boundary)

            for slab, answer in executor.slabs(column, planes_of):
                out[(slice(None), *slab.slices)] = answer
            for passed, offset in enumerate(column.offsets):  # in each every plane once
                count = len(read) // len(column.offsets)
                starts, stops = zip(*read[passed * count :][:count], strict=True)
                assert starts == (offset[0], *stops[:-1])
                assert stops[-1] <= column.input.size[0]
    return out


def planes_of_input(column, span):
    """The box of the volume that some planes of a column are."""
    box, first = column.input, column.input.start[0]
    return Box((first + span[0], *box.start[1:]), (first + span[1], *box.stop[1:]))


@pytest.mark.parametrize(("family", "seed"), graphs.ALL)
@pytest.mark.every(3)
def test_every_graph_in_slabs_of_every_thickness_equals_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    random = np.random.default_rng(seed)
    unlike = {node.name: int(random.integers(1, 9)) for node in network}
    ways = [(unlike, (99, 30, 40)), (3, (64, 16, 24)), (5, (13, 24, 99)), (1, (99, 99, 99))]
    layout = Layout(network, volume.shape[1:], "reflect")
    passes = Schedules(layout, choose_primitives(layout)).repeats
    for granules, block in ways if passes == 1 else ways[:1]:  # several take as many times as long
        assert_same(in_columns(network, volume, "reflect", block, granules), want)


@pytest.mark.parametrize("boundary", ["nearest", "constant", "valid"])
@pytest.mark.parametrize(
    ("family", "seed"),
    [("chain", 0), ("residual", 1), ("unet", 2), ("valid_unet", 0), ("strided", 0), ("finer", 0)],
)
@pytest.mark.every(5)
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
    got = in_columns(network, volume, "reflect", (99, 24, 32), 3, primitives)
    assert_same(got, at_once(network, volume, "reflect"))


@pytest.mark.parametrize("seed", [1, 5])
def test_offsets_that_fragments_leave_out_are_made_in_passes(seed):
    network = graphs.graph("chain", seed)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    chosen = choose_primitives(layout)
    want = at_once(network, volume, "reflect")
    ways = [(3, (14, 25, 99)), (2, (99, 99, 17)), (4, (99, 99, 99))]
    for primitives, way in zip(apart_along_fewer_axes(layout, chosen), ways, strict=False):
        granules, block = way
        got = in_columns(network, volume, "reflect", block, granules, primitives)
        assert_same(got, want)


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 0), ("residual", 0)])
def test_a_planted_halo_error_of_one_voxel_is_found(family, seed, side, monkeypatch):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    geometry(network)
    shorten_windows(monkeypatch, side)
    with pytest.raises(AssertionError):
        assert_same(in_columns(network, volume, "reflect", (16, 16, 16), 4), want)


def test_a_plane_that_is_given_back_too_early_is_missed(monkeypatch):
    """Pages are used again at once, so that what is read too late shows."""
    network = graphs.graph("unet", 2)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    honest = columns._Progress._needed
    monkeypatch.setattr(columns._Progress, "_needed", lambda *given: honest(*given) + 1)
    with pytest.raises(AssertionError):
        assert_same(in_columns(network, volume, "reflect", (99, 99, 99), 2), want)


def wide(planes):
    """A column of the paper's n337, and its layout."""
    network = n337()
    layout = Layout(network, (400, 300, 300), "reflect")
    schedules = Schedules(layout, choose_primitives(layout))
    granules = granules_of(layout, 16, 4)
    return Column.of(schedules, Box((0, 64, 64), (planes, 128, 128)), granules)


def test_nothing_is_computed_twice_along_z():
    """Planes of every array are made once, in order, and as many as the column needs."""
    column = wide(80)
    made = {}
    for turn in column.turns():
        for strand, (start, stop) in turn.makes:
            assert start == made.get(strand, column.boxes[strand.array.name].start[0])
            made[strand] = stop
    branches = Branches(column.schedules)
    assert branches.count == 8
    for strand, stop in made.items():
        assert stop == column.boxes[strand.array.name].stop[0]
    names = {strand.array.name for strand in made}
    assert names == {node.name for node in column.network}
    assert sum(1 for strand in made if strand.array.name == "conv_16") == 8


def test_what_is_kept_is_what_windows_read_again():
    """Between slabs: kernel - stride planes of every fragment, and of others none."""
    column = wide(160)
    held, least = {}, {}
    for turn in column.turns():
        for strand, (start, stop) in turn.makes:
            held[strand] = held.get(strand, 0) + stop - start
        for strand, (start, stop) in turn.freed:
            held[strand] -= stop - start
        if turn.operation is None and turn.reads:
            least = dict(held)  # the last is that of the end, when all is given back
            if turn.reads[0].planes[1] == 10 and turn.reads[0].strand.branch == 7:
                break
    kept = {}
    for strand, planes in least.items():
        kept.setdefault(strand.array.name, set()).add(planes)
    readers = {i: node for node in column.network for i in node.inputs}
    for name, planes in kept.items():
        if name in readers:
            window = readers[name].layer.window(0)
            fragmented = readers[name].name in column.schedules.fragmented[0]
            again = window.extent - window.stride + (window.stride - 1) * fragmented
            assert max(planes) <= again + (column.granules[name] - 1) * (name == "input"), name


def test_memory_grows_with_the_cross_section_and_not_with_the_length():
    long, short = (memory_of(wide(n), 2).all_bytes for n in (320, 160))
    assert long - short <= 1 << 20  # tables
    held = Program.of(wide(160)).held
    assert (held[-1] >= 0).all()


def test_a_slab_in_the_middle_allocates_no_array(monkeypatch):
    b = Builder(channels=1)
    x = b.max_pool(b.relu(b.conv(b.input, 16, kernel=3)), 2)
    network = b.network(b.conv(x, 3, kernel=3))
    layout = Layout(network, (200, 80, 80), "valid")
    chosen = choose_primitives(layout)
    schedules = Schedules(layout, chosen)
    column = Column.of(schedules, Box((0, 0, 0), (160, 64, 64)), granules_of(layout, 8, 4))
    volume = np.ones((1, *column.input.size), np.float32)
    with ColumnExecutor(network, chosen, memory_of(column, 2), 2) as executor:
        slabs = executor.slabs(column, lambda span: volume[:, slice(*span)])
        for _ in range(3):
            _, answer = next(slabs)
        with monkeypatch.context() as patch:
            for module in (team, streaming):
                patch.setattr(module, "allocate", None)  # would be called, and fail
            peak = traced_peak(lambda: next(slabs))
    assert peak < 64 << 10 < answer.nbytes


def test_few_channels_are_read_and_made_wherever_planes_lie():
    b = Builder(2)
    network = b.network(b.conv(b.relu(b.conv(b.input, 20, 3, padding=1)), 3, 3))
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    primitives = choose_primitives(layout) | {"conv_1": ConvDirectFromFew()}
    got = in_columns(network, volume, "reflect", (99, 14, 22), 3, primitives)
    assert_same(got, at_once(network, volume, "reflect"))


def test_planes_of_the_volume_that_are_read_at_once_have_room():
    """More of them than any layer reads."""
    b = Builder(1)
    network = b.network(b.conv(b.input, 2, 3))
    volume = volume_for(network)
    planes = {node.name: 1 for node in network} | {network.input.name: 64}
    primitives = {"conv_1": ConvDirectFromFew()}
    got = in_columns(network, volume, "reflect", (99, 99, 99), planes, primitives)
    assert_same(got, at_once(network, volume, "reflect"))
