"""What of a GPU is lent to layers that the host computes: of every convolution the fastest
sub-layers that fit there. Arithmetic on shapes and costs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush
from math import inf

from znni_dask.choices import Menu
from znni_dask.machine import GPU
from znni_dask.network.layers import Conv
from znni_dask.primitives.base import DevicePrimitive, Primitive, Problem
from znni_dask.primitives.gpu.conv_fft_tiles import gpu_tiles
from znni_dask.primitives.offloaded import Offloaded, PiecesSeconds, SubLayer
from znni_dask.primitives.table import candidates
from znni_dask.resources import DEVICE_SLACK_BYTES

_SHARE = 0.5  # of a GPU's memory, for the sub-layers of one layer


def lent_to(host: Menu, device_bytes: int) -> dict[str, list[Primitive]]:
    """For every convolution of the ``host`` that is worth the way to a GPU, which has so much
    memory, the fastest sub-layers there."""
    costs, threads, found = host.costs, host.threads, dict[str, list[Primitive]]()
    room_bytes = int(_SHARE * (device_bytes - DEVICE_SLACK_BYTES))

    def seconds(problem: Problem, cut: Offloaded) -> PiecesSeconds:
        return costs.pieces_seconds(cut.pieces(problem), threads)

    for name, primitive in host.fastest().items():
        problem, _ = host.problems[name]
        if not isinstance(problem.layer, Conv):
            continue
        step_seconds = partial(costs.step_seconds, problem=problem, threads=threads)
        inner = [p for p in candidates(problem.layer, GPU) if isinstance(p, DevicePrimitive)]
        inner += sorted(gpu_tiles(problem), key=step_seconds)[:1]
        cut = sub_layers(
            inner, problem, room_bytes, partial(seconds, problem), step_seconds(primitive)
        )
        found[name] = [] if cut is None else [cut]
    return found


def sub_layers(
    primitives: list[DevicePrimitive],
    problem: Problem,
    room_bytes: int,
    seconds: Callable[[Offloaded], PiecesSeconds],
    limit: float = inf,
) -> Offloaded | None:
    """The fastest sub-layers that need no more than so much of a device, by one of its primitives,
    of those that halving leads to. None where none fit, or take less ``seconds`` than the
    ``limit``. What is cut further takes at least as long (Dijkstra 1959), but for what more pieces
    do at the same time, so that the search goes on where a first one fits."""
    reached: set[Offloaded] = set()
    to_try: list[tuple[float, int, float, Offloaded]] = []
    best: Offloaded | None = None

    def reach(one: Offloaded) -> None:
        if one not in reached and one.refusal(problem.layer) is None:
            reached.add(one)
            least, whole = seconds(one)
            heappush(to_try, (least, len(reached), whole, one))

    for primitive in primitives:
        reach(Offloaded(primitive, SubLayer.whole(problem)))
    while to_try and to_try[0][0] < limit:
        _, _, whole, one = heappop(to_try)
        fits = one.inner.library_bytes + one.needs(problem).device_bytes <= room_bytes
        if fits and whole < limit:
            best, limit = one, whole
        for sub in one.sub.smaller:
            reach(replace(one, sub=sub))
    return best
