"""Devices: what is simulated keeps the contract of all, and what is computed there is the same."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from test_patchwise import normalised

import graphs
import znni_dask
from test_identity import assert_same, at_once, in_patches, volume_for
from znni_dask import Builder, job, recompute, report, resources
from znni_dask.choices import choose_primitives
from znni_dask.cli import main
from znni_dask.devices import opening
from znni_dask.devices.opening import Wanted, gpu_of
from znni_dask.devices.simulated import Pace, SimulatedDevice
from znni_dask.errors import (
    DeviceError,
    MemoryLimitError,
    OptionError,
    OutputError,
    RunError,
)
from znni_dask.executors.device import DeviceExecutor
from znni_dask.geometry import Box, tiles
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.machine import GPU
from znni_dask.patches import Layout, spans
from znni_dask.primitives.gpu import conv_cudnn
from znni_dask.primitives.gpu.conv_cudnn import GpuConvCudnn
from znni_dask.primitives.work import Rate
from znni_dask.schedule import Schedules
from znni_dask.verify import verify

MIB = 1 << 20


@pytest.fixture
def device():
    with SimulatedDevice(64 * MIB) as found:
        yield found


def test_no_more_is_held_than_is_allowed(device):
    first = device.empty(40 * MIB)
    with pytest.raises(DeviceError, match=r"40 MiB are wanted .* 24 MiB of 64 MiB are free"):
        device.empty(40 * MIB)
    part = first[MIB : 2 * MIB].view(np.float32)
    del first
    gc.collect()
    assert device.held_bytes == 40 * MIB  # a part of it is still in use
    del part
    gc.collect()
    assert device.held_bytes == 0
    assert device.empty(64 * MIB).nbytes == 64 * MIB
    assert device.peak_bytes == 64 * MIB


def test_scratch_memory_is_handed_out_again(device):
    first = device.scratch(MIB)
    first[:] = 7
    assert (device.scratch(1000) == 7).all()
    del first
    assert device.scratch(2 * MIB).nbytes == device.scratch_bytes == device.held_bytes == 2 * MIB


def test_a_lane_does_one_thing_after_another_and_lanes_wait_for_marks(device):
    up, compute, _ = device.lanes
    done, free = [], threading.Event()
    first = up.do(free.wait)
    up.do(lambda: done.append("copied"))
    later = compute.do(lambda: done.append("computed"), after=[up.do(lambda: None)])
    assert not done
    free.set()
    later.wait()
    first.wait()
    assert done == ["copied", "computed"]
    assert later.seconds_since(first) >= 0


def test_what_goes_wrong_is_told_to_all_who_wait_for_it(device):
    up, compute, down = device.lanes

    def fail():
        raise DeviceError("no more")

    failed = up.do(fail)
    computed = compute.do(lambda: None, after=[failed])
    back = down.do(lambda: None, after=[computed])
    for mark in (failed, computed, back):
        with pytest.raises(DeviceError, match="no more"):
            mark.wait()
    up.do(lambda: None).wait()  # which others do not suffer from


def test_copies_and_computing_take_as_long_as_was_asked_for():
    with SimulatedDevice(MIB, Pace(copied_bytes_per_second=1e6, slowdown=3)) as device:
        there, here = device.empty(50_000), device.pinned(50_000)
        first = device.lanes.up.do(lambda: None)
        copied = device.lanes.up.do(lambda: device.copy(there, here))
        copied.wait()
        assert copied.seconds_since(first) >= 0.05
        nap = Kernel("nap", "", lambda seconds: time.sleep(seconds))
        begin = device.lanes.compute.do(lambda: None)
        end = device.lanes.compute.do(lambda: device.launch(nap, 1, 0.02))
        end.wait()
        assert end.seconds_since(begin) >= 0.06


def test_a_device_that_is_closed_ends_its_threads():
    before = threading.active_count()
    with SimulatedDevice(MIB) as device:
        device.scratch(MIB)
        assert threading.active_count() == before + 3
    assert threading.active_count() == before
    gc.collect()
    assert device.held_bytes == 0


# ---- which device there is


@pytest.mark.parametrize(
    ("told", "pace"),
    [
        ("64MiB", Pace()),
        ({"memory": "64MiB", "slowdown": 2}, Pace(slowdown=2)),
        ({"memory": 64 * MIB, "copied-bytes-per-second": 1e9}, Pace(1e9)),
    ],
)
def test_a_simulated_gpu_stands_for_one_where_the_configuration_says_so(told, pace):
    with dask.config.set({"znni.simulated-gpu": told}):
        found = gpu_of(Wanted(GPU))
        assert (found.name, found.free_bytes) == ("simulated GPU", 64 * MIB)
        with opening.opened(MIB) as device:
            assert (device.pace, device.allowed_bytes) == (pace, MIB)
        assert not gpu_of(Wanted("cpu")).free_bytes


@pytest.mark.parametrize("told", [{"slowdown": 2}, {"memory": "1GiB", "speed": 3}, "much"])
def test_a_simulated_gpu_that_cannot_be_is_refused(told):
    with dask.config.set({"znni.simulated-gpu": told}), pytest.raises(OptionError):
        gpu_of(Wanted(GPU))


def test_what_may_be_taken_of_a_gpu_is_shared_and_bounded():
    found = opening.Found("one", 1000 * MIB)
    assert found.allowed_bytes(Wanted(GPU)) == 900 * MIB
    assert found.allowed_bytes(Wanted(GPU), sharing=3) == 300 * MIB
    assert found.allowed_bytes(Wanted(GPU, 100 * MIB), sharing=3) == 100 * MIB
    assert found.allowed_bytes(Wanted(GPU, 5000 * MIB)) == 900 * MIB
    assert opening.Found(why="none").allowed_bytes(Wanted(GPU, MIB)) == 0


# ---- computing there


@pytest.mark.parametrize(("family", "seed"), graphs.HALF)
@pytest.mark.every(3)
def test_patches_of_every_graph_equal_the_oracle(family, seed, device):
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    got = in_patches(network, volume, "reflect", (9, 10, 13), device=device)
    assert_same(got, at_once(network, volume, "reflect"))
    assert device.held_bytes < MIB  # what arrays of the network still refer to


def test_a_halo_short_by_one_voxel_is_seen(device):
    network = graphs.graph("chain", 0)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")

    class Short(SimulatedDevice):
        def copy(self, target, source):
            super().copy(target, source)
            if target.ndim == 5 and source.ndim == 5:
                target[..., 0] = target[..., 1]

    with pytest.raises(AssertionError), Short(64 * MIB) as short:
        assert_same(in_patches(network, volume, "reflect", (9, 10, 13), device=short), want)


def test_threads_that_ask_at_once_get_their_own_answers(device):
    network = graphs.graph("unet", 0)
    layout = Layout(network, (24, 30, 36), "reflect")
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    boxes = list(tiles(layout.output_size, (12, 12, 12)))
    sizes = schedules.envelope(spans(layout, layout.output_size, (12, 12, 12)))
    random = np.random.default_rng(0)
    shape = (network.in_channels, *layout.region(Box((0, 0, 0), layout.output_size)).size)
    whole = random.standard_normal(shape).astype(np.float32)
    first = layout.region(Box((0, 0, 0), layout.output_size)).start

    def made(executor, box):
        todo = schedules.schedule(box)
        given = whole[(slice(None), *todo.input.seen_from(first).slices)]
        answer = np.empty((network.out_channels, *box.size), np.float32)
        executor.run(todo, [given], [answer])
        return answer

    with DeviceExecutor(schedules, sizes, (12, 12, 12), device) as executor:
        want = [made(executor, box) for box in boxes]
        executor.taken()
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(partial(made, executor), boxes))
        seconds = executor.taken().seconds
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    assert {array.name for array in seconds} == {node.name for node in network if node.inputs}
    assert min(seconds.values()) > 0


def test_copies_there_and_back_go_on_while_others_are_computed():
    """The answer of the first patch is not copied back before the second is there, and that one is
    not computed before: were they to wait for each other, nobody would come."""
    b = Builder(1)
    network = b.network(b.conv(b.input, 1, 3))
    layout = Layout(network, (18, 18, 18), "valid")
    schedules = Schedules(layout, choose_primitives(layout, device=GPU))
    box = Box((0, 0, 0), layout.output_size)
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(SimulatedDevice):
        copies = 0

        def copy(self, target, source):
            if target.ndim == 5:  # not of weights
                self.copies += 1
                if self.copies in (2, 3):
                    meeting.wait()
            super().copy(target, source)

    given = np.ones((1, 18, 18, 18), np.float32)
    outs = [np.empty((1, 16, 16, 16), np.float32) for _ in range(6)]
    with (
        Meeting(64 * MIB) as device,
        DeviceExecutor(schedules, schedules.sizes(box), box.size, device) as executor,
        ThreadPoolExecutor(3) as pool,
    ):
        list(pool.map(lambda out: executor.run(schedules.schedule(box), [given], [out]), outs))
        found = executor.taken().spans
    lanes = {span.lane: [s for s in found if s.lane == span.lane] for span in found}
    assert {lane: len(some) for lane, some in lanes.items()} == dict.fromkeys(lanes, 6)
    for some in lanes.values():
        for one, other in pairwise(sorted(some, key=lambda span: span.start_seconds)):
            assert one.start_seconds + one.seconds <= other.start_seconds + 1e-3


# ---- runs


def simulated(memory="1GiB"):
    return dask.config.set({"znni.simulated-gpu": memory})


@pytest.fixture
def paths(tmp_path):
    random = np.random.default_rng(1)
    np.save(tmp_path / "in.npy", random.standard_normal((40, 50, 60)).astype(np.float32))
    return tmp_path / "in.npy", tmp_path / "out.zarr"


def same_size():
    b = Builder(1)
    x = b.relu(b.conv(b.input, 4, 3, padding="same"))
    x = b.relu(b.conv(b.max_pool(x, 2), 6, 3, padding="same"))
    return graphs.scaled(b.network(b.conv(b.resize(x, 2), 2, 3, padding="same")))


def stored(path):
    return zarr.open_array(path / "0", mode="r")[:]


@pytest.mark.parametrize("network", [same_size, lambda: graphs.graph("chain", 0)])
def test_a_run_on_the_gpu_makes_what_one_on_the_cpu_makes(network, paths, tmp_path):
    source, target = paths
    how = {"chunks": 16, "patch": 16, "threads": 2}
    on_cpu = znni_dask.run(network(), source, target, device="cpu", **how)
    with simulated():
        on_gpu = znni_dask.run(network(), source, tmp_path / "gpu.zarr", device="gpu", **how)
    assert [s.device for s in (*on_cpu.plan.stages, *on_gpu.plan.stages)] == ["cpu", "gpu"]
    want, got = stored(target), stored(tmp_path / "gpu.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())
    assert verify(network(), source, tmp_path / "gpu.zarr", size=(4, 4, 4), places=2).holds
    assert on_gpu.passes[0].layer_seconds.keys() == on_cpu.passes[0].layer_seconds.keys()
    told = "\n".join(report.run_lines(on_gpu))
    assert "by the GPU" in told
    assert "of the GPU" in told


def test_memory_of_the_gpu_stays_within_what_was_predicted(paths, monkeypatch):
    source, target = paths
    devices = []

    def opened(allowed):
        devices.append(SimulatedDevice(allowed))
        return devices[-1]

    monkeypatch.setattr(job, "opened", opened)
    with simulated():
        made = znni_dask.run(
            same_size(), source, target, device="gpu", device_memory="24MiB", chunks=16, threads=2
        )
    (device,) = devices
    plan = made.plan
    assert device.peak_bytes <= plan.device_bytes <= plan.allowed_device_bytes == 24 * MIB
    assert device.peak_bytes > 0.9 * (plan.device_bytes - resources.DEVICE_SLACK_BYTES)
    assert made.peak_bytes <= plan.predicted_bytes


def test_windows_are_computed_on_the_gpu_too(paths, tmp_path):
    source, target = paths
    network = normalised()
    how = {"chunks": 16, "threads": 2, "patchwise": (16, 20, 20)}
    znni_dask.run(network, source, target, device="cpu", **how)
    with simulated():
        made = znni_dask.run(network, source, tmp_path / "gpu.zarr", device="gpu", **how)
    assert made.plan.device == "gpu"
    want = stored(target)
    np.testing.assert_allclose(
        stored(tmp_path / "gpu.zarr"), want, rtol=1e-5, atol=1e-5 * want.std()
    )


def test_what_a_lower_precision_costs_on_the_gpu_is_measured_there(paths, monkeypatch):
    monkeypatch.setitem(conv_cudnn.RATES, "bfloat16", Rate("fast", 1e16))
    monkeypatch.setattr(GpuConvCudnn, "setup_seconds", 0.0)
    source, target = paths
    b = Builder(1)
    wide = b.relu(b.conv(b.relu(b.conv(b.input, 32, 3, padding="same")), 32, 3, padding="same"))
    network = graphs.scaled(b.network(b.conv(wide, 2, 3, padding="same")))
    how = {"device": "gpu", "precision": "bfloat16", "chunks": 16, "threads": 2}
    with simulated():
        (made,) = znni_dask.run(network, source, target, **how).passes
    assert "cudnn bfloat16" in made.plan.primitives.values()
    exact = at_once(network, np.load(source)[None], "reflect")
    found = np.abs(stored(target) - exact).max()
    assert made.measured_error.lowered > 0
    assert 1e-4 * exact.std() < made.measured_error.largest <= 1.01 * found

    monkeypatch.setattr(recompute, "opened_here", opened_without_a_gpu)
    with simulated(), pytest.raises(OptionError, match=r"approximation.*this process"):
        znni_dask.run(network, source, target, overwrite=True, **how)


def opened_without_a_gpu(*how):
    """What a client is told that has no GPU where its workers have some."""
    with dask.config.set({"znni.simulated-gpu": None}):
        return opening.opened_here(*how)


def test_a_plan_that_does_not_fit_the_gpu_is_refused_with_the_layer(paths):
    with simulated(), pytest.raises(MemoryLimitError, match=r"2 MiB of the GPU's memory.*layer"):
        znni_dask.run(same_size(), *paths, device="gpu", device_memory="2MiB", chunks=16)


def test_without_a_gpu_who_asks_for_one_is_told_why(paths, monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"a GPU was asked for.*CuPy is not installed"):
        znni_dask.run(same_size(), *paths, device="gpu")
    assert not paths[1].exists()
    assert znni_dask.run(same_size(), *paths, chunks=32, patch=32).plan.device == "cpu"


def test_cupy_that_cannot_be_used_is_told(paths, monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    with pytest.raises(OptionError, match="CuPy cannot be imported"):
        znni_dask.run(same_size(), *paths, device="gpu")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": "tpu"}, "choose auto, cpu, gpu"),
        ({"device": "cpu", "device_memory": "1GiB"}, "uses none"),
        ({"device": "gpu", "device_memory": "much"}, "not a size"),
    ],
)
def test_devices_that_cannot_be_are_refused(paths, how, message):
    with pytest.raises(OptionError, match=message):
        znni_dask.run(same_size(), *paths, **how)


def test_a_device_that_is_lost_fails_its_blocks_and_the_same_command_goes_on(paths, monkeypatch):
    source, target = paths
    honest = DeviceExecutor.run
    left = [4]

    def run(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise DeviceError("the simulated device has gone")
        honest(self, *arguments)

    how = {"device": "gpu", "chunks": 16, "patch": 16, "threads": 2, "pyramid": False}
    with simulated():
        with monkeypatch.context() as patched:
            patched.setattr(DeviceExecutor, "run", run)
            with pytest.raises(RunError, match=r"the simulated device has gone[\s\S]*same command"):
                znni_dask.run(same_size(), source, target, **how)
        before = threading.active_count()
        made = znni_dask.run(same_size(), source, target, **how)
        assert threading.active_count() <= before
    assert made.blocks == 3 * 4 * 4 - 4
    assert np.isfinite(stored(target)).all()


def test_where_others_took_memory_a_smaller_plan_is_used(paths, tmp_path, monkeypatch):
    source, target = paths
    how = {"device": "gpu", "device_memory": "24MiB", "chunks": 16, "threads": 2}
    with simulated():
        want = znni_dask.run(same_size(), source, tmp_path / "want.zarr", **how)
        opened = []

        def crowded(allowed):
            opened.append(allowed)
            return SimulatedDevice(min(allowed, want.plan.device_bytes - 5 * MIB))

        monkeypatch.setattr(job, "opened", crowded)
        made = znni_dask.run(same_size(), source, target, **how)
        assert made.plan.device_bytes == want.plan.device_bytes
        assert opened == [24 * MIB, made.plan.device_bytes // 2]
        assert made.passes[0].shrunk == made.blocks == want.blocks
        assert "were made by a smaller plan" in "\n".join(report.run_lines(made))
        np.testing.assert_allclose(stored(target), stored(tmp_path / "want.zarr"), atol=1e-5)
        monkeypatch.setattr(job, "opened", lambda allowed: SimulatedDevice(1000))
        with pytest.raises(RunError, match="are wanted on the simulated device"):
            znni_dask.run(same_size(), source, tmp_path / "none.zarr", **how)


def test_the_timeline_tells_what_every_lane_did(paths, tmp_path):
    source, target = paths
    with simulated():
        made = znni_dask.run(
            *(same_size(), source, target),
            device="gpu",
            chunks=16,
            patch=16,
            threads=2,
            timeline=tmp_path / "line.json",
        )
    events = json.loads((tmp_path / "line.json").read_text())
    done = [event for event in events if event.get("ph") == "X"]
    count = Counter(event["name"] for event in done)
    assert count == dict.fromkeys(
        ("reading", "computing", "writing", "up", "compute", "down"), made.blocks
    )
    lanes = {e["tid"]: e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    assert {lanes[e["tid"]] for e in done if e["name"] == "up"} == {"device, up"}
    assert min(event["ts"] for event in done) >= 0


def test_a_page_of_a_run_shows_what_every_lane_did(files, tmp_path, capsys):
    (*paths, _), page = files[0], tmp_path / "run.html"
    target, options = str(tmp_path / "out.zarr"), ["--device", "gpu", "--chunks", "16,16,16"]
    with simulated():
        assert main(["infer", *paths, target, *options, "--html", str(page)]) == 0
        shown = page.read_text()
        assert shown.startswith("<!doctype html>")
        assert shown.count("<svg") == 2
        for word in ("device, up", "device, compute", "device, down", "writing", "predicted"):
            assert word in shown, word
        assert "voxels/s; memory: " in shown
        assert main(["infer", *paths, target, *options, "--html", str(page)]) == 0
        assert "is complete already" in page.read_text()
        none = str(tmp_path / "none" / "run.html")
        assert main(["infer", *paths, f"{target}.2", *options, "--html", none]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not Path(f"{target}.2").exists()


def test_a_timeline_that_cannot_be_written_is_told_before_anything_is(paths, tmp_path):
    with pytest.raises(OutputError, match="timeline"):
        znni_dask.run(same_size(), *paths, timeline=tmp_path / "none" / "line.json")
    assert not paths[1].exists()
