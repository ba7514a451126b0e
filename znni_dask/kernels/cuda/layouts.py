"""How tiles lie in arrays, and in the shared memory of a block.

Arithmetic on whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from znni_dask.geometry import Size, ceil_divide, triple, volume

PAIR_BYTES = 8
SHARED_BYTES = 163 << 10  # that a block may have where the compute capability is 8.0, 9.0 or 10.0
SECTOR = 4  # complex numbers that are written as one
_BANKS = 16  # complex numbers side by side that are read at once
_REGISTERS, _PROCESSOR_BYTES = 1 << 16, 163 << 10  # that blocks share on one multiprocessor
_BLOCKS = 4  # that it has at least room for, where they need little
_OTHER_REGISTERS = 48  # of a thread, besides the values of a line


class Rows(NamedTuple):
    """How tiles lie in an array: their number along each axis for one phase, the phases, how far
    apart voxels of a phase lie, how many of these from tile to tile, and where the first tile
    begins."""

    tiles: Size
    phases: Size
    step: Size
    advance: Size
    offset: Size

    @property
    def of_sample(self) -> int:
        """Rows of one sample."""
        return volume(self.tiles) * volume(self.phases)

    @property
    def numbers(self) -> tuple[int, ...]:
        """As kernels are told."""
        return tuple(number for size in self for number in size)

    def place(self, row: int) -> tuple[int, Size]:
        """The sample of a row, and the first voxel of its tile: tiles come along x first, then
        along y and z, then the phases in the same order."""
        found = list(self.offset)
        apart = [advance * step for advance, step in zip(self.advance, self.step, strict=True)]
        for counts, distances in ((self.tiles, apart), (self.phases, (1, 1, 1))):
            for axis in (2, 1, 0):
                row, index = divmod(row, counts[axis])
                found[axis] += index * distances[axis]
        return row, triple(found)


@dataclass(frozen=True)
class Layout:
    """A tile of ``size`` in shared memory, of which ``planes`` are there, for so many channels."""

    size: Size
    planes: int
    channels: int

    @property
    def half(self) -> int:
        """Frequencies along x."""
        return self.size[2] // 2 + 1

    @property
    def row(self) -> int:
        """Complex numbers from row to row: an odd number."""
        return self.half | 1

    @property
    def plane(self) -> int:
        """From plane to plane."""
        return _follows(self.size[1] * self.row, self.half)

    @property
    def tile(self) -> int:
        """From channel to channel."""
        return _follows(self.planes * self.plane, _BANKS // self.channels)

    @property
    def nbytes(self) -> int:
        """Shared memory."""
        return PAIR_BYTES * self.tile * self.channels

    def threads(self, *passes: int) -> int:
        """Threads of a block that goes over so many lines one time after another: those of whom
        fewest have nothing to do, among numbers for whose registers there is room."""
        blocks = max(1, min(_BLOCKS, _PROCESSOR_BYTES // self.nbytes))
        most = min(1024, _REGISTERS // (blocks * (2 * max(self.size) + _OTHER_REGISTERS)))
        counts = range(32, most // 32 * 32 + 1, 32)
        enough = [n for n in counts if 2 * n > most] or [counts[-1]]
        return min(enough, key=lambda n: (sum(n * ceil_divide(p, n) for p in passes), -n))


def _follows(least: int, place: int) -> int:
    """The smallest number not below ``least`` that lies at this place among the banks."""
    return least + (place - least) % _BANKS


@dataclass(frozen=True)
class GpuTile:
    """What a GPU makes of a tile: its size, and how much of it is outputs (z, y, x)."""

    size: Size
    made: Size

    @property
    def half(self) -> int:
        """Frequencies along x: the others are their conjugates."""
        return self.size[2] // 2 + 1

    @property
    def frequencies(self) -> int:
        """Complex numbers of its spectrum."""
        return self.size[0] * self.size[1] * self.half

    @property
    def shared_bytes(self) -> int:
        """What a block needs at least."""
        return Layout(self.size, self.size[0], 1).nbytes

    def refusal(self) -> str | None:
        """Why a block has no room for it; None where it has."""
        if self.shared_bytes <= SHARED_BYTES:
            return None
        return (
            f"a tile takes {self.shared_bytes >> 10} KiB of shared memory, more than the "
            f"{SHARED_BYTES >> 10} KiB that a block may have"
        )

    def before(self, channels: int) -> Layout:
        """How `forward` holds it, of an array of so many channels."""
        return _layout(self.size, self.size[0], channels)

    def behind(self, channels: int) -> Layout:
        """How `inverse` holds it."""
        return _layout(self.size, self.made[0], channels)


def _layout(size: Size, planes: int, channels: int) -> Layout:
    """That of as many channels as fill a sector, or as there is room for."""
    sizes = (SECTOR, SECTOR // 2, 1)
    layouts = [Layout(size, planes, n) for n in sizes if n < 2 * channels or n == 1]
    return next((one for one in layouts if one.nbytes <= SHARED_BYTES), layouts[-1])
