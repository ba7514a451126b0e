"""Which primitive computes each layer.

Arithmetic on shapes and costs only. What is chosen for a patch serves patches of any size; it is
only the fastest for those of that size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import product
from math import inf
from typing import TypeAlias

from znni_dask.costs import Costs
from znni_dask.errors import NetworkError, OptionError
from znni_dask.geometry import Box, Size, ceil_divide, triple
from znni_dask.kernels.codelets import LONGEST, refusal
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Node
from znni_dask.plan import Choice, Plan
from znni_dask.primitives.base import FEWEST_PRODUCTS, Form, Primitive, Problem, products_of
from znni_dask.primitives.conv_fft_planes import LONGEST_OF_PLANES, ConvPlanesFFT
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.phases import without_stride
from znni_dask.primitives.table import candidates, named
from znni_dask.schedule import Arrangement, Schedules

_LENGTHS = [n for n in range(1, LONGEST + 1) if refusal(n) is None]
_TRIED = 4  # lengths of a tile along each axis
_WORKSPACE_SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of what there is room for
_FIRST_PRICE, _LAST_PRICE = 1e-12, 1e3  # seconds a byte, far below and above what any is worth
_HALVINGS = 12


def choose_primitives(layout: Arrangement, fragments: bool = True) -> dict[str, Primitive]:
    """For every layer the first primitive of the table that takes it: plain ones, which need
    least memory.

    Fragments are for dense networks alone, and only where all branches that meet bring the same
    ones; the other strided layers of a dense network run once per offset (all of them where
    ``fragments`` is false).
    """
    chosen = {
        node.name: _first(node.layer, fragments and node.name in layout.strided)
        for node in layout.network
        if node.inputs
    }
    if fragments and not Schedules(layout, chosen).joins_agree:
        return choose_primitives(layout, fragments=False)
    return chosen


_Libraries: TypeAlias = dict[type[Primitive], int]  # whose, and their memory


@dataclass(frozen=True)
class _Option:
    """A primitive for a layer, the seconds that it takes in a whole run, and the memory that it
    needs: prepared all the time, and a workspace while it computes."""

    primitive: Primitive
    seconds: float
    prepared_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class _Course:
    """The options of one layer, for a problem of its own. A change of form before it takes
    ``change_seconds`` in a whole run."""

    node: Node
    options: tuple[_Option, ...]
    channels: tuple[int, ...]
    change_seconds: dict[Form, float]

    def forms(self, option: _Option) -> tuple[Form | None, Form | None]:
        """In which form the option takes its inputs, and makes its output."""
        return option.primitive.forms(self.node.layer, self.channels)


@dataclass(frozen=True)
class Menu:
    """What may compute each layer in a run of patches of one size, and what it would take.

    ``schedules`` are those of the plain primitives, whose fragments all options share; there are
    ``patches`` patches of the size of ``patch``, and ``costs`` are those of the machine.
    """

    schedules: Schedules
    patch: Box
    patches: float
    threads: int
    costs: Costs = field(default_factory=Costs)

    def fastest(self) -> dict[str, Primitive]:
        """For every layer the primitive that takes least time by its estimate."""
        return _primitives(self._at(inf, 0.0, self._libraries))

    @property
    def families(self) -> list[str]:
        """Of all that may compute some layer."""
        options = (option for course in self._courses for option in course.options)
        return list(dict.fromkeys(option.primitive.family for option in options))

    def of_family(self, family: str) -> dict[str, Primitive]:
        """Of a family the fastest wherever it takes a layer, and else the fastest of all."""

        def seconds(option: _Option) -> float:
            return option.seconds

        chosen = self.fastest()
        for course in self._courses:
            some = [o for o in course.options if o.primitive.family == family]
            if some:
                chosen[course.node.name] = min(some, key=seconds).primitive
        return chosen

    def fastest_within(self, room_bytes: float) -> dict[str, Primitive] | None:
        """The same, so that together they need no more than ``room_bytes`` for what they prepare
        and compute in; None where none do.

        The largest workspace is limited to some share of the room, and bytes that are prepared
        have the price at which the rest suffices (a Lagrange multiplier, as Everett 1963): so it
        is near the best, and the best where there is room enough. That is tried without the
        libraries that primitives compute with, and with those that are worth it if they took none.
        """
        found = []
        for share in _WORKSPACE_SHARES:
            free = self._within(room_bytes, share * room_bytes, self._libraries) or {}
            kinds = {type(o.primitive) for o in free.values()} & self._libraries.keys()
            wanted = {kind: self._libraries[kind] for kind in kinds}
            for libraries in [{}, wanted] if wanted else [{}]:
                room = room_bytes - sum(libraries.values())
                if (chosen := self._within(room, share * room, libraries)) is not None:
                    found.append(chosen)
        best = min(found, key=lambda c: sum(o.seconds for o in c.values()), default=None)
        return None if best is None else _primitives(best)

    def _within(
        self, room_bytes: float, workspace_bytes: float, libraries: _Libraries
    ) -> dict[str, _Option] | None:
        """The fastest whose workspaces are no larger, and that fit together."""

        def fits(chosen: dict[str, _Option]) -> bool:
            prepared = sum(option.prepared_bytes for option in chosen.values())
            workspace = max(option.workspace_bytes for option in chosen.values())
            return prepared + workspace <= room_bytes

        low, high, best = 0.0, _FIRST_PRICE, self._at(workspace_bytes, 0.0, libraries)
        if fits(best):
            return best
        while not fits(best := self._at(workspace_bytes, high, libraries)):
            if high > _LAST_PRICE:
                return None
            low, high = high, 8 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            chosen = self._at(workspace_bytes, middle, libraries)
            if fits(chosen):
                best, high = chosen, middle
            else:
                low = middle
        return best

    def _at(
        self, workspace_bytes: float, price: float, libraries: _Libraries
    ) -> dict[str, _Option]:
        """Layer by layer what costs least, where every prepared byte has a price in seconds; of
        what computes with libraries only what has these."""
        forms = {self.schedules.layout.network.input.name: Form.PLAIN}
        chosen: dict[str, _Option] = {}
        for course in self._courses:
            there = forms[course.node.inputs[0]]

            def cost(option: _Option, course: _Course = course, there: Form = there) -> float:
                takes, _ = course.forms(option)
                change = 0.0 if takes in (None, there) else course.change_seconds[takes]
                return option.seconds + change + price * option.prepared_bytes

            options = [
                o
                for o in course.options
                if not o.primitive.library_bytes or type(o.primitive) in libraries
            ]
            small = [o for o in options if o.workspace_bytes <= workspace_bytes]
            least = min(options, key=lambda o: o.workspace_bytes)
            best = min(small or [least], key=cost)
            takes, makes = course.forms(best)
            chosen[course.node.name] = best
            forms[course.node.name] = makes or takes or there
        return chosen

    @cached_property
    def _libraries(self) -> _Libraries:
        """All that options compute with."""
        primitives = (option.primitive for course in self._courses for option in course.options)
        return {type(p): p.library_bytes for p in primitives if p.library_bytes}

    @cached_property
    def _courses(self) -> tuple[_Course, ...]:
        runs = self.schedules.repeats * self.patches
        seconds = partial(self.costs.step_seconds, threads=self.threads)
        network = self.schedules.layout.network
        found: list[_Course] = []
        for step in self.schedules.steps(self.schedules.sizes(self.patch)):
            if isinstance(step.primitive, FormChange):
                continue
            node, problem = step.operation.node, step.problem
            fragments = step.primitive.fragments
            others = [p for p in candidates(node.layer) if p.fragments == fragments]
            shape = problem.inputs[0]
            change = Problem(node.layer, (shape,), shape, ((0, 0, 0),), (0, 0, 0), (0, 0, 0))
            found.append(
                _Course(
                    node,
                    tuple(
                        _Option(
                            p,
                            self.costs.setup_seconds(p, node.layer) + runs * seconds(p, problem),
                            p.prepared_bytes(node.layer),
                            p.workspace_bytes(problem, self.threads),
                        )
                        for p in dict.fromkeys([step.primitive, *others, *tiled(problem)])
                    ),
                    tuple(network.channels[name] for name in node.inputs),
                    {form: runs * seconds(FormChange(form), change) for form in Form},
                )
            )
        return tuple(found)


def _primitives(chosen: dict[str, _Option]) -> dict[str, Primitive]:
    return {name: option.primitive for name, option in chosen.items()}


def tiled(problem: Problem) -> Iterator[ConvTiledFFT | ConvPlanesFFT]:
    """Tiled convolutions worth trying for a problem: of each axis the lengths that transform
    fewest values for its outputs, kernels' spectra kept or, for where memory is short, remade. Of
    few products the sum itself is faster, and loses less."""
    if not isinstance(problem.layer, Conv) or products_of(problem.layer) < FEWEST_PRODUCTS:
        return
    conv, kernel = problem.layer, without_stride(problem.layer).kernel

    def lengths(axis: int, most: int = LONGEST) -> list[int]:
        outputs = ceil_divide(problem.output[2 + axis], conv.dilation[axis])
        return _lengths(outputs, kernel[axis], most)

    sizes = product(*map(lengths, range(3)))
    found = (ConvTiledFFT(triple(size), remade) for size in sizes for remade in (False, True))
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
    names = plan.primitives
    layers = {node.name: node.layer for node in layout.network if node.inputs}
    if set(names) != set(layers):
        odd = sorted(set(names) ^ set(layers))[0]
        raise OptionError(f"the plan is for another network: they differ in layer {odd!r}")
    chosen: dict[str, Primitive] = {}
    for name, layer in layers.items():
        try:
            chosen[name] = named(names[name], layer)
        except KeyError:
            raise OptionError(
                f"the plan's primitive {names[name]!r} cannot take {name!r}"
            ) from None
        if chosen[name].fragments and name not in layout.strided:
            raise OptionError(
                f"the plan makes fragments in {name!r}, which is not of a dense network"
            )
    if not Schedules(layout, chosen).joins_agree:
        raise OptionError("the plan's fragments do not fit where branches of the network meet")
    return chosen


def _first(layer: Layer, fragment: bool) -> Primitive:
    found = candidates(layer)
    if not found:
        raise NetworkError(f"no primitive computes {layer.kind} ({layer.summary})")
    fitting = [p for p in found if p.fragments == fragment] or [p for p in found if not p.fragments]
    return fitting[0]
