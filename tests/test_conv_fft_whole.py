"""Convolution by transforms of whole images: what is transformed, how FFTW's plans are kept, when
it is chosen."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from math import log2, prod

import numpy as np
import pyfftw
import pytest

from znni_dask.choices import Menu, choose_primitives
from znni_dask.costs import Costs
from znni_dask.geometry import Box
from znni_dask.kernels import fourier
from znni_dask.kernels.codelets import LONGEST
from znni_dask.kernels.fourier import LIBRARY_BYTES, Pass, fast_length, transforms
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.kernels.team import Team
from znni_dask.network.build import Builder
from znni_dask.network.layers import Conv
from znni_dask.patches import Layout
from znni_dask.primitives import images
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_direct import ConvDirect
from znni_dask.primitives.conv_fft_whole import ConvWholeFFT
from znni_dask.schedule import Schedules

BOTH = [ConvWholeFFT(tasks=False), ConvWholeFFT(tasks=True)]


def problem_of(conv, batch, size, offset=(0, 0, 0)):
    made = [conv.window(axis).size(size[axis]) for axis in range(3)]
    shape = (batch, conv.in_channels, *size)
    return Problem(conv, (shape,), (batch, conv.out_channels, *made), (offset,), (0, 0, 0), size)


def made_by(primitive, problem, threads=1):
    """The output for random input and weights, always the same."""
    random = np.random.default_rng(0)
    image = random.standard_normal(problem.inputs[0], np.float32)
    weights = {
        key: random.standard_normal(shape, np.float32)
        for key, shape in problem.layer.weight_shapes().items()
    }
    out = np.full(problem.output, np.nan, np.float32)
    with Team(threads) as team:
        prepared = primitive.prepare(problem.layer, weights)
        primitive.apply(prepared, problem, [image], out, team)
    return out


@pytest.mark.parametrize("primitive", BOTH, ids=lambda p: p.name)
@pytest.mark.parametrize("padding", [0, 2])
def test_only_lines_are_transformed_that_are_not_zero_before_or_read_after(
    monkeypatch, primitive, padding
):
    done = []

    def counted(passes):
        def counting(one, plan):
            longer = max(one.source.shape[one.axis], one.target.shape[one.axis])
            real = np.float32 in (one.source.dtype, one.target.dtype)
            lines = min(one.source.size, one.target.size) // min(
                one.source.shape[one.axis], one.target.shape[one.axis]
            )
            operations = 5 * longer * log2(longer) * lines / (1 + real)
            return lambda: (done.append(operations), plan())

        return [counting(one, plan) for one, plan in zip(passes, transforms(passes), strict=True)]

    monkeypatch.setattr(images, "transforms", counted)
    conv = Conv(3, 4, (3, 2, 4), (2, 1, 3), padding=((padding,) * 3,) * 2)
    problem = problem_of(conv, 2, (20, 26, 30), (-padding,) * 3)
    made_by(primitive, problem, threads=2)
    frame = images.Frame.of(problem)
    products = 8 * 2 * 3 * 4 * frame.half * prod(frame.size[:2])
    assert sum(done) + products == pytest.approx(primitive.flops(problem))


def test_kernels_cost_about_a_third_of_what_their_padded_images_would():
    primitive, size = BOTH[0], (128, 128, 128)
    one, two = (primitive.flops(problem_of(Conv(1, n, (3, 3, 3)), 1, size)) for n in (1, 2))
    again = primitive.flops(problem_of(Conv(1, 1, (3, 3, 3)), 2, size))
    frame = images.Frame.of(problem_of(Conv(1, 1, (3, 3, 3)), 1, size))
    image = frame.half * prod(frame.size[:2]) * 5 * sum(map(log2, frame.size))
    kernel = two - one - (again - one - image)  # an output more, less a sample's own
    assert 0.3 < kernel / image < 0.4


@pytest.mark.parametrize("primitive", BOTH, ids=lambda p: p.name)
@pytest.mark.parametrize("axis", range(3))
def test_outputs_that_read_nothing_but_padding_are_the_bias(primitive, axis):
    offset = tuple(-9 * (a == axis) for a in range(3))
    conv = Conv(2, 3, (3, 3, 3), padding=(tuple(-o for o in offset),) * 2)
    problem = Problem(conv, ((1, 2, 6, 7, 8),), (1, 3, 2, 2, 2), (offset,), (0, 0, 0), (6, 7, 8))
    np.testing.assert_array_equal(made_by(primitive, problem), made_by(ConvDirect(), problem))


def test_lengths_are_the_shortest_that_are_fast():
    powers = [[p**n for n in range(11)] for p in (2, 3, 5, 7)]
    smooth = sorted(map(prod, product(*powers)))
    for least in range(1, 1000):
        assert fast_length(least) == next(n for n in smooth if n >= least)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of one's own, FFTW knowing nothing."""
    monkeypatch.setenv("ZNNI_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    pyfftw.forget_wisdom()
    fourier._recall.cache_clear()


def transformed(length):
    source = np.zeros((4, length), np.complex64)
    (plan,) = transforms([Pass(source, source, 1)])
    source[:, 0] = 1
    plan()
    return source


def test_plans_are_found_once_and_kept(cache, monkeypatch):
    np.testing.assert_allclose(transformed(60), 1)
    (kept,) = cache.iterdir()
    forget()
    monkeypatch.setattr(fourier, "_keep_wisdom", None)  # is called for what was not known
    np.testing.assert_allclose(transformed(60), 1)
    with pytest.raises(TypeError):
        transformed(54)
    assert kept == fourier.wisdom_file()


def test_what_other_processes_found_is_kept_too(cache):
    transformed(60)
    other = fourier.wisdom_file().read_bytes()
    forget()
    fourier._recall(cache / "nothing")
    fourier.wisdom_file().unlink()
    transforms([])
    transformed(54)
    fourier.wisdom_file().write_bytes(other)
    transformed(50)
    forget()
    fourier._recall(fourier.wisdom_file())
    known = [np.zeros((4, n), np.complex64) for n in (60, 54, 50)]
    assert None not in [fourier._plan(Pass(a, a, 1), known=True) for a in known]


def test_wisdom_that_is_damaged_or_cannot_be_kept_is_done_without(cache):
    cache.mkdir()
    fourier.wisdom_file().write_bytes(b"(fftw-3.3.5 fftwf_wisdom #x0")
    np.testing.assert_allclose(transformed(60), 1)
    assert fourier.wisdom_file().read_bytes().count(b"\n") > 1
    forget()
    fourier.wisdom_file().unlink()
    cache.rmdir()
    cache.write_bytes(b"")  # nothing can be kept in a file
    np.testing.assert_allclose(transformed(60), 1)


def test_the_library_takes_no_more_than_is_planned_for():
    code = """
import re, pathlib, znni_dask.cli
def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) << 10
before = anonymous()
import pyfftw
print(anonymous() - before)
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert LIBRARY_BYTES / 4 < int(done.stdout) <= LIBRARY_BYTES


def menu(channels, made, kernel, size=100):
    """What there is for a layer that is a network of its own."""
    b = Builder(channels)
    layout = Layout(b.network(b.conv(b.input, made, kernel)), (size,) * 3, "reflect")
    plain = Schedules(layout, choose_primitives(layout))
    return Menu.of_patches(plain, Box((0, 0, 0), (size,) * 3), 1000, threads=2)


def test_few_channels_and_large_kernels_are_transformed_whole():
    for kernel in (15, 25, LONGEST + 1):
        chosen = menu(1, 2, kernel).fastest()
        assert {type(p) for p in chosen.values()} == {ConvWholeFFT}
    for channels, kernel in ((32, 9), (80, 3), (1, 3)):
        chosen = menu(channels, channels, kernel).fastest()
        assert ConvWholeFFT not in {type(p) for p in chosen.values()}


def test_the_library_counts_in_memory():
    asked = menu(1, 2, 15)
    (name,) = asked.fastest()
    assert asked.fastest_within(LIBRARY_BYTES + (32 << 20)) == asked.fastest()
    without = asked.fastest_within(LIBRARY_BYTES)
    assert not any(p.library_bytes for p in without.values())
    layout = asked.schedules.layout
    for primitive in BOTH:
        schedules = Schedules(layout, {name: primitive})
        sizes = schedules.sizes(Box((0, 0, 0), (100,) * 3))
        (step,) = schedules.steps(sizes)
        needed = (
            LIBRARY_BYTES
            + primitive.prepared_bytes(step.problem.layer)
            + allocated_bytes(primitive.workspace_bytes(step.problem, 2))
        )
        assert schedules.spent_bytes(sizes, 2) == needed


def test_threads_have_images_of_their_own_where_there_are_enough():
    for channels, tasks in ((1, False), (8, True)):
        problem = problem_of(Conv(channels, channels, (9, 9, 9)), 1, (80, 80, 80))
        seconds = {p.tasks: Costs().step_seconds(p, problem, 4) for p in BOTH}
        assert min(seconds, key=seconds.get) is tasks
