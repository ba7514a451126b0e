"""Graphs of lazy answers: few small tasks, computed where they were annotated, safely stored."""

from __future__ import annotations

import gc
import logging
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client, Scheduler, SpecCluster, Worker, futures_of
from test_volume import same_size, volume_for

import graphs
import znni_dask
from test_identity import assert_same, at_once
from znni_dask import lazy
from znni_dask.errors import RunError
from znni_dask.executors.patches import PatchBlocks
from znni_dask.network.build import Builder
from znni_dask.network.field_of_view import geometry

SHAPE = (48, 48, 48)


def source_of(shape=SHAPE, chunks=16):
    values = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    return da.from_array(values, chunks=chunks)


def heavy():
    """A network of 4 MB of weights."""
    b = Builder(1)
    return b.network(b.conv(b.conv(b.conv(b.input, 1000, 1), 1000, 1), 1, 3, padding="same"))


def optimized(array):
    """The tasks that a scheduler is handed, by their keys."""
    return dict(dask.optimize(array)[0].__dask_graph__())


def test_a_block_is_one_task_beside_the_sources_chunks():
    source = source_of()
    answer = znni_dask.infer(source, same_size(), chunks=16)
    assert answer.npartitions == 27
    chunks_and_array = source.npartitions + 1
    assert len(optimized(answer)) <= answer.npartitions + chunks_and_array + 1
    corner = optimized(answer[:, :16, :16, :16])
    assert len(corner) <= 1 + 8 + 1 + 2  # the block, the chunks around it, the job, array, slice


def test_a_stored_volume_is_read_by_the_blocks_themselves(tmp_path):
    zarr.create_array(str(tmp_path / "raw.zarr"), data=source_of().compute(), chunks=(16, 16, 16))
    answer = znni_dask.infer(tmp_path / "raw.zarr", same_size(), chunks=24)
    assert len(optimized(answer.data)) == answer.data.npartitions + 1
    with dask.config.set(scheduler="synchronous"):
        want = znni_dask.infer(source_of(), same_size(), chunks=24).compute()
        np.testing.assert_array_equal(answer.values, want)


def test_nothing_is_computed_before_the_answer_is():
    def fail(chunk):
        raise AssertionError("computed")

    source = source_of().map_blocks(fail, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    labelled = xr.DataArray(source, dims=list("zyx"), coords={"z": np.arange(48)})
    for volume in (source, labelled):
        answer = znni_dask.infer(volume, same_size(), boundary="valid")
        assert (answer.shape, answer.dtype) == ((2, *SHAPE), np.float32)
    assert type(znni_dask.infer(source, same_size())._meta) is np.ndarray
    with pytest.raises(AssertionError, match="computed"):
        znni_dask.infer(source, same_size()).compute(scheduler="synchronous")


def test_names_tell_answers_apart_and_no_more(monkeypatch):
    source, network = source_of(), same_size()

    def name(**options):
        return znni_dask.infer(source, network, chunks=24, **options).name

    first = name()
    monkeypatch.setattr("znni_dask.options.available_bytes", lambda: 8 << 30)
    assert name() == first
    assert znni_dask.infer(source, same_size(), chunks=24).name == first
    others = [
        name(boundary="nearest"),
        name(nan=0.0),
        name(axes="yzx"),
        znni_dask.infer(source + 1, network, chunks=24).name,
        znni_dask.infer(source, network, chunks=16).name,
        znni_dask.infer(source, same_size(seed=1), chunks=24).name,
    ]
    assert len({first, *others}) == 1 + len(others)


def test_chunks_are_whole_ones_of_the_source_and_aligned():
    flat = da.zeros((400, 300, 300), chunks=(1, 100, 300), dtype=np.uint8)
    unet = graphs.graph("unet", 3)
    answer = znni_dask.infer(flat, unet)
    assert [c[0] for c in answer.chunks[1:]] == [128, 200, 300]
    blocks = [t for key, t in optimized(answer).items() if key[0] == answer.name]
    assert len(blocks) == answer.npartitions
    assert max(len(task.dependencies) for task in blocks) <= 27 + 1  # and the job
    odd = znni_dask.infer(flat.rechunk(((399, 1), (137, 163), 300)), unet)
    assert odd.chunks[1] == (400,)
    assert odd.chunks[2][0] % geometry(unet).alignment[1] == 0
    asked = znni_dask.infer(flat, unet, chunks=(7, 500, 90))
    assert [c[0] for c in asked.chunks[1:]] == [7, 300, 90]
    assert all(len(set(c[:-1])) <= 1 for c in asked.chunks)


@pytest.mark.parametrize("way", ["infer", "map_overlap"])
def test_weights_travel_once_and_not_with_every_block(way):
    source, network = source_of(chunks=24), heavy()
    if way == "infer":
        answer = znni_dask.infer(source, network, chunks=24)
    else:
        kernel = znni_dask.overlap_kernel(source, network)
        answer = da.map_overlap(kernel, source, **kernel.arguments)
    sizes = {key: len(pickle.dumps(task)) for key, task in optimized(answer).items()}
    jobs = [key for key, size in sizes.items() if size > 4_000_000]
    assert [str(key)[:8] for key in jobs] == ["znni-job"]
    chunk = 24**3
    assert max(size for key, size in sizes.items() if key not in jobs) < chunk + 3000


def job_of(answer):
    names = " ".join(answer.dask.layers)
    (job,) = (job for token, job in lazy._jobs.items() if token in names)
    return job


def test_a_process_has_one_job_however_often_it_arrives():
    answer = znni_dask.infer(source_of(), same_size(), chunks=24)
    job = job_of(answer)
    assert pickle.loads(pickle.dumps(job)) is job


def teams():
    return [t for t in threading.enumerate() if t.name.startswith("znni-team")]


def test_threads_and_memory_are_kept_for_few_arrays_and_while_they_live():
    gc.collect()
    before = set(teams())
    source = source_of(chunks=24)
    answers = [znni_dask.infer(source, same_size(seed=i), chunks=24, threads=2) for i in range(4)]
    for answer in answers:
        answer.compute(scheduler="synchronous")
    assert len(lazy._recent) == lazy._PREPARED_JOBS == 2
    assert len(set(teams()) - before) == 2  # one thread each beside the caller
    del answers, answer
    gc.collect()
    assert not set(teams()) - before


def test_one_block_computes_at_a_time(monkeypatch):
    inside, seen = [], []
    honest = PatchBlocks.make

    def watched(self, *arguments):
        inside.append(1)
        seen.append(len(inside))
        made = honest(self, *arguments)
        inside.pop()
        return made

    monkeypatch.setattr(PatchBlocks, "make", watched)
    network = same_size()
    values = volume_for(network)
    source = da.from_array(values, chunks=12)
    both = [znni_dask.infer(source, network, chunks=12, boundary=b) for b in ("reflect", "nearest")]
    got = dask.compute(*both, scheduler="threads", num_workers=6)
    assert len(seen) == sum(a.npartitions for a in both)
    assert set(seen) == {1}
    for answer, boundary in zip(got, ("reflect", "nearest"), strict=True):
        assert_same(answer, at_once(network, values, boundary))


@pytest.fixture(scope="module")
def unequal():
    """A cluster of a worker that has a GPU, as it says, and one that has none."""
    common = {"nthreads": 2, "memory_limit": 0, "dashboard": False}
    workers = {
        name: {"cls": Worker, "options": {"name": name, "resources": resources, **common}}
        for name, resources in (("plain", {"CPU": 1}), ("fitted", {"GPU": 1}))
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"protocol": "inproc://", "dashboard": False, "dashboard_address": None},
    }
    with (
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(2)
        yield client


def places(client, array):
    """The workers that hold the blocks of a persisted array."""
    client.gather(futures_of(array))
    names = {w: told["name"] for w, told in client.scheduler_info()["workers"].items()}
    held = client.who_has(array)
    return {names[w] for key, workers in held.items() if "znni-infer" in str(key) for w in workers}


def test_resources_that_blocks_were_annotated_with_are_kept(unequal):
    """The source lies on the other worker, where blocks would go without them."""
    source = unequal.persist(source_of((48, 48, 24), chunks=12), workers=["plain"])
    options = {"network": same_size(), "chunks": (16, 12, 24)}
    with dask.annotate(resources={"GPU": 1}):
        answer = znni_dask.infer(source, **options)
    free = znni_dask.infer(source, **options)
    assert answer.npartitions == 12
    with znni_dask.keep_annotations():
        assert places(unequal, unequal.persist(answer)) == {"fitted"}
        kernel = znni_dask.overlap_kernel(source, options["network"])
        with dask.annotate(resources={"GPU": 1}):
            first = da.map_overlap(kernel, source, **kernel.arguments)
        with dask.annotate(resources={"CPU": 1}):
            stages = first.map_blocks(np.abs, dtype=np.float32)
        got = unequal.compute(stages).result(timeout=100)  # fused they would wait for ever
    want = np.abs(unequal.compute(free).result())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_block_that_lost_its_annotation_says_so(unequal):
    """dask forgets it where it fuses, which is its default: blocks go to any worker."""
    with dask.annotate(resources={"GPU": 1}):
        answer = znni_dask.infer(source_of(), same_size(), chunks=24)
    future = unequal.compute(answer, workers=["plain"])
    message = r"worker 'plain', which has no GPU.*compute within znni_dask.keep_annotations"
    with pytest.raises(RunError, match=message):
        future.result()


def threads_of(job):
    return job._threads()


def test_workers_compute_with_the_threads_they_have_or_those_asked_for(unequal, monkeypatch):
    monkeypatch.setattr("znni_dask.options.cores", lambda: 16)
    for asked, here, there in ((None, 16, 2), (5, 5, 5)):
        answer = znni_dask.infer(source_of(), same_size(), chunks=24, threads=asked)
        job = job_of(answer)
        assert threads_of(job) == here
        assert unequal.submit(threads_of, job, pure=False).result() == there


def test_workers_may_be_processes_of_their_own():
    network = same_size()
    values = volume_for(network)
    source = da.from_array(values, chunks=16)
    loopback = "127.0.0.1:0"
    with Client(n_workers=1, threads_per_worker=2, dashboard_address=loopback) as client:
        answer = znni_dask.infer(source, network, chunks=16)
        got = client.compute(answer).result()
    assert_same(got, at_once(network, values, "reflect"))


def test_query_planning_is_refused():
    code = (
        "import dask; dask.config.set({'array.query-planning': True});"
        "import dask.array as da, znni_dask; b = znni_dask.Builder(1);"
        "znni_dask.infer(da.zeros((9, 9, 9)), b.network(b.conv(b.input, 1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OptionError: dask's array.query-planning is on" in done.stderr


def test_importing_the_package_waits_for_neither_dask_array_nor_xarray():
    code = "import sys, znni_dask; print(*{'dask.array', 'xarray', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def irregular():
    """An answer to a volume in odd chunks, and its values."""
    answer = znni_dask.infer(source_of(chunks=((5, 1, 42), 17, (30, 18))), same_size(), chunks=16)
    return answer, answer.compute(scheduler="threads")


SHARDS = {"shards": (2, 32, 32, 32), "chunks": (1, 16, 16, 16)}


@pytest.mark.parametrize("kind", ["plain", "shards of one chunk", "an array with larger shards"])
@pytest.mark.filterwarnings("ignore:The input Dask array will be rechunked")
def test_what_to_zarr_writes_is_the_answer(irregular, kind, tmp_path):
    answer, want = irregular
    target = str(tmp_path / "out.zarr")
    if kind == "plain":
        da.to_zarr(answer, target)
    elif kind == "shards of one chunk":
        da.to_zarr(answer, target, shards=answer.chunksize, chunks=(1, 8, 8, 8))
    else:
        array = zarr.create_array(target, shape=answer.shape, dtype="float32", **SHARDS)
        da.to_zarr(answer, array)
    np.testing.assert_array_equal(zarr.open_array(target)[...], want)


def test_answers_chunked_as_shards_are_stored_without_a_lock(tmp_path):
    """Twenty times, for what goes wrong where shards have several writers is a race."""
    source = source_of(chunks=((5, 1, 42), 17, (30, 18)))
    answer = znni_dask.infer(source, same_size(), chunks=SHARDS["shards"][1:]).persist(
        scheduler="threads"
    )
    want = answer.compute()
    for i in range(20):
        path = str(tmp_path / f"{i}.zarr")
        array = zarr.create_array(path, shape=answer.shape, dtype="float32", **SHARDS)
        da.store(answer, array, lock=False, scheduler="threads", num_workers=8)
        np.testing.assert_array_equal(array[...], want)


@pytest.mark.filterwarnings("ignore")
def test_xarray_writes_shards_or_refuses_those_that_are_larger_than_chunks(irregular, tmp_path):
    labelled = xr.DataArray(source_of(chunks=20), dims=list("zyx"), name="raw")
    labelled.encoding["chunks"] = (7, 7, 7)
    answer = znni_dask.infer(labelled, same_size(), chunks=16)
    target = tmp_path / "out.zarr"
    with pytest.raises(ValueError, match="overlap multiple Dask chunks"):
        answer.to_zarr(target, encoding={"raw": SHARDS})
    answer.to_zarr(target, mode="w", encoding={"raw": {"shards": (2, 16, 16, 16)}})
    stored = zarr.open_array(str(target / "raw"))
    assert stored.shards == (2, 16, 16, 16)
    np.testing.assert_array_equal(stored[...], irregular[1])


def test_the_documents_code_runs():
    text = (Path(__file__).parent.parent / "docs" / "dask.md").read_text()
    source, network = source_of((24, 24, 24), chunks=12), same_size()
    known = {"dask": dask, "znni_dask": znni_dask, "raw": source, "array": source}
    found = []
    with dask.config.set(scheduler="synchronous"):  # there is no worker with a GPU
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, known | {"network": network}, here := {})
            found.append(here["answer"].compute())
    assert len(found) == 2
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
