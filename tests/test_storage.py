"""Volumes in every format read alike; outputs are valid OME-Zarr, written whole chunk by chunk."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr

from peaks import traced_peak
from znni_dask.errors import OptionError, OutputError, RunError, VolumeError
from znni_dask.geometry import Box
from znni_dask.storage import output
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.volume import open_volume

DATA = np.random.default_rng(0).integers(0, 255, (7, 20, 30)).astype(np.uint8)
BOX = Box((1, 2, 3), (5, 9, 20))
BEYOND = Box((-9, -2, -31), (12, 22, 40))


def ome_zarr(path, version, axes, array, transformations, whole=()):
    names = [{"name": a, "type": "space", "unit": "nanometer"} for a in axes]
    for name in names:
        if name["name"] in "tc":
            name["type"] = {"t": "time", "c": "channel"}[name["name"]]
            del name["unit"]
    image = {
        "axes": names,
        "datasets": [{"path": "s0", "coordinateTransformations": transformations}],
        "coordinateTransformations": list(whole),
        "version": version,
    }
    zarr_format = 3 if version == "0.5" else 2
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [image]
    group.create_array("s0", data=array, chunks=tuple(min(8, n) for n in array.shape))


def stored(kind, folder):
    path = folder / kind
    match kind:
        case "stack.tif":
            tifffile.imwrite(path, DATA)
        case "imagej.tif":
            tifffile.imwrite(path, DATA, imagej=True, metadata={"axes": "ZYX"})
        case "tiled.ome.tif":
            tifffile.imwrite(
                path, DATA, tile=(16, 16), compression="zlib", metadata={"axes": "ZYX"}
            )
        case "big.tif":
            tifffile.imwrite(path, DATA, bigtiff=True)
        case "pages":
            path.mkdir()
            for z, page in enumerate(DATA):
                tifffile.imwrite(path / f"{z:04}.tif", page)
        case "array.npy":
            np.save(path, DATA)
        case "v2.zarr":
            zarr.create_array(
                str(path), shape=DATA.shape, chunks=(4, 8, 8), dtype="u1", zarr_format=2
            )[:] = DATA
        case "v3.zarr":
            zarr.create_array(str(path), data=DATA, chunks=(4, 8, 8))
        case "sharded.zarr":
            zarr.create_array(str(path), data=DATA, chunks=(4, 8, 8), shards=(8, 16, 16))
        case "named.zarr":
            swapped = np.ascontiguousarray(DATA.transpose(2, 0, 1))
            zarr.create_array(
                str(path), data=swapped, chunks=(4, 8, 8), dimension_names=("x", "z", "y")
            )
        case "ome4.zarr":
            ome_zarr(path, "0.4", "zyx", DATA, [{"type": "scale", "scale": [40, 4, 4]}])
        case "ome5.zarr":
            ome_zarr(
                path,
                "0.5",
                "tczyx",
                DATA[None, None],
                [{"type": "scale", "scale": [1, 1, 40, 4, 4]}],
            )
    return path


KINDS = [
    *("stack.tif", "imagej.tif", "tiled.ome.tif", "big.tif", "pages", "array.npy"),
    *("v2.zarr", "v3.zarr", "sharded.zarr", "named.zarr", "ome4.zarr", "ome5.zarr"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_reads_the_same(kind, tmp_path):
    volume = open_volume(stored(kind, tmp_path))
    for opened in (volume, pickle.loads(pickle.dumps(volume))):
        assert (opened.channels, opened.size, opened.dtype) == (1, DATA.shape, np.uint8)
        np.testing.assert_array_equal(opened.read(BOX)[0], DATA[BOX.slices])
    widths = [(9, 5), (2, 2), (31, 10)]
    for boundary, mode in (("reflect", "reflect"), ("nearest", "edge"), ("constant", "constant")):
        got = volume.read_extended(BEYOND, boundary)[0]
        np.testing.assert_array_equal(got, np.pad(DATA, widths, mode=mode))
    if kind.startswith("ome"):
        assert volume.scale == (40, 4, 4)
        assert volume.units == ("nanometer",) * 3


def test_sections_are_taken_in_the_order_of_their_numbers(tmp_path):
    for z in range(12):
        tifffile.imwrite(tmp_path / f"s{z}.tif", np.full((4, 5), z, np.uint8))
    volume = open_volume(tmp_path)
    assert volume.read(Box((0, 0, 0), (12, 1, 1))).ravel().tolist() == list(range(12))


def test_a_memory_mapped_file_travels_as_its_path(tmp_path):
    np.save(tmp_path / "large.npy", np.zeros((100, 100, 100), np.uint8))
    volume = open_volume(tmp_path / "large.npy")
    volume.read(Box((0, 0, 0), (1, 1, 1)))
    assert len(pickle.dumps(volume)) < 1000


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_floats_arrive_as_float32_and_what_overflows_is_refused(dtype, tmp_path):
    array = np.random.default_rng(0).random((4, 5, 6)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    got = open_volume(tmp_path / "a.npy").read_extended(Box((0, 0, 0), (4, 5, 6)), "reflect")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[0], array.astype(np.float32))
    if dtype == np.float64:
        array[1, 2, 3] = 1e300
        np.save(tmp_path / "b.npy", array)
        with pytest.raises(RunError, match=r"1e\+300"):
            open_volume(tmp_path / "b.npy").read_extended(Box((0, 0, 0), (4, 5, 6)), "reflect")


def test_channels_come_first_whatever_their_place(tmp_path):
    array = np.random.default_rng(0).random((5, 6, 7, 2)).astype("f4")
    zarr.create_array(
        str(tmp_path / "a.zarr"),
        data=array,
        chunks=(4, 4, 4, 1),
        dimension_names=("z", "y", "x", "c"),
    )
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.channels == 2
    got = volume.read(Box((1, 2, 3), (4, 5, 6)))
    np.testing.assert_array_equal(got, np.moveaxis(array, -1, 0)[:, 1:4, 2:5, 3:6])


def test_scale_and_translation_of_the_whole_image_count_too(tmp_path):
    inner = [
        {"type": "scale", "scale": [40, 4, 4]},
        {"type": "translation", "translation": [100, 0, 8]},
    ]
    whole = [{"type": "scale", "scale": [2, 2, 2]}]
    ome_zarr(tmp_path / "a.zarr", "0.5", "zyx", DATA, inner, whole)
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.scale == (80, 8, 8)
    assert volume.translation == (200, 0, 16)


def test_a_plane_is_a_volume_of_one_section(tmp_path):
    np.save(tmp_path / "plane.npy", DATA[0])
    volume = open_volume(tmp_path / "plane.npy")
    assert volume.size == (1, 20, 30)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_with_its_place_or_replaced(value, tmp_path):
    array = np.zeros((4, 5, 6), np.float32)
    array[2, 3, 4] = value
    np.save(tmp_path / "a.npy", array)
    volume = open_volume(tmp_path / "a.npy")
    with pytest.raises(RunError, match=r"z, y, x = \[2, 3, 4\].*--nan"):
        volume.read_extended(Box((1, 1, 1), (4, 5, 6)), "reflect")
    replaced = volume.read_extended(Box((1, 1, 1), (4, 5, 6)), "reflect", nan=7)
    assert replaced[0, 1, 2, 3] == 7
    assert (volume.read_extended(Box((0, 0, 0), (2, 5, 6)), "reflect") == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_takes_no_more_memory_than_is_counted(dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.full((64, 64, 64), np.nan, dtype))
    volume = open_volume(tmp_path / "a.npy")
    counted = volume.read_bytes(volume.size) + (64 << 10)  # of objects, not of values
    whole = Box((0, 0, 0), volume.size)

    def refused():
        with pytest.raises(RunError, match="262144 such values"):
            volume.read_extended(whole, "reflect")

    assert traced_peak(lambda: volume.read_extended(whole, "reflect", nan=7)) <= counted
    assert traced_peak(refused) <= counted


def broken(kind, folder):
    path = folder / kind
    match kind:
        case "complex.npy":
            np.save(path, np.zeros((3, 3, 3), np.complex64))
        case "object.npy":
            np.save(path, np.array([[[{}]]], object))
        case "text.npy":
            path.write_text("not an array")
        case "truncated.npy":
            np.save(path, DATA)
            path.write_bytes(path.read_bytes()[:-500])
        case "truncated.tif":
            tifffile.imwrite(path, DATA)
            path.write_bytes(path.read_bytes()[:5])
        case "cut pages.tif":
            with tifffile.TiffWriter(path) as writer:
                for page in DATA:
                    writer.write(page, contiguous=False)
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        case "cut imagej.tif":
            tifffile.imwrite(path, DATA, imagej=True, metadata={"axes": "ZYX"})
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "cut data.tif":
            tifffile.imwrite(path, DATA)
            path.write_bytes(path.read_bytes()[:-700])
        case "two images.tif":
            with tifffile.TiffWriter(path) as writer:
                writer.write(DATA[0, :10, :11])
                writer.write(DATA)
        case "palette.tif":
            tifffile.imwrite(
                path, DATA[0], photometric="palette", colormap=np.zeros((3, 256), np.uint16)
            )
        case "rgb pages" | "unequal pages":
            path.mkdir()
            for z in range(3):
                page = np.zeros((20, 30, 3), np.uint8) if kind == "rgb pages" else DATA[0, z:]
                tifffile.imwrite(path / f"{z}.tif", page)
        case "damaged chunk.zarr":
            zarr.create_array(str(path), data=DATA, chunks=DATA.shape)
            (path / "c" / "0" / "0" / "0").write_bytes(b"not zstd at all")
        case "bare datasets.zarr":
            ome_zarr(path, "0.5", "zyx", DATA, [{"type": "scale", "scale": [1, 1, 1]}])
            group = zarr.open_group(str(path))
            ome = dict(group.attrs["ome"])
            ome["multiscales"][0]["datasets"] = ["s0"]
            group.attrs["ome"] = ome
        case "six.npy":
            np.save(path, np.zeros((1,) * 6))
        case "empty.npy":
            np.save(path, np.zeros((0, 3, 3)))
        case "time.zarr":
            ome_zarr(
                path,
                "0.5",
                "tzyx",
                DATA[None].repeat(3, 0),
                [{"type": "scale", "scale": [1, 1, 1, 1]}],
            )
        case "group.zarr":
            zarr.open_group(str(path), mode="w").create_array("some", data=DATA)
        case "broken.zarr":
            path.mkdir()
            (path / "zarr.json").write_text("{ not json")
        case "missing level.zarr":
            ome_zarr(path, "0.5", "zyx", DATA, [{"type": "scale", "scale": [1, 1, 1]}])
            (path / "s0" / "zarr.json").unlink()
        case "folder":
            path.mkdir()
        case "picture.jpeg":
            path.write_bytes(b"\xff\xd8")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("complex.npy", "complex64"),
        ("object.npy", "cannot read"),
        ("text.npy", "cannot read"),
        ("truncated.npy", "cannot read"),
        ("truncated.tif", "cannot read"),
        ("cut pages.tif", "truncated"),
        ("cut imagej.tif", "truncated"),
        ("cut data.tif", "truncated"),
        ("two images.tif", "2 images of shapes"),
        ("palette.tif", "palette"),
        ("rgb pages", "one grey section each"),
        ("unequal pages", "sections of .* differ"),
        ("damaged chunk.zarr", "cannot read"),
        ("bare datasets.zarr", "metadata cannot be read"),
        ("six.npy", "two to five axes"),
        ("empty.npy", "empty"),
        ("group.zarr", r"without OME multiscales.*'some'"),
        ("broken.zarr", "cannot read"),
        ("missing level.zarr", "cannot read"),
        ("folder", "neither a Zarr array nor TIFF"),
        ("picture.jpeg", "not a kind of volume known"),
        ("nothing here", "there is no volume"),
    ],
)
def test_what_is_no_volume_is_refused(kind, message, tmp_path):
    with pytest.raises(VolumeError, match=message):
        open_volume(broken(kind, tmp_path))


def made(path, channels=1, size=(20, 33, 41), chunks=(8, 16, 16), shards=None, dtype="float32"):
    return output.create(
        path,
        output.output_layout(Encoding(dtype), channels, size, chunks, shards),
        scale=(40.0, 4.0, 4.0),
        translation=(0.0, 2.0, 0.5),
        units=("nanometer", "nanometer", "nanometer"),
        attributes={"note": 1},
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shards", [None, (16, 32, 32)])
def test_outputs_are_valid_ome_zarr_and_read_back(channels, shards, tmp_path):
    path = tmp_path / "out.zarr"
    image = made(path, channels, shards=shards)
    values = np.random.default_rng(0).random((channels, 20, 33, 41), np.float32)
    unit = shards or (8, 16, 16)
    for z in range(0, 20, unit[0]):
        box = Box((z, 0, 0), (min(z + unit[0], 20), 33, 41))
        image.write(box, values[(slice(None), *box.slices)])
    yaozarrs.validate_zarr_store(str(path))
    volume = open_volume(path)
    assert (volume.channels, volume.size) == (channels, (20, 33, 41))
    assert volume.scale == (40, 4, 4)
    assert volume.translation == (0, 2, 0.5)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (20, 33, 41))), values)
    assert zarr.open_group(str(path)).attrs["note"] == 1


def test_a_broken_image_is_rejected_by_the_validator_the_tests_trust(tmp_path):
    made(tmp_path / "out.zarr")
    group = zarr.open_group(str(tmp_path / "out.zarr"))
    attributes = dict(group.attrs["ome"])
    attributes["multiscales"][0]["axes"] = attributes["multiscales"][0]["axes"][:2]
    group.attrs["ome"] = attributes
    with pytest.raises(Exception, match=r"(?i)axes|dimension"):
        yaozarrs.validate_zarr_store(str(tmp_path / "out.zarr"))


@pytest.mark.parametrize("box", [Box((0, 0, 0), (4, 33, 41)), Box((8, 0, 8), (16, 33, 41))])
def test_half_a_chunk_is_never_written(box, tmp_path):
    image = made(tmp_path / "out.zarr")
    with pytest.raises(ValueError, match="whole number of chunks"):
        image.write(box, np.zeros((1, *box.size), np.float32))


def test_encodings_clip_round_and_read_back():
    values = np.array([-0.5, 0, 0.001, 0.5, 1, 3], np.float32)
    encoding = Encoding("uint8")
    stored_values = encoding.encode(values.copy())
    assert stored_values.tolist() == [0, 0, 0, 128, 255, 255]
    back = encoding.decode(stored_values)
    assert np.abs(back - np.clip(values, 0, 1)).max() <= 0.5 * encoding.step(1) + 1e-6
    wide = Encoding("uint8", -2, 2)
    assert wide.encode(np.array([-2, 0, 2], np.float32)).tolist() == [0, 128, 255]
    assert Encoding("float16").encode(values).dtype == np.float16


@pytest.mark.parametrize("options", [{"dtype": "int32"}, {"low": 1, "high": 1}])
def test_encodings_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError):
        Encoding(**options)


@pytest.mark.parametrize(
    ("chunks", "shards"), [((0, 8, 8), None), ((8, 8, 8), (12, 8, 8)), ((8, 8, 8), (0, 8, 8))]
)
def test_chunks_and_shards_that_do_not_fit_are_refused(chunks, shards):
    with pytest.raises(OptionError):
        output.output_layout(Encoding(), 1, (64, 64, 64), chunks, shards)


def test_the_output_keeps_away_from_the_input_and_from_foreign_folders(tmp_path):
    source = tmp_path / "data" / "in.zarr"
    source.parent.mkdir()
    zarr.create_array(str(source), data=DATA)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(source)
    refused = {
        source: "is, or lies in, the input",
        source / "out.zarr": "is, or lies in, the input",
        tmp_path / "link" / "out.zarr": "is, or lies in, the input",
        source.parent: "lies in the output",
        tmp_path / "file" / "out.zarr": "is a file",
        "https://host/out.zarr": "can be read, not written",
    }
    for path, message in refused.items():
        with pytest.raises(OutputError, match=message):
            output.check_place(path, [source], overwrite=True)
    existing = tmp_path / "out.zarr"
    made(existing)
    with pytest.raises(OutputError, match="exists"):
        output.check_place(existing, [source], overwrite=False)
    assert output.check_place(existing, [source], overwrite=True) == existing.resolve()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="will not be overwritten"):
        output.check_place(precious, [source], overwrite=True)
