"""What compiled convolutions are told: axes, strides, and all that `rows` needs of both."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from itertools import count, islice
from typing import Any, Generic, NamedTuple, TypeVar

from znni_dask.kernels.code import Address, Number

N = TypeVar("N", int, Number)


class Lanes(Enum):
    """What the sixteen numbers of a vector belong to."""

    OUTPUTS = "output channels"
    INPUTS = "input channels"
    BOTH = "channels of both"


class Axis(NamedTuple, Generic[N]):
    """One axis of a convolution: output ``i`` reads through tap ``t`` the input ``offset`` + i ·
    ``stride`` + t · ``dilation`` of ``size``; what lies beyond these is padding."""

    outputs: N
    stride: N
    dilation: N
    offset: N
    size: N
    taps: N


class Strides(NamedTuple, Generic[N]):
    """Bytes from one to the next, in an array; ``block`` of sixteen channels."""

    batch: N
    block: N
    z: N
    y: N
    x: N
    channel: N


class Rows(NamedTuple, Generic[N]):
    """All that a compiled convolution is told.

    ``channels`` of the input; the outputs along x, from ``begin`` to before ``end``, that no
    padding reaches; of how many taps weights are kept, which is the first, and how many further on
    that of the next tap along z, y and x is; how many blocks of channels, taps along z and taps
    along y make a part; of how many rows sums take a part in turn; how much of the next part's
    weights is fetched meanwhile; whether what is negative becomes zero.
    """

    z: Axis[N]
    y: Axis[N]
    x: Axis[N]
    source: Strides[N]
    target: Strides[N]
    channels: N
    begin: N
    end: N
    kept_taps: N
    first_tap: N
    apart_z: N
    apart_y: N
    apart_x: N
    part_blocks: N
    part_z: N
    part_y: N
    together: N
    ahead_bytes: N
    relu: N

    @property
    def turned(self) -> Rows[N]:
        """The same with columns in place of rows; who turns them says where padding reaches."""
        source, target = (s._replace(y=s.x, x=s.y) for s in (self.source, self.target))
        turned = self._replace(y=self.x, x=self.y, source=source, target=target)
        return turned._replace(apart_y=self.apart_x, apart_x=self.apart_y)


def flat(told: tuple[Any, ...]) -> list[int]:
    """The numbers of what holds axes, strides and numbers, one after the other: as compiled code
    is told them."""
    return [n for part in told for n in (flat(part) if isinstance(part, tuple) else [part])]


NUMBER_BYTES = 8
TOLD_BYTES = NUMBER_BYTES * (
    3 * len(Axis._fields) + 2 * len(Strides._fields) + len(Rows._fields) - 5
)


def numbers_at(place: Address) -> Iterator[Number]:
    """The numbers one after another from a place on, as code that reads them."""
    return (place.number(offset) for offset in count(0, NUMBER_BYTES))


def axes_from(numbers: Iterator[Number]) -> tuple[Axis[Number], Axis[Number], Axis[Number]]:
    """The axes z, y and x that come next."""
    z, y, x = (Axis(*islice(numbers, len(Axis._fields))) for _ in "zyx")
    return z, y, x


def strides_from(numbers: Iterator[Number]) -> Strides[Number]:
    """The strides that come next."""
    return Strides(*islice(numbers, len(Strides._fields)))


class Told(NamedTuple):
    """What is told, and where."""

    place: Address
    rows: Rows[Number]

    @classmethod
    def of(cls, place: Address) -> Told:
        """The numbers of `flat`, as code."""
        numbers = numbers_at(place)
        axes, source, target = axes_from(numbers), strides_from(numbers), strides_from(numbers)
        return cls(place, Rows(*axes, source, target, *islice(numbers, len(Rows._fields) - 5)))
