"""Of every layer one of its options, so that all together are fastest within some memory.

A knapsack of multiple choice (Kellerer, Pferschy and Pisinger 2004, chapter 11) on a path: what an
option takes depends on the forms in which earlier ones left their arrays, and of all workspaces
only the largest counts. For a largest workspace, labels (bytes, seconds) go from layer to layer;
those that are dominated go, and those that cannot become better than the best choice known, by the
bounds of Lagrange multipliers (Everett 1963). So the answer is exact, and seldom many labels stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from znni_dask.primitives.base import Form

_NOTHING = 1e-9  # of seconds: sums of the same in another order differ by less

_Floats: TypeAlias = NDArray[np.float64]
_Integers: TypeAlias = NDArray[np.int64]
_Forms: TypeAlias = tuple[tuple[Form, ...], ...]  # of every array alive, that it was made in first


@dataclass(frozen=True)
class Option:
    """What a layer takes in one way: seconds, memory that is kept, memory while it is computed;
    the form that it takes its inputs in, if it matters, and that it makes its output in, where that
    is not the same."""

    seconds: float
    kept_bytes: int
    workspace_bytes: int
    takes: Form | None
    makes: Form | None


@dataclass(frozen=True)
class Course:
    """The options of a layer, and the arrays that it reads; ``name`` is that of what it makes."""

    name: str
    inputs: tuple[str, ...]
    options: tuple[Option, ...]


class _Stage(NamedTuple):
    """A layer by some of its ``options``: of each what it keeps and computes in; of each, behind
    every state before the layer, (state, option), seconds and the state behind it."""

    options: _Integers
    nbytes: _Floats
    workspaces: _Floats
    seconds: _Floats
    states: _Integers

    def costs(self, a_second: float, a_byte: float, to_go: _Floats) -> _Floats:
        """Of every option behind every state, with all that follows."""
        return a_second * self.seconds + a_byte * self.nbytes + to_go[self.states]

    def within(self, workspace: float) -> _Stage:
        """With those options only whose workspace is no larger."""
        some = self.workspaces <= workspace
        return _Stage(
            self.options[some],
            self.nbytes[some],
            self.workspaces[some],
            self.seconds[:, some],
            self.states[:, some],
        )


class _Labels(NamedTuple):
    """What ways to a state took so far: no more seconds than any of fewer bytes. ``origins`` are
    rows: state and label before the layer, and the option."""

    nbytes: _Floats
    seconds: _Floats
    origins: _Integers

    def those(self, which: NDArray[Any]) -> _Labels:
        """Some of them, in that order."""
        return _Labels(self.nbytes[which], self.seconds[which], self.origins[:, which])


_NONE = _Labels(np.empty(0), np.empty(0), np.empty((3, 0), np.int64))
_FIRST = _Labels(np.zeros(1), np.zeros(1), np.zeros((3, 1), np.int64))  # nothing taken yet


@dataclass(frozen=True)
class Knapsack:
    """Layers in the order in which they are computed, ``source`` given and ``output`` asked for in
    the form plain. An array is brought into another form at most once, in ``change_seconds``."""

    courses: tuple[Course, ...]
    source: str
    output: str
    change_seconds: Mapping[tuple[str, Form], float]

    def fastest(
        self, room_bytes: float = inf, limit: float = inf
    ) -> tuple[float, tuple[int, ...]] | None:
        """Seconds, and of every layer the number of its option, so that what they keep and the
        largest workspace take no more than ``room_bytes`` together, and all less than ``limit``
        seconds; None where none do."""
        best: tuple[float, tuple[int, ...]] | None = None
        for bound, ways, room in self._promising(room_bytes, limit):
            if bound >= limit:
                break
            if ways.bound(price := ways.price(room), room) < limit:
                found = ways.fastest(room, limit, price)
                if found is not None:
                    best, limit = found, found[0] * (1 - _NOTHING)
        return best

    def _promising(self, room_bytes: float, limit: float) -> list[tuple[float, _Ways, float]]:
        """For every size of the largest workspace a bound of seconds, less than ``limit``, the ways
        there are, and the room that is left for what they keep; the lowest bound first. It is that
        of the price of a byte that suits the largest workspace."""
        price: float | None = None
        found: list[tuple[float, _Ways, float]] = []
        for workspace in self._ways.workspaces:
            ways, room = self._ways.within(workspace), room_bytes - workspace
            if ways.bound(0.0, inf) >= limit:
                break  # smaller ones leave fewer options
            if room >= 0 and ways.least_bytes <= room:
                price = ways.price(room) if price is None else price
                found.append((ways.bound(price, room), ways, room))
                if price == 0.0:
                    break  # smaller ones are no faster
        return sorted(found, key=lambda one: one[0])

    @cached_property
    def _ways(self) -> _Ways:
        return _Ways.of(self)

    @cached_property
    def alive(self) -> list[list[str]]:
        """The arrays that are read behind every layer, and before the first."""
        last = {name: i for i, course in enumerate(self.courses) for name in course.inputs}
        last[self.output] = len(self.courses)
        made = [self.source, *(course.name for course in self.courses)]
        return [
            [name for name in made[: i + 1] if last.get(name, -1) >= i]
            for i in range(len(self.courses) + 1)
        ]

    def step(
        self, layer: int, forms: Mapping[str, tuple[Form, ...]], option: Option
    ) -> tuple[float, _Forms]:
        """Seconds of an option behind arrays of these ``forms``, and the forms behind it."""
        course, forms, seconds = self.courses[layer], dict(forms), option.seconds
        takes = option.takes or forms[course.inputs[0]][0]
        for name in course.inputs:
            seconds += self._bring(forms, name, takes)
        forms[course.name] = (option.makes or takes,)
        if layer == len(self.courses) - 1:
            seconds += self._bring(forms, self.output, Form.PLAIN)
        return seconds, tuple(forms[name] for name in self.alive[layer + 1])

    def _bring(self, forms: dict[str, tuple[Form, ...]], name: str, form: Form) -> float:
        if form in forms[name]:
            return 0.0
        forms[name] = (*forms[name], form)
        return self.change_seconds[name, form]


@dataclass(frozen=True)
class _Ways:
    """All ways through the layers by some of their options, that end in ``ends`` states."""

    stages: tuple[_Stage, ...]
    ends: int

    @classmethod
    def of(cls, knapsack: Knapsack) -> _Ways:
        """By all options."""
        states: dict[_Forms, int] = {((Form.PLAIN,),): 0}
        stages = []
        for layer, course in enumerate(knapsack.courses):
            some = _undominated(course.options)
            following: dict[_Forms, int] = {}
            seconds, behind = np.empty((2, len(states), len(some)))
            for state, row in states.items():
                forms = dict(zip(knapsack.alive[layer], state, strict=True))
                for column, i in enumerate(some):
                    seconds[row, column], made = knapsack.step(layer, forms, course.options[i])
                    behind[row, column] = following.setdefault(made, len(following))
            kept = [course.options[i].kept_bytes for i in some]
            workspaces = [course.options[i].workspace_bytes for i in some]
            nbytes, spaces = np.array([kept, workspaces], float)
            stages.append(_Stage(np.array(some), nbytes, spaces, seconds, behind.astype(np.int64)))
            states = following
        return cls(tuple(stages), len(states))

    @property
    def workspaces(self) -> list[float]:
        """Sizes that the largest workspace may have, from the largest."""
        every = np.concatenate([stage.workspaces for stage in self.stages])
        return sorted(set(every.tolist()), reverse=True)

    def within(self, workspace: float) -> _Ways:
        """Those by options whose workspace is no larger."""
        return replace(self, stages=tuple(stage.within(workspace) for stage in self.stages))

    @cached_property
    def least_bytes(self) -> float:
        """That any way keeps."""
        return float(self._to_go(0.0, 1.0)[0][0])

    def bound(self, price: float, room: float) -> float:
        """Fewer seconds no way takes that keeps no more than ``room`` bytes."""
        return float(self._to_go(1.0, price)[0][0]) - (price * room if price else 0.0)

    def fastest(
        self, room: float, limit: float, price: float
    ) -> tuple[float, tuple[int, ...]] | None:
        """The fastest way that keeps no more than ``room`` bytes and takes less than ``limit``
        seconds, as seconds and options, None where there is none; ``price`` is one of a byte at
        which the bound is high."""
        seconds, nbytes = self._way(1.0, price)
        limit = min(limit, seconds if nbytes <= room else inf)
        prices = list(dict.fromkeys((0.0, price)))
        bounds = [self._to_go(1.0, p) for p in prices]
        fewest = self._to_go(0.0, 1.0)
        trail = [[_FIRST]]
        for layer, stage in enumerate(self.stages):
            arriving: list[list[_Labels]] = [[_NONE] for _ in fewest[layer + 1]]
            for state, labels in enumerate(trail[-1]):
                for target, some in _arrivals(labels, stage, state):
                    keep = some.nbytes + fewest[layer + 1][target] <= room
                    for p, bound in zip(prices, bounds, strict=True):
                        least = some.seconds + p * (some.nbytes - room) if p else some.seconds
                        keep &= least + bound[layer + 1][target] <= limit * (1 + _NOTHING)
                    arriving[target].append(some.those(keep))
            trail.append([_pareto(some) for some in arriving])
        arrived = [
            (float(there.seconds[-1]), state, there.seconds.size - 1)
            for state, there in enumerate(trail[-1])
            if there.seconds.size
        ]
        if not arrived:
            return None
        seconds, state, label = min(arrived)
        chosen = []
        for stops in reversed(trail[1:]):
            state, label, option = stops[state].origins[:, label].tolist()
            chosen.append(option)
        return seconds, tuple(reversed(chosen))

    def price(self, room: float) -> float:
        """The price of a byte, in seconds, at which the bound is highest: there the cheapest ways,
        of which there are several, keep more than ``room`` bytes and less. There must be a way
        that keeps no more."""
        seconds, nbytes = self._way(1.0, 0.0)
        least_seconds, least_bytes = self._way(0.0, 1.0)
        price = 0.0
        while nbytes > room:
            price = (least_seconds - seconds) / (nbytes - least_bytes)
            some_seconds, some_bytes = self._way(1.0, price)
            saved = seconds + price * nbytes - (some_seconds + price * some_bytes)
            if saved <= _NOTHING * seconds:
                break
            if some_bytes > room:
                seconds, nbytes = some_seconds, some_bytes
            else:
                least_seconds, least_bytes = some_seconds, some_bytes
        return price

    def _way(self, a_second: float, a_byte: float) -> tuple[float, float]:
        """Seconds and bytes of the way that is cheapest."""
        to_go, state, seconds, nbytes = self._to_go(a_second, a_byte), 0, 0.0, 0.0
        for stage, behind in zip(self.stages, to_go[1:], strict=True):
            option = int(np.argmin(stage.costs(a_second, a_byte, behind)[state]))
            seconds += float(stage.seconds[state, option])
            nbytes += float(stage.nbytes[option])
            state = int(stage.states[state, option])
        return seconds, nbytes

    def _to_go(self, a_second: float, a_byte: float) -> list[_Floats]:
        """For every state the least that ways from there cost."""
        found = [np.zeros(self.ends)]
        for stage in reversed(self.stages):
            costs = stage.costs(a_second, a_byte, found[-1])
            found.append(costs.min(axis=1, initial=inf))
        return found[::-1]


def _undominated(options: Sequence[Option]) -> list[int]:
    """Those that none beats that takes and makes the same forms, of several alike the first."""
    order = sorted(
        range(len(options)),
        key=lambda i: (options[i].seconds, options[i].kept_bytes, options[i].workspace_bytes),
    )
    best: dict[tuple[Form | None, Form | None], list[tuple[int, int]]] = {}
    found = []
    for i in order:
        kept, workspace = options[i].kept_bytes, options[i].workspace_bytes
        faster = best.setdefault((options[i].takes, options[i].makes), [])
        if not any(k <= kept and w <= workspace for k, w in faster):
            faster.append((kept, workspace))
            found.append(i)
    return found


def _arrivals(labels: _Labels, stage: _Stage, state: int) -> Iterator[tuple[int, _Labels]]:
    """For every state behind a layer the labels that come there from one before it."""
    count = labels.nbytes.size
    for target in np.unique(stage.states[state]) if count else ():
        some = np.flatnonzero(stage.states[state] == target)
        origins = np.broadcast_arrays(state, np.arange(count), stage.options[some, np.newaxis])
        yield (
            int(target),
            _Labels(
                np.add.outer(stage.nbytes[some], labels.nbytes).ravel(),
                np.add.outer(stage.seconds[state, some], labels.seconds).ravel(),
                np.reshape(origins, (3, -1)),
            ),
        )


def _pareto(some: Sequence[_Labels]) -> _Labels:
    """Those that none beats in both."""
    every = _Labels(
        np.concatenate([labels.nbytes for labels in some]),
        np.concatenate([labels.seconds for labels in some]),
        np.concatenate([labels.origins for labels in some], axis=1),
    )
    order = np.lexsort((every.seconds, every.nbytes))
    seconds = every.seconds[order]
    before = np.concatenate([[inf], np.minimum.accumulate(seconds)[:-1]])[: seconds.size]
    return every.those(order[seconds < before])
