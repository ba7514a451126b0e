"""Damaged, missing and foreign files are refused with their place and what to do; reading takes no
more memory than it says."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr

from znni_dask.errors import RunError, VolumeError
from znni_dask.geometry import Box
from znni_dask.storage.volume import open_volume

DATA = np.random.default_rng(0).integers(0, 60_000, (8, 32, 48)).astype(np.uint16)
WHOLE = Box((0, 0, 0), DATA.shape)

COMPRESSORS = {
    "raw": None,
    "zstd": zarr.codecs.ZstdCodec(),
    "gzip": zarr.codecs.GzipCodec(),
    "blosc": zarr.codecs.BloscCodec(cname="lz4"),
    "crc32c": [zarr.codecs.Crc32cCodec()],
}
COMPRESSORS_V2 = {
    "raw": None,
    "zstd": numcodecs.Zstd(),
    "blosc": numcodecs.Blosc(),
    "lz4": numcodecs.LZ4(),
    "zlib": numcodecs.Zlib(),
}


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize(
    ("version", "compressor"), [*((3, c) for c in COMPRESSORS), *((2, c) for c in COMPRESSORS_V2)]
)
def test_a_truncated_chunk_fails_with_its_place(version, compressor, share, tmp_path):
    codec = (COMPRESSORS if version == 3 else COMPRESSORS_V2)[compressor]
    path = tmp_path / "a.zarr"
    zarr.create_array(
        str(path), data=DATA, chunks=(4, 16, 16), zarr_format=version, compressors=codec
    )
    cut(path / ("c/1/0/2" if version == 3 else "1.0.2"), share)
    volume = open_volume(path)
    with pytest.raises(RunError, match=r"z, y, x = 4:8, 0:16, 32:48 of .*a\.zarr"):
        volume.read(WHOLE)
    box = Box((0, 0, 0), (4, 32, 48))
    np.testing.assert_array_equal(volume.read(box)[0], DATA[box.slices])


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("share", [0, 0.5, 0.98])
@pytest.mark.parametrize("compressor", ["raw", "zstd", "blosc"])
def test_a_truncated_shard_fails_with_its_place(location, share, compressor, tmp_path):
    path = tmp_path / "a.zarr"
    inner = [zarr.codecs.BytesCodec()]
    inner += [COMPRESSORS[compressor]] if COMPRESSORS[compressor] else []
    codec = zarr.codecs.ShardingCodec(
        chunk_shape=(4, 16, 16), index_location=location, codecs=inner
    )
    array = zarr.create(
        store=str(path), shape=DATA.shape, chunks=(4, 32, 32), dtype="u2", codecs=[codec]
    )
    array[:] = DATA
    cut(path / "c/1/0/1", share)
    volume = open_volume(path)
    for box in (WHOLE, Box((4, 0, 32), (8, 17, 48)), Box((4, 16, 32), (8, 32, 48))):
        with pytest.raises(RunError, match=r"z, y, x = 4:8, [\d:]+, 32:48 of .*a\.zarr"):
            volume.read(box)


def test_an_unknown_codec(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), data=DATA)
    path = tmp_path / "a.zarr" / "zarr.json"
    told = json.loads(path.read_text())
    told["codecs"][-1] = {"name": "wonder", "configuration": {}}
    path.write_text(json.dumps(told))
    with pytest.raises(VolumeError, match=r"wonder.*codec that is not installed"):
        open_volume(tmp_path / "a.zarr")
    zarr.create_array(str(tmp_path / "b.zarr"), data=DATA, zarr_format=2)
    path = tmp_path / "b.zarr" / ".zarray"
    told = json.loads(path.read_text()) | {"compressor": {"id": "wonder"}}
    path.write_text(json.dumps(told))
    with pytest.raises(VolumeError, match=r"wonder.*codec that is not installed"):
        open_volume(tmp_path / "b.zarr")


def test_a_tile_that_is_damaged_fails_with_its_page(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA, tile=(16, 16), compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[5]
        offset, count = page.dataoffsets[4], page.databytecounts[4]
    data = bytearray(path.read_bytes())
    data[offset + 10 : offset + count] = bytes(count - 10)
    path.write_bytes(data)
    volume = open_volume(path)
    with pytest.raises(RunError, match=r"z, y, x = 5:6, 16:32, 16:32 of .*page 5"):
        volume.read(WHOLE)


@pytest.mark.parametrize("folder", [False, True])
def test_a_tiff_truncated_after_it_was_opened(folder, tmp_path):
    path = tmp_path / "a"
    if folder:
        path.mkdir()
        for z, page in enumerate(DATA):
            tifffile.imwrite(path / f"{z}.tif", page)
        last = path / "7.tif"
    else:
        path = last = tmp_path / "a.tif"
        tifffile.imwrite(path, DATA)
    volume = open_volume(path)
    cut(last, 0.8)
    with pytest.raises(RunError, match="truncated"):
        volume.read(WHOLE)


def without(module, path):
    """What opening says where a package is not installed."""
    code = f"""if True:
        import sys
        sys.modules[{module!r}] = None
        from znni_dask.errors import VolumeError
        from znni_dask.storage.volume import open_volume
        try:
            open_volume({str(path)!r})
        except VolumeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_packages_that_are_missing_are_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DATA, compression="lzw")
    assert "pip install 'znni_dask[tiff]'" in without("imagecodecs", tmp_path / "a.tif")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = DATA
    assert "pip install 'znni_dask[hdf5]'" in without("h5py", tmp_path / "a.h5")


def test_hdf5_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "raw", data=DATA, chunks=(4, 16, 16), compression="gzip", fletcher32=True
        )
        place = file["raw"].id.get_chunk_info_by_coord((4, 16, 32))
    data = bytearray(path.read_bytes())
    middle = place.byte_offset + place.size // 2
    data[middle : middle + 20] = bytes(20)
    (tmp_path / "damaged.h5").write_bytes(data)
    with pytest.raises(RunError, match=r"z, y, x = 4:8, 16:32, 32:48 of .*damaged\.h5:/raw"):
        open_volume(tmp_path / "damaged.h5").read(WHOLE)
    cut(path, 0.5)
    with pytest.raises(VolumeError, match=r"cannot read .*truncated"):
        open_volume(path)
    (tmp_path / "text.h5").write_text("nothing of the kind")
    with pytest.raises(VolumeError, match="cannot read"):
        open_volume(tmp_path / "text.h5")
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["number"] = 1
    with pytest.raises(VolumeError, match="0 datasets of two axes"):
        open_volume(tmp_path / "none.h5")


def test_a_virtual_dataset_needs_its_files(tmp_path):
    layout = h5py.VirtualLayout(DATA.shape, DATA.dtype)
    for z in range(0, 8, 4):
        with h5py.File(tmp_path / f"part{z}.h5", "w") as file:
            file["raw"] = DATA[z : z + 4]
        layout[z : z + 4] = h5py.VirtualSource(f"part{z}.h5", "raw", (4, *DATA.shape[1:]))
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_virtual_dataset("raw", layout, fillvalue=0)
    np.testing.assert_array_equal(open_volume(tmp_path / "whole.h5").read(WHOLE)[0], DATA)
    (tmp_path / "part4.h5").unlink()
    with pytest.raises(VolumeError, match=r"not there: 'part4\.h5'"):
        open_volume(tmp_path / "whole.h5")


def test_no_permission(monkeypatch, tmp_path):
    """Simulated, for tests may run as a user who may read everything."""
    tifffile.imwrite(tmp_path / "a.tif", DATA)

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tifffile, "TiffFile", refused)
    with pytest.raises(VolumeError, match=r"no permission to read it.*denied"):
        open_volume(tmp_path / "a.tif")


def test_axes_that_are_unknown_ask_for_axes(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata={"axes": "HYX"})
    with pytest.raises(VolumeError, match=r"axes 'hyx'.*--axes"):
        open_volume(tmp_path / "a.ome.tif")
    assert open_volume(tmp_path / "a.ome.tif", axes="cyx").channels == 8


def test_a_group_of_images_names_them(tmp_path):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_group("0")
    group.create_array("label", data=DATA)
    with pytest.raises(VolumeError, match=r"arrays or images \('0', 'label'\)"):
        open_volume(tmp_path / "a.zarr")


SIZE = (48, 512, 512)
LARGE = {
    "chunks.zarr": {"chunks": (16, 128, 128)},
    "large chunks.zarr": {"chunks": (48, 512, 512)},
    "sharded.zarr": {"chunks": (16, 64, 64), "shards": (48, 512, 512)},
    "small shards.zarr": {"chunks": (8, 32, 32), "shards": (16, 128, 128)},
    "filtered2.zarr": {
        "chunks": (48, 256, 256),
        "zarr_format": 2,
        "filters": [numcodecs.Delta("u2")],
    },
    "channels.zarr": {"chunks": (2, 4, 12, 128, 128), "channels": True},
    "stack.tif": {},
    "strips.tif": {"compression": "zlib", "rowsperstrip": 512},
    "tiles.tif": {"compression": "zlib", "tile": (256, 256), "photometric": "minisblack"},
    "chunks.h5": {"chunks": (16, 128, 128), "compression": "gzip", "shuffle": True},
    "large chunks.h5": {"chunks": (48, 512, 512), "compression": "gzip", "shuffle": True},
    "contiguous.h5": {},
}
MEASURE = """if True:
    import json, re, sys
    from pathlib import Path
    from znni_dask.geometry import Box
    from znni_dask.storage.volume import open_volume

    def told(name):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(name + r":\\s+(\\d+)", status)[1])

    volume = open_volume(sys.argv[1])
    volume.read(Box((0, 0, 0), (8, 8, 8)))
    made = []
    for start, stop in (((3, 5, 7), (40, 400, 500)), ((-5, -5, 100), (20, 300, 350))):
        box = Box(start, stop)
        before = told("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        volume.read_extended(box, "reflect")
        made.append([told("VmHWM") - before, volume.read_bytes(box.size), 2 * box.voxels])
    print(json.dumps(made))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is Linux's")
@pytest.mark.parametrize("kind", LARGE)
def test_reading_takes_no_more_memory_than_it_says(kind, tmp_path):
    path = tmp_path / kind
    data = np.random.default_rng(0).integers(0, 60_000, SIZE).astype(np.uint16)
    options = dict(LARGE[kind])
    if kind.endswith(".zarr"):
        if options.pop("channels", False):
            data = data.reshape(2, 4, 6, 512, 512).repeat(2, 2)
        zarr.create_array(str(path), data=data, **options)
    elif kind.endswith(".tif"):
        tifffile.imwrite(path, data, **options)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("raw", data=data, **options)
    arguments = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    for taken, bound, values in json.loads(done.stdout):
        assert taken <= bound + (4 << 20)
        assert bound >= values
