"""What a problem takes of a machine: amounts of work, in kinds that have rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

COMPILE_SECONDS = 1.0  # of what is compiled for a layer, where it was not yet


class Rate(NamedTuple):
    """How much of a kind of work one core does in a second: of a machine with 512-bit vectors, as
    `make bench` measures them. How far another is from that is measured there (`timings`)."""

    name: str
    per_second: float


MEMORY = Rate("memory", 1.5e10)  # bytes to and from it
STREAMED = Rate("streamed", 3e10)  # bytes past the caches, in long stretches
LOOPS = Rate("plain loops", 1.6e10)  # operations
READING = Rate("reading", 2.5e8)  # values of a volume's chunks, decoded
TOUCHING = Rate("touching", 1e9)  # bytes of memory that the system gives for the first time
WRITING = Rate("writing", 7e7)  # values of an output's chunks, encoded

Amounts = Mapping[Rate, float]


@dataclass(frozen=True)
class Work:
    """Amounts that come one after another, and what is moved ``meanwhile``, which counts only as
    far as it takes longer. ``busy`` threads share it, all there are if None; in the seconds
    ``alone`` no more than one works."""

    amounts: Amounts
    meanwhile: Amounts = field(default_factory=dict)
    busy: float | None = None
    alone: float = 0.0

    def seconds(self, threads: int) -> float:
        """With so many threads."""
        together = max(_seconds(self.amounts), _seconds(self.meanwhile))
        return together / (self.busy or threads) + self.alone

    def amount(self, *rates: Rate) -> int:
        """How much there is of these kinds."""
        return round(sum(self.amounts[rate] for rate in rates))


def _seconds(amounts: Amounts) -> float:
    return sum(amount / rate.per_second for rate, amount in amounts.items())
