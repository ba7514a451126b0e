"""Boxes and sizes in (z, y, x): plain whole numbers, shared by every module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

Size = tuple[int, int, int]
AXES = ("z", "y", "x")


@dataclass(frozen=True)
class Box:
    """Half-open box ``[start, stop)`` in (z, y, x)."""

    start: Size
    stop: Size

    @property
    def size(self) -> Size:
        """Edge lengths; the box is not empty where all are positive."""
        return subtract(self.stop, self.start)

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return volume(self.size)

    def shifted(self, offset: Size) -> Box:
        """The same box moved by ``offset``."""
        return Box(add(self.start, offset), add(self.stop, offset))

    def seen_from(self, corner: Size) -> Box:
        """The same box, counted from ``corner``."""
        return Box(subtract(self.start, corner), subtract(self.stop, corner))

    def shared(self, other: Box) -> Box | None:
        """What both boxes hold; None where that is nothing.

        >>> print(Box((0, 0, 0), (4, 4, 4)).shared(Box((2, 3, -1), (9, 9, 9))))
        2:4, 3:4, 0:4
        """
        start = triple(map(max, self.start, other.start))
        stop = triple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def shared_voxels(self, other: Box) -> int:
        """How many voxels both boxes hold."""
        shared = self.shared(other)
        return shared.voxels if shared else 0

    def clipped(self, size: Size) -> Box:
        """The part inside ``[0, size)``; where nothing is left, an empty box inside it."""
        start = triple(min(max(a, 0), n) for a, n in zip(self.start, size, strict=True))
        stop = triple(min(max(b, a), n) for a, b, n in zip(start, self.stop, size, strict=True))
        return Box(start, stop)

    def within(self, size: Size) -> bool:
        """Whether the box lies inside ``[0, size)``."""
        return all(0 <= a <= b <= n for a, b, n in zip(self.start, self.stop, size, strict=True))

    def turned(self, axis: int) -> Box:
        """The same box where axes 0 and ``axis`` are swapped."""
        return Box(turned(self.start, axis), turned(self.stop, axis))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index into an array's last three axes."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def __str__(self) -> str:
        return ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


def triple(values: Iterable[int]) -> Size:
    """Exactly three whole numbers as a tuple."""
    z, y, x = values
    return int(z), int(y), int(x)


def turned(values: Size, axis: int) -> Size:
    """The same where axes 0 and ``axis`` are swapped.

    >>> turned((1, 2, 3), 2)
    (3, 2, 1)
    """
    found = list(values)
    found[0], found[axis] = found[axis], found[0]
    return triple(found)


def add(a: Size, b: Size) -> Size:
    """Sum per axis."""
    return triple(i + j for i, j in zip(a, b, strict=True))


def subtract(a: Size, b: Size) -> Size:
    """Difference per axis."""
    return triple(i - j for i, j in zip(a, b, strict=True))


def multiply(a: Size, b: Size) -> Size:
    """Product per axis."""
    return triple(i * j for i, j in zip(a, b, strict=True))


def volume(size: Size) -> int:
    """Number of voxels of a box of this size."""
    return size[0] * size[1] * size[2]


def ceil_divide(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``a``."""
    return ceil_divide(a, multiple) * multiple


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of them; there must be one."""
    starts, stops = zip(*((box.start, box.stop) for box in boxes), strict=True)
    return Box(
        triple(min(along) for along in zip(*starts, strict=True)),
        triple(max(along) for along in zip(*stops, strict=True)),
    )


def tiles(size: Size, tile: Size, over: Box | None = None) -> Iterator[Box]:
    """Cover ``[0, size)`` exactly once by boxes of at most ``tile``, in (z, y, x) order; where
    ``over`` is given, those of them that share something with it."""
    within = over or Box((0, 0, 0), size)
    ranges = [
        range(a // t * t, b, t) for a, b, t in zip(within.start, within.stop, tile, strict=True)
    ]
    for start in product(*ranges):
        stop = triple(min(a + t, n) for a, t, n in zip(start, tile, size, strict=True))
        yield Box(triple(start), stop)


def text(size: Size) -> str:
    """A size as shown to people: ``64³`` or ``1·256·256``."""
    if size[0] == size[1] == size[2]:
        return f"{size[0]}³"
    return "·".join(str(n) for n in size)
