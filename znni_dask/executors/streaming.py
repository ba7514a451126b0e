"""Run a plan on a column, slab after slab: nothing is computed twice along z.

What is kept of every array lies in pages, one for every plane of a sample, which are allocated
once and serve all columns: what is kept is never moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.columns import Column, Part, Turn
from znni_dask.devices.base import Device
from znni_dask.executors.serial import ferry_to, prepared
from znni_dask.executors.spent import Spent
from znni_dask.executors.strands import Pool, Strands
from znni_dask.geometry import Box, Size
from znni_dask.kernels.direct import SLACK_BYTES
from znni_dask.kernels.memory import Bytes, allocate
from znni_dask.kernels.pages import GATHER, SCATTER, pages_library
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU_RAM
from znni_dask.network.field_of_view import Interval
from znni_dask.network.network import Network
from znni_dask.pages import ColumnMemory
from znni_dask.primitives.base import Array, Primitive
from znni_dask.primitives.fragments import recombine
from znni_dask.primitives.planes import Planes, step_bytes, takes_planes
from znni_dask.schedule import Stored


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
        both = zip(memory.pages.counts, memory.pages.nbytes, strict=True)
        self._memory = [(allocate(count * nbytes), count, nbytes) for count, nbytes in both]
        self._pool = Pool(
            memory.pages,
            [
                pages.ctypes.data + nbytes * np.arange(count, dtype=np.int64)
                for pages, count, nbytes in self._memory
            ],
        )
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
            run = _OnHost(column, offset, self._pool, self._team, self._copies, self._slab)
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

    def _compute(self, run: _OnHost, turn: Turn) -> None:
        operation = turn.operation
        assert operation is not None
        problem = run.problem(turn)
        ready = self._prepared.get(operation.output.name)
        for part in turn.makes:
            run.begin(part)
        primitive = operation.primitive
        if takes_planes(primitive, problem.layer, operation.inputs[0].form):
            planes = [run.planes([part]) for part in turn.reads]
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
        self._memory.clear()
        self._copies = self._slab = np.empty(0, np.uint8)


class _OnHost(Strands):
    """In memory of the host, where pages are known by their addresses; a ``team`` copies."""

    def __init__(
        self, column: Column, offset: Size, pool: Pool, team: Team, copies: Bytes, slab: Bytes
    ) -> None:
        super().__init__(column, offset, pool, copies)
        self._team, self._slab = team, slab.view(np.float32)
        self._given = 0

    def load(self, part: Part, read: Callable[[Interval], NDArray[np.generic]]) -> None:
        """Read planes of the volume."""
        _, y, x = self.offset
        self.begin(part)
        (out,) = self.in_one_piece([part], 1)
        out[0] = read(self.planes_of_volume(part))[:, :, y : y + out.shape[3], x : x + out.shape[4]]
        self.copy(SCATTER, (part,), out)

    def give(self, part: Part) -> tuple[Box, Array] | None:
        """Weave the fragments of a branch into a slab, which is complete after the last, of the
        last pass. Slabs of several passes lie behind one another."""
        column, box = self.column, self.given_box(part)
        channels = column.network.out_channels
        area = channels * box.size[1] * box.size[2]
        begin = area * (box.start[0] - column.output.start[0]) if len(column.offsets) > 1 else 0
        answer = self._slab[begin : begin + area * box.size[0]].reshape(channels, *box.size)
        (fragments,) = self.in_one_piece([part], 1)
        self.copy(GATHER, (part,), fragments)
        spacing = column.schedules.layout.fragments
        recombine(fragments, self.numbers(part.strand.branch), spacing, answer, self._team)
        self._given = (self._given + 1) % column.branches.count
        return None if self._given else (box, answer)

    def planes(self, parts: Sequence[Part]) -> Planes:
        """Where planes of one branch after the other lie."""
        shape = self.stored(parts)
        return Planes(self.pages(parts), step_bytes(shape), shape)

    def copy(self, how: str, parts: Sequence[Part], array: Array) -> None:
        """Copy planes of one branch after the other from or to an array in one piece."""
        addresses, step_bytes, (samples, blocks, planes, *_) = self.planes(parts)
        table = np.ascontiguousarray(addresses)
        told = blocks, planes, step_bytes
        places = table.ctypes.data, array.ctypes.data
        self._team.run(pages_library()[how], (*places, *told), samples * blocks * planes)
