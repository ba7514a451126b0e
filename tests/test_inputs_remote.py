"""Volumes behind URLs read as local ones; what cannot be reached, or may not, says so."""

from __future__ import annotations

import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import aiohttp
import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as known

from znni_dask.errors import RunError, VolumeError
from znni_dask.geometry import Box
from znni_dask.storage import patience
from znni_dask.storage import volume as volume_module
from znni_dask.storage.patience import Patience, is_passing
from znni_dask.storage.volume import open_volume

DATA = np.random.default_rng(0).integers(0, 255, (9, 40, 50)).astype(np.uint8)
WHOLE = Box((0, 0, 0), DATA.shape)
BOX = Box((1, 2, 3), (8, 39, 33))


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, and ranges of them, which the standard library does not send."""

    ranges = True

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if "secret" in self.path:
            return self.send_error(403)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not (wanted and self.ranges):
            return super().do_GET()
        try:
            with open(self.translate_path(self.path), "rb") as file:  # noqa: PTH123
                data = file.read()
        except OSError:
            return self.send_error(404)
        start, stop = wanted[1], wanted[2]
        part = data[int(start) : int(stop) + 1 if stop else None] if start else data[-int(stop) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return self.wfile.write(part)


class Server(ThreadingHTTPServer):
    """A server that many connect to at once."""

    request_queue_size = 256


@pytest.fixture
def served(tmp_path):
    """A folder and the URL at which it is served."""
    kind = type("Own", (Handler,), {})
    with Server(("127.0.0.1", 0), partial(kind, directory=str(tmp_path))) as server:
        server.kind = kind
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}", server
        server.shutdown()
        thread.join()


def image(store):
    group = zarr.open_group(store, mode="w", zarr_format=3)
    for i in range(2):
        group.create_array(f"s{i}", data=DATA[:, :: i + 1, :: i + 1], chunks=(4, 8, 8))
    axes = [{"name": a, "type": "space"} for a in "zyx"]
    datasets = [
        {
            "path": f"s{i}",
            "coordinateTransformations": [{"type": "scale", "scale": [1, i + 1, i + 1]}],
        }
        for i in range(2)
    ]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}


KINDS = {
    "v2.zarr": {"zarr_format": 2},
    "v3.zarr": {},
    "sharded.zarr": {"shards": (8, 32, 32)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_http_reads_as_the_folder_that_is_served(kind, served):
    folder, url, _ = served
    zarr.create_array(str(folder / kind), data=DATA, chunks=(4, 16, 16), **KINDS[kind])
    volume = open_volume(f"{url}/{kind}/")
    again = pickle.loads(pickle.dumps(volume))
    for one in (volume, again):
        np.testing.assert_array_equal(one.read(WHOLE)[0], DATA)
    with ThreadPoolExecutor(8) as pool:
        for values in pool.map(again.read, [BOX] * 16):
            np.testing.assert_array_equal(values[0], DATA[BOX.slices])


def test_a_level_behind_a_url(served):
    folder, url, _ = served
    image(str(folder / "image.zarr"))
    volume = open_volume(f"{url}/image.zarr", level="s1")
    assert volume.scale == (1, 2, 2)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), volume.size))[0], DATA[:, ::2, ::2])


def test_memory_and_storage_options():
    image(zarr.storage.FsspecStore.from_url("memory://known/image.zarr"))
    volume = open_volume("memory://known/image.zarr", storage_options={"skip_instance_cache": True})
    np.testing.assert_array_equal(volume.read(BOX)[0], DATA[BOX.slices])
    again = pickle.loads(pickle.dumps(volume))
    fsspec.filesystem("memory").rm("/known", recursive=True)
    with pytest.raises(RunError, match="cannot read"):  # not: the fill value
        again.read(BOX)


def test_a_file_url_is_a_local_path(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    np.save(folder / "a.npy", DATA)
    image(str(folder / "a.zarr"))
    for name in ("a.npy", "a.zarr"):
        volume = open_volume((folder / name).as_uri())
        assert volume.path == str(folder / name)
        np.testing.assert_array_equal(volume.read(WHOLE)[0], DATA)
    with pytest.raises(VolumeError, match="storage_options are for URLs"):
        open_volume(folder / "a.npy", storage_options={"anon": True})


def test_an_empty_place_and_a_forbidden_one(served):
    _, url, _ = served
    with pytest.raises(VolumeError, match=r"no Zarr array or OME-Zarr image at .*nothing.zarr"):
        open_volume(f"{url}/nothing.zarr")
    with pytest.raises(VolumeError, match="no permission"):
        open_volume(f"{url}/secret.zarr")


def test_a_server_that_is_not_there():
    with pytest.raises(VolumeError, match="cannot be reached"):
        open_volume("http://127.0.0.1:9/a.zarr")


def test_a_server_that_goes_away_fails_the_block_and_not_with_fill_values(served, monkeypatch):
    folder, url, server = served
    zarr.create_array(str(folder / "a.zarr"), data=DATA, chunks=(4, 8, 8))
    volume = open_volume(f"{url}/a.zarr")
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(volume_module, "_PATIENCE", lambda do: do())
    with pytest.raises(RunError, match=r"cannot read z, y, x = .*cannot be reached"):
        volume.read(BOX)


def test_a_server_that_is_restarted_is_asked_again(served, monkeypatch):
    folder, url, server = served
    zarr.create_array(str(folder / "a.zarr"), data=DATA, chunks=(4, 8, 8))
    volume = open_volume(f"{url}/a.zarr")
    server.shutdown()
    server.server_close()
    again = []

    def restarted(_):
        if not again:
            again.append(Server(server.server_address, partial(Handler, directory=str(folder))))
            threading.Thread(target=again[0].serve_forever, daemon=True).start()

    monkeypatch.setattr(volume_module, "_PATIENCE", Patience(is_passing))
    monkeypatch.setattr(patience, "sleep", restarted)
    try:
        np.testing.assert_array_equal(volume.read(BOX)[0], DATA[BOX.slices])
        assert again
    finally:
        for one in again:
            one.shutdown()
            one.server_close()


def test_sharded_arrays_need_ranges(served):
    folder, url, server = served
    zarr.create_array(str(folder / "a.zarr"), data=DATA, chunks=(4, 8, 8), shards=(8, 32, 32))
    server.kind.ranges = False
    with pytest.raises(VolumeError, match="sends ranges of files"):
        open_volume(f"{url}/a.zarr")


@pytest.mark.parametrize("name", ["a.tif", "a.h5", "a.h5:/raw", "a.npy"])
def test_other_files_are_read_from_folders_only(name):
    with pytest.raises(VolumeError, match="copy it, or store it as OME-Zarr"):
        open_volume(f"https://example.org/{name}")


class BotoCoreError(Exception):
    """A library's own exceptions, which have no other parent."""


class NoCredentialsError(BotoCoreError):
    """What botocore raises."""


class Guarded(MemoryFileSystem):
    """A store that answers every request by an error."""

    protocol = "guarded"
    error: Exception = NoCredentialsError("Unable to locate credentials")

    def cat_file(self, path, *arguments, **options):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NoCredentialsError("Unable to locate credentials"), r"credentials are missing.*anon"),
        (aiohttp.ClientPayloadError("half of it"), r"cannot read .*half of it"),
        (PermissionError("Access Denied"), "no permission to read it.*Access Denied"),
        (TimeoutError("no answer"), "cannot be reached"),
        (OSError("something else"), "something else"),
    ],
)
def test_what_a_cloud_refuses_is_told(error, message, monkeypatch):
    library = SimpleNamespace(BotoCoreError=BotoCoreError, ClientError=BotoCoreError)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", library)
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    monkeypatch.setattr(Guarded, "error", error)
    with pytest.raises(VolumeError, match=message):
        open_volume("guarded://bucket/a.zarr")


def test_protocols_unknown_or_not_installed(monkeypatch):
    with pytest.raises(VolumeError, match="gopher"):
        open_volume("gopher://host/a.zarr")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(known, "s3", raising=False)  # of tests before this
    with pytest.raises(VolumeError, match=r"znni_dask\[cloud\]"):
        open_volume("s3://bucket/a.zarr")


def test_passwords_in_urls_are_not_shown(served):
    folder, url, _ = served
    zarr.create_array(str(folder / "a.zarr"), data=DATA, chunks=(4, 8, 8))
    volume = open_volume(url.replace("http://", "http://me:word@") + "/a.zarr")
    assert volume.path == f"{url}/a.zarr"
    assert "word" not in repr(volume)
    with pytest.raises(VolumeError) as raised:
        open_volume(url.replace("http://", "http://me:word@") + "/secret.zarr")
    assert "word" not in str(raised.value)
