"""Coarser levels: means of the level before, in the right places, made once and in few bytes."""

from __future__ import annotations

import errno
import itertools
import math
import threading

import numpy as np
import pytest
import yaozarrs
import zarr
from test_application import two_headed

import graphs
import znni_dask
from kills import SlowCommand
from peaks import traced_peak
from znni_dask import pyramid
from znni_dask.errors import MemoryLimitError, OptionError, OutputError, RunError
from znni_dask.geometry import Box
from znni_dask.importers.to_onnx import save
from znni_dask.job import Target
from znni_dask.journal import Journal, journal_of
from znni_dask.network.build import Builder
from znni_dask.pyramid import LevelMaker
from znni_dask.storage import output
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.levels import halved, levels, spacing
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify

SIZE = (21, 40, 33)
HOW = {"chunks": 8, "patch": 24, "memory": "4GiB"}
VERSIONS = ("0.4", "0.5")


def slowly_halved(values, step, labels):
    """The level after by its definition, cell by cell in float64; (…, z, y, x)."""
    shape = [-(-n // s) for n, s in zip(values.shape[-3:], step, strict=True)]
    made = np.zeros((*values.shape[:-3], *shape), values.dtype)
    for place in itertools.product(*map(range, shape)):
        cell = tuple(slice(p * s, p * s + s) for p, s in zip(place, step, strict=True))
        there = values[(..., *cell)]
        if labels:
            made[(..., *place)] = there[..., 0, 0, 0]
        else:
            mean = there.mean(axis=(-3, -2, -1), dtype=np.float64)
            made[(..., *place)] = np.rint(mean) if values.dtype == np.uint8 else mean
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("labels", [False, True])
def test_a_cell_becomes_its_mean_or_its_first_voxel(dtype, labels):
    random = np.random.default_rng(0)
    for step in itertools.product((1, 2), repeat=3):
        for size in ((5, 6, 7), (1, 2, 9), (4, 1, 1)):
            values = (random.random((2, *size)) * 255).astype(dtype)
            made, want = halved(values, step, labels), slowly_halved(values, step, labels)
            assert made.dtype == dtype
            if dtype == np.uint8 and not labels:  # a half may be rounded either way
                assert np.abs(made.astype(int) - want).max() <= 1
                assert (made == want).mean() > 0.9
            else:
                np.testing.assert_allclose(made, want, rtol=1e-6 if dtype == np.float32 else 1e-3)


@pytest.mark.parametrize(
    ("size", "scale", "most", "want"),
    [
        ((64, 64, 64), (1, 1, 1), 64**3, []),
        ((65, 64, 64), (1, 1, 1), 64**3, [(33, 32, 32)]),
        (
            (50, 512, 512),
            (40.0, 4.0, 4.0),
            64**3,
            [(50, 256, 256), (50, 128, 128), (50, 64, 64)],
        ),
        (
            (50, 400, 400),
            (30.0, 4.0, 4.0),
            5000,
            [(50, 200, 200), (50, 100, 100), (50, 50, 50), (25, 25, 25), (13, 13, 13)],
        ),
        ((1, 1000, 600), (1, 1, 1), 256**2, [(1, 500, 300), (1, 250, 150)]),
        ((7, 1, 1), (1, 1, 100), 1, [(4, 1, 1), (2, 1, 1), (1, 1, 1)]),
        ((8, 8, 8), (1.4, 1, 1), 64, [(4, 4, 4)]),
        ((8, 8, 8), (1.5, 1, 1), 64, [(8, 4, 4), (4, 2, 2)]),
    ],
)
def test_axes_are_halved_until_the_image_is_isotropic_and_then_together(size, scale, most, want):
    found = levels(size, scale, most)
    assert [level.size for level in found] == [size, *want]
    for level in found:
        ratios = zip(size, level.size, level.factors, strict=True)
        assert all(-(-n // f) == m for n, m, f in ratios)


def test_voxels_of_unknown_length_count_as_one():
    assert spacing((40.0, -4.0, 4.0), ("nanometer",) * 3) == (40, 4, 4)
    assert spacing((40.0, 4.0, 4.0), (None, "nanometer", "nanometer")) == (1, 1, 1)
    assert spacing((0.0, float("nan"), float("inf")), (None,) * 3) == (1, 1, 1)


def made_volume(folder, size=SIZE):
    """Two time points of anisotropic voxels, at a place of their own."""
    values = np.random.default_rng(0).standard_normal((2, *size)).astype(np.float32)
    group = zarr.open_group(str(folder / "in.zarr"), mode="w")
    group.create_array("0", data=values)
    changes = [
        {"type": "scale", "scale": [1, 30.0, 10.0, 10.0]},
        {"type": "translation", "translation": [0, 300.0, -20.0, 7.0]},
    ]
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    image = {
        "axes": [{"name": "t", "type": "time"}, *axes],
        "datasets": [{"path": "0", "coordinateTransformations": changes}],
    }
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    return folder / "in.zarr"


@pytest.fixture
def volume(tmp_path):
    return made_volume(tmp_path)


def image_of(path):
    attributes = zarr.open_group(str(path), mode="r").attrs
    return attributes.get("ome", attributes)["multiscales"][0]


def arrays_of(path):
    group = zarr.open_group(str(path), mode="r")
    return [group[dataset["path"]] for dataset in image_of(path)["datasets"]]


def assert_levels(path, steps, labels=False):
    """Every level is what comes of the one before, as the plain definition has it."""
    arrays = arrays_of(path)
    assert len(arrays) == len(steps) + 1
    for before, after, step in zip(arrays[:-1], arrays[1:], steps, strict=True):
        want = slowly_halved(before[:], step, labels)
        assert after.dtype == before.dtype
        assert after.shape == want.shape
        got = after[:]
        if after.dtype == np.uint8 and not labels:
            assert np.abs(got.astype(int) - want).max() <= 1
            assert (got == want).mean() > 0.9
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert np.ptp(got) > 0


STEPS = [(1, 2, 2), (1, 2, 2), (2, 2, 2)]  # 30·10·10 → 30·20·20 → 30·40·40 → 60·80·80


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "labels"])
def test_levels_are_made_of_the_level_before_and_lie_where_it_says(
    version, dtype, volume, tmp_path, client
):
    network, target = two_channels(), tmp_path / "out.zarr"
    how = HOW | {"dtype": dtype, "ome": version, "value_range": (-3, 3)}
    summary = znni_dask.run(network, volume, target, client=client, **how)
    labels = dtype == "labels"
    assert_levels(target, STEPS, labels)
    yaozarrs.validate_zarr_store(str(target))
    assert summary.passes[0].levels == ((21, 20, 17), (21, 10, 9), (11, 5, 5))
    image = image_of(target)
    assert image["type"] == ("nearest" if labels else "mean")
    scale, translation = np.array([30.0, 10, 10]), np.array([300.0, -20, 7])
    for number, step in enumerate([(1, 1, 1), *STEPS]):
        # a cell's centre is the mean of its voxels' centres
        translation = translation + scale * (np.array(step) - 1) / 2
        scale = scale * step
        found = open_volume(target, level=str(number))
        assert found.scale == tuple(scale)
        assert found.translation == tuple(translation)
        assert found.units == ("nanometer",) * 3
    assert verify(network, volume, target, size=(8, 8, 8)).holds


def two_channels():
    b = Builder(1, seed=2)
    return graphs.scaled(b.network(b.conv(b.input, 2, 3, padding="same")))


@pytest.mark.parametrize("shards", [(16, 16, 16), (32, 64, 16)])
def test_levels_have_the_chunks_and_shards_of_the_first(shards, volume, tmp_path, client):
    target = tmp_path / "out.zarr"
    znni_dask.run(two_channels(), volume, target, shards=shards, client=client, **HOW)
    assert_levels(target, STEPS)
    for array in arrays_of(target):
        assert array.chunks[-3:] == (8, 8, 8)
        assert array.shards[-3:] == shards
        assert array.metadata.dimension_names == ("t", "c", "z", "y", "x")


@pytest.mark.usefixtures("small_parts")
def test_levels_of_a_region_are_made_where_it_lies(volume, tmp_path, client, monkeypatch):
    target, begun = tmp_path / "out.zarr", watched(monkeypatch)
    znni_dask.run(two_channels(), volume, target, roi="3:9,9:30,20:", client=client, **HOW)
    assert_levels(target, STEPS)
    # 21·20·17: z 3:9 and y 4:15 lie in two chunks, x 10:17 in two of three
    assert len({start for level, moment, start in begun if (level, moment) == (1, 0)}) == 8


@pytest.mark.parametrize("version", VERSIONS)
def test_each_of_several_outputs_has_levels_of_its_own(version, volume, tmp_path, client):
    target, network = tmp_path / "out.zarr", two_headed()
    summary = znni_dask.run(network, volume, target, ome=version, client=client, **HOW)
    assert [one.outputs for one in summary.passes] == [("mask", "flows/0"), ("deep",)]
    for group, steps in (("mask", STEPS), ("flows_0", STEPS), ("deep", STEPS[:2])):
        assert_levels(target / group, steps)
        yaozarrs.validate_zarr_store(str(target / group))
        assert verify(network, volume, target / group, places=2, size=(8, 8, 8)).holds
    assert open_volume(target / "deep", level="1").scale == (60, 40, 40)
    with pytest.raises(OutputError, match="several outputs: verify one of its groups, mask"):
        verify(network, volume, target)


def test_no_pyramid_is_made_where_none_is_wanted(volume, tmp_path, client):
    target = tmp_path / "out.zarr"
    znni_dask.run(two_channels(), volume, target, pyramid=False, client=client, **HOW)
    assert len(arrays_of(target)) == 1
    assert "type" not in image_of(target)
    with pytest.raises(OutputError, match="exists"):
        znni_dask.run(two_channels(), volume, target, client=client, **HOW)


@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_of_nothing_stay_unwritten_in_every_level(version, tmp_path, client):
    values = np.zeros((16, 16, 64), np.float32)
    values[:, :, :10] = 1.0
    np.save(tmp_path / "in.npy", values)
    b = Builder(1)
    network = b.network(b.activation(b.input, "relu"))
    target = tmp_path / "out.zarr"
    znni_dask.run(network, tmp_path / "in.npy", target, ome=version, client=client, **HOW)
    assert [array.nchunks_initialized for array in arrays_of(target)] == [8, 1, 1]
    assert_levels(target, [(2, 2, 2)] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ome": "0.3"}, "OME-Zarr '0.3' is not known: choose 0.4, 0.5"),
        ({"ome": "0.4", "shards": 16}, "0.4 knows no shards: choose larger chunks.*0.5"),
    ],
)
def test_forms_that_are_not_there_are_refused(options, message, volume, tmp_path, client):
    with pytest.raises(OptionError, match=message):
        znni_dask.run(two_channels(), volume, tmp_path / "o.zarr", client=client, **HOW | options)
    assert not (tmp_path / "o.zarr").exists()


# Resuming.


def watched(monkeypatch, full_at=None, after=0):
    """The blocks of levels, as they are begun; at a level ``full_at`` no more than the first few
    find space on the disk."""
    honest, begun, lock = LevelMaker.make, [], threading.Lock()

    def make(self, moment, block):
        with lock:
            begun.append((self.level, moment, block.start))
            number = sum(level == self.level for level, *_ in begun)
        if self.level == full_at and number > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(self, moment, block)

    monkeypatch.setattr(LevelMaker, "make", make)
    return begun


@pytest.fixture
def small_parts(monkeypatch):
    """Blocks of one chunk: many for a small volume."""
    monkeypatch.setattr(pyramid, "_PART_VOXELS", 1)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("version", "level", "after"), [("0.4", 1, 10), ("0.5", 2, 5)])
def test_a_full_disk_in_a_level_is_told_and_the_same_command_makes_what_is_missing(
    version, level, after, volume, tmp_path, client, monkeypatch
):
    arguments = (two_channels(), volume, tmp_path / "out.zarr")
    options = {"client": client, "ome": version, **HOW}
    with monkeypatch.context() as patched:
        begun = watched(patched, level, after)
        with pytest.raises(
            RunError, match=rf"(?s)level {level}: .*once there is space on"
        ) as found:
            znni_dask.run(*arguments, **options)
    assert int(str(found.value).split(" of ")[0]) <= 6  # what was in flight
    made = [one for one in begun if one[0] < level] + [b for b in begun if b[0] == level][:after]
    assert max(begun)[0] == level
    assert journal_of(arguments[2]).exists()
    with pytest.raises(OutputError, match="differs from this one in pyramid"):
        znni_dask.run(*arguments, pyramid=False, **options)
    other = "0.5" if version == "0.4" else "0.4"
    with pytest.raises(OutputError, match="differs from this one in ome"):
        znni_dask.run(*arguments, **options | {"ome": other})
    with monkeypatch.context() as patched:
        again = watched(patched)
        summary = znni_dask.run(*arguments, **options)
    assert summary.blocks == 0
    assert summary.passes[0].level_blocks == len(again)
    assert not set(again) & set(made)
    assert_levels(arguments[2], STEPS)
    assert znni_dask.run(*arguments, **options).passes == ()


def test_levels_wait_until_the_first_is_complete(tmp_path, client, monkeypatch):
    values = np.random.default_rng(1).standard_normal((16, 16, 48)).astype(np.float32)
    values[8, 8, 40] = np.nan
    np.save(tmp_path / "in.npy", values)
    arguments = (two_channels(), tmp_path / "in.npy", tmp_path / "out.zarr")
    begun = watched(monkeypatch)
    with pytest.raises(RunError, match="blocks failed"):
        znni_dask.run(*arguments, client=client, **HOW | {"patch": 8})
    assert begun == []
    values[8, 8, 40] = 0
    np.save(tmp_path / "in.npy", values)
    znni_dask.run(*arguments, client=client, **HOW | {"patch": 8})
    assert_levels(arguments[2], [(2, 2, 2)] * 2)


def test_a_run_killed_while_it_makes_levels_is_finished_by_the_same_command(kills, tmp_path):
    """Nothing differs at the end, and no block is made twice but those that were in flight."""
    kills, network = kills or 2, two_channels()
    volume = made_volume(tmp_path, (7 * (kills + 1), *SIZE[1:]))
    save(network, tmp_path / "net.onnx")
    files = [tmp_path / name for name in ("net.onnx", "in.zarr", "out.zarr")]
    sizes = ["--chunks", "8,8,8", "--patch", "24,24,24", "--memory", "4GiB"]
    command = SlowCommand(
        *(tmp_path, "infer", *files, *sizes),
        maker="pyramid.LevelMaker",
        before="pyramid._PART_VOXELS = 1",
    )
    znni_dask.run(network, volume, tmp_path / "fresh.zarr", **HOW)
    want = arrays_of(tmp_path / "fresh.zarr")
    blocks = 2 * sum(math.prod(-(-n // 8) for n in array.shape[-3:]) for array in want[1:])
    command.killed(kills, most=blocks // (kills + 1))  # at two times, one chunk each
    assert Journal.begun(journal_of(tmp_path / "out.zarr")).done
    sizes = ["·".join(map(str, array.shape[-3:])) for array in want[1:]]
    assert f"levels of {', '.join(sizes)}" in command.finished()
    got = arrays_of(tmp_path / "out.zarr")
    for one, other in zip(got, want, strict=True):
        assert np.array_equal(one[:], other[:])
    made = command.blocks()
    assert len(set(made)) == blocks
    assert len(made) - blocks <= kills * pyramid.MOST_BLOCKS_IN_FLIGHT


# Memory.


@pytest.mark.parametrize(
    ("dtype", "size", "chunks", "shards", "version"),
    [
        ("float32", (130, 140, 150), (64, 64, 64), None, "0.5"),
        ("float32", (130, 140, 150), (64, 64, 64), None, "0.4"),
        ("uint8", (130, 140, 150), (64, 64, 64), None, "0.5"),
        ("float16", (65, 65, 65), (64, 64, 64), None, "0.4"),
        ("float32", (20, 40, 50), (4, 8, 8), None, "0.5"),
        ("float32", (70, 80, 90), (16, 16, 16), (64, 64, 64), "0.5"),
        ("labels", (40, 300, 300), (1, 256, 256), None, "0.5"),
    ],
)
def test_a_block_of_a_level_takes_no_more_memory_than_is_planned(
    dtype, size, chunks, shards, version, tmp_path, monkeypatch
):
    if shards:  # of which a part is made at a time
        monkeypatch.setattr(pyramid, "_PART_VOXELS", 16**3)
    layout = output.output_layout(
        Encoding(dtype), 2, size, chunks, shards, version=version, spacing=(1.0, 1.0, 1.0)
    )
    place = {"scale": (1.0,) * 3, "translation": (0.0,) * 3, "units": (None,) * 3}
    image = output.create(tmp_path / "o.zarr", layout, **place, attributes={})
    values = np.random.default_rng(0).random((2, *size), np.float32)
    image.write(Box((0, 0, 0), size), layout.encoding.encode(values))
    maker = LevelMaker([Target(image, layout, 0, 2)], 1)
    block = next(box for _, box in pyramid._blocks(layout, 1, Box((0, 0, 0), size)))
    peak = traced_peak(lambda: maker.make(0, block))
    assert peak <= pyramid._block_bytes(layout, 1) + (1 << 19)


def test_levels_that_do_not_fit_are_refused(tmp_path):
    layout = output.output_layout(
        Encoding(), 1, (512, 512, 512), (256, 256, 256), spacing=(1.0, 1.0, 1.0)
    )
    used, block = 100 << 20, pyramid._block_bytes(layout, 1)
    assert pyramid.plan([layout], used, used + 3 * block).blocks_in_flight == 3
    found = pyramid.plan([layout], used, used + 2 * block)
    assert (found.blocks_in_flight, found.predicted_bytes) == (2, used + 2 * block)
    with pytest.raises(MemoryLimitError, match=r"256³.*smaller chunks or shards.*--no-pyramid"):
        pyramid.plan([layout], used, used + block - 1)
