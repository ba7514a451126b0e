"""The right answer: patches of any shape and place equal the network applied once to all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import graphs
import oracle
from peaks import traced_peak
from znni_dask.choices import choose_primitives
from znni_dask.executors import serial
from znni_dask.executors.patches import executor_for
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box, tiles
from znni_dask.kernels import team
from znni_dask.machine import CPU, GPU
from znni_dask.network import window
from znni_dask.network.build import Builder
from znni_dask.network.field_of_view import geometry
from znni_dask.network.layers import Activation
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout, source_index
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.table import candidates
from znni_dask.schedule import Schedules

SHARED_VOXELS = 1000  # handing out smaller patches takes longer than they do
PATCHES = [
    (64, 64, 64),
    (16, 16, 16),
    (8, 8, 8),
    (7, 7, 7),
    (4, 12, 20),
    (1, 16, 16),
    (16, 3, 5),
    (5, 9, 11),
    (13, 6, 17),
    (2, 2, 32),
]


def extended(volume, box, boundary):
    """The volume within a box that may reach beyond it, by the package's own index arithmetic."""
    for axis, (a, b) in enumerate(zip(box.start, box.stop, strict=True)):
        index = np.array(source_index(a, b, volume.shape[1 + axis], boundary))
        volume = np.take(volume, np.maximum(index, 0), axis=1 + axis)
        np.moveaxis(volume, 1 + axis, 0)[index < 0] = 0
    return volume


def in_patches(network, volume, boundary, patch, primitives=None, threads=2, **how):
    layout = Layout(network, volume.shape[1:], boundary)
    boxes = list(tiles(layout.output_size, patch))
    return at_boxes(network, volume, boundary, boxes, primitives, threads, **how)


def at_boxes(
    network, volume, boundary, boxes, primitives=None, threads=2, device=None, arranged=Schedules
):
    """The answer within ``boxes``, each computed as a patch of its own; NaN elsewhere."""
    layout = Layout(network, volume.shape[1:], boundary)
    chosen = primitives or choose_primitives(layout, device=GPU if device else CPU)
    schedules = arranged(layout, chosen)
    spans = [{(b.start[axis], b.stop[axis]) for b in boxes} for axis in range(3)]
    sizes = schedules.envelope(spans)
    patch = tuple(max(b.size[axis] for b in boxes) for axis in range(3))
    out = np.full((network.out_channels, *layout.output_size), np.nan, np.float32)
    with executor_for(schedules, sizes, patch, threads, device) as executor:
        for box in boxes:
            todo = schedules.schedule(box)
            answer = np.empty((network.out_channels, *box.size), np.float32)
            executor.run(todo, [extended(volume, todo.input, boundary)], [answer])
            out[(slice(None), *box.slices)] = answer
    return out


def at_once(network, volume, boundary):
    """The oracle's answer: extend, apply once (dense: at every voxel), crop."""
    found = geometry(network)
    n = volume.shape[1:]
    if boundary == "valid":
        size = [axis.extension(k, "valid").size for axis, k in zip(found.axes, n, strict=True)]
        x = volume[:, : size[0], : size[1], : size[2]]
    else:
        ends = [axis.extension(k, boundary) for axis, k in zip(found.axes, n, strict=True)]
        high = [e.size - e.low - k for e, k in zip(ends, n, strict=True)]
        x = oracle.extend(volume, [e.low for e in ends], high, boundary)
    if found.dense:
        answer = oracle.dense(network, x, [axis.shrink + 1 for axis in found.axes])
    else:
        answer = oracle.whole(network, x)
    if boundary == "valid":
        return answer
    kept = tuple(slice(e.first, e.first + e.outputs) for e in ends)
    return answer[(slice(None), *kept)]


def assert_same(got, want):
    assert got.shape == want.shape
    deviation = want.std()
    assert 0.01 < deviation < 100
    difference = got - want
    assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(want)
    assert np.abs(difference).max() < 1e-4 * deviation


def interior_patch_exists(network, size, patch):
    layout = Layout(network, size, "reflect")
    return any(layout.patch(box).input.within(size) for box in tiles(layout.output_size, patch))


def volume_for(network, seed=0):
    """Odd, anisotropic, and large enough that some patch lies wholly inside."""
    field = geometry(network).field_of_view
    size = [f + e for f, e in zip(field, (19, 26, 31), strict=True)]
    random = np.random.default_rng(seed)
    return random.standard_normal((network.in_channels, *size)).astype(np.float32)


@pytest.mark.parametrize(
    "patches", [PATCHES[::2], pytest.param(PATCHES[1::2], marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize(("family", "seed"), graphs.HALF)
def test_every_graph_in_every_patch_shape_equals_the_oracle(family, seed, patches):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    inside = False
    for patch in patches:
        threads = 2 if np.prod(patch) > SHARED_VOXELS else 1
        got = in_patches(network, volume, "reflect", patch, threads=threads)
        assert_same(got, want)
        inside |= interior_patch_exists(network, volume.shape[1:], patch)
    assert inside


@pytest.mark.parametrize("boundary", ["reflect", "nearest", "constant", "valid"])
@pytest.mark.parametrize(
    ("family", "seed"),
    [("chain", 0), ("residual", 1), ("unet", 2), ("valid_unet", 0), ("strided", 0), ("finer", 0)],
)
@pytest.mark.every(5)
def test_every_boundary_equals_the_oracle(family, seed, boundary):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    got = in_patches(network, volume, boundary, (7, 9, 16))
    assert_same(got, at_once(network, volume, boundary))


@pytest.mark.parametrize("size", [(1, 40, 41), (3, 3, 3), (1, 1, 64), (40, 2, 5)])
@pytest.mark.parametrize(("family", "seed"), [("chain", 3), ("unet", 1), ("valid_unet", 1)])
def test_thin_volumes_equal_the_oracle(family, seed, size):
    network = graphs.graph(family, seed)
    volume = np.random.default_rng(1).standard_normal((network.in_channels, *size), np.float32)
    got = in_patches(network, volume, "reflect", (4, 16, 16))
    assert_same(got, at_once(network, volume, "reflect"))


def in_tiles(network, layout):
    """Primitives, of which those that can be are convolutions in tiles."""
    chosen = choose_primitives(layout)
    sizes = ((6, 10, 12), (1, 10, 12), (7, 14, 16))
    changed = 0
    for node in network:
        fitting = [p for p in map(ConvTiledFFT, sizes) if p.refusal(node.layer) is None]
        if fitting and node.inputs:
            chosen[node.name] = fitting[0]
            changed += 1
    assert changed
    return chosen


@pytest.mark.parametrize(("family", "seed"), graphs.ALL[::5])
def test_tiles_of_fourier_transforms_equal_the_oracle(family, seed):
    network = simplify(graphs.graph(family, seed))
    volume = volume_for(network)
    chosen = in_tiles(network, Layout(network, volume.shape[1:], "reflect"))
    want = at_once(network, volume, "reflect")
    for patch in ((7, 16, 9), (20, 11, 32)):
        assert_same(in_patches(network, volume, "reflect", patch, chosen), want)


@pytest.mark.parametrize("seed", range(6))
def test_plain_pooling_per_offset_equals_fragments(seed):
    network = graphs.graph("chain", seed)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    assert geometry(network).dense
    plain = {
        node.name: next(p for p in candidates(node.layer) if not p.fragments)
        for node in network
        if node.inputs
    }
    want = at_once(network, volume, "reflect")
    assert_same(in_patches(network, volume, "reflect", (8, 16, 16), plain), want)
    # and a mixture: the first strided layer fragmented where it can be, the others per offset
    first = next(name for name in choose_primitives(layout) if name in layout.strided)
    mixed = plain | {first: choose_primitives(layout)[first]}
    assert_same(in_patches(network, volume, "reflect", (5, 16, 9), mixed), want)


def apart_along_fewer_axes(layout, chosen):
    """The primitives, but the first that makes fragments makes those along fewer axes."""
    first = next((n for n, p in chosen.items() if p.fragments and n in layout.strided), None)
    if first is not None:
        layer = layout.network[first].layer
        for other in candidates(layer):
            if other.fragments_of(layer) != chosen[first].fragments_of(layer):
                yield chosen | {first: other}


@pytest.mark.parametrize("seed", range(6))
def test_fragments_along_some_axes_leave_the_others_to_offsets(seed):
    network = graphs.graph("chain", seed)
    volume = volume_for(network)
    layout = Layout(network, volume.shape[1:], "reflect")
    want = at_once(network, volume, "reflect")
    for primitives in apart_along_fewer_axes(layout, choose_primitives(layout)):
        assert_same(in_patches(network, volume, "reflect", (8, 16, 9), primitives), want)


def shorten_windows(monkeypatch, side):
    """Plant a halo error of one voxel: windows claim one input less on their low or high side."""
    honest = window.Window.needs

    def short(self, start, stop):
        first, last = honest(self, start, stop)
        if self.extent == 1 or self.up > 1:
            return first, last
        return (first, last - 1) if side == "high" else (first + 1, last)

    monkeypatch.setattr(window.Window, "needs", short)


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize(("family", "seed"), [("chain", 0), ("unet", 0), ("residual", 0)])
def test_a_planted_halo_error_of_one_voxel_is_found(family, seed, side, monkeypatch):
    """The border of a patch must show it."""
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    want = at_once(network, volume, "reflect")
    geometry(network)  # what the whole volume needs stays right
    shorten_windows(monkeypatch, side)
    got = in_patches(network, volume, "reflect", (8, 8, 8))
    with pytest.raises(AssertionError):
        assert_same(got, want)


def test_the_last_sigmoid_hides_nothing_because_tests_compare_before_it():
    for family, seed in graphs.ALL:
        network = graphs.graph(family, seed)
        last = network[network.output].layer
        assert not (isinstance(last, Activation) and last.function == "sigmoid")


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("boundary", ["reflect", "nearest", "constant"])
def test_extension_is_numpys_padding(n, boundary):
    x = np.arange(1, n + 1)
    mode = {"reflect": "reflect", "nearest": "edge", "constant": "constant"}[boundary]
    want = np.pad(x, (11, 7), mode=mode)
    index = np.array(source_index(-11, n + 7, n, boundary))
    assert np.array_equal(np.where(index < 0, 0, x[index]), want)


def test_a_network_of_no_layers_returns_the_volume():
    b = Builder(1)
    network = b.network(b.activation(b.input, "relu"))
    volume = np.random.default_rng(0).standard_normal((1, 5, 6, 7)).astype(np.float32)
    got = in_patches(network, volume, "reflect", (2, 3, 4))
    assert np.array_equal(got, np.maximum(volume, 0))


def test_patches_tile_the_answer_exactly_once():
    network = graphs.graph("unet", 0)
    layout = Layout(network, (21, 34, 55), "reflect")
    count = np.zeros(layout.output_size, int)
    for box in layout.blocks((8, 13, 21)):
        count[box.slices] += 1
    assert (count == 1).all()


def test_geometry_is_a_value_and_boxes_know_their_place():
    box = Box((1, 2, 3), (4, 6, 8))
    assert box.size == (3, 4, 5)
    assert box.voxels == 60
    assert box.shifted((1, 1, 1)).within((5, 7, 9))
    assert not box.within((4, 6, 7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        box.start = (0, 0, 0)


@pytest.mark.parametrize("fragments", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_several_patches_at_once_are_what_each_is_alone(samples, fragments):
    """Of a dense network, whose arrays hold the fragments of all samples."""
    b = Builder(channels=2, seed=5)
    x = b.max_pool(b.relu(b.conv(b.input, 5, kernel=(3, 2, 3))), (1, 2, 2))
    x = b.average_pool(b.relu(b.conv(x, 20, kernel=3)), (2, 1, 3))
    network = b.network(b.conv(x, 3, kernel=(2, 3, 1)))
    box, field = Box((1, 2, 3), (8, 9, 11)), geometry(network).field_of_view
    layout = Layout(network, (20, 21, 22), "valid")
    chosen = choose_primitives(layout, fragments)
    schedules = Schedules(layout, chosen, samples)
    todo = schedules.schedule(box)
    random = np.random.default_rng(6)
    volumes = [random.standard_normal((2, *todo.input.size), np.float32) for _ in range(samples)]
    answers = [np.empty((3, *box.size), np.float32) for _ in range(samples)]
    with SerialExecutor(schedules, schedules.sizes(box), threads=2) as executor:
        executor.run(todo, volumes, answers)
    for volume, answer in zip(volumes, answers, strict=True):
        want = oracle.dense(network, volume.astype(np.float64), field)
        z, y, x = (slice(n) for n in box.size)  # the rest is made by whole fragments alone
        want = want[:, z, y, x]
        assert np.linalg.norm(answer - want) < 1e-5 * np.linalg.norm(want)


def test_a_second_patch_allocates_no_array(monkeypatch):
    b = Builder(channels=1)
    x = b.max_pool(b.relu(b.conv(b.input, 16, kernel=3)), 2)
    network = b.network(b.conv(x, 3, kernel=3))
    layout = Layout(network, (80, 80, 80), "valid")
    chosen = choose_primitives(layout)
    schedules, box = Schedules(layout, chosen), Box((0, 0, 0), (40, 48, 56))
    todo = schedules.schedule(box)
    volume = np.ones((1, *todo.input.size), np.float32)
    answer = np.empty((3, *box.size), np.float32)
    with SerialExecutor(schedules, schedules.sizes(box), threads=2) as executor:
        executor.run(todo, [volume], [answer])
        with monkeypatch.context() as patch:
            for module in (team, serial):
                patch.setattr(module, "allocate", None)  # would be called, and fail
            peak = traced_peak(lambda: executor.run(todo, [volume], [answer]))
    assert peak < 64 << 10 < answer.nbytes / 8
