"""Measuring what steps take on this machine: networks with layers of many kinds and sizes, each
computed by every family of primitives that takes some of their layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from znni_dask.choices import Menu, choose_primitives
from znni_dask.costs import Costs, bus_features, model_seconds
from znni_dask.devices.opening import opened
from znni_dask.executors.device import executor_of
from znni_dask.geometry import Box
from znni_dask.kernels.memory import allocate
from znni_dask.kernels.team import Team
from znni_dask.machine import CPU, GPU, available_bytes
from znni_dask.network.build import Builder
from znni_dask.network.network import Network
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout
from znni_dask.primitives.base import Primitive
from znni_dask.primitives.gpu.rates import BUS
from znni_dask.primitives.work import TOUCHING
from znni_dask.resources import device_bytes as needed_bytes
from znni_dask.schedule import Schedules, Stored
from znni_dask.timings import Timing, Timings

RUNS = 3  # of which the median counts; one of what takes long
_AWAKE_SECONDS = 0.1  # of runs before: threads that were woken on one core find another meanwhile
_LONG_SECONDS = 0.25  # of a run
_LONGEST_SECONDS = 0.5  # as expected, of a run that is worth its time
_LONGER_ON_GPU = 2  # edges of patches: of small ones it takes longest to begin
_COPIED = tuple(1 << n for n in range(16, 28, 2))  # bytes
_TOUCHED_BYTES = 1 << 29  # of memory, or a quarter of what is available
_MANY = 1000.0  # patches that primitives are chosen for: what is prepared once does not count


@dataclass(frozen=True)
class Study:
    """A network, and the edge of the patch that it is measured with."""

    network: Network
    edge: int


def calibrate(
    threads: int, told: Callable[[int, int], None] | None = None, device_bytes: int | None = None
) -> Timings:
    """Measure with so many threads, or the GPU, of whose memory ``device_bytes`` may be taken;
    ``told`` is called with the studies done and all there are."""
    found, done = Timings(), list(studies())
    beside = [_touching(threads)] if device_bytes is None else _bus(device_bytes)
    found = found.joined(beside)
    for number, study in enumerate(done):
        found = found.joined(measured(study, threads, device_bytes, found))
        if told:
            told(number + 1, len(done))
    return found


def measured(
    study: Study, threads: int, device_bytes: int | None = None, before: Timings | None = None
) -> Iterator[Timing]:
    """The timings of one study: the fastest primitives by their estimates, and then of every
    family that takes some layer those, but for what takes too long by those found ``before``. Of
    steps that several of these take the median."""
    network, device = simplify(study.network), CPU if device_bytes is None else GPU
    edge = study.edge * (1 if device_bytes is None else _LONGER_ON_GPU)
    layout = Layout(network, (4 * edge,) * 3, "reflect")
    plain = Schedules(layout, choose_primitives(layout, device=device))
    box = Box((edge,) * 3, (2 * edge,) * 3)
    menu = Menu.of_patches(plain, box, _MANY, threads)
    done: list[Mapping[str, Primitive]] = []
    ratios: defaultdict[tuple[str, tuple[float, ...]], list[float]] = defaultdict(list)
    for family in menu.families:
        primitives = menu.of_family(family)
        if primitives in done:
            continue
        done.append(primitives)
        schedules = Schedules(layout, primitives)
        steps = schedules.steps(schedules.sizes(box))
        expected = schedules.repeats * Costs(before or Timings()).estimated_seconds(steps, threads)
        if expected > _LONGEST_SECONDS:
            continue
        if device_bytes and needed_bytes(schedules, schedules.sizes(box), box.size) > device_bytes:
            continue
        seconds = _seconds(schedules, box, threads, device_bytes)
        for step in steps:
            features = step.primitive.features(step.problem)
            model = model_seconds(step.primitive, step.problem, threads)
            same = ratios[step.primitive.family, features]
            same.append(seconds[step.operation.output] / model)
    for (family, features), found in ratios.items():
        yield Timing(family, threads, features, median(found))


def _seconds(
    schedules: Schedules, box: Box, threads: int, device_bytes: int | None
) -> dict[Stored, float]:
    """Median seconds of what makes each array of a patch, for one offset."""
    todo, layout = schedules.schedule(box), schedules.layout
    network, random = layout.network, np.random.default_rng(0)
    x = random.standard_normal((network.in_channels, *todo.input.size), np.float32)
    out = np.empty((network.out_channels, *box.size), np.float32)
    device = None if device_bytes is None else opened(device_bytes)
    with executor_of(schedules, schedules.sizes(box), box.size, threads, device) as executor:
        executor.run(todo, [x], [out])  # which compiles, and touches memory
        executor.taken()
        begin = perf_counter()
        executor.run(todo, [x], [out])
        runs, taken = [executor.taken().seconds], perf_counter() - begin
        if taken < _LONG_SECONDS:
            while perf_counter() - begin < _AWAKE_SECONDS:
                executor.run(todo, [x], [out])
            executor.taken()  # those before do not count
            runs.clear()
            for _ in range(RUNS):
                executor.run(todo, [x], [out])
                runs.append(executor.taken().seconds)
    return {array: median(run[array] for run in runs) / schedules.repeats for array in runs[0]}


def _touching(threads: int) -> Timing:
    """The timing of memory that the system gives: of some machines that are simulated themselves it
    takes several times as long as of others."""
    nbytes = min(_TOUCHED_BYTES, available_bytes() // 4)
    memory = allocate(nbytes)
    with Team(threads) as team:
        begin = perf_counter()
        team.share(lambda first, last: memory[first:last].fill(0), nbytes)
        seconds = perf_counter() - begin
    return Timing(TOUCHING.name, threads, (), seconds * threads * TOUCHING.per_second / nbytes)


def _bus(device_bytes: int) -> Iterator[Timing]:
    """The timings of copies to a device, which those back are like."""
    with opened(device_bytes) as device:
        for nbytes in _COPIED:
            if 2 * nbytes > device_bytes:
                return
            here, there = device.pinned(nbytes), device.empty(nbytes)
            here[:] = 0
            runs = []
            for _ in range(1 + RUNS):
                begin = perf_counter()
                device.lanes.up.do(partial(device.copy, there, here)).wait()
                runs.append(perf_counter() - begin)
            ratio = median(runs[1:]) * BUS.per_second / nbytes
            yield Timing(BUS.name, 1, bus_features(nbytes), ratio)
            del there  # before there is room for the next


def studies() -> Iterator[Study]:
    """Networks whose layers are those that networks have: of few and of many channels, small and
    large kernels, strides, pooling, branches; on arrays large and small: the largest stay in no
    cache."""
    for base, edge in ((32, 32), (16, 96)):
        yield Study(_unet(base), edge)
    for channels, kernel, edge in ((16, 3, 80), (80, 3, 32), (80, 7, 24)):
        yield Study(_chain(channels, kernel), edge)
    for channels, edge in ((64, 32), (256, 8)):
        yield Study(_residual(channels), edge)
    yield Study(_separable(64), 32)


def _unet(base: int) -> Network:
    """Two resolutions, one of them with batch normalisation, joined by their channels, and a branch
    around what comes then."""
    b = Builder(1)
    fine = b.relu(b.conv(b.input, base, 3, padding="same"))
    fine = b.relu(b.batch_norm(b.conv(fine, base, 3, padding="same")))
    coarse = b.relu(b.conv(b.max_pool(fine, 2), 2 * base, 3, padding="same"))
    coarse = b.relu(b.conv(coarse, 2 * base, (1, 3, 3), padding="same"))
    up = b.conv_transpose(coarse, base, 2, stride=2)
    x = b.relu(b.plus(fine, b.conv(b.concat(fine, up), base, 3, padding="same")))
    return b.network(b.activation(b.conv(x, 3, 1), "sigmoid"))


def _chain(channels: int, kernel: int) -> Network:
    """A sliding window, pooled as fragments."""
    b = Builder(1)
    x = b.max_pool(b.relu(b.conv(b.input, channels, kernel - 1)), 2)
    x = b.relu(b.conv(x, channels, kernel))
    return b.network(b.conv(x, 3, kernel))


def _residual(channels: int) -> Network:
    """Halved by a stride, with a branch around two convolutions, and brought back."""
    b = Builder(3)
    x = b.relu(b.conv(b.input, channels // 2, 5, stride=2, padding=2))
    first = b.relu(b.conv(x, channels, 1))
    x = b.relu(b.conv(first, channels, 3, padding="same"))
    x = b.relu(b.plus(first, b.conv(x, channels, 3, padding="same")))
    x = b.relu(b.conv(x, 2 * channels, 3, stride=2, padding=1))
    x = b.resize(b.conv(x, channels // 2, 1), 2, "half_pixel")
    return b.network(b.resize(b.conv(x, 8, 1), 2))


def _separable(channels: int) -> Network:
    """Depthwise convolutions, and those of one voxel between them."""
    b = Builder(4)
    x = b.relu(b.conv(b.input, channels, 3, padding="same"))
    x = b.relu(b.conv(x, channels, 3, padding="same", groups=channels))
    x = b.activation(b.conv(x, 2 * channels, 1), "elu", alpha=1.0)
    x = b.average_pool(x, (1, 2, 2))
    x = b.conv(x, channels, (3, 1, 1), padding="same", groups=4)
    return b.network(b.resize(x, (1, 2, 2)))
