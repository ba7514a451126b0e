"""To a device and back: arrays of the host, piece by piece.

Two pieces are under way at once: while the device computes one the next is copied there, and what
came of the one before it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.devices.base import Device, Mark
from znni_dask.kernels.memory import floats
from znni_dask.kernels.team import Team

Array = NDArray[np.float32]
Work = Callable[[Any, Any, Any], None]
BERTHS = 2


class Load(NamedTuple):
    """Bytes of what is on its way: of a piece that goes there, of what comes back, and of what is
    kept ``aside`` on the device."""

    given: int = 0
    made: int = 0
    aside: int = 0

    @property
    def device_bytes(self) -> int:
        """What a ferry takes of a device's memory."""
        return BERTHS * (self.given + self.made) + self.aside

    @property
    def host_bytes(self) -> int:
        """And of the host's."""
        return BERTHS * (self.given + self.made)

    def or_more(self, other: Load) -> Load:
        """Enough for both, one after the other."""
        return Load(*map(max, self, other))


class Part(NamedTuple):
    """An array of the host that is ``made`` from ``pieces`` of others: what each is computed by is
    called, within a lane, with the piece on the device, with room for what is made, which is the
    same for all pieces of a part, and with the memory that is kept aside."""

    made: Array
    pieces: Iterator[tuple[Array, Work]]


class Ferry:
    """Goes between the host, where a ``team`` copies, and a ``device``; nothing that it carries is
    larger than ``most`` says. Not for use by several threads at once."""

    def __init__(self, device: Device, team: Team, most: Load) -> None:
        self.device, self.team = device, team
        self._aside = device.empty(most.aside)
        self._given = [_Berth(device, most.given) for _ in range(BERTHS)]
        self._made = [_Berth(device, most.made) for _ in range(BERTHS)]

    def carry(self, parts: Iterable[Part]) -> None:
        """Have all parts made; raises what goes wrong with any."""
        try:
            self._carry(parts)
        except BaseException:
            self._come_to_rest()
            raise

    def _carry(self, parts: Iterable[Part]) -> None:
        up, compute, down = self.device.lanes
        turn, computed = 0, list[Mark]()
        for number, part in enumerate(parts):
            back = self._made[number % BERTHS]
            here, there = back.shaped(part.made.shape)
            for given, work in part.pieces:
                berth = self._given[turn % BERTHS]
                turn += 1
                pinned, placed = berth.shaped(given.shape)
                if berth.sent:
                    berth.sent.wait()  # what is filled now was copied from until then
                self._copy(pinned, given)
                sent = up.do(partial(self.device.copy, placed, pinned), after=berth.used)
                back.land(self._copy)  # what is computed next would be written over it
                computed = [compute.do(partial(work, placed, there, self._aside), after=[sent])]
                berth.sent, berth.used = sent, computed
            back.used = [down.do(partial(self.device.copy, here, there), after=computed)]
            back.waiting = here, part.made
        for back in self._made:
            back.land(self._copy)

    def _copy(self, target: Array, source: Array) -> None:
        """By all threads; of arrays (batch, channel, …)."""

        def work(first: int, last: int) -> None:
            np.copyto(target[:, first:last], source[:, first:last])

        self.team.share(work, source.shape[1])

    def _come_to_rest(self) -> None:
        """Until nothing is under way: memory may be used for something else then."""
        for berth in (*self._given, *self._made):
            berth.sent, berth.used, berth.waiting = None, [], None
        for lane in self.device.lanes:
            lane.do(lambda: None).wait()


class _Berth:
    """Memory on both sides. ``sent`` and ``used`` are when what was copied last from the host had
    left it, and when it was needed no more; ``waiting`` came back and is to be copied."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._here, self._there = device.pinned(nbytes), device.empty(nbytes)
        self.sent: Mark | None = None
        self.used: list[Mark] = []
        self.waiting: tuple[Array, Array] | None = None

    def shaped(self, shape: tuple[int, ...]) -> tuple[Array, Any]:
        """An array of this shape: on the host, on the device."""
        return floats(self._here, shape), floats(self._there, shape)

    def land(self, copy: Callable[[Array, Array], None]) -> None:
        """Bring what came back to where it belongs."""
        if self.waiting is not None:
            here, made = self.waiting
            self.waiting = None
            self.used[0].wait()
            copy(made, here)
