"""Plans: memory is arithmetic and kept, the choice is the cheapest that fits, JSON and back."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

import graphs
from znni_dask import planner
from znni_dask.choices import choose_primitives, chosen_primitives
from znni_dask.costs import Costs
from znni_dask.errors import MemoryLimitError, OptionError
from znni_dask.geometry import Box, tiles, volume
from znni_dask.machine import GPU, parse_bytes
from znni_dask.network.build import Builder
from znni_dask.network.chains import n337
from znni_dask.patches import Layout, patches_of, spans
from znni_dask.plan import Plan
from znni_dask.planner import Request, plan, predicted_need
from znni_dask.primitives.base import Form
from znni_dask.primitives.table import named
from znni_dask.reading import Reads
from znni_dask.schedule import ALIGN, Schedules, Stored
from znni_dask.storage.cells import Cells


def request(network, size=(200, 200, 200), allowed=8 << 30, **options):
    layout = Layout(network, size, "reflect")
    return Request(
        layout=layout,
        hull=Box((0, 0, 0), layout.output_size),
        unit=(64, 64, 64),
        voxel_bytes=4,
        encoding_bytes=4,
        read_bytes=lambda box, by_cells=False: 2 * volume(box),
        write_bytes=1 << 20,
        baseline_bytes=100 << 20,
        allowed_bytes=allowed,
        threads=2,
        **options,
    )


@pytest.mark.parametrize("gib", [0.3, 0.5, 1, 2, 8])
@pytest.mark.parametrize(("family", "seed"), [("chain", 1), ("unet", 3), ("residual", 0)])
@pytest.mark.every(4)
def test_what_is_predicted_is_within_what_is_allowed(family, seed, gib):
    wanted = request(graphs.graph(family, seed), allowed=int(gib * 2**30))
    made = plan(wanted)
    assert made.predicted_bytes <= wanted.allowed_bytes
    assert all(b % u == 0 for b, u in zip(made.block, wanted.unit, strict=True))
    schedules = Schedules(wanted.layout, chosen_primitives(wanted.layout, made))
    need = predicted_need(wanted, schedules, made.block, made.patch, made.blocks_in_flight)
    assert made.predicted_bytes == need.process_bytes
    assert need.device_bytes == made.device_bytes == 0


def test_more_memory_never_makes_the_plan_slower():
    network = n337()
    rates = []
    for gib in (1, 2, 4, 8, 16):
        wanted = request(network, allowed=gib << 30)
        made = plan(wanted)
        schedules = Schedules(wanted.layout, chosen_primitives(wanted.layout, made))
        box = Box((0, 0, 0), made.patch)
        rates.append(box.voxels / Costs().estimated_seconds(schedules.schedule(box).steps, 2))
    assert all(b >= 0.9 * a for a, b in pairwise(rates))
    assert rates[-1] > 2 * rates[0]


def test_one_byte_less_than_the_smallest_plan_is_refused():
    network = graphs.graph("unet", 0)
    with pytest.raises(MemoryLimitError, match="no plan fits") as found:
        plan(request(network, allowed=1 << 20))
    text = str(found.value)
    assert "largest layer" in text
    least = re.search(r"allow at least (\S+ \S+),", text)[1]
    assert plan(request(network, allowed=parse_bytes(least.replace(" ", ""))))
    tight = request(network, allowed=8 << 30, patch=(16, 16, 16))
    needed = _smallest(tight)
    assert plan(replace(tight, allowed_bytes=needed)).predicted_bytes == needed
    with pytest.raises(MemoryLimitError):
        plan(replace(tight, allowed_bytes=needed - 1))


def _smallest(wanted):
    schedules = Schedules(wanted.layout, choose_primitives(wanted.layout))
    return predicted_need(wanted, schedules, (64, 64, 64), (16, 16, 16), 1).process_bytes


@pytest.mark.parametrize("gib", [0.4, 0.6, 1, 4])
def test_what_is_left_of_the_memory_is_for_decoded_chunks(gib):
    size = (500, 500, 500)
    wanted = replace(
        request(graphs.graph("valid_unet", 0), size, int(gib * 2**30)),
        cells=Cells.of((128, 128, 128), size, 1),
        read_bytes=lambda box, by_cells=False: 2 * volume(box) + (by_cells << 25),
    )
    made = plan(wanted)
    schedules = Schedules(wanted.layout, chosen_primitives(wanted.layout, made))
    kept = made.reading.cache_bytes
    need = predicted_need(
        wanted, schedules, made.block, made.patch, made.blocks_in_flight, by_cells=kept > 0
    )
    assert made.predicted_bytes == need.process_bytes + kept <= wanted.allowed_bytes
    if gib >= 1:
        assert made.reading.amplification == 1
        assert 0 < kept < volume(size)


def test_several_blocks_are_made_where_that_costs_little(monkeypatch):
    """Memory that is touched apart, which makes several blocks the fastest."""
    monkeypatch.setattr(Costs, "touching_seconds", lambda *_: 0.0)
    size = (500, 500, 500)
    b = Builder(1)
    network = b.network(b.conv(b.relu(b.conv(b.input, 8, 3)), 8, 1))
    wanted = replace(request(network, size, 64 << 30), cells=Cells.of((128, 128, 128), size, 1))
    made = plan(wanted)
    monkeypatch.setattr(planner, "_ABOUT_AS_FAST", 1.0)
    fastest = plan(wanted)
    assert volume(Reads(wanted.layout, fastest.block, None).blocks) < 8
    assert volume(Reads(wanted.layout, made.block, None).blocks) >= 8
    schedules = Schedules(wanted.layout, choose_primitives(wanted.layout))
    seconds = [
        Costs().estimated_seconds(schedules.schedule(box).steps, 2) / box.voxels
        for box in (Box((0, 0, 0), made.patch), Box((0, 0, 0), fastest.patch))
    ]
    assert seconds[0] <= 1.1 * seconds[1]


def test_a_patch_asked_for_is_the_patch_planned():
    made = plan(request(graphs.graph("unet", 0), patch=(10, 70, 300)))
    assert made.patch == (10, 70, 200)
    assert made.block == (64, 128, 256)


@pytest.mark.parametrize(("family", "seed"), graphs.ALL[::4])
def test_no_two_arrays_that_live_at_once_share_memory(family, seed):
    layout = Layout(graphs.graph(family, seed), (60, 60, 60), "reflect")
    primitives = choose_primitives(layout)
    schedules = Schedules(layout, primitives)
    boxes = list(tiles(layout.output_size, (16, 20, 24)))
    sizes = schedules.envelope(spans(layout, (16, 20, 24), (16, 20, 24)))
    arena = schedules.arena(sizes)
    todo = schedules.schedule(boxes[0])
    source = Stored(layout.network.input.name, Form.PLAIN)
    bytes_of = {source: (arena.places[source], 4 * int(np.prod(todo.input_shape)))}
    last = {source: 0}
    for step, todo_step in enumerate(todo.steps, start=1):
        made = todo_step.operation.output
        bytes_of[made] = (arena.places[made], made.form.nbytes(todo_step.problem.output))
        for array in todo_step.operation.inputs:
            last[array] = step
    last[Stored(layout.network.output, Form.PLAIN)] = len(todo.steps) + 1
    written = {source: 0} | {s.operation.output: i for i, s in enumerate(todo.steps, start=1)}
    for a, (start_a, bytes_a) in bytes_of.items():
        assert start_a % ALIGN == 0
        assert start_a + bytes_a <= arena.bytes
        for b, (start_b, bytes_b) in bytes_of.items():
            together = written[a] < written[b] <= last[a]
            reused = start_a == start_b and last[a] == written[b]  # in place
            if together and not reused:
                assert start_a + bytes_a <= start_b or start_b + bytes_b <= start_a


def test_the_arena_reuses_memory():
    b = Builder(1)
    x = b.input
    for _ in range(10):
        x = b.conv(x, 8, 3, padding="same")
    layout = Layout(b.network(x), (32, 32, 32), "reflect")
    schedules = Schedules(layout, choose_primitives(layout))
    box = Box((0, 0, 0), (32, 32, 32))
    one = 4 * 8 * 32**3
    assert schedules.arena(schedules.sizes(box)).bytes <= 2 * one + 4 * 32**3 + 1024


def test_patches_of_a_block_cover_it_once():
    block = Box((64, 0, 128), (128, 50, 200))
    count = np.zeros((200, 200, 200), int)
    for box in patches_of(block, (20, 64, 30)):
        count[box.slices] += 1
    assert (count[block.slices] == 1).all()
    assert count.sum() == block.voxels


@pytest.mark.parametrize(
    ("family", "seed", "halo"),
    [
        *((family, seed, None) for family, seed in [*graphs.ALL[::3], ("even", 0), ("finer", 0)]),
        *((family, seed, (2, 1, 3)) for family, seed in [("flat", 0), ("unet", 2)]),
    ],
)
def test_a_few_patches_stand_for_all_of_a_long_volume(family, seed, halo):
    network = graphs.graph(family, seed)
    for boundary, block, patch in (
        ("reflect", (14, 10, 16), (14, 5, 6)),
        ("valid", (7, 16, 9), (7, 16, 4)),
    ):
        layout = Layout(network, (901, 700, 802), boundary, halo)
        schedules = Schedules(layout, choose_primitives(layout))
        every = [
            {
                (a, min(a + p, first + b, n))
                for first in range(0, n, b)
                for a in range(first, min(first + b, n), p)
            }
            for n, b, p in zip(layout.output_size, block, patch, strict=True)
        ]
        few = spans(layout, block, patch)
        assert schedules.envelope(few) == schedules.envelope(every)
        longer = replace(layout, size=(90100, 70000, 80200))
        assert sum(map(len, spans(longer, block, patch))) < 600


def test_a_plan_shows_itself_in_jupyter():
    made = plan(request(graphs.graph("chain", 0)))
    choice = made.stages[0].choices[0]
    edited = replace(
        made, stages=(replace(made.stages[0], choices=(replace(choice, layer="<b>"),)),)
    )
    shown = edited._repr_html_()
    assert ElementTree.fromstring(shown).tag == "table"
    assert all(word in shown for word in ("&lt;b&gt;", choice.primitive, "voxels/s", "GiB"))


def test_a_plan_survives_json_and_edited_plans_are_checked():
    wanted = request(graphs.graph("chain", 0))
    made = plan(wanted)
    assert Plan.from_json(made.to_json()) == made
    chosen = chosen_primitives(wanted.layout, made)
    assert {name: primitive.name for name, primitive in chosen.items()} == made.primitives
    other = Layout(graphs.graph("unet", 0), (64, 64, 64), "reflect")
    with pytest.raises(OptionError, match="another network"):
        chosen_primitives(other, made)
    assert "direct" in made.primitives.values()
    edited = made.to_json().replace('"direct"', '"magic"')
    with pytest.raises(OptionError, match="'magic' cannot take"):
        chosen_primitives(wanted.layout, Plan.from_json(edited))
    before = made.to_json().replace('"samples": 1', '"samples": null')
    assert Plan.from_json(before) == made
    none_at_once = made.to_json().replace('"samples": 1', '"samples": 0')
    for text in (
        *("", "[]", '{"patch": 3}', made.to_json().replace("blocks_in_flight", "b")),
        none_at_once,
    ):
        with pytest.raises(OptionError, match="not a plan"):
            Plan.from_json(text)


def test_unknown_primitives_are_unknown():
    with pytest.raises(KeyError, match="no primitive 'magic'"):
        named("magic", n337()["conv_1"].layer)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_there_is_work_for_all_workers(workers):
    """Of a volume that one worker makes in a few large blocks; of 2·2·3 chunks 8 wait a third of
    the time, however they are put together."""
    wanted = replace(request(graphs.graph("unet", 0), (120, 120, 130), 4 << 30), workers=workers)
    made = plan(wanted)
    assert wanted.waiting(made.block) == pytest.approx(4 / 3 if workers == 8 else 1)


def test_blocks_are_in_flight_while_a_device_computes():
    room = {"device": GPU, "device_bytes": 4 << 30}
    wanted = request(graphs.graph("unet", 0), (500, 500, 500), 60 << 30, **room)
    made = plan(wanted)
    assert made.device == "gpu"
    assert made.blocks_in_flight > 1
    assert 0 < made.device_bytes <= made.allowed_device_bytes == 4 << 30


def test_workers_that_wait_are_counted():
    wanted = request(graphs.graph("unet", 0), (128, 128, 128), 4 << 30)
    for workers, block, waiting in ((2, 128, 2.0), (3, 64, 9 / 8), (8, 64, 1.0), (12, 64, 1.5)):
        several = replace(wanted, workers=workers)
        assert several.waiting((block,) * 3) == pytest.approx(waiting)
