"""Volumes of every format, chunking and compression read as the array they were made of, with the
scale that their files tell, from several threads and in other processes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import h5py
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr

from znni_dask.errors import RunError, VolumeError
from znni_dask.geometry import Box
from znni_dask.storage.volume import open_volume

DATA = np.random.default_rng(0).integers(0, 60_000, (9, 70, 83)).astype(np.uint16)
WHOLE = Box((0, 0, 0), DATA.shape)


def boxes(count, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        ends = [np.sort(random.choice(n + 1, 2, replace=False)) for n in DATA.shape]
        yield Box(tuple(int(e[0]) for e in ends), tuple(int(e[1]) for e in ends))


def _zarr(path, **options):
    zarr.create_array(str(path), data=DATA, **{"chunks": (4, 16, 32), **options})


def _pages(path, **options):
    path.mkdir()
    for z, page in enumerate(DATA):
        tifffile.imwrite(path / f"s{z}.tif", page, **options)


def _hdf5(path, name="raw", **options):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=DATA, **options)


def _bytes_apart(path):
    """Pages whose data are neither one stretch nor in order, of strips and of big-endian values."""
    with tifffile.TiffWriter(path, byteorder=">") as writer:
        for page in DATA:
            writer.write(page, contiguous=False, rowsperstrip=9)


def _fortran(path):
    np.save(path, np.asfortranarray(DATA))


TILES = {"tile": (32, 16), "photometric": "minisblack"}
SPACE = {"metadata": {"axes": "ZYX"}}
KINDS = {
    "v3.zarr": _zarr,
    "sharded.zarr": lambda p: _zarr(p, shards=(8, 32, 64)),
    "gzip.zarr": lambda p: _zarr(p, compressors=zarr.codecs.GzipCodec()),
    "raw.zarr": lambda p: _zarr(p, compressors=None),
    "blosc2.zarr": lambda p: _zarr(
        p, zarr_format=2, compressors=numcodecs.Blosc(cname="lz4", shuffle=1)
    ),
    "fortran2.zarr": lambda p: _zarr(p, zarr_format=2, order="F"),
    "plain.tif": lambda p: tifffile.imwrite(p, DATA),
    "big-endian.tif": lambda p: tifffile.imwrite(p, DATA, byteorder=">"),
    "apart.tif": _bytes_apart,
    "big.tif": lambda p: tifffile.imwrite(p, DATA, bigtiff=True),
    "imagej.tif": lambda p: tifffile.imwrite(p, DATA, imagej=True, **SPACE),
    "zlib tiles.tif": lambda p: tifffile.imwrite(p, DATA, compression="zlib", **TILES),
    "lzw.tif": lambda p: tifffile.imwrite(p, DATA, compression="lzw", predictor=True),
    "zstd strips.tif": lambda p: tifffile.imwrite(p, DATA, compression="zstd", rowsperstrip=7),
    "tiles.tif": lambda p: tifffile.imwrite(p, DATA, bigtiff=True, **TILES),
    "deep tiles.tif": lambda p: tifffile.imwrite(
        p, DATA, tile=(16, 16, 32), volumetric=True, photometric="minisblack", compression="zlib"
    ),
    "tiles.ome.tif": lambda p: tifffile.imwrite(p, DATA, compression="zlib", **TILES, **SPACE),
    "folder": _pages,
    "tiled folder": lambda p: _pages(p, compression="zlib", **TILES),
    "chunks.h5": lambda p: _hdf5(p, chunks=(4, 16, 16), compression="gzip", shuffle=True),
    "contiguous.hdf5": _hdf5,
    "nested.h5": lambda p: _hdf5(p, "volumes/raw", chunks=True, compression="lzf"),
    "array.npy": lambda p: np.save(p, DATA),
    "fortran.npy": _fortran,
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    opened = {}
    for kind, write in KINDS.items():
        write(folder / kind)
        opened[kind] = open_volume(folder / kind)
    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_every_box_reads_as_it_was_written(kind, volumes):
    volume = volumes[kind]
    assert (volume.size, volume.channels, volume.times) == (DATA.shape, 1, 1)
    assert volume.dtype.kind == "u"
    np.testing.assert_array_equal(volume.read(WHOLE)[0], DATA)
    for box in boxes(12):
        np.testing.assert_array_equal(volume.read(box)[0], DATA[box.slices])


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_read_at_once(kind, volumes):
    volume = pickle.loads(pickle.dumps(volumes[kind]))
    places = list(boxes(40, seed=1))
    with ThreadPoolExecutor(8) as pool:
        for box, values in zip(places, pool.map(volume.read, places), strict=True):
            np.testing.assert_array_equal(values[0], DATA[box.slices])


def test_another_process_reads_the_same_of_what_little_travels(volumes, tmp_path):
    box = Box((2, 3, 5), (8, 60, 70))
    for kind, volume in volumes.items():
        assert len(pickle.dumps(volume)) < 3000, kind
    (tmp_path / "volumes").write_bytes(pickle.dumps((volumes, box)))
    code = """if True:
        import pickle, sys
        volumes, box = pickle.load(open(sys.argv[1], "rb"))
        pickle.dump({k: v.read(box) for k, v in volumes.items()}, open(sys.argv[2], "wb"))
    """
    arguments = [str(tmp_path / "volumes"), str(tmp_path / "values")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    for kind, values in pickle.loads((tmp_path / "values").read_bytes()).items():
        np.testing.assert_array_equal(values[0], DATA[box.slices], err_msg=kind)


SEVERAL = np.random.default_rng(1).integers(0, 255, (3, 2, 4, 20, 24)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["hyperstack.tif", "image.ome.tif", "a.zarr", "sharded.zarr"])
def test_times_and_channels(kind, tmp_path):
    path = tmp_path / kind
    order = "tczyx"
    match kind:
        case "hyperstack.tif":
            order = "tzcyx"
            stack = SEVERAL.transpose(0, 2, 1, 3, 4)
            tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "TZCYX"})
        case "image.ome.tif":
            tifffile.imwrite(
                path, SEVERAL, metadata={"axes": "TCZYX"}, tile=(16, 16), compression="zlib"
            )
        case "a.zarr":
            order = "xtcyz"
            array = SEVERAL.transpose([("tczyx").index(a) for a in order])
            zarr.create_array(str(path), data=array, chunks=(8, 2, 2, 8, 2), dimension_names=order)
        case "sharded.zarr":
            zarr.create_array(
                str(path), data=SEVERAL, chunks=(1, 1, 2, 8, 8), shards=(2, 2, 4, 16, 16)
            )
    volume = open_volume(path)
    assert (volume.axes, volume.times, volume.channels) == (order, 3, 2)
    box = Box((1, 2, 3), (4, 19, 20))
    for time in range(3):
        np.testing.assert_array_equal(
            volume.read(box, time), SEVERAL[time][(slice(None), *box.slices)]
        )
    second = open_volume(path, channels=[1])
    np.testing.assert_array_equal(second.read(box, 1)[0], SEVERAL[1, 1][box.slices])


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}])
def test_samples_of_a_colour_image_are_channels(planar, options, tmp_path):
    colours = SEVERAL[0, :, 0].repeat(2, 0)[:3]
    image = colours if planar == "separate" else np.moveaxis(colours, 0, -1)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", planarconfig=planar, **options)
    volume = open_volume(tmp_path / "a.tif")
    assert volume.channels == 3
    np.testing.assert_array_equal(
        volume.read(Box((0, 2, 3), (1, 20, 23)))[:, 0], colours[:, 2:, 3:23]
    )


def test_bits_read_as_truth_values(tmp_path):
    mask = SEVERAL[0, 0] > 100
    tifffile.imwrite(tmp_path / "a.tif", mask)
    np.testing.assert_array_equal(
        open_volume(tmp_path / "a.tif").read(Box((0, 0, 0), (4, 20, 24)))[0], mask
    )


def pyramid(path, version="0.5"):
    """Three levels, each half of the one before; their translations put them over one another."""
    levels = [DATA[:: 2**i, :: 2**i, :: 2**i] for i in range(3)]
    group = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for i, level in enumerate(levels):
        name = f"scale{i}"
        group.create_array(name, data=level, chunks=(4, 16, 16))
        step = 2.0**i
        changes = [
            {"type": "scale", "scale": [40 * step, 4 * step, 4 * step]},
            {"type": "translation", "translation": [20 * (step - 1), 2 * (step - 1), 0]},
        ]
        datasets.append({"path": name, "coordinateTransformations": changes})
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    image = {"axes": axes, "datasets": datasets, "version": version}
    if version == "0.5":
        group.attrs["ome"] = {"version": version, "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [image]
    return levels


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("level", [None, 0, 1, "2", "scale1"])
def test_a_level_is_taken_by_index_or_path(level, version, tmp_path):
    levels = pyramid(tmp_path / "a.zarr", version)
    volume = open_volume(tmp_path / "a.zarr", level=level)
    number = {None: 0, "2": 2, "scale1": 1}.get(level, level)
    step = 2.0**number
    assert volume.level == f"scale{number}"
    assert volume.scale == (40 * step, 4 * step, 4 * step)
    assert volume.translation == (20 * (step - 1), 2 * (step - 1), 0)
    assert volume.units == ("nanometer",) * 3
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), volume.size))[0], levels[number])


@pytest.mark.parametrize("level", [3, -1, "scale7", ""])
def test_an_unknown_level_lists_those_there_are(level, tmp_path):
    pyramid(tmp_path / "a.zarr")
    with pytest.raises(VolumeError, match=r"no level .*0 \('scale0'\), 1 \('scale1'\), 2"):
        open_volume(tmp_path / "a.zarr", level=level)


@pytest.mark.parametrize("kind", ["v3.zarr", "plain.tif", "chunks.h5", "array.npy"])
def test_only_images_have_levels(kind, volumes):
    path = volumes[kind].path.split(":")[0]
    with pytest.raises(VolumeError, match="level 1 of"):
        open_volume(path, level=1)


def test_xarrays_dimensions_name_the_axes_of_zarr_v2(tmp_path):
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), data=DATA.transpose(2, 0, 1), chunks=(8, 8, 8), zarr_format=2
    )
    array.attrs["_ARRAY_DIMENSIONS"] = ["x", "z", "y"]
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.axes == "xzy"
    np.testing.assert_array_equal(volume.read(WHOLE)[0], DATA)


@pytest.mark.parametrize(
    ("unit", "told"), [("um", "micrometer"), ("\\u00B5m", "micrometer"), ("nm", "nanometer")]
)
def test_imagej_tells_spacing_and_unit(unit, told, tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        DATA,
        imagej=True,
        resolution=(1 / 0.25, 1 / 0.5),
        metadata={"axes": "ZYX", "spacing": 3.0, "unit": unit},
    )
    volume = open_volume(tmp_path / "a.tif")
    assert volume.scale == pytest.approx((3, 0.5, 0.25))
    assert volume.units == (told,) * 3


def test_ome_tiff_tells_physical_sizes(tmp_path):
    sizes = {"PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
    sizes |= {"PhysicalSizeZ": 40.0, "PhysicalSizeZUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata={"axes": "ZYX", **sizes})
    volume = open_volume(tmp_path / "a.ome.tif")
    assert volume.scale == (40, 0.5, 4)
    assert volume.units == ("nanometer", "micrometer", "nanometer")


def test_an_ome_tiff_of_several_files(tmp_path):
    """Planes in a second file, as its metadata tell."""
    tifffile.imwrite(tmp_path / "one.ome.tif", DATA[:4], metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "two.ome.tif", DATA[4:], metadata={"axes": "ZYX"})
    with tifffile.TiffFile(tmp_path / "one.ome.tif") as one:
        first = one.ome_metadata
    with tifffile.TiffFile(tmp_path / "two.ome.tif") as two:
        second = two.ome_metadata
    uuids = [text.split('UUID="')[1].split('"')[0] for text in (first, second)]
    planes = "".join(
        f'<TiffData FirstZ="{z}" FirstC="0" FirstT="0" IFD="{z - 4 * (z > 3)}" PlaneCount="1">'
        f'<UUID FileName="{name}.ome.tif">{uuid}</UUID></TiffData>'
        for z, (name, uuid) in enumerate([("one", uuids[0])] * 4 + [("two", uuids[1])] * 5)
    )
    head, tail = first.split("<TiffData", 1)
    tail = tail.split("</Pixels>")[1]
    text = head.replace('SizeZ="4"', 'SizeZ="9"') + planes + "</Pixels>" + tail
    tifffile.tiffcomment(tmp_path / "one.ome.tif", text.encode())
    volume = open_volume(tmp_path / "one.ome.tif")
    np.testing.assert_array_equal(volume.read(WHOLE)[0], DATA)
    (tmp_path / "two.ome.tif").unlink()
    with pytest.raises(VolumeError, match="lacks plane 4"):
        open_volume(tmp_path / "one.ome.tif")


def axistags(keys, resolution=0):
    axes = [{"key": k, "typeFlags": 2, "resolution": resolution} for k in keys]
    return json.dumps({"axes": axes})


@pytest.mark.parametrize(
    ("attributes", "scale", "translation", "unit"),
    [
        ({"element_size_um": [0.04, 0.004, 0.004]}, (0.04, 0.004, 0.004), (0, 0, 0), "micrometer"),
        ({"resolution": [40, 4, 4]}, (40, 4, 4), (0, 0, 0), "nanometer"),
        ({"resolution": [40, 4, 4], "offset": [80, 0, 8]}, (40, 4, 4), (80, 0, 8), "nanometer"),
        ({"axistags": axistags("zyx", 2.5)}, (2.5, 2.5, 2.5), (0, 0, 0), None),
        ({"resolution": "fine", "axistags": "not json"}, (1, 1, 1), (0, 0, 0), None),
    ],
)
def test_hdf5_attributes_tell_the_scale(attributes, scale, translation, unit, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=DATA).attrs.update(attributes)
    volume = open_volume(tmp_path / "a.h5")
    assert (volume.scale, volume.translation) == (scale, translation)
    assert volume.units == (unit,) * 3


@pytest.mark.parametrize("told", ["axistags", "labels"])
def test_hdf5_attributes_tell_the_axes(told, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("exported_data", data=np.moveaxis(SEVERAL[0], 0, -1))
        if told == "axistags":
            dataset.attrs["axistags"] = axistags("zyxc")
        else:
            for dim, letter in zip(dataset.dims, "zyxc", strict=True):
                dim.label = letter
    volume = open_volume(f"{tmp_path}/a.h5:/exported_data")
    assert (volume.axes, volume.channels) == ("zyxc", 2)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (4, 20, 24))), SEVERAL[0])


def test_a_dataset_is_named_behind_the_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volumes/raw"] = DATA
        file["volumes/labels"] = DATA // 2
        file["note"] = "not a volume"
        file["table"] = np.zeros((2, 2), [("a", int), ("b", float)])
    volume = open_volume(f"{tmp_path}/a.h5:/volumes/labels")
    assert volume.path.endswith("a.h5:/volumes/labels")
    np.testing.assert_array_equal(volume.read(WHOLE)[0], DATA // 2)
    there = r"'/table'.*'/volumes/labels', '/volumes/raw'"
    for asked in ("", ":/volumes", ":/volumes/rav"):
        with pytest.raises(VolumeError, match=there[10:] if asked == ":/volumes" else there):
            open_volume(f"{tmp_path}/a.h5{asked}")
    for asked, message in ((":/note", "has no dataset|wanted"), (":/table", "real numbers")):
        with pytest.raises(VolumeError, match=message):
            open_volume(f"{tmp_path}/a.h5{asked}")


def test_what_the_file_says_of_axes_can_be_corrected(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = DATA.transpose(2, 1, 0)
    volume = open_volume(tmp_path / "a.h5", axes="xyz")
    np.testing.assert_array_equal(volume.read(WHOLE)[0], DATA)


def test_chunks_never_written_hold_the_fill_value(tmp_path):
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=(8, 8, 8), chunks=(4, 4, 4), dtype="u1", fill_value=7
    )
    array[:4, :4, :4] = 1
    values = open_volume(tmp_path / "a.zarr").read(Box((0, 0, 0), (8, 8, 8)))[0]
    assert (values[:4, :4, :4] == 1).all()
    assert (values[4:] == 7).all()


def test_an_array_that_changed_meanwhile_is_not_read(tmp_path):
    np.save(tmp_path / "a.npy", DATA)
    travelled = pickle.dumps(open_volume(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", DATA[:, :50])
    with pytest.raises(RunError, match="changed meanwhile"):
        pickle.loads(travelled).read(Box((0, 0, 0), (1, 1, 1)))
