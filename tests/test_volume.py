"""Lazy answers to dask arrays, DataArrays and paths: the right values, in the right place."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from test_application import two_headed
from test_patchwise import WINDOW, blended, classifier, normalised

import graphs
import oracle
import znni_dask
import znni_dask.xarray  # registers .znni
from test_identity import assert_same, at_once
from znni_dask.errors import NetworkError, OptionError, RunError, VolumeError
from znni_dask.network.build import Builder

SIZE = (30, 37, 42)


def volume_for(network, size=SIZE, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((network.in_channels, *size)).astype(np.float32)


def same_size(channels=1, seed=0):
    b = Builder(channels, seed)
    return graphs.scaled(b.network(b.conv(b.input, 2, 3, padding="same")))


@pytest.mark.parametrize(
    ("family", "seed", "boundary", "chunks"),
    [
        ("unet", 0, "reflect", 16),
        ("unet", 1, "valid", (7, 9, 40)),
        ("chain", 0, "nearest", 16),
        ("chain", 1, "valid", 11),
        ("valid_unet", 0, "reflect", 13),
        ("residual", 0, "constant", (30, 5, 42)),
        ("strided", 0, "reflect", 4),
        ("strided", 1, "valid", 3),
        ("finer", 0, "nearest", 30),
        ("flat", 0, "reflect", (1, 20, 16)),
    ],
)
def test_answers_equal_the_oracle(family, seed, boundary, chunks):
    """The source's chunks are irregular, some a single voxel thick, channels apart."""
    network = graphs.graph(family, seed)
    values = volume_for(network)
    source = da.from_array(values, chunks=(1, (16, 1, 13), (5, 32), 14))
    answer = znni_dask.infer(source, network, boundary=boundary, chunks=chunks)
    want = at_once(network, values, boundary)
    assert (answer.shape, answer.dtype) == (want.shape, np.float32)
    assert answer.blocks.size > 1
    got = answer.compute()
    assert_same(got, want)
    z, y, x = (slice(n // 3, n // 3 + 2) for n in want.shape[1:])
    np.testing.assert_array_equal(answer[:, z, y, x].compute(), got[:, z, y, x])


def test_the_answer_is_that_of_a_run_in_the_same_blocks(tmp_path, client):
    network = graphs.graph("unet", 2)
    values = volume_for(network)[0]
    np.save(tmp_path / "in.npy", values)
    znni_dask.run(network, tmp_path / "in.npy", tmp_path / "out.zarr", chunks=16, client=client)
    stored = zarr.open_array(str(tmp_path / "out.zarr" / "0"), mode="r")[...]
    answer = znni_dask.infer(da.from_array(values, chunks=10), network, chunks=16)
    assert_same(answer.compute(), stored)
    lazy = znni_dask.infer(str(tmp_path / "in.npy"), network, chunks=16)
    assert_same(lazy.values, stored)


def test_a_halo_that_is_read_one_voxel_wrong_is_found(monkeypatch):
    """What the tests above rest on: chunks at a wrong place show."""
    network = graphs.graph("unet", 0)
    values = volume_for(network)
    want = at_once(network, values, "reflect")
    honest = znni_dask.lazy.Pieces.__init__

    def shifted(self, shape, dtype, found):
        moved = [(c, s, np.roll(a, 1, -1) if c[-1] else a) for c, s, a in found]
        honest(self, shape, dtype, moved)

    monkeypatch.setattr(znni_dask.lazy.Pieces, "__init__", shifted)
    answer = znni_dask.infer(da.from_array(values, chunks=16), network, chunks=16)
    with pytest.raises(AssertionError):
        assert_same(answer.compute(), want)


def test_windows_equal_the_oracle():
    network = normalised()
    values = volume_for(network)
    want = blended(network, values, WINDOW, 0.25, "gaussian")
    source = da.from_array(values, chunks=12)
    options = {"patchwise": WINDOW, "overlap": 0.25, "weights": "gaussian"}
    answer = znni_dask.infer(source, network, chunks=(16, 16, 20), **options)
    assert answer.blocks.size > 1
    assert_same(answer.compute(), want)
    with pytest.raises(NetworkError, match="not local"):
        znni_dask.infer(source, network)


def test_a_classifier_makes_one_vector_a_window():
    network = classifier()
    values = volume_for(network)
    source = da.from_array(values, chunks=12)
    options = {"patchwise": 8, "step": 4, "boundary": "valid"}
    answer = znni_dask.infer(source, network, chunks=3, **options)
    assert answer.shape == (3, 6, 8, 9)
    want = oracle.whole(network, values[:, 12:20, 4:12, 8:16])[:, 0, 0, 0]
    np.testing.assert_allclose(answer[:, 3, 1, 2].compute(), want, rtol=1e-5)
    centres = znni_dask.infer(labelled(values[0]), network, **options).z
    np.testing.assert_allclose(centres, 100 + 40 * (3 + 4 * np.arange(6)))


@pytest.mark.parametrize(
    ("axes", "out"), [("tzyx", "tczyx"), ("yzxc", "yzxc"), ("tcyx", "tcyx"), ("yx", "cyx")]
)
def test_axes_stay_in_their_order(axes, out):
    """Times are volumes of their own; channels go before space where the source has none."""
    network = graphs.scaled(same_size(2 if "c" in axes else 1))
    lengths = {"t": 3, "c": network.in_channels, "z": 9, "y": 20, "x": 23}
    values = np.random.default_rng(1).standard_normal([lengths[a] for a in axes])
    source = da.from_array(values.astype(np.float32), chunks=[2 if a == "t" else 7 for a in axes])
    answer = znni_dask.infer(source, network, axes=axes, chunks=8)
    assert answer.ndim == len(out)
    got = answer.compute().transpose([out.index(a) for a in "tczyx" if a in out])
    whole = values.transpose([axes.index(a) for a in "tczyx" if a in axes])
    missing = {"t": 0, "c": 1, "z": 2}
    for axis, place in missing.items():
        whole = whole if axis in axes else np.expand_dims(whole, place)
        got = got if axis in out else np.expand_dims(got, place)
    for time in range(len(whole)):
        assert_same(got[time], at_once(network, whole[time].astype(np.float32), "reflect"))


@pytest.mark.parametrize("chosen", [(2,), (3, 0)])
def test_channels_are_chosen(chosen):
    network = same_size(len(chosen))
    values = np.random.default_rng(2).standard_normal((4, 12, 13, 14)).astype(np.float32)
    source = da.from_array(values, chunks=(1, 6, 6, 14))
    with pytest.raises(NetworkError, match=f"takes {len(chosen)} channels"):
        znni_dask.infer(source, network)
    answer = znni_dask.infer(source, network, channels=chosen, chunks=7)
    assert_same(answer.compute(), at_once(network, values[list(chosen)], "reflect"))


def test_several_outputs_are_a_dict_of_arrays_each_on_its_grid():
    network = two_headed()
    values = volume_for(network)
    answers = znni_dask.infer(da.from_array(values[0], chunks=20), network, chunks=16)
    assert {name: answer.shape for name, answer in answers.items()} == {
        "mask": (30, 37, 42),
        "flows/0": (2, 30, 37, 42),
        "deep": (3, 15, 19, 21),
    }
    for name, got in dask.compute(answers)[0].items():
        want = at_once(network.only(name), values, "reflect")
        assert_same(got.reshape(want.shape), want)
    one = znni_dask.infer(da.from_array(values[0], chunks=20), network, outputs="deep", chunks=16)
    assert one.shape == (3, 15, 19, 21)
    names = ["flows/0", "mask"]
    some = znni_dask.infer(da.from_array(values[0], chunks=20), network, outputs=names, chunks=16)
    assert list(some) == names
    np.testing.assert_array_equal(some["mask"].compute(), answers["mask"].compute())
    with pytest.raises(NetworkError, match="no output 'none': it has mask"):
        znni_dask.infer(da.from_array(values[0]), network, outputs="none")


def labelled(values, dims="zyx", chunks=16):
    made = xr.DataArray(
        da.from_array(values, chunks=chunks),
        dims=list(dims),
        name="raw",
        attrs={"microscope": "EM"},
        coords={
            "z": ("z", 100.0 + 40 * np.arange(values.shape[dims.index("z")]), {"units": "nm"}),
            "x": ("x", 4 * np.arange(values.shape[dims.index("x")])),
            "section": ("z", [f"s{i}" for i in range(values.shape[dims.index("z")])]),
            "specimen": 7,
        },
    )
    made.encoding["chunks"] = (5, 5, 5)
    return made


def test_dataarrays_keep_dimensions_coordinates_attributes_and_name():
    network = same_size()
    values = volume_for(network)[0]
    source = labelled(values)
    answer = source.znni.infer(network, chunks=16)
    assert answer.dims == ("c", "z", "y", "x")
    assert isinstance(answer.data, da.Array)
    assert_same(answer.values, at_once(network, values[None], "reflect"))
    assert (answer.name, answer.attrs, answer.encoding) == ("raw", {"microscope": "EM"}, {})
    xr.testing.assert_identical(answer.coords.to_dataset(), source.coords.to_dataset())
    assert source.transpose("x", "z", "y").znni.infer(network).dims == ("c", "x", "z", "y")


def test_coordinates_of_a_valid_answer_are_those_of_its_voxels():
    b = Builder(1, seed=1)
    network = graphs.scaled(b.network(b.conv(b.input, 1, (3, 5, 2))))
    values = volume_for(network)[0]
    source = labelled(values)
    answer = znni_dask.infer(source, network, boundary="valid")
    assert answer.dims == ("z", "y", "x")
    assert answer.shape == (28, 33, 41)
    np.testing.assert_array_equal(answer.z, source.z[1:-1])
    np.testing.assert_array_equal(answer.section, source.section[1:-1])
    assert answer.z.attrs == {"units": "nm"}
    assert "y" not in answer.coords
    np.testing.assert_array_equal(answer.x, source.x[:-1])  # of 2 voxels behind, the first
    one = source.isel(z=slice(0, 3), y=slice(0, 5), x=slice(0, 2))
    assert_same_voxel(znni_dask.infer(one, network, boundary="valid"), answer)


def assert_same_voxel(one, many):
    here = many.sel(z=one.z, x=one.x).isel(y=slice(0, 1))
    np.testing.assert_allclose(one.values, here.values, rtol=1e-5)


def test_coordinates_of_a_coarser_and_a_finer_answer_are_at_voxel_centres():
    """A cell of 2 voxels has its centre between them; half a voxel before the first is outside."""
    b = Builder(1, seed=1)
    coarse = b.network(b.average_pool(b.conv(b.input, 1, 3, padding="same"), 2))
    source = labelled(volume_for(coarse)[0])
    answer = znni_dask.infer(source, coarse, chunks=8)
    np.testing.assert_allclose(answer.z, 100 + 40 * (0.5 + 2 * np.arange(15)))
    np.testing.assert_allclose(answer.x, 4 * (0.5 + 2 * np.arange(21)))
    assert "section" not in answer.coords  # names cannot be interpolated
    b = Builder(1, seed=1)
    fine = b.network(b.resize(b.conv(b.input, 1, 3, padding="same"), 2))
    answer = znni_dask.infer(source, fine)
    np.testing.assert_allclose(answer.x, 4 * (-0.25 + 0.5 * np.arange(84)))


def test_dimensions_of_other_names_are_told_by_axes():
    network = same_size()
    values = volume_for(network)[0]
    source = xr.DataArray(da.from_array(values, chunks=20), dims=["plane", "row", "column"])
    with pytest.raises(VolumeError, match=r"dimensions plane, row, column: name them.*axes="):
        znni_dask.infer(source, network)
    answer = znni_dask.infer(source, network, axes="zyx")
    assert answer.dims == ("c", "plane", "row", "column")


def test_channels_and_what_lies_along_them():
    network = same_size(2)
    values = volume_for(network)
    source = xr.DataArray(
        da.from_array(values, chunks=20),
        dims=["c", "z", "y", "x"],
        coords={"c": ["DAPI", "GFP"], "offset": (("c", "z"), np.zeros((2, 30)))},
    )
    answer = znni_dask.infer(source, network)
    assert not answer.coords
    assert_same(answer.values, at_once(network, values, "reflect"))


def test_several_outputs_of_a_dataarray_are_dataarrays_by_name():
    network = two_headed()
    answers = znni_dask.infer(labelled(volume_for(network)[0]), network)
    assert {n: (a.name, a.dims) for n, a in answers.items()} == {
        "mask": ("mask", ("z", "y", "x")),
        "flows/0": ("flows/0", ("c", "z", "y", "x")),
        "deep": ("deep", ("c", "z", "y", "x")),
    }
    assert answers["deep"].x.size == 21


def test_a_path_gives_a_dataarray_with_scale_and_units(tmp_path):
    network = graphs.graph("strided", 0)
    values = volume_for(network)
    group = zarr.create_group(str(tmp_path / "raw.zarr"), zarr_format=3)
    group.create_array("0", data=values[0], chunks=(16, 16, 16))
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    changes = [
        {"type": "scale", "scale": [40.0, 4.0, 4.0]},
        {"type": "translation", "translation": [0.0, 100.0, 0.0]},
    ]
    datasets = [{"path": "0", "coordinateTransformations": changes}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    answer = znni_dask.infer(tmp_path / "raw.zarr", network, chunks=6)
    assert_same(answer.values, at_once(network, values, "reflect"))
    assert answer.dims == ("c", "z", "y", "x")
    steps = [float(answer[a][1] - answer[a][0]) for a in "zyx"]
    assert steps == [80.0, 16.0, 16.0]
    assert answer.y.attrs == {"units": "nanometer"}
    moved = znni_dask.infer(labelled(values[0]), network)  # the same grid by another way
    np.testing.assert_allclose((moved.z - 100) / 40, answer.z / 40)


def test_nan_is_replaced_or_told_with_its_place():
    network = same_size()
    values = volume_for(network)[0]
    values[20, 30, 7] = np.nan
    source = da.from_array(values, chunks=10)
    answer = znni_dask.infer(source, network, chunks=16)
    assert np.isfinite(answer[:, :10].compute()).all()
    with pytest.raises(RunError, match=r"nan at z, y, x = \[20, 30, 7\]"):
        answer.compute()
    whole = np.nan_to_num(values, nan=2.0)[None]
    got = znni_dask.infer(source, network, chunks=16, nan=2.0).compute()
    assert_same(got, at_once(network, whole, "reflect"))
    with pytest.raises(OptionError, match="nan=inf"):
        znni_dask.infer(source, network, nan=np.inf)


def test_integers_of_every_type_are_taken():
    network = same_size()
    values = np.random.default_rng(0).integers(0, 50, SIZE)
    want = at_once(network, values[None].astype(np.float32), "reflect")
    for dtype in ("uint8", "int16", "uint32", "int64", "float16", "float64", ">f4"):
        source = da.from_array(values.astype(dtype), chunks=20)
        assert_same(znni_dask.infer(source, network, chunks=16).compute(), want)


NETWORK = same_size()


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.zeros((9, 9, 9)), r"numpy.ndarray: wrap it, dask.array.from_array"),
        (xr.DataArray(np.zeros((9, 9, 9)), dims=list("zyx")), r"chunk it first, volume.chunk"),
        (xr.Dataset({"raw": ("x", np.zeros(3))}), r"Dataset: choose one of its variables"),
        ([1, 2, 3], r"this is a builtins.list: give one of these"),
        (da.zeros((9, 9, 0), chunks=3), r"is empty"),
        (da.zeros(9), r"has 1 dimensions, shape \(9,\), and two to five are wanted"),
        (da.zeros((2,) * 6), r"has 6 dimensions"),
        (da.zeros((9, 9, 9), dtype=complex), r"holds values of type complex128"),
        (da.zeros((9, 9, 9), chunks=9, dtype=object), r"holds values of type object"),
        (da.ma.masked_equal(da.zeros((9, 9, 9)), 1), r"made of numpy.ma.*MaskedArray.*map_blocks"),
        (da.zeros((9, 9, 9))[da.zeros(9) == 0], r"does not know its shape.*compute_chunk_sizes"),
        (da.zeros((3, 9, 9, 9)), r"takes 1 channels, the volume the dask array has 3"),
    ],
)
def test_what_cannot_be_computed_is_refused_at_once(volume, message):
    with pytest.raises((VolumeError, NetworkError), match=message):
        znni_dask.infer(volume, NETWORK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": "zy"}, "axes 'zy' are named"),
        ({"axes": "zzy"}, "do not name y and x"),
        ({"axes": "abc"}, "axes 'abc'"),
        ({"boundary": "wrap"}, "boundary 'wrap' is not known"),
        ({"chunks": 0}, "chunks 0 is no size"),
        ({"chunks": (1, 2)}, "is no size"),
        ({"patch": -1}, "patch -1 is no size"),
        ({"memory": "much"}, "memory 'much'"),
        ({"memory": "1MiB"}, "no plan fits"),
        ({"threads": 0}, "threads 0"),
        ({"channels": (1,)}, "channels 1 are not all there"),
        ({"channels": ()}, "no channels are chosen"),
        ({"level": 1}, "level 1 is for volumes given by their path"),
        ({"step": 4}, "give their size with patchwise"),
        ({"outputs": []}, "no outputs are chosen"),
    ],
)
def test_options_are_checked_before_anything_is_computed(options, message):
    with pytest.raises(znni_dask.InputError, match=message):
        znni_dask.infer(da.zeros((9, 9, 9), chunks=5), NETWORK, **options)


def test_a_network_that_makes_sections_needs_an_axis_for_them():
    b = Builder(1)
    network = b.network(b.resize(b.conv(b.input, 1, 1), 2))
    with pytest.raises(NetworkError, match="give the volume a z axis"):
        znni_dask.infer(da.zeros((9, 9)), network)


def broken(change):
    return da.zeros((9, 9, 9), chunks=5, dtype="uint8").map_blocks(
        change, dtype="uint8", meta=np.empty((0, 0, 0), np.uint8)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:2, :1], r"announced as uint8 of shape \(5, 5, 5\), and is uint8 of shape"),
        (lambda x: x + 0.5, r"announced as uint8 of shape .* and is float64"),
        (lambda x: np.ma.masked_equal(x, 0), r"is a numpy.ma.*MaskedArray, not a numpy array"),
    ],
)
def test_chunks_that_are_not_as_announced_are_refused_when_they_come(change, message):
    answer = znni_dask.infer(broken(change), NETWORK, chunks=5)
    with pytest.raises(RunError, match=message):
        answer.compute()
