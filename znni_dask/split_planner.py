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
from functools import cached_property, partial

from znni_dask import planner
from znni_dask.choices import Menu, choose_primitives
from znni_dask.errors import MemoryLimitError
from znni_dask.geometry import Box, Size
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
        for base in (self._menu.fastest(), self._menu.schedules.primitives):
            yield from self._ways(self._lent(base))

    def _ways(self, host: Mapping[str, Primitive]) -> Iterator[Work]:
        own = {name: self._seconds(name, primitive) for name, primitive in host.items()}
        device = {name: self._seconds(name, primitive) for name, primitive in self._device.items()}
        found: list[tuple[float, str | None]] = []
        layers = list(own)
        # a patch that is gone through several times, as fragments are left out, is not split
        once = self._menu.schedules.repeats == 1
        for layer in splits(self.request.layout.network) if once else ():
            place = layers.index(layer) + 1
            before = sum(own[name] for name in layers[:place])
            behind = sum(device[name] for name in layers[place:])
            found.append((max(before, behind), layer))
        if any(isinstance(primitive, Offloaded) for primitive in host.values()):
            found.append((sum(own.values()), None))
        for _, split in sorted(found, key=lambda one: one[0]):
            work = self._split(split, host) if split else self._unsplit(host)
            if work is not None:
                yield work

    def _unsplit(self, host: Mapping[str, Primitive]) -> Schedules | None:
        """All by the host, the GPU lent to it; None where that does not fit the GPU."""
        schedules = Schedules(self.request.layout, host)
        return schedules if self._fits(schedules, schedules.sizes(self._box)) else None

    def _split(self, layer: str, host: Mapping[str, Primitive]) -> Split | None:
        """Behind a layer, as many fragments together as fit; None where not even one does."""
        before = list(host)[: list(host).index(layer) + 1]
        primitives = {**self._device, **{name: host[name] for name in before}}
        one = Split.at(self.request.layout, layer, primitives)
        sizes = one.sizes(self._box)
        counts = [n for n in range(1, one.fragments + 1) if one.fragments % n == 0]
        fitting = bisect_left(counts, True, key=lambda n: not self._fits(one.together(n), sizes))
        return one.together(counts[fitting - 1]) if fitting else None

    def _fits(self, work: Work, sizes: Mapping[str, Size]) -> bool:
        need = need_of(self.request, work, sizes, self.pair[1])
        return need.device_bytes <= self.request.device_bytes

    def _lent(self, base: Mapping[str, Primitive]) -> Mapping[str, Primitive]:
        """What computes every layer before a split, where the GPU is lent to the host if it is."""
        if self.request.device != GPU_RAM:
            return base
        both = {name: [primitive, *self._cut[name]] for name, primitive in base.items()}
        return {name: min(some, key=partial(self._seconds, name)) for name, some in both.items()}

    @cached_property
    def _cut(self) -> dict[str, list[Offloaded]]:
        """Of every convolution the ways to have the GPU compute sub-layers."""
        room_bytes = int(_LENT * self.request.device_bytes)
        found: dict[str, list[Offloaded]] = {}
        for name, problem in self._problems.items():
            inner = [self._device[name], *candidates(problem.layer, GPU)]
            able = dict.fromkeys(p for p in inner if isinstance(p, DevicePrimitive))
            of_conv = able if isinstance(problem.layer, Conv) else ()
            cut = (sub_layers(p, problem, room_bytes) for p in of_conv)
            found[name] = [one for one in cut if one is not None]
        return found

    def _seconds(self, name: str, primitive: Primitive) -> float:
        """Of a layer."""
        costs, threads = self.request.costs, self.request.threads
        return costs.step_seconds(primitive, self._problems[name], threads)

    @cached_property
    def _menu(self) -> Menu:
        return self._menu_of(CPU)

    @cached_property
    def _problems(self) -> dict[str, Problem]:
        return {name: problem for name, (problem, _) in self._menu.problems.items()}

    @cached_property
    def _device(self) -> Mapping[str, Primitive]:
        return self._menu_of(GPU).fastest()

    @cached_property
    def _box(self) -> Box:
        return largest_box(self.request.layout, self.pair[1])

    def _menu_of(self, device: str) -> Menu:
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
