"""Runs out of core: the right answer on disk, bounded memory, failures that lose nothing else."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaozarrs
import zarr
from distributed import Client

import graphs
import znni_dask
from peaks import peak_while_running
from test_identity import assert_same, at_once
from znni_dask import Builder, machine
from znni_dask.errors import (
    InputError,
    MemoryLimitError,
    NetworkError,
    OptionError,
    OutputError,
    RunError,
    VolumeError,
)
from znni_dask.geometry import Box
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.pooling import MaxPoolingFragments
from znni_dask.storage import output
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify

EXAMPLES = Path(__file__).parent.parent / "examples"


def ome_volume(path, size=(30, 45, 50), channels=1, dtype=np.float32, seed=0):
    values = np.random.default_rng(seed).standard_normal((channels, *size))
    values = values.astype(np.float32) if dtype == np.float32 else (40 * values + 128).astype(dtype)
    axes = "czyx" if channels > 1 else "zyx"
    group = zarr.open_group(str(path), mode="w")
    group.create_array("0", data=values if channels > 1 else values[0])
    one = [1.0] if channels > 1 else []
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [
                    {"name": a, "type": "channel" if a == "c" else "space"}
                    | ({} if a == "c" else {"unit": "micrometer"})
                    for a in axes
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [*one, 3.0, 0.5, 0.5]},
                            {
                                "type": "translation",
                                "translation": [*(0.0 for _ in one), 30.0, 1.0, 2.0],
                            },
                        ],
                    }
                ],
            }
        ],
    }
    return values


def answer(path):
    volume = open_volume(path)
    return volume.read(Box((0, 0, 0), volume.size))


@pytest.mark.parametrize(
    ("family", "seed", "boundary", "patch", "chunks", "shards"),
    [
        ("chain", 0, "reflect", None, (16, 16, 16), None),
        ("chain", 4, "valid", (7, 9, 11), (16, 16, 16), None),
        ("unet", 0, "reflect", (12, 16, 16), (8, 16, 16), (16, 32, 32)),
        ("unet", 3, "nearest", (5, 40, 7), None, None),
        ("valid_unet", 0, "constant", None, (8, 8, 8), None),
        ("strided", 0, "reflect", (4, 5, 6), (4, 8, 8), None),
        ("finer", 0, "reflect", (8, 16, 16), (16, 16, 16), None),
        ("flat", 0, "reflect", (1, 16, 16), (1, 32, 32), None),
    ],
)
@pytest.mark.every(3)
def test_what_a_run_writes_is_the_right_answer(
    family, seed, boundary, patch, chunks, shards, tmp_path, client
):
    network = graphs.graph(family, seed)
    source, target = tmp_path / "in.zarr", tmp_path / "out.zarr"
    values = ome_volume(source, channels=network.in_channels)
    seen = []
    summary = znni_dask.run(
        network,
        source,
        target,
        boundary=boundary,
        patch=patch,
        chunks=chunks,
        shards=shards,
        memory="8GiB",
        client=client,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_same(answer(target), at_once(network, values, boundary))
    (made,) = summary.passes
    assert seen[-1][0] == seen[-1][1] == sum(np.prod(n) for n in (made.size, *made.levels))
    assert len(seen) == made.blocks + made.level_blocks
    yaozarrs.validate_zarr_store(str(target))
    assert verify(network, source, target, places=4, size=(9, 16, 16)).holds


def test_scale_and_translation_are_those_owed(tmp_path, client):
    source = tmp_path / "in.zarr"
    ome_volume(source)
    expected = {
        ("residual", "reflect"): ((3, 0.5, 0.5), (30, 1, 2)),
        ("strided", "reflect"): ((6, 2, 2), None),
        ("finer", "reflect"): ((1.5, 0.25, 0.25), None),
    }
    for (family, boundary), (scale, translation) in expected.items():
        network = graphs.graph(family, 0)
        target = tmp_path / f"{family}.zarr"
        znni_dask.run(network, source, target, boundary=boundary, client=client)
        made = open_volume(target)
        assert made.scale == scale
        assert made.units == ("micrometer",) * 3
        if translation:
            assert made.translation == translation
    # 2 fine voxels in the place of 1: centres a quarter of a coarse voxel before and after it
    assert open_volume(tmp_path / "finer.zarr").translation == (29.25, 0.875, 1.875)
    network = graphs.graph("residual", 0)
    low = [axis.halo[0] for axis in znni_dask.geometry(network).axes]
    znni_dask.run(network, source, tmp_path / "valid.zarr", boundary="valid", client=client)
    valid = open_volume(tmp_path / "valid.zarr")
    assert valid.translation == (30 + 3 * low[0], 1 + 0.5 * low[1], 2 + 0.5 * low[2])


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_stored_types_hold_the_answer_to_their_rounding(dtype, tmp_path, client):
    network = graphs.graph("unet", 1)
    source = tmp_path / "in.zarr"
    values = ome_volume(source)
    want = at_once(network, values, "reflect")
    low, high = float(want.min()), float(want.max())
    znni_dask.run(
        network, source, tmp_path / "o.zarr", dtype=dtype, value_range=(low, high), client=client
    )
    stored = answer(tmp_path / "o.zarr")
    assert stored.dtype == dtype
    back = stored.astype(float) * ((high - low) / 255) + low if dtype == "uint8" else stored
    step = (high - low) / 255 if dtype == "uint8" else 2e-3 * max(abs(low), high)
    assert np.abs(back - want).max() <= 0.51 * step
    assert verify(network, source, tmp_path / "o.zarr", size=(16, 16, 16)).holds


def test_integer_volumes_enter_as_their_values(tmp_path, client):
    network = graphs.graph("flat", 0)
    values = ome_volume(tmp_path / "in.zarr", dtype=np.uint8)
    znni_dask.run(network, tmp_path / "in.zarr", tmp_path / "o.zarr", client=client)
    want = at_once(network, values.astype(np.float32), "reflect")
    np.testing.assert_allclose(answer(tmp_path / "o.zarr"), want, atol=1e-4)


def test_a_block_that_meets_nan_fails_alone_and_the_run_says_where(tmp_path, client):
    network = graphs.graph("unet", 0)
    source, target = tmp_path / "in.npy", tmp_path / "o.zarr"
    values = np.random.default_rng(0).standard_normal((16, 16, 160)).astype(np.float32)
    clean = values.copy()
    values[8, 8, 150] = np.nan
    np.save(source, values)
    with pytest.raises(RunError, match=r"(?s)of 10 blocks failed.*\[8, 8, 150\].*--nan") as found:
        znni_dask.run(
            network, source, target, chunks=(16, 16, 16), patch=(16, 16, 16), client=client
        )
    failed = int(re.match(r"(\d+) of", str(found.value))[1])
    halo = znni_dask.geometry(network).axes[2].halo
    assert 1 <= failed <= 2 + max(halo) // 16 * 2
    want = at_once(network, clean[None], "reflect")
    np.testing.assert_allclose(answer(target)[..., :64], want[..., :64], atol=1e-4)
    znni_dask.run(network, source, target, nan=0.0, overwrite=True, client=client)
    clean[8, 8, 150] = 0
    assert_same(answer(target), at_once(network, clean[None], "reflect"))


@pytest.fixture
def small(tmp_path):
    """A network, a volume and an output that suit each other."""
    network = graphs.graph("unet", 0)
    ome_volume(tmp_path / "in.zarr")
    return {"network": network, "input": tmp_path / "in.zarr", "output": tmp_path / "o.zarr"}


def wrong(case, small, folder):
    """The arguments with one thing wrong."""
    changed = dict(small)
    match case:
        case "channels":
            changed["network"] = graphs.graph("chain", 0)
            ome_volume(folder / "in.zarr", channels=changed["network"].in_channels + 1)
        case "thin":
            changed["network"] = graphs.graph("residual", 0)
            np.save(folder / "thin.npy", np.zeros((2, 3, 4), np.float32))
            changed |= {"input": folder / "thin.npy", "boundary": "valid"}
        case "complex":
            np.save(folder / "c.npy", np.zeros((9, 9, 9), np.complex128))
            changed["input"] = folder / "c.npy"
        case "missing input":
            changed["input"] = folder / "none.zarr"
        case "missing network":
            changed["network"] = folder / "none.onnx"
        case "output in input":
            changed["output"] = small["input"] / "o.zarr"
        case "output is input":
            changed["output"] = small["input"]
        case "memory":
            changed["memory"] = "1MiB"
        case "patch beyond memory":
            changed |= {
                "memory": machine.anonymous_bytes() + (60 << 20),
                "patch": (512, 512, 512),
                "input": folder / "large.npy",
            }
            np.save(folder / "large.npy", np.zeros((128, 256, 256), np.uint8))
        case "memory text":
            changed["memory"] = "a lot"
        case "boundary":
            changed["boundary"] = "mirror"
        case "dtype":
            changed["dtype"] = "int64"
        case "patch":
            changed["patch"] = (0, 8, 8)
        case "threads":
            changed["threads"] = 0
        case "half a thread":
            changed["threads"] = 1.5
        case "memory of nothing":
            changed["memory"] = 0
        case "patch of two":
            changed["patch"] = (8, 8)
        case "nan by nan":
            changed["nan"] = float("nan")
        case "endless range":
            changed["value_range"] = (0, float("inf"))
        case "array":
            changed["input"] = np.zeros((9, 9, 9))
        case "no network":
            changed["network"] = None
        case "shards":
            changed |= {"chunks": (8, 8, 8), "shards": (12, 8, 8)}
    return changed


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("channels", NetworkError, "the network takes"),
        ("thin", VolumeError, 'axis y: boundary="valid" needs at least'),
        ("complex", VolumeError, "complex128"),
        ("missing input", VolumeError, "no volume at"),
        ("missing network", NetworkError, "no network at"),
        ("output in input", OutputError, "lies in, the input"),
        ("output is input", OutputError, "the input"),
        ("memory", MemoryLimitError, r"no plan fits 1 MiB.*allow at least"),
        ("patch beyond memory", MemoryLimitError, "or a smaller patch"),
        ("memory text", OptionError, "12GiB"),
        ("boundary", OptionError, "reflect, nearest, constant, valid"),
        ("dtype", OptionError, "float32, float16, uint8, labels"),
        ("patch", OptionError, "three positive"),
        ("threads", OptionError, "at least one"),
        ("half a thread", OptionError, "whole number"),
        ("memory of nothing", OptionError, "is not a size"),
        ("patch of two", OptionError, "three positive"),
        ("nan by nan", OptionError, "finite value"),
        ("endless range", OptionError, "is empty"),
        ("array", VolumeError, "by its path"),
        ("no network", NetworkError, "NoneType"),
        ("shards", OptionError, "whole numbers of chunks"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    case, error, message, small, tmp_path, client
):
    changed = wrong(case, small, tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as found:
        znni_dask.run(**changed, client=client)
    assert isinstance(found.value, InputError)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_blocks_in_flight_are_bounded_and_computed_one_at_a_time(small, client, monkeypatch):
    from znni_dask.job import BlockMaker

    active, most = [], []
    make = BlockMaker.make

    def counted(self, *place):
        active.append(place)
        most.append(len(active))
        time.sleep(0.01)
        try:
            return make(self, *place)
        finally:
            active.remove(place)

    monkeypatch.setattr(BlockMaker, "make", counted)
    summary = znni_dask.run(**small, chunks=(8, 8, 8), patch=(8, 8, 8), client=client)
    assert summary.blocks > 100
    assert max(most) <= summary.plan.blocks_in_flight


def test_nothing_of_a_run_stays_on_the_cluster(small, client):
    znni_dask.run(**small, client=client)
    worker = next(iter(client.cluster.workers.values()))
    assert not [name for name in worker.plugins if str(name).startswith("znni")]
    assert not client.cluster.scheduler.tasks


def test_a_run_without_a_client_makes_and_ends_its_own(small):
    listening, before = set(), set(threading.enumerate())

    def look(done, total):
        for connection in machine.psutil.Process().net_connections():
            if connection.status == "LISTEN":
                listening.add(connection.laddr.ip)

    summary = znni_dask.run(**small, memory="2GiB", progress=look)
    assert listening <= {"127.0.0.1", "::1"}
    assert summary.peak_bytes <= summary.plan.predicted_bytes <= 2 << 30
    begun = set(threading.enumerate()) - before
    assert not [t.name for t in begun if t.name.startswith("znni")]


def test_workers_in_processes_of_their_own_write_the_same(small, tmp_path, client):
    znni_dask.run(**small, chunks=(8, 16, 16), patch=(8, 16, 16), client=client)
    again = {**small, "output": tmp_path / "again.zarr"}
    with Client(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster:
        summary = znni_dask.run(**again, chunks=(8, 16, 16), patch=(8, 16, 16), client=cluster)
    assert summary.blocks > 8
    np.testing.assert_array_equal(answer(again["output"]), answer(small["output"]))


def test_verify_finds_a_single_changed_voxel(small, client):
    znni_dask.run(**small, client=client)
    network, source, target = small["network"], small["input"], small["output"]
    size = open_volume(target).size
    whole = verify(network, source, target, places=1, size=size)
    assert whole.holds
    array = zarr.open_array(str(target / "0"), mode="r+")
    array[1, 17, 33, 20] += 10 * whole.allowed
    found = verify(network, source, target, places=1, size=size)
    assert not found.holds
    assert found.at == (17, 33, 20)
    with pytest.raises(OutputError, match="another network"):
        verify(graphs.graph("unet", 1), source, target)
    with pytest.raises(OutputError, match="not made by znni"):
        verify(network, source, source)


def test_verify_finds_a_fault_in_the_fragments_themselves(tmp_path, client, monkeypatch):
    """Recomputing by fragments would repeat the fault; one voxel a place is computed without."""
    network = graphs.graph("chain", 0)
    ome_volume(tmp_path / "in.zarr", channels=network.in_channels)
    honest = MaxPoolingFragments.apply

    def shuffled(self, prepared, problem, inputs, out, team):
        honest(self, prepared, problem, inputs, out, team)
        out[...] = out[::-1].copy()

    monkeypatch.setattr(MaxPoolingFragments, "apply", shuffled)
    arguments = (network, tmp_path / "in.zarr", tmp_path / "o.zarr")
    znni_dask.run(*arguments, client=client)
    assert not verify(*arguments, size=(8, 8, 8)).holds
    monkeypatch.undo()
    znni_dask.run(*arguments, client=client, overwrite=True)
    assert verify(*arguments, size=(8, 8, 8)).holds


def test_overwriting_that_is_cut_short_leaves_nothing_that_looks_complete(
    tmp_path, client, monkeypatch
):
    """And it can be begun again."""
    network = graphs.graph("chain", 0)
    ome_volume(tmp_path / "in.zarr", channels=network.in_channels)
    arguments = (network, tmp_path / "in.zarr", tmp_path / "o.zarr")
    assert znni_dask.run(*arguments, client=client).blocks > 0

    def fails(place):
        raise OSError(5, "killed, say", str(place))

    with monkeypatch.context() as patched:
        patched.setattr(output.shutil, "rmtree", fails)
        with pytest.raises(OutputError, match="cannot replace"):
            znni_dask.run(*arguments, client=client, overwrite=True)
    with pytest.raises(OutputError, match="exists"):  # not: it is complete
        znni_dask.run(*arguments, client=client)
    assert znni_dask.run(*arguments, client=client, overwrite=True).blocks > 0
    assert verify(*arguments, size=(8, 8, 8)).holds


# Memory: the promise, kept by a process of its own.

LIMIT = 512 << 20
RUN = """
import json, sys
import znni_dask
if __name__ == "__main__":
    s = znni_dask.run(*sys.argv[1:4], memory="512MiB", dtype="uint8", threads=2)
    print(json.dumps({"peak": s.peak_bytes, "predicted": s.plan.predicted_bytes,
                      "blocks": s.blocks}))
"""


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        pytest.param("boundary_valid", 256, 2, marks=pytest.mark.thorough),
        ("boundary_unet", 128, 2),
    ],
)
def test_the_process_stays_within_512_mib(name, size, blocks, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (size,) * 3).astype(np.uint8)
    zarr.create_array(str(tmp_path / "in.zarr"), data=values, chunks=(64, 64, 64))
    network = EXAMPLES / "networks" / f"{name}.onnx"
    arguments = [str(network), str(tmp_path / "in.zarr"), str(tmp_path / "out.zarr")]
    peak, said = peak_while_running([sys.executable, "-c", RUN, *arguments])
    assert peak <= LIMIT
    assert said["peak"] <= said["predicted"] <= LIMIT
    assert peak <= said["predicted"]
    # what the run says of itself is so: both look now and then, at other moments
    assert peak <= said["peak"] * 1.2
    assert said["blocks"] >= blocks


def test_a_read_only_folder_is_refused(small, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        locked = Path("/proc")  # where not even root may write
    with pytest.raises(OutputError, match="cannot write"):
        znni_dask.run(**{**small, "output": locked / "o.zarr"})


def test_a_run_by_fourier_transforms_is_right_and_keeps_its_promise(tmp_path, monkeypatch):
    b = Builder(1, seed=2)
    x = b.relu(b.conv(b.input, 18, 3, padding="same"))
    x = b.relu(b.conv(x, 20, (1, 5, 5), padding="same"))
    network = b.network(b.conv(x, 17, (3, 5, 3), padding="same"))
    volume = np.random.default_rng(0).standard_normal((70, 66, 75)).astype(np.float32)
    np.save(tmp_path / "in.npy", volume)
    how = {"memory": "4GiB", "patch": (32, 40, 48), "chunks": 32, "threads": 2}
    monkeypatch.setattr(ConvTiledFFT, "is_compiled", lambda *_: False)
    plain = znni_dask.run(network, tmp_path / "in.npy", tmp_path / "plain.zarr", **how)
    assert not any("fft" in name for name in plain.plan.primitives.values())
    monkeypatch.setattr(ConvTiledFFT, "is_compiled", lambda *_: True)  # or it is not worth it
    made = znni_dask.run(network, tmp_path / "in.npy", tmp_path / "made.zarr", **how)
    assert sum("tiled fft" in name for name in made.plan.primitives.values()) >= 2
    assert made.peak_bytes <= made.plan.predicted_bytes
    stored = zarr.open_array(str(tmp_path / "made.zarr/0"))[:]
    assert_same(stored, at_once(network, volume[None], "reflect"))
    assert verify(network, tmp_path / "in.npy", tmp_path / "made.zarr", places=2).holds
