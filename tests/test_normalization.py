"""Normalisation: the statistics are numpy's, whoever takes them; the answer is that of a volume
that was normalised beforehand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import zarr
from distributed import Client
from test_patchwise import normalised
from test_selection import full, stopped_after

import graphs
import znni_dask
from peaks import peak_while_running
from znni_dask import statistics
from znni_dask.cli import main
from znni_dask.cluster import Cluster, Crew, Means
from znni_dask.errors import MemoryLimitError, OptionError, OutputError, VolumeError
from znni_dask.importers.to_onnx import save
from znni_dask.journal import Journal, journal_of
from znni_dask.machine import anonymous_bytes
from znni_dask.network.build import Builder
from znni_dask.normalization import Normalization, Statistics
from znni_dask.statistics import measure
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify

SIZE = (13, 17, 22)
WAYS = [
    Normalization("zscore"),
    Normalization("range"),
    Normalization("percentile", (1, 99)),
    Normalization("percentile", (0, 37.5)),
    Normalization("percentile", (99.9, 100)),
]
DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]


def taken(client, source, nan, way, allowed_bytes=8 << 30):
    """Statistics, by workers that may take so much."""
    means = Means(1, allowed_bytes, anonymous_bytes())
    cluster = Cluster(client)
    crew = Crew((means,), dict.fromkeys(cluster.workers(), 0), 1)
    return measure(cluster, crew, source, nan, way).statistics


@pytest.fixture
def small_boxes(monkeypatch):
    """Many boxes and pieces even of a small volume."""
    monkeypatch.setattr(statistics, "_BOX", 500)
    monkeypatch.setattr(statistics, "_PIECE", 77)


def values_of(dtype, shape=(2, 2, *SIZE), seed=0):
    """Values all over a type's range: integers of all sizes, floats of all magnitudes."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return random.random(shape) < 0.3
    if dtype.kind == "f":
        exponents = random.uniform(-3, 3 if dtype.itemsize == 2 else 12, shape)
        return (random.choice([-1.0, 0.0, 1.0], shape) * 10**exponents).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    plain = random.integers(low, high, shape, dtype, endpoint=True)
    return plain >> random.integers(0, 8 * dtype.itemsize - 2, shape).astype(dtype)


def by_numpy(values, way):
    """Offset and scale of the values of one channel, as float32 and then by numpy in float64."""
    exact = values.astype(np.float32).astype(np.float64)
    exact = exact[np.isfinite(exact)]
    if way.method == "zscore":
        return exact.mean(), exact.std()
    ends = np.percentile(exact, way.percentiles if way.method == "percentile" else (0, 100))
    return ends[0], ends[1] - ends[0]


def assert_statistics(found, values, way):
    """Of ``values`` (t, c, z, y, x)."""
    for time, channels in enumerate(values):
        for channel, one in enumerate(channels):
            offset, scale = found.offset[time][channel], found.scale[time][channel]
            first, right = by_numpy(one, way)
            assert scale > 0
            if way.method == "zscore":
                assert np.allclose((offset, scale), (first, right), rtol=1e-10, atol=0)
            else:
                ends = (offset, offset + scale), (first, first + right)
                assert np.allclose(*ends, rtol=1e-12, atol=0)  # numpy rounds where they lie


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.every(5)
def test_statistics_are_those_of_numpy(dtype, small_boxes, tmp_path, client):
    values = values_of(dtype)
    np.save(tmp_path / "in.npy", values)
    source = open_volume(tmp_path / "in.npy")
    assert np.prod(statistics.boxes(source)) < np.prod(SIZE) / 8
    ways = WAYS if dtype != "?" else WAYS[:2]  # percentiles of two values are mostly the same
    for way in ways:
        found = taken(client, source, None, way)
        assert_statistics(found, values, way)


def test_small_deviations_of_large_values_are_not_lost(small_boxes, tmp_path, client):
    values = np.random.default_rng(0).normal(1e4, 1e-2, (1, 1, *SIZE)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    way = Normalization("zscore")
    found = taken(client, open_volume(tmp_path / "in.npy"), None, way)
    assert_statistics(found, values, way)


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.method}{w.percentiles}")
def test_what_nan_replaces_does_not_count(way, small_boxes, tmp_path, client):
    values = values_of("f8", (1, 2, *SIZE))
    values[0, 0, 3:6] = np.nan
    values[0, 1, :, 4] = np.inf
    values[0, 1, 2, 3, 4] = 1e300  # no finite float32
    np.save(tmp_path / "in.npy", values[0])
    found = taken(client, open_volume(tmp_path / "in.npy"), 5.0, way)
    assert_statistics(found, values, way)


def reversed_tiles(size, tile, over=None):
    return iter([*statistics_tiles(size, tile, over)][::-1])


statistics_tiles = statistics.tiles


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_statistics_do_not_depend_on_workers_or_order(
    dtype, small_boxes, tmp_path, client, monkeypatch
):
    """To the last bit."""
    zarr.create_array(str(tmp_path / "in.zarr"), data=values_of(dtype)[0, 0], chunks=(5, 6, 7))
    source = open_volume(tmp_path / "in.zarr")
    right = [taken(client, source, None, way) for way in WAYS]
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "tiles", reversed_tiles)
        assert [taken(client, source, None, w) for w in WAYS] == right
    monkeypatch.setattr(statistics, "MOST_BLOCKS_IN_FLIGHT", 1)
    loopback = "127.0.0.1:0"
    with Client(
        processes=False,
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=loopback,
        worker_dashboard_address=loopback,
    ) as two:
        assert [taken(two, source, None, way) for way in WAYS] == right
    assert not [n for n in next(iter(client.cluster.workers.values())).plugins if "znni" in str(n)]


def beforehand(values, way):
    """A volume (t, c, z, y, x) normalised in float32."""
    made = values.astype(np.float32)
    for volume in made:
        for channel in volume:
            offset, scale = (np.float32(number) for number in by_numpy(channel, way))
            channel -= offset
            channel /= scale
    return made


@pytest.mark.parametrize(
    ("name", "dtype", "way", "options"),
    [
        ("unet", "u1", WAYS[0], {"boundary": "constant"}),
        ("chain", "f4", WAYS[2], {}),
        ("strided", "i4", WAYS[1], {"roi": "3:9,:,4:"}),
        ("windows", "u2", WAYS[2], {"patchwise": (8, 12, 16), "boundary": "constant"}),
        ("unet", "f8", WAYS[1], {"dtype": "uint8", "halo": (2, 2, 2)}),
    ],
)
def test_the_answer_is_that_of_a_volume_normalised_beforehand(
    name, dtype, way, options, tmp_path, client
):
    network = normalised() if name == "windows" else graphs.graph(name, 0)
    values = values_of(dtype, (2, network.in_channels, *SIZE))
    np.save(tmp_path / "raw.npy", values)
    np.save(tmp_path / "normal.npy", beforehand(values, way))
    common = {"client": client, "chunks": 8, "memory": "4GiB", **options}
    znni_dask.run(network, tmp_path / "normal.npy", tmp_path / "right.zarr", **common)
    asked = {"normalize": way.method, "percentiles": way.percentiles}
    znni_dask.run(network, tmp_path / "raw.npy", tmp_path / "got.zarr", **common, **asked)
    assert np.array_equal(full(tmp_path / "got.zarr"), full(tmp_path / "right.zarr"))
    told = zarr.open_group(str(tmp_path / "got.zarr"), mode="r").attrs["znni"]
    assert_statistics(Statistics.told(told["statistics"]), values, way)
    assert verify(network, tmp_path / "raw.npy", tmp_path / "got.zarr", size=(6, 8, 8)).holds
    again = znni_dask.run(network, tmp_path / "raw.npy", tmp_path / "got.zarr", **common, **asked)
    assert again.passes == ()
    told["statistics"]["scale"][0][0] *= 1.01
    told["statistics"]["scale"][1][0] *= 1.01
    zarr.open_group(str(tmp_path / "got.zarr"), mode="r+").attrs["znni"] = told
    if name != "windows" and "halo" not in options:  # windows are normalised by the network
        found = verify(network, tmp_path / "raw.npy", tmp_path / "got.zarr", size=(6, 8, 8))
        assert not found.holds


def test_statistics_are_of_the_whole_volume_whatever_is_selected(tmp_path, client):
    network = graphs.graph("unet", 0)
    values = np.random.default_rng(0).integers(0, 200, SIZE).astype(np.uint8)
    values[8:] += 50
    np.save(tmp_path / "in.npy", values)
    common = {"client": client, "chunks": 8, "memory": "4GiB", "normalize": "zscore"}
    znni_dask.run(network, tmp_path / "in.npy", tmp_path / "all.zarr", **common)
    znni_dask.run(network, tmp_path / "in.npy", tmp_path / "part.zarr", roi=":7,:,:", **common)
    right = full(tmp_path / "all.zarr")
    right[:, 7:] = 0
    assert np.array_equal(full(tmp_path / "part.zarr"), right)


def test_a_run_that_is_resumed_takes_no_statistics_again(tmp_path, client, monkeypatch):
    network = graphs.graph("unet", 0)
    np.save(tmp_path / "in.npy", np.random.default_rng(0).standard_normal(SIZE).astype(np.float32))
    asked = {"normalize": "percentile", "percentiles": (2, 90)}
    stopped_after(3, tmp_path, client, monkeypatch, **asked)
    assert Journal.begun(journal_of(tmp_path / "out.zarr")).known_statistics().scale[0][0] > 0
    common = {"client": client, "chunks": 8, "patch": (8, 5, 8), "memory": "4GiB"}
    arguments = (network, tmp_path / "in.npy")
    for other in ({}, {"normalize": "zscore"}, asked | {"percentiles": (1, 90)}):
        with pytest.raises(OutputError, match="differs from this one in normalize"):
            znni_dask.run(*arguments, tmp_path / "out.zarr", **common, **other)
    fresh = znni_dask.run(*arguments, tmp_path / "fresh.zarr", **common, **asked)
    assert fresh.measured_bytes > 0
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["znni_dask.running"], "measure", None)
        resumed = znni_dask.run(*arguments, tmp_path / "out.zarr", **common, **asked)
    assert resumed.blocks == fresh.blocks - 3
    assert np.array_equal(full(tmp_path / "out.zarr"), full(tmp_path / "fresh.zarr"))


def pyramid(path, coarser):
    """An image of two levels, whose values have nothing to do with one another."""
    group = zarr.open_group(str(path), mode="w")
    levels = [values_of("u1", SIZE), coarser]
    datasets = []
    for number, (level, scale) in enumerate(zip(levels, (1.0, 2.0), strict=True)):
        group.create_array(str(number), data=level)
        change = {"type": "scale", "scale": [scale] * level.ndim}
        datasets.append({"path": str(number), "coordinateTransformations": [change]})
    kinds = {"t": "time", "c": "channel"}
    axes = [{"name": a, "type": kinds.get(a, "space")} for a in "tczyx"[-levels[0].ndim :]]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return levels


def test_statistics_may_be_those_of_another_level(tmp_path, client, capsys):
    network = graphs.graph("unet", 0)
    save(network, tmp_path / "net.onnx")
    levels = pyramid(tmp_path / "in.zarr", values_of("u1", tuple(n // 2 for n in SIZE), 5))
    files = [str(tmp_path / name) for name in ("net.onnx", "in.zarr", "out.zarr")]
    how = ["--normalize", "percentile", "--percentiles", "5", "80", "--stats-level", "1"]
    assert main(["infer", *files, *how, "--memory", "4GiB"]) == 0
    assert "memory" in capsys.readouterr().out
    told = zarr.open_group(files[2], mode="r").attrs["znni"]
    way = Normalization("percentile", (5, 80))
    assert_statistics(Statistics.told(told["statistics"]), levels[1][None, None], way)
    assert told["normalize"] == {"method": "percentile", "percentiles": [5, 80], "level": "1"}
    assert verify(*files, size=(6, 8, 8)).holds
    with pytest.raises(OptionError, match="nothing is normalised"):
        znni_dask.run(*files[:2], tmp_path / "no.zarr", stats_level=1)
    with pytest.raises(VolumeError, match="level"):
        znni_dask.run(*files[:2], tmp_path / "no.zarr", stats_level=3, normalize="range")
    assert not (tmp_path / "no.zarr").exists()


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        ({"normalize": "minmax"}, None, OptionError, "'minmax' is not known: choose none, zscore"),
        ({"normalize": "percentile", "percentiles": (9, 9)}, None, OptionError, "a lower and a"),
        ({"normalize": "percentile", "percentiles": (-1, 9)}, None, OptionError, "0 to 100"),
        ({"normalize": "percentile", "percentiles": (1, 101)}, None, OptionError, "0 to 100"),
        ({"normalize": "percentile", "percentiles": 5}, None, OptionError, "two numbers"),
        (
            {"normalize": "zscore"},
            (np.s_[...], 3.0),
            VolumeError,
            r"channel 0 at time point 0 .*cannot be normalised: .*divided by is 0 .*the same, 3",
        ),
        ({"normalize": "range"}, (np.s_[...], 0.0), VolumeError, "divided by is 0"),
        ({"normalize": "percentile"}, (np.s_[1:], 7.0), VolumeError, None),
        (
            {"normalize": "zscore"},
            (np.s_[2, 3, 4], np.nan),
            VolumeError,
            r"the volume holds nan at z, y, x = \[2, 3, 4\].*--nan",
        ),
        ({"normalize": "range", "nan": 0.0}, (np.s_[...], np.nan), VolumeError, "no finite value"),
        ({"normalize": "range", "memory": "90MiB"}, None, MemoryLimitError, "allow"),
    ],
)
def test_what_cannot_be_normalised_is_refused(options, change, error, message, tmp_path, client):
    values = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    if change:
        values[change[0]] = change[1]
    if message is None:
        values[0] = 7.0
        values[0, 0, 0] = 1.0
        message = "divided by is 0"
    np.save(tmp_path / "in.npy", values)
    with pytest.raises(error, match=message):
        znni_dask.run(
            graphs.graph("unet", 0),
            tmp_path / "in.npy",
            tmp_path / "out.zarr",
            **{"client": client, "memory": "4GiB", **options},
        )
    assert not (tmp_path / "out.zarr").exists()
    assert not journal_of(tmp_path / "out.zarr").exists()


def test_boxes_that_do_not_fit_are_refused_with_what_they_need(tmp_path, client):
    np.save(tmp_path / "in.npy", np.ones(SIZE, np.float32))
    source = open_volume(tmp_path / "in.npy")
    with pytest.raises(MemoryLimitError, match=r"taken in boxes of .* allow at least"):
        taken(client, source, None, Normalization("range"), 1 << 20)


RUN = """
import json, sys
import znni_dask
if __name__ == "__main__":
    s = znni_dask.run(*sys.argv[1:4], memory=sys.argv[4], threads=1, normalize=sys.argv[5])
    plans = [one.plan.predicted_bytes for one in s.passes]
    print(json.dumps({"peak": s.peak_bytes, "predicted": max(s.measured_bytes, *plans)}))
"""


@pytest.mark.parametrize("way", ["zscore", "percentile"])
def test_statistics_keep_within_the_memory_allowed(way, tmp_path):
    """Of a volume that is larger than that in float32."""
    values = np.random.default_rng(0).standard_normal((160, 256, 256)).astype(np.float16)
    values = np.repeat(values, 2, axis=0).astype(np.float32)
    zarr.create_array(str(tmp_path / "in.zarr"), data=values, chunks=(64, 64, 64))
    del values
    b = Builder(1)
    save(b.network(b.conv(b.input, 1, 1)), tmp_path / "net.onnx")
    files = [str(tmp_path / name) for name in ("net.onnx", "in.zarr", "out.zarr")]
    limit = "320MiB"
    peak, said = peak_while_running([sys.executable, "-c", RUN, *files, limit, way])
    assert max(peak, said["peak"]) <= said["predicted"] <= 320 << 20
