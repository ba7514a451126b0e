"""The planner of patches that the CPU and a GPU compute together: which layers on whom.

Of a few patches of every size each split is tried, the first layers by the fastest primitives of
the host (or, where the GPU is lent to it, by sub-layers of the fastest of the GPU's), the others by
the fastest of the GPU's, for as many fragments at once as there is room for. Arithmetic on shapes
and costs only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from znni_dask import planner
from znni_dask.choices import Menu, choose_primitives
from znni_dask.errors import MemoryLimitError
from znni_dask.geometry import Box
from znni_dask.machine import CPU, GPU, GPU_RAM, show_bytes
from znni_dask.network.layers import Conv
from znni_dask.patches import largest_box
from znni_dask.plan import Plan
from znni_dask.planner import Fits, Pair, Request
from znni_dask.primitives.base import DevicePrimitive, Primitive, Problem
from znni_dask.primitives.offloaded import Offloaded, SubLayer
from znni_dask.primitives.table import candidates
from znni_dask.schedule import Schedules
from znni_dask.shares import Work, need_of
from znni_dask.split import Split, splits

_LENT = 0.5  # of a GPU's memory, for sub-layers


def search(request: Request) -> Plan:
    """The fastest plan in which both compute, as ``request.device`` says. Raises `MemoryLimitError`
    where the network cannot be split, or nothing fits."""
    found = []
    for pair in planner.cubes(request):
        for work in _Shared(request, pair).ways():
            fits = Fits(request, work)
            if (best := planner.best_of(fits, [pair])) is not None:
                found.append(best)
                break
    if not found:
        raise MemoryLimitError(
            f"no plan by {request.device} fits {show_bytes(request.allowed_bytes)}, and "
            f"{show_bytes(request.device_bytes)} of the GPU's memory: allow more, or have one of "
            "them compute"
        )
    return planner.told(*planner.preferred(found))


@dataclass(frozen=True, eq=False)
class _Shared:
    """The ways to compute a patch of a block by both."""

    request: Request
    pair: Pair

    def ways(self) -> Iterator[Work]:
        """Those that fit the GPU: by the host's fastest primitives, and by its plain ones, which
        need least memory; of each the split that is fastest by estimate first."""
        menu = self._menu(CPU)
        for base in (menu.fastest(), menu.schedules.primitives):
            yield from self._ways(menu, self._lent(menu, base))

    def _ways(self, menu: Menu, host: Mapping[str, Primitive]) -> Iterator[Work]:
        seconds = {
            name: (self._seconds(primitive, problem), self._seconds(self._device[name], problem))
            for name, primitive in host.items()
            for problem, _ in [menu.problems[name]]
        }
        layers, found = list(seconds), list[tuple[float, str | None]]()
        # a patch that is gone through several times, as fragments are left out, is not split
        for layer in splits(self.request.layout.network) if menu.schedules.repeats == 1 else ():
            before, behind = layers[: layers.index(layer) + 1], layers[layers.index(layer) + 1 :]
            own, device = sum(seconds[n][0] for n in before), sum(seconds[n][1] for n in behind)
            found.append((max(own, device), layer))
        if any(isinstance(primitive, Offloaded) for primitive in host.values()):
            found.append((sum(own for own, _ in seconds.values()), None))
        for _, layer_ in sorted(found, key=lambda one: one[0]):
            work = self._split(layer_, host) if layer_ else Schedules(self.request.layout, host)
            if work is not None and self._fits(work):
                yield work

    def _split(self, layer: str, host: Mapping[str, Primitive]) -> Split | None:
        """Behind a layer, as many fragments together as fit; None where not even one does."""
        before = list(host)[: list(host).index(layer) + 1]
        primitives = {**self._device, **{name: host[name] for name in before}}
        one = Split.at(self.request.layout, layer, primitives)
        counts = [n for n in range(1, one.fragments + 1) if one.fragments % n == 0]
        fitting = bisect_left(counts, True, key=lambda n: not self._fits(one.together(n)))
        return one.together(counts[fitting - 1]) if fitting else None

    def _fits(self, work: Work) -> bool:
        need = need_of(self.request, work, work.sizes(self._box), self.pair[1])
        return need.device_bytes <= self.request.device_bytes

    def _lent(self, menu: Menu, base: Mapping[str, Primitive]) -> dict[str, Primitive]:
        """What computes every layer before a split, where the GPU is lent to the host if it is."""
        if self.request.device != GPU_RAM:
            return dict(base)
        problems = {name: menu.problems[name][0] for name in base}
        return {name: self._faster(name, base[name], problems[name]) for name in base}

    def _faster(self, name: str, primitive: Primitive, problem: Problem) -> Primitive:
        """That of the host, or sub-layers by the GPU."""
        lent = self._of_gpu(name, problem)
        if lent is None or self._seconds(lent, problem) >= self._seconds(primitive, problem):
            return primitive
        return lent

    def _of_gpu(self, name: str, problem: Problem) -> Offloaded | None:
        """The fastest way to have the GPU compute sub-layers of a convolution."""
        if name in self._cut:
            return self._cut[name]
        found: list[Offloaded] = []
        if isinstance(problem.layer, Conv):
            room_bytes = int(_LENT * self.request.device_bytes)
            for inner in dict.fromkeys([self._device[name], *candidates(problem.layer, GPU)]):
                assert isinstance(inner, DevicePrimitive)
                if (cut := sub_layers(inner, problem, room_bytes)) is not None:
                    found.append(cut)
        best = min(found, key=lambda one: self._seconds(one, problem), default=None)
        self._cut[name] = best
        return best

    def _seconds(self, primitive: Primitive, problem: Problem) -> float:
        return self.request.costs.step_seconds(primitive, problem, self.request.threads)

    @cached_property
    def _cut(self) -> dict[str, Offloaded | None]:
        return {}

    @cached_property
    def _device(self) -> Mapping[str, Primitive]:
        return self._menu(GPU).fastest()

    @property
    def _box(self) -> Box:
        return largest_box(self.request.layout, self.pair[1])

    def _menu(self, device: str) -> Menu:
        request, box = self.request, self._box
        plain = Schedules(request.layout, choose_primitives(request.layout, device=device))
        patches = request.hull.voxels / box.voxels
        return Menu.of_patches(plain, box, patches, request.threads, request.costs)


def sub_layers(inner: DevicePrimitive, problem: Problem, room_bytes: int) -> Offloaded | None:
    """A problem in sub-layers that need no more than so much of a device: cut in half until they
    fit, each time so that it takes least by its estimate; None where no cut makes them fit."""
    sub = SubLayer.whole(problem)
    while True:
        found = Offloaded(inner, sub)
        if found.refusal(problem.layer) is None and found.needs(problem).device_bytes <= room_bytes:
            return found
        tried = [Offloaded(inner, one) for one in sub.smaller]
        able = [one for one in tried if one.refusal(problem.layer) is None]
        if not able:
            return None
        sub = min(able, key=lambda one: one.work(problem, 1).seconds(1)).sub
