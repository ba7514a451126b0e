"""Labels: of every output the number of its best channel, reduced before anything is written."""

from __future__ import annotations

import numpy as np
import pytest
import yaozarrs
import zarr
from test_application import heads_of_two_depths, two_headed
from test_patchwise import WINDOW, blended, normalised

import graphs
import znni_dask
from peaks import traced_peak
from test_identity import at_once
from znni_dask.errors import OptionError, RunError
from znni_dask.geometry import Box
from znni_dask.network.build import Builder
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify

HOW = {"dtype": "labels", "memory": "4GiB", "chunks": 8}


@pytest.fixture
def values(tmp_path):
    made = np.random.default_rng(0).standard_normal((1, 17, 22, 19)).astype(np.float32)
    np.save(tmp_path / "in.npy", made)
    return made


def stored(path):
    volume = open_volume(path)
    return volume.read(Box((0, 0, 0), volume.size))[0]


def assert_best(labels, answer):
    """Every label is the best channel, but where the two best are one to rounding."""
    first, second = np.sort(answer, axis=0)[:-3:-1]
    clear = first - second > 1e-4 * answer.std()
    assert clear.mean() > 0.99
    assert np.array_equal(labels[clear], answer.argmax(axis=0)[clear])


@pytest.mark.parametrize("patch", [8, (5, 7, 3)])
def test_a_label_is_the_number_of_the_best_channel(patch, values, tmp_path, client):
    b = Builder(1, seed=2)
    network = graphs.scaled(b.network(b.conv(b.input, 5, 3, padding="same")))
    target = tmp_path / "out.zarr"
    znni_dask.run(network, tmp_path / "in.npy", target, patch=patch, client=client, **HOW)
    labels = stored(target)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
    assert zarr.open_array(str(target / "0"), mode="r").shape == values.shape[1:]
    assert_best(labels, at_once(network, values, "reflect"))
    yaozarrs.validate_zarr_store(str(target))
    assert verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds


def test_outputs_computed_together_have_each_their_own_labels(values, tmp_path, client):
    network, target = heads_of_three_and_two(), tmp_path / "out.zarr"
    summary = znni_dask.run(network, tmp_path / "in.npy", target, client=client, **HOW)
    assert [one.outputs for one in summary.passes] == [("three", "two")]
    for name in ("three", "two"):
        assert_best(stored(target / name), at_once(network.only(name), values, "reflect"))
        assert verify(network, tmp_path / "in.npy", target / name, size=(8, 8, 8)).holds


def heads_of_three_and_two():
    b = Builder(1, seed=3)
    x = b.relu(b.conv(b.input, 4, 3, padding="same"))
    # the second head is much the larger: one argmax over both would always find it
    heads = {"three": b.conv(x, 3, 3, padding="same"), "two": b.conv(x, 2, 1)}
    network = b.network(heads)
    network.weights[network.outputs["two"]]["bias"][:] = 100.0, 100.2
    return network


def test_windows_make_labels_too(values, tmp_path, client):
    network, target = normalised(), tmp_path / "out.zarr"
    how = HOW | {"patchwise": WINDOW, "boundary": "constant"}
    znni_dask.run(network, tmp_path / "in.npy", target, client=client, **how)
    want = blended(network, values.astype(np.float64), WINDOW, 0.5, "constant")
    assert_best(stored(target), want)
    assert verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds


def test_a_wrong_label_is_found(values, tmp_path, client):
    network, target = graphs.graph("unet", 0), tmp_path / "out.zarr"
    arguments = (network, tmp_path / "in.npy", target)
    znni_dask.run(*arguments, client=client, **HOW)
    array = zarr.open_array(str(target / "0"), mode="r+")
    array[3, 4, 5] = 1 - array[3, 4, 5]
    found = verify(*arguments, places=1, size=array.shape)
    assert not found.holds
    assert found.at == (3, 4, 5)


def test_the_first_of_the_best_is_taken_as_numpy_does():
    random = np.random.default_rng(1)
    for channels in (2, 3, 256, 257):
        answer = random.integers(0, 3, (channels, 4, 5, 6)).astype(np.float32)
        labels = Encoding("labels").encode(answer.copy())
        assert labels.dtype == (np.uint8 if channels <= 256 else np.uint16)
        assert np.array_equal(labels[0], answer.argmax(axis=0))
    assert Encoding("labels").stored_dtype(65537) == np.uint32
    infinite = np.array([-np.inf, np.inf, np.inf], np.float32).reshape(3, 1, 1, 1)
    assert Encoding("labels").encode(infinite).item() == 1


def test_labels_differ_by_how_far_their_channel_lies_below_the_best():
    answer = np.array([3.0, 1.0, 2.9, 0.0], np.float32).reshape(4, 1, 1, 1)
    for label, below in ((0, 0.0), (2, 0.1), (1, 2.0), (4, np.inf), (255, np.inf)):
        there = np.full((1, 1, 1, 1), label, np.uint8)
        assert Encoding("labels").difference(there, answer).item() == pytest.approx(below)
    infinite = np.full((2, 1, 1, 1), -np.inf, np.float32)
    assert Encoding("labels").difference(np.ones((1, 1, 1, 1), np.uint8), infinite).item() == 0


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_nan_has_no_label(channel):
    answer = np.zeros((3, 2, 2, 2), np.float32)
    answer[channel, 1, 1, 1] = np.nan
    with pytest.raises(RunError, match="NaN, which has no label"):
        Encoding("labels").encode(answer)


@pytest.mark.parametrize("make", [two_headed, heads_of_two_depths])
def test_an_output_of_one_channel_has_no_labels(make, values, tmp_path, client):
    with pytest.raises(OptionError, match=r"output '\w+' has but one.*uint8.*--output NAME"):
        znni_dask.run(make(), tmp_path / "in.npy", tmp_path / "out.zarr", client=client, **HOW)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "labels"])
def test_encoding_takes_the_memory_that_is_planned_for_it(dtype):
    encoding = Encoding(dtype)
    answer = np.random.default_rng(2).random((12, 32, 32, 32), np.float32)
    assert encoding.encode(answer).nbytes == encoding.voxel_bytes(12) * 32**3
    peak = traced_peak(lambda: encoding.encode(answer))
    assert peak <= encoding.encoding_bytes(12) * 32**3 + (1 << 16)
