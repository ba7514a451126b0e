"""Which primitives are chosen: the fastest by their estimates, and the fastest that have room."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

import graphs
from znni_dask import choices
from znni_dask.choices import Menu, choose_primitives
from znni_dask.costs import STEP_SECONDS, Costs
from znni_dask.geometry import Box
from znni_dask.network.build import Builder
from znni_dask.network.layers import Conv
from znni_dask.patches import Layout
from znni_dask.primitives.base import Problem
from znni_dask.primitives.conv_direct_blocked import ConvDirectBlocked
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.work import MEMORY
from znni_dask.schedule import Schedules

THREADS, PATCHES = 2, 100


def menu(network, edge=64):
    layout = Layout(network, (300, 300, 300), "reflect")
    plain = Schedules(layout, choose_primitives(layout))
    return Menu.of_patches(plain, patch(edge), PATCHES, THREADS)


def patch(edge):
    return Box((100, 100, 100), (100 + edge,) * 3)


def costs(asked, primitives, edge=64):
    """Seconds of a whole run, bytes that it prepares and computes in, from the schedule itself."""
    schedules = Schedules(asked.schedules.layout, primitives)
    steps = schedules.steps(schedules.sizes(patch(edge)))
    seconds, prepared, workspaces = 0.0, 0, []
    for step in steps:
        seconds += PATCHES * Costs().step_seconds(step.primitive, step.problem, THREADS)
        if not isinstance(step.primitive, FormChange):
            layer = step.operation.node.layer
            seconds += Costs().setup_seconds(step.primitive, layer)
            prepared += step.primitive.prepared_bytes(layer)
        workspaces.append(step.primitive.workspace_bytes(step.problem, THREADS))
    libraries = {type(p): p.library_bytes for p in primitives.values()}
    return seconds, prepared + sum(libraries.values()) + max(workspaces)


def wide():
    """Convolutions between many channels, of which transforms are fastest."""
    b = Builder(2)
    x = b.relu(b.conv(b.input, 64, 5))
    x = b.relu(b.conv(x, 48, 7))
    return b.network(b.conv(x, 32, 3))


@pytest.mark.parametrize("tried", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_the_fastest_primitives_that_have_room_are_chosen(tried, monkeypatch):
    """Against every combination of them."""
    monkeypatch.setattr(choices, "_TRIED", tried)
    choices._lengths.cache_clear()
    asked = menu(wide())
    names = [dish.node.name for dish in asked._dishes]
    each = [dish.primitives for dish in asked._dishes]
    every = [costs(asked, dict(zip(names, some, strict=True))) for some in product(*each)]
    choices._lengths.cache_clear()
    assert len(every) > 8
    seconds, room = costs(asked, asked.fastest())
    assert seconds == pytest.approx(min(s for s, _ in every))
    assert asked.fastest_within(room) == asked.fastest()
    least = min(need for _, need in every)
    for allowed in np.geomspace(least, room, 20):
        chosen = asked.fastest_within(int(allowed) + 1)
        seconds, need = costs(asked, chosen)
        assert need <= allowed + 1
        assert seconds == pytest.approx(min(s for s, n in every if n <= allowed + 1))


def test_there_is_nothing_where_there_is_no_room():
    assert menu(wide()).fastest_within(1) is None
    assert menu(wide()).fastest_within(-1) is None


@pytest.mark.parametrize("family", ["chain", "unet", "residual"])
def test_what_is_chosen_for_less_room_takes_no_more(family):
    edge = 48
    asked = menu(graphs.graph(family, 3), edge)
    _, need = costs(asked, asked.fastest(), edge)
    for share in (1, 0.7, 0.4, 0.2):
        chosen = asked.fastest_within(share * need)
        assert chosen is None or costs(asked, chosen, edge)[1] <= share * need
    assert asked.fastest_within(need) == asked.fastest()


def test_transforms_are_chosen_within_a_third_of_the_memory():
    asked = menu(wide())
    _, room = costs(asked, asked.fastest())
    chosen = asked.fastest_within(0.3 * room)
    assert any(isinstance(primitive, ConvTiledFFT) for primitive in chosen.values())


def test_spectra_are_remade_where_there_is_no_room_to_keep_them():
    asked = menu(wide())
    fastest = asked.fastest()
    assert not any(getattr(p, "remade", False) for p in fastest.values())
    _, room = costs(asked, fastest)
    found = [asked.fastest_within(share * room) for share in np.linspace(0.1, 0.9, 9)]
    assert any(getattr(p, "remade", False) for p in (c for f in found if f for c in f.values()))


@pytest.mark.parametrize("batch", [1, 512])
@pytest.mark.parametrize(
    ("stride", "dilation", "n", "padding"), [(1, 1, 1, 1), (2, 1, 7, 1), (1, 2, 2, 2), (3, 2, 9, 0)]
)
def test_products_that_only_padding_is_behind_are_not_counted(stride, dilation, n, padding, batch):
    conv = Conv(32, 32, (3, 3, 3), (stride,) * 3, (dilation,) * 3, ((padding,) * 3,) * 2)
    made = (n + 2 * padding - 2 * dilation - 1) // stride + 1
    size, out, first = (n,) * 3, (made,) * 3, (-padding,) * 3
    problem = Problem(conv, ((batch, 32, *size),), (batch, 32, *out), (first,), (0, 0, 0), size)
    places = [o * stride + tap * dilation - padding for o in range(made) for tap in range(3)]
    share = (sum(0 <= place < n for place in places) / len(places)) ** 3
    found = Costs().step_seconds(ConvDirectBlocked(), problem, 1) - STEP_SECONDS
    flops = share * ConvDirectBlocked().flops(problem)
    weights = 4 * (32 * 32 * 27 + 32)
    arrays = 4 * (batch * 32 * (n**3 + made**3))
    computing = flops / ConvDirectBlocked.rate.per_second
    expected = max(computing, (weights + arrays) / MEMORY.per_second)
    assert found == pytest.approx(expected)
