"""Runs on paper: what can be added up by hand, what limits them, and how they are told of."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, inf

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import graphs
import simulation as benchmark
from machine import RESULTS
from sleeping import Case
from znni_dask import Builder, cli, simulation
from znni_dask.cluster import Crew, Means
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.geometry import volume
from znni_dask.importers.to_onnx import save
from znni_dask.outlook import outlooks, paces, useful_workers
from znni_dask.plan import Plan
from znni_dask.simulation import (
    COMPUTING,
    END,
    READING,
    SCHEDULER,
    WRITING,
    Blocks,
    Group,
    Shared,
    simulate,
)
from znni_dask.sketch import TASKS_PER_SECOND, Scheduler, Sketch, Store, Workers

FREE = Shared()  # nothing that is shared takes any time


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_one_worker_computes_block_after_block(in_flight):
    found = simulate([Group(1, 2.0)], Blocks(10, 64, in_flight), FREE)
    assert found.seconds == pytest.approx(20)
    assert found.busy[COMPUTING] == pytest.approx(1)
    assert (found.bottleneck, found.made) == (COMPUTING, (10,))


def test_a_single_block_in_flight_is_read_computed_and_written_in_turn():
    blocks = Blocks(5, 64, 1, read_bytes=10, write_bytes=20, read_seconds=0.5, write_seconds=0.25)
    shared = Shared(10, 10, task_seconds=0.1, latency_seconds=0.15)
    found = simulate([Group(1, 2.0)], blocks, shared)
    each = 0.1 + 0.15 + 0.5 + 1 + 2 + 0.25 + 2
    assert found.seconds == pytest.approx(5 * each)
    assert found.busy[READING] == pytest.approx(1.5 / each)
    assert found.busy[WRITING] == pytest.approx(2.25 / each)


def test_of_several_in_flight_reading_and_writing_hide_behind_computing():
    blocks = Blocks(100, 64, 3, read_bytes=10, write_bytes=5)
    found = simulate([Group(1, 2.0)], blocks, Shared(10, 10))
    assert found.seconds == pytest.approx(1 + 100 * 2 + 0.5)


@pytest.mark.parametrize(("workers", "count"), [(4, 10), (4, 12), (7, 100), (100, 64), (3, 1)])
def test_equal_workers_share_the_blocks(workers, count):
    found = simulate([Group(workers, 2.0)], Blocks(count, 64, 1), FREE)
    assert found.seconds == pytest.approx(2 * ceil(count / workers))
    assert found.made == (count,)


@pytest.mark.parametrize("in_flight", [2, 3])
def test_what_was_sent_is_not_taken_back(in_flight):
    """So that the end may last as long as what is in flight on a worker."""
    for count in range(1, 60):
        found = simulate([Group(8, 1.0)], Blocks(count, 64, in_flight), FREE)
        assert ceil(count / 8) <= found.seconds <= count / 8 + in_flight
    assert simulate([Group(8, 1.0)], Blocks(8, 64, in_flight), FREE).bottleneck == END


@pytest.mark.parametrize("way", ["read", "write"])
def test_the_store_limits(way):
    blocks = Blocks(500, 64, 3, **{f"{way}_bytes": 100.0})
    shared = Shared(**{f"{way}_bytes_per_second": 200.0})
    found = simulate([Group(8, 1.0)], blocks, shared)
    assert found.seconds == pytest.approx(500 * 100 / 200, abs=2)
    assert found.bottleneck == (READING if way == "read" else WRITING)


@pytest.mark.parametrize("way", ["read", "write"])
def test_a_workers_link_limits_it_alone(way):
    links = {f"{way}_bytes_per_second": 50.0}
    blocks = Blocks(300, 64, 3, **{f"{way}_bytes": 100.0})
    found = simulate([Group(1, 1.0, **links), Group(1, 1.0)], blocks, FREE)
    assert found.seconds == pytest.approx(200, abs=5)
    assert found.made == (pytest.approx(100, abs=4), pytest.approx(200, abs=4))


def test_links_share_the_store_fairly():
    """What some cannot take is there for others."""
    assert simulation.shares(100, [(2, 10), (0, 1), (2, 1000)]) == [10, 0, 40]
    assert simulation.shares(inf, [(2, 10), (1, 20)]) == [10, 20]
    blocks, shared = Blocks(600, 1, 2, read_bytes=10), Shared(read_bytes_per_second=60)
    links = [Group(2, 0.01, 0.0, 10.0), Group(2, 0.01, 0.0, 1000.0)]
    found = simulate(links, blocks, shared)
    assert found.seconds == pytest.approx(100, rel=0.02)
    assert found.made == (pytest.approx(200, abs=4), pytest.approx(400, abs=4))


def test_the_scheduler_limits():
    found = simulate([Group(16, 0.5)], Blocks(400, 64, 3), Shared(task_seconds=0.1))
    assert found.seconds == pytest.approx(400 * 0.1, abs=1)
    assert found.bottleneck == SCHEDULER
    assert found.busy[SCHEDULER] > 0.98


def test_what_takes_no_time_is_sent_together():
    one, blocks, shared = [Group(1, 1e-4)], Blocks(20_000, 64, 3), Shared(task_seconds=0.01)
    assert simulate(one, blocks, shared).seconds < 10
    alone = simulate(one, replace(blocks, in_order=True), shared)
    assert alone.seconds == pytest.approx(200, rel=0.01)


def test_many_workers_are_sent_several_blocks_in_a_task():
    """Were every block a task, they would wait for the scheduler."""
    many, blocks, shared = [Group(400, 2.0)], Blocks(100_000, 64, 3), Shared(task_seconds=0.01)
    found = simulate(many, blocks, shared)
    alone = simulate(many, replace(blocks, in_order=True), shared)
    assert alone.seconds == pytest.approx(1000, rel=0.01)
    assert found.seconds < 1.1 * 100_000 * 2 / 400
    assert (found.bottleneck, alone.bottleneck) == (COMPUTING, SCHEDULER)


@pytest.mark.parametrize("run", [8, 64])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_slow_workers_hold_nobody_up(run, in_flight):
    found = simulate([Group(4, 4.0), Group(4, 1.0)], Blocks(1000, run, in_flight), FREE)
    ideal = 1000 / (4 / 4 + 4 / 1)
    assert ideal <= found.seconds < 1.1 * ideal
    assert sum(found.made) == 1000
    assert found.made[1] / found.made[0] == pytest.approx(4, rel=0.1)


def test_workers_that_come_later_take_their_share():
    found = simulate([Group(4, 1.0), Group(4, 1.0, 50.0)], Blocks(1000, 64, 2), FREE)
    assert found.seconds == pytest.approx(50 + (1000 - 4 * 50) / 8, abs=2)
    assert found.there_seconds[0] == pytest.approx(4 * found.seconds)
    assert found.there_seconds[1] == pytest.approx(4 * (found.seconds - 50))
    late = simulate([Group(4, 1.0), Group(4, 1.0, 1e9)], Blocks(1000, 64, 2), FREE)
    assert late.seconds == pytest.approx(250, abs=2)
    assert (late.made, late.there_seconds[1]) == ((1000, 0), 0)


WAITING = Blocks(10_000, 64, 1, 0.0, 0.0, 0.4, 0.2)  # longer for answers than it is computed
MOVED = Blocks(10_000, 64, 3, 100.0, 50.0, 0.01, 0.01)


@pytest.mark.parametrize(
    ("blocks", "shared"),
    [
        (WAITING, FREE),
        (MOVED, Shared(2000.0, 800.0, 0.001)),
        (MOVED, Shared(1e6, 1e6, 0.1)),
        (MOVED, Shared(1e6, 1e6, 0.001)),
    ],
    ids=["answers", "store", "scheduler", "computing"],
)
def test_many_blocks_go_in_bundles(blocks, shared, monkeypatch):
    groups = [Group(5, 0.4), Group(5, 0.2, 100.0)]
    each = simulate(groups, blocks, shared)
    monkeypatch.setattr(simulation, "_MOST_EVENTS", 1500)
    found = simulate(groups, blocks, shared)
    assert (each.bundle, found.bundle) == (1, 7)
    assert found.seconds == pytest.approx(each.seconds, rel=0.03)
    assert found.bottleneck == each.bottleneck
    assert sum(found.made) == pytest.approx(10_000, abs=7)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seconds=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    after=st.floats(0, 20),
    blocks=st.builds(
        Blocks,
        count=st.integers(1, 300),
        run=st.integers(1, 64),
        in_flight=st.integers(1, 3),
        read_bytes=st.floats(0, 10),
        write_bytes=st.floats(0, 10),
        read_seconds=st.floats(0, 1),
        write_seconds=st.floats(0, 1),
        in_order=st.booleans(),
    ),
    rate=st.floats(0.5, 50),
    task=st.floats(0, 0.5),
    more=st.floats(1, 4),
)
def test_more_of_anything_makes_no_run_slower(counts, seconds, after, blocks, rate, task, more):
    """But for what is in hand at the end, by another order; never faster than any of its parts.
    With one block in flight what is quicker may bring workers into step, who then all read, and all
    write: with 5 workers, a scheduler twice as fast was seen to cost 15 %."""
    groups = [
        Group(n, s, after * number, rate / 2, rate / 2)
        for number, (n, s) in enumerate(zip(counts, seconds, strict=False))
    ]
    shared = Shared(rate, rate, task, 0.01)
    found = simulate(groups, blocks, shared)
    assert sum(found.made) == blocks.count
    alone = paces(groups, blocks, shared)
    assert found.seconds >= max(blocks.count / pace for pace in alone.values()) * (1 - 1e-9)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in found.busy.values())
    each = max(seconds) + blocks.read_seconds + blocks.write_seconds + task
    moved = (blocks.read_bytes + blocks.write_bytes) / rate * (2 + sum(counts))
    hand = blocks.in_flight * (each + moved)
    for better in (
        Shared(more * rate, rate, task, 0.01),
        Shared(rate, more * rate, task, 0.01),
        Shared(rate, rate, task / more, 0.01),
    ):
        quicker = simulate(groups, blocks, better)
        assert blocks.in_flight == 1 or quicker.seconds <= found.seconds + 2 * hand


@pytest.mark.parametrize(
    ("shared", "bottleneck"),
    [
        (Shared(task_seconds=0.001), COMPUTING),
        (Shared(task_seconds=0.01), SCHEDULER),
        (Shared(read_bytes_per_second=1e3, task_seconds=0.001), READING),
    ],
)
def test_a_thousand_workers_are_simulated_and_what_limits_them_found(shared, bottleneck):
    one_a_task = bottleneck == SCHEDULER
    blocks = Blocks(40_000, 64, 3, read_bytes=10, in_order=one_a_task)
    groups = [Group(900, 6.0), Group(100, 1.5)]
    found = simulate(groups, blocks, shared)
    assert found.bottleneck == bottleneck
    ideal = blocks.count / min(paces(groups, blocks, shared).values())
    assert ideal * (1 - 1e-9) <= found.seconds < 1.15 * ideal


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.thorough)])
def test_many_blocks_are_simulated_one_by_one(count):
    found = simulate([Group(1000, 5.0)], Blocks(count, 64, 2), Shared(task_seconds=0.001))
    assert found.seconds == pytest.approx(count * 5 / 1000, abs=40)
    assert (found.bottleneck, found.bundle) == (COMPUTING, 1)


def test_how_many_workers_are_of_use():
    """More of them change nothing."""
    blocks = Blocks(4000, 64, 2, read_bytes=100)
    shared = Shared(read_bytes_per_second=2000, task_seconds=0.02)
    useful = useful_workers([Group(10, 2.0)], blocks, shared)
    assert useful == {READING: 40, WRITING: inf, SCHEDULER: 6400, "blocks": 2000}
    found = [simulate([Group(n, 2.0)], blocks, shared).seconds for n in (20, 40, 80)]
    assert found[1] == pytest.approx(found[0] / 2, rel=0.05)
    assert found[2] == pytest.approx(found[1], rel=0.05)
    linked = useful_workers([Group(10, 2.0, 0.0, 25.0)], blocks, shared)
    assert linked[READING] == 80  # each of which takes half as much


SPEC = """
workers:
  - {count: 30, threads: 2, memory: 2GiB, price: 0.5}
  - {count: 10, threads: 8, memory: 8GiB, speed: 2, price: 2, after: 1, read: 1GB, write: 500MB}
store: {read: 40MB, write: 1e9, latency: 0.01, at_once: 4, read_ratio: 0.5}
scheduler: {tasks_per_second: 2000, latency: 0.02}
"""


def sketched(tmp_path, text):
    place = tmp_path / "cluster.yml"
    place.write_text(text)
    return Sketch.read(place)


def test_a_cluster_is_read(tmp_path):
    found = sketched(tmp_path, SPEC)
    weak, strong = found.workers
    assert weak == Workers(30, 2, 2 << 30, price=0.5)
    assert (strong.speed, strong.after_seconds, strong.write_bytes_per_second) == (2, 1, 500e6)
    assert found.store == Store(40_000_000, 10**9, 0.01, 4, 0.5)
    assert found.scheduler == Scheduler(2000, 0.02)
    assert found.count == 40
    plain = sketched(tmp_path, '{"workers": [{"count": 1, "threads": 1, "memory": 1e9}]}')
    assert plain == Sketch((Workers(1, 1, 10**9),))


GROUP = "count: 1, threads: 1, memory: 1GiB"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is None: wanted are keys out of scheduler, store, workers"),
        ("[]", "wanted are keys"),
        ("store: {read: 1GB}", "workers is None: a list of groups is wanted"),
        ("workers: []", r"workers is \[\]"),
        ("workers: 5", "a list of groups"),
        ("workers: [5]", "workers 1 is 5: wanted are keys out of after, count"),
        (
            "workers: [{count: 1, threads: 1}]",
            "workers 1 has no memory: say count, memory, threads",
        ),
        (f"workers: [{{{GROUP}, gpus: 1}}]", "workers 1 has the key 'gpus', which means nothing"),
        (f"workers: [{{{GROUP}}}, {{{GROUP}, 3: 1}}]", "workers 2 has the key 3"),
        (f"workers: [{{{GROUP}, price: -1}}]", "price is -1: a number, 0 or more, is wanted"),
        (f"workers: [{{{GROUP}, price: .nan}}]", "price is nan"),
        (f"workers: [{{{GROUP}, speed: 0}}]", "speed is 0: a number more than 0"),
        (f"workers: [{{{GROUP}, speed: fast}}]", "speed is 'fast'"),
        (f"workers: [{{{GROUP}, speed: [1]}}]", r"speed is \[1\]"),
        (f"workers: [{{{GROUP}, read: much}}]", "read is 'much': a number of bytes a second"),
        (f"workers: [{{{GROUP}, read: true}}]", "read is True"),
        ("workers: [{count: 1.5, threads: 1, memory: 1GiB}]", "count is 1.5: a whole number"),
        ("workers: [{count: .inf, threads: 1, memory: 1GiB}]", "count is inf"),
        (
            "workers: [{count: 1000000000, threads: 1, memory: 1GiB}]",
            "1,000,000,000 workers: 100,000 at",
        ),
        ("workers: [{count: 1, threads: 0, memory: 1GiB}]", "threads is 0"),
        (f"workers: [{{{GROUP}}}]\nstore: {{latency: -1}}", "store: latency is -1"),
        (f"workers: [{{{GROUP}}}]\nstore: fast", "store is 'fast'"),
        (f"workers: [{{{GROUP}}}]\nscheduler: {{tasks_per_second: 0}}", "scheduler: tasks_per"),
        (f"workers: [{{{GROUP}}}]\nnetwork: 10GB", "has the key 'network'"),
        ("workers: [", "is not YAML"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
        ("[" * 500, "is not YAML"),
        ("#" * (1 << 17), "told of in a few lines"),
    ],
)
def test_what_tells_of_no_cluster_is_refused(tmp_path, text, message):
    with pytest.raises(OptionError, match=message):
        sketched(tmp_path, text)


def test_a_cluster_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        Sketch.read(tmp_path / "none.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="cannot be read"):
        Sketch.read(tmp_path / "binary.yml")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network, a volume of nothing, and a cluster."""
    folder = tmp_path_factory.mktemp("paper")
    save(graphs.graph("unet", 0), folder / "net.onnx")
    zarr.create_array(folder / "in.zarr", shape=(2048,) * 3, chunks=(64,) * 3, dtype="uint8")
    (folder / "cluster.yml").write_text(SPEC)
    return folder


@pytest.fixture(scope="module")
def arguments(files):
    names = "net.onnx", "in.zarr"
    return [*(str(files / name) for name in names), "--chunks", "64,64,64", "--patch", "64,64,64"]


def test_the_command_tells_of_a_cluster(files, arguments, capsys):
    cluster = ["--cluster", str(files / "cluster.yml")]
    assert cli.main(["plan", *arguments, *cluster]) == 0
    shown = capsys.readouterr().out
    for word in ("40 workers", "worker-hours", "costs", "most busy: reading", "enough for workers"):
        assert word in shown
    for word in ("32,768 blocks", "the scheduler limits these workers where", "not counted"):
        assert word in shown
    assert cli.main(["plan", *arguments, *cluster, "--format", "json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    found, plan = told["cluster"], Plan.from_json(json.dumps(told))
    assert plan.allowed_bytes == 2 << 30
    assert found["blocks"] == 32**3
    assert found["read_bytes"] == pytest.approx(plan.reading.amplification * 2048**3 / 2)
    assert found["alone_seconds"][READING] == pytest.approx(found["read_bytes"] / 40e6)
    assert found["seconds"] == pytest.approx(found["alone_seconds"][READING], rel=0.02)
    assert found["bottleneck"] == READING
    weak, strong = found["groups"]
    waiting = ceil(32**3 / 40) * 40 / 32**3  # in the end
    assert weak["voxels_per_second"] == pytest.approx(waiting * plan.voxels_per_second)
    assert strong["voxels_per_second"] > 2 * weak["voxels_per_second"]  # by a plan of its own
    hours = [group["there_seconds"] / 3600 for group in found["groups"]]
    assert hours[1] == pytest.approx(10 * (found["seconds"] - 1) / 3600)
    assert found["price"] == pytest.approx(0.5 * hours[0] + 2 * hours[1])
    assert found["worker_seconds"] == pytest.approx(3600 * sum(hours))


def test_a_scheduler_that_limits_is_told_of(files, arguments, tmp_path, capsys):
    (tmp_path / "many.yml").write_text(
        "workers: [{count: 1000, threads: 2, memory: 2GiB}]\nscheduler: {tasks_per_second: 1}\n"
    )
    assert cli.main(["plan", *arguments, "--cluster", str(tmp_path / "many.yml")]) == 0
    shown = capsys.readouterr().out
    assert "most busy: the scheduler" in shown
    assert "let blocks grow" in shown
    assert "by the scheduler" in shown


def test_passes_follow_one_another(files):
    """Workers that came late for the first are there for the second."""
    b = Builder(1)
    fine = b.conv(b.input, 1, 3, padding="same")
    coarse = b.conv(b.max_pool(fine, 2), 1, 3, padding="same")
    network = b.network({"fine": fine, "coarse": coarse})
    sketch = Sketch((Workers(2, 2, 2 << 30, price=3600.0, after_seconds=5.0),))
    (first, fine_found), (second, found) = outlooks(
        network, files / "in.zarr", sketch, chunks=64, patch=64
    )
    assert (first.voxels, second.voxels) == (2048**3, 1024**3)
    assert fine_found.worker_seconds == pytest.approx(2 * (fine_found.seconds - 5))
    assert found.price == found.worker_seconds == pytest.approx(2 * found.seconds)


def test_the_rate_of_the_scheduler_is_one_that_was_measured():
    (place,) = RESULTS.glob("simulation-*.json")
    rates = [row["tasks_per_second"] for row in json.loads(place.read_text())["rows"]]
    assert min(rates) < TASKS_PER_SECOND < max(rates)


@pytest.mark.parametrize(
    "case",
    [
        Case("reading", (Group(4, 0.1),), 40, 3, read_seconds=0.08),
        Case("later", (Group(2, 0.3), Group(2, 0.3, 1.0)), 40),
    ],
    ids=lambda case: case.name,
)
def test_workers_that_sleep_take_as_long_as_simulated(case, monkeypatch):
    """About: the machine may be busy, and hand out no faster than they sleep."""
    monkeypatch.setattr(benchmark, "EMPTY", 40)
    found = benchmark.measured(case)
    least = 40 * 0.08 if case.read_seconds else 1 + (40 - 2 / 0.3) / (4 / 0.3)
    assert found["predicted_seconds"] >= least
    assert 0.95 * least < found["seconds"] < 2 * found["predicted_seconds"] + 2


def test_what_a_cluster_tells_is_not_said_twice(files, arguments, capsys):
    for more in (["--memory", "2GiB"], ["--threads", "2"]):
        cluster = ["--cluster", str(files / "cluster.yml")]
        assert cli.main(["plan", *arguments, *more, *cluster]) == 2
        assert "give either" in capsys.readouterr().err
    tiny = Sketch((Workers(1, 1, 1 << 20),))
    with pytest.raises(MemoryLimitError):
        outlooks(files / "net.onnx", files / "in.zarr", tiny, chunks=64, patch=64)


def test_workers_on_paper_have_no_gpu(files, arguments, capsys):
    cluster = ["--cluster", str(files / "cluster.yml")]
    assert cli.main(["plan", *arguments, "--device", "gpu", *cluster]) == 2
    assert "a GPU is asked for, and there is none: a cluster on" in capsys.readouterr().err


def test_kinds_of_workers_on_paper_are_those_that_most_of_them_are():
    weak, strong = Means(1, 1 << 30, 0), [Means(n, 1 << 30, 0) for n in (2, 3, 4, 5)]
    groups = {str(n): means for n, means in enumerate([weak, *strong])}
    crew = Crew.of(groups, {"0": 1, "1": 2, "2": 3, "3": 4, "4": 900})
    assert crew.workers == 910
    assert [means.threads for means in crew.kinds] == [1, 5, 4, 3]


def test_all_workers_on_paper_are_to_have_work(tmp_path):
    """Blocks are as small as for as many workers that are there, and what they wait for in the end
    is counted once."""
    save(graphs.graph("unet", 0), tmp_path / "net.onnx")
    zarr.create_array(tmp_path / "in.zarr", shape=(256,) * 3, chunks=(32,) * 3, dtype="uint8")
    files = tmp_path / "net.onnx", tmp_path / "in.zarr"
    ((alone, _),) = outlooks(*files, Sketch((Workers(1, 2, 8 << 30),)), chunks=32)
    ((forecast, found),) = outlooks(*files, Sketch((Workers(100, 2, 8 << 30),)), chunks=32)
    assert volume(forecast.plan.block) < volume(alone.plan.block)
    assert found.blocks >= 100
    (group,) = found.groups
    assert group.voxels_per_second == pytest.approx(alone.plan.voxels_per_second, rel=0.5)
    assert group.voxels_per_second >= forecast.plan.voxels_per_second
