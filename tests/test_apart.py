"""Patches that the host and a device compute each for itself, and who plans that."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from test_split import HOW, MIB, PLAIN, pooled, simulated, small, stored, wide

import graphs
import znni_dask
from held import Held
from test_identity import assert_same, at_once, extended, in_patches, volume_for
from znni_dask import forecast, job, report, split_planner
from znni_dask.apart import Apart
from znni_dask.choices import choose_primitives
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import DeviceError, OptionError
from znni_dask.executors.apart import ApartExecutor
from znni_dask.geometry import Box
from znni_dask.machine import CPU, CPU_GPU, GPU
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.schedule import Schedules

BOXES = [Box((8 * i, 8, 8), (8 * i + 8, 16, 16)) for i in range(5)]


def apart(layout, primitives=None):
    """By plain primitives, whatever is given."""
    return Apart(
        *(Schedules(layout, choose_primitives(layout, device=name)) for name in (CPU, GPU))
    )


@pytest.mark.parametrize(("family", "seed"), graphs.HALF)
@pytest.mark.every(5)
def test_patches_by_either_equal_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    with SimulatedDevice(256 * MIB) as device:
        got = in_patches(*(network, volume, "reflect", (12, 12, 16)), device=device, arranged=apart)
    assert_same(got, at_once(network, volume, "reflect"))


def executor(device):
    layout = Layout(pooled(), (40, 24, 24), "reflect")
    work = apart(layout)
    sizes = work.envelope([{(b.start[a], b.stop[a]) for b in BOXES} for a in range(3)])
    return work, ApartExecutor(work, sizes, (8, 8, 8), 1, device)


def made(work, executor, volume, box):
    todo = work.schedule(box)
    answer = np.empty((3, *box.size), np.float32)
    executor.run(todo, [extended(volume, todo.input, "reflect")], [answer])
    return answer


def test_the_host_computes_what_the_device_does_not_come_to():
    volume = small((40, 24, 24))
    want = at_once(pooled(), volume, "reflect")
    with Held(256 * MIB) as device:
        work, both = executor(device)
        with both, ThreadPoolExecutor(5) as pool:
            device.free.clear()
            asked = [pool.submit(made, work, both, volume, box) for box in BOXES]
            while sum(one.done() for one in asked) < 3:  # all but those that lie on the device
                threading.Event().wait(0.001)
            assert sum(one.done() for one in asked) == 3
            device.free.set()
            got = [one.result() for one in asked]
    for box, answer in zip(BOXES, got, strict=True):
        assert_same(answer, want[(slice(None), *box.slices)])


def test_a_lost_device_fails_what_it_had_and_no_patch_of_the_host():
    volume = small((40, 24, 24))
    count = threading.active_count()
    with Held(256 * MIB) as device:
        work, both = executor(device)
        with both:
            device.lost = True
            with pytest.raises(DeviceError, match="was lost"):
                made(work, both, volume, BOXES[0])
            device.lost = False
            assert np.isfinite(made(work, both, volume, BOXES[0])).all()
    assert threading.active_count() == count


def test_what_makes_not_all_fragments_at_once_is_refused():
    layout = Layout(pooled(), (40, 24, 24), "reflect")
    plainly = Schedules(layout, choose_primitives(layout, fragments=False))
    with pytest.raises(OptionError, match="all fragments of their strides at once"):
        Apart(plainly, apart(layout).device)


# ---- runs


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "in.npy", small((40, 44, 48)))
    return tmp_path / "in.npy"


@pytest.fixture
def never_split(monkeypatch):
    """What both share are whole patches."""
    monkeypatch.setattr(split_planner._Ways, "split", {})


@pytest.mark.parametrize("network", [pooled, wide])
def test_a_run_apart_makes_what_the_cpu_makes(network, source, tmp_path, monkeypatch, never_split):
    opened = []

    def keep(allowed):
        opened.append(SimulatedDevice(allowed))
        return opened[-1]

    monkeypatch.setattr(job, "opened", keep)
    on_cpu = znni_dask.run(network(), source, tmp_path / "cpu.zarr", device="cpu", **HOW)
    with simulated("96MiB"):
        (told,) = forecast.forecasts(network(), source, device="cpu+gpu", **HOW)
        found = znni_dask.run(network(), source, tmp_path / "both.zarr", device="cpu+gpu", **HOW)
    plan = found.plan
    assert plan.apart
    assert plan.device == CPU_GPU
    assert [stage.device for stage in plan.stages] == [CPU, GPU]
    want, got = stored(tmp_path / "cpu.zarr"), stored(tmp_path / "both.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())
    (device,) = opened
    assert 0 < device.peak_bytes <= plan.device_bytes <= plan.allowed_device_bytes < 96 * MIB
    assert found.peak_bytes <= plan.predicted_bytes
    (one,) = found.passes
    assert one.layer_seconds.keys() == on_cpu.passes[0].layer_seconds.keys()
    assert one.predicted_seconds.keys() <= one.layer_seconds.keys() | {"input"}
    assert "2 threads and the GPU (cpu+gpu)" in "\n".join(report.run_lines(found))
    layers = [choice.layer for stage in told.plan.stages for choice in stage.choices]
    assert [step.layer for step in told.steps if step.primitive in told.plan.primitives[step.layer]]
    assert {step.layer for step in told.steps} == set(layers)
    with simulated("96MiB"):
        again = znni_dask.run(
            network(), source, tmp_path / "again.zarr", plan=Plan.from_json(plan.to_json()), **PLAIN
        )
    assert again.plan.stages == plan.stages
    got = stored(tmp_path / "again.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())


def test_two_stages_of_all_layers_are_a_cpus_and_a_gpus(source, tmp_path, never_split):
    with simulated():
        (told,) = forecast.forecasts(pooled(), source, device="cpu+gpu", **HOW)
        first, last = told.plan.stages
        for stages in ((last, first), (first, replace(last, device="cpu"))):
            with pytest.raises(OptionError, match="plan"):
                znni_dask.run(
                    *(pooled(), source, tmp_path / "out.zarr"),
                    plan=replace(told.plan, stages=stages),
                    **PLAIN,
                )
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize(("shared", "what"), [("apart", "patch"), ("split", "first layers")])
def test_the_timeline_shows_what_the_host_and_the_device_did(
    shared, what, source, tmp_path, monkeypatch
):
    other = {"apart": "split", "split": "apart"}[shared]
    monkeypatch.setattr(split_planner._Ways, other, {})
    with simulated("96MiB"):
        made = znni_dask.run(
            *(pooled(), source, tmp_path / "out.zarr"),
            device="cpu+gpu",
            timeline=tmp_path / "line.json",
            **HOW,
        )
    assert made.plan.apart == (shared == "apart")
    events = json.loads((tmp_path / "line.json").read_text())
    lanes = {e["tid"]: e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    done = {(lanes[e["tid"]], e["name"]) for e in events if e.get("ph") == "X"}
    assert {("host", what), ("device, compute", "compute")} <= done
