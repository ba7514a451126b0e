"""The planner of patches that the CPU and a GPU compute together: what of them, or which, on whom.

Patches of a few sizes, split behind every layer: the first ones by the fastest primitives of the
host (or, where the GPU is lent to it, by sub-layers of the fastest of the GPU's), the others by the
fastest of the GPU's, for as many fragments at once as there is room for; and whole patches by
either. What would be fastest were there memory enough is tried first, so that what can be no faster
than the best that fits need not be tried (Land and Doig 1960). Arithmetic on shapes and costs only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf

from znni_dask import planner
from znni_dask.apart import Apart
from znni_dask.choices import Menu, Work, choose_primitives
from znni_dask.errors import MemoryLimitError
from znni_dask.geometry import Box
from znni_dask.lent import lent_to
from znni_dask.machine import CPU, CPU_GPU, GPU, GPU_RAM, show_bytes
from znni_dask.patches import largest_box
from znni_dask.plan import Plan
from znni_dask.planner import Fits, Found, Pair, Request
from znni_dask.primitives.base import Primitive, Problem
from znni_dask.primitives.offloaded import Offloaded
from znni_dask.schedule import Schedules
from znni_dask.shares import need_of
from znni_dask.split import Split, joined_at, splits

_Primitives = Mapping[str, Primitive]


def search(request: Request) -> Plan:
    """The fastest plan in which both compute, as ``request.device`` says. Raises `MemoryLimitError`
    where the network cannot be split, or nothing fits."""
    ways = _Ways(request)
    tried = [
        (seconds / planner.useful_voxels(request, *pair), pair, way)
        for pair in planner.cubes(request)
        for seconds, way in _Shared(ways, pair).ways()
    ]
    found: list[Found] = []
    least = inf
    for seconds, pair, way in sorted(tried, key=lambda one: one[0]):
        if seconds >= least:
            break
        work = way()
        if work is not None and (best := planner.best_of(Fits(request, work), [pair])) is not None:
            found.append(best)
            least = min(least, best[1].candidate.seconds_per_voxel)
    if not found:
        raise MemoryLimitError(
            f"no plan by {request.device} fits {show_bytes(request.allowed_bytes)}, and "
            f"{show_bytes(request.device_bytes)} of the GPU's memory: allow more, or have one of "
            "them compute"
        )
    return planner.told(*planner.preferred(found))


@dataclass(frozen=True, eq=False)
class _Ways:
    """The ways to share a patch, of any size, by plain primitives."""

    request: Request

    @cached_property
    def host(self) -> Schedules:
        """All by the host."""
        return self._plain(CPU)

    @cached_property
    def device(self) -> Schedules:
        """All by the GPU."""
        return self._plain(GPU)

    @cached_property
    def split(self) -> dict[str, Split]:
        """Split behind every layer that allows it."""
        layout, both = self.request.layout, (self.host.primitives, self.device.primitives)
        layers = splits(layout.network) if self._once else []
        return {layer: Split.at(layout, layer, joined_at(layer, *both)) for layer in layers}

    @cached_property
    def apart(self) -> list[Apart]:
        """Each whole patches, where they may."""
        asked = self._once and self.request.device == CPU_GPU
        return [Apart(self.host, self.device)] if asked else []

    @property
    def _once(self) -> bool:
        """A patch that is gone through several times, as fragments are left out, is not shared."""
        return self.host.repeats * self.device.repeats == 1

    def _plain(self, device: str) -> Schedules:
        layout = self.request.layout
        return Schedules(layout, choose_primitives(layout, device=device))


@dataclass(frozen=True, eq=False)
class _Shared:
    """The ways to compute patches of a size, each by what is fastest and fits."""

    all: _Ways
    pair: Pair

    def ways(self) -> Iterator[tuple[float, Callable[[], Work | None]]]:
        """Every way with about the seconds of a patch, were there memory enough; what it comes to,
        None where it does not fit."""
        own, device = self._seconds(self._host), self._seconds(self._device)
        layers = list(own)
        for layer, split in self.all.split.items():
            place = layers.index(layer) + 1
            before = sum(own[name] for name in layers[:place])
            behind = sum(device[name] for name in layers[place:])
            yield max(before, behind), partial(self._split, split)
        for apart in self.all.apart:
            rates = (1 / sum(seconds.values()) for seconds in (own, device))
            yield 1 / sum(rates), partial(self._apart, apart)
        if any(isinstance(primitive, Offloaded) for primitive in self._host.fastest().values()):
            yield sum(own.values()), self._unsplit

    def _split(self, plain: Split) -> Split | None:
        """Behind a layer, as many fragments together as fit."""
        if not self._may_fit(plain, plain.head, plain.tail):
            return None
        head, tail = self._menu(plain.head, self._lent), self._menu(plain.tail)
        work = replace(plain, head=_fastest(head), tail=_fastest(tail))
        over = self._over(work)[1]
        work = replace(work, tail=self._within(tail, work.tail, over, threads=1))
        over = self._over(work)[0]
        work = replace(work, head=self._within(head, work.head, over, self._request.threads))
        counts = [n for n in range(1, work.fragments + 1) if work.fragments % n == 0]
        fitting = bisect_left(counts, True, key=lambda n: max(self._over(work.together(n))) > 0)
        return work.together(counts[fitting - 1]) if fitting else None

    def _apart(self, plain: Apart) -> Apart | None:
        """Whole patches by either."""
        if not self._may_fit(plain, plain.host, plain.device):
            return None
        work = Apart(_fastest(self._host), _fastest(self._device))
        of_host, of_device = self._over(work)
        work = Apart(
            self._within(self._host, work.host, of_host, self._request.threads),
            self._within(self._device, work.device, of_device, threads=1),
        )
        return work if max(self._over(work)) <= 0 else None

    def _unsplit(self) -> Schedules | None:
        """All by the host, the GPU lent to it."""
        work = _fastest(self._host)
        work = self._within(self._host, work, self._over(work)[0], self._request.threads)
        return work if max(self._over(work)) <= 0 else None

    def _within(self, menu: Menu, work: Schedules, over_bytes: int, threads: int) -> Schedules:
        """The fastest that takes so much less; the plain primitives where none does."""
        if over_bytes <= 0:
            return work
        spent = work.spent_bytes(work.sizes(self._box), threads)
        found = menu.fastest_within(spent - over_bytes)
        return replace(work, primitives=found or menu.schedules.primitives)

    def _may_fit(self, plain: Split | Apart, host: Schedules, device: Schedules) -> bool:
        """Whether arrays fit, what primitives compute in and blocks not counted."""
        request, sizes = self._request, plain.sizes(self._box)
        need = need_of(request, plain, sizes, self.pair[1])
        process = need.process_bytes - host.spent_bytes(sizes, request.threads)
        of_device = need.device_bytes - device.spent_bytes(sizes, threads=1)
        return process <= request.allowed_bytes and of_device <= request.device_bytes

    def _over(self, work: Work) -> tuple[int, int]:
        """Bytes by which one block in flight exceeds the process's memory, and the GPU's."""
        need = planner.predicted_need(self._request, work, *self.pair, 1)
        request = self._request
        return need.process_bytes - request.allowed_bytes, need.device_bytes - request.device_bytes

    @cached_property
    def _host(self) -> Menu:
        """The host's, with what of the GPU is lent to it."""
        return self._menu(self.all.host, self._lent)

    @cached_property
    def _device(self) -> Menu:
        return self._menu(self.all.device)

    @cached_property
    def _lent(self) -> dict[str, list[Primitive]]:
        if self._request.device != GPU_RAM:
            return {}
        return lent_to(self._menu(self.all.host), self._request.device_bytes)

    def _menu(self, plain: Schedules, lent: Mapping[str, list[Primitive]] | None = None) -> Menu:
        request, patches = self._request, self._request.hull.voxels / self._box.voxels
        menu = Menu.of_patches(plain, self._box, patches, request.threads, request.costs)
        return replace(menu, lent=lent or {})

    def _seconds(self, menu: Menu) -> dict[str, float]:
        """Of every layer by what is fastest."""
        return {
            name: self._step_seconds(menu.problems[name][0], primitive)
            for name, primitive in menu.fastest().items()
        }

    def _step_seconds(self, problem: Problem, primitive: Primitive) -> float:
        return self._request.costs.step_seconds(primitive, problem, self._request.threads)

    @property
    def _request(self) -> Request:
        return self.all.request

    @cached_property
    def _box(self) -> Box:
        return largest_box(self._request.layout, self.pair[1])


def _fastest(menu: Menu) -> Schedules:
    """Of what is fastest, were there memory enough."""
    return replace(menu.schedules, primitives=menu.fastest())
