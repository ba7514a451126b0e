"""What is told of a run before it begins, and what it took beside that."""

from __future__ import annotations

import json

import numpy as np
import pytest

import graphs
import znni_dask
from znni_dask import Builder, cli
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.forecast import forecasts
from znni_dask.geometry import Box, volume
from znni_dask.importers.to_onnx import save
from znni_dask.plan import Plan
from znni_dask.primitives.work import READING, TOUCHING, WRITING
from znni_dask.report import run_lines
from znni_dask.storage.volume import open_volume

BOX = Box((0, 0, 0), (40, 48, 56))
HOW = {"memory": "2GiB", "chunks": 16, "threads": 2}


@pytest.fixture
def files(tmp_path):
    save(graphs.graph("unet", 0), tmp_path / "net.onnx")
    values = np.random.default_rng(0).standard_normal((40, 48, 56)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    return str(tmp_path / "net.onnx"), str(tmp_path / "in.npy")


@pytest.mark.parametrize("patchwise", [None, (16, 16, 16)])
def test_a_run_goes_as_it_was_told(files, tmp_path, client, patchwise):
    how = HOW | {"patchwise": patchwise}
    (told,) = forecasts(*files, **how)
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", "in.npy"}
    summary = znni_dask.run(*files, tmp_path / "out.zarr", client=client, **how)
    (one,) = summary.passes
    for name in ("patch", "block", "stages", "threads", "flops_per_voxel", "voxels_per_second"):
        assert getattr(told.plan, name) == getattr(one.plan, name)
    assert told.size == one.size
    assert told.voxels == one.voxels
    assert volume(told.blocks) == one.blocks
    assert told.stored_bytes == 4 * told.channels * told.voxels
    assert told.computing_bytes <= told.plan.predicted_bytes
    layers = {choice.layer for stage in told.plan.stages for choice in stage.choices}
    assert layers <= one.layer_seconds.keys()
    assert 0 < sum(one.layer_seconds.values()) <= summary.seconds
    computing = [line for line in run_lines(summary) if line.startswith("computing: ")]
    assert len(computing) == 1


def test_seconds_of_layers_are_those_of_the_whole(files):
    (told,) = forecasts(*files, **HOW, patch=(16, 16, 8))
    choices = [choice for stage in told.plan.stages for choice in stage.choices]
    a_voxel = sum(choice.voxel_seconds for choice in choices)
    of_input = sum(step.seconds for step in told.steps if step.kind == "Input")
    total = sum(step.seconds for step in told.steps)
    share = 1 - of_input / total
    # those at the end of z are half a patch, and count as one
    runs = told.voxels * a_voxel / share / total
    assert runs == pytest.approx(3 * 3 * 7)
    plan = told.plan
    written = 1 / WRITING.per_second / plan.threads
    read = plan.reading.amplification / READING.per_second / plan.threads
    touched = plan.predicted_bytes / TOUCHING.per_second / told.voxels
    beside = 1 / plan.voxels_per_second - a_voxel / share
    assert written < beside < written + touched + 20 * read  # the field of view is large


@pytest.mark.parametrize("edge", [8, 16])
def test_the_work_of_borders(tmp_path, edge):
    b = Builder(1)
    network = b.network(b.conv(b.conv(b.input, 4, 3), 2, 5))
    np.save(tmp_path / "in.npy", np.zeros((64, 64, 64), np.float32))
    (told,) = forecasts(network, tmp_path / "in.npy", **HOW, patch=edge)
    first, second = 4 * 27, 2 * 4 * 125
    work = first * (edge + 4) ** 3 + second * edge**3
    assert told.work_ratio == pytest.approx(work / ((first + second) * edge**3))


def test_the_command_tells_a_plan_and_writes_nothing(files, tmp_path, capsys):
    options = ["--memory", "2GiB", "--chunks", "16,16,16", "--threads", "2"]
    assert cli.main(["plan", *files, *options]) == 0
    shown = capsys.readouterr().out
    for word in ("primitive", "voxels/s", "predicted", "allowed", "blocks of", "znni measure"):
        assert word in shown
    assert cli.main(["plan", *files, *options, "--format", "json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    plan = Plan.from_json(json.dumps(told["plan"]))
    assert plan.allowed_bytes == 2 << 30
    assert told["seconds"] == pytest.approx(told["voxels"] / plan.voxels_per_second)
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", "in.npy"}
    assert cli.main(["plan", *files, "--memory", "1MiB"]) == 2
    assert "no plan fits" in capsys.readouterr().err
    with pytest.raises(MemoryLimitError):
        forecasts(*files, memory="1MiB")


@pytest.mark.parametrize("patchwise", [None, (16, 16, 16)])
def test_a_plan_is_given_back_edited(files, tmp_path, client, capsys, patchwise):
    window = ["--patchwise", "16,16,16"] if patchwise else []
    options = ["--memory", "2GiB", "--chunks", "16,16,16", *window]
    assert cli.main(["plan", *files, *options, "--threads", "1", "--format", "json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    (stage,) = told["plan"]["stages"]
    for choice in stage["choices"]:
        if choice["layer"].startswith("conv_") and "transpose" not in choice["layer"]:
            choice["primitive"] = "img2row"
    told["plan"]["block"] = [16, 48, 32]
    if not patchwise:
        told["plan"]["patch"] = [16, 24, 32]
    (tmp_path / "plan.json").write_text(json.dumps([told]))
    output = str(tmp_path / "out.zarr")
    given = ["--plan", str(tmp_path / "plan.json")]
    assert cli.main(["infer", *files, output, *options, *given]) == 0
    (again,) = forecasts(*files, **HOW | {"threads": None}, patchwise=patchwise, plan=given[1])
    assert again.plan.block == (16, 48, 32)
    assert again.plan.threads == 1
    assert "img2row" in again.plan.primitives.values()
    how = {"memory": "2GiB", "chunks": 16, "patchwise": patchwise, "client": client}
    summary = znni_dask.run(*files, tmp_path / "again.zarr", plan=again.plan, **how)
    assert summary.plan.primitives == again.plan.primitives
    assert summary.peak_bytes <= summary.plan.predicted_bytes
    znni_dask.run(*files, tmp_path / "own.zarr", **how)
    answers = [open_volume(tmp_path / n).read(BOX) for n in ("out.zarr", "again.zarr", "own.zarr")]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_allclose(answers[0], answers[2], rtol=0, atol=1e-4 * answers[2].std())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": [16, 16, 20]}, "whole chunks"),
        ({"patch": [16, 32, 16], "block": [16, 16, 16]}, "none of its block"),
        ({"patch": [0, 16, 16]}, "none of its block"),
        ({"blocks_in_flight": 9}, "in flight"),
        ({"threads": 0}, "threads"),
        ({"stages": []}, "no stages"),
        ({"stages": [{"device": "gpu", "choices": []}]}, "for a GPU, and there is none"),
        ({"stages": [{"device": "tpu", "choices": []}]}, "for tpu: here one cpu computes"),
        ({"stages": [{"device": "cpu", "choices": []}]}, "another network"),
        ({"patch": "large"}, "not a plan"),
    ],
)
@pytest.mark.every(3)
def test_plans_that_do_not_fit_are_refused(files, changed, message):
    (told,) = forecasts(*files, **HOW)
    plan = json.loads(told.plan.to_json()) | changed
    with pytest.raises(OptionError, match=message):
        forecasts(*files, memory="2GiB", chunks=16, plan=Plan.several_from_json(json.dumps(plan)))


def test_plans_are_refused_with_what_to_do(files, tmp_path):
    (told,) = forecasts(*files, **HOW, patch=BOX.size)  # one block, which keeps no chunks
    how = {"chunks": 16, "plan": told.plan}
    with pytest.raises(MemoryLimitError, match="allow as much"):
        forecasts(*files, memory=told.plan.predicted_bytes - 1, **how)
    with pytest.raises(MemoryLimitError, match="allow as much"):  # more than levels need
        forecasts(*files, memory="16MiB", **how)
    with pytest.raises(OptionError, match="either"):
        forecasts(*files, patch=16, **how)
    with pytest.raises(OptionError, match="2 plans"):
        forecasts(*files, chunks=16, plan=[told.plan, told.plan])
    with pytest.raises(OptionError, match="cannot be read"):
        forecasts(*files, plan=tmp_path / "none.json")
    (tmp_path / "odd.json").write_text("[3")
    with pytest.raises(OptionError, match="not a plan"):
        forecasts(*files, plan=tmp_path / "odd.json")


def test_a_page_of_a_plan(files, tmp_path, capsys):
    place = tmp_path / "plan.html"
    options = ["--memory", "2GiB", "--chunks", "16,16,16", "--html", str(place)]
    assert cli.main(["plan", *files, *options]) == 0
    shown = place.read_text()
    assert shown.startswith("<!doctype html>")
    assert shown.count("<svg") == 1
    for word in ("conv_", "voxels/s", "throughput against memory", "allowed", "in.npy"):
        assert word in shown
    assert "http" not in shown.split("<svg")[0]
    assert cli.main(["plan", *files, *options[:-1], str(tmp_path / "none" / "plan.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_memory_of_steps_is_within_what_is_promised(files):
    (told,) = forecasts(*files, **HOW)
    assert max(step.peak_bytes for step in told.steps) <= told.plan.predicted_bytes
    assert len({step.peak_bytes for step in told.steps}) > 1


def test_what_a_refused_run_is_told_to_allow_is_enough_for_its_levels(tmp_path):
    """Of many channels, which take levels more than blocks that are cut into small patches."""
    b = Builder(1)
    save(b.network(b.conv(b.input, 8, 1)), tmp_path / "net.onnx")
    np.save(tmp_path / "in.npy", np.zeros((130, 130, 130), np.uint8))
    places = tmp_path / "net.onnx", tmp_path / "in.npy"

    def told(**options):
        with pytest.raises(MemoryLimitError, match="allow at least") as found:
            forecasts(*places, memory="16MiB", threads=1, **options)
        return found.value

    levels, blocks = told(), told(pyramid=False)
    assert "the coarser levels" in str(levels)
    assert "no plan fits" in str(blocks)
    assert levels.needed_bytes > blocks.needed_bytes
    enough = levels.needed_bytes + (8 << 20)  # what the process took meanwhile
    forecasts(*places, memory=f"{enough}B", threads=1)
