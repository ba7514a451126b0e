"""Run a plan on a column, slab after slab: nothing is computed twice along z.

What is kept of every array lies in pages, one for every plane of a sample, which are allocated
once and serve all columns: what is kept is never moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.columns import Column, Part, Strand, Turn
from znni_dask.devices.base import Device
from znni_dask.executors.serial import ferry_to, prepared
from znni_dask.executors.spent import Spent
from znni_dask.geometry import Box, Size, add
from znni_dask.kernels.direct import SLACK_BYTES
from znni_dask.kernels.memory import Bytes, allocate, odd_lines
from znni_dask.kernels.pages import GATHER, SCATTER, pages_library
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU_RAM
from znni_dask.network.field_of_view import Interval
from znni_dask.network.network import Network
from znni_dask.pages import ColumnMemory, Pages, shape_of
from znni_dask.primitives.base import Array, Primitive, Problem, Shape
from znni_dask.primitives.fragments import recombine
from znni_dask.primitives.planes import Planes, step_bytes, takes_planes
from znni_dask.schedule import Stored

Numbers = NDArray[np.int64]


class ColumnExecutor(Closing):
    """Computes columns of one network on the CPU, whose memory is no larger than ``memory``;
    prepared weights are kept between columns. Some primitives have a ``device`` compute sub-layers
    of slabs, of which the host keeps all planes.

    Not for use by several threads at once. Use it as a context manager, or `close` it, and with it
    the device.
    """

    def __init__(
        self,
        network: Network,
        primitives: Mapping[str, Primitive],
        memory: ColumnMemory,
        threads: int,
        device: Device | None = None,
    ) -> None:
        self.network = network
        self._seconds: defaultdict[Stored, float] = defaultdict(float)
        self._team = Team(threads)
        self._device = device
        self._ferry = device and memory.lent and ferry_to(device, self._team, memory.lent)
        self._prepared = prepared(network, primitives)
        self._pool = _Pool(memory.pages)
        self._copies = allocate(memory.copies_bytes + SLACK_BYTES)
        self._slab = allocate(memory.slab_bytes)

    def slabs(
        self, column: Column, read: Callable[[Interval], NDArray[np.generic]]
    ) -> Iterator[tuple[Box, Array]]:
        """Make a column: slab after slab its box and the answer there, (channel, z, y, x), which
        serves until the next is asked for.

        ``read`` gives planes of the extended volume within ``column.input``, counted from there:
        (channel, z, y, x), of any real dtype. In every pass each is asked for once, in order.
        """
        for number, offset in enumerate(column.offsets, start=1):
            self._pool.free_all()
            run = _Run(column, offset, self._pool, self._team, self._copies, self._slab)
            for turn in column.turns():
                if turn.operation is not None:
                    begin = perf_counter()
                    self._compute(run, turn)
                    self._seconds[turn.operation.output] += perf_counter() - begin
                elif turn.makes:
                    run.load(turn.makes[0], read)
                elif (made := run.give(turn.reads[0])) and number == len(column.offsets):
                    yield made
                run.free(turn.freed)

    def _compute(self, run: _Run, turn: Turn) -> None:
        operation = turn.operation
        assert operation is not None
        problem = run.problem(turn)
        ready = self._prepared.get(operation.output.name)
        for part in turn.makes:
            run.begin(part)
        primitive = operation.primitive
        if takes_planes(primitive, problem.layer, operation.inputs[0].form):
            planes = [run.planes((part,)) for part in turn.reads]
            primitive.apply_planes(ready, problem, planes, run.planes(turn.makes), self._team)
            return
        *inputs, made = run.in_one_piece([*turn.reads, *turn.makes[:1]], len(turn.makes))
        for array, part in zip(inputs, turn.reads, strict=True):
            run.copy(GATHER, (part,), array)
        lent = primitive.device == GPU_RAM
        primitive.apply(ready, problem, inputs, made, self._ferry if lent else self._team)
        run.copy(SCATTER, turn.makes, made)

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return Spent(seconds)

    def close(self) -> None:
        """End the threads and free the memory."""
        self._team.close()
        self._ferry = None
        if self._device is not None:
            self._device.close()
        self._pool = _Pool(Pages((), (), {}))
        self._copies = self._slab = np.empty(0, np.uint8)


class _Pool:
    """Pages in memory; those of every size that are free."""

    def __init__(self, pages: Pages) -> None:
        self._sizes = pages.sizes
        both = list(zip(pages.counts, pages.nbytes, strict=True))
        self._memory = [allocate(count * nbytes) for count, nbytes in both]
        self._all = [
            memory.ctypes.data + nbytes * np.arange(count, dtype=np.int64)
            for memory, (count, nbytes) in zip(self._memory, both, strict=True)
        ]
        self.free_all()

    def free_all(self) -> None:
        """All pages are free."""
        self._free = [addresses.copy() for addresses in self._all]
        self._left = [len(addresses) for addresses in self._all]

    def take(self, array: Stored, count: int) -> Numbers:
        """Addresses of so many pages for an array."""
        which = self._sizes[array]
        self._left[which] = left = self._left[which] - count
        assert left >= 0, "more pages are held than were counted"
        return self._free[which][left : left + count].copy()

    def give_back(self, array: Stored, addresses: Numbers) -> None:
        """Pages of an array that are free again."""
        which = self._sizes[array]
        left = self._left[which]
        self._free[which][left : left + addresses.size] = addresses.reshape(-1)
        self._left[which] = left + addresses.size


class _Run:
    """The arrays of one pass over a column, the volume moved by ``offset``: where every plane of a
    strand lies."""

    def __init__(
        self,
        column: Column,
        offset: Size,
        pool: _Pool,
        team: Team,
        copies: Bytes,
        slab: Bytes,
    ) -> None:
        self._column, self._offset, self._pool, self._team = column, offset, pool, team
        self._copies, self._slab = copies, slab.view(np.float32)
        self._tables: dict[Strand, Numbers] = {}
        self._given = 0

    def problem(self, turn: Turn) -> Problem:
        """What a turn computes."""
        assert turn.operation is not None
        reads = [part.planes for part in turn.reads]
        return self._column.problem(turn.operation, turn.makes[0].planes, reads)

    def load(self, part: Part, read: Callable[[Interval], NDArray[np.generic]]) -> None:
        """Read planes of the volume."""
        moved, y, x = self._offset
        first = self._first(part.strand) - moved
        start, stop = (plane - first for plane in part.planes)
        self.begin(part)
        (out,) = self.in_one_piece([part], 1)
        out[0] = read((start, stop))[:, :, y : y + out.shape[3], x : x + out.shape[4]]
        self.copy(SCATTER, (part,), out)

    def give(self, part: Part) -> tuple[Box, Array] | None:
        """Weave the fragments of a branch into a slab, which is complete after the last, of the
        last pass. Slabs of several passes lie behind one another."""
        column, (strand, planes) = self._column, part
        spacing, output = column.schedules.layout.fragments, column.output
        start, stop = (
            min(output.start[0] + (plane - self._first(strand)) * spacing[0], output.stop[0])
            for plane in planes
        )
        box = Box((start, *output.start[1:]), (stop, *output.stop[1:]))
        channels = column.network.out_channels
        area = channels * box.size[1] * box.size[2]
        begin = area * (start - output.start[0]) if len(column.offsets) > 1 else 0
        answer = self._slab[begin : begin + area * (stop - start)].reshape(channels, *box.size)
        (fragments,) = self.in_one_piece([part], 1)
        self.copy(GATHER, (part,), fragments)
        places = column.positions(strand.branch)
        numbers = {add(place, self._offset): i for i, place in enumerate(places)}
        recombine(fragments, numbers, spacing, answer, self._team)
        self._given = (self._given + 1) % column.branches.count
        return None if self._given else (box, answer)

    def begin(self, part: Part) -> None:
        """Take pages for planes that are made."""
        strand, (start, stop) = part
        if strand not in self._tables:
            box, (samples, *_) = self._column.boxes[strand.array.name], self._shape(part)
            self._tables[strand] = np.zeros((samples, box.size[0]), np.int64)
        table, first = self._tables[strand], self._first(strand)
        pages = self._pool.take(strand.array, len(table) * (stop - start))
        table[:, start - first : stop - first] = pages.reshape(len(table), -1)

    def free(self, parts: tuple[Part, ...]) -> None:
        """Give back the pages of planes that nobody reads again."""
        for part in parts:
            self._pool.give_back(part.strand.array, self._pages(part))

    def in_one_piece(self, parts: list[Part], makes: int) -> list[Array]:
        """Memory for copies of some planes, the last of so many branches."""
        found, begin = [], 0
        for number, part in enumerate(parts):
            branches = makes if number == len(parts) - 1 else 1
            form, shape = part.strand.array.form, self._shape(part, branches)
            nbytes = form.nbytes(shape)
            memory = self._copies[begin : begin + nbytes]
            found.append(memory.view(np.float32).reshape(form.stored(shape)))
            begin += odd_lines(nbytes)
        return found

    def planes(self, parts: tuple[Part, ...]) -> Planes:
        """Where planes of one branch after the other lie."""
        table = np.concatenate([self._pages(part) for part in parts])
        shape = parts[0].strand.array.form.stored(self._shape(parts[0], len(parts)))
        return Planes(table, step_bytes(shape), shape)

    def copy(self, how: str, parts: tuple[Part, ...], array: Array) -> None:
        """Copy planes of one branch after the other from or to an array in one piece."""
        addresses, step_bytes, (samples, blocks, planes, *_) = self.planes(parts)
        table = np.ascontiguousarray(addresses)
        told = blocks, planes, step_bytes
        places = table.ctypes.data, array.ctypes.data
        self._team.run(pages_library()[how], (*places, *told), samples * blocks * planes)

    def _pages(self, part: Part) -> Numbers:
        first = self._first(part.strand)
        start, stop = (plane - first for plane in part.planes)
        return self._tables[part.strand][:, start:stop]

    def _first(self, strand: Strand) -> int:
        return self._column.boxes[strand.array.name].start[0]

    def _shape(self, part: Part, branches: int = 1) -> Shape:
        start, stop = part.planes
        return shape_of(self._column, part.strand.array, stop - start, branches)
