"""Run a plan on a column, slab after slab, on a device that keeps what is read again.

It is asked for a slab ahead: while it computes one, the host takes the answer of the one before,
and reads planes for the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.columns import Column, Part, Turn
from znni_dask.devices.base import Device, Mark
from znni_dask.executors.device import placed
from znni_dask.executors.lanes import Clock, Done
from znni_dask.executors.spent import Spent
from znni_dask.executors.strands import Pool, Strands
from znni_dask.geometry import Box
from znni_dask.kernels.cuda.kernel import Kernel
from znni_dask.kernels.cuda.paging import GATHER, SCATTER, blocks
from znni_dask.kernels.memory import floats
from znni_dask.network.field_of_view import Interval
from znni_dask.network.network import Network
from znni_dask.pages import ColumnMemory
from znni_dask.primitives.base import Array, Primitive
from znni_dask.primitives.gpu.fragments import weave
from znni_dask.resources import SLOTS
from znni_dask.schedule import Stored
from znni_dask.timeline import Span

_Read = Callable[[Interval], NDArray[np.generic]]


class DeviceColumnExecutor(Closing):
    """Computes columns of one network on a device, all that is kept in its memory, which is no
    larger than ``memory``; prepared weights are kept between columns.

    Not for use by several threads at once. Use it as a context manager, or `close` it, and with it
    the device.
    """

    def __init__(
        self,
        network: Network,
        primitives: Mapping[str, Primitive],
        memory: ColumnMemory,
        device: Device,
    ) -> None:
        self._device, self._clock = device, Clock(device)
        self._seconds: defaultdict[Stored, float] = defaultdict(float)
        self._spans: list[Span] = []
        self._placed = placed(network, primitives, device)
        both = list(zip(memory.pages.counts, memory.pages.nbytes, strict=True))
        memories = [device.empty(count * nbytes).view(np.float32) for count, nbytes in both]
        self._pages = {array: memories[which] for array, which in memory.pages.sizes.items()}
        self._page_bytes = {a: memory.pages.nbytes[n] for a, n in memory.pages.sizes.items()}
        self._pool = Pool(memory.pages, [np.arange(n, dtype=np.int64) for n, _ in both])
        self._copies = device.empty(memory.copies_bytes)
        device.scratch(memory.workspace_bytes)
        self._given = [_Berth(device, memory.loaded_bytes) for _ in range(SLOTS)]
        self._made = [_Berth(device, memory.slab_bytes) for _ in range(SLOTS)]

    def slabs(
        self, column: Column, read: _Read, is_at_hand: Callable[[Interval], bool]
    ) -> Iterator[tuple[Box, Array]]:
        """The same as `ColumnExecutor.slabs`, of columns that are made in one pass. Before a slab
        is given the next one is begun, as far as the planes for it are ``at_hand`` for ``read``."""
        (offset,) = column.offsets
        self._come_to_rest()
        self._pool.free_all()
        run = Strands(column, offset, self._pool, self._copies)
        waiting: _Slab | None = None
        marks: list[tuple[Stored, Mark, Mark]] = []
        spans: list[Done] = []
        slabs = loads = 0
        for turn in column.turns():
            if turn.operation is not None:
                spans.append(self._compute(run, turn, marks))
            elif turn.makes:
                planes = run.planes_of_volume(turn.makes[0])
                if waiting and not is_at_hand(planes):
                    yield self._landed(waiting)
                    waiting = None
                berth = self._given[loads % SLOTS]
                spans += self._load(run, turn.makes[0], read(planes), berth)
                loads += 1
            else:
                berth = self._made[slabs % SLOTS]
                spans.append(self._weave(run, turn.reads[0], berth))
                if turn.reads[0].strand.branch == column.branches.count - 1:
                    begun = self._begin_landing(run, turn.reads[0], berth, marks, spans)
                    marks, spans = [], []
                    slabs += 1
                    if waiting:
                        yield self._landed(waiting)
                    waiting = begun
            run.free(turn.freed)
        if waiting:
            yield self._landed(waiting)

    def _load(
        self, run: Strands, part: Part, values: NDArray[np.generic], berth: _Berth
    ) -> list[Done]:
        """Send planes of the volume there, and into their pages."""
        berth.wait()
        run.begin(part)
        here, there = berth.shaped(run.stored([part]))
        _, y, x = run.offset
        here[0] = values[:, :, y : y + here.shape[3], x : x + here.shape[4]]
        sent = self._clock.do("up", partial(self._device.copy, there, here))
        copy = self._copying(SCATTER, run, [part], there)
        kept = self._clock.do("compute", copy, [sent.end])
        berth.used = kept.end
        return [sent, kept]

    def _compute(self, run: Strands, turn: Turn, marks: list[tuple[Stored, Mark, Mark]]) -> Done:
        operation, device = turn.operation, self._device
        assert operation is not None
        problem, output = run.problem(turn), operation.output
        for part in turn.makes:
            run.begin(part)
        *inputs, made = run.in_one_piece([*turn.reads, *turn.makes[:1]], len(turn.makes))
        reads = [
            self._copying(GATHER, run, [part], array)
            for array, part in zip(inputs, turn.reads, strict=True)
        ]
        ready, compute = self._placed.get(output.name), operation.primitive.apply
        keep = self._copying(SCATTER, run, turn.makes, made)

        def work() -> None:
            begin = device.lanes.compute.mark()
            for read in reads:
                read()
            compute(ready, problem, inputs, made, device)
            keep()
            marks.append((output, begin, device.lanes.compute.mark()))

        return self._clock.do("compute", work)

    def _weave(self, run: Strands, part: Part, berth: _Berth) -> Done:
        """Weave the fragments of a branch into a slab."""
        column, device = run.column, self._device
        shape = column.network.out_channels, *run.given_box(part).size
        (fragments,) = run.in_one_piece([part], 1)
        _, slab = berth.shaped(shape)
        read = self._copying(GATHER, run, [part], fragments)
        numbers = run.numbers(part.strand.branch)
        spacing = column.schedules.layout.fragments

        def work() -> None:
            read()
            weave(fragments, numbers, spacing, slab, device)

        return self._clock.do("compute", work)

    def _begin_landing(
        self,
        run: Strands,
        part: Part,
        berth: _Berth,
        marks: list[tuple[Stored, Mark, Mark]],
        spans: list[Done],
    ) -> _Slab:
        """Have a slab that is complete brought back."""
        box = run.given_box(part)
        here, there = berth.shaped((run.column.network.out_channels, *box.size))
        back = self._clock.do("down", partial(self._device.copy, here, there), [spans[-1].end])
        return _Slab(box, here, marks, [*spans, back])

    def _landed(self, slab: _Slab) -> tuple[Box, Array]:
        """A slab, when it is here."""
        slab.done[-1].end.wait()
        self._spans.extend(map(self._clock.span, slab.done))
        for array, begin, end in slab.marks:
            self._seconds[array] += end.seconds_since(begin)
        return slab.box, slab.answer

    def _copying(
        self, kernel: Kernel, run: Strands, parts: Sequence[Part], array: Any
    ) -> Callable[[], None]:
        """What copies planes of one branch after the other from or to an array in one piece, within
        a lane."""
        stored, numbers = parts[0].strand.array, np.ascontiguousarray(run.pages(parts))
        samples, channels, planes, *area = run.stored(parts)
        told = samples, channels, planes, prod(area)
        step = self._page_bytes[stored] // array.itemsize
        pages, device = self._pages[stored], self._device

        def work() -> None:
            names = device.xp.asarray(numbers)
            device.launch(kernel, blocks(*told), pages, names, array, *told, step)

        return work

    def _come_to_rest(self) -> None:
        """Until nothing of a column before is under way, whatever became of it."""
        for berth in (*self._given, *self._made):
            berth.used = None
        for lane in self._device.lanes:
            lane.do(lambda: None).wait()

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        spent = Spent(self._seconds, self._spans)
        self._seconds, self._spans = defaultdict(float), []
        return spent

    def close(self) -> None:
        """Give the device's memory back, and close it."""
        self._placed.clear()
        self._pages.clear()
        self._given.clear()
        self._made.clear()
        self._copies = None
        self._device.close()


class _Slab(NamedTuple):
    """A slab on its way back: its box, the answer when it is here, what every array took, and what
    lanes were asked for, its way back last."""

    box: Box
    answer: Array
    marks: list[tuple[Stored, Mark, Mark]]
    done: list[Done]


class _Berth:
    """Memory on both sides, ``used`` until a mark is passed."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._here, self._there = device.pinned(nbytes), device.empty(nbytes)
        self.used: Mark | None = None

    def wait(self) -> None:
        """Until it is used no more."""
        if self.used is not None:
            self.used.wait()

    def shaped(self, shape: tuple[int, ...]) -> tuple[Array, Any]:
        """An array of this shape: on the host, on the device."""
        return floats(self._here, shape), floats(self._there, shape)
