"""Every network of the zoo, as PyTorch exports it, equals PyTorch.

Every entry comes from both of PyTorch's exporters: from the TorchScript one with sizes fixed and
left open, from the other, which takes a second or two for each, in one of the two ways, those
whose graphs reckon with sizes with sizes left open (of entries that both can export only some,
unless all are asked for, by ``--thorough``). `zoo.Entry.ways` leaves out what PyTorch
itself cannot export. Some come in older and newer versions of ONNX too.

Local networks are compared in patches with PyTorch on a whole volume of another size than the
exported one: at the corners, at a face, and with all that lies behind a patch inside. Sliding
windows are compared at every voxel, classifiers of windows window by window. Networks that are
not local are refused by the names of the layers that make them so, and their patchwise answer
is MONAI's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import zarr
from monai.inferers import sliding_window_inference

import znni_dask
import zoo
from test_identity import at_boxes, shorten_windows
from znni_dask import windows
from znni_dask.errors import NetworkError
from znni_dask.geometry import Box
from znni_dask.importers.onnx import load
from znni_dask.network import layers
from znni_dask.network.field_of_view import geometry
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from zoo import DYNAMO, ENTRIES, TORCHSCRIPT, Entry

pytestmark = pytest.mark.usefixtures("one_thread")
PATCH = (11, 13, 17)  # voxels of the volume behind the boxes compared
SECTIONS = 3  # of a volume that a 2D network is applied to


def cases(entries):
    """Entries with the ways in which they are exported here, as pytest's parameters."""
    for index, entry in enumerate(entries):
        ways = [way for way in entry.ways if way[0] == TORCHSCRIPT]
        if DYNAMO in entry.exporters:
            wanted = entry.sized or index % 5 == 0 or entry.exporters == (DYNAMO,)
            ways.append((DYNAMO, wanted and (DYNAMO, True) in entry.ways))
        for exporter, dynamic in ways:
            label = f"{entry.name}-{exporter}-{'dynamic' if dynamic else 'fixed'}"
            also = exporter == TORCHSCRIPT or entry.exporters == (DYNAMO,) or index % 3 == 0
            marks = [] if also else [pytest.mark.thorough]
            yield pytest.param(entry, exporter, dynamic, id=label, marks=marks)


LOCAL = [entry for entry in ENTRIES if entry.local]
GLOBAL = [entry for entry in ENTRIES if not entry.local]
PATCHWISE = [entry for entry in GLOBAL if not entry.refused]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports an entry, each way once."""
    folder = tmp_path_factory.mktemp("zoo")

    @cache
    def export(entry, exporter, dynamic, opset=None):
        path = folder / f"{entry.name}-{exporter}-{dynamic}-{opset}.onnx"
        return entry.export(path, exporter, dynamic, opset)

    return export


def outputs_of(network: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """All outputs of a network, of one that returns its only output bare too."""
    with torch.no_grad():
        found = network(x)
    return list(found) if isinstance(found, tuple | list) else [found]


def applied(entry: Entry, network: torch.nn.Module, volume: np.ndarray) -> list[np.ndarray]:
    """PyTorch's outputs for a volume (c, z, y, x), a 2D network going section by section."""
    x = torch.from_numpy(np.ascontiguousarray(volume))
    outputs = outputs_of(network, x.transpose(0, 1) if entry.rank == 2 else x[None])
    moved = [y.transpose(0, 1) if entry.rank == 2 else y[0] for y in outputs]
    return [y.numpy().astype(np.float32) for y in moved]


def at_every_voxel(entry, reference, network, volume):
    """The sliding window: PyTorch at every offset of the network's stride, interleaved."""
    strides = [int(s) for s in network.spacing[network.output]]
    axes = geometry(network).axes
    size = [axis.output_size(n) for axis, n in zip(axes, volume.shape[1:], strict=True)]
    out = np.full((network.out_channels, *size), np.nan, np.float32)
    for z, y, x in np.ndindex(*strides):
        (part,) = applied(entry, reference, volume[:, z:, y:, x:])
        target = out[:, z :: strides[0], y :: strides[1], x :: strides[2]]
        target[...] = part[:, : target.shape[1], : target.shape[2], : target.shape[3]]
    return out


def in_windows(entry, reference, network, volume, boxes):
    """The classifier of windows, a window for every voxel of the boxes."""
    window_size = entry.size if entry.rank == 3 else (1, *entry.size)
    axes = (1, 2, 3)
    views = np.lib.stride_tricks.sliding_window_view(volume, window_size, axes)
    out = np.full((network.out_channels, *views.shape[1:4]), np.nan, np.float32)
    for box in boxes:
        here = (slice(None), *box.slices)
        shown = np.moveaxis(views[here], 0, 3).reshape(-1, entry.channels, *entry.size)
        (answers,) = outputs_of(reference, torch.from_numpy(np.ascontiguousarray(shown)))
        out[here] = np.moveaxis(answers.numpy().reshape(*box.size, -1), -1, 0)
    return out


def another_size(entry, networks):
    """A size that the networks take whole, with room for a patch whose field of view lies inside,
    and other than the exported one."""
    sections = (SECTIONS,) if entry.rank == 2 else ()
    exported, steps = (*sections, *entry.size), (*(1 for _ in sections), *entry.steps)
    size = []
    for axis in range(3):
        found = [geometry(network).axes[axis] for network in networks]
        n = max(2 * max(a.halo) + a.shrink + PATCH[axis] + 2 * a.alignment + 4 for a in found)
        if axis < len(sections):
            n = SECTIONS
        n += n == exported[axis]
        while n % steps[axis] or not all(a.extension(n, "valid").size == n for a in found):
            n += 1
        size.append(n)
    return tuple(size)


def boxes_of(entry, network, size):
    """Boxes of the answer: corners, a face, and one with all that lies behind it inside."""
    layout = Layout(network, size, "valid")
    axes = zip(PATCH, geometry(network).output_stride, layout.output_size, strict=True)
    patch = [min(max(1, round(p / stride)), n, p) for p, stride, n in axes]
    if entry.window:
        patch = [min(3, p) for p in patch]
    far = tuple(n - p for n, p in zip(layout.output_size, patch, strict=True))
    middle = tuple(f // 2 for f in far)
    corners = [(0, 0, 0), far, (0, middle[1], far[2]), middle]
    boxes = [Box(c, tuple(a + p for a, p in zip(c, patch, strict=True))) for c in corners]
    inside = layout.patch(boxes[-1]).input
    spatial = slice(1, None) if entry.rank == 2 else slice(None)
    assert all(a > 0 for a in inside.start[spatial])
    assert all(b < n for b, n in zip(inside.stop[spatial], size[spatial], strict=True))
    return boxes


def loaded(entry, path):
    """The network of every output, and the volume they are compared on."""
    network = load(path)
    assert tuple(network.outputs) == entry.outputs
    networks = [simplify(network.only(name)) for name in entry.outputs]
    size = another_size(entry, networks)
    assert size[-entry.rank :] != entry.size
    random = np.random.default_rng(3)
    return networks, random.standard_normal((entry.channels, *size)).astype(np.float32)


def assert_patches_equal(entry, reference, networks, volume):
    outputs = None
    for index, network in enumerate(networks):
        boxes = boxes_of(entry, network, volume.shape[1:])
        if entry.window:
            want = in_windows(entry, reference, network, volume, boxes)
        elif geometry(network).dense:
            want = at_every_voxel(entry, reference, network, volume)
        else:
            outputs = outputs or applied(entry, reference, volume)
            want = outputs[index]
        got = at_boxes(network, volume, "valid", boxes)
        assert got.shape == want.shape
        compared = np.zeros(got.shape, bool)
        for box in boxes:
            compared[(slice(None), *box.slices)] = True
        assert_close(got[compared], want[compared])


def assert_close(got, want):
    """As close as float32 allows: in the mean 1e-5 of the deviation, 1e-4 nowhere exceeded."""
    deviation = float(want.std())
    assert deviation > 1e-3
    difference = got - want
    assert np.sqrt(np.mean(difference**2)) < 1e-5 * deviation
    assert np.abs(difference).max() < 1e-4 * deviation


@pytest.mark.parametrize(("entry", "exporter", "dynamic"), cases(LOCAL))
@pytest.mark.every(3)
def test_patches_equal_pytorch_on_the_whole_volume(entry, exporter, dynamic, exported):
    path = exported(entry, exporter, dynamic)
    assert_patches_equal(entry, entry.make(), *loaded(entry, path))


RECKONING = [e for e in LOCAL if e.sized and (TORCHSCRIPT, True) in e.ways]


@pytest.mark.parametrize("entry", RECKONING, ids=lambda entry: entry.name)
def test_sizes_taken_whole_come_out_as_from_pytorch(entry, exported):
    """Where sizes decide how far something is stretched, cropped or padded, a network is not fed
    a size at which PyTorch would do something else."""
    network = simplify(load(exported(entry, TORCHSCRIPT, True)))
    axes = geometry(network).axes[-entry.rank :]
    reference, smallest = entry.make(), max(a.valid_sizes(1)[0] for a in axes) + 16
    compared = 0
    for n in range(smallest, smallest + 9):
        sizes = [a.output_size(n) for a in axes if a.extension(n, "valid").size == n]
        if len(sizes) < entry.rank or geometry(network).dense:
            continue
        try:
            (y,) = outputs_of(reference, entry.sample((n,) * entry.rank))
        except RuntimeError:  # PyTorch takes no such size
            continue
        assert list(y.shape[2:]) == sizes, f"at {n}"
        compared += 1
    assert compared or geometry(network).dense


VERSIONS = {
    (TORCHSCRIPT, 11): (
        *("pieces", "hard", "over_channels", "arithmetic", "layer_norm_channels", "sub_pixel_2d"),
        *("unet_valid_slices", "unet_to_skip_trilinear", "unet_pad_to_skip", "padding_reflect"),
    ),
    (TORCHSCRIPT, 13): ("exponentials", "conv_next", "pool_ceil", "monai_subpixel_upsample"),
    (TORCHSCRIPT, 17): ("exponentials", "spatial_attention", "normalise", "unet_ceil"),
    (DYNAMO, 18): ("exponentials", "conv_next", "unet_pad_to_skip"),
    (DYNAMO, 23): ("rms_norm", "spatial_attention", "conv_next"),
}
OTHER_VERSIONS = [
    pytest.param(zoo.BY_NAME[name], exporter, opset, id=f"{name}-{exporter}-{opset}")
    for (exporter, opset), names in VERSIONS.items()
    for name in names
]


@pytest.mark.parametrize(("entry", "exporter", "opset"), OTHER_VERSIONS)
@pytest.mark.every(2)
def test_older_and_newer_versions_of_onnx_mean_the_same(entry, exporter, opset, exported):
    path = exported(entry, exporter, True, opset)
    assert_patches_equal(entry, entry.make(), *loaded(entry, path))


@pytest.mark.parametrize(("entry", "exporter", "dynamic"), cases(GLOBAL))
@pytest.mark.every(3)
def test_what_breaks_locality_is_named(entry, exporter, dynamic, exported):
    path = exported(entry, exporter, dynamic)
    if not entry.refused:
        load(path)
    with pytest.raises(NetworkError) as found:
        geometry(simplify(load(path)))
    for pattern in entry.breaks:
        assert re.search(pattern, str(found.value)), f"{pattern} is not in: {found.value}"


def by_monai(entry, volume, patch, **options):
    """MONAI's sliding window inference, of a 2D network section by section."""
    reference = entry.make()

    def predict(x):
        (y,) = outputs_of(reference, x)  # a vector becomes the one voxel of its window
        return y if y.ndim == x.ndim else y.reshape(*y.shape, *(1,) * entry.rank)

    x = torch.from_numpy(volume)
    x = x.transpose(0, 1) if entry.rank == 2 else x[None]
    y = sliding_window_inference(
        x, patch, sw_batch_size=1, predictor=predict, padding_mode="constant", **options
    )
    return (y.transpose(0, 1) if entry.rank == 2 else y[0]).numpy()


def patchwise(path, entry, volume, patch, folder, client, boundary="constant", **options):
    """What znni_dask writes for the same."""
    npy, out = folder / "volume.npy", folder / "answer.zarr"
    np.save(npy, volume[0] if entry.channels == 1 else volume)
    size = (1, *patch) if entry.rank == 2 else patch
    znni_dask.run(
        path, npy, out, patchwise=size, boundary=boundary, threads=1, client=client, **options
    )
    answer = zarr.open_group(str(out), mode="r")["0"][...]
    return answer if answer.ndim == 4 else answer[None]


@pytest.mark.parametrize(("entry", "exporter", "dynamic"), cases(PATCHWISE))
@pytest.mark.every(3)
def test_patchwise_answers_are_monais(entry, exporter, dynamic, exported, tmp_path, client):
    path = exported(entry, exporter, dynamic)
    larger = tuple(n + 2 * step for n, step in zip(entry.size, entry.steps, strict=True))
    patch = larger if dynamic else entry.size
    if outputs_of(entry.make(), entry.sample())[0].ndim == 2:  # one vector for a window
        size, options, boundary = tuple(2 * n for n in patch), {"overlap": 0.0}, "valid"
    else:
        added = (patch[0] // 2 + 3, patch[1] - 5, 1)[-entry.rank :]
        size = tuple(map(sum, zip(patch, added, strict=True)))
        options, boundary = {"overlap": 0.5}, "constant"
    size = (SECTIONS, *size) if entry.rank == 2 else size
    volume = np.random.default_rng(5).standard_normal((entry.channels, *size)).astype(np.float32)
    weights = "gaussian" if exporter == TORCHSCRIPT else "constant"
    want = by_monai(entry, volume, patch, mode=weights, **options)
    options |= {"weights": weights, "boundary": boundary}
    got = patchwise(path, entry, volume, patch, tmp_path, client, **options)
    assert got.shape == want.shape
    assert_close(got, want)


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("size", [(9, 30, 31), (16, 17, 24), (5, 6, 7)])
def test_patchwise_volumes_thinner_than_a_patch_are_padded_as_monai_pads(
    size, weights, exported, tmp_path, client
):
    entry = zoo.BY_NAME["instance_norm_affine"]
    path = exported(entry, TORCHSCRIPT, True)
    volume = np.random.default_rng(6).standard_normal((1, *size)).astype(np.float32)
    want = by_monai(entry, volume, entry.size, overlap=0.5, mode=weights)
    got = patchwise(path, entry, volume, entry.size, tmp_path, client, overlap=0.5, weights=weights)
    assert_close(got, want)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6, 0.75])
def test_patchwise_overlaps_are_monais(overlap, exported, tmp_path, client):
    entry = zoo.BY_NAME["group_norm"]
    path = exported(entry, TORCHSCRIPT, True)
    volume = np.random.default_rng(7).standard_normal((1, 37, 33, 50)).astype(np.float32)
    want = by_monai(entry, volume, entry.size, overlap=overlap, mode="gaussian")
    got = patchwise(
        path, entry, volume, entry.size, tmp_path, client, overlap=overlap, weights="gaussian"
    )
    assert_close(got, want)


@pytest.mark.parametrize("name", ["padded_classifier", "c3d"])
def test_a_classifier_of_padded_windows_is_applied_at_every_step(name, exported, tmp_path, client):
    """Each window lies around its voxel and is zero beyond the volume."""
    entry, step = zoo.BY_NAME[name], (5, 6, 7)
    path = exported(entry, TORCHSCRIPT, False)
    volume = np.random.default_rng(8).standard_normal((1, 19, 33, 30)).astype(np.float32)
    around = [((n - 1) // 2, n) for n in entry.size]
    padded = np.pad(volume, [(0, 0), *around])
    views = np.lib.stride_tricks.sliding_window_view(padded, entry.size, (1, 2, 3))
    views = views[:, : volume.shape[1] : step[0], : volume.shape[2] : step[1]]
    views = views[:, :, :, : volume.shape[3] : step[2]]
    (y,) = outputs_of(entry.make(), torch.from_numpy(views.reshape(-1, 1, *entry.size)))
    want = y.numpy().T.reshape(-1, *views.shape[1:4])
    got = patchwise(path, entry, volume, entry.size, tmp_path, client, step=step)
    assert got.shape == want.shape
    assert_close(got, want)


def test_a_windows_classifier_with_open_sizes_is_not_local(exported):
    """Its average over all that is left of a window goes over all of any volume."""
    entry = zoo.BY_NAME["valid_pooled_classifier"]
    path = exported(entry, TORCHSCRIPT, True)
    with pytest.raises(NetworkError, match=r"GlobalAveragePool|mean"):
        geometry(simplify(load(path)))


# Planted faults: the comparison above must see them


FAMILIES = [
    *("valid_pools", "valid_strided", "valid_residual", "valid_pooled_classifier"),
    *("unet_transposed", "unet_trilinear", "unet_2d", "unet_valid", "residual_unet", "aspp"),
    *("attention_unet", "sub_pixel", "padding_reflect", "pool_average_padded", "conv_next"),
    *("deep_supervision", "monai_unet_residual", "monai_high_res_net"),
]


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_planted_halo_error_of_one_voxel_is_found(name, side, exported, monkeypatch):
    entry = zoo.BY_NAME[name]
    path = exported(entry, TORCHSCRIPT, (TORCHSCRIPT, True) in entry.ways)
    networks, volume = loaded(entry, path)  # what the whole volume needs stays right
    shorten_windows(monkeypatch, side)
    with pytest.raises(AssertionError):
        assert_patches_equal(entry, entry.make(), networks, volume)


def changed(network, kind, **values):
    """The network with every layer of one kind changed."""
    nodes = [
        replace(node, layer=replace(node.layer, **values)) if type(node.layer) is kind else node
        for node in network
    ]
    assert any(type(node.layer) is kind for node in nodes)
    return replace(network, nodes=tuple(nodes))


FAULTS = {
    "resized half a voxel beside": ("unet_trilinear", layers.Resize, {"placing": "asymmetric"}),
    "resized without its corners": (
        "unet_trilinear_corners",
        layers.Resize,
        {"placing": "half_pixel"},
    ),
    "repeated and not interpolated": ("unet_trilinear", layers.Resize, {"placing": "nearest"}),
    "normalised in other groups": ("conv_next", layers.Normalize, {"groups": 2}),
    "padding counted": ("pool_average_padded", layers.AveragePool, {"count_padding": True}),
    "edge for mirror": ("padding_reflect", layers.Pad, {"mode": "edge"}),
    "a tanh for the error function": ("conv_next", layers.Activation, {"function": "silu"}),
}


@pytest.mark.parametrize("label", FAULTS)
def test_a_layer_slightly_wrong_is_found(label, exported):
    name, kind, values = FAULTS[label]
    entry = zoo.BY_NAME[name]
    networks, volume = loaded(entry, exported(entry, TORCHSCRIPT, True))
    wrong = [changed(network, kind, **values) for network in networks]
    with pytest.raises(AssertionError):
        assert_patches_equal(entry, entry.make(), wrong, volume)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("instance_norm", {"space": "yx"}),
        ("group_norm", {"groups": 1}),
        ("group_norm", {"space": ""}),
    ],
)
def test_a_norm_over_the_wrong_axes_is_found(name, values, exported, tmp_path, client):
    entry = zoo.BY_NAME[name]
    network = load(exported(entry, TORCHSCRIPT, True))
    volume = (
        np.random.default_rng(9).standard_normal((entry.channels, 40, 50, 60)).astype(np.float32)
    )
    want = by_monai(entry, volume, entry.size, overlap=0.5, mode="constant")
    options = {"overlap": 0.5, "weights": "constant"}
    right = patchwise(network, entry, volume, entry.size, tmp_path, client, **options)
    assert_close(right, want)
    (tmp_path / "wrong").mkdir()
    faulty = changed(network, layers.Normalize, **values)
    wrong = patchwise(faulty, entry, volume, entry.size, tmp_path / "wrong", client, **options)
    with pytest.raises(AssertionError):
        assert_close(wrong, want)


def test_windows_a_voxel_further_apart_are_found(exported, tmp_path, client, monkeypatch):
    entry = zoo.BY_NAME["instance_norm"]
    path = exported(entry, TORCHSCRIPT, True)
    volume = np.random.default_rng(9).standard_normal((1, 40, 50, 60)).astype(np.float32)
    want = by_monai(entry, volume, entry.size, overlap=0.5, mode="constant")
    further = tuple(n // 2 + 1 for n in entry.size)
    monkeypatch.setattr(windows.Patchwise, "interval", further)
    got = patchwise(path, entry, volume, entry.size, tmp_path, client)
    with pytest.raises(AssertionError):
        assert_close(got, want)


def test_the_zoo_is_what_it_says():
    assert len(ENTRIES) >= 100
    assert len(zoo.BY_NAME) == len(ENTRIES)
    assert all(zoo.BY_NAME[name].local for name in FAMILIES)
    assert {e.rank for e in ENTRIES} == {2, 3}
    assert any(e.name.startswith("monai_") and not e.local for e in ENTRIES)
