"""Runs that end before their time: what is written stays, what is missing is made later, once."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import WrapperStore

import graphs
import znni_dask
from kills import SlowCommand, failing_after
from test_identity import assert_same, at_once
from znni_dask.errors import OptionError, OutputError, RunError
from znni_dask.geometry import Box
from znni_dask.importers.to_onnx import save
from znni_dask.journal import Journal, journal_of
from znni_dask.storage import lines, patience
from znni_dask.storage.forced import ForcedStore, force
from znni_dask.storage.lines import FileLines
from znni_dask.storage.output import Image
from znni_dask.storage.volume import open_volume

SIZE = (24, 32, 40)
BLOCKS = 3 * 4 * 5


def made_files(folder, size=SIZE):
    network = graphs.graph("unet", 0)
    save(network, folder / "net.onnx")
    values = np.random.default_rng(0).standard_normal((1, *size)).astype(np.float32)
    np.save(folder / "in.npy", values)
    return network, values


@pytest.fixture
def files(tmp_path):
    return made_files(tmp_path)


def options(folder):
    return {
        "network": folder / "net.onnx",
        "input": folder / "in.npy",
        "output": folder / "out.zarr",
        "chunks": 8,
        "patch": 8,
        "memory": "4GiB",
    }


def slow_command(folder, pause=0.02):
    """`znni infer` with these options."""
    files = [options(folder)[key] for key in ("network", "input", "output")]
    sizes = ["--chunks", "8,8,8", "--patch", "8,8,8", "--memory", "4GiB"]
    return SlowCommand(folder, "infer", *files, *sizes, pause=pause)


def stored(path):
    volume = open_volume(path)
    return volume.read(Box((0, 0, 0), volume.size))


def stopped(folder, client, monkeypatch, after, **changed):
    """A run of which all blocks but the first few fail."""
    with monkeypatch.context() as patched:
        failing_after(after, patched, "the machine was needed")
        with pytest.raises(RunError, match="same command tries again what is missing"):
            znni_dask.run(**options(folder) | changed, client=client)


def test_the_same_command_makes_what_is_missing_and_no_more(files, tmp_path, client, monkeypatch):
    network, values = files
    stopped(tmp_path, client, monkeypatch, after=20)
    journal = Journal.begun(journal_of(tmp_path / "out.zarr"))
    assert len(journal.done) == 20
    with monkeypatch.context() as patched:
        seen = failing_after(1 << 30, patched, None)
        summary = znni_dask.run(**options(tmp_path), client=client)
    assert summary.blocks == BLOCKS - 20 == len(seen)
    assert not set(seen) & {start for _, _, start in journal.done}
    assert_same(stored(tmp_path / "out.zarr"), at_once(network, values, "reflect"))
    assert not journal_of(tmp_path / "out.zarr").exists()
    again = znni_dask.run(**options(tmp_path), client=client)
    assert again.passes == ()
    for other in ({"dtype": "float16"}, {"chunks": 16}, {"ome": "0.4"}, {"boundary": "nearest"}):
        with pytest.raises(OutputError, match="exists"):
            znni_dask.run(**options(tmp_path) | other, client=client)


def test_the_plan_may_change_when_a_run_is_resumed_but_not_the_blocks(
    files, tmp_path, client, monkeypatch
):
    network, values = files
    stopped(tmp_path, client, monkeypatch, after=2, patch=(16, 32, 16), chunks=16)
    changed = {"patch": (5, 7, 9), "threads": 1, "chunks": 16}
    summary = znni_dask.run(**options(tmp_path) | changed, client=client)
    assert summary.plan.block == (16, 32, 16)
    assert summary.plan.patch == (5, 7, 9)
    assert_same(stored(tmp_path / "out.zarr"), at_once(network, values, "reflect"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"boundary": "nearest"}, "boundary"),
        ({"dtype": "float16"}, "dtype"),
        ({"chunks": 16}, "chunks"),
        ({"nan": 0.0}, "nan"),
        ({"network": "n337"}, "network"),
        ({"value_range": (0, 2)}, "range"),
    ],
)
def test_another_answer_is_refused_and_says_what_differs(
    changed, named, files, tmp_path, client, monkeypatch
):
    stopped(tmp_path, client, monkeypatch, after=3)
    before = journal_of(tmp_path / "out.zarr").read_text()
    with pytest.raises(OutputError, match=rf"differs from this one in .*{named}.*--overwrite"):
        znni_dask.run(**options(tmp_path) | changed, client=client)
    assert journal_of(tmp_path / "out.zarr").read_text() == before
    summary = znni_dask.run(**options(tmp_path) | {"overwrite": True}, client=client)
    assert summary.blocks == BLOCKS


def test_an_output_changed_since_is_not_taken_for_finished(files, tmp_path, client, monkeypatch):
    """Blocks that the journal tells of would be missing."""
    stopped(tmp_path, client, monkeypatch, after=20)
    shutil.rmtree(tmp_path / "out.zarr" / "1")
    with pytest.raises(OutputError, match=r"not as the unfinished run left it.*--overwrite"):
        znni_dask.run(**options(tmp_path), client=client)


def test_a_full_disk_ends_the_run_and_can_be_resumed(files, tmp_path, client, monkeypatch):
    network, values = files
    honest, written = Image.write, []

    def write(self, box, values, time=0, **where):
        if len(written) >= 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, box, values, time, **where)
        written.append(box)

    with monkeypatch.context() as patched:
        patched.setattr(Image, "write", write)
        with pytest.raises(RunError, match="once there is space on the disk") as found:
            znni_dask.run(**options(tmp_path), client=client)
    failed = int(str(found.value).split(" of ")[0])
    assert failed <= 2 * 3  # what was in flight, and no more
    summary = znni_dask.run(**options(tmp_path), client=client)
    assert summary.blocks == BLOCKS - len(written)
    assert_same(stored(tmp_path / "out.zarr"), at_once(network, values, "reflect"))


def test_a_run_killed_at_any_moment_is_finished_by_the_same_command(kills, tmp_path):
    """Nothing differs at the end, and no block is computed twice but those that were in flight."""
    kills = kills or 4
    most = 6 * 7  # blocks between kills: of a layer of the volume
    network, values = made_files(tmp_path, (8 * (kills + 1), 48, 56))
    command = slow_command(tmp_path)
    command.killed(kills, most)
    assert journal_of(tmp_path / "out.zarr").exists()
    command.finished()
    fresh = znni_dask.run(**options(tmp_path) | {"output": tmp_path / "fresh.zarr"})
    got = stored(tmp_path / "out.zarr")
    assert np.array_equal(got, stored(tmp_path / "fresh.zarr"))
    assert_same(got, at_once(network, values, "reflect"))
    computed = command.blocks()
    assert len(set(computed)) == fresh.blocks == most * (kills + 1)
    noting = 1  # may have been made, but not noted yet
    assert len(computed) - fresh.blocks <= kills * (fresh.plan.blocks_in_flight + noting)


def heeding_interrupts():
    """What is started in the background of a shell would not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_command_says_how_to_go_on(files, tmp_path):
    command = slow_command(tmp_path, pause=0.5)  # far from its end when it is interrupted
    run = subprocess.Popen(
        command.words(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_interrupts,
    )
    while run.poll() is None and len(command.blocks()) < 8:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert Journal.begun(journal_of(tmp_path / "out.zarr")).done


def test_a_journal_ahead_of_its_write_would_be_found(files, tmp_path, client, monkeypatch):
    """The planted fault: blocks noted before they are written are missing in the end."""
    network, values = files
    honest = Journal.begin

    def ahead(self):
        honest(self)
        for block in (Box((0, 0, 0), (8, 8, 8)), Box((8, 8, 8), (16, 16, 16))):
            self.add(0, 0, block)
            self.done.add((0, 0, block.start))  # as where it was found

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "begin", ahead)
        znni_dask.run(**options(tmp_path), client=client)
    with pytest.raises(AssertionError):
        assert_same(stored(tmp_path / "out.zarr"), at_once(network, values, "reflect"))


class Disk:
    """What would be left if the power failed now: of files what they held when they were forced to
    the disk, of folders what they listed; and of every block that the journal told of too early."""

    def __init__(self, monkeypatch, output):
        self.output, self.ahead, self.forced = output, set(), {}
        self.listed, self._lock = defaultdict(set), threading.Lock()  # several force one folder
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, number):
        path = Path(f"/proc/self/fd/{number}").readlink()
        if path == journal_of(self.output):
            self.ahead |= {at for at in Journal.begun(path).done if not self.keeps(at)}
        held = {p.name for p in path.iterdir()} if path.is_dir() else path.read_bytes()
        self._fsync(number)
        with self._lock:
            if path.is_dir():
                self.listed[path] |= held
            else:
                self.forced[path] = held

    def keeps(self, at):
        """Whether the chunks of a block are there to the last byte, and can be found."""
        _, _, start = at
        place = [str(n // 8) for n in start]
        chunks = (self.output.joinpath("0", "c", channel, *place) for channel in "01")
        return all(map(self._keeps, chunks))

    def _keeps(self, chunk):
        folders = [p for p in chunk.parents if p.is_relative_to(self.output.parent)]
        named = zip(folders, [chunk, *folders], strict=False)
        found = all(path.name in self.listed[folder] for folder, path in named)
        return found and self.forced.get(chunk) == chunk.read_bytes()


def test_whenever_the_power_fails_the_journal_tells_of_nothing_that_is_lost(
    files, tmp_path, monkeypatch
):
    disk = Disk(monkeypatch, tmp_path / "out.zarr")
    assert znni_dask.run(**options(tmp_path), pyramid=False).blocks == BLOCKS
    assert journal_of(disk.output) in disk.forced
    assert disk.ahead == set()


def test_chunks_that_are_only_handed_to_the_system_would_be_found(files, tmp_path, monkeypatch):
    """The planted fault."""
    disk = Disk(monkeypatch, tmp_path / "out.zarr")
    monkeypatch.setattr(ForcedStore, "set", WrapperStore.set)
    znni_dask.run(**options(tmp_path), pyramid=False)
    assert disk.ahead


def refusing_the_journal(monkeypatch, times):
    """A folder that refuses to force it to the disk, so many times after the first line; how
    often it was asked to."""
    asked = []

    def refused(path):
        if path.suffix == ".journal":
            asked.append(path)
            if 1 < len(asked) <= 1 + times:
                raise OSError(errno.EIO, "not now")
        force(path)

    monkeypatch.setattr(lines, "force", refused)
    return asked


def test_what_was_refused_is_put_once(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.001)
    asked = refusing_the_journal(monkeypatch, 3)
    with FileLines(tmp_path / "x.journal") as found:
        found.begin("first")
        for number in range(50):
            found.add(str(number))
    assert len(asked) >= 5
    assert FileLines(tmp_path / "x.journal").read() == ["first", *map(str, range(50))]


def test_a_folder_that_refuses_the_journal_for_a_while_is_asked_again(
    files, tmp_path, client, monkeypatch
):
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.001)
    asked = refusing_the_journal(monkeypatch, 3)
    znni_dask.run(**options(tmp_path), client=client)
    assert len(asked) >= 5
    assert_same(stored(tmp_path / "out.zarr"), at_once(*files, "reflect"))


def test_a_journal_that_a_folder_takes_no_more_ends_the_run(files, tmp_path, client, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(patience, "_SECONDS", 0.0)
        refusing_the_journal(patched, 1 << 30)
        with pytest.raises(RunError, match=r"journal .* cannot be written.*not now.*same command"):
            znni_dask.run(**options(tmp_path), client=client)
    znni_dask.run(**options(tmp_path), client=client)
    assert_same(stored(tmp_path / "out.zarr"), at_once(*files, "reflect"))
    assert not journal_of(tmp_path / "out.zarr").exists()


def test_metadata_that_a_folder_takes_no_more_leave_what_is_made(
    files, tmp_path, client, monkeypatch
):
    honest = zarr.open_group

    def refused(*place, mode):
        if mode == "r+":
            raise OSError(errno.EIO, "not now")
        return honest(*place, mode=mode)

    with monkeypatch.context() as patched:
        patched.setattr(patience, "_SECONDS", 0.0)
        patched.setattr(zarr, "open_group", refused)
        with pytest.raises(RunError, match=r"metadata of .* cannot be written.*same command"):
            znni_dask.run(**options(tmp_path), client=client)
    assert znni_dask.run(**options(tmp_path), client=client).blocks == 0
    assert_same(stored(tmp_path / "out.zarr"), at_once(*files, "reflect"))
    assert not journal_of(tmp_path / "out.zarr").exists()


def begun_journal(folder):
    path = folder / "x.zarr.journal"
    with Journal(path, {"network": "abc"}, [(8, 8, 8)]) as journal:
        journal.add(0, 0, Box((0, 0, 0), (8, 8, 8)))
        journal.add(0, 1, Box((8, 0, 0), (16, 8, 8)))
    return path


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_cut_off_counts_for_nothing_and_the_next_begins_afresh(cut, tmp_path):
    path = begun_journal(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal.begun(path)
    assert journal.done == {(0, 0, (0, 0, 0))}
    with journal:
        journal.add(0, 1, Box((16, 0, 0), (24, 8, 8)))
    assert Journal.begun(path).done == {(0, 0, (0, 0, 0)), (0, 1, (16, 0, 0))}


@pytest.mark.parametrize(
    "text",
    ["hello\n", "{}\n", '{"version": 9}\n', '{"version": 1, "described": {}, "blocks": 3}\n'],
)
def test_a_damaged_journal_is_refused(text, tmp_path):
    path = tmp_path / "x.zarr.journal"
    path.write_text(text)
    with pytest.raises(OutputError, match=r"damaged.*--overwrite"):
        Journal.begun(path)


@pytest.mark.parametrize("text", ["", '{"version": 1, "descr'])
def test_a_journal_killed_in_its_first_line_is_begun_anew(text, files, tmp_path, client):
    journal_of(tmp_path / "out.zarr").write_text(text)
    assert znni_dask.run(**options(tmp_path), client=client).blocks == BLOCKS
    assert not journal_of(tmp_path / "out.zarr").exists()


def test_a_refused_run_leaves_no_journal(files, tmp_path, client):
    with pytest.raises(OptionError):
        znni_dask.run(**options(tmp_path) | {"threads": 0}, client=client)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npy", "net.onnx"]
