"""Kernels of single values and of values fetched from elsewhere: the CUDA source makes what the
same in numpy does."""

from __future__ import annotations

import numpy as np
import pytest

from znni_dask.kernels.cuda import pointwise, resampling
from znni_dask.network.layers import FUNCTIONS

SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 90.0, -90.0, 1e-20, -1e-20, 0.7, 1.1, 2.5, -3.5)


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "prelu"])
def test_functions_of_values(function, check, launch, check_compiles):
    kernel = pointwise.of_values(function)
    count = 2 * pointwise.PIECE + 77
    x = 3 * np.random.default_rng(0).standard_normal(count, np.float32)
    x[-len(SPECIAL) :] = SPECIAL
    for alpha, beta in ((0.7, 1.1), (-np.inf, 2.0), (3.0, np.inf)):
        out = np.full(count + 5, 0.5, np.float32)
        check(kernel, pointwise.blocks_of(count), 1, x, out, count, alpha, beta)
        assert (out[count:] == 0.5).all()
    there = x.copy()
    launch(kernel, pointwise.blocks_of(count), there, there, count, 3.0, np.inf)
    np.testing.assert_array_equal(there, out[:count])
    check_compiles(kernel)


@pytest.mark.parametrize("function", ["prelu", "affine"])
@pytest.mark.parametrize("voxels", [5, 2 * pointwise.PIECE + 77])
def test_functions_with_numbers_of_channels(function, voxels, check, check_compiles):
    kernel, random = pointwise.of_channels(function), np.random.default_rng(0)
    x = random.standard_normal((2, 3, voxels)).astype(np.float32)
    scale, shift = (random.standard_normal(3).astype(np.float32) for _ in range(2))
    pieces = pointwise.blocks_of(voxels)
    out = np.full_like(x, np.inf)
    check(kernel, 6 * pieces, 1, x, out, scale, shift, 3, voxels, pieces)
    check_compiles(kernel)


SIZES = [((3, 4, 5), (4, 3, 7)), ((2, 9, 60), (3, 50, 91))]


@pytest.mark.parametrize(("size", "made"), SIZES)
def test_values_are_fetched(size, made, check, check_compiles):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, *size)).astype(np.float32)
    out = np.full((2, 3, *made), np.nan, np.float32)
    index = [random.integers(-1, n, m) for n, m in zip(size, made, strict=True)]
    blocks, pieces = resampling.blocks_of(out)
    check(resampling.GATHER, blocks, 1, x, out, *index, *size, *made, pieces, -1.5)
    assert not np.isnan(out).any()
    check_compiles(resampling.GATHER)


@pytest.mark.parametrize(("size", "made"), SIZES)
def test_values_are_interpolated(size, made, check, check_compiles):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, *size)).astype(np.float32)
    out = np.full((2, 3, *made), np.nan, np.float32)
    places = [random.integers(0, n, 2 * m) for n, m in zip(size, made, strict=True)]
    weights = [random.random(m, np.float32) for m in made]
    blocks, pieces = resampling.blocks_of(out)
    check(resampling.INTERPOLATE, blocks, 1, x, out, *places, *weights, *size, *made, pieces)
    assert not np.isnan(out).any()
    check_compiles(resampling.INTERPOLATE)
