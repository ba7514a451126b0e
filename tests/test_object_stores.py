"""Volumes and outputs in object stores: as in folders, to the bit, whatever happens meanwhile; no
secret is ever shown or kept."""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import time
from collections import Counter

import aiohttp
import botocore.exceptions
import fsspec
import moto.settings
import numpy as np
import pytest
import zarr
from s3fs import S3FileSystem
from test_application import two_headed

import graphs
import znni_dask
from clouds import BUCKET, KEY, SECRET, ObjectStore, waited
from kills import SlowCommand, failing_after
from test_identity import assert_same, at_once
from znni_dask.cli import main
from znni_dask.errors import OptionError, OutputError, RunError, VolumeError
from znni_dask.geometry import Box
from znni_dask.importers.to_onnx import save
from znni_dask.job import BlockMaker
from znni_dask.journal import Journal, is_unfinished, journal_of
from znni_dask.pyramid import LevelMaker
from znni_dask.storage import lines, output, patience, urls
from znni_dask.storage.lines import ObjectLines
from znni_dask.storage.urls import Url, location, without_secrets
from znni_dask.storage.volume import open_volume
from znni_dask.verify import verify

SIZE = (8, 24, 32)
BLOCKS = 1 * 3 * 4
OUT = f"s3://{BUCKET}/out.zarr"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # what is tried again is what this project tries again
}


@pytest.fixture(scope="module")
def server():
    store = ObjectStore()
    forget_connections()
    yield store
    forget_connections()
    store.close()


def forget_connections():
    """Which hold the credentials that there were."""
    S3FileSystem.clear_instance_cache()
    urls._store.cache_clear()


@pytest.fixture
def other_credentials():
    """Connections are made anew, as by another process."""
    forget_connections()
    yield
    forget_connections()


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    """An empty bucket, credentials for it in the environment alone."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"max_concurrency": 1})  # no HEAD before a GET
    server.empty()
    return server


def network_and_values(folder):
    network = graphs.graph("chain", 1)
    save(network, folder / "net.onnx")
    values = np.random.default_rng(0).standard_normal((network.in_channels, *SIZE))
    return network, values.astype(np.float32)


def options(folder, target=OUT, **changed):
    return {
        "network": folder / "net.onnx",
        "input": folder / "in.npy",
        "output": target,
        "chunks": 8,
        "patch": 8,
        "memory": "4GiB",
        "pyramid": False,
        **changed,
    }


@pytest.fixture
def files(tmp_path):
    network, values = network_and_values(tmp_path)
    np.save(tmp_path / "in.npy", values)
    return network, values


def stored(place):
    volume = open_volume(place)
    return volume.read(Box((0, 0, 0), volume.size))


def contents(place):
    """All arrays of a store by their names."""
    group = zarr.open_group(str(place), mode="r")
    return {name: np.asarray(one[...]) for name, one in group.arrays()}


def assert_alike(place, other):
    ours, theirs = contents(place), contents(other)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype
        assert np.array_equal(values, theirs[name]), name


@pytest.mark.parametrize(
    "changed", [{"pyramid": True}, {"ome": "0.4", "dtype": "uint8", "value_range": (-3, 3)}]
)
def test_from_store_to_store_as_from_folder_to_folder(changed, store, files, tmp_path, client):
    network, values = files
    source = store.put("in.zarr", values, chunks=(1, 8, 16, 16))
    summary = znni_dask.run(**options(tmp_path, input=source) | changed, client=client)
    local = znni_dask.run(**options(tmp_path, tmp_path / "out.zarr") | changed, client=client)
    assert str(summary.output) == OUT
    assert summary.blocks == local.blocks == BLOCKS
    assert len(contents(OUT)) == (3 if "pyramid" in changed else 1)
    assert_alike(OUT, tmp_path / "out.zarr")
    if "dtype" not in changed:
        assert_same(stored(OUT), at_once(network, values, "reflect"))
    assert store.files.ls(BUCKET) == [f"{BUCKET}/in.zarr", f"{BUCKET}/out.zarr"]  # no journal
    assert znni_dask.run(**options(tmp_path, input=source) | changed, client=client).passes == ()
    assert verify(tmp_path / "net.onnx", source, OUT, places=1, size=(4, 4, 4)).holds


@pytest.mark.parametrize("changed", [{"dtype": "labels", "outputs": ("flows/0", "deep")}, {}])
def test_groups_and_labels_in_any_store_of_fsspec(changed, tmp_path, client):
    save(two_headed(), tmp_path / "net.onnx")
    values = np.random.default_rng(0).standard_normal((1, 16, 16, 24)).astype(np.float32)
    np.save(tmp_path / "in.npy", values)
    target = f"memory://{tmp_path.name}/out.zarr"
    for place in (target, tmp_path / "out.zarr"):
        made = znni_dask.run(**options(tmp_path, place) | changed, client=client)
        assert made.blocks
        again = znni_dask.run(**options(tmp_path, place) | changed, client=client)
        assert again.passes == ()
    groups = zarr.open_group(target, mode="r").attrs["znni"]["outputs"]
    assert len(groups) == len(changed.get("outputs", "123"))
    for group in groups:
        assert_alike(f"{target}/{group}", tmp_path / "out.zarr" / group)


def test_a_file_url_is_a_folder(files, tmp_path, client):
    target = tmp_path / "a folder" / "out.zarr"
    summary = znni_dask.run(**options(tmp_path, target.as_uri()), client=client)
    assert summary.output == target
    assert_same(stored(target), at_once(*files, "reflect"))


def names(store):
    return {name.removeprefix(f"{BUCKET}/") for name in store.files.find(BUCKET)}


def stopped(folder, client, monkeypatch, after, **changed):
    """A run of which all blocks but the first few fail."""
    with monkeypatch.context() as patched:
        failing_after(after, patched, "the machine was needed")
        with pytest.raises(RunError, match="same command tries again what is missing"):
            znni_dask.run(**options(folder, **changed), client=client)


def test_the_same_command_makes_what_is_missing_and_no_more(
    store, files, tmp_path, client, monkeypatch
):
    stopped(tmp_path, client, monkeypatch, after=5)
    assert is_unfinished(Url(OUT))
    done = Journal.begun(journal_of(Url(OUT))).done
    assert len(done) == 5
    with pytest.raises(OutputError, match=rf"{OUT}.journal tells .* differs .* boundary"):
        znni_dask.run(**options(tmp_path, boundary="nearest"), client=client)
    with monkeypatch.context() as patched:
        seen = failing_after(1 << 30, patched, None)
        summary = znni_dask.run(**options(tmp_path), client=client)
    assert summary.blocks == BLOCKS - 5 == len(seen)
    assert not set(seen) & {start for _, _, start in done}
    assert_same(stored(OUT), at_once(*files, "reflect"))
    assert not is_unfinished(Url(OUT))


def test_levels_are_resumed_too(files, tmp_path, client, monkeypatch):
    target, honest, begun = f"memory://{tmp_path.name}/out.zarr", LevelMaker.make, []

    def make(self, time, block):
        begun.append(self.level)
        if self.level == 2:
            raise OptionError("the machine was needed")
        honest(self, time, block)

    with monkeypatch.context() as patched:
        patched.setattr(LevelMaker, "make", make)
        with pytest.raises(RunError, match="level 2"):
            znni_dask.run(**options(tmp_path, target, pyramid=True), client=client)
    assert begun == [1, 2]
    summary = znni_dask.run(**options(tmp_path, target, pyramid=True), client=client)
    assert (summary.blocks, summary.passes[0].level_blocks) == (0, 1)
    znni_dask.run(**options(tmp_path, tmp_path / "out.zarr", pyramid=True), client=client)
    assert_alike(target, tmp_path / "out.zarr")


def test_a_run_killed_repeats_no_block_that_the_journal_tells_of(
    store, files, tmp_path, client, monkeypatch
):
    """And it tells of none that was not made."""
    words = [options(tmp_path)[key] for key in ("network", "input", "output")]
    sizes = ["--chunks", "8,8,8", "--patch", "8,8,8", "--memory", "4GiB", "--no-pyramid"]
    quick = "from znni_dask.storage import lines; lines._PAUSE_SECONDS = 0.05"
    command = SlowCommand(tmp_path, "infer", *words, *sizes, before=quick)
    quiet, journal = subprocess.DEVNULL, journal_of(Url(OUT))
    run = subprocess.Popen(command.words(8), stdout=quiet, stderr=quiet)
    waited(lambda: len(command.blocks()) == 8 and Journal.begun(journal).done)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = Journal.begun(journal).done
    assert {f"0 0 {start}" for _, _, start in done} <= set(command.blocks())
    seen = failing_after(1 << 30, monkeypatch, None)
    assert znni_dask.run(**options(tmp_path), client=client).blocks == BLOCKS - len(done)
    assert not set(seen) & {start for _, _, start in done}
    assert_same(stored(OUT), at_once(*files, "reflect"))
    assert not is_unfinished(Url(OUT))


def test_a_journal_ahead_of_its_write_would_be_found(files, tmp_path, client, monkeypatch):
    """The planted fault: blocks noted before they are written are missing in the end."""
    target, honest = f"memory://{tmp_path.name}/out.zarr", Journal.begin

    def ahead(self):
        honest(self)
        block = Box((0, 8, 8), (8, 16, 16))
        self.add(0, 0, block)
        self.done.add((0, 0, block.start))  # as where it was found

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "begin", ahead)
        znni_dask.run(**options(tmp_path, target), client=client)
    with pytest.raises(AssertionError):
        assert_same(stored(target), at_once(*files, "reflect"))


def test_a_store_that_refuses_for_a_while_is_asked_again(
    store, files, tmp_path, client, monkeypatch
):
    """Everything that a run asks for once it has begun."""
    _, values = files
    source = store.put("in.zarr", values, chunks=(1, 8, 16, 16))
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(lines, "_PAUSE_SECONDS", 0.0)
    asked = {
        ("PUT", "out.zarr/0/c/"): (500, "InternalError"),
        ("PUT", "out.zarr/1/c/"): (429, "TooManyRequests"),
        ("GET", "out.zarr/0/c/"): (502, "BadGateway"),
        ("PUT", "out.zarr.journal/"): (503, "ServiceUnavailable"),
        ("PUT", "out.zarr/zarr.json"): (500, "InternalError"),
        ("GET", "in.zarr/c/"): (400, "RequestTimeout"),
    }
    times = Counter()

    def refused(method, path):
        for (asking, of), refusal in asked.items():
            if method == asking and of in path:
                times[asking, of] += 1
                return refusal if 2 <= times[asking, of] < 5 else None
        return None

    with store.refusing(refused):
        znni_dask.run(**options(tmp_path, input=source, pyramid=True), client=client)
    assert {kind for kind, count in times.items() if count >= 5} == asked.keys()
    assert_same(stored(OUT), at_once(*files, "reflect"))


def test_a_store_that_may_not_be_written_any_more_fails_the_blocks_at_once(
    store, files, tmp_path, client
):
    def refused(method, path):
        return (403, "AccessDenied") if method == "PUT" and "/c/" in path else None

    with store.refusing(refused), pytest.raises(RunError, match="no permission to write it"):
        znni_dask.run(**options(tmp_path), client=client)
    assert Journal.begun(journal_of(Url(OUT))).done == set()


def test_a_journal_that_may_not_be_written_any_more_ends_the_run(
    store, files, tmp_path, client, monkeypatch
):
    monkeypatch.setattr(lines, "_PAUSE_SECONDS", 0.0)

    def refused(method, path):
        part = ".journal/" in path and not path.endswith("/head")
        return (403, "AccessDenied") if method == "PUT" and part else None

    with (
        store.refusing(refused),
        pytest.raises(RunError, match=r"the journal .* cannot be written.*same command"),
    ):
        znni_dask.run(**options(tmp_path), client=client)
    assert Journal.begun(journal_of(Url(OUT))).done == set()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://a"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://a"), True),
        (botocore.exceptions.ConnectTimeoutError(endpoint_url="http://a"), True),
        (botocore.exceptions.ConnectionClosedError(endpoint_url="http://a"), True),
        (botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError(), True),
        (aiohttp.ClientResponseError(None, (), status=503), True),
        (aiohttp.ClientResponseError(None, (), status=429), True),
        (aiohttp.ClientResponseError(None, (), status=403), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (botocore.exceptions.ProfileNotFound(profile="a"), False),
        (PermissionError("Access Denied"), False),
        (FileNotFoundError("The specified bucket does not exist"), False),
        (NotImplementedError(), False),
    ],
)
def test_what_may_pass_is_asked_again_and_nothing_else(error, passes, monkeypatch):
    monkeypatch.setattr(patience, "sleep", lambda seconds: None)
    answers = iter([error, None])

    def do():
        if answer := next(answers):
            raise answer
        return "written"

    ask = patience.Patience(patience.is_passing)
    if passes:
        assert ask(do) == "written"
    else:
        with pytest.raises(type(error)):
            ask(do)


def refused_with(error, folder, client, **changed):
    """What a run is refused with; nothing of it is secret."""
    with pytest.raises(error) as found:
        znni_dask.run(**options(folder, **changed), client=client)
    told = [found.value]
    while told[-1].__cause__:
        told.append(told[-1].__cause__)
    assert not any(SECRET in f"{one} {one!r}" for one in told)
    return str(found.value)


def test_a_bucket_that_is_not_there(store, files, tmp_path, client):
    told = refused_with(OutputError, tmp_path, client, target="s3://nowhere/out.zarr")
    assert "there is no such bucket" in told
    told = refused_with(VolumeError, tmp_path, client, input="s3://nowhere/in.zarr")
    assert "there is no Zarr array" in told


def test_wrong_credentials_are_told(store, files, tmp_path, client, monkeypatch):
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    told = refused_with(OutputError, tmp_path, client)
    assert "no permission" in told
    told = refused_with(VolumeError, tmp_path, client, input=OUT)
    assert "no permission to read it" in told
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))
    assert not store.files.find(BUCKET)


@pytest.mark.usefixtures("other_credentials")
def test_no_credentials_are_told(store, files, tmp_path, client, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    told = refused_with(OutputError, tmp_path, client)
    assert "credentials are missing" in told


@pytest.mark.usefixtures("other_credentials")
def test_credentials_of_the_standard_files_are_taken(store, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        f"[default]\naws_access_key_id = AKIA\naws_secret_access_key = {SECRET}\n"
    )
    (Url(OUT) / "some").write(b"thing")
    assert names(store) == {"out.zarr/some"}


@pytest.mark.usefixtures("other_credentials")
def test_a_store_that_is_not_there_is_told_at_once(store, files, tmp_path, client, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in refused_with(OutputError, tmp_path, client)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (f"s3://AKIA:{SECRET}@bucket/out.zarr", "leave them out of the URL"),
        (f"s3://AKIA:wJa/{SECRET}@bucket/out.zarr", "leave them out of the URL"),
        (f"s3://bucket/out.zarr?X-Amz-Signature={SECRET}", "leave them out of the URL"),
        ("s3://bucket", "within a bucket"),
        ("s3:///out.zarr", "within a bucket"),
        ("s3://bucket/a[1].zarr", "without any of"),
        ("s3://bucket/*.zarr", "without any of"),
        ("simplecache::s3://bucket/out.zarr", "within a bucket"),
        ("https://host/out.zarr", "can be read, not written"),
        ("gopher://host/out.zarr", "gopher"),
    ],
)
def test_urls_that_are_no_place_for_an_output(place, message, tmp_path, capsys):
    network_and_values(tmp_path)
    with pytest.raises(OutputError, match=message) as found:
        location(place)
    assert SECRET not in str(found.value)
    assert main(["infer", str(tmp_path / "net.onnx"), str(tmp_path / "in.npy"), place]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_secrets_in_the_url_of_a_volume_are_refused_and_not_shown(files, tmp_path, capsys):
    place = f"s3://AKIA:{SECRET}@bucket/in.zarr"
    for words in (["infer"], ["plan", "--html", str(tmp_path / "page.html")]):
        target = [str(tmp_path / "out.zarr")] if words == ["infer"] else []
        assert main([words[0], str(tmp_path / "net.onnx"), place, *target, *words[1:]]) == 2
        told = "".join(capsys.readouterr())
        assert "leave them out of the URL" in told
        assert SECRET not in told
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a@b/c.zarr", "s3://bucket/a@b/c.zarr"),
        ("http://host:80/a.zarr", "http://host:80/a.zarr"),
        ("at http://me:wo@rd@host:80/a.zarr, not", "at http://host:80/a.zarr, not"),
        ("url='https://host/a?sig=word' and", "url='https://host/a' and"),
        ("s3://me:wo/rd@host/a", "s3://host/a"),
        ("s3://me:word/a", "s3://…"),
    ],
)
def test_what_is_shown_has_no_secrets(text, shown):
    assert without_secrets(text) == shown


def test_no_secret_is_kept_or_logged(store, files, tmp_path, client, monkeypatch, capsys, caplog):
    caplog.set_level(logging.DEBUG, "znni_dask")
    caplog.set_level(logging.INFO)
    travelled, honest = [], BlockMaker.__init__

    def made(self, job):
        honest(self, job)
        travelled.append(pickle.dumps(self))

    monkeypatch.setattr(BlockMaker, "__init__", made)
    stopped(tmp_path, client, monkeypatch, after=5)
    assert ".journal/" in store.text()
    assert SECRET not in store.text()
    words = ["infer", *(str(options(tmp_path)[key]) for key in ("network", "input", "output"))]
    said = ["--chunks", "8,8,8", "--memory", "4GiB", "--no-pyramid"]
    assert main([*words, *said]) == 0
    with store.refusing(lambda method, path: (403, "SignatureDoesNotMatch")):
        assert main([*words, *said]) == 2
    told = "".join(capsys.readouterr())
    assert OUT in told
    assert travelled
    assert SECRET not in told + caplog.text + store.text()
    assert not any(SECRET.encode() in one for one in travelled)


def test_overwriting_takes_away_what_was_made_and_nothing_beside_it(store):
    beside = {"out.zarr2/zarr.json", "out.zarr.journal/head", "out.zar", "other/out.zarr/zarr.json"}
    for name in (*beside, "out.zarr/0/c/0/0/0", "out.zarr/7/zarr.json", "out.zarr/zarr.json"):
        store.files.pipe_file(f"{BUCKET}/{name}", b"{}")
    output.clear(Url(OUT))
    assert names(store) == beside


def test_overwriting_begins_anew(files, tmp_path, client, monkeypatch):
    target = f"memory://{tmp_path.name}/out.zarr"
    stopped(tmp_path, client, monkeypatch, after=5, target=target)
    again = options(tmp_path, target, boundary="nearest", overwrite=True)
    assert znni_dask.run(**again, client=client).blocks == BLOCKS
    assert_same(stored(target), at_once(*files, "nearest"))
    with pytest.raises(OutputError, match="exists"):
        znni_dask.run(**options(tmp_path, target), client=client)


@pytest.mark.parametrize("kind", ["a folder", "a foreign Zarr", "an object"])
def test_what_is_not_this_projects_is_never_overwritten(kind, store, files, tmp_path, client):
    if kind == "a foreign Zarr":
        store.put("out.zarr", np.ones((4, 4, 4)))
    else:
        name = f"{BUCKET}/out.zarr" + ("/thesis.txt" if kind == "a folder" else "")
        store.files.pipe_file(name, b"precious")
    before = store.text()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"exists|move it away"):
            znni_dask.run(**options(tmp_path, overwrite=overwrite), client=client)
    assert store.text() == before


def test_overwriting_that_is_cut_short_leaves_nothing_that_looks_complete(
    files, tmp_path, client, monkeypatch
):
    """And it can be begun again."""
    target = f"memory://{tmp_path.name}/out.zarr"
    znni_dask.run(**options(tmp_path, target), client=client)
    honest, calls = Url.remove, []

    def remove(self, some):
        calls.append(some)
        if len(calls) > 1:
            raise PermissionError("Access Denied")
        honest(self, some)

    with monkeypatch.context() as patched:
        patched.setattr(Url, "remove", remove)
        with pytest.raises(OutputError, match="cannot replace"):
            znni_dask.run(**options(tmp_path, target, overwrite=True), client=client)
    assert len(calls) == 2
    with pytest.raises(OutputError, match="exists"):  # not: it is complete
        znni_dask.run(**options(tmp_path, target), client=client)
    assert (
        znni_dask.run(**options(tmp_path, target, overwrite=True), client=client).blocks == BLOCKS
    )


def test_an_output_is_no_part_of_an_input(store, files, tmp_path, client):
    _, values = files
    source = store.put("in/a.zarr", values, chunks=(1, 8, 16, 16))
    for target in (source, f"{source}/", f"{source}/out.zarr", f"s3a://{BUCKET}/in/a.zarr"):
        with pytest.raises(OutputError, match="is, or lies in, the input"):
            znni_dask.run(**options(tmp_path, target, input=source), client=client)
    with pytest.raises(OutputError, match="lies in the output"):
        znni_dask.run(**options(tmp_path, f"s3://{BUCKET}/in", input=source), client=client)


def test_a_refused_run_leaves_nothing(store, files, tmp_path, client):
    with pytest.raises(OptionError):
        znni_dask.run(**options(tmp_path, threads=0), client=client)
    assert not names(store)


PLACE = Url(f"s3://{BUCKET}/x.journal")


def begun(first="first"):
    found = ObjectLines(PLACE)
    found.begin(first)
    return found


def test_lines_are_found_by_others_and_gone_on_with(store, monkeypatch):
    monkeypatch.setattr(lines, "_MOST_LINES", 3)
    monkeypatch.setattr(lines, "_PAUSE_SECONDS", 0.0)
    assert not ObjectLines(PLACE).exist()
    assert ObjectLines(PLACE).read() == []
    with begun() as some:
        for number in range(8):
            some.add(str(number))
    with begun("not wanted") as more:
        more.add("8")
    found = ObjectLines(PLACE)
    assert found.exist()
    first, *others = found.read()
    assert first == "first"
    assert sorted(others) == [str(number) for number in range(9)]
    assert len(PLACE.below()) == 1 + 3 + 1
    found.remove()
    assert not PLACE.below()
    found.remove()


def test_lines_are_put_while_others_are_added(store, monkeypatch):
    """A process that is killed loses what was not put, and no more; one that ends, nothing."""
    honest = Url.write

    def slow(self, data):
        time.sleep(0.5)
        honest(self, data)

    monkeypatch.setattr(lines, "_PAUSE_SECONDS", 3600)
    with begun() as some:
        some.add("1")
        waited(lambda: ObjectLines(PLACE).read() == ["first", "1"])
        some.add("2")
        some.add("3")
        assert ObjectLines(PLACE).read() == ["first", "1"]
        monkeypatch.setattr(Url, "write", slow)
    assert ObjectLines(PLACE).read() == ["first", "1", "2", "3"]


def test_parts_of_other_lines_count_for_nothing(store):
    """What a process puts that was thought to have ended."""
    with begun() as late:
        late.add("1")
        waited(lambda: len(PLACE.below()) == 2)
        ObjectLines(PLACE).remove()
        with begun("another first") as fresh:
            fresh.add("2")
        late.add("3")
    assert len(PLACE.below()) == 3
    assert ObjectLines(PLACE).read() == ["another first", "2"]
    ObjectLines(PLACE).remove()
    assert not PLACE.below()


def test_lines_cut_off_count_for_nothing(store):
    with begun() as some:
        some.add("[1]")
    (part,) = (name for name in PLACE.below() if name != "head")
    (PLACE / part).write(b"[1]\n[2")
    assert ObjectLines(PLACE).read() == ["first", "[1]"]
    (PLACE / "head").write(b"a name\nfir")
    assert ObjectLines(PLACE).read() == []
