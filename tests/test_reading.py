"""Reading once: chunks are decoded once and kept no longer than needed, whatever the order."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import h5py
import numpy as np
import pytest
import tifffile
import zarr

import graphs
import reading as benchmark
import znni_dask
from test_identity import assert_same, at_once
from znni_dask import machine, report
from znni_dask.errors import RunError
from znni_dask.geometry import Box, triple, volume
from znni_dask.network.build import Builder
from znni_dask.patches import Layout
from znni_dask.reading import Order, Reads
from znni_dask.storage import cells as cells_module
from znni_dask.storage.cells import Cells
from znni_dask.storage.chunk_cache import ChunkCache
from znni_dask.storage.stored import Decoding, Stored
from znni_dask.storage.volume import Volume, open_volume

SIZE = (60, 70, 80)
DATA = np.random.default_rng(0).integers(0, 255, SIZE).astype(np.uint8)


def halo_only(halo):
    """A network that sees so many voxels beyond its output."""
    b = Builder(1)
    return b.network(b.conv(b.input, 1, tuple(2 * h + 1 for h in halo)))


@pytest.fixture
def tiny_cells(monkeypatch):
    """Every chunk a cell of its own."""
    monkeypatch.setattr(cells_module, "_CELL_BYTES", 1)


def stored(path, kind, data=DATA, chunks=(8, 8, 8), axes=None):
    match kind:
        case "zarr":
            zarr.create_array(str(path), data=data, chunks=chunks, dimension_names=axes)
        case "sharded":
            shards = [4 * c for c in chunks]
            zarr.create_array(str(path), data=data, chunks=chunks, shards=shards)
        case "hdf5":
            with h5py.File(path, "w") as file:
                file.create_dataset("v", data=data, chunks=chunks, compression="gzip")
        case "tiff":
            tifffile.imwrite(path, data, compression="zlib", rowsperstrip=8)
        case "npy":
            np.save(path, data)
    return open_volume(path)


def in_memory(chunks, data=DATA):
    """A volume that is stored in chunks, but takes no time to decode."""
    return Volume(Stored.of(lambda: data, decoding=Decoding(chunks)), "zyx", "here")


def suffix(kind):
    return {"hdf5": ".h5", "tiff": ".tif", "npy": ".npy"}.get(kind, ".zarr")


def counted(monkeypatch):
    """The boxes that volumes read, as they read them."""
    seen = []
    honest = Volume._taken

    def taken(self, box, time, channels):
        seen.append((box, time))
        return honest(self, box, time, channels)

    monkeypatch.setattr(Volume, "_taken", taken)
    return seen


def own(reads, place):
    return reads.needed_voxels(place, reads.laid.region(reads.box(place)))


def read_all(opened, reads, reading, boundary="reflect", times=1):
    """All blocks read in order through a cache; the voxels decoded, and the most bytes kept."""
    order = reads.order(reading)

    def users(time, cell):
        base = time * volume(order.blocks)
        return {base + order.turn(place) for place in reads.users(cell)}

    cache = ChunkCache(opened, reading.cache_bytes, users)
    decoded, most = 0, 0
    for time in range(times):
        for turn, place in enumerate(order, time * volume(order.blocks)):
            region = reads.laid.region(reads.box(place))
            with cache.turn(turn) as reader:
                got = opened.read_extended(region, boundary, None, time, reader.read)
                most = max(most, cache._bytes)
            assert np.array_equal(got, opened.read_extended(region, boundary, None, time))
            decoded += reader.decoded_voxels
            assert cache._bytes == sum(k.values.nbytes for k in cache._kept.values())
    assert not cache._kept, "a cell is kept that no block needs"
    return decoded, most


@pytest.mark.parametrize("kind", ["zarr", "sharded", "hdf5", "tiff", "npy"])
def test_with_enough_memory_every_chunk_is_decoded_once(kind, tmp_path, tiny_cells):
    opened = stored(tmp_path / f"v{suffix(kind)}", kind)
    layout = Layout(halo_only((3, 9, 5)), SIZE, "reflect")
    reads = Reads(layout, (16, 16, 16), opened.cells)
    reading = reads.best(1 << 30)
    decoded, most = read_all(opened, reads, reading)
    if kind == "npy":  # no chunks: blocks read what they need, and nothing is kept
        assert most == reading.cache_bytes == 0
        assert decoded == pytest.approx(reading.amplification * DATA.size)
        assert decoded > 2 * DATA.size
    else:
        assert decoded == DATA.size
        assert reading.amplification == 1
        assert most <= reading.cache_bytes < DATA.size


@pytest.mark.parametrize("boundary", ["reflect", "nearest", "constant", "valid"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.every(5)
def test_what_is_decoded_and_kept_is_what_was_predicted(boundary, seed, tiny_cells):
    random = np.random.default_rng(seed)
    opened = in_memory(triple(random.integers(4, 20, 3)))
    layout = Layout(halo_only(triple(random.integers(0, 12, 3))), SIZE, boundary)
    reads = Reads(layout, triple(random.integers(6, 24, 3)), opened.cells)
    needed = sum(own(reads, place) for place in np.ndindex(*reads.blocks))
    direct = reads.best(0)
    decoded, most = read_all(opened, reads, direct, boundary)
    assert (decoded, most) == (round(direct.amplification * needed), 0)
    before = direct.amplification
    for capacity in np.geomspace(opened.cells.bytes, DATA.size, 5):
        reading = reads.best(int(capacity))
        decoded, most = read_all(opened, reads, reading, boundary)
        assert decoded <= reading.amplification * needed + 0.5
        assert most <= reading.cache_bytes <= capacity
        assert reading.amplification <= before + 0.005
        before = reading.amplification
    assert needed <= decoded <= 1.6 * needed  # whole chunks at the rim of what "valid" needs


def test_over_all_blocks_every_voxel_that_is_needed_counts_once(tmp_path):
    layout = Layout(graphs.graph("chain", 1), (40, 50, 61), "valid")
    reads = Reads(layout, (16, 8, 16), None)
    seen = np.zeros(layout.size, bool)
    total = 0
    for place in np.ndindex(*reads.blocks):
        seen[layout.region(reads.box(place)).clipped(layout.size).slices] = True
        total += own(reads, place)
    assert total == seen.sum()


@pytest.mark.parametrize("seed", range(6))
def test_an_order_makes_every_block_once_and_knows_its_turn(seed):
    random = np.random.default_rng(seed)
    blocks, column = triple(random.integers(1, 7, 3)), triple(random.integers(1, 5, 3))
    order = Order(blocks, triple(random.permutation(3)), column)
    places = list(order)
    assert sorted(places) == list(np.ndindex(*blocks))
    assert [order.turn(place) for place in places] == list(range(volume(blocks)))


def test_a_million_blocks_are_put_in_order_at_once(monkeypatch):
    layout = Layout(halo_only((45, 45, 45)), (10_000,) * 3, "reflect")
    cells = Cells.of((128, 128, 128), layout.size, 1)
    reads = Reads(layout, (96, 96, 96), cells)
    calls = []
    honest = Reads._kept_bytes
    monkeypatch.setattr(Reads, "_kept_bytes", lambda *a: calls.append(1) or honest(*a))
    found = [reads.best(gib << 30) for gib in (1, 2, 4, 8, 64)]
    assert volume(reads.blocks) > 10**6
    assert len(calls) < 20_000
    assert found[0].amplification < 3 < reads.best(0).amplification
    assert found[-1].amplification == 1
    assert all(a.amplification >= b.amplification for a, b in pairwise(found))


def test_channels_and_times_are_read_once_too(tmp_path, tiny_cells):
    data = np.random.default_rng(1).integers(0, 99, (2, 3, 20, 30, 24)).astype(np.uint16)
    opened = stored(tmp_path / "v.zarr", "zarr", data, (1, 1, 8, 8, 8), ("t", "c", "z", "y", "x"))
    layout = Layout(halo_only((2, 2, 2)), opened.size, "nearest")
    for chosen in (None, [2, 0]):
        opened = open_volume(tmp_path / "v.zarr", channels=chosen)
        reads = Reads(layout, (8, 8, 8), opened.cells)
        decoded, _ = read_all(opened, reads, reads.best(1 << 20), "nearest", times=2)
        assert decoded == 2 * data[0, 0].size


def test_chunks_that_adjoin_are_read_together(tmp_path, tiny_cells, monkeypatch):
    opened = stored(tmp_path / "v.zarr", "zarr")
    cache = ChunkCache(opened, 1 << 20, lambda time, cell: {0, 1})
    seen = counted(monkeypatch)
    with cache.turn(0) as reader:
        reader.read(Box((5, 5, 5), (30, 30, 30)))
        assert [str(box) for box, _ in seen] == ["0:32, 0:32, 0:32"]
        seen.clear()
        reader.read(Box((5, 5, 5), (30, 30, 40)))
        assert [str(box) for box, _ in seen] == ["0:32, 0:32, 32:40"]
    monkeypatch.setattr(cells_module, "_FETCHED_BYTES", 8**4)
    seen.clear()
    with cache.turn(1) as reader:
        reader.read(Box((32, 0, 0), (60, 70, 80)))
    assert max(box.voxels for box, _ in seen) <= 8**4
    assert len(seen) < 4 * 9 * 10 / 4


@pytest.mark.parametrize("kind", ["zarr", "tiff"])
def test_small_chunks_make_cells_worth_looking_after(kind, tmp_path):
    data = np.zeros((40, 300, 400), np.uint8)
    opened = stored(tmp_path / f"v{suffix(kind)}", kind, data)
    cells = opened.cells
    assert 1 << 20 <= cells.bytes < 3 << 20
    assert all(s % c == 0 for s, c in zip(cells.size, cells.chunk, strict=True))
    assert Cells.of((64, 64, 64), (20, 20, 20), 1).size == (20, 20, 20)


def test_threads_that_want_one_chunk_decode_it_once(tmp_path, monkeypatch):
    opened = stored(tmp_path / "v.zarr", "zarr", chunks=(60, 70, 80))
    cache = ChunkCache(opened, 1 << 20, lambda time, cell: set(range(4)))
    gate, seen, begun = threading.Barrier(4), [], threading.Event()
    honest = Volume._taken

    def slow(self, box, time, channels):
        seen.append(box)
        begun.wait(0.2)  # long enough for the others to ask, too
        return honest(self, box, time, channels)

    monkeypatch.setattr(Volume, "_taken", slow)
    made = {}

    def read(number):
        with cache.turn(number) as reader:
            gate.wait()
            made[number] = (reader.read(Box((1, 2, 3), (9, 9, 9))), reader.decoded_voxels)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1
    assert sorted(voxels for _, voxels in made.values()) == [0, 0, 0, DATA.size]
    for values, _ in made.values():
        np.testing.assert_array_equal(values[0], DATA[1:9, 2:9, 3:9])
    assert not cache._kept


def test_many_threads_read_right_within_the_bytes_allowed(tiny_cells):
    opened = in_memory((8, 8, 8))
    layout = Layout(halo_only((6, 6, 6)), SIZE, "reflect")
    reads = Reads(layout, (10, 12, 14), opened.cells)
    order = reads.order(reads.best(20_000))
    users = lambda time, cell: {order.turn(place) for place in reads.users(cell)}  # noqa: E731
    cache = ChunkCache(opened, 20_000, users)
    places, wrong, most = iter(enumerate(order)), [], []
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                turn, place = next(places, (None, None))
            if turn is None:
                return
            region = layout.region(reads.box(place))
            with cache.turn(turn) as reader:
                got = opened.read_extended(region, "reflect", read=reader.read)
            most.append(cache._bytes)
            if not np.array_equal(got, opened.read_extended(region, "reflect")):
                wrong.append(place)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert max(most) <= 20_000
    assert not cache._kept
    assert not cache._decoding


def test_a_turn_that_ends_while_a_cell_is_decoded_is_not_waited_for():
    opened = in_memory((60, 70, 80))
    with ExitStack() as other:

        def users(time, cell):
            other.close()  # the other block ends, having read nothing here
            return {0, 1}

        cache = ChunkCache(opened, 1 << 20, users)
        with cache.turn(0) as reader:
            other.enter_context(cache.turn(1))
            reader.read(Box((1, 2, 3), (9, 9, 9)))
            assert not cache._kept


def test_a_damaged_chunk_fails_the_blocks_that_need_it_with_its_place(tmp_path):
    opened = stored(tmp_path / "v.zarr", "zarr")
    assert opened.cells.size != opened.chunks  # so that a cell holds sound chunks beside
    damaged = tmp_path / "v.zarr" / "c" / "2" / "3" / "4"
    sound = damaged.read_bytes()
    damaged.write_bytes(b"\0" * 40)
    with pytest.raises(RunError) as direct:
        opened.read(Box((0, 0, 0), SIZE))
    assert "16:24, 24:32, 32:40" in str(direct.value)
    cache = ChunkCache(opened, 1 << 20, lambda time, cell: {0, 1})
    with cache.turn(0) as reader:
        beside = Box((0, 0, 0), (16, 70, 80))
        np.testing.assert_array_equal(reader.read(beside)[0], DATA[beside.slices])
        assert reader.decoded_voxels == beside.voxels
        with pytest.raises(RunError) as found:
            reader.read(Box((1, 2, 3), (20, 30, 40)))
    assert str(found.value) == str(direct.value)
    damaged.write_bytes(sound)
    with cache.turn(1) as reader:
        np.testing.assert_array_equal(reader.read(Box((0, 0, 0), SIZE))[0], DATA)
    assert not cache._decoding


def test_what_blocks_on_other_workers_have_had_is_not_kept_for_ever(tiny_cells):
    opened = in_memory((8, 8, 8))
    layout = Layout(halo_only((6, 6, 6)), SIZE, "reflect")
    reads = Reads(layout, (8, 8, 8), opened.cells)
    order = reads.order(reads.best(1 << 20))
    users = lambda time, cell: {order.turn(place) for place in reads.users(cell)}  # noqa: E731
    cache = ChunkCache(opened, 1 << 20, users)
    for turn, place in enumerate(order):
        if turn % 2:
            with cache.turn(turn) as reader:
                opened.read_extended(layout.region(reads.box(place)), "reflect", read=reader.read)
            assert all(min(kept.left) > turn for kept in cache._kept.values())
    assert not cache._kept


def test_the_benchmark_counts_what_it_claims(tmp_path):
    allowed = machine.anonymous_bytes() + (400 << 20)
    row = benchmark.measure("sharded zarr", tmp_path, (256, 256, 256), 32, allowed)
    assert row["amplification"] <= row["reading"]["amplification"] <= 1.3
    assert row["amplification_of_these_blocks_alone"] > 3
    assert row["amplification_of_blocks_of_a_chunk_alone"] > 27
    assert row["predicted_bytes_of_a_run"] <= allowed


def test_the_roi_alone_is_read_once(tmp_path, client, tiny_cells):
    values = np.random.default_rng(0).standard_normal((48, 48, 48)).astype(np.float32)
    zarr.create_array(str(tmp_path / "in.zarr"), data=values, chunks=(8, 8, 8))
    made = znni_dask.run(
        halo_only((3, 3, 3)),
        tmp_path / "in.zarr",
        tmp_path / "out.zarr",
        patch=(8, 8, 8),
        chunks=(8, 8, 8),
        roi="16:40,:16,24:32",
        client=client,
    )
    assert made.blocks == 3 * 2 * 1
    (one,) = made.passes
    assert one.needed_voxels == 30 * 19 * 14
    assert one.decoded_voxels == 40 * 24 * 24
    assert made.plan.reading.amplification == made.read_amplification


def test_a_run_decodes_every_chunk_once_and_says_so(tmp_path, client, tiny_cells):
    network = graphs.graph("unet", 0)
    values = np.random.default_rng(0).standard_normal((50, 60, 70)).astype(np.float32)
    path, target = tmp_path / "in.zarr", tmp_path / "out.zarr"
    zarr.create_array(str(path), data=values, chunks=(8, 8, 8))
    made = znni_dask.run(network, path, target, patch=(16, 16, 16), chunks=(16,) * 3, client=client)
    assert made.blocks == 4 * 4 * 5
    assert made.read_amplification == made.plan.reading.amplification == 1
    assert 0 < made.plan.reading.cache_bytes < values.nbytes
    volume_made = open_volume(target)
    answer = volume_made.read(Box((0, 0, 0), volume_made.size))
    assert_same(answer, at_once(network, values[None], "reflect"))
    assert "decoded 1.00 times (at most 1.00 predicted)" in "\n".join(report.run_lines(made))


def test_a_plan_given_back_keeps_no_more_of_what_is_decoded_than_it_says(
    tmp_path, client, tiny_cells
):
    values = np.random.default_rng(0).standard_normal((50, 60, 70)).astype(np.float32)
    zarr.create_array(str(tmp_path / "in.zarr"), data=values, chunks=(8, 8, 8))

    def made(**options):
        return znni_dask.run(
            *(graphs.graph("unet", 0), tmp_path / "in.zarr", tmp_path / "out.zarr"),
            **{"chunks": (16, 16, 16), "overwrite": True, "client": client, **options},
        )

    first = made(patch=(16, 16, 16))
    for share in (2, 1e9):
        most = int(first.plan.reading.cache_bytes / share)
        less = replace(first.plan, reading=replace(first.plan.reading, cache_bytes=most))
        again = made(plan=[less])
        assert again.plan.reading.cache_bytes <= most
        assert 1.2 < again.read_amplification <= again.plan.reading.amplification
    with_all = made(plan=[first.plan])
    assert with_all.plan.reading == first.plan.reading
