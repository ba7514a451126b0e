"""A team does every item once, by as many threads as it has, and lets nobody's memory go early."""

from __future__ import annotations

import gc
import random
import threading
import time

import numpy as np
import pytest
from llvmlite import ir

from znni_dask.kernels import sharing, team
from znni_dask.kernels.code import LANES, VECTOR_BYTES, Function
from znni_dask.kernels.compiled import compiled_library, library_of_text
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.team import Each, Team


@pytest.fixture(scope="module")
def note():
    """A compiled function that adds one to items of ``counts``, in its thread's own line."""
    module = ir.Module("note")
    code = Function(module, "note", ("counts",), ("first", "last"))
    (counts,), (first, last) = code.addresses, code.numbers
    with code.loop(first, last) as item:
        place = counts + item * VECTOR_BYTES
        place.store(place.load() + code.vector(1))
    code.finish()
    return compiled_library(module)["note"]


def counted(threads, items):
    """Room for what every thread notes."""
    counts = allocate(threads * items * VECTOR_BYTES).view(np.float32).reshape(threads, items, -1)
    counts[...] = 0
    return counts


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_once_whatever_came_before(threads, note):
    chosen = random.Random(threads)
    with Team(threads) as together:
        for _ in range(300):
            items = chosen.choice([1, 2, 3, 7, 100, 1000])
            counts = counted(threads, items)

            def work(first, last, counts=counts):
                counts[0, first:last] += 1

            if chosen.random() < 0.3:
                together.share(work, items)
            else:
                each = Each(counts.ctypes.data, counts[0].nbytes)
                together.run(note, [each], items)
            assert (counts.sum(axis=0) == 1).all()
            if chosen.random() < 0.05:
                time.sleep(0.003)  # and everybody falls asleep


@pytest.mark.parametrize("count", [1, 2, 12, sharing.MOST_ARGUMENTS])
def test_arguments_arrive_in_order(count):
    names = [f"n{i}" for i in range(count)]
    stores = "".join(
        f"""
        %place.{i} = getelementptr i64, ptr %n0, i64 {i}
        store i64 %{name}, ptr %place.{i}"""
        for i, name in enumerate([*names[1:], "end"])
    )
    given = "".join(f", i64 %{name}" for name in names[1:])
    text = f"define void @keep(ptr %n0{given}, i64 %first, i64 %end) {{ {stores} ret void }}"
    keep = library_of_text(text, {"keep": (names[:1], [*names[1:], "first", "end"])})["keep"]
    kept, values = np.full(count, -1), list(range(100, 100 + count - 1))
    with Team(2) as together:
        together.run(keep, [kept.ctypes.data, *values], 1)
        assert list(kept) == [*values, 1]
        together.run(keep, [kept.ctypes.data, *values], 2)
    assert list(kept[:-1]) == values
    assert kept[-1] in (1, 2)


def test_the_threads_of_a_team_compute_side_by_side():
    both = threading.Barrier(2, timeout=60)
    with Team(2) as together:
        for _ in range(3):
            together.share(lambda first, last: both.wait(), 2)


@pytest.mark.parametrize("whose", ["caller", "helper"])
def test_what_a_thread_raises_is_raised_when_nobody_is_at_work_any_more(whose):
    caller, at_work = threading.current_thread(), []
    both = threading.Barrier(2, timeout=60)

    def work(first, last):
        both.wait()
        if (threading.current_thread() is caller) == (whose == "caller"):
            raise ValueError(whose)
        time.sleep(0.01)
        at_work.append(first)

    with Team(2) as together:
        with pytest.raises(ValueError, match=whose):
            together.share(work, 2)
        assert len(at_work) == 1
        together.share(lambda first, last: at_work.append(first), 2)
    assert len(at_work) == 3


def test_an_interrupt_waits_for_those_who_are_at_work(monkeypatch):
    asked, ended = [], []
    nap = time.sleep

    def interrupted(seconds):
        nap(seconds)
        if not asked:
            asked.append(seconds)
            raise KeyboardInterrupt

    both = threading.Barrier(2, timeout=60)
    caller = threading.current_thread()

    def work(first, last):
        both.wait()
        if threading.current_thread() is not caller:
            nap(0.05)
            ended.append(first)

    monkeypatch.setattr(team.time, "sleep", interrupted)
    with Team(2) as together, pytest.raises(KeyboardInterrupt):
        together.share(work, 2)
    assert len(ended) == 1


def test_threads_end_with_their_team():
    gc.collect()  # of teams that others left
    before = set(threading.enumerate())

    def begun():
        return set(threading.enumerate()) - before

    with Team(3) as together:
        assert not begun()  # they begin when they are needed
        together.share(lambda first, last: None, 9)
        assert len(begun()) == 2
        together.close()
        assert not begun()
    left = Team(3)
    left.share(lambda first, last: None, 9)
    del left
    gc.collect()
    assert not begun()


def test_helpers_sleep_when_there_is_nothing_to_do(note):
    with Team(3) as together:
        together.share(lambda first, last: None, 9)
        deadline = time.monotonic() + 60
        while len(together._helpers._beds) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(together._helpers._beds) == 2
        counts = counted(3, 50)
        together.run(note, [Each(counts.ctypes.data, counts[0].nbytes)], 50)
        assert (counts.sum(axis=0) == 1).all()
        assert counts.shape[2] == LANES
