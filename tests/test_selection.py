"""Selections: what is wanted is as in a full run, all else is 0 and was neither read nor made."""

from __future__ import annotations

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
import zarr
from test_patchwise import classifier, normalised

import graphs
import znni_dask
from kills import failing_after
from peaks import peak_while_running
from znni_dask import planner
from znni_dask.application import Application
from znni_dask.cli import main
from znni_dask.costs import Costs
from znni_dask.errors import OptionError, OutputError, RunError, VolumeError
from znni_dask.executors.serial import SerialExecutor
from znni_dask.geometry import Box
from znni_dask.importers.to_onnx import save
from znni_dask.journal import Journal, journal_of
from znni_dask.patches import Layout
from znni_dask.selection import Selection, roi_box
from znni_dask.storage.volume import Volume, open_volume
from znni_dask.verify import verify
from znni_dask.windows import Patchwise

SIZE = (21, 30, 34)
KINDS = {
    "dense": (graphs.graph("chain", 0), {}),
    "unet": (graphs.graph("unet", 0), {}),
    "strided": (graphs.graph("strided", 0), {}),
    "finer": (graphs.graph("finer", 0), {"chunks": 16}),
    "labels": (graphs.graph("unet", 3), {"dtype": "labels"}),
    "valid": (graphs.graph("chain", 4), {"boundary": "valid"}),
    "windows": (normalised(), {"patchwise": (8, 12, 16), "weights": "gaussian", "overlap": 0.3}),
    "vectors": (classifier(), {"patchwise": (6, 8, 10), "step": (3, 4, 5), "chunks": 3}),
}
ROI = "5:14,8:,:26"


def balls(size=SIZE, seed=3):
    """Labels: a few balls, everything else 0."""
    random = np.random.default_rng(seed)
    grid = np.indices(size).reshape(3, -1).T
    mask = np.zeros(len(grid), np.uint16)
    for label in range(1, 4):
        centre = [random.integers(n) for n in size]
        mask[((grid - centre) ** 2).sum(1) < 30] = label * 100
    return mask.reshape(size)


def full(path, **more):
    return np.asarray(zarr.open_array(str(path / "0"), mode="r")[:])


def run(network, folder, name, client, **options):
    """A run and what it stored; `chunks` and `patch` small, so that there are many of each."""
    options = {"chunks": 8, "memory": "4GiB", "client": client, **options}
    if "patchwise" not in options:
        options.setdefault("patch", (8, 5, 8))
    summary = znni_dask.run(network, folder / "in.npy", folder / f"{name}.zarr", **options)
    return summary, full(folder / f"{name}.zarr")


REPEATING = ("strided", "finer", "valid")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=[pytest.mark.thorough] if kind in REPEATING else [])
        for kind in KINDS
    ],
)
def complete(request, tmp_path_factory, client):
    """A network, its options, and what a full run stored, as by these options and as uint8."""
    network, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    values = np.random.default_rng(1).standard_normal((network.in_channels, *SIZE))
    np.save(folder / "in.npy", values.astype(np.float32))
    np.save(folder / "mask.npy", balls())
    _, floats = run(network, folder, "full", client, **options)
    coded = options | {"dtype": "uint8", "value_range": (-2, 3)}
    _, integers = run(network, folder, "full8", client, **coded)
    assert (integers == 0).mean() < 0.5  # else what is left out would not show
    return network, options, coded, folder, floats, integers


def wanted_by_hand(folder, network, options, selected):
    """The outputs whose centre's nearest voxel is in ``selected`` (bool, of the volume)."""
    windows = None
    if "patchwise" in options:
        windows = Patchwise(
            options["patchwise"], options.get("overlap", 0.5), step=options.get("step")
        )
    boundary = options.get("boundary", "reflect")
    source = open_volume(folder / "in.npy")
    laid = Application(network, source, boundary, patchwise=windows).laid("output")
    index = []
    for first, step, n, whole in zip(
        laid.translation, laid.output_stride, laid.output_size, SIZE, strict=True
    ):
        centres = [first + step * i for i in range(n)]
        index.append([min(range(whole), key=lambda v, c=c: (abs(v - c), v)) for c in centres])
    return selected[np.ix_(*index)]


def test_what_is_selected_is_as_in_a_full_run_and_all_else_is_0(complete, client):
    network, options, coded, folder, floats, integers = complete
    box, mask = np.zeros(SIZE, bool), balls() != 0
    box[5:14, 8:, :26] = True
    for name, chosen, selected in [
        ("roi", {"roi": ROI}, box),
        ("mask", {"mask": folder / "mask.npy"}, mask),
        ("both", {"roi": ROI, "mask": folder / "mask.npy"}, box & mask),
    ]:
        wanted = wanted_by_hand(folder, network, options, selected)
        assert 0 < wanted.mean() < 0.6
        for coding, right in ((options, floats), (coded, integers)):
            target = f"{name}{coding.get('dtype', '')}"
            summary, got = run(network, folder, target, client, **coding, **chosen)
            assert np.array_equal(got, np.where(wanted, right, 0))
            assert summary.passes[0].voxels == wanted.sum()
            assert verify(
                network, folder / "in.npy", folder / f"{target}.zarr", size=(4, 6, 6), places=4
            ).holds


def test_blocks_and_patches_that_hold_nothing_selected_cost_nothing(tmp_path, client, monkeypatch):
    network = graphs.graph("unet", 0)
    np.save(tmp_path / "in.npy", np.ones(SIZE, np.float32))
    mask = np.zeros(SIZE, np.uint8)
    mask[9, 20, 20] = 1
    np.save(tmp_path / "mask.npy", mask)
    read, computed = [], []
    honest_read, honest_run = Volume.read_extended, SerialExecutor.run

    def reading(self, box, *args):
        read.append(box)
        return honest_read(self, box, *args)

    def running(self, todo, *args):
        computed.append(todo.output)
        return honest_run(self, todo, *args)

    monkeypatch.setattr(Volume, "read_extended", reading)
    monkeypatch.setattr(SerialExecutor, "run", running)
    summary, _ = run(
        network, tmp_path, "out", client, mask=tmp_path / "mask.npy", patch=8, chunks=16
    )
    (box,) = computed
    assert box == Box((8, 16, 16), (16, 24, 24))
    assert read == [
        Application(network, open_volume(tmp_path / "in.npy")).laid("output").region(box)
    ]
    assert summary.blocks == 1
    assert summary.passes[0].unselected == 2 * 2 * 3 - 1
    assert sum(1 for p in (tmp_path / "out.zarr" / "0" / "c").rglob("*") if p.is_file()) == 2


def test_only_blocks_of_the_roi_are_ever_enumerated(tmp_path, client):
    """Of a volume with 10⁹ blocks: walking them all would take hours."""
    network = graphs.graph("unet", 0)
    group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
    group.create_array("0", shape=(10_000, 10_000, 10_000), chunks=(64, 64, 64), dtype="uint8")
    seen = []
    options = {"roi": "5000:5009,7000:7012,20:30", "chunks": 10, "patch": 10, "memory": "4GiB"}
    summary = znni_dask.run(
        network,
        tmp_path / "in.zarr" / "0",
        tmp_path / "out.zarr",
        client=client,
        progress=lambda done, total: seen.append((done, total)),
        **options,
    )
    assert summary.blocks == 2
    (total,) = {total for _, total in seen}
    assert 9 * 12 * 10 < total < 1.3 * 9 * 12 * 10  # with the coarser levels of the region
    assert seen[-1][0] == total
    assert summary.passes[0].voxels == 9 * 12 * 10
    assert summary.passes[0].level_blocks <= 2 * len(summary.passes[0].levels)
    assert open_volume(tmp_path / "out.zarr").size == (10_000,) * 3


def test_a_small_roi_is_made_of_small_patches(monkeypatch):
    monkeypatch.setattr(Costs, "touching_seconds", lambda *_: 0.0)
    layout = Layout(graphs.graph("unet", 0), (384, 384, 384), "reflect")
    common = {
        "layout": layout,
        "unit": (64, 64, 64),
        "voxel_bytes": 4,
        "encoding_bytes": 4,
        "read_bytes": lambda size, by_cells=False: 8 * size[0] * size[1] * size[2],
        "write_bytes": 0,
        "baseline_bytes": 0,
        "allowed_bytes": 8 << 30,
        "threads": 1,
    }
    whole = planner.plan(planner.Request(hull=Box((0, 0, 0), (384,) * 3), **common))
    small = planner.plan(planner.Request(hull=Box((70, 70, 70), (80,) * 3), **common))
    assert whole.patch[0] >= 64
    assert max(small.patch) <= 32


def test_a_mask_that_selects_nothing_is_told(tmp_path, client, capsys):
    network = graphs.graph("unet", 0)
    save(network, tmp_path / "net.onnx")
    np.save(tmp_path / "in.npy", np.ones(SIZE, np.float32))
    np.save(tmp_path / "mask.npy", np.zeros(SIZE, bool))
    files = [str(tmp_path / name) for name in ("net.onnx", "in.npy", "out.zarr")]
    more = ["--mask", str(tmp_path / "mask.npy"), "--memory", "4GiB", "--chunks", "16,16,16"]
    assert main(["infer", *files, *more]) == 0
    assert "the mask selects nothing in 1 of 1 blocks: they hold 0" in capsys.readouterr().out
    assert not full(tmp_path / "out.zarr").any()
    assert verify(*files).holds
    array = zarr.open_array(str(tmp_path / "out.zarr" / "0"), mode="r+")
    array[...] = 1e-9
    assert not verify(*files).holds


def test_masks_of_several_times_and_of_any_kind(tmp_path, client):
    network = graphs.graph("unet", 0)
    values = np.random.default_rng(5).standard_normal((2, *SIZE)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    masks = np.stack([balls(seed=1), balls(seed=2)])
    group = zarr.open_group(str(tmp_path / "mask.zarr"), mode="w")
    group.create_array("0", data=masks[:, None], chunks=(1, 1, 7, 9, 11))
    axes = [
        {"name": a, "type": t}
        for a, t in zip("tczyx", ["time", "channel", *3 * ["space"]], strict=True)
    ]
    unit = [{"type": "scale", "scale": [1.0] * 5}]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": unit}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    np.save(tmp_path / "mask.npy", masks[0])
    _, right = run(network, tmp_path, "full", client, axes="tzyx")
    _, got = run(network, tmp_path, "each", client, axes="tzyx", mask=tmp_path / "mask.zarr")
    assert np.array_equal(got, np.where(masks[:, None] != 0, right, 0))
    _, got = run(network, tmp_path, "one", client, axes="tzyx", mask=tmp_path / "mask.npy")
    assert np.array_equal(got, np.where(masks[0] != 0, right, 0))


def test_several_outputs_are_selected_alike(tmp_path, client):
    """Each on its own grid."""
    b = znni_dask.Builder(1, seed=4)
    x = b.relu(b.conv(b.input, 3, 3, padding="same"))
    network = b.network({"fine": b.conv(x, 2, 1), "coarse": b.conv(b.max_pool(x, 2), 1, 1)})
    np.save(tmp_path / "in.npy", np.random.default_rng(1).standard_normal(SIZE).astype(np.float32))
    common = {"client": client, "chunks": 8, "memory": "4GiB"}
    znni_dask.run(network, tmp_path / "in.npy", tmp_path / "full.zarr", **common)
    znni_dask.run(network, tmp_path / "in.npy", tmp_path / "part.zarr", roi=ROI, **common)
    for name, inside in [
        ("fine", np.s_[..., 5:14, 8:, :26]),
        ("coarse", np.s_[..., 3:7, 4:, :13]),  # centres at 0.5, 2.5, …
    ]:
        right, got = (full(tmp_path / f"{kind}.zarr" / name) for kind in ("full", "part"))
        expected = np.zeros_like(right)
        expected[inside] = right[inside]
        assert np.array_equal(got, expected)
        assert verify(network, tmp_path / "in.npy", tmp_path / "part.zarr" / name).holds


def stopped_after(count, folder, client, monkeypatch, **options):
    with monkeypatch.context() as patched:
        seen = failing_after(count, patched, "the machine was needed")
        with pytest.raises(RunError):
            run(graphs.graph("unet", 0), folder, "out", client, **options)
    return seen


def test_a_run_of_a_selection_is_resumed_and_counts_what_it_did(tmp_path, client, monkeypatch):
    network = graphs.graph("unet", 0)
    values = np.random.default_rng(5).standard_normal(SIZE).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    np.save(tmp_path / "mask.npy", balls())
    chosen = {"roi": ROI, "mask": tmp_path / "mask.npy"}
    stopped_after(7, tmp_path, client, monkeypatch, **chosen)
    done = Journal.begun(journal_of(tmp_path / "out.zarr")).done
    assert len(done) == 7
    for other, named in [({"roi": "5:14,8:,:"}, "mask, roi"), ({**chosen, "roi": None}, "roi")]:
        with pytest.raises(OutputError, match=rf"differs from this one in {named}:"):
            run(network, tmp_path, "out", client, **other)
    seen = []
    summary, got = run(
        network,
        tmp_path,
        "out",
        client,
        **chosen,
        progress=lambda done, total: seen.append((done, total)),
    )
    _, right = run(network, tmp_path, "fresh", client, **chosen)
    assert np.array_equal(got, right)
    made = summary.passes[0]
    assert made.blocks + made.unselected == 2 * 3 * 4 - 7
    (total,) = {total for _, total in seen}
    assert seen[-1][0] == total > 9 * 22 * 26
    again, _ = run(network, tmp_path, "out", client, **chosen)
    assert again.passes == ()
    with pytest.raises(OutputError, match="exists"):
        run(network, tmp_path, "out", client)


@pytest.mark.parametrize(
    "fault", ["nothing is left out", "one voxel too many", "one block is forgotten"]
)
def test_a_wrong_selection_is_found_by_verification(fault, tmp_path, client, monkeypatch):
    network = graphs.graph("unet", 0)
    np.save(tmp_path / "in.npy", np.random.default_rng(5).standard_normal(SIZE).astype(np.float32))
    honest = Selection.wanted

    def wanted(self, laid, block, time):
        if fault == "nothing is left out":
            return None
        found = honest(self, laid, block, time)
        if fault == "one block is forgotten":
            return found if block.start != (8, 16, 16) else np.zeros(block.size, bool)
        whole = np.zeros(tuple(n + 2 for n in block.size), bool)
        whole[1:-1, 1:-1, 1:-1] = True if found is None else found
        return whole[:-2, 1:-1, 1:-1] | whole[1:-1, 1:-1, 1:-1]

    with monkeypatch.context() as patched:
        patched.setattr(Selection, "wanted", wanted)
        run(network, tmp_path, "out", client, roi=ROI)
    options = {"size": (9, 20, 20), "places": 6}
    assert not verify(network, tmp_path / "in.npy", tmp_path / "out.zarr", **options).holds


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"roi": "3:9,:"}, OptionError, "is no box: give three ranges"),
        ({"roi": "3-9,:,:"}, OptionError, "is no box"),
        ({"roi": "-3:9,:,:"}, OptionError, "is no box"),
        ({"roi": (slice(0, 4, 2), slice(None), slice(None))}, OptionError, "is no box"),
        ({"roi": (slice(-4, None), slice(None), slice(None))}, OptionError, "is no box"),
        ({"roi": (1, 2, 3)}, OptionError, "is no box"),
        ({"roi": 7}, OptionError, "is no box"),
        ({"roi": ":,9:9,:"}, OptionError, "9:9 along y is empty, which has 30 voxels"),
        ({"roi": ":,9:3,:"}, OptionError, "9:3 along y is empty"),
        ({"roi": ":,:,:35"}, OptionError, "0:35 along x reaches out of the volume, which has 34"),
        ({"roi": "21:,:,:"}, OptionError, "21:21 along z reaches out"),
        ({"mask": "none.npy"}, VolumeError, "no volume at"),
        ({"mask": "small.npy"}, VolumeError, "its size z, y, x is 20·30·34, the volume's 21·30·34"),
        ({"mask": "channels.npy"}, VolumeError, "it has 2 channels; give one with one"),
        ({"mask": "times.zarr"}, VolumeError, "it has 3 time points, the volume 1"),
        ({"mask": "broken.npy"}, VolumeError, "cannot read"),
        ({"mask": "complex.npy"}, VolumeError, "complex"),
        ({"roi": ":1,:,:", "boundary": "valid"}, OptionError, "holds the centre of no output"),
    ],
)
def test_selections_that_make_no_sense_are_refused(options, error, message, tmp_path):
    network = graphs.graph("chain", 4) if "boundary" in options else graphs.graph("unet", 0)
    shape = (network.in_channels, *SIZE)
    np.save(tmp_path / "in.npy", np.ones(shape, np.float32))
    np.save(tmp_path / "small.npy", np.ones((20, 30, 34)))
    np.save(tmp_path / "channels.npy", np.ones((2, *SIZE), bool))
    np.save(tmp_path / "complex.npy", np.ones(SIZE, complex))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01")
    zarr.create_array(
        str(tmp_path / "times.zarr"),
        data=np.ones((3, *SIZE), bool),
        dimension_names=["t", "z", "y", "x"],
    )
    if isinstance(options.get("mask"), str):
        options = {"mask": tmp_path / options["mask"]}
    with pytest.raises(error, match=message):
        znni_dask.run(network, tmp_path / "in.npy", tmp_path / "out.zarr", **options)
    assert not (tmp_path / "out.zarr").exists()
    assert not journal_of(tmp_path / "out.zarr").exists()


def test_an_output_never_replaces_the_mask(tmp_path):
    np.save(tmp_path / "in.npy", np.ones(SIZE, np.float32))
    zarr.create_array(str(tmp_path / "mask.zarr"), data=np.ones(SIZE, bool))
    with pytest.raises(OutputError, match="is, or lies in, the input"):
        znni_dask.run(
            graphs.graph("unet", 0),
            tmp_path / "in.npy",
            tmp_path / "mask.zarr",
            mask=tmp_path / "mask.zarr",
            overwrite=True,
        )
    assert (tmp_path / "mask.zarr").exists()


def test_a_damaged_part_of_a_mask_fails_the_blocks_that_need_it(tmp_path, client):
    network = graphs.graph("unet", 0)
    np.save(tmp_path / "in.npy", np.ones(SIZE, np.float32))
    zarr.create_array(str(tmp_path / "mask.zarr"), data=np.ones(SIZE, np.uint8), chunks=(8, 30, 34))
    chunk = tmp_path / "mask.zarr" / "c" / "2" / "0" / "0"
    chunk.write_bytes(b"\0" * 11)
    with pytest.raises(RunError, match=r"cannot read .* of .*mask\.zarr"):
        run(network, tmp_path, "out", client, mask=tmp_path / "mask.zarr")
    assert full(tmp_path / "out.zarr")[..., :16, :, :].all()


@pytest.mark.parametrize("seed", range(20))
def test_the_outputs_of_an_roi_are_those_whose_nearest_voxel_it_holds(seed):
    """By definition, output by output, for grids of all kinds."""
    random = np.random.default_rng(seed)
    n, outputs = int(random.integers(3, 30)), int(random.integers(1, 40))
    first = Fraction(int(random.integers(-4, 20)), int(random.integers(1, 5)))
    step = Fraction(int(random.integers(1, 9)), int(random.integers(1, 5)))
    start = int(random.integers(n))
    stop = int(random.integers(start + 1, n + 1))

    class Laid:
        size, output_size = (n,) * 3, (outputs,) * 3
        translation, output_stride = (first,) * 3, (step,) * 3

    centres = [first + step * i for i in range(outputs)]
    nearest = [min(range(n), key=lambda v, c=c: (abs(v - c), v)) for c in centres]
    right = [i for i, v in enumerate(nearest) if start <= v < stop]
    volume = type("V", (), {"size": (n,) * 3})()
    selection = Selection(volume, Box((start,) * 3, (stop,) * 3))
    if not right:
        with pytest.raises(OptionError, match="holds the centre of no output voxel"):
            selection.hull(Laid)
        return
    assert selection.hull(Laid) == Box((right[0],) * 3, (right[-1] + 1,) * 3)
    assert right == list(range(right[0], right[-1] + 1))


def test_ranges_are_read_as_they_are_written():
    assert roi_box(" 1:3, : ,4:", (9, 8, 7)) == Box((1, 0, 4), (3, 8, 7))
    assert roi_box((slice(1, 3), slice(None), slice(4, None)), (9, 8, 7)) == Box(
        (1, 0, 4), (3, 8, 7)
    )


def test_metadata_tell_what_was_selected(tmp_path, client):
    np.save(tmp_path / "in.npy", np.ones(SIZE, np.float32))
    np.save(tmp_path / "mask.npy", balls())
    run(graphs.graph("unet", 0), tmp_path, "out", client, roi=ROI, mask=tmp_path / "mask.npy")
    told = json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())["attributes"]["znni"]
    assert told["roi"] == [[5, 8, 0], [14, 30, 26]]
    assert told["mask"] == str(tmp_path / "mask.npy")


RUN = """
import json, sys
import znni_dask
if __name__ == "__main__":
    s = znni_dask.run(*sys.argv[1:4], memory="320MiB", threads=1, mask=sys.argv[4])
    print(json.dumps({"peak": s.peak_bytes, "predicted": s.plan.predicted_bytes}))
"""


def test_reading_a_mask_keeps_within_the_memory_allowed(tmp_path):
    """One of eight bytes a voxel, for a volume of one."""
    random = np.random.default_rng(0)
    values = random.integers(0, 255, (192,) * 3).astype(np.uint8)
    zarr.create_array(str(tmp_path / "in.zarr"), data=values, chunks=(64, 64, 64))
    mask = (values > 250).astype(np.int64)
    zarr.create_array(str(tmp_path / "mask.zarr"), data=mask, chunks=(64, 64, 64))
    b = znni_dask.Builder(1)
    save(b.network(b.conv(b.input, 1, 3, padding="same")), tmp_path / "net.onnx")
    names = ("net.onnx", "in.zarr", "out.zarr", "mask.zarr")
    files = [str(tmp_path / name) for name in names]
    peak, said = peak_while_running([sys.executable, "-c", RUN, *files])
    assert max(peak, said["peak"]) <= said["predicted"] <= 320 << 20
