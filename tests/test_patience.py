"""What a store refuses for a while is written all the same."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import zarr

from znni_dask.errors import RunError
from znni_dask.geometry import Box
from znni_dask.storage import output, patience, volume
from znni_dask.storage.output import Image
from znni_dask.storage.patience import Patience


@pytest.fixture
def clock(monkeypatch):
    """Time that passes where it is waited for, alone; from now on, in seconds. Others, like the
    event loop of a cluster, keep theirs: it would sleep for good."""
    passed = [0.0]
    monkeypatch.setattr(patience, "monotonic", lambda: 1000 + passed[0])
    monkeypatch.setattr(patience, "sleep", lambda seconds: passed.append(passed.pop() + seconds))
    return passed


def refusing(clock, seconds, number=errno.EIO):
    """A store that refuses everything for so long."""

    def do():
        if clock[0] < seconds:
            raise OSError(number, "not now")
        return "written"

    return do


def test_what_is_refused_for_half_a_minute_is_written(clock):
    ask = Patience()
    assert ask(refusing(clock, 30)) == "written"
    assert 30 <= clock[0] < 40
    assert ask(refusing(clock, clock[0] + 30)) == "written"  # counted anew


def test_what_is_refused_for_good_is_given_up_after_a_minute_and_then_at_once(clock):
    ask = Patience()
    for _ in range(2):
        with pytest.raises(OSError, match="not now"):
            ask(refusing(clock, 1e9))
        assert 50 < clock[0] <= 60
    assert ask(lambda: 1) == 1
    with pytest.raises(OSError, match="not now"):
        ask(refusing(clock, 1e9))
    assert 100 < clock[0] <= 120


def test_what_is_refused_for_good_is_given_up_also_while_others_succeed(clock):
    ask = Patience()

    def do():
        assert ask(lambda: 1) == 1
        raise OSError(errno.EACCES, "not now")

    with pytest.raises(OSError, match="not now"):
        ask(do)
    assert 50 < clock[0] <= 60


def test_a_full_disk_does_not_get_emptier_by_waiting(clock):
    with pytest.raises(OSError, match="not now"):
        Patience()(refusing(clock, 1e9, errno.ENOSPC))
    assert clock[0] == 0


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError("filter returned failure"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
    ],
)
def test_a_volume_that_is_damaged_is_not_waited_for(tmp_path, clock, monkeypatch, error, passes):
    np.save(tmp_path / "in.npy", np.ones((4, 4, 4), np.float32))
    monkeypatch.setattr(volume, "_PATIENCE", Patience(patience.is_passing))
    found, honest = volume.open_volume(tmp_path / "in.npy"), volume.Volume._taken

    def taken(self, *where):
        if clock[0] < 20:
            raise error
        return honest(self, *where)

    monkeypatch.setattr(volume.Volume, "_taken", taken)
    if not passes:
        with pytest.raises(RunError, match="cannot read"):
            found.read(Box((0, 0, 0), (4, 4, 4)))
    else:
        assert found.read(Box((0, 0, 0), (4, 4, 4))).sum() == 64
    assert (clock[0] > 0) == passes


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, RunError), (errno.ENOSPC, OSError)])
def test_an_image_tells_what_its_store_says(tmp_path, clock, monkeypatch, number, error):
    array = zarr.create_array(tmp_path / "out.zarr", shape=(8, 8, 8), chunks=(4, 4, 4), dtype="f4")
    monkeypatch.setattr(output, "_PATIENCE", Patience())
    image, values = Image((array,), "zyx"), np.ones((1, 4, 4, 4), np.float32)
    corner = Box((0, 0, 0), (4, 4, 4))

    def refuse(self, place, values):
        raise OSError(number, "not now")

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Array, "__setitem__", refuse)
        with pytest.raises(error, match="not now"):
            image.write(corner, values)
    image.write(corner, values)
    assert np.asarray(array[...]).sum() == 64
