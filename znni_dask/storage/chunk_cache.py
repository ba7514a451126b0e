"""A bounded cache of decoded chunks, shared by the blocks that a worker reads.

Blocks read their regions with halo, which lie over one another: without a cache every chunk there
is decoded several times. Which blocks read a cell, and when, is known beforehand. So a cell is
dropped as soon as all have had it, and where there is no room, that cell goes which is needed
last (Belady 1966).
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from znni_dask.errors import RunError
from znni_dask.geometry import Box, Size, triple
from znni_dask.storage.cells import Cells, joined
from znni_dask.storage.volume import Values, Volume

Key = tuple[int, Size]  # time point, cell
Users = Callable[[int, Size], set[int]]


@dataclass(eq=False)
class _Kept:
    """A decoded cell, and the turns of the blocks that are still to read it."""

    values: Values
    left: set[int]

    @property
    def next(self) -> int:
        return min(self.left)


@dataclass(eq=False)
class ChunkCache:
    """Reads a volume through at most ``capacity_bytes`` of decoded cells that are kept.

    Blocks take turns, numbered in the order in which they are made; ``users`` tells the turns of
    all blocks that read a cell at a time point. Any number of threads may read. Without capacity,
    or of a volume that is not stored in chunks, everything is read directly.
    """

    volume: Volume
    capacity_bytes: int
    users: Users
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: dict[Key, _Kept] = field(default_factory=dict)
    _bytes: int = 0
    _decoding: dict[Key, Future[Values]] = field(default_factory=dict)
    _turns: set[int] = field(default_factory=set)
    _ended: set[int] = field(default_factory=set)  # turns after the oldest that goes on
    _furthest: list[tuple[int, Key]] = field(default_factory=list)  # a heap, of -next; may be old

    @contextmanager
    def turn(self, number: int) -> Iterator[BlockReader]:
        """What reads for one block, whose turn it is."""
        with self._lock:
            self._turns.add(number)
        try:
            yield BlockReader(self, number)
        finally:
            with self._lock:
                self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """End a turn: blocks before all that go on now are had, here or on another worker."""
        oldest = min(self._turns)
        self._ended = {turn for turn in self._ended | {number} if turn >= oldest}
        for key, kept in list(self._kept.items()):
            kept.left = self._to_come(kept.left)
            if not kept.left:
                self._drop(key)
        self._turns.remove(number)
        self._furthest = [(-kept.next, key) for key, kept in self._kept.items()]
        heapq.heapify(self._furthest)

    def _to_come(self, turns: set[int]) -> set[int]:
        """Of the turns those that have not ended."""
        oldest = min(self._turns)
        return {turn for turn in turns if turn >= oldest and turn not in self._ended}

    def _drop(self, key: Key) -> None:
        self._bytes -= self._kept.pop(key).values.nbytes

    def _keep(self, key: Key, values: Values, left: set[int]) -> None:
        """Keep a cell, unless those that are kept are all needed sooner."""
        kept = _Kept(values, left)
        while self._bytes + values.nbytes > self.capacity_bytes:
            if not self._furthest:
                return
            turn, other = self._furthest[0]
            there = self._kept.get(other)
            if there is not None and there.next == -turn:
                if there.next <= kept.next:
                    return
                self._drop(other)
            heapq.heappop(self._furthest)
        self._kept[key] = kept
        self._bytes += values.nbytes
        heapq.heappush(self._furthest, (-kept.next, key))

    def _taken(self, key: Key, number: int) -> None:
        """Note that a block has had a cell."""
        if kept := self._kept.get(key):
            kept.left.discard(number)
            if kept.left:
                heapq.heappush(self._furthest, (-kept.next, key))
            else:
                self._drop(key)

    def _claimed(
        self, keys: list[Key]
    ) -> tuple[dict[Key, Values], dict[Key, Future[Values]], dict[Key, Future[Values]]]:
        """Of the cells those that are kept, those that another thread is decoding, and those that
        are now the caller's to decode."""
        held: dict[Key, Values] = {}
        others: dict[Key, Future[Values]] = {}
        mine: dict[Key, Future[Values]] = {}
        with self._lock:
            for key in keys:
                if key in self._kept:
                    held[key] = self._kept[key].values
                elif key in self._decoding:
                    others[key] = self._decoding[key]
                else:
                    mine[key] = self._decoding[key] = Future()
        return held, others, mine

    def _publish(self, key: Key, values: Values, number: int) -> None:
        """Hand a decoded cell to those that wait for it, and keep it for those to come."""
        users = self.users(*key) - {number}
        with self._lock:
            wanted = bool(self._to_come(users))
        if wanted:
            values = values.copy()  # of its own, so that it can be freed alone
        with self._lock:
            if left := self._to_come(users):  # others may have ended in the meantime
                self._keep(key, values, left)
            self._decoding.pop(key).set_result(values)

    def _give_up(self, claimed: dict[Key, Future[Values]]) -> None:
        """Cells that could not be decoded are not kept; who waits for them tries itself."""
        with self._lock:
            for key, future in claimed.items():
                if not future.done():
                    del self._decoding[key]
                    future.cancel()


@dataclass(eq=False)
class BlockReader:
    """Reads for one block. ``decoded_voxels`` counts voxels of the chunks that it decoded."""

    _cache: ChunkCache
    _number: int
    decoded_voxels: int = 0

    def read(self, box: Box, time: int = 0) -> Values:
        """The values within ``box``, as `Volume.read` gives them."""
        volume, cells = self._cache.volume, self._cache.volume.cells
        if cells is None or self._cache.capacity_bytes < cells.bytes:
            return self._directly(box, time)
        values = np.empty((volume.channels, *box.size), volume.dtype)
        for group in cells.groups(cells.touched(box)):
            self._fill(values, box, cells, group, time)
        return values

    def _directly(self, box: Box, time: int) -> Values:
        volume = self._cache.volume
        self.decoded_voxels += volume.decoded_box(box).voxels
        return volume.read(box, time)

    def _fill(self, values: Values, box: Box, cells: Cells, group: Box, time: int) -> None:
        """Put what a group of cells holds of a box into its place."""
        cache = self._cache
        keys = [(time, triple(cell)) for cell in product(*map(range, group.start, group.stop))]
        held, others, mine = cache._claimed(keys)
        try:
            self._take(values, box, cells, held)  # which makes room
            for part in joined([cell for _, cell in mine]):
                self._decode(values, box, cells, part, time)
        finally:
            cache._give_up(mine)
        for key, future in others.items():
            try:
                self._take(values, box, cells, {key: future.result()})
            except CancelledError:
                self._decode_wanted(values, box, cells.voxels_of(_one(key)), time)

    def _take(self, values: Values, box: Box, cells: Cells, held: dict[Key, Values]) -> None:
        """Copy cells that are decoded already."""
        for key, cell in held.items():
            _copy(cell, cells.voxels_of(_one(key)), values, box)
        with self._cache._lock:
            for key in held:
                self._cache._taken(key, self._number)

    def _decode(self, values: Values, box: Box, cells: Cells, part: Box, time: int) -> None:
        """Decode a box of cells, for this block and others."""
        where = cells.voxels_of(part)
        try:
            decoded = self._cache.volume.read(where, time)
        except RunError:  # perhaps of a chunk that this block does not need
            self._decode_wanted(values, box, where, time)
            return
        self.decoded_voxels += where.voxels
        _copy(decoded, where, values, box)
        for cell in product(*map(range, part.start, part.stop)):
            key = (time, triple(cell))
            there = cells.voxels_of(_one(key)).seen_from(where.start)
            self._cache._publish(key, decoded[(slice(None), *there.slices)], self._number)

    def _decode_wanted(self, values: Values, box: Box, where: Box, time: int) -> None:
        """Decode what a box needs of another, for this block alone."""
        if wanted := box.shared(where):
            _copy(self._directly(wanted, time), wanted, values, box)


def _one(key: Key) -> Box:
    """A cell as a box of cells."""
    _, cell = key
    return Box(cell, triple(i + 1 for i in cell))


def _copy(source: Values, where: Box, target: Values, box: Box) -> None:
    """Copy what two arrays that lie over ``where`` and ``box`` have in common."""
    if shared := where.shared(box):
        here, there = shared.seen_from(box.start), shared.seen_from(where.start)
        target[(slice(None), *here.slices)] = source[(slice(None), *there.slices)]
