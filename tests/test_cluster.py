"""Workers of every kind: what they have, what they are handed, what becomes of it when they go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import zarr
from distributed import Client, LocalCluster, get_worker

import znni_dask
from kills import failing_after
from test_identity import assert_same
from znni_dask import cluster as cluster_module
from znni_dask import costs, feeding, passes, tasks
from znni_dask import worker as worker_module
from znni_dask.cli import main
from znni_dask.cluster import Cluster, Crew, Means, connected, share
from znni_dask.errors import DeviceError, MemoryLimitError, OptionError, RunError
from znni_dask.feeding import Work, feed
from znni_dask.job import BlockMaker
from znni_dask.machine import anonymous_bytes

LOOPBACK = "127.0.0.1:0"


def local(workers, processes=False, **how):
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=2,
        processes=processes,
        dashboard_address=LOOPBACK,
        worker_dashboard_address=LOOPBACK,
        **{"memory_limit": 0, **how},
    )


@pytest.fixture(scope="module")
def two():
    """Two workers in this process."""
    with local(2) as cluster, Client(cluster, set_as_default=False) as client:
        yield Cluster(client)


def stored(path):
    group = zarr.open_group(path, mode="r")
    values = np.asarray(group["0"])
    return values.reshape(-1, *values.shape[-3:])


def test_workers_of_this_machine_share_what_is_allowed():
    each = share(2, "4GiB", 7)
    assert each.threads == 3
    assert 2 * each.allowed_bytes + anonymous_bytes() <= 4 << 30


@pytest.mark.parametrize(
    ("workers", "memory", "threads", "error", "message"),
    [
        (0, None, None, OptionError, "at least one"),
        (3, None, 2, OptionError, "3 workers and 2 threads"),
        (2, "1MiB", 2, MemoryLimitError, "beside the workers"),
    ],
)
def test_what_cannot_be_shared_is_refused(workers, memory, threads, error, message):
    with pytest.raises(error, match=message):
        share(workers, memory, threads)


def test_a_worker_has_what_dask_gave_it_or_its_own_configuration(two):
    (found, *_) = two.means().values()
    assert found.threads == 2
    with local(1, memory_limit="2GiB") as limited, Client(limited, set_as_default=False) as client:
        (found,) = Cluster(client).means().values()
        assert found.allowed_bytes == pytest.approx(0.6 * (2 << 30), abs=2)
        (found,) = Cluster(client, memory="1GiB", threads=5).means().values()
        assert (found.threads, found.allowed_bytes) == (5, 1 << 30)
        wanted = {"threads": 3, "memory": 2**31}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(cluster_module.dask.config.config, "znni", wanted)
            (found,) = Cluster(client).means().values()
        assert (found.threads, found.allowed_bytes) == (3, 2**31)


def test_workers_that_have_more_are_planned_for_apart():
    """Not for every megabyte, and not for more than a few kinds."""
    weak, alike, threads, memory = (
        *(Means(2, 8 << 30, 1 << 30), Means(2, 9 << 30, 2 << 30)),
        *(Means(8, 8 << 30, 1 << 30), Means(2, 64 << 30, 1 << 30)),
    )
    crew = Crew.of({"a": weak, "b": alike, "c": threads, "d": memory, "e": memory})
    assert crew.kinds == (Means(2, 8 << 30, 2 << 30), memory, threads)
    assert crew.kind == {"a": 0, "b": 0, "c": 2, "d": 1, "e": 1}
    many = {str(n): Means(n, 8 << 30, 0) for n in range(1, 20)}
    assert len(Crew.of(many).kinds) <= 4


@pytest.fixture
def strong(two, monkeypatch):
    """One of the two has twice the threads of the other."""
    strong, honest = min(two.workers()), Cluster.means

    def means(self, workers=None):
        found = honest(self, workers)
        return {
            w: Means(2 if w == strong else 1, one.allowed_bytes, one.baseline_bytes)
            for w, one in found.items()
        }

    monkeypatch.setattr(Cluster, "means", means)
    return strong


def test_a_mixed_cluster_makes_one_answer_by_several_plans(files, two, strong, monkeypatch):
    places, want = files
    plans, begun = {}, BlockMaker._prepared

    def prepared(self, kind):
        plans[get_worker().address] = self.job.plans[kind]
        return begun(self, kind)

    monkeypatch.setattr(BlockMaker, "_prepared", prepared)
    how = {"client": two.client, "chunks": 16, "patch": 16, "memory": "8GiB"}
    summary = znni_dask.run(*places, **how)
    assert {worker: plan.threads for worker, plan in plans.items()} == {
        worker: 2 if worker == strong else 1 for worker in two.workers()
    }
    assert {plan.block for plan in plans.values()} == {summary.plan.block}
    assert_same(stored(places[2]), want)


def test_plans_are_made_for_all_workers(files, two, monkeypatch):
    planned, honest = [], passes.plan_for

    def plan_for(laid, resources, *told, **more):
        planned.append(resources.workers)
        return honest(laid, resources, *told, **more)

    monkeypatch.setattr(passes, "plan_for", plan_for)
    znni_dask.run(*files[0], client=two.client, chunks=16, memory="8GiB")
    assert set(planned) == {2}


def test_a_plan_that_was_given_is_that_of_all_workers(files, two, strong):
    places, want = files
    how = {"client": two.client, "chunks": 16, "memory": "8GiB"}
    plan = znni_dask.run(*places, patch=16, **how).plan
    summary = znni_dask.run(*places, plan=plan, overwrite=True, **how)
    assert summary.blocks > 4
    assert_same(stored(places[2]), want)


def test_what_is_half_made_is_never_complete(files, two, monkeypatch):
    """Also where it was to be begun anew, on a cluster that is not there."""
    places, _ = files
    how = {"client": two.client, "chunks": 16, "patch": 16, "memory": "8GiB"}
    with monkeypatch.context() as patched:
        failing_after(3, patched, "not now")
        with pytest.raises(RunError):
            znni_dask.run(*places, **how)
    timeouts = cluster_module.dask.config.config["distributed"]["comm"]["timeouts"]
    monkeypatch.setitem(timeouts, "connect", "100ms")
    with pytest.raises(OptionError, match="no scheduler"):
        znni_dask.run(*places, overwrite=True, client="tcp://127.0.0.1:9")
    assert znni_dask.run(*places, **how).blocks > 0


def test_workers_of_one_process_share_its_memory(two):
    found = Cluster(two.client, memory="8GiB").means()
    room = sum(one.allowed_bytes - one.baseline_bytes for one in found.values())
    assert len(found) == 2
    assert room + min(one.baseline_bytes for one in found.values()) <= 8 << 30


def test_workers_of_another_version_are_refused(two, monkeypatch):
    versions = iter(["0.9", "0.9"])  # of the workers, which are asked first
    monkeypatch.setattr(cluster_module, "version", lambda name: next(versions, "1.0"))
    with pytest.raises(OptionError, match=r"has znni_dask 0\.9, here is 1\.0"):
        two.means()


def test_a_cluster_without_workers_is_refused(monkeypatch):
    monkeypatch.setattr(cluster_module, "_FIRST_WORKER_SECONDS", 0.1)
    with (
        local(0) as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(OptionError, match="znni worker"),
    ):
        Cluster(client).crew()


def test_a_scheduler_that_is_not_there_is_told_of(monkeypatch):
    monkeypatch.setitem(
        cluster_module.dask.config.config["distributed"]["comm"]["timeouts"], "connect", "100ms"
    )
    with pytest.raises(OptionError, match="no scheduler"), connected("tcp://127.0.0.1:9"):
        pass
    with pytest.raises(OptionError, match="either"), connected("tcp://127.0.0.1:9", 2):
        pass


TASKS = {}


def call(name, item):
    """Runs on a worker within this process; the task itself does not travel."""
    return TASKS[name](item)


def fed(cluster, runs, task, in_flight=2):
    """What came of every item."""
    found = {}
    TASKS["task"] = task

    def finished(item, outcome):
        assert item not in found
        found[item] = outcome
        return True

    def send(_, item):
        return partial(call, "task", item)

    feed(cluster, cluster.crew(), Work(iter(runs), in_flight, send, finished, in_order=True))
    return found


def where(item):
    return get_worker().address


def test_a_run_goes_to_one_worker_and_what_is_left_is_shared(two):
    barrier = threading.Barrier(2)
    first = set()

    def task(item):
        if get_worker().address not in first:
            first.add(get_worker().address)
            barrier.wait(10)  # both have begun
        return get_worker().address

    found = fed(two, [range(8), range(8, 16)], task, in_flight=1)
    assert len(found) == 16
    assert found[0] != found[8]
    for run in (range(8), range(8, 16)):
        places = [found[item] for item in run]
        assert sum(a != b for a, b in pairwise(places)) <= 1


def test_of_one_run_the_second_worker_takes_half(two):
    found = fed(two, [range(20)], where)
    assert len(found) == 20
    assert len(set(found.values())) == 2


def test_a_slow_worker_is_left_with_less(two):
    slow = min(two.workers())

    def task(item):
        time.sleep(0.4 if get_worker().address == slow else 0.01)
        return get_worker().address

    for runs in (([n] for n in range(30)), [range(15), range(15, 30)]):
        count = Counter(fed(two, runs, task, in_flight=1).values())
        assert count[slow] < 10


def test_no_worker_has_more_in_flight_than_it_may(two, monkeypatch):
    sent, most = Counter(), Counter()
    honest = two.client.submit

    def submit(*given, workers, **how):
        sent[workers[0]] += 1
        most[workers[0]] = max(most[workers[0]], sent[workers[0]])
        return honest(*given, workers=workers, **how)

    monkeypatch.setattr(two.client, "submit", submit)

    def finished(item, outcome):
        sent[outcome] -= 1
        return True

    asked = iter(range(100))
    runs = ([n] for n in asked)
    work = Work(runs, 3, lambda _, n: partial(where, n), finished, in_order=True)
    feed(two, two.crew(), work)
    assert max(most.values()) == 3


def test_what_takes_no_time_is_sent_together_and_blamed_alone(two):
    tries, sent = Counter(), []
    honest = two.client.submit

    def task(item):
        tries[item] += 1
        if item == 750:
            raise RunError("poison")
        return item

    def submit(function, calls, seconds, **how):
        sent.append(len(calls))
        return honest(function, calls, seconds, **how)

    TASKS["together"], found = task, {}

    def finished(item, outcome):
        found[item] = outcome
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two.client, "submit", submit)
        patch.setattr(tasks, "TASK_SECONDS", 10)  # also where others use the machine
        runs = (range(n, n + 100) for n in range(0, 1000, 100))
        work = Work(runs, 2, lambda _, n: partial(call, "together", n), finished)
        feed(two, two.crew(), work)
    assert isinstance(found.pop(750), RunError)
    assert found == {n: n for n in range(1000) if n != 750}
    assert max(sent) > 1
    assert max(tries.values()) == 1


def test_a_task_ends_when_its_time_is_over_and_keeps_what_was_made():
    calls = [partial(int, text) for text in ("1", "2", "x", "4")]
    assert feeding._called(calls, most_seconds=0)[:2] == ([1], None)
    made, error, _ = feeding._called(calls, most_seconds=60)
    assert made == [1, 2]
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match="invalid literal"):
        feeding._called(calls[2:], most_seconds=60)


def test_a_worker_whose_device_fails_takes_nothing_from_others(two):
    """What it had is done by the other one; alone it is asked as often as any."""
    failing, tries = [], Counter()

    def task(item):
        here = get_worker().address
        if not failing:
            failing.append(here)
        if here == failing[0]:
            tries[item] += 1
            raise DeviceError("lost")
        return item

    found = fed(two, (range(n, n + 10) for n in range(0, 100, 10)), task)
    assert found == {n: n for n in range(100)}
    assert sum(tries.values()) <= 2  # that were in flight


def test_nothing_more_is_begun_once_that_is_said(two):
    begun = []

    def tasks(_, item):
        begun.append(item)
        return partial(where, item)

    runs = ([n] for n in range(100))
    feed(two, two.crew(), Work(runs, 1, tasks, lambda item, outcome: False))
    assert len(begun) <= 2


@pytest.mark.parametrize(("failures", "ends"), [(2, "well"), (3, "in failure")])
def test_what_fails_is_tried_again_some_times(two, failures, ends):
    tries = Counter()

    def task(item):
        tries[item] += 1
        if item == 5 and tries[item] <= failures:
            raise ValueError("not yet")
        return item

    found = fed(two, ([n] for n in range(10)), task)
    assert len(found) == 10
    assert isinstance(found[5], ValueError) == (ends == "in failure")
    assert tries[5] == 3
    assert all(tries[n] == 1 for n in range(10) if n != 5)


@pytest.mark.parametrize("error", [RunError("NaN"), OSError(28, "no space left")])
def test_what_would_fail_again_is_not_tried(two, error):
    tries = []

    def task(item):
        tries.append(item)
        raise error

    assert len(fed(two, [[0]], task)) == 1
    assert tries == [0]


def test_a_poisoned_block_is_reported_and_all_others_are_made(files, two, monkeypatch):
    places, want = files
    honest, tries = BlockMaker.make, []

    def make(self, time, block, kind):
        if block.start == (16, 16, 0):
            tries.append(block)
            raise ValueError("poison")
        return honest(self, time, block, kind)

    with monkeypatch.context() as patched:
        patched.setattr(BlockMaker, "make", make)
        with pytest.raises(RunError, match=r"1 of \d+ blocks failed.*\n.*poison"):
            znni_dask.run(*places, client=two.client, chunks=16, patch=16, memory="8GiB")
    assert len(tries) == 3
    again = znni_dask.run(*places, client=two.client, chunks=16, patch=16, memory="8GiB")
    assert again.blocks == 1
    assert_same(stored(places[2]), want)


def slowly(item):
    time.sleep(0.01)
    return get_worker().address


def test_workers_that_come_later_take_part_if_they_can():
    with local(1) as growing, Client(growing, set_as_default=False) as client:
        for takes, count in ((lambda *_: False, 1), (lambda *_: True, 2), (None, 2)):
            growing.scale(1)
            growing.sync(growing._correct_state)
            grown = []

            def finished(item, outcome, grown=grown):
                if not grown:
                    growing.scale(2)
                    client.wait_for_workers(2)
                grown.append(outcome)
                return True

            runs, task = ([n] for n in range(60)), lambda _, n: partial(slowly, n)
            cluster = Cluster(client)
            feed(cluster, cluster.crew(), Work(runs, 1, task, finished, takes, True))
            assert len(grown) == 60
            assert len(set(grown)) == count


@pytest.mark.parametrize("hears", [True, False])
def test_workers_that_go_as_they_are_told_to_are_blamed_for_nothing(hears, monkeypatch):
    """Also where nobody tells of it: a client tells but one."""
    monkeypatch.setattr(feeding, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(feeding, "_TRIES", 2 if hears else 5)  # unheard, it may have died
    with local(3) as shrinking, Client(shrinking, set_as_default=False) as client:
        if not hears:
            monkeypatch.setattr(client, "subscribe_topic", lambda *_: None)
            monkeypatch.setattr(client, "unsubscribe_topic", lambda *_: None)
        found = {}

        def finished(item, outcome):
            found[item] = outcome
            if len(found) in (5, 15):
                there = sorted(shrinking.scheduler.workers)
                client.retire_workers([there[0]], close_workers=True)
            return True

        cluster = Cluster(client)
        runs, task = ([n] for n in range(40)), lambda _, n: partial(slowly, n)
        feed(cluster, cluster.crew(), Work(runs, 2, task, finished, in_order=True))
    assert len(found) == 40
    assert not [one for one in found.values() if isinstance(one, BaseException)]


def dying(item):
    if item == 3:
        os._exit(1)
    time.sleep(0.02)
    return item


def test_what_kills_its_workers_is_given_up_and_all_else_is_done():
    found = {}

    def finished(item, outcome):
        found[item] = outcome
        return True

    with local(2, processes=True) as mortal, Client(mortal, set_as_default=False) as client:
        cluster = Cluster(client)
        work = Work(iter([range(12)]), 2, lambda _, n: partial(dying, n), finished)
        feed(cluster, cluster.crew(), work)
    assert isinstance(found.pop(3), ConnectionError)
    assert found == {n: n for n in range(12) if n != 3}


def test_workers_killed_at_any_moment_change_nothing(kills, files):
    (network, volume, target), want = files
    random, how = np.random.default_rng(2), {"chunks": 8, "patch": 8, "memory": "8GiB"}
    with local(2, processes=True) as mortal, Client(mortal, set_as_default=False) as client:
        undisturbed = znni_dask.run(network, volume, target, client=client, **how)
        first = stored(target)
        assert_same(first, want)
        for _ in range(kills or 1):
            nannies = [*mortal.workers.values()]
            killed = random.choice([nanny.pid for nanny in nannies])
            moment = float(random.uniform(0, undisturbed.seconds))
            killing = threading.Timer(moment, os.kill, (killed, signal.SIGKILL))
            killing.start()
            made = znni_dask.run(network, volume, target, client=client, overwrite=True, **how)
            killing.join()
            assert made.blocks == undisturbed.blocks == 125
            np.testing.assert_array_equal(stored(target), first)
            client.wait_for_workers(2)


def test_a_scheduler_that_goes_leaves_a_run_that_can_be_finished(files, two, monkeypatch):
    places, want = files
    timeouts = cluster_module.dask.config.config["distributed"]["comm"]["timeouts"]
    monkeypatch.setitem(timeouts, "connect", "1s")  # workers that end look for it, too
    how = {"chunks": 16, "patch": 16, "memory": "8GiB"}
    with local(1) as ending, Client(ending, set_as_default=False, timeout="1s") as client:

        def end(done, total):
            if client.status == "running" and done > total / 3:
                ending.sync(ending.scheduler.close)

        with pytest.raises(RunError, match="the same command goes on"):
            znni_dask.run(*places, client=client, progress=end, **how)
    again = znni_dask.run(*places, client=two.client, **how)
    assert 0 < again.blocks < 27
    assert_same(stored(places[2]), want)


KILLED = """
import os, sys
import znni_dask

def progress(done, total):
    if done > total / 3:
        os._exit(1)

znni_dask.run(*sys.argv[2:5], client=sys.argv[1], progress=progress, chunks=16, patch=16)
"""


def test_what_a_killed_client_left_on_workers_goes(files):
    """Else the memory of two runs would be taken there."""
    places, want = files
    with local(1, protocol="tcp://", memory_limit="8GiB") as cluster:
        address = cluster.scheduler_address
        done = subprocess.run([sys.executable, "-c", KILLED, address, *places], check=False)
        assert done.returncode == 1
        (worker,) = cluster.workers.values()
        (left,) = (p for p in worker.plugins.values() if isinstance(p, BlockMaker))
        with Client(address, set_as_default=False) as client:
            for other in (places[0], places[2].removesuffix("arr")):
                Cluster(client).forget(Path(other))
                assert left in worker.plugins.values()  # of another output
            Cluster(client).forget(Path(places[2]))
            assert left not in worker.plugins.values()
        znni_dask.run(*places, client=address, chunks=16, patch=16)
        assert not [p for p in worker.plugins.values() if isinstance(p, BlockMaker)]
    assert left._computing._shut
    assert_same(stored(places[2]), want)


def test_a_run_on_workers_of_this_machine(files, capsys):
    places, want = files
    how = ["--workers", "2", "--memory", "4GiB", "--threads", "2", "--chunks", "16,16,16"]
    assert main(["infer", *places, *how]) == 0
    assert_same(stored(places[2]), want)
    shown = capsys.readouterr().out
    assert "1 threads" in shown
    assert "by 2 workers; memory of each" in shown
    told = zarr.open_group(places[2], mode="r").attrs["znni_run"]
    assert told["layer_seconds"].keys() == told["predicted_layer_seconds"].keys()
    assert told["voxels"] == 40**3
    assert 0 < told["peak_bytes"] <= told["predicted_bytes"] <= told["allowed_bytes"] < 2 << 30


def test_a_run_on_workers_that_were_started_by_hand(files):
    """By `znni worker`, which dies with its scheduler."""
    places, want = files
    with local(0, protocol="tcp://") as cluster:
        address = cluster.scheduler_address
        command = [sys.executable, "-m", "znni_dask.cli", "worker", address, "--name", "here"]
        with subprocess.Popen([*command, "--threads", "1", "--memory", "3GiB"]) as process:
            try:
                how = {"client": address, "chunks": 16, "patch": 16}
                summary = znni_dask.run(*places, **how)
                told = [(w.name, w.resources) for w in cluster.scheduler.workers.values()]
                this = psutil.Process(process.pid)
                listening = {
                    connection.laddr.ip
                    for one in (this, *this.children(recursive=True))
                    for connection in one.net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN
                }
            finally:
                process.terminate()
    assert told == [("here", {"CPU": 1})]
    assert listening == {"127.0.0.1"}  # to the scheduler, and not to all the world
    assert (summary.plan.threads, summary.plan.allowed_bytes) == (1, 3 << 30)
    assert_same(stored(places[2]), want)


def test_a_worker_without_a_scheduler_says_so(capsys):
    assert main(["worker", "nonsense", "--threads", "1"]) == 2
    assert "no worker could begin for nonsense" in capsys.readouterr().err


def test_there_is_a_worker_for_every_node(monkeypatch):
    halves = [frozenset({0, 1}), frozenset({2, 3})]
    monkeypatch.setattr(worker_module, "nodes", lambda: halves)
    monkeypatch.setattr(worker_module, "cores", lambda: 4)
    found = worker_module.places("4GiB")
    assert [place.cores for place in found] == halves
    assert {place.means for place in found} == {Means(2, 2 << 30, 0)}
    assert found[1].environment["DASK_ZNNI__CORES"] == "2 3"
    (one,) = worker_module.places("4GiB", threads=3)
    assert (one.cores, one.means.threads) == (None, 3)
    monkeypatch.setattr(worker_module, "cores", lambda: 3)  # a container's
    assert len(worker_module.places("4GiB")) == 1


@pytest.mark.parametrize(
    ("nodes", "gpus", "places"),
    [
        (2, 1, [({0, 1, 2, 3}, "7"), ({4, 5, 6, 7}, None)]),
        (2, 2, [({0, 1, 2, 3}, "7"), ({4, 5, 6, 7}, "8")]),
        (2, 4, [({0, 2}, "7"), ({1, 3}, "8"), ({4, 6}, "9"), ({5, 7}, "3")]),
        (1, 2, [(None, "7"), (None, "8")]),
        (1, 0, [(None, None)]),
    ],
)
def test_every_gpu_has_a_worker(nodes, gpus, places, monkeypatch):
    whole = [frozenset(range(8 * n // nodes, 8 * (n + 1) // nodes)) for n in range(nodes)]
    monkeypatch.setattr(worker_module, "nodes", lambda: whole)
    monkeypatch.setattr(worker_module, "cores", lambda: 8)
    monkeypatch.setattr(worker_module, "gpus", lambda: ["7", "8", "9", "3"][:gpus])
    found = worker_module.places("4GiB")
    assert [(place.cores, place.gpu) for place in found] == places
    for place, (_, gpu) in zip(found, places, strict=True):
        assert place.environment["CUDA_VISIBLE_DEVICES"] == (gpu or "")
        assert place.resources == {"CPU": 1} | ({"GPU": 1} if gpu else {})
        assert place.means == Means(8 // len(places), (4 << 30) // len(places), 0)


@pytest.fixture(scope="module")
def mixed():
    """Two workers in processes of their own, of which one has a GPU, which is simulated."""
    with local(2, processes=True) as cluster, Client(cluster, set_as_default=False) as client:
        worker = min(client.scheduler_info(n_workers=-1)["workers"])
        told = {"znni.simulated-gpu": "1GiB"}
        client.run(cluster_module.dask.config.set, told, workers=[worker])
        yield client, worker


def computing(path):
    """Of every worker the devices that computed there, as the timeline tells."""
    events = json.loads(Path(path).read_text())
    named = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    lanes = [e for e in events if e.get("name") == "thread_name"]
    found = {worker: set() for worker in named.values()}
    for lane in lanes:
        on_gpu = lane["args"]["name"].startswith("device")
        found[named[lane["pid"]]].add("gpu" if on_gpu else "host")
    return found


@pytest.mark.parametrize("device", ["cpu", "gpu", "auto"])
def test_blocks_are_computed_where_they_were_asked_to_be(
    files, mixed, device, tmp_path, monkeypatch
):
    (client, worker), (places, want) = mixed, files
    honest = costs.model_seconds
    quick = lambda p, *told: honest(p, *told) / (1000 if p.device == "gpu" else 1)  # noqa: E731
    monkeypatch.setattr(costs, "model_seconds", quick)  # so that it is the faster one
    name = client.scheduler_info(n_workers=-1)["workers"][worker]["name"]
    line = tmp_path / "line.json"
    how = {"client": client, "chunks": 8, "patch": 8, "memory": "8GiB", "threads": 1}
    summary = znni_dask.run(*places, device=device, timeline=line, **how)
    assert summary.workers == (1 if device == "gpu" else 2)
    who = computing(line)
    assert set(who) == {str(name)} if device == "gpu" else len(who) == 2
    for one, devices in who.items():
        on_gpu = one == str(name) and device != "cpu"
        assert devices == ({"gpu", "host"} if on_gpu else {"host"})
    assert_same(stored(places[2]), want)


def test_a_cluster_without_a_gpu_is_refused_where_one_is_asked_for(files, two):
    with pytest.raises(OptionError, match="a GPU was asked for, and there is none"):
        znni_dask.run(*files[0], device="gpu", client=two.client)


def test_a_worker_stays_on_its_cores(monkeypatch):
    kept = []
    monkeypatch.setattr(
        worker_module.os, "sched_setaffinity", lambda pid, cores: kept.append(cores)
    )
    worker_module.dask_setup(None)
    assert kept == []
    monkeypatch.setitem(cluster_module.dask.config.config, "znni", {"cores": "2 3"})
    worker_module.dask_setup(None)
    assert kept == [{2, 3}]
