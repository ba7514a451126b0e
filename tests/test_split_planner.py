"""What the CPU and a GPU share is planned as trying everything would."""

from __future__ import annotations

from itertools import product

import pytest
from test_planner import request
from test_split import MIB, pooled

import graphs
from znni_dask import Builder, choices, planner, split_planner
from znni_dask.apart import Apart
from znni_dask.choices import choose_primitives
from znni_dask.errors import MemoryLimitError
from znni_dask.machine import CPU, CPU_GPU, GPU, GPU_RAM
from znni_dask.network.layers import Conv
from znni_dask.planner import Fits, best_of, predicted_need
from znni_dask.primitives.table import candidates
from znni_dask.schedule import Schedules
from znni_dask.split import Split, splits


def few():
    """Fragments between convolutions, so that there is something to split and to group."""
    b = Builder(channels=1, seed=0)
    x = b.max_pool(b.relu(b.conv(b.input, 8, kernel=3)), 2)
    x = b.relu(b.conv(x, 12, kernel=3))
    return b.network(b.conv(x, 2, kernel=3))


def asked(network, device, device_bytes, allowed=1 << 30, patch=(24, 24, 24)):
    return request(network, allowed=allowed, patch=patch, device=device, device_bytes=device_bytes)


def every_way(wanted):
    """All splits, groups of fragments and primitives of the table, and both apart."""
    layout = wanted.layout
    plain = {name: choose_primitives(layout, device=name) for name in (CPU, GPU)}

    def options(layer, device):
        first = plain[device][layer]
        kind = layout.network[layer].layer
        alike = (p for p in candidates(kind, device) if p.fragments == first.fragments)
        apart = first.fragments_of(kind)
        return list(dict.fromkeys([first, *(p for p in alike if p.fragments_of(kind) == apart)]))

    layers = list(plain[CPU])

    def chosen(devices):
        each = [options(layer, device) for layer, device in zip(layers, devices, strict=True)]
        for some in product(*each):
            yield dict(zip(layers, some, strict=True))

    for split in splits(layout.network):
        before = layers.index(split) + 1
        for primitives in chosen([CPU] * before + [GPU] * (len(layers) - before)):
            one = Split.at(layout, split, primitives)
            yield from (one.together(n) for n in (1, 2, 4, 8) if one.fragments % n == 0)
    hosts = list(chosen([CPU] * len(layers)))
    devices = list(chosen([GPU] * len(layers)))
    for host, device in product(hosts, devices):
        yield Apart(Schedules(layout, host), Schedules(layout, device))


@pytest.fixture
def table_alone(monkeypatch):
    """No tiles of chosen sizes, so that everything can be tried; two for a convolution."""
    monkeypatch.setattr(choices, "tiled", lambda problem: iter(()))
    monkeypatch.setattr(choices, "gpu_tiles", lambda problem: iter(()))
    monkeypatch.setattr(choices, "candidates", shortened)
    monkeypatch.setitem(globals(), "candidates", shortened)


def shortened(layer, device=CPU):
    found = [p for p in candidates_of_all(layer, device) if not p.library_bytes]
    return found[:2] if isinstance(layer, Conv) else found


candidates_of_all = candidates


@pytest.mark.parametrize("room", [64, 12, 6, 3])
def test_the_plan_is_the_one_that_trying_everything_finds(room, table_alone):
    wanted = asked(few(), CPU_GPU, room * MIB)
    (pair,) = planner.cubes(wanted)
    found = [best for work in every_way(wanted) if (best := best_of(Fits(wanted, work), [pair]))]
    rates = [fit.candidate.seconds_per_voxel for _, fit, _ in found]
    if not rates:
        with pytest.raises(MemoryLimitError, match=r"no plan by cpu\+gpu fits"):
            split_planner.search(wanted)
        return
    made = split_planner.search(wanted)
    assert 1 / made.voxels_per_second == pytest.approx(min(rates), rel=0.01)
    assert made.device_bytes <= room * MIB


@pytest.mark.parametrize("device", [CPU_GPU, GPU_RAM])
@pytest.mark.parametrize("mib", [24, 60, 200])
@pytest.mark.parametrize(("family", "seed"), [("chain", 1), ("unet", 3), ("residual", 0)])
def test_what_is_planned_fits_both_memories(device, mib, family, seed):
    wanted = asked(graphs.graph(family, seed), device, mib * MIB, 400 * MIB, patch=None)
    try:
        made = split_planner.search(wanted)
    except MemoryLimitError:
        with pytest.raises(MemoryLimitError):  # nor does it with one patch of a voxel
            split_planner.search(asked(graphs.graph(family, seed), device, mib * MIB, 400 * MIB))
        return
    assert made.device == device
    work = choices.schedules_of(wanted.layout, made)
    need = predicted_need(wanted, work, made.block, made.patch, made.blocks_in_flight)
    assert made.predicted_bytes >= need.process_bytes
    assert made.predicted_bytes <= wanted.allowed_bytes
    assert need.device_bytes == made.device_bytes <= wanted.device_bytes


def test_more_memory_of_a_gpu_never_makes_the_plan_slower():
    for device in (CPU_GPU, GPU_RAM):
        rates = [
            split_planner.search(asked(pooled(), device, mib * MIB)).voxels_per_second
            for mib in (16, 32, 64, 256)
        ]
        assert rates == sorted(rates)


def test_a_patch_that_is_gone_through_several_times_is_not_shared(monkeypatch):
    wanted = asked(few(), CPU_GPU, 64 * MIB)
    assert split_planner.search(wanted).device == CPU_GPU
    honest = choose_primitives
    monkeypatch.setattr(
        split_planner, "choose_primitives", lambda layout, device: honest(layout, False, device)
    )
    with pytest.raises(MemoryLimitError, match=r"no plan by cpu\+gpu"):
        split_planner.search(wanted)
