"""The command line as people use it: what it prints, what it returns, what it leaves behind."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import graphs
from znni_dask import cli
from znni_dask.errors import InputError
from znni_dask.importers.to_onnx import save
from znni_dask.kernels import compiled
from znni_dask.network import layers
from znni_dask.network.build import Builder
from znni_dask.storage.volume import open_volume


@pytest.fixture
def files(tmp_path):
    save(graphs.graph("unet", 0), tmp_path / "net.onnx")
    np.save(tmp_path / "in.npy", np.random.default_rng(0).integers(0, 255, (20, 30, 40), np.uint8))
    return tmp_path


def test_info_shows_geometry_and_layers(files, capsys):
    assert cli.main(["info", str(files / "net.onnx")]) == 0
    shown = capsys.readouterr().out
    for word in ("field of view", "halo", "alignment", "output stride", "Conv", "MACs/voxel"):
        assert word in shown
    assert cli.main(["info", "n537"]) == 0
    assert "163" in capsys.readouterr().out


def test_infer_then_verify(files, capsys):
    network, volume, output = (str(files / n) for n in ("net.onnx", "in.npy", "out.zarr"))
    options = ["--patch", "8,16,16", "--chunks", "8,16,16", "--memory", "2GiB", "--threads", "2"]
    assert cli.main(["infer", network, volume, output, *options]) == 0
    shown = capsys.readouterr().out
    for word in ("100.0 %", "voxels/s", "left", "measured", "predicted", "allowed"):
        assert word in shown
    assert open_volume(output).size == (20, 30, 40)
    assert cli.main(["verify", network, volume, output, "--size", "8,8,8"]) == 0
    assert "holds" in capsys.readouterr().out
    array = output + "/0"
    import zarr

    zarr.open_array(array, mode="r+")[...] = 1
    assert cli.main(["verify", network, volume, output]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_an_existing_output_needs_overwrite(files, capsys):
    arguments = ["infer", str(files / "net.onnx"), str(files / "in.npy"), str(files / "o.zarr")]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    other = [*arguments, "--boundary", "nearest"]
    assert cli.main(other) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main([*other, "--overwrite"]) == 0


def test_an_output_of_another_volume_is_not_taken_for_complete(files, capsys):
    np.save(files / "other.npy", np.load(files / "in.npy"))
    network, output = str(files / "net.onnx"), str(files / "o.zarr")
    assert cli.main(["infer", network, str(files / "in.npy"), output]) == 0
    assert cli.main(["infer", network, str(files / "other.npy"), output]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "{}/none.onnx", "{}/in.npy", "{}/o.zarr"], "no network at"),
        (["infer", "{}/in.npy", "{}/in.npy", "{}/o.zarr"], "cannot read"),
        (["infer", "{}/net.onnx", "{}/none", "{}/o.zarr"], "no volume at"),
        (["infer", "{}/net.onnx", "{}/in.npy", "{}/in.npy"], "the input"),
        (["infer", "{}/net.onnx", "{}/in.npy", "{}/o.zarr", "--memory", "9"], "no plan fits"),
        (["infer", "{}/net.onnx", "{}/in.npy", "{}/o.zarr", "--memory", "much"], "12GiB"),
        (["infer", "{}/net.onnx", "{}/in.npy", "{}/o.zarr", "--range", "1", "0"], "empty"),
        (["verify", "{}/net.onnx", "{}/in.npy", "{}/in.npy"], "not made by znni infer"),
        (["info", "{}/in.npy"], "in.npy"),
        (["infer", "{}/net.onnx", "{}/in.npy", "{}/o.zarr", "--memory", "1e999"], "12GiB"),
        (["infer", "{}/net.onnx", "{}/in.npy", "{}/o.zarr", "--nan", "nan"], "finite"),
        (["verify", "{}/net.onnx", "{}/in.npy", "{}/in.npy", "--seed", "-1"], "seed"),
    ],
)
def test_bad_input_gives_one_message_exit_code_2_and_no_output(arguments, message, files, capsys):
    before = sorted(files.iterdir())
    assert cli.main([a.replace("{}", str(files)) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("znni: ")
    assert message in said.err
    assert "Traceback" not in said.err
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["infer", "a", "b"],
        ["infer", "a", "b", "c", "--patch", "8,8"],
        ["infer", "a", "b", "c", "--boundary", "mirror"],
        ["infer", "a", "b", "c", "--range", "x", "1"],
    ],
)
def test_a_wrong_command_line_shows_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as found:
        cli.main(arguments)
    assert found.value.code == 2
    assert "usage: znni" in capsys.readouterr().err


def test_names_that_look_like_markup_are_shown_as_they_are(files, capsys):
    b = Builder(1)
    x = b.add(layers.Activation("relu"), b.input, name="net/[/enc]/[bold]Relu")
    save(b.network(x), files / "odd.onnx")
    assert cli.main(["info", str(files / "odd.onnx")]) == 0
    assert "net/[/enc]/[bold]Relu" in capsys.readouterr().out
    arguments = [str(files / "odd.onnx"), str(files / "in.npy"), str(files / "a[/red].zarr")]
    assert cli.main(["infer", *arguments, "--dtype", "uint8", "--range", "-1", "300"]) == 0
    assert "a[/red].zarr" in capsys.readouterr().out


def test_failed_blocks_end_with_exit_code_1(files, capsys):
    values = np.zeros((20, 30, 40), np.float32)
    values[10, 10, 10] = np.nan
    np.save(files / "nan.npy", values)
    arguments = ["infer", str(files / "net.onnx"), str(files / "nan.npy"), str(files / "o.zarr")]
    assert cli.main(arguments) == 1
    assert "[10, 10, 10]" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite", "--nan", "0"]) == 0


def test_interruption_has_its_own_exit_code(files, capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "info", interrupted)
    assert cli.main(["info", "n337"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_compilation_is_told_of_once(files, capsys, monkeypatch):
    def run(*arguments, **others):
        for _ in range(2):
            compiled.LOG.info("compiling kernels")
        raise InputError("that was all")

    monkeypatch.setattr(cli, "run", run)
    for _ in range(2):
        assert cli.main(["infer", "net.onnx", "in.npy", "out.zarr"]) == 2
        assert capsys.readouterr().out.splitlines() == ["compiling kernels"]


def test_the_command_is_installed_and_prints_plain_lines_into_a_pipe(files):
    arguments = [str(files / n) for n in ("net.onnx", "in.npy", "out.zarr")]
    command = [sys.executable, "-m", "znni_dask.cli", "infer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "100.0 %" in done.stdout
    assert done.stderr == ""
