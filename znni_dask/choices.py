"""Which primitive computes each layer.

Arithmetic on shapes and costs only. What is chosen for a patch serves patches of any size; it is
only the fastest for those of that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from znni_dask.costs import setup_seconds, step_seconds
from znni_dask.errors import NetworkError, OptionError
from znni_dask.geometry import Box, ceil_divide, triple
from znni_dask.kernels.codelets import LONGEST, refusal
from znni_dask.network.layers import Conv, Layer
from znni_dask.plan import Plan
from znni_dask.primitives.base import Form, Primitive, Problem
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.table import candidates, named
from znni_dask.schedule import Arrangement, Schedules

_LENGTHS = [n for n in range(1, LONGEST + 1) if refusal(n) is None]
_TRIED = 4  # lengths of a tile along each axis


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


def fastest_primitives(
    layout: Arrangement, patch: Box, patches: float, threads: int
) -> dict[str, Primitive]:
    """For every layer the primitive that computes so many patches fastest, by its estimated
    seconds; what it takes to begin, and changes of form, counted."""
    chosen = choose_primitives(layout)
    schedules = Schedules(layout, chosen)
    forms = {layout.network.input.name: Form.PLAIN}
    for step in schedules.steps(schedules.sizes(patch)):
        if isinstance(step.primitive, FormChange):
            continue
        node, problem = step.operation.node, step.problem
        there = forms[node.inputs[0]]
        others = [p for p in candidates(node.layer) if p.fragments == step.primitive.fragments]
        options = [step.primitive, *others, *tiled(problem)]
        best = min(
            options,
            key=lambda p: (
                setup_seconds(p, problem.layer)
                + schedules.repeats * patches * _seconds(p, problem, there, threads)
            ),
        )
        chosen[node.name] = best
        takes, makes = best.forms(problem.layer, [shape[1] for shape in problem.inputs])
        forms[node.name] = makes or takes or there
    return chosen


def tiled(problem: Problem) -> Iterator[ConvTiledFFT]:
    """Tiled convolutions worth trying for a problem: of each axis the lengths that transform
    fewest values for its outputs."""
    if not isinstance(problem.layer, Conv):
        return
    conv = problem.layer
    lengths = [
        _lengths(ceil_divide(problem.output[2 + axis], conv.dilation[axis]), conv.kernel[axis])
        for axis in range(3)
    ]
    for size in product(*lengths):
        primitive = ConvTiledFFT(triple(size))
        if primitive.refusal(conv) is None:
            yield primitive


@lru_cache(1 << 10)
def _lengths(outputs: int, kernel: int) -> list[int]:
    if kernel == 1 and outputs == 1:
        return [1]
    longest = max(2 * (outputs + kernel - 1), 2 * kernel)
    fitting = [n for n in _LENGTHS if kernel <= n <= longest] or _LENGTHS[-1:]
    even = [n for n in fitting if n % 2 == 0]
    found = sorted(even, key=lambda n: (n * ceil_divide(outputs, n - kernel + 1), n))[:_TRIED]
    return sorted({*found, 1} if kernel == 1 else found)


def _seconds(primitive: Primitive, problem: Problem, there: Form, threads: int) -> float:
    """Seconds of a layer, and of bringing its input into the form that is taken."""
    seconds = step_seconds(primitive, problem, threads)
    takes, _ = primitive.forms(problem.layer, [shape[1] for shape in problem.inputs])
    if takes is not None and takes is not there:
        shape = problem.inputs[0]
        change = Problem(problem.layer, (shape,), shape, ((0, 0, 0),), (0, 0, 0), (0, 0, 0))
        seconds += step_seconds(FormChange(takes), change, threads)
    return seconds


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
