"""Plans in slabs: within the memory allowed, faster than patches where fields of view are large."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import zarr
from test_planner import request

import graphs
import znni_dask
from test_identity import assert_same, at_once
from znni_dask import column_planner, passes, planner
from znni_dask.choices import choose_primitives, chosen_primitives
from znni_dask.column_planner import checked, search
from znni_dask.columns import Column
from znni_dask.cut import Cut
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.forecast import forecasts
from znni_dask.geometry import Box, tiles, volume
from znni_dask.network import layers
from znni_dask.network.build import Builder
from znni_dask.network.chains import n337, n537
from znni_dask.network.rewrites import simplify
from znni_dask.pages import Program, memory_of, memory_of_all, page_bytes
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.reading import Reads
from znni_dask.report import forecast_lines
from znni_dask.resources import Resources
from znni_dask.schedule import Schedules
from znni_dask.slabs import Programs, granules_of


def asked(network, size, **options):
    """A layout, and what there is for it."""
    wanted = vars(request(network, size, **options))
    layout = wanted.pop("layout")
    wanted.pop("patch")
    return layout, Resources(**wanted)


@pytest.mark.parametrize("gib", [0.5, 1, 4])
@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 3), ("residual", 0)])
def test_what_is_predicted_is_within_what_is_allowed(family, seed, gib):
    layout, resources = asked(graphs.graph(family, seed), (400, 200, 200), allowed=int(gib * 2**30))
    made = search(layout, resources)
    assert made.predicted_bytes <= resources.allowed_bytes
    assert all(b % u == 0 for b, u in zip(made.block, resources.unit, strict=True))
    assert set(made.granules) == {node.name for node in layout.network if node.inputs}
    assert Plan.from_json(made.to_json()) == made
    assert checked(layout, resources, made) == made


@pytest.mark.parametrize(("family", "seed"), dict(graphs.ALL).items())
def test_every_family_of_graphs_finds_a_plan(family, seed):
    layout, resources = asked(simplify(graphs.graph(family, seed)), (150, 120, 100))
    made = search(layout, resources)
    assert made is not None
    assert checked(layout, resources, made) == made


def test_more_memory_never_makes_the_plan_slower():
    found = []
    for gib in (2, 8):
        layout, resources = asked(n337(), (1000, 700, 700), allowed=gib << 30)
        found.append(search(layout, resources).voxels_per_second)
    assert found == sorted(found)


def test_a_large_field_of_view_makes_slabs_the_plan():
    layout, resources = asked(n537(), (1000, 512, 512), allowed=4 << 30)
    made, _ = passes.plan_for(layout, resources, None)
    assert made.granules
    in_patches = planner.plan(request(n537(), (1000, 512, 512), allowed=4 << 30))
    assert made.voxels_per_second > 20 * in_patches.voxels_per_second
    with_patch, _ = passes.plan_for(layout, resources, (8, 8, 16))
    assert not with_patch.granules


def test_what_fits_in_slabs_alone_is_not_refused():
    network, size = n537(), (600, 512, 512)
    with pytest.raises(MemoryLimitError, match="allow at least"):
        planner.plan(request(network, size, allowed=1 << 30))
    layout, resources = asked(network, size, allowed=1 << 30)
    made, _ = passes.plan_for(layout, resources, None)
    assert made.granules
    layout, resources = asked(network, size, allowed=1 << 28)
    with pytest.raises(MemoryLimitError, match="allow at least"):
        passes.plan_for(layout, resources, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": (60, 64, 64)}, "not whole chunks"),
        ({"allowed": 1 << 28}, "allow as much"),
        ({"planes": {}}, "does not say how many planes"),
        ({"halo": (2, 2, 2)}, "which this run cannot"),
        ({"samples": 2}, "several windows"),
    ],
)
def test_plans_that_do_not_fit_are_refused(changed, message):
    network = graphs.graph("unet", 0)
    layout, resources = asked(network, (300, 200, 200))
    made = search(layout, resources)
    stage = made.stages[0]
    if "block" in changed:
        made = replace(made, **changed)
    if "allowed" in changed:
        resources = replace(resources, allowed_bytes=changed["allowed"])
    if "planes" in changed:
        first, *others = stage.choices
        made = replace(made, stages=(replace(stage, choices=(replace(first, planes=0), *others)),))
    if "halo" in changed:
        layout = Layout(network, (300, 200, 200), "reflect", **changed)
    if "samples" in changed:
        made = replace(made, stages=(replace(stage, **changed),))
    with pytest.raises((OptionError, MemoryLimitError), match=message):
        checked(layout, resources, made)
    with pytest.raises(OptionError, match="not a plan"):
        Plan.from_json(made.to_json().replace('"planes": ', '"planes": -'))


@pytest.mark.parametrize("in_column", [1, 2, 20])
@pytest.mark.parametrize(
    ("family", "seed"), [("chain", 0), ("unet", 3), ("valid_unet", 0), ("strided", 0), ("finer", 0)]
)
@pytest.mark.every(4)
def test_columns_of_all_blocks_fit_the_pages_of_the_plan(family, seed, in_column):
    """Also those at the ends, where fewer planes are there, and those begun anew at any block."""
    network = graphs.graph(family, seed)
    layout = Layout(network, (250, 70, 50), "reflect")
    schedules = Schedules(layout, choose_primitives(layout))
    granules, block = granules_of(layout, 8, 4), (12, 24, 24)
    most = memory_of_all(schedules, Cut(block, in_column), granules, 2)
    reads = Reads(layout, block, None, None, in_column)
    for box in tiles(layout.output_size, block):
        rest = Box(box.start, reads.column(box).stop)
        column = Column.of(schedules, rest, granules)
        program, one = Program.of(column), memory_of(column, 2)
        assert one.copies_bytes <= most.copies_bytes
        assert one.workspace_bytes <= most.workspace_bytes
        assert one.slab_bytes <= most.slab_bytes
        assert one.table_bytes <= most.table_bytes
        which = [most.pages.sizes[array] for array in program.arrays]
        for size, count in enumerate(most.pages.counts):
            assert program.held[:, np.equal(which, size)].sum(axis=1).max() <= count
        for array in program.arrays:
            assert page_bytes(column, array) <= most.pages.nbytes[most.pages.sizes[array]]


@pytest.mark.parametrize(
    ("family", "seed", "most_passes"),
    [("chain", 0, False), ("chain", 0, True), ("unet", 3, False), ("strided", 1, False)],
)
def test_a_run_in_slabs_equals_the_oracle_within_its_memory(
    family, seed, most_passes, tmp_path, monkeypatch
):
    def nothing(*_):
        raise MemoryLimitError("no patches here")

    monkeypatch.setattr(planner, "search", nothing)
    ways = column_planner._ways
    some = slice(-1, None) if most_passes else slice(1)
    monkeypatch.setattr(column_planner, "_ways", lambda *given: ways(*given)[some])
    network = graphs.graph(family, seed)
    values = np.random.default_rng(seed).standard_normal((network.in_channels, 60, 50, 70))
    values = values.astype(np.float32)
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(1, 16, 16, 16))
    summary = znni_dask.run(
        network, tmp_path / "in.zarr", tmp_path / "out.zarr", chunks=16, memory="2GiB"
    )
    (one,) = summary.passes
    assert one.plan.granules
    layout = Layout(simplify(network), values.shape[1:], "reflect")
    schedules = Schedules(layout, chosen_primitives(layout, one.plan))
    assert (schedules.repeats > 1) == most_passes
    assert summary.peak_bytes <= one.plan.predicted_bytes <= 2 << 30
    assert sum(one.layer_seconds.values()) > 0
    made = zarr.open_group(tmp_path / "out.zarr", mode="r")
    got = np.asarray(made[sorted(made.array_keys())[0]])
    assert_same(got.reshape(-1, *got.shape[-3:]), at_once(network, values, "reflect"))
    again = znni_dask.run(
        network,
        tmp_path / "in.zarr",
        tmp_path / "again.zarr",
        chunks=16,
        memory="2GiB",
        plan=one.plan,
    )
    assert again.plan.granules == one.plan.granules


def test_flat_volumes_are_made_along_another_axis(tmp_path):
    network = graphs.graph("unet", 3)
    size = (20, 120, 400)
    layout, resources = asked(simplify(network), size)
    made = search(layout, resources)
    assert made.axis == 2
    assert made.reading.axes[-1] == 2
    assert made.block[2] * made.blocks_in_column >= 400
    assert Plan.from_json(made.to_json()) == made
    assert checked(layout, resources, made) == made
    values = np.random.default_rng(0).standard_normal((network.in_channels, *size))
    values = values.astype(np.float32)
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(1, 16, 16, 16))
    arguments = network, tmp_path / "in.zarr"
    options = {"memory": "2GiB", "chunks": 16, "plan": replace(made, threads=2)}
    summary = znni_dask.run(*arguments, tmp_path / "out.zarr", **options)
    assert summary.plan.axis == 2
    assert summary.peak_bytes <= summary.plan.predicted_bytes
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    got = np.asarray(group[sorted(group.array_keys())[0]])
    assert_same(got.reshape(-1, *size), at_once(network, values, "reflect"))
    (told,) = forecasts(*arguments, **options)
    shapes = [step.output[2:] for step in told.steps]
    assert all(z <= 20 < 120 < y + 64 for z, y, _ in shapes)
    assert any("along x" in line for line in forecast_lines(told))


def test_networks_that_shuffle_pixels_are_made_along_z():
    b = Builder(1)
    x = b.add(layers.DepthToSpace((2, 2, 2)), b.conv(b.input, 8, 3, stride=2, padding=1))
    network = b.network(b.conv(x, 2, 3, padding=1))
    layout, resources = asked(network, (20, 200, 200))
    assert search(layout, resources).axis == 0
    made = replace(search(layout, resources), axis=1)
    with pytest.raises(OptionError, match="along y"):
        checked(layout, resources, made)


def test_a_halo_of_ones_own_is_left_to_patches():
    b = Builder(1)
    network = b.network(b.conv(b.conv(b.input, 4, 3, padding=1), 2, 3, padding=1))
    layout, resources = asked(simplify(network), (200, 200, 200))
    layout = replace(layout, halo=(1, 1, 1))
    assert column_planner.search(layout, resources) is None
    made, _ = passes.plan_for(layout, resources, None)
    assert not made.granules
    assert volume(made.patch)


@pytest.mark.parametrize(("thickness", "thin"), [(24, 8), (24, 16), (48, 32), (10, 7)])
def test_a_few_periods_stand_for_a_whole_column(thickness, thin):
    layout, _ = asked(simplify(graphs.graph("valid_unet", 0)), (600, 20, 20))
    schedules = Schedules(layout, choose_primitives(layout))
    granules = granules_of(layout, thickness, thin)
    length = layout.output_size[0]
    _, program = Programs(layout, granules).of(schedules, length)
    box = Box((0, 0, 0), (length, 1, 1))
    assert planes_made(program) == pytest.approx(
        planes_made(Program.of(Column.of(schedules, box, granules))), abs=2 * thickness
    )


def planes_made(program):
    """Planes that every operation makes."""
    found = np.zeros(1 + max(task.number for task in program.tasks))
    for task in program.tasks:
        found[task.number] += task.times * (task.planes[1] - task.planes[0])
    return found
