"""What GPU primitives make does not depend on how much of it they make at once, nor on what lies
around what they look at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_gpu_primitives import CASES, check_boxes, on

from test_primitives import LAYERS, SIZE, cut, expected, inputs_of, problem_of, weights_of
from znni_dask.geometry import Box, volume
from znni_dask.primitives.base import GPU
from znni_dask.primitives.gpu import (
    conv_cudnn,
    conv_direct,
    conv_fft_whole,
    conv_transpose_direct,
    reducing,
)
from znni_dask.primitives.gpu.pieces import piece_count, piece_of, pieces, reached
from znni_dask.primitives.table import named

BOUNDS = {
    "direct": (conv_direct, "PIECE_BYTES"),
    "whole fft": (conv_fft_whole, "PIECE_BYTES"),
    "cudnn": (conv_cudnn, "SLAB_BYTES"),
    "direct transposed": (conv_transpose_direct, "PIECE_BYTES"),
    "reduction": (reducing, "PIECE_BYTES"),
    "normalisation": (reducing, "PIECE_BYTES"),
    "pointwise": (reducing, "PIECE_BYTES"),
}
FEW = ("conv odd padding", "conv strided dilated", "conv grouped", "conv without bias")
IN_PIECES = [
    (label, name)
    for label, name in CASES
    if name in BOUNDS
    if label in FEW
    or not (label.startswith(("conv", "whole")) or name == "pointwise")
    or "softmax" in label
]


@pytest.mark.parametrize("nbytes", [8_000, 40_000])
@pytest.mark.parametrize(("label", "name"), IN_PIECES)
def test_pieces_of_any_size_are_the_same(label, name, nbytes, monkeypatch, device):
    monkeypatch.setattr(*BOUNDS[name], nbytes)
    monkeypatch.setattr(conv_direct, "SUMMED", nbytes // 500)
    monkeypatch.setattr(conv_fft_whole, "BLOCK_BYTES", 100 * nbytes)
    check_boxes(device, label, name, SIZE)


LOCAL = [
    (label, name)
    for label, name in CASES
    if not any(LAYERS[label][0].window(axis).whole for axis in range(3))
]


@pytest.mark.parametrize(("label", "name"), LOCAL)
def test_inputs_may_be_larger_than_what_is_looked_at(label, name, device):
    layer, count = LAYERS[label]
    primitive, random = named(name, layer, GPU), np.random.default_rng(6)
    channels, arrays = inputs_of(layer, count, random)
    weights = weights_of(layer, random)
    box = Box((1, 2, 3), (2, 4, 9))
    problem, parts = problem_of(layer, primitive, 2, channels, SIZE, box)
    wider, offset = [], []
    for axis, part in enumerate(parts):
        first, last = max(0, part.start - 1), min(SIZE[axis], part.stop + 2)
        more = (part.start - first) * layer.window(axis).up
        wider.append(slice(first, last))
        offset.append(problem.offsets[0][axis] + more)
    given = [np.ascontiguousarray(cut(a, wider)) for a in arrays]
    shapes = tuple(a.shape for a in given)
    problem = replace(problem, inputs=shapes, offsets=(tuple(offset),) * count)
    made = on(device, primitive, primitive.placed(layer, weights, device), problem, given)
    moves = list(np.ndindex(*primitive.fragments_of(layer)))
    for got, move in zip(made.reshape(len(moves), 2, *made.shape[1:]), moves, strict=True):
        want = expected(layer, arrays, weights, move)
        here = want[(slice(None), slice(None), *box.slices)]
        np.testing.assert_allclose(got, here, rtol=1e-5, atol=2e-5 * max(1, want.std()))


@pytest.mark.parametrize("voxels", [1, 4, 7, 20, 35, 70, 1000])
def test_pieces_cover_a_box_once(voxels):
    size = (4, 5, 7)
    found, boxes = np.zeros(size, int), list(pieces(size, voxels))
    for box in boxes:
        found[box.slices] += 1
        assert box.voxels <= volume(piece_of(size, voxels)) <= voxels
    assert (found == 1).all()
    assert len(boxes) == piece_count(size, voxels)


@pytest.mark.parametrize("first", range(-9, 12))
@pytest.mark.parametrize("step", [1, 3])
def test_places_that_are_reached(first, step):
    places = first + step * np.arange(5)
    inside = (places >= 0) & (places < 7)
    which, where = reached(first, step, 5, 7)
    np.testing.assert_array_equal(np.arange(5)[which], np.flatnonzero(inside))
    np.testing.assert_array_equal(np.arange(7)[where], places[inside])
