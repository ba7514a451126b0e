"""What of a GPU is lent to the host: the fastest sub-layers that fit, of patches and of slabs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from test_split import MIB, primitives_of, problem_of, simulated, small, stored, wide
from test_streaming import in_columns

import graphs
import znni_dask
from test_identity import assert_same, at_once, volume_for
from znni_dask import Builder, costs, job, lent, report
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import OptionError, RunError
from znni_dask.machine import GPU
from znni_dask.network.layers import Conv
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.primitives.gpu.conv_direct import GpuConvDirect
from znni_dask.primitives.offloaded import Offloaded, SubLayer
from znni_dask.primitives.table import candidates

# ---- sub-layers


def seconds_for(problem):
    return lambda cut: costs.Costs().pieces_seconds(cut.pieces(problem), 1)


def test_sub_layers_fit_the_room_that_there_is():
    problem = problem_of(Conv(16, 24, (3, 3, 3)), (0, 0, 0), batch=8, size=(20, 20, 20))
    how = [GpuConvDirect()], problem
    seconds = seconds_for(problem)
    found = lent.sub_layers(*how, 1 << 40, seconds)
    assert seconds(found).all <= seconds(Offloaded(GpuConvDirect(), SubLayer.whole(problem))).all
    for room in (8 * MIB, 2 * MIB, MIB // 2):
        found = lent.sub_layers(*how, room, seconds)
        assert room / 8 < found.needs(problem).device_bytes <= room
    assert lent.sub_layers(*how, 100, seconds) is None
    slower = seconds(lent.sub_layers(*how, room, seconds)).all
    assert lent.sub_layers(*how, room, seconds, slower) is None


def halves(n):
    return [n, *halves(-(-n // 2))] if n > 1 else [1]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("room", [4 * MIB, MIB, MIB // 4, MIB // 16])
def test_of_sub_layers_the_fastest_are_found(batch, room):
    """All that halving leads to are tried, the batch first and space along what is longest."""
    conv = Conv(8, 12, (3, 3, 3))
    problem = problem_of(conv, (0, 0, 0), batch=batch, size=(16, 16, 16))
    seconds = seconds_for(problem)
    inner = [p for p in candidates(conv, GPU) if not p.library_bytes]
    sizes = [tuple(sorted(s, reverse=True)) for s in product(*[halves(16)] * 3)]
    wholly = [(n, 12, 8, (16, 16, 16)) for n in halves(batch)]
    cut = [(1, *some) for some in product(halves(12), halves(8), sizes)]
    every = [
        found
        for primitive, sub in product(inner, [*wholly, *cut])
        if (found := Offloaded(primitive, SubLayer(*sub))).refusal(conv) is None
        and found.needs(problem).device_bytes <= room
        and max(found.sub.size) <= 2 * min(found.sub.size)
    ]
    best = min((seconds(one).all for one in every), default=None)
    made = lent.sub_layers(inner, problem, room, seconds)
    assert (made and seconds(made).all) == pytest.approx(best)
    assert made is None or made.needs(problem).device_bytes <= room


# ---- slabs


@pytest.mark.parametrize("sub", [SubLayer(2, 5, 3, (4, 14, 19)), SubLayer(1, 99, 99, (99, 99, 99))])
@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 2), ("residual", 1)])
def test_sub_layers_of_slabs_equal_the_oracle(family, seed, sub):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    chosen = primitives_of(layout, network.nodes[-1].name, sub)
    assert sum(isinstance(p, Offloaded) for p in chosen.values()) > 1
    with SimulatedDevice(64 * MIB) as device:
        got = in_columns(network, volume, "reflect", (99, 24, 32), 3, chosen, device)
    assert_same(got, at_once(network, volume, "reflect"))


def fragments():
    """Pooled densely; its convolutions are worth the way to a device."""
    b = Builder(channels=2, seed=3)
    x = b.max_pool(b.relu(b.conv(b.input, 24, kernel=(3, 2, 3))), 2)
    x = b.average_pool(b.relu(b.conv(x, 48, kernel=(3, 4, 4))), (1, 2, 2))
    return graphs.scaled(b.network(b.conv(x, 3, kernel=2)))


PLAIN = {"chunks": 16, "memory": "3GiB", "pyramid": False}
HOW = PLAIN | {"threads": 2, "device": "gpu+ram"}


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "in.npy", small((40, 44, 48)))
    return tmp_path / "in.npy"


@pytest.mark.parametrize("network", [wide, fragments])
def test_a_run_in_slabs_lent_a_device_makes_what_the_cpu_makes(
    network, source, tmp_path, slabs_alone, devices
):
    znni_dask.run(network(), source, tmp_path / "cpu.zarr", **HOW | {"device": "cpu"})
    with simulated("24MiB"):
        made = znni_dask.run(network(), source, tmp_path / "both.zarr", **HOW)
    plan, (found,) = made.plan, devices
    assert plan.granules
    assert plan.device == "gpu+ram"
    assert any("sub-layers" in primitive for primitive in plan.primitives.values())
    want, got = stored(tmp_path / "cpu.zarr"), stored(tmp_path / "both.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())
    assert 0 < found.peak_bytes <= plan.device_bytes <= plan.allowed_device_bytes < 24 * MIB
    assert made.peak_bytes <= plan.predicted_bytes
    assert "2 threads and the GPU (gpu+ram)" in "\n".join(report.run_lines(made))
    given = Plan.from_json(plan.to_json())
    with simulated("24MiB"):
        again = znni_dask.run(network(), source, tmp_path / "again.zarr", plan=given, **PLAIN)
    assert again.plan.stages == plan.stages
    np.testing.assert_array_equal(stored(tmp_path / "again.zarr"), got)


def test_slabs_are_made_by_less_of_a_device_that_others_took(
    source, tmp_path, monkeypatch, slabs_alone, devices
):
    with simulated("24MiB"):
        whole = znni_dask.run(wide(), source, tmp_path / "whole.zarr", **HOW)
    (found,), tried = devices, []

    def opened(allowed):
        tried.append(allowed)
        return SimulatedDevice(min(allowed, found.peak_bytes - 1))

    monkeypatch.setattr(job, "opened", opened)
    with simulated("24MiB"):
        made = znni_dask.run(wide(), source, tmp_path / "less.zarr", **HOW)
    assert made.plan.stages == whole.plan.stages
    assert len(tried) > 1
    assert tried == sorted(tried, reverse=True)
    assert made.passes[0].shrunk == made.passes[0].blocks
    want, got = stored(tmp_path / "whole.zarr"), stored(tmp_path / "less.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())


def test_a_device_lost_between_slabs_ends_the_run_which_goes_on(
    source, tmp_path, slabs_alone, devices
):
    out = tmp_path / "out.zarr"

    def lose(done, total):
        devices[-1].lost = len(devices) == 1

    with simulated("24MiB"), pytest.raises(RunError, match="the device was lost"):
        znni_dask.run(wide(), source, out, progress=lose, **HOW)
    with simulated("24MiB"):
        made = znni_dask.run(wide(), source, out, **HOW)
        whole = znni_dask.run(wide(), source, tmp_path / "whole.zarr", **HOW)
    assert 0 < made.blocks < whole.blocks
    np.testing.assert_array_equal(stored(out), stored(tmp_path / "whole.zarr"))


def test_slabs_are_no_plan_of_two_stages(source, tmp_path, slabs_alone, devices):
    with simulated("24MiB"):
        made = znni_dask.run(wide(), source, tmp_path / "both.zarr", **HOW)
    (stage,) = made.plan.stages
    for stages, message in [
        (
            [replace(stage, device="cpu"), replace(stage, device="gpu", choices=())],
            r"slabs are computed by cpu or gpu or gpu\+ram, not by cpu\+gpu",
        ),
        ([stage, replace(stage, device="gpu", choices=())], "the plan has several stages"),
    ]:
        odd = replace(made.plan, stages=tuple(stages))
        with simulated("24MiB"), pytest.raises(OptionError, match=message):
            znni_dask.run(wide(), source, tmp_path / "odd.zarr", plan=odd, **PLAIN)
