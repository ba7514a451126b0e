"""What the arrays of a column take: pages, one for every plane of a sample.

Pages of about one size are shared by all arrays of such planes, so that what is read no more makes
room for what comes next. Arithmetic on shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from znni_dask.columns import Column, Part
from znni_dask.kernels.memory import odd_lines
from znni_dask.primitives.base import Shape
from znni_dask.schedule import Stored

_ALIKE = 0.8  # of the largest page that is shared


@dataclass(frozen=True)
class Pages:
    """So many pages of so many bytes, of several sizes; and which every array takes."""

    nbytes: tuple[int, ...]
    counts: tuple[int, ...]
    sizes: Mapping[Stored, int]

    @property
    def all_bytes(self) -> int:
        """All of them."""
        return sum(count * nbytes for count, nbytes in zip(self.counts, self.nbytes, strict=True))


@dataclass(frozen=True)
class ColumnMemory:
    """What a column takes: pages; arrays in one piece, for what does not take pages; and what
    primitives compute in."""

    pages: Pages
    copies_bytes: int
    workspace_bytes: int


def memory_of(column: Column, threads: int) -> ColumnMemory:
    """The memory of a column, whose boxes are the largest there are."""
    sizes = _sizes(column)
    held = [0] * (max(sizes.values(), default=-1) + 1)
    most, copies, workspace = list(held), 0, 0
    seen = set()
    for turn in column.turns():
        for part in turn.makes:
            which = sizes[part.strand.array]
            held[which] += pages_in(column, part)
            most[which] = max(most[which], held[which])
        for part in turn.freed:
            held[sizes[part.strand.array]] -= pages_in(column, part)
        copies = max(copies, copies_bytes(column, turn.reads, turn.makes))
        if turn.operation is not None and turn.problem is not None:
            key = turn.operation.output, turn.problem.inputs, turn.problem.output
            if key not in seen:
                seen.add(key)
                need = turn.operation.primitive.workspace_bytes(turn.problem, threads)
                workspace = max(workspace, need)
    nbytes = [0] * len(most)
    for array, which in sizes.items():
        nbytes[which] = max(nbytes[which], page_bytes(column, array))
    return ColumnMemory(Pages(tuple(nbytes), tuple(most), sizes), copies, workspace)


def shape_of(column: Column, array: Stored, planes: int, branches: int) -> Shape:
    """The shape of so many planes of an array of some branches."""
    schedules, (_, y, x) = column.schedules, column.boxes[array.name].size
    samples = len(schedules.positions[array.name]) * branches // column.share(array.name)
    return samples, schedules.layout.network.channels[array.name], planes, y, x


def page_bytes(column: Column, array: Stored) -> int:
    """A plane of a sample; an odd number of cache lines, lest all begin on the same ones."""
    _, channels, _, y, x = shape_of(column, array, 1, 1)
    return odd_lines(array.form.nbytes((1, channels, 1, y, x)))


def pages_in(column: Column, part: Part) -> int:
    """How many pages some planes take."""
    start, stop = part.planes
    samples, *_ = shape_of(column, part.strand.array, 1, 1)
    return samples * (stop - start)


def copies_bytes(column: Column, *parts: Sequence[Part]) -> int:
    """Memory of copies in one piece of all these planes."""
    return sum(
        odd_lines(
            part.strand.array.form.nbytes(
                shape_of(column, part.strand.array, part.planes[1] - part.planes[0], 1)
            )
        )
        for some in parts
        for part in some
    )


def _sizes(column: Column) -> dict[Stored, int]:
    """For every array the number of the size of its pages, from the largest."""
    operations = column.schedules.operations
    arrays = [column.source, *(operation.output for operation in operations)]
    nbytes = {array: page_bytes(column, array) for array in arrays}
    found: dict[Stored, int] = {}
    number, largest = -1, 0
    for array in sorted(arrays, key=lambda a: -nbytes[a]):
        if number < 0 or nbytes[array] < _ALIKE * largest:
            number, largest = number + 1, nbytes[array]
        found[array] = number
    return found
