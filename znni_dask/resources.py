"""What a run has of memory and threads, and how what is left of the memory is used.

Both planners share it: of patches and of windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from znni_dask.costs import Costs
from znni_dask.geometry import Box, Size, volume
from znni_dask.plan import Reading
from znni_dask.reading import Reads
from znni_dask.storage.cells import Cells

MOST_BLOCKS_IN_FLIGHT = 3  # one being read, one computed, one written
_WORTH_FEWER_IN_FLIGHT = 1.1  # times slower that overlapping reads and writes may make computing

C = TypeVar("C")


@dataclass(frozen=True, eq=False, kw_only=True)
class Resources:
    """What a run has, and what its reading and writing takes.

    ``unit`` is the output's chunk or shard; ``read_bytes`` the memory that reading a box of a
    size takes, directly or (``by_cells=True``) by the volume's ``cells``; ``write_bytes`` the
    memory that writing takes beside the values. A voxel as it is stored, with all outputs, takes
    ``voxel_bytes``, and ``encoding_bytes`` while it is encoded. ``baseline_bytes`` is what the
    process uses before it computes. ``block`` is that of a run that is resumed. Only the outputs
    within ``hull`` are made; to tell which of them are selected takes ``selected_bytes`` for each
    voxel of a block. ``costs`` are what the machine takes.
    """

    unit: Size
    voxel_bytes: int
    encoding_bytes: int
    read_bytes: Callable[..., int]
    write_bytes: int
    baseline_bytes: int
    allowed_bytes: int
    threads: int
    hull: Box
    cells: Cells | None = None
    block: Size | None = None
    selected_bytes: int = 0
    costs: Costs = field(default_factory=Costs)

    def block_bytes(self, size: Size, region: Size, by_cells: bool = False) -> int:
        """Memory that a block of ``size`` takes while it is in flight, its computing not counted;
        ``region`` is the size of what it reads."""
        written = self.voxel_bytes * volume(size)
        most = max(self.read_bytes(region, by_cells=by_cells) + written, written + self.write_bytes)
        return most + self.selected_bytes * volume(size)


def most_in_flight(
    find: Callable[[int], C | None], cost: Callable[[C], float]
) -> tuple[C, int] | None:
    """The best that fits, and its blocks in flight.

    ``find`` gives the best that fits with so many blocks in flight. More in flight, which hides
    reading and writing, is given up only for what computes much faster.
    """
    best: tuple[C, int] | None = None
    for in_flight in range(MOST_BLOCKS_IN_FLIGHT, 0, -1):
        found = find(in_flight)
        if found and (best is None or cost(found) * _WORTH_FEWER_IN_FLIGHT < cost(best[0])):
            best = (found, in_flight)
    return best


def shared_reading(
    resources: Resources, reads: Reads, needed_bytes: Callable[[bool], int]
) -> tuple[Reading, int]:
    """How blocks share what is decoded, in the memory that is left, and the bytes needed in all;
    ``needed_bytes`` are those needed without, where volumes are read directly or by cells."""
    by_cells = needed_bytes(True)
    reading = reads.best(resources.allowed_bytes - by_cells)
    if reading.cache_bytes:
        return reading, by_cells + reading.cache_bytes
    return reading, needed_bytes(False)
