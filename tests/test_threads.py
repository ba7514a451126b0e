"""Threads: as many compute as were asked for, where the process may run, on one NUMA node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from dask import system

from znni_dask import Builder, machine
from znni_dask.importers.to_onnx import save
from znni_dask.kernels import team as teams
from znni_dask.kernels.team import Team

# A run in a process where numpy's BLAS, PyTorch and numba have begun their pools. Counted are the
# threads that spend more than a tenth of what the busiest one does while blocks are computed. Two
# do not count: they look after memory and messages all the time, however long computing takes.
RUN = """
import json, os, sys, threading, time
if cores := json.loads(sys.argv[4]):
    os.sched_setaffinity(0, cores)
import numpy as np, psutil, torch
from numba.np.ufunc.parallel import _launch_threads
import znni_dask
from znni_dask.executors.patches import PatchBlocks
if __name__ == "__main__":
    _launch_threads()
    torch.ones(999, 999) @ torch.ones(999, 999)
    np.ones((999, 999)) @ np.ones((999, 999))
    time.sleep(1)  # until these pools have come to rest
    process, computing, places = psutil.Process(), [], set()
    honest = PatchBlocks.make
    def seconds():
        names = {t.native_id: t.name for t in threading.enumerate()}
        return {
            t.id: t.user_time + t.system_time
            for t in process.threads()
            if names.get(t.id) not in ("IO loop", "znni-memory")
        }
    def watched(self, *arguments):
        before = seconds()
        honest(self, *arguments)
        spent = [s - before.get(tid, 0) for tid, s in seconds().items()]
        computing.append(sum(s > max(spent) / 10 for s in spent))
        for tid in seconds():
            places.add(tuple(sorted(os.sched_getaffinity(tid))))
    PatchBlocks.make = watched
    threads = json.loads(sys.argv[5])
    made = znni_dask.run(*sys.argv[1:4], chunks=96, patch=96, memory="4GiB", threads=threads)
    pools = len(seconds())
    print(json.dumps([computing, sorted(places), made.plan.threads, pools]))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network and a volume of one block: nothing is read or written while it is computed."""
    folder = tmp_path_factory.mktemp("threads")
    b = Builder(1)
    x = b.relu(b.conv(b.input, 24, 5, padding="same"))
    x = b.resize(b.max_pool(b.conv(x, 24, 5, padding="same"), 2), 2)
    save(b.network(b.conv(x, 2, 3, padding="same")), folder / "net.onnx")
    values = np.random.default_rng(0).standard_normal((96, 96, 96)).astype(np.float32)
    np.save(folder / "in.npy", values)
    return folder


def watched_run(files, cores, threads):
    names = [str(files / name) for name in ("net.onnx", "in.npy", f"{cores}-{threads}.zarr")]
    command = [sys.executable, "-c", RUN, *names, json.dumps(cores), json.dumps(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_compute_as_were_asked_for(threads, files):
    computing, _, planned, there = watched_run(files, None, threads)
    assert computing == [planned] == [threads]
    assert there > threads + 1  # there are others, of pools, which could have


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen by Linux's means")
def test_a_run_stays_on_the_cores_that_the_process_was_given(files):
    core = min(os.sched_getaffinity(0))
    computing, places, planned, _ = watched_run(files, [core], None)
    assert computing == [planned] == [1]
    assert places == [[core]]


def test_a_quota_on_the_processor_counts_too(monkeypatch):
    monkeypatch.setattr(system, "_try_extract_cgroup_cpu_quota", lambda: (50_000, 100_000))
    assert machine.cores() == 1


def noted(folder, *lists):
    """A tree like the system's, of nodes with these cores."""
    for number, cores in enumerate(lists):
        place = folder / f"node{number}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cores + "\n")
    return folder


def test_nodes_are_those_of_the_system_as_far_as_the_process_may_run_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3, 8, 9, 30}, raising=False)
    folder = noted(tmp_path, "0-3,8-11", "4-7,12-15", "", *["40"] * 7, "30")
    assert machine.nodes(folder) == [{1, 2, 3, 8, 9}, {30}]
    assert machine.nodes(tmp_path / "none") == []


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen by Linux's means")
@pytest.mark.parametrize(
    ("nodes", "threads", "want"),
    [
        ([{0}, {1, 2, 3}], 3, {1, 2, 3}),
        ([{0, 1}, {2, 3}], 3, None),
        ([{0, 1, 2, 3}], 2, None),
        ([], 1, None),
    ],
)
def test_a_node_is_chosen_that_has_enough_cores(nodes, threads, want, monkeypatch):
    monkeypatch.setattr(machine, "nodes", lambda: [frozenset(n) for n in nodes])
    assert machine.node_for(threads) == want


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen by Linux's means")
def test_a_team_stays_on_its_node_and_leaves_its_caller_where_it_was(monkeypatch):
    ours = os.sched_getaffinity(0)
    core = max(ours)
    monkeypatch.setattr(teams, "node_for", lambda threads: frozenset({core}))
    seen, both = {}, threading.Barrier(2, timeout=60)

    def work(first, last):
        if threading.get_ident() not in seen:
            seen[threading.get_ident()] = os.sched_getaffinity(0)
            both.wait()  # so that each of them has some of it

    with Team(2) as team:
        team.share(work, 8)
    assert list(seen.values()) == [{core}, {core}]
    assert os.sched_getaffinity(0) == ours


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen by Linux's means")
def test_this_thread_computes_on_the_node_where_it_runs(monkeypatch):
    for core in os.sched_getaffinity(0):
        found = [frozenset({1 << 20}), frozenset({core})]
        monkeypatch.setattr(machine, "nodes", lambda found=found: found)
        with machine.staying_on(frozenset({core})):
            assert machine.node_for(1) == {core}
