"""One option a layer, fastest within memory: beside trying all."""

from __future__ import annotations

import random
from itertools import product
from math import inf

import pytest

from znni_dask.knapsack import Course, Knapsack, Option
from znni_dask.primitives.base import Form

PLAIN, BLOCKED = Form.PLAIN, Form.BLOCKED
LIBRARIES = {int: 9, str: 20}  # any types, and bytes


def some(draw, layers, options, reach, free=0):
    """Layers in a row, some of which read one of the last arrays, too; the first ``free`` take no
    time."""
    courses, made = [], ["in"]
    for i in range(layers):
        inputs = (made[-1], draw.choice(made[-reach:])) if draw.random() < 0.4 else (made[-1],)
        found = [
            Option(
                seconds=(i >= free) * draw.choice((draw.random(), draw.randint(1, 4))),
                kept_bytes=draw.randint(0, 30),
                workspace_bytes=draw.choice((0, 5, 10, 40)),
                takes=draw.choice((None, PLAIN, BLOCKED)),
                makes=draw.choice((None, PLAIN, BLOCKED)),
                library=draw.choice((None, None, *LIBRARIES)),
            )
            for _ in range(draw.randint(1, options))
        ]
        courses.append(Course(f"l{i}", tuple(dict.fromkeys(inputs)), tuple(found)))
        made.append(f"l{i}")
    change = {(n, form): (i > free) * draw.random() for i, n in enumerate(made) for form in Form}
    return Knapsack(tuple(courses), "in", made[-1], change, LIBRARIES)


def taken(knapsack, chosen):
    """Seconds and bytes of a choice, added up as an executor would meet them."""
    forms, seconds, kept, workspace, libraries = {"in": [PLAIN]}, 0.0, 0, 0, set()
    for course, number in zip(knapsack.courses, chosen, strict=True):
        option = course.options[number]
        takes = option.takes or forms[course.inputs[0]][0]
        for name in course.inputs:
            if takes not in forms[name]:
                forms[name].append(takes)
                seconds += knapsack.change_seconds[name, takes]
        forms[course.name] = [option.makes or takes]
        seconds += option.seconds
        kept += option.kept_bytes
        workspace = max(workspace, option.workspace_bytes)
        libraries |= {option.library} - {None}
    if PLAIN not in forms[knapsack.output]:
        seconds += knapsack.change_seconds[knapsack.output, PLAIN]
    return seconds, kept + workspace + sum(LIBRARIES[one] for one in libraries)


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_best_of_all(seed):
    draw = random.Random(seed)
    knapsack = some(draw, layers=draw.randint(1, 6), options=4, reach=5, free=seed % 3)
    every = list(product(*(range(len(c.options)) for c in knapsack.courses)))
    costs = [taken(knapsack, chosen) for chosen in every]
    least = sorted({nbytes for _, nbytes in costs})[:8]
    for room in (inf, draw.randint(0, 60), draw.randint(20, 120), *least):
        within = [seconds for seconds, nbytes in costs if nbytes <= room]
        found = knapsack.fastest(room)
        if found is None:
            assert not within
            continue
        told, chosen = found
        seconds, nbytes = taken(knapsack, chosen)
        assert nbytes <= room
        assert told == pytest.approx(seconds, rel=1e-9)
        assert seconds == pytest.approx(min(within), rel=1e-9)


def test_a_hundred_layers_of_many_options():
    draw = random.Random(0)
    knapsack = some(draw, layers=100, options=60, reach=3)
    least = sum(min(o.kept_bytes for o in c.options) for c in knapsack.courses)
    least += sum(LIBRARIES.values())
    seconds = [knapsack.fastest(least + more)[0] for more in (60, 200, 600, inf)]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) > 2
