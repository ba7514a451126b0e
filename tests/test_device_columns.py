"""Columns made slab by slab on a device: the right answer, within the memory told, a slab ahead."""

from __future__ import annotations

import numpy as np
import pytest
from test_lent import HOW, PLAIN
from test_split import MIB, pooled, simulated, small, stored, wide
from test_streaming import planes_of_input

import graphs
import znni_dask
from test_identity import assert_same, at_once, extended, volume_for
from znni_dask import columns, forecast, report
from znni_dask.choices import choose_primitives
from znni_dask.columns import Column
from znni_dask.cut import Cut
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import MemoryLimitError, OptionError, RunError
from znni_dask.executors.device_columns import DeviceColumnExecutor
from znni_dask.geometry import tiles
from znni_dask.machine import GPU
from znni_dask.pages import memory_of_all
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.schedule import Schedules
from znni_dask.slabs import on_device

ON_GPU = HOW | {"device": "gpu"}


def in_slabs(network, volume, boundary, block, granules, device=None, at_hand=lambda planes: True):
    """The answer in columns of blocks (z, y, x), each made slab by slab on a device."""
    layout = Layout(network, volume.shape[1:], boundary)
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    planes = granules
    if not isinstance(granules, dict):
        planes = {node.name: granules for node in network}
    memory = memory_of_all(schedules, Cut(block), planes, 1)
    out = np.full((network.out_channels, *layout.output_size), np.nan, np.float32)
    with DeviceColumnExecutor(
        network, schedules.primitives, memory, device or SimulatedDevice(256 * MIB)
    ) as executor:
        for box in tiles(layout.output_size, block):
            column = Column.of(schedules, box, planes)

            def read(span, column=column):
                return extended(volume, planes_of_input(column, span), boundary)

            for slab, answer in executor.slabs(column, read, at_hand):
                out[(slice(None), *slab.slices)] = answer
        assert sum(executor.taken().seconds.values()) > 0
    return out


@pytest.mark.parametrize(("family", "seed"), graphs.ALL)
@pytest.mark.every(3)
def test_every_graph_in_slabs_equals_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    if Schedules(layout, choose_primitives(layout, device=GPU)).repeats > 1:
        pytest.skip("made in several passes")
    want = at_once(network, volume, "reflect")
    random = np.random.default_rng(seed)
    unlike = {node.name: int(random.integers(1, 9)) for node in network}
    for granules, block in [(unlike, (99, 30, 40)), (3, (64, 16, 24)), (5, (13, 24, 99))]:
        assert_same(in_slabs(network, volume, "reflect", block, granules), want)


@pytest.mark.parametrize("boundary", ["nearest", "constant", "valid"])
@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 2), ("finer", 0)])
def test_every_boundary_equals_the_oracle(family, seed, boundary):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    got = in_slabs(network, volume, boundary, (99, 17, 32), 2)
    assert_same(got, at_once(network, volume, boundary))


def test_planes_that_are_not_at_hand_wait_until_slabs_were_taken():
    network = graphs.graph("unet", 2)
    volume = volume_for(network)
    asked = []

    def at_hand(planes):
        asked.append(planes)
        return len(asked) % 2 == 0

    got = in_slabs(network, volume, "reflect", (99, 99, 99), 2, at_hand=at_hand)
    assert len(asked) > 4
    assert_same(got, at_once(network, volume, "reflect"))


def test_a_plane_that_is_given_back_too_early_is_missed(monkeypatch):
    network = graphs.graph("unet", 2)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    honest = columns._Progress._needed
    monkeypatch.setattr(columns._Progress, "_needed", lambda *given: honest(*given) + 1)
    with pytest.raises(AssertionError):
        assert_same(in_slabs(network, volume, "reflect", (99, 99, 99), 2), want)


@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 0), ("residual", 1)])
def test_the_device_holds_no_more_than_was_told(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    memory = memory_of_all(schedules, Cut((99, 24, 32)), {n.name: 4 for n in network}, 1)
    told = on_device(memory).device_bytes + schedules.prepared_bytes
    told += memory.copies_bytes + memory.workspace_bytes + memory.beside_bytes
    with SimulatedDevice(64 * MIB) as device:
        in_slabs(network, volume, "reflect", (99, 24, 32), 4, device)
        assert 0.5 * (told - 4 * MIB) < device.peak_bytes <= told


def test_a_slab_is_begun_before_the_one_before_it_is_taken():
    """Also where whoever takes it takes long."""
    network = graphs.graph("unet", 2)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    granules = {node.name: 2 for node in network}
    memory = memory_of_all(schedules, Cut((99, 99, 99)), granules, 1)
    (box,) = tiles(layout.output_size, (99, 99, 99))
    column = Column.of(schedules, box, granules)
    begun = []

    def read(span):
        begun.append(span[1])
        return extended(volume, planes_of_input(column, span), "reflect")

    device = SimulatedDevice(256 * MIB)
    with DeviceColumnExecutor(network, schedules.primitives, memory, device) as executor:
        ahead = [begun[-1] for _ in executor.slabs(column, read, lambda planes: True)]
        begun.clear()
        waiting = [begun[-1] for _ in executor.slabs(column, read, lambda planes: False)]
    assert len(set(ahead)) > 3
    assert ahead[:-1] == waiting[1:]


# ---- runs


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "in.npy", small((40, 44, 48)))
    return tmp_path / "in.npy"


@pytest.mark.parametrize("network", [wide, pooled])
def test_a_run_in_slabs_makes_what_the_cpu_makes(network, source, tmp_path, slabs_alone, devices):
    znni_dask.run(network(), source, tmp_path / "cpu.zarr", **HOW | {"device": "cpu"})
    with simulated("24MiB"):
        made = znni_dask.run(network(), source, tmp_path / "gpu.zarr", **ON_GPU)
        (told,) = forecast.forecasts(network(), source, **ON_GPU)
    plan, (found,) = made.plan, devices
    assert plan.granules
    assert plan.device == "gpu"
    assert plan.blocks_in_column > 1
    want, got = stored(tmp_path / "cpu.zarr"), stored(tmp_path / "gpu.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())
    assert 0 < found.peak_bytes <= plan.device_bytes <= plan.allowed_device_bytes < 24 * MIB
    assert made.peak_bytes <= plan.predicted_bytes
    assert made.passes[0].layer_seconds.keys() == plan.primitives.keys()
    assert "slab" in "\n".join(report.run_lines(made))
    assert max(step.peak_bytes for step in told.steps) <= plan.device_bytes
    given = Plan.from_json(plan.to_json())
    with simulated("24MiB"):
        again = znni_dask.run(network(), source, tmp_path / "again.zarr", plan=given, **PLAIN)
    assert again.plan.stages == plan.stages
    np.testing.assert_array_equal(stored(tmp_path / "again.zarr"), got)


def test_a_small_device_makes_in_slabs_what_it_could_not_in_patches(source, tmp_path):
    """Kept planes take less than patches with all around them."""
    with simulated("12MiB"):
        with pytest.raises((MemoryLimitError, OptionError)):
            znni_dask.run(wide(), source, tmp_path / "no.zarr", patch=40, **ON_GPU)
        made = znni_dask.run(wide(), source, tmp_path / "gpu.zarr", **ON_GPU)
    assert made.plan.device_bytes < 12 * MIB


def test_a_device_lost_between_slabs_ends_the_run_which_goes_on(
    source, tmp_path, slabs_alone, devices
):
    out = tmp_path / "out.zarr"

    def lose(done, total):
        devices[-1].lost = len(devices) == 1

    with simulated("24MiB"), pytest.raises(RunError, match="the device was lost"):
        znni_dask.run(wide(), source, out, progress=lose, **ON_GPU)
    with simulated("24MiB"):
        made = znni_dask.run(wide(), source, out, **ON_GPU)
        whole = znni_dask.run(wide(), source, tmp_path / "whole.zarr", **ON_GPU)
    assert 0 < made.blocks < whole.blocks
    np.testing.assert_array_equal(stored(out), stored(tmp_path / "whole.zarr"))
