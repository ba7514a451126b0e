"""Convolution by PyTorch: threads, memory and words are the project's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from textwrap import dedent

import numpy as np
import pytest

import oracle
from znni_dask.choices import Menu, choose_primitives
from znni_dask.errors import OptionError
from znni_dask.geometry import Box
from znni_dask.kernels.team import Team
from znni_dask.network.build import Builder
from znni_dask.network.layers import LOWER, Conv
from znni_dask.patches import Layout
from znni_dask.primitives import conv_torch
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_torch import ConvTorch
from znni_dask.primitives.table import candidates
from znni_dask.primitives.work import Rate
from znni_dask.schedule import Schedules


def test_without_torch_it_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(conv_torch, "installed", lambda: False)
    layer = Conv(3, 4, (3, 3, 3))
    assert "pip install 'znni_dask[torch]'" in ConvTorch().refusal(layer)
    assert not any(isinstance(p, ConvTorch) for p in candidates(layer))


def test_a_torch_without_onednn_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(OptionError, match="without oneDNN"):
        ConvTorch().prepare(Conv(1, 1, (1, 1, 1)), {"weight": np.ones((1,) * 5, np.float32)})


def test_what_torch_is_told_of_threads_is_taken_back():
    import torch

    layer, shape = Conv(2, 3, (3, 3, 3)), (4, 2, 8, 8, 8)
    problem = Problem(layer, (shape,), (4, 3, 6, 6, 6), ((0, 0, 0),), (0, 0, 0), shape[2:])
    weights = {k: np.ones(s, np.float32) for k, s in layer.weight_shapes().items()}
    primitive = ConvTorch()
    out = np.empty(problem.output, np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Team(2) as team:
            x = np.ones(shape, np.float32)
            primitive.apply(primitive.prepare(layer, weights), problem, [x], out, team)
        assert torch.get_num_threads() == 3
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [3]
    finally:
        torch.set_num_threads(before)


_MEASURED = """
    import json, os, threading, time
    import numpy as np
    from znni_dask import machine
    from znni_dask.kernels.team import Team
    from znni_dask.network.layers import Conv
    from znni_dask.primitives.base import Problem
    from znni_dask.primitives.conv_torch import ConvTorch

    same, me, found = ((1, 1, 1), (1, 1, 1)), os.getpid(), []
    primitive, peaks, ended = ConvTorch(), [0, 0], threading.Event()

    def watch():
        while not ended.wait(0.001):
            now = machine.anonymous_bytes(me), len(os.listdir(f"/proc/{me}/task"))
            peaks[:] = map(max, peaks, now)

    layers = [
        (Conv(256, 256, (3, 3, 3), padding=same), (4, 14, 14)),
        (Conv(24, 40, (3, 3, 3)), (34, 50, 50)),
        (Conv(512, 256, (3, 3, 3), padding=same, relu=True), (1, 4, 4)),
        (Conv(24, 24, (3, 3, 3), (2, 2, 2), groups=3), (65, 65, 65)),
    ]
    tasks = len(os.listdir(f"/proc/{me}/task"))
    team, before = Team(2), machine.anonymous_bytes(me)
    for layer, size in layers:
        weights = {k: np.ones(s, np.float32) for k, s in layer.weight_shapes().items()}
        prepared = primitive.prepare(layer, weights)
        if not found:
            library = machine.anonymous_bytes(me) - before
            watcher = threading.Thread(target=watch)
            watcher.start()
        made = [layer.window(axis).size(size[axis]) for axis in range(3)]
        offset = tuple(layer.window(axis).offset(0, 0) for axis in range(3))
        shape, output = (1, layer.in_channels, *size), (1, layer.out_channels, *made)
        problem = Problem(layer, (shape,), output, (offset,), (0, 0, 0), size)
        x, out = np.ones(shape, np.float32), np.ones(output, np.float32)
        base = machine.anonymous_bytes(me)
        peaks[0] = 0
        for _ in range(6):
            primitive.apply(prepared, problem, [x], out, team)
        found.append((peaks[0] - base, primitive.workspace_bytes(problem, 2)))
    ended.set()
    print(json.dumps({"found": found, "tasks": peaks[1], "before": tasks, "library": library}))
"""


def test_memory_and_threads_of_the_process_stay_within_what_is_promised():
    done = subprocess.run(
        [sys.executable, "-c", dedent(_MEASURED)], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["library"] <= ConvTorch.library_bytes + (20 << 20)  # and the first layer's kernels
    found = said["found"]
    assert max(measured for measured, _ in found) > 0  # of a small layer less than others gave back
    assert all(measured <= promised for measured, promised in found)
    assert said["tasks"] == said["before"] + 2  # one of the team, one that watches


@pytest.mark.parametrize("rate", [1e7, 1e13])
def test_the_planner_takes_it_where_it_is_faster(rate, monkeypatch):
    monkeypatch.setitem(conv_torch.RATES, "float32", Rate("torch", rate))
    b = Builder(1)
    x = b.conv(b.input, 64, 3)
    network = b.network(b.conv(x, 64, 7, groups=4))
    layout = Layout(network, (300, 300, 300), "reflect")
    plain = Schedules(layout, choose_primitives(layout))
    asked = Menu.of_patches(
        plain,
        Box((0, 0, 0), (64, 64, 64)),
        1000,
        threads=2,
    )
    roomy, narrow = (asked.fastest_within(room).values() for room in (2e9, 1.5e8))
    assert any(isinstance(p, ConvTorch) for p in roomy) == (rate == 1e13)
    assert not any(isinstance(p, ConvTorch) for p in narrow)  # no room for torch itself


def test_lower_precision_is_computed_only_where_it_is_asked_for():
    layer, lower = Conv(20, 24, (3, 3, 3), padding=((1, 1, 1), (1, 1, 1))), ConvTorch(lower=True)
    assert lower not in candidates(layer)
    assert "float32" in lower.refusal(layer)
    asked = replace(layer, precision=LOWER)
    assert {ConvTorch(), lower} <= set(candidates(asked))
    random = np.random.default_rng(0)
    weights = {
        k: random.standard_normal(s).astype(np.float32) for k, s in asked.weight_shapes().items()
    }
    x = random.standard_normal((2, 20, 6, 9, 14)).astype(np.float32)
    shape = (2, 24, 6, 9, 14)
    problem = Problem(asked, (x.shape,), shape, ((-1, -1, -1),), (0, 0, 0), x.shape[2:])
    out = np.full(shape, np.nan, np.float32)
    with Team(2) as team:
        lower.apply(lower.prepare(asked, weights), problem, [x], out, team)
    want = np.stack([oracle._apply(layer, [one.astype(np.float64)], weights) for one in x])
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert 1e-4 < error < 1e-2  # eight bits of the values and of the weights
