"""What executors tell of the time that was spent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from znni_dask.schedule import Stored
from znni_dask.timeline import Span


class Spent(NamedTuple):
    """The ``seconds`` that every array took to compute; and, of a device, what each of its lanes
    did, and when."""

    seconds: Mapping[Stored, float]
    spans: Sequence[Span] = ()

    def plus(self, other: Spent) -> Spent:
        """What both spent."""
        seconds = dict(self.seconds)
        for array, own in other.seconds.items():
            seconds[array] = seconds.get(array, 0.0) + own
        return Spent(seconds, [*self.spans, *other.spans])

    @property
    def layer_seconds(self) -> dict[str, float]:
        """Those of every layer, in whatever form its output was made."""
        found: defaultdict[str, float] = defaultdict(float)
        for array, own in self.seconds.items():
            found[array.name] += own
        return found
