"""Outputs as other programs open them: by ome-zarr, as napari does, and by plain zarr, as
neuroglancer does."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from test_run import ome_volume

import graphs
import znni_dask
from test_identity import assert_same, at_once

# codecs that neuroglancer decodes
CODECS = {"0.4": {"blosc", "gzip", "zlib", "zstd"}, "0.5": {"bytes", "zstd", "crc32c"}}


@pytest.fixture(scope="module", params=["0.4", "0.5"])
def made(request, tmp_path_factory, client):
    """A valid network's answer, of anisotropic voxels that lie away from the origin."""
    folder, network = tmp_path_factory.mktemp("elsewhere"), graphs.graph("chain", 0)
    values = ome_volume(folder / "in.zarr", size=(36, 60, 66), channels=network.in_channels)
    znni_dask.run(
        network,
        folder / "in.zarr",
        folder / "out.zarr",
        boundary="valid",
        ome=request.param,
        chunks=16,
        memory="4GiB",
        client=client,
    )
    low = np.array([axis.halo[0] for axis in znni_dask.geometry(network).axes])
    scale = np.array([3.0, 0.5, 0.5])
    first = np.array([30.0, 1.0, 2.0]) + low * scale
    return request.param, folder / "out.zarr", at_once(network, values, "valid"), scale, first


def places(scale, first, count):
    """Scale and first centre of every level: of voxels of 3·0.5·0.5 only y and x are halved."""
    for _ in range(count):
        yield scale, first
        first = first + scale * [0, 0.5, 0.5]
        scale = scale * [1, 2, 2]


def test_ome_zarr_reads_levels_places_and_values(made):
    _, path, want, scale, first = made
    (node,) = [n for n in Reader(parse_url(str(path)))() if "axes" in n.metadata]
    axes = node.metadata["axes"]
    assert [axis["name"] for axis in axes] == ["c", "z", "y", "x"]
    assert [axis.get("unit") for axis in axes] == [None, *["micrometer"] * 3]
    assert len(node.data) > 1
    assert_same(np.asarray(node.data[0]), want)
    changes = node.metadata["coordinateTransformations"]
    for (one, at), change in zip(places(scale, first, len(node.data)), changes, strict=True):
        assert change[0] == {"type": "scale", "scale": [1, *one]}
        assert change[1] == {"type": "translation", "translation": [0, *at]}
    for finer, coarser in zip(node.data[:-1], node.data[1:], strict=True):
        assert coarser.shape == (*finer.shape[:2], *(-(-n // 2) for n in finer.shape[2:]))
        whole = np.asarray(finer)[..., : finer.shape[2] // 2 * 2, : finer.shape[3] // 2 * 2]
        c, z, y, x = whole.shape
        means = whole.reshape(c, z, y // 2, 2, x // 2, 2).mean(axis=(3, 5))
        got = np.asarray(coarser)[..., : y // 2, : x // 2]
        np.testing.assert_allclose(got, means, rtol=1e-4, atol=1e-5)


def test_plain_zarr_finds_arrays_with_names_and_codecs_that_viewers_know(made):
    version, path, want, *_ = made
    group = zarr.open_group(str(path), mode="r")
    assert group.metadata.zarr_format == {"0.4": 2, "0.5": 3}[version]
    for _, array in group.arrays():
        assert set(codecs_of(array)) <= CODECS[version]
        if version == "0.4":
            assert array.metadata.dimension_separator == "/"
            assert array.attrs["_ARRAY_DIMENSIONS"] == ["c", "z", "y", "x"]
        else:
            assert array.metadata.dimension_names == ("c", "z", "y", "x")
    assert_same(group["0"][:], want)


def codecs_of(array):
    if array.metadata.zarr_format == 2:
        return [array.metadata.compressor.codec_id]
    return [codec.to_dict()["name"] for codec in array.metadata.codecs]
