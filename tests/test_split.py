"""Networks that the host and a device compute together: what is split, what is cut into sub-layers,
and what is under way at once."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import dask
import numpy as np
import pytest
import zarr

import graphs
import oracle
import znni_dask
from held import Held
from test_identity import assert_same, at_once, extended, in_patches, volume_for
from znni_dask import Builder, costs, forecast, job, report, split_planner
from znni_dask.choices import choose_primitives
from znni_dask.devices import opening
from znni_dask.devices.ferry import Ferry
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.errors import DeviceError, MemoryLimitError, OptionError
from znni_dask.executors.split import SplitExecutor
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU
from znni_dask.network.layers import Conv
from znni_dask.patches import Layout
from znni_dask.plan import Plan
from znni_dask.primitives import offloaded
from znni_dask.primitives.base import Problem
from znni_dask.primitives.gpu.conv_direct import GpuConvDirect
from znni_dask.primitives.offloaded import Offloaded, SubLayer, offloading
from znni_dask.split import Split, splits

MIB = 1 << 20


@pytest.fixture
def device():
    with SimulatedDevice(256 * MIB) as found:
        yield found


def primitives_of(layout, first, sub=None):
    """Plain ones: of the device behind the layer ``first``, of the host before, where convolutions
    are cut into ``sub`` layers if that is given."""
    here, there = choose_primitives(layout), choose_primitives(layout, device=GPU)
    names = [node.name for node in layout.network if node.inputs]
    before = names[: names.index(first) + 1]
    found = there | {name: here[name] for name in before}
    for name in before if sub else ():
        if isinstance(layout.network[name].layer, Conv):
            cut = Offloaded(there[name], sub)
            if cut.refusal(layout.network[name].layer) is None:
                found[name] = cut
    return found


def groups(count):
    return [n for n in range(1, count + 1) if count % n == 0]


# ---- where a network can be split


def test_a_network_is_split_where_all_that_follows_reads_one_array():
    b = Builder(channels=2, seed=1)
    first = b.conv(b.input, 4, kernel=3, padding="same")
    down = b.conv(b.max_pool(first, 2), 4, kernel=3, padding="same")
    joined = b.concat(first, b.resize(down, 2))
    network = b.network(b.conv(joined, 3, kernel=1))
    names = [node.name for node in network]
    assert splits(network) == [first, joined]
    assert names[-1] not in splits(network)
    with pytest.raises(OptionError, match="cannot be split behind"):
        Split.at(Layout(network, (16, 16, 16), "reflect"), down, {})


@pytest.mark.parametrize(("family", "seed"), graphs.HALF)
@pytest.mark.every(5)
def test_every_split_of_every_graph_equals_the_oracle(family, seed):
    network = graphs.graph(family, seed)
    volume = volume_for(network, seed)
    want = at_once(network, volume, "reflect")
    layout = Layout(network, volume.shape[1:], "reflect")
    for layer in splits(network):
        chosen = primitives_of(layout, layer)
        fragments = Split.at(layout, layer, chosen).fragments
        for together in {1, fragments}:
            with SimulatedDevice(256 * MIB) as device:
                got = in_patches(
                    *(network, volume, "reflect", (12, 12, 16), chosen),
                    device=device,
                    arranged=lambda lay, p, at=layer, n=together: Split.at(lay, at, p, n),
                )
                assert_same(got, want)
                gc.collect()
                assert device.held_bytes < MIB


def pooled(seed=3):
    """Dense, of eight fragments behind its first three layers and as many more behind all."""
    b = Builder(channels=2, seed=seed)
    x = b.max_pool(b.relu(b.conv(b.input, 5, kernel=(3, 2, 3))), 2)
    x = b.relu(b.conv(x, 6, kernel=2))
    x = b.average_pool(b.relu(b.conv(x, 4, kernel=(2, 3, 2))), (1, 2, 2))
    return graphs.scaled(b.network(b.conv(x, 3, kernel=2)))


def small(size=(14, 15, 17)):
    return np.random.default_rng(1).standard_normal((2, *size)).astype(np.float32)


def test_any_number_of_fragments_goes_through_the_rest_together():
    network, volume = pooled(), small()
    want = at_once(network, volume, "reflect")
    layout = Layout(network, volume.shape[1:], "reflect")
    found = set()
    for layer in splits(network)[:4]:
        chosen = primitives_of(layout, layer)
        for together in groups(Split.at(layout, layer, chosen).fragments):
            found.add((layer, together))
            with SimulatedDevice(256 * MIB) as device:
                got = in_patches(
                    *(network, volume, "reflect", (8, 9, 17), chosen),
                    device=device,
                    arranged=lambda lay, p, at=layer, n=together: Split.at(lay, at, p, n),
                )
            assert_same(got, want)
    assert len(found) == 2 + 4 * 2
    with pytest.raises(OptionError, match="8 fragments do not fall into groups of 3"):
        Split.at(layout, splits(network)[2], primitives_of(layout, splits(network)[2]), 3)


# ---- sub-layers

CONVS = [
    (Conv(4, 6, (3, 2, 3), relu=True), (0, 0, 0)),
    (Conv(4, 6, (3, 3, 1), (2, 1, 2), (1, 2, 1), bias=False), (0, 0, 0)),
    (Conv(4, 6, (3, 3, 3), padding=((1, 1, 1), (1, 1, 1)), relu=True), (-1, -1, -1)),
    (Conv(4, 4, (2, 3, 3), groups=4, relu=True), (0, 0, 0)),
]


def problem_of(conv, offset, batch=3, size=(4, 5, 6)):
    """As many inputs as the outputs see, and no more."""
    seen = (
        o + (n - 1) * s + (k - 1) * d + 1 + o
        for n, o, s, k, d in zip(size, offset, conv.stride, conv.kernel, conv.dilation, strict=True)
    )
    given = (batch, conv.in_channels, *seen)
    whole = (batch, conv.out_channels, *size)
    return Problem(conv, (given,), whole, (offset,), (0, 0, 0), given[2:])


def values_of(problem, seed=0):
    random = np.random.default_rng(seed)
    shapes = problem.layer.weight_shapes()
    weights = {key: random.standard_normal(s, np.float32) for key, s in shapes.items()}
    return weights, random.standard_normal(problem.inputs[0], np.float32)


def wanted(problem, weights, given):
    """By the oracle, what pads put around."""
    (offset,), layer = problem.offsets, problem.layer
    around = [(0, 0), *((-o, -o) for o in offset)]
    plain = Conv(
        *(layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.dilation),
        groups=layer.groups,
        bias=layer.bias,
    )
    made = [oracle._apply(plain, [np.pad(x, around).astype(np.float64)], weights) for x in given]
    return np.maximum(made, 0) if layer.relu else np.array(made)


def by_sub_layers(problem, sub, weights, given, device, threads=1):
    primitive = Offloaded(GpuConvDirect(), sub)
    assert primitive.refusal(problem.layer) is None
    needs = offloading([(primitive, problem)])
    out = np.full(problem.output, np.nan, np.float32)
    with Team(threads) as team:
        device.scratch(needs.scratch)
        ferry = Ferry(device, team, needs.load)
        primitive.apply(weights, problem, [given], out, ferry)
    return out


def close_to(got, want):
    return np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize(("conv", "offset"), CONVS)
def test_every_shape_of_sub_layers_makes_the_layer(conv, offset, device):
    """All of a small one."""
    if conv.groups == 1:
        conv = replace(conv, in_channels=2, out_channels=3)
    problem = problem_of(conv, offset, batch=2, size=(2, 2, 3))
    weights, given = values_of(problem)
    want = wanted(problem, weights, given)
    for cuts in product(*(range(1, n + 1) for n in (2, *problem.output[1:], conv.in_channels))):
        batch, outputs, *size, inputs = cuts
        if conv.groups > 1 and (outputs, inputs) != (conv.out_channels, conv.in_channels):
            continue
        sub = SubLayer(batch, outputs, inputs, tuple(size))
        assert close_to(by_sub_layers(problem, sub, weights, given, device), want), sub


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.every(8)
def test_random_sub_layers_of_larger_layers(seed, device):
    random = np.random.default_rng(seed)
    for _ in range(5):
        conv, offset = CONVS[random.integers(len(CONVS))]
        batch, *size = (int(n) for n in random.integers(1, (6, 7, 7, 9)))
        problem = problem_of(conv, offset, batch, tuple(size))
        weights, given = values_of(problem, int(random.integers(1 << 30)))
        want = wanted(problem, weights, given)
        for _ in range(4):
            whole = SubLayer.whole(problem)
            cuts = (int(random.integers(1, n + 1)) for n in (*whole[:3], *whole.size))
            batch, outputs, inputs, *box = cuts
            if conv.groups > 1:
                outputs, inputs = whole.outputs, whole.inputs
            sub = SubLayer(batch, outputs, inputs, tuple(box))
            assert close_to(by_sub_layers(problem, sub, weights, given, device, 2), want), sub


def test_a_sub_layer_that_sees_one_voxel_less_is_found(device, monkeypatch):
    """The planted fault."""
    conv, offset = CONVS[0]
    problem = problem_of(conv, offset)
    weights, given = values_of(problem)
    want, sub = wanted(problem, weights, given), SubLayer(2, 3, 2, (2, 5, 6))
    assert close_to(by_sub_layers(problem, sub, weights, given, device), want)
    honest = offloaded._behind

    def short(problem, box):
        found = honest(problem, box)
        z, y, x = found.stop
        return Box(found.start, (z - 1, y, x))

    monkeypatch.setattr(offloaded, "_behind", short)
    assert not close_to(by_sub_layers(problem, sub, weights, given, device), want)


def test_sub_layers_become_smaller_until_one_voxel_is_left():
    problem = problem_of(*CONVS[0])
    sub, seen = SubLayer.whole(problem), []
    while smaller := next(sub.smaller, None):
        seen.append(smaller)
        sub = smaller
    assert sub == SubLayer(1, 1, 1, (1, 1, 1))
    batches = [one.batch for one in seen]
    assert batches == sorted(batches, reverse=True)
    assert batches[1] == 1  # it is cut first
    assert seen[1].size == problem.output[2:]


def test_pieces_are_on_their_way_there_while_others_come_back(monkeypatch):
    """Three at once: one there, one computed, one back."""
    problem = problem_of(*CONVS[0], batch=5)
    weights, given = values_of(problem)
    come, went = threading.Event(), []

    def copy(self, target, source):
        lane = threading.current_thread().name
        if lane == "znni-down":
            come.wait(10)
        target[...] = source
        went.append(lane)
        if went.count("znni-up") == 3:
            come.set()

    monkeypatch.setattr(SimulatedDevice, "copy", copy)
    sub = SubLayer(1, 6, 4, (4, 5, 6))
    with SimulatedDevice(64 * MIB) as device:
        assert close_to(
            by_sub_layers(problem, sub, weights, given, device), wanted(problem, weights, given)
        )
    assert went.index("znni-down") >= went.index("znni-up") + 2
    assert went[: went.index("znni-down")].count("znni-up") == 3


def test_names_tell_all_of_it():
    one = Offloaded(GpuConvDirect(), SubLayer(2, 3, 4, (5, 6, 7)))
    assert Offloaded.inner_name(one.name) == GpuConvDirect().name
    assert Offloaded.of(one.name, one.inner) == one
    assert Offloaded.inner_name("direct") is None
    for odd in ("direct in sub-layers of 1·2·3", "direct in sub-layers of 0·1·1·1·1·1"):
        with pytest.raises(ValueError, match="sub-layers"):
            Offloaded.of(odd, GpuConvDirect())


@pytest.mark.parametrize("sub", [SubLayer(1, 6, 4, (9, 9, 9)), SubLayer(2, 3, 2, (3, 4, 5))])
def test_the_device_holds_no_more_than_was_told(sub):
    problem = problem_of(*CONVS[2], size=(8, 9, 10))
    weights, given = values_of(problem)
    primitive = Offloaded(GpuConvDirect(), sub)
    told = primitive.needs(problem).device_bytes
    with SimulatedDevice(MIB * 64) as device:
        by_sub_layers(problem, sub, weights, given, device)
        assert 0.9 * told <= device.peak_bytes <= told


def test_a_network_whose_convolutions_are_all_cut_equals_the_oracle():
    """Without anything that stays on the device."""
    network = graphs.graph("unet", 0)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    last = network.nodes[-1].name
    chosen = primitives_of(layout, last, SubLayer(1, 3, 2, (9, 9, 12)))
    assert sum(isinstance(p, Offloaded) for p in chosen.values()) > 3
    with SimulatedDevice(64 * MIB) as device:
        got = in_patches(network, volume, "reflect", (12, 12, 16), chosen, device=device)
    assert_same(got, at_once(network, volume, "reflect"))


@pytest.mark.parametrize("sub", [SubLayer(2, 4, 3, (4, 9, 9)), SubLayer(1, 99, 99, (99, 99, 99))])
def test_sub_layers_before_the_split_and_fragments_behind_it(sub):
    network, volume = pooled(), small()
    want = at_once(network, volume, "reflect")
    layout = Layout(network, volume.shape[1:], "reflect")
    for layer in splits(network)[2:4]:
        chosen = primitives_of(layout, layer, sub)
        with SimulatedDevice(256 * MIB) as device:
            got = in_patches(
                *(network, volume, "reflect", (8, 9, 17), chosen),
                device=device,
                arranged=lambda lay, p, at=layer: Split.at(lay, at, p, 2),
            )
        assert_same(got, want)


# ---- at the same time


def executor_of(network, device, waiting=1, together=4, sub=None):
    """Of patches of (8, 8, 8)."""
    layout = Layout(network, (40, 24, 24), "reflect")
    layer = splits(network)[3]
    split = Split.at(layout, layer, primitives_of(layout, layer, sub), together)
    boxes = [Box((8 * i, 8, 8), (8 * i + 8, 16, 16)) for i in range(5)]
    sizes = split.envelope([{(b.start[a], b.stop[a]) for b in boxes} for a in range(3)])
    return split, boxes, SplitExecutor(split, sizes, (8, 8, 8), 1, device, waiting)


def made(split, executor, volume, box):
    todo = split.schedule(box)
    answer = np.empty((3, *box.size), np.float32)
    executor.run(todo, [extended(volume, todo.input, "reflect")], [answer])
    return answer


@pytest.mark.parametrize("waiting", [0, 1, 2, 3])
def test_the_host_goes_ahead_of_the_device_by_so_many_patches(waiting, monkeypatch):
    network = pooled()
    volume = small((40, 24, 24))
    with Held(256 * MIB) as device:
        split, boxes, executor = executor_of(network, device, waiting)
        begun, honest = [], executor._head.fragments

        def fragments(todo, volumes):
            begun.append(todo.output)
            return honest(todo, volumes)

        monkeypatch.setattr(executor._head, "fragments", fragments)
        with executor, ThreadPoolExecutor(5) as pool:
            device.free.clear()
            asked = [pool.submit(made, split, executor, volume, box) for box in boxes]
            while len(begun) < 1 + waiting:
                threading.Event().wait(0.001)
            threading.Event().wait(0.05)
            assert len(begun) == 1 + waiting  # the device has one, so many wait
            device.free.set()
            got = [one.result() for one in asked]
    want = at_once(network, volume, "reflect")
    for box, answer in zip(boxes, got, strict=True):
        assert_same(answer, want[(slice(None), *box.slices)])


@pytest.mark.parametrize("sub", [None, SubLayer(2, 3, 2, (4, 4, 4))])
def test_a_device_that_is_lost_fails_what_it_had_and_nothing_else(sub):
    network = pooled()
    volume = small((40, 24, 24))
    threads = threading.active_count()
    with Held(256 * MIB) as device:
        split, boxes, executor = executor_of(network, device, sub=sub)
        with executor:
            first = made(split, executor, volume, boxes[0])
            device.lost = True
            with pytest.raises(DeviceError, match="was lost"):
                made(split, executor, volume, boxes[1])
            device.lost = False
            again = made(split, executor, volume, boxes[0])
    np.testing.assert_array_equal(first, again)
    assert threading.active_count() == threads


# ---- runs


def simulated(memory="64MiB"):
    return dask.config.set({"znni.simulated-gpu": memory})


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "in.npy", small((40, 44, 48)))
    return tmp_path / "in.npy"


def stored(path):
    return zarr.open_array(path / "0", mode="r")[:]


def wide():
    """Keeps the volume's size; its convolutions are worth the way to a device."""
    b = Builder(channels=2, seed=2)
    x = first = b.relu(b.conv(b.input, 12, 3, padding="same"))
    x = b.relu(b.conv(b.max_pool(x, 2), 16, 3, padding="same"))
    x = b.concat(first, b.resize(x, 2))
    return graphs.scaled(b.network(b.conv(b.relu(b.conv(x, 8, 3, padding="same")), 2, 1)))


@pytest.fixture
def never_apart(monkeypatch):
    """What both share is split."""
    monkeypatch.setattr(split_planner._Ways, "apart", ())


PLAIN = {"chunks": 16, "memory": "3GiB", "pyramid": False}
HOW = PLAIN | {"patch": (32, 32, 48), "threads": 2}


@pytest.mark.parametrize("network", [pooled, wide])
@pytest.mark.parametrize("device", ["cpu+gpu", "gpu+ram"])
def test_a_run_by_both_makes_what_the_cpu_makes(
    network, device, source, tmp_path, monkeypatch, never_apart
):
    opened = []

    def keep(allowed):
        opened.append(SimulatedDevice(allowed))
        return opened[-1]

    monkeypatch.setattr(job, "opened", keep)
    monkeypatch.setattr(costs, "STEP_SECONDS", 0.0)
    on_cpu = znni_dask.run(network(), source, tmp_path / "cpu.zarr", device="cpu", **HOW)
    with simulated("24MiB"):
        made = znni_dask.run(network(), source, tmp_path / "both.zarr", device=device, **HOW)
    plan = made.plan
    assert (on_cpu.plan.device, plan.device) == ("cpu", device)
    first = "cpu" if device == "cpu+gpu" else device
    assert [s.device for s in plan.stages] == [first, "gpu"][: len(plan.stages)]
    want, got = stored(tmp_path / "cpu.zarr"), stored(tmp_path / "both.zarr")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * want.std())
    (found,) = opened
    assert found.peak_bytes <= plan.device_bytes <= plan.allowed_device_bytes < 24 * MIB
    assert made.peak_bytes <= plan.predicted_bytes
    assert made.passes[0].layer_seconds.keys() == on_cpu.passes[0].layer_seconds.keys()
    told = "\n".join(report.run_lines(made))
    assert f"2 threads and the GPU ({device})" in told
    with simulated("24MiB"):
        again = znni_dask.run(
            network(), source, tmp_path / "again.zarr", plan=Plan.from_json(plan.to_json()), **PLAIN
        )
    assert again.plan.stages == plan.stages
    np.testing.assert_array_equal(stored(tmp_path / "again.zarr"), got)


def test_a_plan_by_both_is_told_layer_by_layer(source, never_apart):
    with simulated():
        (told,) = forecast.forecasts(pooled(), source, device="cpu+gpu", **HOW)
    assert told.plan.device == "cpu+gpu"
    layers = [choice.layer for stage in told.plan.stages for choice in stage.choices]
    assert list(dict.fromkeys(step.layer for step in told.steps)) == layers
    assert sum(step.seconds for step in told.steps) > 0
    head, tail = (len(stage.choices) for stage in told.plan.stages)
    peaks = [step.peak_bytes for step in told.steps]
    assert max(peaks[-tail:]) <= told.plan.device_bytes
    assert max(peaks[:head]) <= told.plan.predicted_bytes


@pytest.mark.parametrize("device", ["cpu+gpu", "gpu+ram"])
def test_who_asks_for_both_and_has_no_gpu_is_told_why(device, source, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="a GPU was asked for, and there is none: CuPy is not"):
        znni_dask.run(pooled(), source, tmp_path / "out.zarr", device=device, **HOW)


def test_what_both_cannot_do_is_refused(source, tmp_path):
    out = tmp_path / "out.zarr"
    with (
        simulated("4MiB"),
        pytest.raises(MemoryLimitError, match=r"no plan by cpu\+gpu fits .*GPU"),
    ):
        znni_dask.run(pooled(), source, out, device="cpu+gpu", **HOW)
    windows = HOW | {"patch": None, "patchwise": (16, 16, 16)}
    with simulated(), pytest.raises(OptionError, match=r"by the CPU or by a GPU alone"):
        znni_dask.run(wide(), source, out, device="cpu+gpu", **windows)
    with simulated(), pytest.raises(OptionError, match=r"bfloat16 is computed by .* alone"):
        znni_dask.run(wide(), source, out, device="gpu+ram", precision="bfloat16", **HOW)


@pytest.mark.parametrize("damage", ["order", "three", "device", "groups", "slabs", "sub-layers"])
def test_a_plan_whose_stages_cannot_be_is_refused(damage, source, tmp_path, never_apart):
    with simulated():
        (told,) = forecast.forecasts(pooled(), source, device="cpu+gpu", **HOW)
        head, tail = told.plan.stages
        stages = {
            "order": (replace(head, choices=head.choices + tail.choices[::-1][:1]), tail),
            "three": (head, tail, replace(tail, choices=())),
            "device": (head, replace(tail, device="cpu")),
            "groups": (head, replace(tail, samples=3)),
            "slabs": (replace(head, choices=(replace(head.choices[0], planes=2),)), tail),
            "sub-layers": (
                replace(
                    head,
                    device="gpu+ram",
                    choices=(
                        replace(head.choices[0], primitive="direct in sub-layers of 1·0"),
                        *head.choices[1:],
                    ),
                ),
                tail,
            ),
        }[damage]
        with pytest.raises(OptionError, match=r"plan|fragments|slabs|cannot be split"):
            znni_dask.run(
                pooled(),
                source,
                tmp_path / "out.zarr",
                plan=replace(told.plan, stages=stages),
                **PLAIN,
            )
    assert not (tmp_path / "out.zarr").exists()
