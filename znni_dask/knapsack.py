"""Of every layer one of its options, so that all together are fastest within some memory.

A knapsack of multiple choice (Kellerer, Pferschy and Pisinger 2004, chapter 11) on a path: what an
option takes depends on the forms in which earlier ones left their arrays; of all workspaces only
the largest counts, and a library counts once. For libraries and a largest workspace, labels (bytes,
seconds) go from layer to layer; those that are dominated go, and those that cannot become better
than the best choice known, by the bounds of Lagrange multipliers (Everett 1963), which are computed
for all workspaces at once. So the answer is exact, and seldom many labels stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import inf
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from znni_dask.primitives.base import Form

_NOTHING = 1e-9  # of seconds: sums of the same in another order differ by less

_Floats: TypeAlias = NDArray[np.float64]
_Integers: TypeAlias = NDArray[np.int64]
_Forms: TypeAlias = tuple[tuple[Form, ...], ...]  # of every array alive, that it was made in first
_Found: TypeAlias = tuple[float, tuple[int, ...]]  # seconds, and of every layer an option's number


@dataclass(frozen=True)
class Option:
    """What a layer takes in one way: seconds, memory that is kept, memory while it is computed;
    the form that it takes its inputs in, if it matters, and that it makes its output in, where that
    is not the same; the ``library`` that it computes with, if it takes memory of its own."""

    seconds: float
    kept_bytes: int
    workspace_bytes: int
    takes: Form | None
    makes: Form | None
    library: type | None = None


@dataclass(frozen=True)
class Course:
    """The options of a layer, and the arrays that it reads; ``name`` is that of what it makes."""

    name: str
    inputs: tuple[str, ...]
    options: tuple[Option, ...]


class _Stage(NamedTuple):
    """A layer by some of its ``options``, from the smallest workspace to the largest: of each what
    it keeps and computes in, and the number of its library, from 1, or 0; of each, behind every
    state before the layer, (state, option), seconds and the state behind it."""

    options: _Integers
    nbytes: _Floats
    workspaces: _Floats
    libraries: _Integers
    seconds: _Floats
    states: _Integers

    def those(self, which: NDArray[Any]) -> _Stage:
        """By some of the options."""
        return _Stage(
            self.options[which],
            self.nbytes[which],
            self.workspaces[which],
            self.libraries[which],
            self.seconds[:, which],
            self.states[:, which],
        )


class _Labels(NamedTuple):
    """What ways took so far, and to which of the states they lead; ``origins`` are the label before
    the layer and the option."""

    states: _Integers
    nbytes: _Floats
    seconds: _Floats
    origins: _Integers

    def those(self, which: NDArray[Any]) -> _Labels:
        """Some of them, in that order."""
        return _Labels(
            self.states[which], self.nbytes[which], self.seconds[which], self.origins[:, which]
        )

    def behind(self, stage: _Stage, workspace: float) -> _Labels:
        """All that they lead to, by options whose workspace is no larger."""
        count = int(stage.workspaces.searchsorted(workspace, "right"))
        labels = np.arange(self.states.size)
        origins = np.broadcast_arrays(labels[:, np.newaxis], stage.options[:count])
        return _Labels(
            stage.states[self.states, :count].ravel(),
            np.add.outer(self.nbytes, stage.nbytes[:count]).ravel(),
            (self.seconds[:, np.newaxis] + stage.seconds[self.states, :count]).ravel(),
            np.reshape(origins, (2, -1)),
        )

    def best(self) -> _Labels:
        """Those that none beats in both that leads to the same state."""
        if not self.states.size:
            return self
        order = np.lexsort((self.seconds, self.nbytes, self.states))
        # by so much less from state to state that the least so far is always one of the same
        seconds = self.seconds[order] - 2 * (self.seconds.max() or 1.0) * self.states[order]
        least = np.minimum.accumulate(seconds)
        return self.those(order[np.concatenate([[True], seconds[1:] < least[:-1]])])


_FIRST = _Labels(np.zeros(1, int), np.zeros(1), np.zeros(1), np.zeros((2, 1), int))  # nothing yet


@dataclass(frozen=True)
class Knapsack:
    """Layers in the order in which they are computed, ``source`` given and ``output`` asked for in
    the form plain. An array is brought into another form at most once, in ``change_seconds``;
    libraries that are used take ``library_bytes``, each once."""

    courses: tuple[Course, ...]
    source: str
    output: str
    change_seconds: Mapping[tuple[str, Form], float]
    library_bytes: Mapping[type, int] = field(default_factory=dict)

    def fastest(self, room_bytes: float = inf) -> _Found | None:
        """The fastest of all whose libraries, what they keep and the largest workspace take no more
        than ``room_bytes`` together; None where none do."""
        best, limit = None, inf
        for used in product((True, False), repeat=len(self.library_bytes)):
            taken = sum(n for n, use in zip(self.library_bytes.values(), used, strict=True) if use)
            found = self._ways.by(used).fastest(room_bytes - taken, limit)
            if found is not None:
                best, limit = found, found[0] * (1 - _NOTHING)
        return best

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

    def change(
        self,
        layer: int,
        forms: Mapping[str, tuple[Form, ...]],
        takes: Form | None,
        makes: Form | None,
    ) -> tuple[float, _Forms]:
        """Seconds of what brings arrays of these ``forms`` into those of an option, and the forms
        behind it."""
        course, forms, seconds = self.courses[layer], dict(forms), 0.0
        takes = takes or forms[course.inputs[0]][0]
        for name in course.inputs:
            seconds += self._bring(forms, name, takes)
        forms[course.name] = (makes or takes,)
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
        libraries = {name: i for i, name in enumerate([None, *knapsack.library_bytes])}
        states: dict[_Forms, int] = {((Form.PLAIN,),): 0}
        stages = []
        for layer, course in enumerate(knapsack.courses):
            some = _undominated(course.options)
            kinds: dict[tuple[Form | None, Form | None], int] = {}
            kind = [kinds.setdefault((o.takes, o.makes), len(kinds)) for _, o in some]
            following: dict[_Forms, int] = {}
            changing = np.empty((len(states), len(kinds)))
            behind = np.empty((len(states), len(kinds)), np.int64)
            for state, row in states.items():
                forms = dict(zip(knapsack.alive[layer], state, strict=True))
                for (takes, makes), column in kinds.items():
                    changing[row, column], made = knapsack.change(layer, forms, takes, makes)
                    behind[row, column] = following.setdefault(made, len(following))
            told = [(o.kept_bytes, o.workspace_bytes, o.seconds) for _, o in some]
            kept, workspaces, seconds = np.array(told, float).reshape(-1, 3).T
            stages.append(
                _Stage(
                    np.array([i for i, _ in some], int),
                    kept,
                    workspaces,
                    np.array([libraries[o.library] for _, o in some], int),
                    seconds + changing[:, kind],
                    behind[:, kind],
                )
            )
            states = following
        return cls(tuple(stages), len(states))

    def by(self, libraries: Sequence[bool]) -> _Ways:
        """Those by options that compute with none of the libraries but these."""
        used = np.array([True, *libraries])
        return replace(self, stages=tuple(s.those(used[s.libraries]) for s in self.stages))

    def fastest(self, room_bytes: float, limit: float) -> _Found | None:
        """The fastest that takes no more than ``room_bytes``, in less than ``limit`` seconds."""
        if not all(stage.options.size for stage in self.stages):
            return None
        best = None
        sizes, bounds = self._promising(room_bytes, limit)
        for part in (slice(0, 1), slice(1, None)):  # of the others those that may still be faster
            some = sizes[part][bounds[part] < limit]
            prices = self._prices(some, room_bytes - some)
            sharper = self._bounds(some, room_bytes - some, prices)
            for n in sharper.argsort():
                if sharper[n] < limit:
                    found = self._exactly(some[n], room_bytes - some[n], prices[n], limit)
                    if found is not None:
                        best, limit = found, found[0] * (1 - _NOTHING)
        return best

    def _promising(self, room_bytes: float, limit: float) -> tuple[_Floats, _Floats]:
        """Sizes that the largest workspace may have, and bounds of the seconds then, the lowest
        first: those of the price of a byte that suits the largest of them."""
        sizes = np.unique(np.concatenate([stage.workspaces for stage in self.stages]))[::-1]
        least = max(stage.workspaces.min(initial=inf) for stage in self.stages)
        sizes = sizes[(least <= sizes) & (sizes <= room_bytes)]
        sizes = sizes[self._least(0.0, 1.0, sizes) <= room_bytes - sizes]
        sizes = sizes[self._least(1.0, 0.0, sizes) < limit]
        price = self._prices(sizes[:1], room_bytes - sizes[:1])
        if not price.any():
            sizes = sizes[:1]  # smaller ones are no faster
        bounds = self._bounds(sizes, room_bytes - sizes, np.repeat(price, sizes.size))
        order = bounds.argsort()
        return sizes[order], bounds[order]

    def _least(self, a_second: float, a_byte: float | _Floats, workspaces: _Floats) -> _Floats:
        """What the cheapest ways cost whose largest workspaces are no larger."""
        (first, *_), _ = self._to_go(a_second, a_byte, workspaces)
        return np.array(first[:, 0])

    def _bounds(self, workspaces: _Floats, rooms: _Floats, prices: _Floats) -> _Floats:
        """Fewer seconds no ways take that keep no more than so many bytes, and compute in so large
        workspaces, by any prices of a byte."""
        paid: _Floats = np.multiply(prices, rooms, out=np.zeros(rooms.size), where=prices > 0)
        return self._least(1.0, prices, workspaces) - paid

    def _exactly(self, workspace: float, room: float, price: float, limit: float) -> _Found | None:
        """The fastest way that computes in such a workspace, keeps no more than ``room`` bytes and
        takes less than ``limit`` seconds, as seconds and options, None where there is none;
        ``price`` is one of a byte at which the bound is high."""
        one = np.array([workspace])
        prices = list(dict.fromkeys((0.0, float(price))))
        bounds, costs = zip(*(self._to_go(1.0, p, one) for p in prices), strict=True)
        (seconds,), (nbytes,) = self._along(costs[-1])
        limit = min(limit, seconds if nbytes <= room else inf)
        fewest, _ = self._to_go(0.0, 1.0, one)
        trail = [_FIRST]
        for layer, stage in enumerate(self.stages, 1):
            some = trail[-1].behind(stage, workspace)
            keep = some.nbytes + fewest[layer][0, some.states] <= room
            for p, bound in zip(prices, bounds, strict=True):
                least = some.seconds + p * (some.nbytes - room) if p else some.seconds
                keep &= least + bound[layer][0, some.states] <= limit * (1 + _NOTHING)
            trail.append(some.those(keep).best())
        if not trail[-1].seconds.size:
            return None
        label, chosen = int(trail[-1].seconds.argmin()), []
        seconds = float(trail[-1].seconds[label])
        for labels in reversed(trail[1:]):
            label, option = labels.origins[:, label].tolist()
            chosen.append(option)
        return seconds, tuple(reversed(chosen))

    def _prices(self, workspaces: _Floats, rooms: _Floats) -> _Floats:
        """For workspaces, and bytes that may be kept, the prices of a byte, in seconds, at which
        the bounds are highest: there the cheapest ways, of which there are several, keep more than
        that and less. There must be ways that keep no more."""
        seconds, nbytes = self._way(1.0, 0.0, workspaces)
        least_seconds, least_bytes = self._way(0.0, 1.0, workspaces)
        prices = np.zeros(workspaces.size)
        some = np.flatnonzero(nbytes > rooms)
        while some.size:
            price = (least_seconds[some] - seconds[some]) / (nbytes[some] - least_bytes[some])
            prices[some] = price
            new_seconds, new_bytes = self._way(1.0, price, workspaces[some])
            saved = seconds[some] + price * nbytes[some] - (new_seconds + price * new_bytes)
            more, over = saved > _NOTHING * seconds[some], new_bytes > rooms[some]
            seconds[some[over]], nbytes[some[over]] = new_seconds[over], new_bytes[over]
            least_seconds[some[~over]] = new_seconds[~over]
            least_bytes[some[~over]] = new_bytes[~over]
            some = some[more]
        return prices

    def _way(
        self, a_second: float, a_byte: float | _Floats, workspaces: _Floats
    ) -> tuple[_Floats, _Floats]:
        """Seconds and bytes of the ways that are cheapest, for workspaces."""
        _, costs = self._to_go(a_second, a_byte, workspaces)
        return self._along(costs)

    def _along(self, costs: Sequence[_Floats]) -> tuple[_Floats, _Floats]:
        """The same of ways that cost so much by every option of every layer."""
        every = np.arange(len(costs[0]))
        states, (seconds, nbytes) = np.zeros(every.size, int), np.zeros((2, every.size))
        for stage, cost in zip(self.stages, costs, strict=True):
            options = cost[every, states].argmin(axis=1)
            seconds += stage.seconds[states, options]
            nbytes += stage.nbytes[options]
            states = stage.states[states, options]
        return seconds, nbytes

    def _to_go(
        self, a_second: float, a_byte: float | _Floats, workspaces: _Floats
    ) -> tuple[list[_Floats], list[_Floats]]:
        """For workspaces the least that ways from every state cost, (workspace, state), before
        every layer and behind the last; and what they cost by every option of every layer,
        (workspace, state, option)."""
        found, every = [np.zeros((workspaces.size, self.ends))], []
        for stage in reversed(self.stages):
            fits = stage.workspaces <= workspaces[:, np.newaxis]
            kept = np.where(fits, np.multiply.outer(a_byte, stage.nbytes), inf)
            costs = kept[:, np.newaxis] + a_second * stage.seconds + found[-1][:, stage.states]
            every.append(costs)
            found.append(costs.min(axis=2, initial=inf))
        return found[::-1], every[::-1]


def _undominated(options: Sequence[Option]) -> list[tuple[int, Option]]:
    """Those that none beats that takes and makes the same forms by the same library, of several
    alike the first, and their numbers; from the smallest workspace to the largest."""
    order = sorted(
        range(len(options)),
        key=lambda i: (options[i].seconds, options[i].kept_bytes, options[i].workspace_bytes),
    )
    best: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    found = []
    for i in order:
        kept, workspace = options[i].kept_bytes, options[i].workspace_bytes
        alike = options[i].takes, options[i].makes, options[i].library
        faster = best.setdefault(alike, [])
        if not any(k <= kept and w <= workspace for k, w in faster):
            faster.append((kept, workspace))
            found.append((i, options[i]))
    return sorted(found, key=lambda one: one[1].workspace_bytes)
