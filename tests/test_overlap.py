"""Kernels for map_overlap: exact at every face, refused where map_overlap cannot be."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from test_application import two_headed
from test_volume import same_size, volume_for

import graphs
import znni_dask
from test_identity import assert_same, at_once
from znni_dask.errors import NetworkError, OptionError, RunError, VolumeError
from znni_dask.network.build import Builder

SIZE = (48, 50, 54)


def overlapped(source, network, **options):
    kernel = znni_dask.overlap_kernel(source, network, **options)
    return da.map_overlap(kernel, source, **kernel.arguments)


@pytest.mark.parametrize(
    ("family", "seed", "boundary", "chunks"),
    [
        ("unet", 0, "reflect", (24, 25, 27)),
        ("unet", 1, "constant", (24, 25, 54)),
        ("chain", 0, "nearest", (24, 25, 27)),
        ("residual", 1, "reflect", (16, 17, 18)),
        ("flat", 0, "reflect", (6, 25, 27)),
        ("even", 0, "constant", (20, 20, 20)),
        ("even", 0, "reflect", (48, 50, 54)),
    ],
)
def test_map_overlap_gives_the_answer_at_the_faces_too(family, seed, boundary, chunks):
    network = graphs.graph(family, seed)
    values = volume_for(network, SIZE)
    source = da.from_array(values, chunks=(-1, *chunks))
    answer = overlapped(source, network, boundary=boundary)
    want = at_once(network, values, boundary)
    assert (answer.shape, answer.dtype, answer.chunks[1:]) == (
        want.shape,
        np.float32,
        source.chunks[1:],
    )
    assert_same(answer.compute(), want)


def test_a_depth_is_told_for_each_side_and_is_no_larger_than_it_must_be():
    """A dense network of even windows sees further ahead than behind, a U-Net whole cells."""
    b = Builder(1)
    source = da.zeros((40, 40, 40), chunks=(20, 20, 40), dtype=np.uint8)
    kernel = znni_dask.overlap_kernel(source, b.network(b.conv(b.input, 1, (2, 4, 6))))
    assert kernel.depth == {0: (0, 1), 1: (1, 2), 2: (0, 0)}
    b = Builder(1)
    x = b.conv(b.max_pool(b.conv(b.input, 1, 3, padding="same"), 4), 1, 1)
    kernel = znni_dask.overlap_kernel(source, b.network(b.resize(x, 4)))
    assert kernel.depth == {0: (4, 4), 1: (4, 4), 2: (0, 0)}


def test_a_kernel_whose_depth_is_too_small_says_so():
    network = same_size()
    source = da.from_array(volume_for(network)[0], chunks=16)
    kernel = znni_dask.overlap_kernel(source, network)
    assert kernel.depth == {0: (1, 1), 1: (1, 1), 2: (1, 1)}
    arguments = {**kernel.arguments, "depth": {**kernel.depth, 2: (1, 0)}}
    short = znni_dask.OverlapKernel(arguments["depth"], arguments)
    with pytest.raises(RunError, match=r"was not handed \d+ of the values"):
        da.map_overlap(short, source, **arguments).compute()


@pytest.mark.parametrize(
    ("axes", "out"), [("tzyx", "tczyx"), ("yzxc", "yzxc"), ("yx", "cyx"), ("cyx", "cyx")]
)
def test_axes_stay_in_their_order(axes, out):
    network = graphs.scaled(same_size(2 if "c" in axes else 1))
    lengths = {"t": 3, "c": network.in_channels, "z": 9, "y": 20, "x": 23}
    values = np.random.default_rng(1).standard_normal([lengths[a] for a in axes])
    chunks = [{"t": 2, "c": -1}.get(a, 9) for a in axes]
    source = da.from_array(values.astype(np.float32), chunks=chunks)
    kept = source.rechunk({axes.index("y"): 10, axes.index("x"): 12})
    answer = overlapped(kept, network, axes=axes)
    want = znni_dask.infer(source, network, axes=axes).compute()
    assert answer.shape == want.shape
    np.testing.assert_allclose(answer.compute(), want, rtol=1e-4, atol=1e-5)
    assert len(out) == want.ndim


def test_one_output_of_several():
    network = two_headed()
    values = volume_for(network, SIZE)
    source = da.from_array(values[0], chunks=25)
    source = source.rechunk((24, 25, 27))
    answer = overlapped(source, network, output="flows/0")
    assert_same(answer.compute(), at_once(network.only("flows/0"), values, "reflect"))
    with pytest.raises(OptionError, match=r"choose one output of mask, flows/0, deep"):
        overlapped(source, network)
    with pytest.raises(NetworkError, match=r"2, 2, 2 voxels apart.*use infer"):
        overlapped(source, network, output="deep")


def test_nan_is_replaced_or_told_with_its_place():
    network = same_size()
    values = volume_for(network)[0]
    values[20, 30, 7] = np.inf
    source = da.from_array(values, chunks=(15, 20, 21))
    with pytest.raises(RunError, match=r"inf at z, y, x = \[20, 30, 7\]"):
        overlapped(source, network).compute()
    got = overlapped(source, network, nan=0.0).compute()
    want = at_once(network, np.nan_to_num(values, posinf=0)[None], "reflect")
    assert_same(got, want)


@pytest.mark.parametrize(
    ("array", "options", "error", "message"),
    [
        (da.zeros((40,) * 3, chunks=20), {"boundary": "valid"}, NetworkError, "use infer"),
        (da.zeros((40,) * 3, chunks=((8, 32), 40, 40)), {}, VolumeError, "chunks along z are"),
        (da.zeros((41,) * 3, chunks=((40, 1), 41, 41)), {}, VolumeError, "thinner than the depth"),
        (da.zeros((2, 9, 9, 9), chunks=(1, 9, 9, 9)), {}, VolumeError, r"rechunk\(\{0: -1\}\)"),
        (np.zeros((9, 9, 9)), {}, VolumeError, "numpy.ndarray: wrap it"),
        (xr.DataArray(da.zeros((9, 9)), dims=["y", "x"]), {}, VolumeError, "give its data"),
        (da.zeros((9, 9, 9)), {"nan": np.nan}, OptionError, "nan=nan"),
        (da.zeros((9, 9, 9)), {"axes": "zy"}, VolumeError, "axes 'zy' are named"),
        (da.zeros((9, 9, 9)), {"output": "none"}, NetworkError, "no output 'none'"),
    ],
)
def test_what_map_overlap_cannot_give_is_refused_with_the_remedy(array, options, error, message):
    b = Builder(array.shape[0] if array.ndim == 4 else 1)
    network = b.network(b.conv(b.input, 1, 5))
    with pytest.raises(error, match=message):
        znni_dask.overlap_kernel(array, network, **options)
