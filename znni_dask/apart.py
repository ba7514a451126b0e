"""Patches that the host and a device compute each for itself, each with primitives of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from znni_dask.errors import OptionError
from znni_dask.geometry import Box, Size
from znni_dask.network.field_of_view import Interval
from znni_dask.schedule import Schedule, Schedules


class ApartSchedule(NamedTuple):
    """How the host computes a patch, and how the device does."""

    host: Schedule
    device: Schedule

    @property
    def input(self) -> Box:
        """The box of the volume."""
        return self.host.input


@dataclass(frozen=True, eq=False)
class Apart:
    """The schedules of both, of one layout, whose layers' boxes are the same. Raises `OptionError`
    where one makes not all fragments of its strides at once."""

    host: Schedules
    device: Schedules

    def __post_init__(self) -> None:
        if self.host.repeats * self.device.repeats > 1:
            raise OptionError(
                "patches that host and GPU take turns at make all fragments of their strides at "
                "once"
            )

    def schedule(self, output: Box) -> ApartSchedule:
        """The schedules of the patch that makes ``output``."""
        return ApartSchedule(self.host.schedule(output), self.device.schedule(output))

    def envelope(self, spans: Sequence[Iterable[Interval]]) -> dict[str, Size]:
        """The same as of `Schedules`."""
        return self.host.envelope(spans)

    def sizes(self, output: Box) -> dict[str, Size]:
        """The size of every layer's box for one patch."""
        return self.host.sizes(output)

    def largest_layer(self, sizes: Mapping[str, Size]) -> str:
        """The layer whose inputs and output together are largest."""
        return self.host.largest_layer(sizes)
