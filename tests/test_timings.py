"""What was measured on a machine: it scales estimates, is kept on disk, and decides plans."""

from __future__ import annotations

import dask
import numpy as np
import pytest

from znni_dask import calibration, cli, planner, refining, run, timings
from znni_dask.calibration import Study, measured
from znni_dask.choices import Menu, choose_primitives
from znni_dask.costs import Costs, model_seconds
from znni_dask.errors import MemoryLimitError
from znni_dask.forecast import forecasts
from znni_dask.geometry import Box
from znni_dask.kernels import compiled
from znni_dask.network.build import Builder
from znni_dask.network.layers import Conv
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_direct_blocked import ConvDirectBlocked
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.conv_winograd import ConvWinograd
from znni_dask.primitives.gpu.conv_direct import GpuConvDirect
from znni_dask.primitives.gpu.joining import GpuConcatenation
from znni_dask.primitives.gpu.rates import MEMORY
from znni_dask.primitives.work import COMPILE_SECONDS
from znni_dask.schedule import Schedules
from znni_dask.timings import Timing, Timings


def conv_problem(channels, n=24, kernel=3):
    conv, made = Conv(channels, channels, (kernel,) * 3), n + 1 - kernel
    shape, out = (1, channels, *(n,) * 3), (1, channels, *(made,) * 3)
    return Problem(conv, (shape,), out, ((0, 0, 0),), (0, 0, 0), (n,) * 3)


def network():
    b = Builder(1)
    x = b.max_pool(b.relu(b.conv(b.input, 20, 3)), 2)
    return b.network(b.conv(x, 20, 5))


def test_estimates_are_scaled_by_what_was_measured_of_problems_alike():
    primitive, small, large = ConvDirectBlocked(), conv_problem(16), conv_problem(512)
    few, many = (primitive.features(problem) for problem in (small, large))
    found = Timings(
        (
            Timing("direct blocked", 2, few, 3.0),
            Timing("direct blocked", 2, many, 0.5),
            Timing("direct blocked", 8, few, 7.0),
        )
    )
    costs = Costs(found)
    for problem, ratio, threads in ((small, 3, 2), (large, 0.5, 2), (small, 7, 16), (small, 3, 1)):
        model = model_seconds(primitive, problem, threads)
        seconds = costs.step_seconds(primitive, problem, threads)
        assert seconds == pytest.approx(ratio * model, rel=0.05)  # as what is measured is noisy
    near = primitive.features(conv_problem(20))
    assert 2 < found.ratio("direct blocked", 2, near) <= 3
    between = primitive.features(conv_problem(90))
    assert 0.5 < found.ratio("direct blocked", 2, between) < 3
    assert found.ratio("winograd", 2, few) == 1
    replaced = found.joined([Timing("direct blocked", 2, few, 4.0)])
    assert len(replaced.found) == 3
    assert replaced.ratio("direct blocked", 2, few) == pytest.approx(4, rel=0.05)


def test_problems_like_none_are_off_as_most_of_their_family():
    primitive = ConvTiledFFT((16, 16, 16))
    some = [primitive.features(conv_problem(n)) for n in (16, 32, 64)]
    found = Timings(
        tuple(Timing("tiled fft", 1, f, r) for f, r in zip(some, (2.0, 2.5, 9.0), strict=True))
    )
    unlike = tuple(100 + value for value in some[0])
    assert found.ratio("tiled fft", 1, unlike) == pytest.approx(2.5)
    remade = ConvTiledFFT((16, 16, 16), remade=True)
    assert found.ratio(remade.family, 1, remade.features(conv_problem(16))) == pytest.approx(2, 0.1)


def test_what_was_measured_slow_is_not_chosen():
    layout = Layout(network(), (100, 100, 100), "reflect")
    plain = Schedules(layout, choose_primitives(layout))
    box = Box((0, 0, 0), (48, 48, 48))
    fastest = Menu.of_patches(plain, box, 1e9, 2).fastest()
    families = {primitive.family for primitive in fastest.values()}
    assert "tiled fft" in families
    slow = Timings(tuple(Timing("tiled fft", 2, (4, 4, 9, 8, 1, 13), r) for r in (50.0, 60.0)))
    others = Menu.of_patches(plain, box, 1e9, 2, Costs(slow)).fastest()
    assert "tiled fft" not in {primitive.family for primitive in others.values()}


@pytest.mark.parametrize("primitive", [ConvTiledFFT((8, 8, 8)), ConvWinograd()])
def test_compiling_counts_where_it_was_not_done_yet(primitive, tmp_path, monkeypatch):
    monkeypatch.setenv("ZNNI_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_LIBRARIES", {})
    layer = Conv(20, 20, (3, 3, 3))
    before = Costs().setup_seconds(primitive, layer)
    monkeypatch.setattr(type(primitive), "is_compiled", lambda *_: True)
    assert before - Costs().setup_seconds(primitive, layer) == pytest.approx(COMPILE_SECONDS)


def test_memory_is_touched_as_fast_as_was_measured(monkeypatch):
    monkeypatch.setattr(calibration, "studies", lambda: iter(()))
    monkeypatch.setattr(calibration, "_TOUCHED_BYTES", 1 << 24)
    found = calibration.calibrate(2)
    (one,) = found.found
    assert (one.family, one.threads) == ("touching", 2)
    seconds = Costs(found).touching_seconds(1 << 30, 2)
    assert seconds == pytest.approx(one.ratio * Costs().touching_seconds(1 << 30, 2))
    assert Costs().touching_seconds(1 << 30, 1) == 2 * Costs().touching_seconds(1 << 30, 2)


def test_a_study_times_every_family_that_takes_a_layer():
    found = list(measured(Study(network(), 12), threads=1))
    families = {one.family for one in found}
    assert {"tiled fft", "direct blocked", "change of form"} <= families
    assert all(one.threads == 1 and 0 < one.ratio < 1e4 for one in found)
    known = Timings().joined(found)
    layout = Layout(simplify(network()), (48, 48, 48), "reflect")
    plain, box = Schedules(layout, choose_primitives(layout)), Box((12,) * 3, (24,) * 3)
    menu = Menu.of_patches(plain, box, 1000.0, 1)
    for family in ("tiled fft", "direct blocked"):
        primitives = menu.of_family(family)
        assert primitives["conv_4"].family == family
        schedules = Schedules(layout, primitives)
        for step in schedules.steps(schedules.sizes(box)):
            own = [
                one.ratio
                for one in found
                if one.family == step.primitive.family
                and one.features == step.primitive.features(step.problem)
            ]
            seconds = Costs(known).step_seconds(step.primitive, step.problem, 1)
            ratio = seconds / model_seconds(step.primitive, step.problem, 1)
            assert 0.2 * min(own) <= ratio <= 5 * max(own)


@pytest.mark.parametrize("mib", [1, 64])
def test_of_a_device_what_fits_is_measured(mib):
    with dask.config.set({"znni.simulated-gpu": "64MiB"}):
        found = list(measured(Study(network(), 12), 1, mib << 20))
    assert all(one.family.startswith("gpu ") for one in found)
    assert bool(found) == (mib == 64)


def test_the_way_to_a_device_is_measured(monkeypatch):
    monkeypatch.setattr(calibration, "studies", lambda: iter(()))
    with dask.config.set(
        {"znni.simulated-gpu": {"memory": "64MiB", "copied_bytes_per_second": 1e9}}
    ):
        costs = Costs(calibration.calibrate(1, device_bytes=64 << 20))
    assert costs.timings.tell_of("gpu")
    for nbytes in (1 << 20, 1 << 24):
        assert costs.bus_seconds(nbytes) >= 0.9 * nbytes / 1e9 > Costs().bus_seconds(nbytes)


def test_copies_in_one_piece_are_as_slow_as_those_that_were_measured():
    """Whatever they are for: of convolutions more is told than of what copies."""
    primitive, problem = GpuConvDirect(), conv_problem(16)
    features = GpuConcatenation().features(problem)
    slow = Timings(tuple(Timing(GpuConcatenation().family, 1, features, r) for r in (9.0, 11.0)))
    plain, nbytes = Costs().handing_seconds(primitive, problem, 1 << 24, 1), 1 << 24
    assert plain >= 2 * nbytes / MEMORY.per_second
    found = Costs(slow).handing_seconds(primitive, problem, nbytes, 1)
    assert 9 * plain < found < 11.01 * plain
    on_cpu = Costs(slow).handing_seconds(ConvDirectBlocked(), problem, nbytes, 2)
    assert on_cpu == Costs().copying_seconds(nbytes, 2)


def test_timings_are_kept_for_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("ZNNI_TIMINGS")
    monkeypatch.setenv("ZNNI_CACHE", str(tmp_path))
    assert timings.kept() == Timings()
    found = Timings((Timing("direct", 2, (1.0, 2.5), 0.75), Timing("direct", 1, (0.1, 0.2), 3.0)))
    place = timings.keep_timings(found)
    assert timings.kept() == found
    monkeypatch.setattr(timings, "cores", lambda: 77)
    assert timings.kept() == Timings()
    monkeypatch.setenv("ZNNI_TIMINGS", str(place))
    assert timings.kept() == found
    for damaged in ("", "{}", '{"timings": [{"family": "x"}]}', "[1"):
        place.write_text(damaged)
        assert timings.kept() == Timings()


def test_the_command_measures_and_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZNNI_TIMINGS", str(tmp_path / "timings.json"))
    monkeypatch.setattr(calibration, "studies", lambda: iter([Study(network(), 8)]))
    assert cli.main(["measure", "--threads", "2"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 networks" in shown
    assert "tiled fft" in shown
    assert "kept in" in shown
    found = timings.kept().found
    assert {one.threads for one in found} == {2}
    assert all(np.isfinite(one.ratio) and one.ratio > 0 for one in found)
    assert cli.main(["measure", "--threads", "0"]) == 2


def test_what_runs_tell_replaces_what_is_nearly_the_same():
    near, far = (4.0, 4.0, 9.0), (4.0, 7.0, 9.0)
    before = Timings(
        (
            Timing("direct", 2, near, 1.0),
            Timing("direct", 2, far, 2.0),
            Timing("direct", 1, near, 3.0),
            Timing("winograd", 2, near, 4.0),
        )
    )
    told = Timing("direct", 2, (4.1, 4.0, 9.1), 5.0)
    found = before.refined([told])
    assert found.found == (*before.found[1:], told)
    assert found.ratio("direct", 2, near) == pytest.approx(5, rel=0.1)
    assert found.ratio("direct", 2, far) == pytest.approx(2, rel=0.1)
    assert found.ratio("winograd", 2, near) == 4


def no_patches(*_):
    raise MemoryLimitError("no patches here")


@pytest.fixture
def refined_by_all(tmp_path, monkeypatch):
    """A machine of which something is known, whose shortest runs tell more."""
    monkeypatch.setenv("ZNNI_TIMINGS", str(tmp_path / "timings.json"))
    monkeypatch.setattr(refining, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(refining, "_LEAST_OF_LAYER", 0.0)
    monkeypatch.setattr(Costs, "touching_seconds", lambda *_: 0.0)
    known = Timings((Timing("linear", 2, (9.0,) * 5, 1.0),))
    timings.keep_timings(known)
    return known


@pytest.mark.parametrize("how", ["patches", "slabs", "windows"])
def test_a_run_tells_the_next_plan_what_layers_took(how, tmp_path, monkeypatch, refined_by_all):
    b = Builder(1)
    x = b.relu(b.conv(b.input, 20, 3, padding="same"))
    x = b.max_pool(b.relu(b.conv(x, 20, 3, padding="same")), 2)
    x = b.conv_transpose(b.relu(b.conv(x, 40, 3, padding="same")), 16, 2, stride=2)
    x = b.normalize(x, groups=4) if how == "windows" else x
    made, place = b.network(b.conv(x, 2, 3, padding="same")), tmp_path / "in.npy"
    np.save(place, np.random.default_rng(0).standard_normal((64, 64, 64)).astype(np.float32))
    options = {"memory": "4GiB", "chunks": 32, "pyramid": False}
    options |= {"patchwise": (32, 32, 32)} if how == "windows" else {}
    if how == "slabs":
        monkeypatch.setattr(planner, "search", no_patches)
    (done,) = run(made, place, tmp_path / "out.zarr", threads=2, **options).passes
    assert bool(done.plan.granules) == (how == "slabs")
    options |= {"plan": done.plan}
    (done,) = run(made, place, tmp_path / "out.zarr", overwrite=True, **options).passes
    (told,) = forecasts(made, place, **options)
    predicted = {c.layer: c.voxel_seconds * told.voxels for c in told.plan.stages[0].choices}
    for layer, seconds in done.layer_seconds.items():
        assert predicted[layer] == pytest.approx(seconds, rel=0.4)
    assert set(timings.kept().found) > set(refined_by_all.found)


@pytest.mark.parametrize("why", ["short", "not measured", "touching", "cannot be kept"])
def test_what_tells_little_is_not_kept(why, tmp_path, monkeypatch, refined_by_all):
    said = []
    monkeypatch.setattr(refining.LOG, "info", lambda *told: said.append(told))
    if why == "short":
        monkeypatch.setattr(refining, "LEAST_SECONDS", 60.0)
    if why == "touching":
        monkeypatch.setattr(Costs, "touching_seconds", lambda *_: 10.0)
    if why == "not measured":
        timings.place().unlink()
    if why == "cannot be kept":
        monkeypatch.setattr(timings, "keep", lambda *_: (_ for _ in ()).throw(OSError("full")))
    np.save(tmp_path / "in.npy", np.zeros((40, 40, 40), np.float32))
    files = network(), tmp_path / "in.npy", tmp_path / "out.zarr"
    assert run(*files, memory="4GiB", threads=2).passes
    assert timings.kept() == (Timings() if why == "not measured" else refined_by_all)
    assert bool(said) == (why == "cannot be kept")
