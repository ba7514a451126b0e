"""Direct convolution of few channels: what it takes, reads, prepares, is chosen for."""

from __future__ import annotations

import numpy as np
import pytest
from test_conv_fft_planes import cube, fastest, whole

from peaks import traced_peak
from test_primitives import expected, formed, plain, problem_of, weights_of
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv
from znni_dask.primitives import conv_direct_from_few
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_direct_from_few import ConvDirectFromFew

PRIMITIVE, ZERO = ConvDirectFromFew(), (0, 0, 0)


@pytest.mark.parametrize("edge", [66, 130])
@pytest.mark.parametrize(("kernel", "made"), [(2, 80), (3, 48)])
def test_first_layers_with_small_kernels_are_computed_so(kernel, made, edge):
    problem = whole(Conv(1, made, cube(kernel), relu=True), cube(edge))
    assert isinstance(fastest(problem), ConvDirectFromFew)


@pytest.mark.parametrize(
    "layer",
    [Conv(5, 8, cube(3)), Conv(1, 8, (1, 4, 7)), Conv(4, 8, cube(3), groups=2)],
    ids=["channels", "taps", "groups"],
)
def test_what_it_cannot_take_is_refused_with_a_reason(layer):
    assert "at most 4 channels and 25 taps of a plane, no groups" in PRIMITIVE.refusal(layer)


def computed(layer, size, box, rows=16, batch=1):
    """A box of the answer to a random input, and the oracle's."""
    random = np.random.default_rng(2)
    weights = weights_of(layer, random)
    x = random.standard_normal((batch, layer.in_channels, *size)).astype(np.float32)
    problem, parts = problem_of(layer, PRIMITIVE, batch, [layer.in_channels], size, box)
    given, out = formed(PRIMITIVE.forms(layer, ()), [x[(..., *parts)]], problem.output)
    with pytest.MonkeyPatch.context() as patch, Team(2) as team:
        patch.setattr(conv_direct_from_few, "ROWS_TOGETHER", rows)
        PRIMITIVE.apply(PRIMITIVE.prepare(layer, weights), problem, given, out, team)
    want = expected(layer, [x], weights)[(slice(None), slice(None), *box.slices)]
    return plain(out, problem.output), want


@pytest.mark.parametrize("width", [*range(1, 31), 64])
def test_rows_of_any_width_equal_the_oracle(width):
    layer = Conv(2, 20, (2, 1, 3), relu=True)
    got, want = computed(layer, (3, 2, width + 2), Box(ZERO, (2, 2, width)))
    assert (want == 0).any()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_any_number_of_rows_together_equals_the_oracle(rows):
    layer = Conv(3, 33, (3, 2, 2), (1, 2, 3), (2, 1, 2), ((0, 1, 2), (3, 0, 1)))
    made = tuple(layer.window(axis).size((8, 17, 20)[axis]) for axis in range(3))
    got, want = computed(layer, (8, 17, 20), Box(ZERO, made), rows, batch=2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_behind_padding_alone_there_is_the_bias():
    layer = Conv(1, 3, (2, 2, 2), padding=((4, 5, 6), (6, 5, 4)))
    got, want = computed(layer, (4, 4, 4), Box(ZERO, (13, 13, 13)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for corner in (got[..., :3, :4, :5], got[..., -5:, -4:, -3:]):
        assert np.ptp(corner, axis=(2, 3, 4)).max() == 0


@pytest.mark.parametrize("offset", [(1, 2, 3), (1, 2, 4), (2, 2, 3), (-1, 0, 0), (1, -2, 5)])
def test_outputs_may_begin_anywhere_in_the_input(offset):
    layer, made = Conv(1, 5, (2, 3, 2), bias=False), (4, 5, 6)
    x = np.random.default_rng(3).standard_normal((1, 1, 6, 9, 10)).astype(np.float32)
    weights = weights_of(layer, np.random.default_rng(4))
    problem = Problem(layer, (x.shape,), (1, 5, *made), (offset,), ZERO, x.shape[2:])
    given, out = formed(PRIMITIVE.forms(layer, ()), [x], problem.output)
    with Team(1) as team:
        PRIMITIVE.apply(PRIMITIVE.prepare(layer, weights), problem, given, out, team)
    around = np.pad(x, ((0, 0), (0, 0), (9, 9), (9, 9), (9, 9)))
    want = expected(layer, [around], weights)[
        (..., *(slice(9 + first, 9 + first + n) for first, n in zip(offset, made, strict=True)))
    ]
    np.testing.assert_allclose(plain(out, problem.output), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("box", "copied"), [((0, 20), 22), ((1, 19), 0)])
def test_the_volume_is_copied_only_where_padding_reaches(box, copied):
    padded = Conv(2, 8, cube(3), padding=(cube(1),) * 2)
    start, stop = map(cube, box)
    problem, _ = problem_of(padded, PRIMITIVE, 1, [2], cube(20), Box(start, stop))
    x = np.ones(problem.inputs[0], np.float32)
    given, out = formed(PRIMITIVE.forms(padded, ()), [x], problem.output)
    weights = weights_of(padded, np.random.default_rng(4))
    with Team(1) as team:
        PRIMITIVE.apply(PRIMITIVE.prepare(padded, weights), problem, given, out, team)
        assert team.scratch_bytes == 2 * copied**3 * 4 <= PRIMITIVE.workspace_bytes(problem, 1)


def test_what_is_prepared_takes_the_memory_that_is_predicted():
    layer = Conv(4, 90, (9, 5, 5))
    weights = weights_of(layer, np.random.default_rng(0))
    kept = sum(array.nbytes for array in PRIMITIVE.prepare(layer, weights))
    peak = traced_peak(lambda: PRIMITIVE.prepare(layer, weights))
    assert kept >= sum(w.nbytes for w in weights.values())
    assert kept <= peak <= PRIMITIVE.prepared_bytes(layer) + (16 << 10) <= 2 * kept
