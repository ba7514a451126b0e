"""Patchwise inference: the windows of a grid, blended; the same whatever the blocks."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import zarr

import oracle
import znni_dask
from znni_dask import window_planner
from znni_dask.behind import Behind
from znni_dask.choices import Menu, choose_primitives, chosen_primitives
from znni_dask.cli import main
from znni_dask.costs import Costs
from znni_dask.errors import MemoryLimitError, NetworkError, OptionError, VolumeError
from znni_dask.geometry import Box, tiles, volume
from znni_dask.importers.to_onnx import save
from znni_dask.machine import parse_bytes
from znni_dask.network.build import Builder
from znni_dask.network.field_of_view import geometry
from znni_dask.network.layers import Arithmetic
from znni_dask.patchwise import WindowBlocks, WindowExecutor, apply
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.resources import Resources, computing_bytes
from znni_dask.schedule import Schedules
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify
from znni_dask.windows import Patchwise, WholeWindow, WindowGrid

WINDOW = (8, 12, 16)


def normalised(seed=0, space="zyx"):
    """A small U-Net with instance and group normalisation, and squeeze and excitation."""
    flat = space == "yx"
    kernel, factor = ((1, 3, 3), (1, 2, 2)) if flat else (3, 2)
    b = Builder(1, seed)
    x = b.relu(b.normalize(b.conv(b.input, 4, kernel, padding="same"), 4, space))
    skip = x
    x = b.relu(b.normalize(b.conv(b.max_pool(x, factor), 6, kernel, padding="same"), 3, space))
    gate = b.activation(b.conv(b.reduce(x, "mean", space), 6, 1), "sigmoid")
    x = b.add(Arithmetic("mul"), x, gate)
    x = b.concat(b.resize(x, factor), skip)
    return b.network(b.conv(x, 2, kernel, padding="same"))


def classifier(seed=0):
    """A padded classifier of windows: global pool, then a matrix."""
    b = Builder(1, seed)
    x = b.relu(b.conv(b.input, 4, 3, stride=2, padding=1))
    x = b.relu(b.conv(x, 6, 3, padding="same"))
    return b.network(b.conv(b.reduce(x, "mean"), 3, 1))


def starts(n, window, interval):
    """Every interval until a window reaches the end, where it is moved back to end there."""
    found = [0]
    while found[-1] + window < n:
        found.append(min(found[-1] + interval, n - window))
    return found


def blended(network, volume, window, overlap, weights):
    """Patchwise inference by definition: every window by the oracle, a weighted mean."""
    low = [max(w - n, 0) // 2 for w, n in zip(window, volume.shape[1:], strict=True)]
    high = [max(w - n, 0) - a for w, n, a in zip(window, volume.shape[1:], low, strict=True)]
    x = oracle.extend(volume, low, high, "constant")
    total = np.zeros((network.out_channels, *x.shape[1:]))
    weight = np.zeros(x.shape[1:])
    importance = np.ones(window)
    if weights == "gaussian":
        for axis, n in enumerate(window):
            bell = np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2))
            importance = importance * np.moveaxis(bell[:, None, None], 0, axis)
        importance = np.maximum(importance, max(importance.min(), 1e-3))
    axes = [
        starts(n, w, w if w == n else max(1, int(w * (1 - overlap))))
        for n, w in zip(x.shape[1:], window, strict=True)
    ]
    for corner in product(*axes):
        here = tuple(slice(a, a + w) for a, w in zip(corner, window, strict=True))
        total[(slice(None), *here)] += oracle.whole(network, x[(slice(None), *here)]) * importance
        weight[here] += importance
    kept = tuple(slice(a, a + n) for a, n in zip(low, volume.shape[1:], strict=True))
    return (total / weight)[(slice(None), *kept)]


def stored(path):
    volume = open_volume(path)
    return volume.read(Box((0, 0, 0), volume.size))


def predicted(network, values, tmp_path, client, name="out", **options):
    source = tmp_path / f"{name}.npy"
    np.save(source, values)
    target = tmp_path / f"{name}.zarr"
    options = {"boundary": "constant", "client": client, "memory": "4GiB", **options}
    return target, znni_dask.run(network, source, target, **options)


def with_resources(grid, allowed_bytes, **options):
    options = {"unit": (32, 32, 32), **options}
    return Resources(
        voxel_bytes=4,
        encoding_bytes=4,
        read_bytes=lambda region, by_cells=False: 4 * volume(region),
        write_bytes=1 << 20,
        baseline_bytes=0,
        allowed_bytes=allowed_bytes,
        threads=2,
        hull=Box((0, 0, 0), grid.output_size),
        **options,
    )


@pytest.mark.parametrize("weights", ["constant", "gaussian"])
@pytest.mark.parametrize(
    ("size", "overlap"),
    [
        ((19, 26, 31), 0.5),
        ((8, 12, 16), 0.5),
        ((9, 40, 20), 0.25),
        ((5, 12, 50), 0.6),
        ((3, 4, 5), 0),
    ],
)
def test_windows_are_blended_as_defined(size, overlap, weights, tmp_path, client):
    network = normalised()
    values = np.random.default_rng(1).standard_normal((1, *size)).astype(np.float32)
    target, _ = predicted(
        network, values, tmp_path, client, patchwise=WINDOW, overlap=overlap, weights=weights
    )
    want = blended(network, values.astype(np.float64), WINDOW, overlap, weights)
    got = stored(target)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_the_answer_does_not_depend_on_blocks_memory_or_threads(tmp_path, client):
    network = normalised()
    values = np.random.default_rng(2).standard_normal((1, 30, 41, 37)).astype(np.float32)
    how = {"patchwise": WINDOW, "weights": "gaussian"}
    answers, blocks = [], []
    for index, options in enumerate(
        (
            {"chunks": (8, 8, 8)},
            {"chunks": (16, 16, 16), "shards": (32, 16, 48), "threads": 1},
            {"chunks": (64, 64, 64), "threads": 2},
        )
    ):
        target, summary = predicted(
            network, values, tmp_path, client, f"out{index}", **how, **options
        )
        answers.append(stored(target))
        blocks.append(summary.plan.block)
    assert len(set(blocks)) > 1
    grid = WindowGrid(network, values.shape[1:], "constant", Patchwise(WINDOW, 0.5, "gaussian"))
    maker = WindowBlocks(grid, chosen_primitives(grid.layout, summary.plan), 2)
    pieces = np.full(answers[0].shape, np.nan, np.float32)
    source = open_volume(tmp_path / "out0.npy")

    def read(there):
        return source.read_extended(there, "constant")

    for box in tiles(grid.output_size, (7, 11, 13)):
        behind = Behind.of(0, grid.region(box), read)
        pieces[(slice(None), *box.slices)] = maker.blended(box, behind)
    maker.close()
    for other in (*answers[1:], pieces):
        assert np.array_equal(other, answers[0])


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("make", [normalised, classifier])
def test_the_answer_does_not_depend_on_how_many_windows_are_computed_at_once(make, fastest):
    """Also where the last are fewer; and where some are left out, as nothing there is wanted."""
    network, values = make(), np.random.default_rng(8).standard_normal((1, 19, 26, 31))
    grid = WindowGrid(network, (12, 20, 24), "valid", Patchwise(WINDOW, 0.5, step=step(make)))
    box = Box((0, 0, 0), grid.output_size)
    wanted = np.ones(box.size, bool)
    wanted[-1:] = False
    count = sum(wanted[here.slices].any() for _, here in grid.windows_of(box))
    assert count > 8
    assert count % 8
    given = values[:, :12, :20, :24].astype(np.float32)
    behind = Behind.of(0, Box((0, 0, 0), (12, 20, 24)), lambda there: given)
    made = []
    for samples in (1, 3, 8):
        plain = Schedules(grid.layout, choose_primitives(grid.layout), samples)
        window = Box((0, 0, 0), grid.layout.output_size)
        primitives = (
            Menu.of_patches(plain, window, 1e9, 1).fastest() if fastest else plain.primitives
        )
        assert fastest == (primitives != plain.primitives)
        with WindowBlocks(grid, primitives, 2, samples) as blocks:
            made.append(blocks.blended(box, behind, wanted)[:, wanted])
    if make is normalised:
        want = blended(network, given.astype(np.float64), WINDOW, 0.5, "constant")
    else:
        want = np.zeros((3, *box.size))
        for window, here in grid.windows_of(box):
            part = given[(slice(None), *window.slices)].astype(np.float64)
            want[(slice(None), *here.slices)] = oracle.whole(network, part)
    want = want[:, wanted]
    for one in made:
        assert np.linalg.norm(one - made[0]) < 1e-6 * np.linalg.norm(want)
        assert np.linalg.norm(one - want) < 1e-5 * np.linalg.norm(want)


def step(make):
    return (2, 4, 4) if make is classifier else None


def test_a_flat_network_is_applied_to_windows_of_single_sections(tmp_path, client):
    network = normalised(space="yx")
    values = np.random.default_rng(3).standard_normal((1, 3, 30, 26)).astype(np.float32)
    target, _ = predicted(network, values, tmp_path, client, patchwise=(1, 12, 16))
    want = blended(network, values.astype(np.float64), (1, 12, 16), 0.5, "constant")
    got = stored(target)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("boundary", ["constant", "reflect", "valid"])
def test_a_classifier_makes_one_vector_of_each_window(boundary, tmp_path, client):
    network = classifier()
    values = np.random.default_rng(4).standard_normal((1, 21, 26, 31)).astype(np.float32)
    step = (4, 5, 8)
    target, summary = predicted(
        network, values, tmp_path, client, patchwise=WINDOW, step=step, boundary=boundary
    )
    low = [(w - 1) // 2 for w in WINDOW]
    count = [-(-n // s) for n, s in zip(values.shape[1:], step, strict=True)]
    if boundary == "valid":
        x, count = (
            values,
            [(n - w) // s + 1 for n, w, s in zip(values.shape[1:], WINDOW, step, strict=True)],
        )
    else:
        x = oracle.extend(values, low, [2 * w for w in WINDOW], boundary)
    want = np.zeros((3, *count))
    for place in np.ndindex(*count):
        here = tuple(slice(q * s, q * s + w) for q, s, w in zip(place, step, WINDOW, strict=True))
        want[(slice(None), *place)] = oracle.whole(network, x[(slice(None), *here)])[:, 0, 0, 0]
    got = stored(target)
    assert got.shape == want.shape == (3, *summary.size)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    dataset = zarr.open(str(target), mode="r").attrs["ome"]["multiscales"][0]["datasets"][0]
    scale, translation = dataset["coordinateTransformations"]
    assert scale["scale"] == [1, *step]
    assert translation["translation"] == [0, *(low if boundary == "valid" else (0, 0, 0))]


@pytest.mark.parametrize("boundary", ["constant", "reflect"])
def test_a_patchwise_output_is_verified_and_a_changed_voxel_found(boundary, tmp_path, client):
    network = normalised()
    values = np.random.default_rng(5).standard_normal((1, 20, 30, 24)).astype(np.float32)
    target, _ = predicted(
        network, values, tmp_path, client, patchwise=WINDOW, boundary=boundary, chunks=8
    )
    assert verify(network, tmp_path / "out.npy", target, size=(8, 8, 8)).holds
    array = zarr.open_array(str(target / "0"), mode="r+")
    array[:] = np.roll(array[:], 1, axis=-1)
    assert not verify(network, tmp_path / "out.npy", target, size=(8, 8, 8)).holds


def test_one_array_can_be_computed_as_a_whole():
    network = normalised()
    x = np.random.default_rng(6).standard_normal((1, 8, 10, 12)).astype(np.float32)
    np.testing.assert_allclose(apply(network, x), oracle.whole(network, x), atol=1e-4)
    with pytest.raises(NetworkError, match=r"11 voxels along y do not.*nearest.*10, 12"):
        apply(network, np.zeros((1, 8, 11, 12), np.float32))


def test_memory_stays_within_what_was_predicted(tmp_path, client):
    network = normalised()
    values = np.zeros((1, 96, 96, 96), np.float32)
    _, summary = predicted(network, values, tmp_path, client, patchwise=(32, 32, 32))
    assert summary.peak_bytes <= summary.plan.predicted_bytes <= 4 << 30


def test_windows_that_only_plain_primitives_can_make_are_not_refused():
    b = Builder(1)
    network = b.network(b.conv(b.relu(b.conv(b.input, 3, 3, padding=1)), 2, 3, padding=1))
    grid = WindowGrid(network, (64, 64, 64), "constant", Patchwise((48, 48, 48)))

    def planned(allowed_bytes):
        return window_planner.plan(grid, with_resources(grid, allowed_bytes))

    free, plain = planned(1 << 40), choose_primitives(grid.layout)
    assert chosen_primitives(grid.layout, free) != plain
    with pytest.raises(MemoryLimitError) as refused:
        planned(1 << 20)
    least = parse_bytes(re.search(r"allow at least (.*?),", str(refused.value))[1].replace(" ", ""))
    tight = planned(least)
    assert tight.predicted_bytes <= least < free.predicted_bytes
    assert chosen_primitives(grid.layout, tight) == plain


def wide():
    """Convolutions of many weights for few voxels, and a matrix."""
    b = Builder(1)
    x = b.max_pool(b.relu(b.conv(b.input, 32, 3, padding=1)), 2)
    for _ in range(2):
        x = b.relu(b.conv(x, 256, 3, padding=1))
    return b.network(b.conv(b.reduce(x, "mean"), 3, 1))


def test_memory_stays_within_what_was_predicted_of_several_windows_at_once(tmp_path, client):
    values = np.random.default_rng(9).standard_normal((1, 32, 40, 48)).astype(np.float32)
    _, summary = predicted(wide(), values, tmp_path, client, patchwise=(16, 16, 16), step=4)
    assert summary.plan.stages[0].samples > 1
    assert summary.peak_bytes <= summary.plan.predicted_bytes <= 4 << 30


def test_all_that_is_held_for_several_windows_is_counted():
    grid = WindowGrid(normalised(), (24, 72, 48), "valid", Patchwise((24, 48, 32), 0.5))
    chosen, counted = choose_primitives(grid.layout), []
    for samples in (1, 8):
        schedules = Schedules(grid.layout, chosen, samples)
        counted.append(computing_bytes(schedules, grid.layout.sizes, grid.window, 2))
    with WindowBlocks(grid, chosen, 2, 8) as blocks:
        arrays = blocks._executor._executor._arena, blocks._answers.get()
        held = sum(array.nbytes for array in arrays)
    assert arrays[1].shape == (8, 2, *grid.window)
    more = counted[1] - counted[0]
    assert 7 / 8 * held <= more + 1024
    assert more < 7 / 8 * held + 1024


@pytest.mark.parametrize("threads", [1, 2])
def test_what_fewer_windows_are_computed_in_is_counted_too(threads):
    """Of 11 windows tiles are computed in two passes, of 10 in one."""
    b = Builder(16)
    network = b.network(b.conv(b.input, 16, 3, padding=1))
    layout = WholeWindow(network, (8, 16, 16))
    primitives = {node.name: ConvTiledFFT((10, 10, 8)) for node in network if node.inputs}
    each = [Schedules(layout, primitives, samples) for samples in (10, 11)]
    steps = [schedules.steps(layout.sizes)[1] for schedules in each]
    ten, eleven = (s.primitive.workspace_bytes(s.problem, threads) for s in steps)
    assert eleven < ten
    prepared = sum(
        primitive.prepared_bytes(steps[0].problem.layer) for primitive in primitives.values()
    )
    with WindowExecutor(layout, primitives, threads, 11) as executor:
        executor.apply(np.ones((21, 16, 8, 16, 16), np.float32))
        scratch = executor._executor._team.scratch_bytes
    spent = each[1].spent_bytes(layout.sizes, threads)
    assert eleven < scratch <= spent - prepared


def rates(grid, plan):
    """Estimated seconds of a window."""
    samples = plan.stages[0].samples
    schedules = Schedules(grid.layout, chosen_primitives(grid.layout, plan), samples)
    return Costs().estimated_seconds(schedules.steps(grid.layout.sizes), 1) / samples


def test_more_memory_takes_more_windows_at_once_and_is_never_slower():
    grid = WindowGrid(wide(), (64, 64, 64), "constant", Patchwise((16, 16, 16), step=(2, 2, 2)))
    plans = [
        window_planner.plan(grid, with_resources(grid, mib << 20))
        for mib in (100, 120, 140, 160, 200, 300, 600)
    ]
    at_once = [plan.stages[0].samples for plan in plans]
    assert at_once[0] < at_once[-1]
    assert set(at_once) <= set(window_planner.SAMPLES)
    seconds = [rates(grid, plan) for plan in plans]
    assert all(b <= 1.05 * a for a, b in pairwise(seconds))
    assert all(plan.predicted_bytes <= plan.allowed_bytes for plan in plans)


@pytest.mark.parametrize(("unit", "most"), [((1, 1, 1), 1), ((1, 1, 3), 3), ((2, 3, 2), 12)])
def test_no_more_windows_are_taken_at_once_than_a_block_has(unit, most):
    grid = WindowGrid(wide(), (64, 64, 64), "constant", Patchwise((16, 16, 16), step=(2, 2, 2)))
    plan = window_planner.plan(grid, with_resources(grid, 1 << 40, unit=unit, block=unit))
    found = plan.stages[0].samples
    assert most / 2 < found <= most


def test_no_more_are_taken_either_where_blocks_must_be_small():
    grid = WindowGrid(wide(), (64, 64, 64), "constant", Patchwise((16, 16, 16), step=(2, 2, 2)))
    resources = with_resources(grid, 300 << 20, unit=(1, 1, 1))
    dear = replace(resources, read_bytes=lambda region, by_cells=False: 10000 * volume(region))
    plan = window_planner.plan(grid, dear)
    assert plan.stages[0].samples <= volume(plan.block) < 16


def test_memory_counts_the_block_that_reads_most(tmp_path, client):
    """Where blocks and windows do not match, some blocks touch more windows than others."""
    grid = WindowGrid(normalised(), (96, 96, 96), "constant", Patchwise((32, 32, 32), 0.0))
    resources = with_resources(grid, 1 << 40, unit=(24, 24, 24), block=(24, 24, 24))
    (read,) = [one.region for one in window_planner._candidates(grid, resources)]
    regions = [grid.region(block).size for block in grid.blocks((24, 24, 24))]
    assert read == tuple(max(region[axis] for region in regions) for axis in range(3))
    assert read == (64, 64, 64)


def test_networks_that_reduce_over_space_are_refused_without_windows_by_their_layers(
    tmp_path, client
):
    with pytest.raises(NetworkError) as found:
        geometry(normalised())
    for name in ("InstanceNormalization", "GroupNormalization", "reduce_mean", "--patchwise"):
        assert name in str(found.value)
    with pytest.raises(NetworkError, match=r"not local.*that reduce over space"):
        predicted(normalised(), np.zeros((1, 9, 9, 9)), tmp_path, client)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patchwise": (8, 12, 15)}, NetworkError, "15 voxels along x do not pass"),
        ({"patchwise": WINDOW, "overlap": 1.0}, OptionError, "overlap 1"),
        ({"patchwise": WINDOW, "overlap": -0.1}, OptionError, "overlap"),
        ({"patchwise": WINDOW, "weights": "round"}, OptionError, "'round'"),
        ({"patchwise": WINDOW, "step": 4}, OptionError, "one vector of a window"),
        ({"patchwise": WINDOW, "patch": 8}, OptionError, "give no patch"),
        ({"patchwise": WINDOW, "halo": 8}, OptionError, "either patchwise or halo"),
        ({"patchwise": WINDOW, "boundary": "valid"}, VolumeError, "at least 12 voxels along y"),
        ({"patchwise": WINDOW, "memory": "64MiB"}, MemoryLimitError, "windows of 8·12·16 need"),
        ({"patchwise": 0}, OptionError, "patchwise 0 is no size"),
        ({"step": 4}, OptionError, "give their size with patchwise"),
    ],
)
def test_bad_windows_are_refused_before_anything_is_written(
    options, error, message, tmp_path, client
):
    with pytest.raises(error, match=message):
        predicted(normalised(), np.zeros((1, 9, 9, 20)), tmp_path, client, **options)
    assert not (tmp_path / "out.zarr").exists()


def test_a_network_that_changes_the_size_is_no_network_for_windows(tmp_path, client):
    b = Builder(1)
    network = b.network(b.normalize(b.conv(b.input, 2, 3), 2))
    with pytest.raises(NetworkError, match=r"makes 6·10·14"):
        predicted(network, np.zeros((1, 9, 13, 20)), tmp_path, client, patchwise=WINDOW)


def test_windows_on_the_command_line(tmp_path, capsys):
    save(normalised(), tmp_path / "net.onnx")
    values = np.random.default_rng(0).standard_normal((20, 20, 24)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    common = ["infer", str(tmp_path / "net.onnx"), str(tmp_path / "in.npy")]
    assert main([*common, str(tmp_path / "no.zarr")]) == 2
    assert "--patchwise" in capsys.readouterr().err
    options = ["--patchwise", "8,12,16", "--overlap", "0.25", "--weights", "gaussian"]
    assert main([*common, str(tmp_path / "out.zarr"), *options, "--boundary", "constant"]) == 0
    want = blended(normalised(), values[None].astype(np.float64), WINDOW, 0.25, "gaussian")
    assert np.abs(stored(tmp_path / "out.zarr") - want).max() < 1e-4
