"""The study of the paper: every algorithm makes the same answer, and plans that are told can be."""

from __future__ import annotations

import numpy as np
import pytest

import study
from test_identity import assert_same
from znni_dask.costs import Costs
from znni_dask.executors.serial import SerialExecutor
from znni_dask.network.chains import Row, chain
from znni_dask.patches import Layout

FOUND = study._Found(2, Costs())


@pytest.fixture
def small(monkeypatch):
    """A network like those of the paper, of few channels, on a small volume."""
    rows = [
        *(Row("CONV", (3, 3, 3), 6), Row("POOL", (2, 2, 2)), Row("CONV", (3, 2, 3), 6)),
        *(Row("POOL", (2, 2, 2)), Row("CONV", (2, 2, 2), 3)),
    ]
    monkeypatch.setitem(study.PAPER_NETWORKS, "small", lambda: chain(1, rows))
    monkeypatch.setattr(study, "VOLUME", (40, 40, 40))


def answer(algorithm, edge, x):
    how = study.ALGORITHMS[algorithm]
    layout = how.layout("small")
    schedules = how.schedules(layout, edge, 1, FOUND)
    todo = schedules.schedule(study._cube(edge))
    out = np.empty((3, edge, edge, edge), np.float32)
    with SerialExecutor(schedules, schedules.sizes(todo.output), 2) as executor:
        executor.run(todo, [x[(slice(None), *todo.input.slices)]], [out])
    return out, schedules


def test_all_algorithms_make_the_same_answer(small):
    x = np.random.default_rng(0).standard_normal((1, *study.VOLUME)).astype(np.float32)
    want, _ = answer("fastest of all", 8, x)
    families = {}
    for algorithm, how in study.ALGORITHMS.items():
        got, schedules = answer(algorithm, 8, x)
        assert_same(got, want)
        names = {primitive.family for primitive in schedules.primitives.values()}
        assert how.family is None or how.family in names
        families[algorithm] = schedules
    assert families["direct"].repeats == 1
    assert families["direct, once per offset"].repeats == 64


def test_dilated_networks_neither_stride_nor_make_fragments(small):
    layout = study.ALGORITHMS["direct, dilated"].layout("small")
    assert isinstance(layout, Layout)
    assert not layout.strided
    spread = [node.layer.dilation for node in layout.network if node.inputs]
    assert spread == [(1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (4, 4, 4)]


def test_what_is_told_grows_with_what_it_takes(small):
    told = study.by_patch("small", FOUND)
    for rows in told.values():
        sizes = [row["bytes"] for row in rows]
        assert sizes == sorted(sizes)
    several = study.by_samples("small", FOUND)
    assert several["8"][0]["bytes"] > several["1"][0]["bytes"]


def test_the_best_patch_that_fits_is_run():
    def row(edge, rate, nbytes):
        return {"edge": edge, "voxels_per_second": rate, "bytes": nbytes}

    rows = [row(8, 10.0, 1e9), row(16, 500.0, 2e9), row(32, 600.0, 3e9), row(64, 1e6, 2e10)]
    assert study.worth_running(rows)["edge"] == 16  # one of 32³ takes a minute, 64³ is too large
    assert study.worth_running(rows[3:]) is None
