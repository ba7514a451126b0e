"""The benchmarks measure what they say, and documents show what they measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

import accuracy
import bandwidth
import chart
import convolution
import gpu
import gpu_layers
import gpu_rates
import oracle
import peers
from gpu_device import Bench
from layer import Point, Ready, fastest
from rounds import Timing
from znni_dask.kernels.team import Team
from znni_dask.network.chains import Row, chain
from znni_dask.network.layers import Conv, ConvTranspose, MaxPool
from znni_dask.primitives.base import Form

ROOT = chart.DOCUMENTS.parent
POINTS = [
    Point(Conv(3, 20, (3, 2, 4), relu=True), 3, 9, batch=2),
    Point(Conv(1, 5, (2, 2, 2), (2, 2, 2), relu=True), 1, 8, given=Form.PLAIN),
    Point(Conv(17, 3, (1, 1, 1)), 17, 6, wanted=Form.PLAIN),
    Point(Conv(8, 8, (3, 3, 3), groups=4), 8, 6),
    Point(ConvTranspose(6, 4, (2, 2, 2), (2, 2, 2)), 6, 5),
]


def expected(point):
    weights = {key: value.astype(float) for key, value in point.weights.items()}
    return np.stack([oracle._apply(point.layer, [x.astype(float)], weights) for x in point.x])


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_the_project_and_its_peers_compute_the_same_layer(point):
    with Team(1) as team:
        own = Ready(point, fastest(point, 1), team)
        own.run()
        np.testing.assert_allclose(own.answer(point), expected(point), rtol=1e-4, atol=1e-5)
    others = peers.Peers(point, 1)
    differences = others.differences(expected(point).astype(np.float32))
    assert {"torch", "torch channels last"} <= set(differences)
    for name, difference in differences.items():
        assert difference < (2e-2 if name.endswith("bf16") else 1e-5), name
    for name, reason in others.reasons.items():
        assert name not in differences
        assert reason


def test_a_part_stands_for_the_whole_by_its_share_of_the_work():
    point = Point(Conv(8, 4, (3, 3, 3)), 8, 20, batch=10)
    assert point.part(1e12) == point
    assert point.part(point.flops / 5).batch == 2
    part = point.part(point.flops / 30)
    assert part.batch == 1
    assert point.flops / part.flops == pytest.approx(30, rel=0.1)
    with Team(1) as team:
        own = Ready(point, fastest(point, 1), team)
        own.run()
        want = own.answer(point)[: part.batch, :, : part.output[2]]
        np.testing.assert_array_equal(own.answer(part), want)
        np.testing.assert_allclose(want, expected(part), rtol=1e-4, atol=1e-5)


def all_taking(timings):
    """Every call run once, and said to take what is given, or three seconds."""

    def side_by_side(calls, team):
        for call in calls.values():
            call()
        return {name: timings.get(name, Timing(3.0, 1.0, 5)) for name in calls}

    return side_by_side


def test_a_row_tells_parts_scaled_and_why_a_peer_cannot(monkeypatch):
    def refuses(point, threads):
        raise RuntimeError("no such layer here\nand more")

    monkeypatch.setitem(peers._MADE, "openvino", refuses)
    monkeypatch.setattr(convolution, "PEER_FLOPS", POINTS[0].flops / 2)
    timings = {"own": Timing(0.5, 1.0, 5), "torch": Timing(2.0, 1.0, 5)}
    monkeypatch.setattr(convolution, "side_by_side", all_taking(timings))
    with Team(1) as team:
        row = convolution.measure(POINTS[0], team, {"copy_gigabytes_per_second": 30.0})
    assert row["peers"]["openvino"] == {"seconds": None, "reason": "no such layer here"}
    assert row["peers"]["torch"]["part"] == 0.5
    assert row["peers"]["torch"]["seconds"] == 4.0
    assert (row["best_peer"], row["times"], row["times_bf16"]) == ("torch", 8.0, 12.0)


def test_an_answer_that_is_not_the_projects_own_ends_the_benchmark(monkeypatch):
    right = peers._MADE["torch"]

    def wrong(point, threads):
        call, answer = right(point, threads)
        return call, lambda: answer() + np.float32(0.01)

    monkeypatch.setitem(peers._MADE, "torch", wrong)
    monkeypatch.setattr(convolution, "side_by_side", all_taking({}))
    with Team(1) as team, pytest.raises(SystemExit, match=r"torch differs by \d\.\de-03 "):
        convolution.measure(POINTS[0], team, {"copy_gigabytes_per_second": 30.0})


def test_the_best_peers_of_either_precision_are_compared_apart():
    found = {
        "a": {"seconds": 6.0},
        "b": {"seconds": 4.0},
        "b bf16": {"seconds": 1.0},
        "c": {"seconds": None, "reason": "cannot"},
    }
    assert convolution.compared(2.0, found) == {"best_peer": "b", "times": 2.0, "times_bf16": 0.5}
    assert convolution.compared(2.0, {"c": found["c"]})["times"] is None


@pytest.mark.parametrize("case", bandwidth.CASES, ids=lambda case: case.name)
def test_every_layer_that_moves_data_runs_and_its_bytes_are_counted(case):
    small = replace(case, edge=11 if case.fragments else 9)
    with Team(1) as team:
        call, moved = bandwidth.ready(small, team)
        call()
    values = sum(np.prod(shape) for shape in (*small.problem.inputs, small.problem.output))
    assert moved >= 4 * values


def test_the_reference_of_accuracy_is_the_oracle():
    random = np.random.default_rng(0)
    for layer in (Conv(2, 3, (3, 2, 4), relu=True), MaxPool((2, 2, 2), (2, 2, 2))):
        x = random.standard_normal((2, 24, 9, 10))
        weights = {
            key: random.standard_normal(shape) for key, shape in layer.weight_shapes().items()
        }
        got, want = accuracy.exact(layer, weights, x), oracle._apply(layer, [x], weights)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_errors_are_measured_for_every_primitive_and_input(monkeypatch):
    monkeypatch.setattr(accuracy, "KERNELS", (3,))
    monkeypatch.setattr(accuracy, "FANS", ((2, 3),))
    monkeypatch.setattr(accuracy, "MADE", 6)
    with Team(1) as team:
        rows = list(accuracy.errors_of_primitives(team))
    kinds = {row["input"] for row in rows}
    assert len(kinds) == 5
    names = {row["primitive"] for row in rows}
    assert {"torch", "direct", "direct blocked"} < names
    assert len(rows) == len(kinds) * len(names)
    assert all(0 < row["error"] < (1e-6 if row["input"] == "mean 0" else 1e-3) for row in rows)


def test_errors_are_measured_for_whole_networks(monkeypatch):
    kinds = ("CONV", "POOL", "CONV", "POOL", "CONV")
    rows = [Row(kind, (2, 2, 2) if kind == "POOL" else (3, 3, 3), 4) for kind in kinds]
    monkeypatch.setattr(accuracy, "PAPER_NETWORKS", {"small": lambda: chain(1, rows)})
    with Team(1) as team:
        (row,) = accuracy.errors_of_networks(["small"], team)
    assert row["input"] == 18 + 3 * 4 - 1
    assert 0 < row["error"] < 1e-6


def test_all_that_is_measured_on_a_gpu_runs_on_a_simulated_one(tmp_path):
    parts = [*gpu.PARTS, gpu.RATES]
    path = gpu.run(Bench(simulated=True, quick=True), parts, None, tmp_path)
    assert path.name == "gpu-simulated.json"
    found = json.loads(path.read_text())
    assert found["device"]["device"] == "simulated"
    for part in parts:
        assert "failed" not in found[part], found[part]
        assert not found[part].get("left_out"), found[part]
    assert found["floors"]["floors"].keys() == {"copy", "products"}
    assert all(row["whole_float32"] for row in found["floors"]["products"])
    for point in (*found["layers"]["rows"], *found["ends"]["rows"]):
        assert not point["wrong"]
        assert point["best"] in point["rows"]
        for name, row in point["rows"].items():
            assert not row["reason"]
            assert row["error"] < (2e-2 if "bfloat16" in name else 1e-5)
        assert all(peer["times"] > 0 for peer in point["peers"].values())
    tiled = next(row for name, row in found["layers"]["rows"][0]["rows"].items() if "tiled" in name)
    assert tiled["kernels"].keys() == {"forward", "product", "inverse"}
    assert all(not row["reason"] and row["seconds"] > 0 for row in found["moving"]["rows"])
    assert {"weave", "fragments", "normalisation"} <= {
        row["primitive"] for row in found["moving"]["rows"]
    }
    for network in found["networks"]["rows"].values():
        assert network["right"]
        assert network["times"].keys() == {"float32", "tf32", "bfloat16"}
    for name, row in found["unets"]["rows"].items():
        assert not row["reason"]
        assert row["error"] < (3e-2 if "bfloat16" in name else 1e-5)
    for made in found["overlap"]["rows"].values():
        assert made["largest_difference"] <= 1
        assert 0 < made["busy_share"] <= made["busy_share_between_patches"] <= 1.01
    assert len(found["rates"]["lines"]) == 6


def test_a_part_that_fails_leaves_the_others_and_what_was_kept(tmp_path, monkeypatch):
    def fail(bench):
        raise RuntimeError("no more")

    parts = {"one": (lambda bench: {"rows": [1]}, 1), "two": (fail, 1)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    bench = Bench(simulated=True, quick=True)
    gpu.run(bench, ["one"], None, tmp_path)
    found = json.loads(gpu.run(bench, ["two"], None, tmp_path).read_text())
    assert found["one"]["rows"] == [1]
    assert "no more" in found["two"]["failed"]


def test_what_there_is_no_time_for_is_left_out():
    found = gpu_layers.middle(Bench(simulated=True, quick=True, end=0.0))
    assert found == {"rows": [], "left_out": ["3 → 4, 3³, 2 × 9³"]}


def test_rates_are_those_by_which_rows_were_made():
    random, names = np.random.default_rng(0), ("gpu memory", "gpu products", "gpu transforms")
    speeds, rows = (2e12, 3e13, 1e13), []
    for amounts in random.uniform(1e9, 1e12, (20, 3)):
        seconds = float(sum(amounts / speeds))
        told = {"seconds": seconds, "estimated_seconds": seconds / 2, "family": "gpu tiled fft"}
        rows.append(told | {"amounts": dict(zip(names, amounts, strict=True))})
    found = gpu_rates.rates_from({"layers": {"rows": [point_of(rows)]}})
    assert found["fitted"] == pytest.approx(dict(zip(names, speeds, strict=True)))
    assert found["off_by"] == {"gpu tiled fft": pytest.approx(2)}
    assert found["lines"][0] == 'MEMORY = Rate("gpu memory", 2e+12)'


def point_of(rows):
    """A point of a benchmark that has these rows, and peers that took a second."""
    peers = {precision: {"seconds": 1.0} for precision in ("tf32", "bfloat16")}
    return {"flops": 1e12, "peers": peers, "rows": {str(i): row for i, row in enumerate(rows)}}


def test_the_tables_of_the_documents_are_those_of_the_results():
    found = 0
    for path in chart.DOCUMENTS.glob("*.md"):
        text = path.read_text()
        found += text.count("<!-- table: ")
        assert text == chart.written(text), f"{path}: run python benchmarks/chart.py"
    assert found


def test_the_picture_and_the_readme_show_the_results(tmp_path):
    result = json.loads(chart.PICTURED.read_text())
    chart.draw(result, tmp_path / "drawn.svg")
    drawn, kept = (texts(path) for path in (tmp_path / "drawn.svg", chart.PICTURE))
    assert drawn == kept, "run python benchmarks/chart.py"
    means = result["groups"]["middle"]["geometric_means"]
    for layer, mean in means.items():
        assert layer in drawn
        assert f"{mean:.1f}×" in drawn
    shown = ", ".join(f"{mean:.1f}" for mean in means.values())
    assert f"{shown} times as fast" in (ROOT / "README.md").read_text()


def texts(path):
    """All words in a picture."""
    tree = ElementTree.parse(path)  # one of our own
    return {re.sub(r"\s+", " ", element.text) for element in tree.iter() if element.text}
