"""Convolution of few channels by transforms of planes: what it takes, prepares, is chosen for."""

from __future__ import annotations

import numpy as np
import pytest

from peaks import traced_peak
from test_primitives import expected, formed, forms_of, plain, problem_of, weights_of
from znni_dask.choices import tiled
from znni_dask.costs import Costs
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv
from znni_dask.primitives import conv_fft_planes
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_fft_planes import ConvPlanesFFT
from znni_dask.primitives.table import candidates, named

ZERO = (0, 0, 0)


def cube(edge):
    return (edge, edge, edge)


def whole(layer, size):
    """The problem of a layer on a volume of a size."""
    made = tuple(layer.window(axis).size(size[axis]) for axis in range(3))
    shapes = (1, layer.in_channels, *size), (1, layer.out_channels, *made)
    return Problem(layer, shapes[:1], shapes[1], (ZERO,), ZERO, size)


def fastest(problem):
    options = [*candidates(problem.layer), *tiled(problem)]
    return min(options, key=lambda option: Costs().step_seconds(option, problem, 1))


@pytest.mark.parametrize("edge", [66, 130])
@pytest.mark.parametrize("kernel", [4, 5, 6, 8])
def test_first_layers_are_computed_in_planes(kernel, edge):
    problem = whole(Conv(1, 80, cube(kernel), relu=True), cube(edge))
    assert isinstance(fastest(problem), ConvPlanesFFT)


def test_short_sums_and_many_channels_are_left_to_others():
    primitive = ConvPlanesFFT((16, 16))
    assert "27 products" in primitive.refusal(Conv(3, 80, cube(2)))
    assert "not 17" in primitive.refusal(Conv(17, 80, cube(3)))
    assert not any(
        isinstance(option, ConvPlanesFFT)
        for option in tiled(whole(Conv(17, 80, cube(3)), cube(40)))
    )


@pytest.mark.parametrize(
    ("layer", "tile", "word"),
    [
        (Conv(1, 8, cube(3), (1, 2, 1)), (16, 16), "stride"),
        (Conv(4, 8, cube(3), groups=2), (16, 16), "groups"),
        (Conv(1, 8, cube(9)), (8, 16), "smaller than the kernel"),
        (Conv(1, 8, cube(3)), (16, 32), "30 voxels along x"),
        (Conv(1, 8, cube(3)), (16, 15), "even"),
        (Conv(1, 8, cube(3)), (17, 16), "17"),
    ],
)
def test_what_it_cannot_take_is_refused_with_a_reason(layer, tile, word):
    assert word in ConvPlanesFFT(tile).refusal(layer)


def test_its_name_says_its_tile():
    layer = Conv(1, 8, cube(11))
    primitive = named("fft of planes 24·16", layer)
    assert primitive == ConvPlanesFFT((24, 16))
    assert primitive.name == "fft of planes 24·16"
    for other in ("fft of planes 24", "fft of planes 8·8", "tiled fft 24·16", "fft of planes a·b"):
        with pytest.raises(KeyError):
            named(other, layer)


def test_what_is_prepared_takes_the_memory_that_is_predicted():
    layer, primitive = Conv(2, 40, cube(7)), ConvPlanesFFT((24, 24))
    weights = weights_of(layer, np.random.default_rng(0))
    kept = sum(array.nbytes for array in primitive.prepare(layer, weights))
    peak = traced_peak(lambda: primitive.prepare(layer, weights))
    assert kept >= 2 * 7 * 48 * 24 * 13 * 8
    assert kept <= peak <= primitive.prepared_bytes(layer) + (16 << 10) <= 2 * kept


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("near", "turns"), [(1, 1), (1 << 13, 1), (1 << 16, 40), (1 << 30, 1)])
def test_batches_of_any_size_equal_the_oracle(near, turns, threads, monkeypatch):
    padding = ((1, 2, 0), (3, 1, 4))
    layer = Conv(2, 20, (3, 4, 5), dilation=(2, 1, 1), padding=padding, relu=True)
    primitive, random = ConvPlanesFFT((10, 12)), np.random.default_rng(1)
    size, weights = (15, 21, 18), weights_of(layer, random)
    x = random.standard_normal((2, 2, *size)).astype(np.float32)
    made = tuple(layer.window(axis).size(size[axis]) for axis in range(3))
    problem, _ = problem_of(layer, primitive, 2, [2], size, Box(ZERO, made))
    (forms,) = forms_of(primitive, layer, [2])
    given, out = formed(forms, [x], problem.output)
    monkeypatch.setattr(conv_fft_planes, "SPECTRA_BYTES", near)
    monkeypatch.setattr(conv_fft_planes, "TURNS", turns)
    with Team(threads) as team:
        primitive.apply(primitive.prepare(layer, weights), problem, given, out, team)
    want = expected(layer, [x], weights)
    assert (want == 0).any()
    np.testing.assert_allclose(plain(out, problem.output), want, rtol=1e-5, atol=1e-4)


def test_spectra_of_a_large_volume_are_never_all_there():
    problem = whole(Conv(1, 80, cube(4)), cube(500))
    assert ConvPlanesFFT((16, 16)).workspace_bytes(problem, 2) < 4 * 500**3 / 10
