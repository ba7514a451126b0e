"""Which primitive computes each layer.

Arithmetic on shapes and costs only. What is chosen for a patch serves patches of any size; it is
only the fastest for those of that size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from math import inf, prod
from typing import TypeAlias

from znni_dask.apart import Apart
from znni_dask.costs import Costs
from znni_dask.errors import NetworkError, OptionError
from znni_dask.geometry import Box, Size, ceil_divide, triple, volume
from znni_dask.kernels.codelets import LONGEST, refusal
from znni_dask.knapsack import Course, Knapsack, Option
from znni_dask.machine import CPU, GPU
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Node
from znni_dask.patches import Layout
from znni_dask.plan import Choice, Plan, Stage
from znni_dask.primitives.base import Form, Primitive, Problem, may_transform
from znni_dask.primitives.conv_fft_planes import LONGEST_OF_PLANES, ConvPlanesFFT
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.gpu.conv_fft_tiles import gpu_tiles
from znni_dask.primitives.phases import without_stride
from znni_dask.primitives.table import candidates, named
from znni_dask.schedule import Arrangement, Schedules
from znni_dask.split import Split

Work: TypeAlias = Schedules | Split | Apart  # what patches may be computed by

_LENGTHS = [n for n in range(1, LONGEST + 1) if refusal(n) is None]
_TRIED = 4  # lengths of a tile along each axis
_BEST = 8  # tiles that transform fewest values; of others only those that are smaller
_WASTEFUL = 2.5  # and transform no more than so many times as many values


def choose_primitives(
    layout: Arrangement, fragments: bool = True, device: str = CPU
) -> dict[str, Primitive]:
    """For every layer the first primitive of a device that takes it: plain ones, which need least
    memory.

    Fragments are for dense networks alone, and only where all branches that meet bring the same
    ones; the other strided layers of a dense network run once per offset (all of them where
    ``fragments`` is false).
    """
    chosen = {
        node.name: _first(node.layer, fragments and node.name in layout.strided, device)
        for node in layout.network
        if node.inputs
    }
    if fragments and not Schedules(layout, chosen).joins_agree:
        return choose_primitives(layout, False, device)
    return chosen


@dataclass(frozen=True)
class _Dish:
    """What may compute a layer: primitives, and what each takes in a whole run."""

    node: Node
    primitives: tuple[Primitive, ...]
    options: tuple[Option, ...]

    def fastest(self, family: str) -> Primitive | None:
        """Of a family; None where there are none."""
        some = [i for i, p in enumerate(self.primitives) if p.family == family]
        best = min(some, key=lambda i: self.options[i].seconds, default=None)
        return None if best is None else self.primitives[best]


@dataclass(frozen=True)
class Menu:
    """What may compute each layer in a run, and what it would take.

    ``schedules`` are those of the plain primitives, whose fragments all options share; ``problems``
    are what every layer computes at once, and how often; ``costs`` are those of the machine.
    ``copied_bytes`` are those of copies that a primitive is handed instead of its arrays. What is
    ``lent`` to layers may compute them, too.
    """

    schedules: Schedules
    problems: Mapping[str, tuple[Problem, float]]
    threads: int
    costs: Costs = field(default_factory=Costs)
    copied_bytes: Callable[[Primitive, Problem], int] = lambda primitive, problem: 0
    lent: Mapping[str, Sequence[Primitive]] = field(default_factory=dict)

    @classmethod
    def of_patches(
        cls,
        schedules: Schedules,
        patch: Box,
        patches: float,
        threads: int,
        costs: Costs | None = None,
    ) -> Menu:
        """That of so many patches of one size."""
        runs = schedules.repeats * patches
        problems = {
            step.operation.node.name: (step.problem, runs)
            for step in schedules.steps(schedules.sizes(patch))
            if not isinstance(step.primitive, FormChange)  # which depend on what is chosen
        }
        return cls(schedules, problems, threads, costs or Costs())

    def fastest(self) -> dict[str, Primitive]:
        """For every layer the primitive that takes least time by its estimate."""
        return self._fastest_of_all

    @property
    def families(self) -> list[str]:
        """Of all that may compute some layer."""
        return list(dict.fromkeys(p.family for dish in self._dishes for p in dish.primitives))

    def of_family(self, family: str) -> dict[str, Primitive]:
        """Of a family the fastest wherever it takes a layer, and else the fastest of all."""
        asked = {dish.node.name: dish.fastest(family) for dish in self._dishes}
        return self.fastest() | {name: p for name, p in asked.items() if p is not None}

    def fastest_within(self, room_bytes: float) -> dict[str, Primitive] | None:
        """The same, so that together they need no more than ``room_bytes`` for what they prepare
        and compute in, libraries included; None where none do."""
        found = self.best_within(room_bytes)
        return None if found is None else found[1]

    def best_within(self, room_bytes: float) -> tuple[float, dict[str, Primitive]] | None:
        """They, and the seconds that all together take."""
        if (found := self._knapsack.fastest(room_bytes)) is None:
            return None
        seconds, numbers = found
        picked = zip(self._dishes, numbers, strict=True)
        return seconds, {dish.node.name: dish.primitives[number] for dish, number in picked}

    @cached_property
    def _fastest_of_all(self) -> dict[str, Primitive]:
        found = self.best_within(inf)
        assert found is not None  # there is room for all
        return found[1]

    @cached_property
    def _knapsack(self) -> Knapsack:
        network = self.schedules.layout.network
        primitives = (p for dish in self._dishes for p in dish.primitives)
        return Knapsack(
            tuple(Course(d.node.name, tuple(d.node.inputs), d.options) for d in self._dishes),
            network.input.name,
            network.output,
            self._change_seconds,
            {type(p): p.library_bytes for p in primitives if p.library_bytes},
        )

    @cached_property
    def _change_seconds(self) -> dict[tuple[str, Form], float]:
        """To bring every array into every form."""
        network = self.schedules.layout.network
        shapes = {
            name: (problem.layer, shape, runs)
            for layer, (problem, runs) in self.problems.items()
            for name, shape in (
                *zip(network[layer].inputs, problem.inputs, strict=True),
                (layer, problem.output),
            )
        }
        found = {}
        for name, (layer, shape, runs) in shapes.items():
            change = Problem(layer, (shape,), shape, ((0, 0, 0),), (0, 0, 0), (0, 0, 0))
            for form in Form:
                one = self.costs.step_seconds(FormChange(form), change, self.threads)
                found[name, form] = runs * one
        return found

    @cached_property
    def _dishes(self) -> tuple[_Dish, ...]:
        network = self.schedules.layout.network
        return tuple(self._dish(node) for node in network if node.inputs)

    def _dish(self, node: Node) -> _Dish:
        network, plain = self.schedules.layout.network, self.schedules.primitives[node.name]
        problem, runs = self.problems[node.name]
        apart = plain.fragments_of(node.layer)
        others = [
            p
            for p in candidates(node.layer, plain.device)
            if p.fragments == plain.fragments and p.fragments_of(node.layer) == apart
        ]
        in_sizes = tiled(problem) if plain.device == CPU else gpu_tiles(problem)
        lent = self.lent.get(node.name, ())
        primitives = tuple(dict.fromkeys([plain, *others, *in_sizes, *lent]))
        channels = tuple(network.channels[name] for name in node.inputs)
        options = []
        for p in primitives:
            takes, makes = p.forms(node.layer, channels)
            copied = self.copied_bytes(p, problem)
            one = self.costs.step_seconds(p, problem, self.threads)
            one += self.costs.handing_seconds(p, problem, copied, self.threads)
            options.append(
                Option(
                    seconds=self.costs.setup_seconds(p, node.layer) + runs * one,
                    kept_bytes=p.prepared_bytes(node.layer),
                    workspace_bytes=p.workspace_bytes(problem, self.threads) + copied,
                    takes=takes,
                    makes=makes,
                    library=type(p) if p.library_bytes else None,
                )
            )
        return _Dish(node, primitives, tuple(options))


def tiled(problem: Problem) -> Iterator[ConvTiledFFT | ConvPlanesFFT]:
    """Tiled convolutions worth trying for a problem: those that transform fewest values for its
    outputs, and smaller ones, kernels' spectra kept or, for where memory is short, remade. Of few
    products the sum itself is faster, and loses less."""
    if not isinstance(problem.layer, Conv) or not may_transform(problem.layer):
        return
    conv, kernel = problem.layer, without_stride(problem.layer).kernel

    outputs = [ceil_divide(n, d) for n, d in zip(problem.output[2:], conv.dilation, strict=True)]

    def lengths(axis: int, most: int = LONGEST) -> list[int]:
        return _lengths(outputs[axis], kernel[axis], most)

    def transformed(size: Size) -> int:
        """Values of all tiles together."""
        axes = zip(size, outputs, kernel, strict=True)
        return prod(n * ceil_divide(m, n - k + 1) for n, m, k in axes)

    sizes = sorted(map(triple, product(*map(lengths, range(3)))), key=transformed)
    most = _WASTEFUL * transformed(sizes[0]) if sizes else 0
    few: list[Size] = []
    for size in sizes:
        smaller = volume(size) < min(map(volume, few), default=inf)
        if len(few) < _BEST or (smaller and transformed(size) <= most):
            few.append(size)
    found = (ConvTiledFFT(size, remade) for size in few for remade in (False, True))
    in_planes = map(ConvPlanesFFT, product(*(lengths(n, LONGEST_OF_PLANES) for n in (1, 2))))
    yield from (p for p in found if p.refusal(conv) is None)
    yield from (p for p in in_planes if p.refusal(conv) is None)


@lru_cache(1 << 10)
def _lengths(outputs: int, kernel: int, most: int) -> list[int]:
    if kernel == 1 and outputs == 1:
        return [1]
    longest = min(most, max(2 * (outputs + kernel - 1), 2 * kernel))
    even = [n for n in _LENGTHS if kernel <= n <= longest and n % 2 == 0]
    found = sorted(even, key=lambda n: (n * ceil_divide(outputs, n - kernel + 1), n))[:_TRIED]
    return sorted({*found, 1} if kernel == 1 else found)


def planned(
    schedules: Schedules, sizes: Mapping[str, Size], voxels: float, threads: int, costs: Costs
) -> tuple[Choice, ...]:
    """The choices of a plan: of every layer what computes it, on boxes of ``sizes`` for so many
    ``voxels`` of output."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for step in schedules.steps(sizes):
        one = costs.step_seconds(step.primitive, step.problem, threads)
        seconds[step.operation.node.name] += schedules.repeats * one / voxels
    return tuple(Choice(name, p.name, seconds[name]) for name, p in schedules.primitives.items())


def chosen_primitives(layout: Arrangement, plan: Plan) -> dict[str, Primitive]:
    """The primitives that a plan names; raises `OptionError` where it does not fit the network."""
    return _chosen(layout, plan.stages)


def _chosen(layout: Arrangement, stages: Iterable[Stage]) -> dict[str, Primitive]:
    names = {c.layer: (c.primitive, stage.device) for stage in stages for c in stage.choices}
    layers = {node.name: node.layer for node in layout.network if node.inputs}
    if set(names) != set(layers):
        odd = sorted(set(names) ^ set(layers))[0]
        raise OptionError(f"the plan is for another network: they differ in layer {odd!r}")
    chosen: dict[str, Primitive] = {}
    for name, layer in layers.items():
        try:
            primitive, device = names[name]
            chosen[name] = named(primitive, layer, device)
        except KeyError:
            raise OptionError(f"the plan's primitive {primitive!r} cannot take {name!r}") from None
        if chosen[name].fragments and name not in layout.strided:
            raise OptionError(
                f"the plan makes fragments in {name!r}, which is not of a dense network"
            )
    if not Schedules(layout, chosen).joins_agree:
        raise OptionError("the plan's fragments do not fit where branches of the network meet")
    return chosen


def schedules_of(layout: Layout, plan: Plan) -> Work:
    """The schedules of a plan's patches; raises `OptionError` where it does not fit the network."""
    if plan.apart:
        if [stage.device for stage in plan.stages] != [CPU, GPU]:
            raise OptionError(
                "the plan's two stages compute whole patches, one of them not by CPU or GPU"
            )
        return Apart(*(Schedules(layout, _chosen(layout, [stage])) for stage in plan.stages))
    chosen = chosen_primitives(layout, plan)
    if len(plan.stages) == 1:
        return Schedules(layout, chosen)
    head, tail = plan.stages[0], plan.stages[-1]
    split = Split.at(layout, head.choices[-1].layer, chosen, tail.samples)
    of_head = [choice.layer for choice in head.choices]
    if len(plan.stages) > 2 or tail.device != GPU or of_head != [*split.head.primitives]:
        raise OptionError("the plan's stages are not two runs of layers, the second one of a GPU")
    return split


def _first(layer: Layer, fragment: bool, device: str) -> Primitive:
    found = candidates(layer, device)
    if not found:
        raise NetworkError(f"no primitive of the {device} computes {layer.kind} ({layer.summary})")
    fitting = [p for p in found if p.fragments == fragment] or [p for p in found if not p.fragments]
    return fitting[0]
