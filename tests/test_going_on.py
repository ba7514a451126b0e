"""Columns of several blocks: each goes on where the one before it ended, or begins anew."""

from __future__ import annotations

import errno
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

import graphs
import znni_dask
from test_identity import assert_same, at_once, extended, volume_for
from znni_dask import column_planner
from znni_dask.behind import Behind
from znni_dask.choices import choose_primitives
from znni_dask.columns import Column
from znni_dask.errors import RunError
from znni_dask.executors.columns import ColumnBlocks
from znni_dask.executors.streaming import ColumnExecutor
from znni_dask.network.build import Builder
from znni_dask.network.layers import DepthToSpace
from znni_dask.network.rewrites import simplify
from znni_dask.network.turned import can_be_turned, turned
from znni_dask.patches import Layout
from znni_dask.plan import Choice, Plan, Reading, Stage
from znni_dask.reading import Reads
from znni_dask.storage.output import Image
from znni_dask.turnstile import Turnstile


class Blocks:
    """Blocks of an answer in columns of some, and what they read of the volume."""

    def __init__(self, network, volume, boundary, block, in_column, granules, axis=0):
        self.layout = Layout(network, volume.shape[1:], boundary)
        self.volume, self.boundary = volume, boundary
        chosen = choose_primitives(self.layout)
        choices = (Choice(name, one.name, 0.0, granules) for name, one in chosen.items())
        stages = (Stage("cpu", tuple(choices)),)
        reading = Reading((1, 2, 0), (in_column, 1, 1), 0, 1.0).turned(axis)
        plan = Plan(block, block, stages, 2, 1, reading, 0, 0, 0.0, 0.0, in_column, axis)
        self.reads = Reads(self.layout, block, None, None, in_column, axis)
        self.order = [self.reads.box(place) for place in self.reads.order(reading)]
        self.blocks = ColumnBlocks(self.layout, plan, self.reads.column)
        self.answer = np.full((network.out_channels, *self.layout.output_size), np.nan, np.float32)
        self.seen = []

    def make(self, block, time=0, fail=False):
        """Make a block; nothing is kept of one that is to fail."""

        def read(box):
            self.seen.append((box.start[0], box.stop[0]))
            return extended(self.volume, box, self.boundary)

        def take(box, answer):
            if fail:
                raise RunError("as it should")
            assert block.shared(box) == box
            self.answer[(slice(None), *box.slices)] = answer

        behind = Behind.of(time, self.blocks.ahead(block, self.blocks.region(block)), read)
        self.blocks.make(block, behind, take)


@pytest.mark.parametrize("boundary", ["reflect", "valid"])
@pytest.mark.parametrize(
    ("granules", "block", "in_column"),
    [(2, (8, 16, 24), 99), (3, (16, 99, 99), 2), (8, (5, 24, 24), 99)],
)
@pytest.mark.parametrize(
    ("family", "seed"),
    [("chain", 0), ("unet", 2), ("valid_unet", 0), ("residual", 1), ("finer", 0)],
)
@pytest.mark.every(4)
def test_blocks_that_go_on_equal_the_oracle(family, seed, granules, block, in_column, boundary):
    """Also where slabs are not whole blocks."""
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    made = Blocks(network, volume, boundary, block, in_column, granules)
    for one in made.order:
        made.make(one)
    assert_same(made.answer, at_once(network, volume, boundary))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    ("family", "seed"), [("chain", 0), ("chain", 1), ("unet", 2), ("residual", 1), ("finer", 0)]
)
def test_columns_along_any_axis_equal_the_oracle(family, seed, axis):
    network = graphs.graph(family, seed)
    volume = volume_for(network)
    made = Blocks(network, volume, "reflect", (20, 16, 24), 99, 3, axis)
    for one in made.order:
        made.make(one)
    ends = {before.stop[axis] - one.start[axis] for before, one in pairwise(made.order)}
    assert 0 in ends
    assert_same(made.answer, at_once(network, volume, "reflect"))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("family", "seed"), graphs.HALF)
def test_a_turned_network_makes_the_answer_turned(family, seed, axis):
    network = graphs.graph(family, seed)
    if not can_be_turned(network, axis):
        assert any(isinstance(node.layer, DepthToSpace) for node in network)
        return
    volume = volume_for(network)
    got = at_once(turned(network, axis), volume.swapaxes(1, 1 + axis), "reflect")
    assert_same(got.swapaxes(1, 1 + axis), at_once(network, volume, "reflect"))


def two_layers():
    b = Builder(1)
    return b.network(b.conv(b.relu(b.conv(b.input, 4, 3, padding=1)), 2, 3, padding=1))


def test_every_plane_is_read_once_for_a_column():
    network = simplify(two_layers())
    volume = np.random.default_rng(0).standard_normal((1, 64, 20, 20)).astype(np.float32)
    made = Blocks(network, volume, "nearest", (16, 99, 99), 99, 4)
    for block in made.order:
        made.make(block)
    whole = made.layout.region(made.reads.column(made.order[0]))
    planes = [plane for start, stop in made.seen for plane in range(start, stop)]
    assert sorted(planes) == list(range(whole.start[0], whole.stop[0]))


@pytest.mark.parametrize("why", ["left out", "failed", "of another time"])
def test_a_block_whose_predecessor_is_not_there_begins_anew(why):
    network = graphs.graph("unet", 2)
    volume = volume_for(network)
    made = Blocks(network, volume, "reflect", (8, 99, 99), 99, 4)
    first, second, *others = made.order
    made.make(first)
    if why == "failed":
        with pytest.raises(RunError, match="as it should"):
            made.make(second, fail=True)
    if why == "of another time":
        made.make(second, time=1)
        made.answer[(slice(None), *second.slices)] = np.nan
    for block in others:
        made.make(block)
    made.make(second)
    assert_same(made.answer, at_once(network, volume, "reflect"))


def test_a_block_that_goes_on_from_another_would_be_found_wrong(monkeypatch):
    network = graphs.graph("unet", 2)
    volume = volume_for(network)
    made = Blocks(network, volume, "reflect", (8, 99, 99), 99, 4)
    for block in made.order[:2]:
        made.make(block)
    going = made.blocks._going
    monkeypatch.setattr(type(going), "comes_to", lambda *_: True)
    with pytest.raises((AssertionError, StopIteration)):
        made.make(made.order[3])


@pytest.fixture
def slabs_alone(slabs_alone, monkeypatch):
    """Nor are columns made in several passes."""
    ways = column_planner._ways
    monkeypatch.setattr(column_planner, "_ways", lambda *given: ways(*given)[:1])


@pytest.fixture
def small(tmp_path, slabs_alone):
    network = graphs.graph("unet", 3)
    values = np.random.default_rng(3).standard_normal((network.in_channels, 80, 40, 50))
    values = values.astype(np.float32)
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(1, 16, 16, 16))
    places = {"network": network, "input": tmp_path / "in.zarr", "output": tmp_path / "out.zarr"}
    return {**places, "chunks": 16, "memory": "2GiB"}, at_once(network, values, "reflect")


@pytest.fixture
def narrow(monkeypatch):
    """Columns of one chunk each."""
    monkeypatch.setattr(column_planner, "_WIDEST", 1)


def stored(path):
    group = zarr.open_group(path, mode="r")
    values = np.asarray(group[sorted(group.array_keys())[0]])
    return values.reshape(-1, *values.shape[-3:])


def loaded_planes(patched):
    """Columns begun from here on, and the planes of the volume that executors were given."""
    begun, planes = [], []
    honest = ColumnExecutor.slabs

    def slabs(self, column: Column, read):
        begun.append(column.output)

        def counted(span):
            planes.append(span[1] - span[0])
            return read(span)

        yield from honest(self, column, counted)

    patched.setattr(ColumnExecutor, "slabs", slabs)
    return begun, planes


def test_a_run_makes_every_column_once(small, narrow, client, monkeypatch):
    arguments, want = small
    begun, planes = loaded_planes(monkeypatch)
    summary = znni_dask.run(**arguments, client=client)
    plan = summary.plan
    assert plan.blocks_in_column > 1
    assert plan.block[0] < 80
    columns = summary.blocks // plan.blocks_in_column
    assert len(begun) == columns
    layout = Layout(simplify(arguments["network"]), (80, 40, 50), "reflect")
    assert sum(planes) == sum(layout.region(box).size[0] for box in begun)
    assert_same(stored(arguments["output"]), want)
    assert summary.peak_bytes <= plan.predicted_bytes
    amplification = summary.read_amplification
    assert amplification <= plan.reading.amplification * 1.01


def test_of_a_region_columns_are_as_long_as_it_is(small, narrow, client, monkeypatch):
    arguments, want = small
    begun, _ = loaded_planes(monkeypatch)
    summary = znni_dask.run(**arguments, client=client, roi="20:70,5:30,:", pyramid=False)
    assert summary.plan.blocks_in_column == 64 // 16
    assert {box.start[0] for box in begun} == {16}
    assert {box.stop[0] for box in begun} == {80}
    got = stored(arguments["output"])
    wanted = (slice(None), slice(20, 70), slice(5, 30))
    assert_same(got[wanted], want[wanted])
    assert not got[:, :20].any()
    assert not got[:, 70:].any()


def test_a_resumed_run_computes_again_only_what_its_first_blocks_read(
    small, narrow, client, monkeypatch
):
    arguments, want = small
    honest, written = Image.write, []

    def write(self, box, values, time=0, **where):
        if len(written) >= 2:
            raise OSError(errno.EIO, "not now")
        honest(self, box, values, time, **where)
        written.append(box)

    with monkeypatch.context() as patched:
        patched.setattr(Image, "write", write)
        with pytest.raises(RunError, match="same command"):
            znni_dask.run(**arguments, client=client, pyramid=False)
    begun, planes = loaded_planes(monkeypatch)
    summary = znni_dask.run(**arguments, client=client, pyramid=False)
    assert_same(stored(arguments["output"]), want)
    layout = Layout(simplify(arguments["network"]), (80, 40, 50), "reflect")
    assert sum(planes) == sum(layout.region(box).size[0] for box in begun)
    stop = max(box.stop[0] for box in written)
    assert begun[0].start[0] in {0, stop}
    assert len(begun) <= 1 + summary.blocks // summary.plan.blocks_in_column


def test_columns_stay_with_their_workers(small, narrow, monkeypatch):
    arguments, want = small
    made = []
    honest = ColumnBlocks.make

    def noted(self, block, *others):
        made.append((id(self), block))
        return honest(self, block, *others)

    monkeypatch.setattr(ColumnBlocks, "make", noted)
    loopback = "127.0.0.1:0"
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            processes=False,
            memory_limit=0,
            dashboard_address=loopback,
            worker_dashboard_address=loopback,
        ) as cluster,
        Client(cluster) as client,
    ):
        plan = znni_dask.run(**arguments, client=client).plan
    assert plan.blocks_in_column > 1
    where = {}
    for worker, block in made:
        where.setdefault(block.start[1:], []).append((worker, block.start[0]))
    assert len({worker for worker, _ in made}) == 2
    assert len(where) > 4
    own = [blocks for blocks in where.values() if len({worker for worker, _ in blocks}) == 1]
    # of the last columns, one of each worker's, whoever is through with its own takes part
    assert len(own) >= len(where) - 2
    for blocks in own:
        starts = [start for _, start in blocks]
        # tasks that were begun at once may overtake one another
        moved = [abs(sorted(starts).index(start) - n) for n, start in enumerate(starts)]
        assert max(moved) < plan.blocks_in_flight
    assert_same(stored(arguments["output"]), want)


def test_what_a_worker_leaves_behind_is_made_by_others(small, narrow):
    """Also the rest of a column that it had begun."""
    arguments, want = small
    killed = []

    def kill_one(done, total):
        if not killed and done > total / 6:
            pids = client.run(os.getpid)
            killed.append(min(pids))
            os.kill(pids[killed[0]], signal.SIGKILL)

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        summary = znni_dask.run(**arguments, client=client, progress=kill_one)
    assert killed
    assert summary.plan.blocks_in_column > 1
    assert_same(stored(arguments["output"]), want)


def test_a_turnstile_is_shut_when_nobody_is_within():
    turnstile, within, leave, ended = Turnstile(False), *(threading.Event() for _ in range(3))

    def be_within():
        with turnstile.coming(0), turnstile.through(0):
            within.set()
            leave.wait(10)
            ended.set()

    def shut():
        turnstile.shut()
        assert ended.is_set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(be_within)
        within.wait(10)
        second = pool.submit(shut)
        with pytest.raises(RunError, match="closed"), turnstile.coming(1), turnstile.through(1):
            pass
        leave.set()
        first.result(10)
        second.result(10)


@pytest.mark.parametrize("in_order", [True, False])
def test_who_comes_first_goes_first_where_there_is_an_order(in_order):
    turnstile, passed, arrived = Turnstile(in_order), [], threading.Barrier(4)

    def come(turn):
        with turnstile.coming(turn):
            arrived.wait()
            if turn == 2:
                return  # failed on the way: nobody waits for it
            with turnstile.through(turn):
                passed.append(turn)

    threads = [threading.Thread(target=come, args=(turn,)) for turn in (3, 2, 1, 0)]
    with ExitStack() as stack:
        for thread in threads:
            thread.start()
            stack.callback(thread.join, 10)
    assert not any(thread.is_alive() for thread in threads)
    assert passed == [0, 1, 3] if in_order else sorted(passed) == [0, 1, 3]
