"""What the README and the examples show is run here, as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import column
import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr

import demo
import sample
import score
from znni_dask import cli
from znni_dask.importers import load_network
from znni_dask.network.field_of_view import geometry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to be in, from which `examples/` can be seen."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*arguments):
    """What a process of its own prints: the memory it may use is that of a user's process."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_readmes_commands_and_code_run(workplace):
    commands = [shlex.split(c) for c in re.findall(r"^\$ (.+)$", README, re.MULTILINE)]
    assert [c[0] for c in commands] == ["pip", "python", "znni", "znni", "znni"]
    for program, *arguments in commands[1:]:
        shown = python(*(["-m", "znni_dask.cli"] if program == "znni" else []), *arguments)
    assert "holds" in shown
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        python("-c", block)
    for name in ("raw.zarr", "boundaries.zarr", "predicted.zarr"):
        yaozarrs.validate_zarr_store(name)
    assert geometry(load_network("network.onnx")).field_of_view == (8, 8, 8)


def test_the_demo_runs_and_draws(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--size", "72"])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert float(re.search(r"true membranes: ([\d.]+)", shown)[1]) > 0.9
    picture = Path(re.search(r"picture: (.+)$", shown, re.MULTILINE)[1])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_boxes_of_the_sample_agree_where_they_overlap():
    raw, truth = sample.generate((40, 70, 50), seed=3, start=(-5, 100, 1000))
    part, part_truth = sample.generate((9, 30, 20), seed=3, start=(20, 110, 1013))
    np.testing.assert_array_equal(raw[25:34, 10:40, 13:33], part)
    np.testing.assert_array_equal(truth[25:34, 10:40, 13:33], part_truth)
    other, _ = sample.generate((9, 30, 20), seed=4, start=(20, 110, 1013))
    assert (other != part).mean() > 0.5


def test_the_sample_looks_like_sections_of_tissue():
    raw, truth = sample.generate((16, 128, 128), seed=0)
    assert raw.dtype == np.uint8
    assert 0.15 < truth.mean() < 0.45
    assert raw[truth].mean() + 30 < raw[~truth].mean()
    assert 20 < raw.std() < 70


def test_average_precision_is_that_of_its_definition():
    random = np.random.default_rng(0)
    truth = random.random(200) < 0.3
    guess = np.round(truth + random.normal(0, 0.7, 200), 1)  # with ties
    steps = sorted(set(guess), reverse=True)
    precision = [truth[guess >= t].mean() for t in steps]
    recall = [0, *(truth[guess >= t].sum() / truth.sum() for t in steps)]
    want = sum(p * d for p, d in zip(precision, np.diff(recall), strict=True))
    assert score.average_precision(guess, truth) == pytest.approx(want)
    assert score.average_precision(truth.astype(float), truth) == 1
    with pytest.raises(ValueError, match="no"):
        score.average_precision(guess, np.zeros(200, bool))


@pytest.mark.parametrize("name", ["boundary_valid", "boundary_unet"])
def test_the_trained_networks_are_small_and_of_their_kind(name):
    path = ROOT / "examples" / "networks" / f"{name}.onnx"
    assert path.stat().st_size < 2 << 20
    assert geometry(load_network(path)).dense == (name == "boundary_valid")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.thorough
def test_training_runs_on_a_stack_given_by_path(workplace):
    raw, truth = sample.generate((30, 224, 224), seed=7)
    tifffile.imwrite("volume.tif", raw)
    tifffile.imwrite("labels.tif", np.where(truth, 0, 255).astype(np.uint8))
    options = ["--real", "volume.tif", "labels.tif", "--minutes", "0.02", "--output", "trained"]
    options += ["--generated", "8", "224", "224"]
    assert "boundary_valid" in python("examples/train.py", *options)
    zarr.create_array("in.zarr", data=raw[:8, :64, :64])
    for name in ("boundary_valid", "boundary_unet"):
        assert cli.main(["infer", f"trained/{name}.onnx", "in.zarr", f"{name}.zarr"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_evaluation_reports_both_networks_beside_the_best_filter(workplace):
    raw, truth = sample.generate((30, 96, 96), seed=8)
    tifffile.imwrite("volume.tif", raw)
    tifffile.imwrite("labels.tif", np.where(truth, 0, 255).astype(np.uint8))
    shown = python("examples/evaluate.py", "volume.tif", "labels.tif")
    found = {k: float(v) for k, v in re.findall(r"^(.+): ([\d.]+)$", shown, re.MULTILINE)}
    best = next(v for k, v in found.items() if k.startswith("best filter"))
    assert found["boundary_unet"] > best
    assert found["boundary_valid"] > best


def test_what_a_column_keeps_is_drawn(tmp_path, monkeypatch):
    picture = tmp_path / "column.svg"
    monkeypatch.setattr(sys, "argv", ["column.py", "--output", str(picture)])
    column.main()
    shown = picture.read_text()
    assert all(word in shown for word in ("kept", "convtranspose_4", "maxpool_4"))
