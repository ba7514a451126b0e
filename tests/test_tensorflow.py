"""Networks that TensorFlow's converters wrote equal TensorFlow: its answers lie beside them.

`data/tensorflow/make.py` says how they were made. Local networks are compared in patches, on a
volume of another size than the one that the file was exported for. Networks that are not local
are refused by the names of the layers that make them so, and are right for a window.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from test_identity import at_boxes, shorten_windows
from znni_dask.errors import NetworkError
from znni_dask.geometry import Box, triple
from znni_dask.importers.onnx import load
from znni_dask.network.field_of_view import geometry
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.patchwise import apply

FOLDER = Path(__file__).parent / "data" / "tensorflow"
PATCH = (3, 5, 6)  # of the answer

# networks that are not local, with what their refusal says
GLOBAL = {
    "instance_3d": r"moments/mean' \(reduce_mean, over zyx\).*moments/variance'",
    "instance_by_hand_3d": r"2 layers that reduce.*\(reduce_mean, over zyx\)",
    "group_3d": r"moments/mean' \(reduce_mean, over zyx\).*moments/variance'",
    "excited_3d": r"\(reduce_mean, over zyx\)",
    "excited_2d": r"\(reduce_mean, over yx\)",
    "classifier_2d": r"\(reduce_mean, over yx\)",
    "flattened_2d": r"MatMul.* \(Conv, over yx\)",
}
REFUSED = {
    "attention_2d": r"MatMul\): the product of two computed arrays \(attention\)",
    "cubic_2d": "mode=cubic is not supported",
    "grouped_convolution_2d": r"StatefulPartitionedCall\): .*TensorFlow",
    "normalised_by_place_2d": r"a constant of shape \[1, 12, 14, 4\] does not go by channels",
    "recurrent_3d": r"Loop\): operator not supported",
}
LOCAL = sorted({path.stem for path in FOLDER.glob("*.onnx")} - {*GLOBAL, *REFUSED})


def recorded(name):
    """The volume and TensorFlow's answers."""
    with np.load(FOLDER / f"{name}.npz") as held:
        shape = tuple(held["shape"].tolist())
        answers = [held[f"y{i}"] for i in range(len(held.files) - 1)]
    return np.random.default_rng(0).standard_normal(shape, np.float32), answers


def assert_close(got, want):
    assert got.shape == want.shape
    deviation = float(want.std())
    assert deviation > 1e-3
    assert np.abs(got - want).max() < 1e-4 * deviation


def in_patches(network, volume):
    """The answer for the whole volume, made in patches; of a sliding network at its strides."""
    size = Layout(network, volume.shape[1:], "valid").output_size
    starts = product(*(range(0, n, p) for n, p in zip(size, PATCH, strict=True)))
    boxes = [
        Box(triple(start), triple(a + p for a, p in zip(start, PATCH, strict=True))).clipped(size)
        for start in starts
    ]
    found = at_boxes(network, volume, "valid", boxes)
    if not geometry(network).dense:
        return found
    z, y, x = (int(step) for step in network.spacing[network.output])
    return found[:, ::z, ::y, ::x]


def assert_equal(name):
    volume, wants = recorded(name)
    network = load(FOLDER / f"{name}.onnx")
    for output, want in zip(network.outputs, wants, strict=True):
        assert_close(in_patches(simplify(network.only(output)), volume), want)


@pytest.mark.parametrize("name", LOCAL)
def test_patches_equal_tensorflow_on_the_whole_volume(name):
    assert_equal(name)


@pytest.mark.parametrize("name", GLOBAL)
def test_what_breaks_locality_is_named_and_windows_are_right(name):
    volume, (want,) = recorded(name)
    network = load(FOLDER / f"{name}.onnx")
    with pytest.raises(NetworkError, match=GLOBAL[name]):
        geometry(simplify(network))
    for given in (network, load(FOLDER / f"{name}.onnx", triple(volume.shape[1:]))):
        assert_close(apply(simplify(given), volume), want)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason(name):
    with pytest.raises(NetworkError) as found:
        load(FOLDER / f"{name}.onnx")
    assert re.search(REFUSED[name], str(found.value))


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("name", ["unet_3d", "residual_3d", "dilated_2d", "sliding_3d"])
def test_a_planted_halo_error_of_one_voxel_is_found(name, side, monkeypatch):
    shorten_windows(monkeypatch, side)
    with pytest.raises(AssertionError):
        assert_equal(name)


def test_the_folder_is_whole():
    networks, answers = ({p.stem for p in FOLDER.glob(f"*.{kind}")} for kind in ("onnx", "npz"))
    assert networks >= {*GLOBAL, *REFUSED}
    assert networks == answers
    assert len(LOCAL) >= 35
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1 << 20
