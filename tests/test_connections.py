"""Connections to a cluster: encrypted ones, and workers that fall silent."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from subprocess import Popen

import dask
import distributed
import pytest
from distributed import Client
from distributed.security import Security

import znni_dask
from test_cluster import local, stored
from test_identity import assert_same
from znni_dask.cluster import connected
from znni_dask.errors import OptionError

HOW = {"chunks": 16, "patch": 16, "memory": "8GiB"}


def test_an_encrypted_cluster_is_reached_as_dask_is_configured(files):
    places, want = files
    keys = Security.temporary()
    client = keys.get_tls_config_for_role("client")
    tls = "distributed.comm.tls"
    told = {
        f"{tls}.ca-file": client["ca_file"],
        f"{tls}.client.cert": client["cert"],
        f"{tls}.client.key": client["key"],
    }
    with local(1, processes=False, protocol="tls://", security=keys) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        with dask.config.set(told):
            znni_dask.run(*places, client=address, **HOW)
        assert_same(stored(places[2]), want)
        with pytest.raises(OptionError, match=r"tls://.* it is encrypted, .* no certificate"):
            znni_dask.run(*places[:2], places[2] + ".2", client=address, **HOW)


def test_what_a_silent_worker_had_goes_to_others(files, monkeypatch):
    """One that is cut off, say: neither it nor its connection tells of it, and it writes on when it
    is back. Ten seconds: on a busy machine one that starts says nothing for more than a second."""
    places, want = files
    monkeypatch.setattr(distributed.scheduler, "heartbeat_interval", lambda _: 0.1)
    with (
        dask.config.set({"distributed.scheduler.worker-ttl": "10s"}),
        local(0, protocol="tcp://") as cluster,
        Client(cluster, set_as_default=False) as client,
        ExitStack() as stack,
    ):
        command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address]
        options = ["--no-nanny", "--no-dashboard", "--nthreads", "2"]
        begun = [stack.enter_context(Popen([*command, *options])) for _ in range(2)]
        client.wait_for_workers(2)
        silent, left = begun

        def fall_silent(done, total):
            if done > total / 3:
                silent.send_signal(signal.SIGSTOP)

        try:
            made = znni_dask.run(*places, client=client, progress=fall_silent, **HOW)
            assert made.blocks == 27
            assert len(cluster.scheduler.workers) == 1
        finally:
            silent.send_signal(signal.SIGCONT)
            left.terminate()
        silent.wait(30)
    assert_same(stored(places[2]), want)


def test_dask_wakes_up_rarely_where_it_is_started_here():
    """Every time takes a core from what is computed."""
    with connected(workers=1, memory="4GiB") as cluster:
        (told,) = cluster.client.run(dask.config.get, "distributed.admin").values()
        (profiled,) = cluster.client.run(
            dask.config.get, "distributed.worker.profile.enabled"
        ).values()
    assert told["tick"]["interval"] == "1s"
    assert not profiled
