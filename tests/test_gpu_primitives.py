"""Every row of the table for GPUs passes the contract that those for the CPU pass, on a simulated
device: shapes, oracle, refusals, memory."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_source import EmulatedDevice
from peaks import traced_peak
from test_primitives import (
    LAYERS,
    SIZE,
    cut,
    expected,
    inputs_of,
    problem_of,
    weights_of,
)
from znni_dask.devices.simulated import SimulatedDevice
from znni_dask.geometry import Box, tiles
from znni_dask.machine import GPU
from znni_dask.network import layers
from znni_dask.primitives.base import Problem
from znni_dask.primitives.gpu import conv_fft_tiles
from znni_dask.primitives.gpu.conv_fft_tiles import GpuTiledFFT
from znni_dask.primitives.gpu.fragments import weave
from znni_dask.primitives.table import candidates, named, table

TILES = (GpuTiledFFT((5, 8, 12)), GpuTiledFFT((10, 15, 28)), GpuTiledFFT((1, 6, 8)))


def rows(layer):
    """All primitives of a GPU that take a layer; of those that come in sizes a few."""
    return candidates(layer, GPU) + [sized for sized in TILES if sized.refusal(layer) is None]


CASES = [
    (label, primitive.name) for label, (layer, _) in LAYERS.items() for primitive in rows(layer)
]
ONE_OF_EACH = {named(n, LAYERS[label][0], GPU): (label, n) for label, n in CASES}
IN_TILES = ("conv blocks", "conv in parts", "conv dilated padded")  # what tiles have most to do in
ONE_OF_EACH |= {tile: (label, tile.name) for label, tile in zip(IN_TILES, TILES, strict=True)}


class LaunchesNothing(SimulatedDevice):
    """For its memory alone: what kernels take for themselves in numpy is none of a GPU's."""

    def launch(self, kernel, blocks, *arguments):
        pass


def fetched(device, array):
    """A copy of a device's array on the host."""
    here = device.pinned(array.nbytes)
    there = array.reshape(-1).view(np.uint8)
    device.lanes.compute.do(lambda: device.copy(here, there)).wait()
    return here.view(array.dtype).reshape(array.shape)


def on(device, primitive, prepared, problem, arrays):
    """What a primitive makes on a device."""
    given = [device.put(array) for array in arrays]
    memory = device.empty(4 * int(np.prod(problem.output)))
    out = memory.view(np.float32).reshape(problem.output)

    def work():
        out[...] = np.nan
        primitive.apply(prepared, problem, given, out, device)

    device.lanes.compute.do(work).wait()
    for before, after in zip(arrays, given, strict=True):
        if not primitive.in_place:
            np.testing.assert_array_equal(before, fetched(device, after))
    return fetched(device, out)


def check_boxes(device, label, name, part):
    """Boxes of the output of at most ``part`` voxels equal the oracle."""
    layer, count = LAYERS[label]
    primitive = named(name, layer, GPU)
    random = np.random.default_rng(3)
    channels, arrays = inputs_of(layer, count, random)
    weights = weights_of(layer, random)
    prepared = primitive.placed(layer, weights, device)
    offsets = list(np.ndindex(*primitive.fragments_of(layer)))
    wants = [expected(layer, arrays, weights, offset) for offset in offsets]
    size = np.min([w.shape[2:] for w in wants], axis=0)  # what all fragments have
    whole = [layer.window(axis).whole for axis in range(3)]  # not to be had in parts
    part = tuple(int(n) if w else t for n, w, t in zip(size, whole, part, strict=True))
    for box in tiles(tuple(int(n) for n in size), part):
        problem, parts = problem_of(layer, primitive, 2, channels, SIZE, box)
        given = [np.ascontiguousarray(cut(a, parts)) for a in arrays]
        got = on(device, primitive, prepared, problem, given)
        got = got.reshape(len(offsets), 2, *problem.output[1:])
        for made, want in zip(got, wants, strict=True):
            here = want[(slice(None), slice(None), *box.slices)]
            np.testing.assert_allclose(made, here, rtol=1e-5, atol=2e-5 * max(1, want.std()))


@pytest.mark.parametrize(("label", "name"), CASES)
def test_any_box_of_the_output_equals_the_oracle(label, name, device):
    check_boxes(device, label, name, (3, 5, 20))


@pytest.mark.parametrize(("label", "name"), ONE_OF_EACH.values())
def test_kernels_in_cuda_make_the_same(label, name):
    with EmulatedDevice(1 << 30) as device:
        check_boxes(device, label, name, (5, 14, 37))


@pytest.mark.parametrize(
    ("label", "name"),
    [(label, name) for label, name in CASES if named(name, LAYERS[label][0], GPU).in_place],
)
def test_in_place_gives_the_same(label, name, device):
    layer, count = LAYERS[label]
    primitive = named(name, layer, GPU)
    random = np.random.default_rng(4)
    channels, arrays = inputs_of(layer, count, random)
    weights = weights_of(layer, random)
    problem, _ = problem_of(layer, primitive, 2, channels, SIZE, Box((0, 0, 0), SIZE))
    want = expected(layer, arrays, weights)
    prepared = primitive.placed(layer, weights, device)
    given = [device.put(a) for a in arrays]

    def work():
        primitive.apply(prepared, problem, given, given[0], device)

    device.lanes.compute.do(work).wait()
    np.testing.assert_allclose(fetched(device, given[0]), want, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in")  # memory that nothing was written to
@pytest.mark.parametrize(("label", "name"), CASES)
def test_memory_measured_stays_within_memory_predicted(label, name):
    layer, count = LAYERS[label]
    primitive = named(name, layer, GPU)
    random = np.random.default_rng(5)
    channels, arrays = inputs_of(layer, count, random, batch=1)
    size = SIZE if label.startswith("whole") else (16, 40, 60)
    shapes = [(1, a.shape[1], *(size if a.shape[-1] > 1 else (1, 1, 1))) for a in arrays]
    n = [layer.window(axis).size(size[axis]) for axis in range(3)]
    if primitive.fragments:
        n = [k - 1 for k in n]
    problem, parts = problem_of(layer, primitive, 1, channels, size, Box((0, 0, 0), tuple(n)))
    given = [np.ascontiguousarray(cut(np.ones(s, np.float32), parts)) for s in shapes]
    out = np.full(problem.output, np.nan, np.float32)
    weights = weights_of(layer, random)
    with LaunchesNothing(1 << 40) as device:
        prepared = primitive.placed(layer, weights, device)
        assert device.peak_bytes <= primitive.prepared_bytes(layer)

        def work():
            primitive.apply(prepared, problem, given, out, device)

        device.lanes.compute.do(work).wait()
        objects = 128 << 10  # python's own: views, closures, threads
        allowed = primitive.workspace_bytes(problem, threads=1) + objects - device.scratch_bytes
        peak = traced_peak(lambda: device.lanes.compute.do(work).wait(), allowed)
        scratch = device.scratch_bytes
    assert peak + scratch <= primitive.workspace_bytes(problem, threads=1) + objects
    assert primitive.memory_bytes(problem, 1) == (
        out.nbytes + primitive.workspace_bytes(problem, threads=1)
    )
    assert primitive.flops(problem) > 0
    assert primitive.work(problem, threads=1).seconds(1) > 0


@pytest.mark.parametrize(
    "primitive",
    [*(p for p in table() if p.device == GPU), *TILES[:1]],
    ids=lambda p: f"{p.layer.__name__}-{p.name}",
)
def test_a_layer_of_another_kind_is_refused_with_a_reason(primitive):
    other = layers.Softmax() if primitive.layer is not layers.Softmax else layers.Concat()
    reason = primitive.refusal(other)
    assert reason is not None
    assert other.kind in reason


def test_every_row_for_gpus_has_a_case():
    covered = {named(name, LAYERS[label][0], GPU) for label, name in CASES}
    rows = {p for p in table() if p.device == GPU and p.precision == layers.FULL}
    assert covered == rows | {*TILES}
    kinds = {type(layer) for layer, _ in LAYERS.values()}
    assert {p.layer for p in rows} == kinds


def test_fragments_refuse_padding():
    padded = layers.MaxPool((3, 3, 3), (2, 2, 2), padding=((1, 1, 1), (1, 1, 1)))
    assert [p.name for p in candidates(padded, GPU)] == ["pooling"]
    assert "pad" in named("fragments", layers.MaxPool((2, 2, 2), (2, 2, 2)), GPU).refusal(padded)


@pytest.mark.parametrize("label", ["conv padded", "conv dilated padded", "conv blocks"])
@pytest.mark.parametrize("rows", [1, 5])
def test_tiles_are_computed_in_batches_of_any_size(label, rows, monkeypatch, device):
    tiled, layer = TILES[0], LAYERS[label][0]
    row_bytes = 8 * 5 * 8 * 7 * (layer.in_channels + layer.out_channels)
    monkeypatch.setattr(conv_fft_tiles, "WORKSPACE_BYTES", rows * row_bytes + 3)
    problem = Problem(layer, ((2, 1, *SIZE),), (2, 1, *SIZE), ((0, 0, 0),), (0, 0, 0), SIZE)
    assert 0 < tiled.workspace_bytes(problem, threads=1) <= rows * row_bytes + 256
    check_boxes(device, label, tiled.name, (9, 14, 37))


def test_tiles_that_have_no_room_are_refused():
    conv = layers.Conv(1, 1, (5, 5, 5))
    assert "shared memory" in GpuTiledFFT((36, 36, 36)).refusal(conv)
    assert "even" in GpuTiledFFT((8, 8, 9)).refusal(conv)
    assert "smaller than the kernel" in GpuTiledFFT((8, 4, 8)).refusal(conv)
    assert "stride" in GpuTiledFFT((8, 8, 8)).refusal(layers.Conv(1, 1, (5, 5, 5), (1, 2, 1)))
    with pytest.raises(KeyError, match="spectra remade"):
        named("tiled fft 16·16·16, spectra remade", conv, GPU)


@pytest.mark.parametrize(
    ("kernel", "dilation", "output"),
    [
        *(((5, 5, 5), (1, 1, 1), (128, 128, 128)), ((9, 9, 9), (2, 2, 2), (60, 200, 3))),
        *(((1, 7, 7), (1, 1, 1), (1, 300, 300)), ((30, 3, 1), (1, 1, 1), (50, 60, 70))),
        *(((3, 3, 3), (4, 4, 4), (1, 1, 1)), ((41, 1, 1), (1, 1, 1), (90, 2, 2))),
    ],
)
def test_tiles_worth_trying_are_a_few_that_fit(kernel, dilation, output):
    layer = layers.Conv(24, 32, kernel, dilation=dilation)
    size = tuple(n + (k - 1) * d for n, k, d in zip(output, kernel, dilation, strict=True))
    problem = Problem(layer, ((1, 24, *size),), (1, 32, *output), ((0, 0, 0),), (0, 0, 0), size)
    found = list(conv_fft_tiles.gpu_tiles(problem))
    assert 1 <= len(found) <= 16
    assert all(tiled.refusal(layer) is None for tiled in found)
    if output == (128, 128, 128):
        prepared = [tiled.prepared_bytes(layer) for tiled in found]
        assert min(prepared) < prepared[0] / 3
    seconds = [tiled.work(problem, threads=1).seconds(1) for tiled in found]
    assert seconds == sorted(seconds)


def test_no_tiles_are_worth_trying_for_few_products():
    layer, shape = layers.Conv(2, 4, (1, 1, 3)), (1, 2, 8, 8, 8)
    problem = Problem(layer, (shape,), (1, 4, 8, 8, 6), ((0, 0, 0),), (0, 0, 0), shape[2:])
    assert not list(conv_fft_tiles.gpu_tiles(problem))


def check_woven(device, spacing, size, missing):
    """Fragments lie interleaved in the answer; where one is missing nothing is written."""
    random = np.random.default_rng(8)
    want = random.standard_normal((3, *size)).astype(np.float32)
    places = list(np.ndindex(*spacing))[missing:][::-1]
    parts = [-(-n // s) for n, s in zip(size, spacing, strict=True)]
    fragments = np.full((len(places), 3, *parts), np.nan, np.float32)
    for fragment, place in zip(fragments, places, strict=True):
        part = want[:, *(slice(p, None, s) for p, s in zip(place, spacing, strict=True))]
        fragment[:, *(slice(n) for n in part.shape[1:])] = part
    there, out = device.put(fragments), device.put(np.full_like(want, 7))
    numbers = {place: i for i, place in enumerate(places)}
    device.lanes.compute.do(lambda: weave(there, numbers, spacing, out, device)).wait()
    if missing:
        want[:, *(slice(None, None, s) for s in spacing)] = 7
    np.testing.assert_array_equal(fetched(device, out), want)


@pytest.fixture
def emulated():
    """A device that runs the kernels' CUDA source."""
    with EmulatedDevice(1 << 30) as found:
        yield found


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (1, 3, 4), (2, 1, 5)])
@pytest.mark.parametrize("size", [(3, 4, 7), (2, 3, 171)])
@pytest.mark.parametrize("missing", [False, True])
def test_woven_fragments_lie_interleaved_and_leave_other_places_alone(
    spacing, size, missing, device
):
    check_woven(device, spacing, size, missing)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (1, 3, 4), (2, 1, 5)])
@pytest.mark.parametrize("size", [(3, 4, 7), (2, 3, 171)])
@pytest.mark.parametrize("missing", [False, True])
def test_weaving_in_cuda_is_the_same(spacing, size, missing, emulated):
    check_woven(emulated, spacing, size, missing)


@pytest.mark.parametrize("deviation", [1, 50])
def test_raw_grey_values_lose_little_by_transforms(deviation, emulated):
    layer, size = layers.Conv(1, 4, (5, 5, 5), bias=False), (20, 20, 28)
    random = np.random.default_rng(7)
    x = 1000 + deviation * random.standard_normal((1, 1, *size), np.float32)
    weights = weights_of(layer, random)
    want = expected(layer, [x], weights)
    problem = Problem(layer, (x.shape,), want.shape, ((0, 0, 0),), (0, 0, 0), size)
    tiled = GpuTiledFFT((20, 20, 28))
    prepared = tiled.placed(layer, weights, emulated)
    made = on(emulated, tiled, prepared, problem, [x])
    assert np.linalg.norm(made - want) < 1e-6 * np.linalg.norm(want)
