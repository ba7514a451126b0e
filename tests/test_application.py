"""What a network is applied to, and which of its outputs: several outputs, time points, channels,
axes, a halo of one's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaozarrs
import zarr

import graphs
import oracle
import znni_dask
from test_identity import assert_same, at_once
from znni_dask.cli import main
from znni_dask.costs import Costs
from znni_dask.errors import NetworkError, OptionError, OutputError, RunError, VolumeError
from znni_dask.geometry import Box
from znni_dask.importers import load_network
from znni_dask.importers.to_onnx import save
from znni_dask.inspection import facts
from znni_dask.network.build import Builder
from znni_dask.network.layers import Pad
from znni_dask.patches import Layout
from znni_dask.primitives import conv_torch
from znni_dask.primitives.work import Rate
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify


def two_headed():
    """Two heads on one grid and a third, coarser one, as in deep supervision."""
    b = Builder(1, seed=3)
    x = b.relu(b.conv(b.input, 4, 3, padding="same"))
    coarse = b.conv(b.max_pool(x, 2), 3, 3, padding="same")
    y = b.concat(b.resize(b.relu(coarse), 2), x)
    return b.network(
        {
            "mask": b.activation(b.conv(y, 1, 1), "sigmoid"),
            "flows/0": b.conv(y, 2, 3, padding="same"),
            "deep": coarse,
        }
    )


def stored(path):
    volume = open_volume(path)
    return np.stack([volume.read(Box((0, 0, 0), volume.size), t) for t in range(volume.times)])


@pytest.fixture
def values(tmp_path):
    made = np.random.default_rng(0).standard_normal((1, 20, 26, 30)).astype(np.float32)
    np.save(tmp_path / "in.npy", made)
    return made


def test_every_output_is_written_as_a_group_of_its_own(values, tmp_path, client):
    network = two_headed()
    target = tmp_path / "out.zarr"
    seen = []
    summary = znni_dask.run(
        network,
        tmp_path / "in.npy",
        target,
        client=client,
        chunks=16,
        memory="4GiB",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [one.outputs for one in summary.passes] == [("mask", "flows/0"), ("deep",)]
    assert seen[-1][0] == seen[-1][1]
    for name, group, stride in (
        ("mask", "mask", 1),
        ("flows/0", "flows_0", 1),
        ("deep", "deep", 2),
    ):
        want = at_once(network.only(name), values, "reflect")
        assert_same(stored(target / group)[0], want)
        yaozarrs.validate_zarr_store(str(target / group))
        dataset = zarr.open(str(target / group), mode="r").attrs["ome"]["multiscales"][0][
            "datasets"
        ][0]
        assert dataset["coordinateTransformations"][0]["scale"][-1] == stride
        assert verify(network, tmp_path / "in.npy", target / group, size=(8, 8, 8)).holds
    with pytest.raises(
        OutputError, match="several outputs: verify one of its groups, mask, flows_0"
    ):
        verify(network, tmp_path / "in.npy", target)


def heads_of_two_depths():
    """Two outputs of full size, one behind three poolings, one behind one."""
    b = Builder(1, seed=4)
    skip = b.relu(b.conv(b.input, 3, 3, padding="same"))
    shallow = b.resize(b.conv(b.max_pool(skip, 2), 3, 3, padding="same"), 2)
    x = skip
    for _ in range(3):
        x = b.relu(b.conv(b.max_pool(x, 2), 3, 3, padding="same"))
    deep = b.conv(b.plus(b.resize(x, 8), skip), 2, 3, padding="same")
    return b.network({"shallow": b.conv(shallow, 1, 3, padding="same"), "deep": deep})


def heads_of_odd_and_even_sizes():
    """No size passes through both: one takes even sizes, the other odd ones."""
    b = Builder(1, seed=5)
    x = b.relu(b.conv(b.input, 3, 3, padding="same"))
    even = b.plus(b.resize(b.max_pool(x, 2), 2), x)
    odd = b.plus(
        b.conv_transpose(b.conv(x, 3, 3, stride=2, padding=1), 3, 3, stride=2, padding=1), x
    )
    return b.network({"even": b.conv(even, 1, 1), "odd": b.conv(odd, 1, 1)})


@pytest.mark.parametrize("make", [heads_of_two_depths, heads_of_odd_and_even_sizes])
def test_an_output_does_not_depend_on_those_computed_with_it(make, tmp_path, client):
    """Outputs that extend the volume differently are not joined."""
    network = make()
    values = np.random.default_rng(7).standard_normal((1, 19, 21, 25)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    target = tmp_path / "out.zarr"
    summary = znni_dask.run(network, tmp_path / "in.npy", target, client=client, memory="4GiB")
    assert len(summary.passes) == 2
    for name in network.outputs:
        assert_same(stored(target / name)[0], at_once(network.only(name), values, "reflect"))
        assert verify(network, tmp_path / "in.npy", target / name, size=(8, 8, 8)).holds


def test_outputs_whose_names_no_path_can_tell_apart_have_groups_of_their_own(
    values, tmp_path, client
):
    b = Builder(1)
    heads = {name: b.conv(b.input, 1, 1) for name in ("a/b", "a_b", "A_B", "zarr.json", "..")}
    target = tmp_path / "out.zarr"
    znni_dask.run(b.network(heads), tmp_path / "in.npy", target, client=client)
    groups = zarr.open_group(str(target), mode="r").attrs["znni"]["outputs"]
    assert groups == ["a_b", "a_b_2", "A_B_3", "zarr.json_2", "output"]
    for name, group in zip(heads, groups, strict=True):
        assert zarr.open_group(str(target / group), mode="r").attrs["znni"]["output"] == name


def test_one_output_can_be_chosen_and_lies_at_the_root(values, tmp_path, client, capsys):
    network = two_headed()
    save(network, tmp_path / "net.onnx")
    assert list(load_network(tmp_path / "net.onnx").outputs) == ["mask", "flows/0", "deep"]
    files = [str(tmp_path / name) for name in ("net.onnx", "in.npy", "out.zarr")]
    assert main(["infer", *files, "--output", "deep", "--memory", "4GiB"]) == 0
    assert_same(stored(tmp_path / "out.zarr")[0], at_once(network.only("deep"), values, "reflect"))
    assert main(["verify", *files]) == 0
    assert main(["infer", *files, "--overwrite", "--output", "none"]) == 2
    assert "no output 'none': it has mask, flows/0, deep" in capsys.readouterr().err
    assert main(["info", files[0]]) == 0
    shown = capsys.readouterr().out
    for part in (
        "outputs: mask (1 channels), flows/0 (2 channels), deep (3",
        "deep: local; keeps its",
    ):
        assert part in shown


def test_every_time_point_is_a_volume_of_its_own(tmp_path, client):
    network = graphs.graph("unet", 0)
    values = np.random.default_rng(1).standard_normal((3, 1, 18, 21, 24)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    target = tmp_path / "out.zarr"
    summary = znni_dask.run(
        network, tmp_path / "in.npy", target, client=client, chunks=16, memory="4GiB"
    )
    assert summary.times == 3
    got = stored(target)
    for time in range(3):
        assert_same(got[time], at_once(network, values[time], "reflect"))
    image = zarr.open(str(target), mode="r").attrs["ome"]["multiscales"][0]
    assert [a["type"] for a in image["axes"]] == ["time", "channel", "space", "space", "space"]
    yaozarrs.validate_zarr_store(str(target))
    assert verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds


@pytest.mark.parametrize("chosen", [(2,), (0, 1), (3, 0)])
def test_channels_are_chosen_in_any_order(chosen, tmp_path, client):
    b = Builder(len(chosen), seed=5)
    network = graphs.scaled(b.network(b.conv(b.input, 2, 3, padding="same")))
    values = np.random.default_rng(2).standard_normal((4, 12, 13, 14)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    target = tmp_path / "out.zarr"
    znni_dask.run(network, tmp_path / "in.npy", target, channels=chosen, client=client)
    assert_same(stored(target)[0], at_once(network, values[list(chosen)], "reflect"))
    assert verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds


def test_axes_say_what_the_file_does_not(tmp_path, client):
    """Channels last, the sections second: (y, z, x, c)."""
    b = Builder(2, seed=6)
    network = graphs.scaled(b.network(b.conv(b.input, 1, (1, 3, 3), padding="same")))
    values = np.random.default_rng(3).standard_normal((2, 5, 13, 14)).astype(np.float32)
    np.save(tmp_path / "in.npy", np.moveaxis(values, (0, 1, 2, 3), (3, 1, 0, 2)))
    target = tmp_path / "out.zarr"
    znni_dask.run(network, tmp_path / "in.npy", target, axes="yzxc", client=client)
    assert_same(stored(target)[0], at_once(network, values, "reflect"))
    assert verify(network, tmp_path / "in.npy", target, size=(4, 8, 8)).holds


def test_a_coarser_level_of_an_image_is_read_with_its_own_scale(tmp_path, client):
    network = graphs.graph("unet", 0)
    values = np.random.default_rng(9).standard_normal((2, 1, 18, 21, 24)).astype(np.float32)
    group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
    datasets = []
    for number, scale in enumerate((2.0, 4.0)):
        group.create_array(f"s{number}", data=values[number, 0])
        change = {"type": "scale", "scale": [scale] * 3}
        datasets.append({"path": f"s{number}", "coordinateTransformations": [change]})
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    image = {"axes": axes, "datasets": datasets}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    target = tmp_path / "out.zarr"
    options = {"client": client, "memory": "4GiB"}
    znni_dask.run(network, tmp_path / "in.zarr", target, level="s1", **options)
    assert_same(stored(target)[0], at_once(network, values[1], "reflect"))
    assert open_volume(target).scale == (4.0, 4.0, 4.0)
    assert verify(network, tmp_path / "in.zarr", target, size=(8, 8, 8)).holds
    with pytest.raises(VolumeError, match="s0"):
        znni_dask.run(network, tmp_path / "in.zarr", tmp_path / "no.zarr", level=2, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axes": "zy"}, VolumeError, "axes 'zy' for .*name each of its axes once"),
        ({"axes": "qzyx"}, VolumeError, "'qzyx'"),
        ({"axes": "zzyx"}, VolumeError, "'zzyx'"),
        ({"channels": (0, 4)}, VolumeError, "has 1 channels, counted from 0"),
        ({"channels": ()}, VolumeError, "no channels are chosen"),
        ({"axes": "zcyx"}, NetworkError, "takes 1 channels.*has 20.*--channels"),
        ({"outputs": ()}, OptionError, "no outputs are chosen"),
        ({"halo": -1}, OptionError, "halo -1 is no size"),
    ],
)
def test_contradictions_are_refused(options, error, message, values, tmp_path, client):
    with pytest.raises(error, match=message):
        znni_dask.run(
            graphs.graph("unet", 0), tmp_path / "in.npy", tmp_path / "out.zarr", **options
        )
    assert not (tmp_path / "out.zarr").exists()


def within(values, network, patch, halo):
    """The answer of patches that see ``halo`` voxels around themselves, by definition: the
    network applied to that part of the volume alone, its padding at the part's edges."""
    step = znni_dask.geometry(network).alignment
    out = np.full((network.out_channels, *values.shape[1:]), np.nan)
    for box in Layout(network, values.shape[1:], "reflect").blocks(patch):
        part = []
        for a, b, h, s, n in zip(box.start, box.stop, halo, step, values.shape[1:], strict=True):
            part.append((max((a - h) // s * s, 0), min(-(-(b + h) // s) * s, n)))
        seen = values[(slice(None), *(slice(a, b) for a, b in part))]
        answer = oracle.whole(network, seen)
        here = tuple(
            slice(a - p[0], b - p[0]) for a, b, p in zip(box.start, box.stop, part, strict=True)
        )
        out[(slice(None), *box.slices)] = answer[(slice(None), *here)]
    return out


def test_a_halo_of_ones_own_is_what_patches_see_and_its_error_is_measured(tmp_path, client, capsys):
    network = graphs.graph("unet", 2)
    field = znni_dask.geometry(network)
    derived = [max(axis.halo) for axis in field.axes]
    values = np.random.default_rng(4).standard_normal((1, 32, 48, 48)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    common = {"client": client, "patch": (16, 16, 16), "chunks": 16, "memory": "4GiB"}
    errors = []
    for index, halo in enumerate([(0, 0, 0), (2, 4, 4), tuple(derived)]):
        target = tmp_path / f"out{index}.zarr"
        summary = znni_dask.run(network, tmp_path / "in.npy", target, halo=halo, **common)
        got = stored(target)[0]
        assert_same(got, within(values, network, (16, 16, 16), halo))
        error = summary.passes[0].measured_error
        exact = at_once(network, values, "reflect")
        assert error.largest <= np.abs(got - exact).max() * 1.01 + 1e-4
        assert error.standard_deviation == pytest.approx(exact.std(), rel=0.2)
        errors.append(error.largest / error.standard_deviation)
        found = verify(network, tmp_path / "in.npy", target, size=(16, 16, 16))
        assert found.holds
        assert found.halo == halo
    assert errors[0] > 0.1 > errors[2]
    assert errors[2] < 1e-4
    save(network, tmp_path / "net.onnx")
    files = [str(tmp_path / name) for name in ("net.onnx", "in.npy", "cli.zarr")]
    assert (
        main(["infer", *files, "--halo", "2,4,4", "--memory", "4GiB", "--chunks", "16,16,16"]) == 0
    )
    assert "approximate: with a halo of 2·4·4 the largest difference at" in capsys.readouterr().out
    assert main(["verify", *files, "--size", "8,8,8"]) == 0
    assert "approximate, made with a halo of 2·4·4" in capsys.readouterr().out


def padded_with_ones():
    b = Builder(1, seed=8)
    x = b.add(Pad(((1, 1, 1), (1, 1, 1)), 1.0), b.input)
    x = b.relu(b.conv(x, 3, 3))
    return b.network(b.conv(b.add(Pad(((1, 1, 1), (1, 1, 1)), -1.0), x), 2, 3))


def of_odd_sizes():
    b = Builder(1, seed=9)
    x = b.relu(b.conv(b.input, 3, 3, stride=2, padding=1))
    x = b.conv_transpose(x, 3, 3, stride=2, padding=1)
    return b.network(b.conv(b.concat(x, b.input), 2, 3, padding="same"))


@pytest.mark.parametrize("halo", [0, 1, 2, 40])
@pytest.mark.parametrize(
    "network",
    [padded_with_ones(), of_odd_sizes(), graphs.graph("finer", 0)],
    ids=["pad", "odd", "finer"],
)
@pytest.mark.every(5)
def test_a_halo_of_ones_own_makes_numbers_of_the_volume_alone(network, halo, tmp_path, client):
    """Nothing is read beyond what a patch sees, and a halo that is large enough is exact."""
    values = np.random.default_rng(6).standard_normal((1, 15, 17, 21)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    target = tmp_path / "out.zarr"
    common = {"client": client, "patch": 7, "chunks": 7, "memory": "4GiB"}
    znni_dask.run(network, tmp_path / "in.npy", target, halo=halo, **common)
    got, exact = stored(target)[0], at_once(network, values, "reflect")
    assert np.isfinite(got).all()
    assert np.abs(got - exact).max() < 8 * exact.std()
    if halo == 40:
        assert_same(got, exact)
    array = zarr.open_array(str(target / "0"), mode="r+")
    array[:] = 100.0
    assert not verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds


def test_a_mirror_needs_more_voxels_than_it_adds(tmp_path, client):
    """Thinner volumes are extended until there are enough, or refused."""
    b = Builder(1, seed=2)
    x = b.add(Pad(((3, 3, 3), (3, 3, 3)), mode="reflect"), b.max_pool(b.input, 2))
    network = b.network(b.conv(x, 2, 7))
    values = np.random.default_rng(8).standard_normal((1, 4, 20, 22)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    znni_dask.run(network, tmp_path / "in.npy", tmp_path / "out.zarr", client=client)
    assert_same(stored(tmp_path / "out.zarr")[0], at_once(network, values, "reflect"))
    with pytest.raises(VolumeError, match="needs at least 8 voxels"):
        znni_dask.run(network, tmp_path / "in.npy", tmp_path / "no.zarr", boundary="valid")


def test_infinite_answers_are_verified_too(values, tmp_path, client):
    b = Builder(1, seed=1)
    network = b.network(b.activation(b.conv(b.input, 1, 3, padding="same"), "log"))
    target = tmp_path / "out.zarr"
    znni_dask.run(network, tmp_path / "in.npy", target, client=client)
    assert np.isnan(stored(target)).any()
    assert verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds
    array = zarr.open_array(str(target / "0"), mode="r+")
    array[:] = 0.0
    assert not verify(network, tmp_path / "in.npy", target, size=(8, 8, 8)).holds
    with pytest.raises(RunError, match="for which uint8 has no value"):
        znni_dask.run(
            network, tmp_path / "in.npy", tmp_path / "b.zarr", dtype="uint8", client=client
        )


def test_a_sliding_network_has_no_halo_but_its_own(values, tmp_path, client):
    with pytest.raises(OptionError, match="needs its whole field of view"):
        znni_dask.run(graphs.graph("chain", 0), tmp_path / "in.npy", tmp_path / "out.zarr", halo=2)


def test_facts_are_those_of_large_patches():
    network = graphs.graph("unet", 2)
    (found,) = facts(network, threads=1)
    by_hand = sum(
        node.layer.multiply_adds() / np.prod([float(s) for s in network.spacing[node.name]])
        for node in network
    )
    assert float(found.multiply_adds) == pytest.approx(by_hand)
    widest = max(
        (
            sum(
                network.channels[i] / np.prod([float(s) for s in network.spacing[i]])
                for i in {*node.inputs, node.name}
            )
        )
        for node in network
    )
    assert found.activation_bytes >= 4 * widest * 0.99
    assert found.needed_bytes > 64**3 * found.activation_bytes
    described = json.dumps(found.locality)
    assert "local" in described


def test_lower_precision_is_used_when_asked_for_and_its_error_is_measured(
    tmp_path, client, capsys, monkeypatch
):
    monkeypatch.setitem(conv_torch.RATES, "bfloat16", Rate("fast", 1e15))
    monkeypatch.setattr(conv_torch.ConvTorch, "setup_seconds", 0.0)
    monkeypatch.setattr(Costs, "touching_seconds", lambda *_: 0.0)
    network = graphs.graph("unet", 2)
    values = np.random.default_rng(4).standard_normal((1, 24, 32, 40)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    save(network, tmp_path / "net.onnx")
    files = [str(tmp_path / name) for name in ("net.onnx", "in.npy", "out.zarr")]
    asked = ["--precision", "bfloat16", "--memory", "4GiB", "--chunks", "16,16,16"]
    assert main(["infer", *files, *asked]) == 0
    assert "approximate: in bfloat16 the largest difference at" in capsys.readouterr().out
    assert main(["verify", *files, "--size", "8,8,8"]) == 0
    assert "approximate, made in bfloat16" in capsys.readouterr().out
    summary = znni_dask.run(
        *files[:2], tmp_path / "run.zarr", client=client, precision="bfloat16", memory="4GiB"
    )
    (one,) = summary.passes
    assert "torch bfloat16" in one.plan.primitives.values()
    exact = at_once(network, values, "reflect")
    found = np.abs(stored(tmp_path / "run.zarr")[0] - exact).max()
    error = one.measured_error
    assert 1e-4 * exact.std() < error.largest <= found * 1.01
    assert found < 0.1 * exact.std()
    monkeypatch.setitem(conv_torch.RATES, "bfloat16", Rate("slow", 1.0))
    assert main(["infer", *files, *asked, "--overwrite"]) == 0
    assert "no layer is faster in bfloat16: the answer is exact" in capsys.readouterr().out
    full = znni_dask.run(*files[:2], tmp_path / "full.zarr", client=client, memory="4GiB")
    assert full.passes[0].measured_error is None
    assert "torch bfloat16" not in full.plan.primitives.values()


def test_a_precision_that_is_not_to_be_had_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "in.npy", np.zeros((8, 8, 8), np.float32))
    network, files = graphs.graph("unet", 2), (tmp_path / "in.npy", tmp_path / "out.zarr")
    with pytest.raises(OptionError, match="float32, bfloat16"):
        znni_dask.run(network, *files, precision="float16")
    monkeypatch.setattr(conv_torch, "installed", lambda: False)
    with pytest.raises(OptionError, match=r"pip install 'znni_dask\[torch\]'"):
        znni_dask.run(network, *files, precision="bfloat16")
    assert not (tmp_path / "out.zarr").exists()
