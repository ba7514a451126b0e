"""Normalisation: every channel of a volume moved and scaled by statistics of all of it.

Statistics are of the whole volume at a time point, never of a part of it, so that a voxel has one
value whatever is computed around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import OptionError

METHODS = ("none", "zscore", "percentile", "range")


@dataclass(frozen=True)
class Normalization:
    """How values are to be normalised, by one of `METHODS` but the first.

    ``"zscore"`` is (x - mean) / standard deviation, ``"percentile"`` (x - low) / (high - low) of
    two ``percentiles``, ``"range"`` the same of minimum and maximum. Nothing is clipped. ``level``
    is that of the multiscale image of which the statistics are taken; None for the one read.
    Raises `OptionError`.
    """

    method: str
    percentiles: tuple[float, float] = (1.0, 99.0)
    level: int | str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS[1:]:
            raise OptionError(
                f"normalize {self.method!r} is not known: choose {', '.join(METHODS)}"
            )
        if self.method == "percentile":
            low, high = self.percentiles
            if not 0 <= low < high <= 100:
                raise OptionError(
                    f"percentiles {low:g} and {high:g}: a lower and a higher one are wanted, from "
                    "0 to 100"
                )

    @property
    def described(self) -> dict[str, Any]:
        """What metadata tell of it."""
        shares = list(self.percentiles) if self.method == "percentile" else None
        return {"method": self.method, "percentiles": shares, "level": self.level}


@dataclass(frozen=True)
class Statistics:
    """What is subtracted from the values of a volume, and by what they are then divided, at every
    time point for every channel."""

    offset: tuple[tuple[float, ...], ...]
    scale: tuple[tuple[float, ...], ...]

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> Statistics:
        """As a journal or metadata tell them; what is no such thing raises what Python does."""
        offset, scale = (
            tuple(tuple(float(v) for v in channels) for channels in told[key])
            for key in ("offset", "scale")
        )
        return cls(offset, scale)

    def applied(self, values: NDArray[np.generic], time: int) -> NDArray[np.float32]:
        """Values (channel, z, y, x) of a time point normalised, in float32, in place where that
        is what they are."""
        normal = cast("NDArray[np.float32]", values)
        if values.dtype != np.float32:
            normal = np.empty(values.shape, np.float32)
        for channel, (offset, scale) in enumerate(
            zip(self.offset[time], self.scale[time], strict=True)
        ):
            np.subtract(
                values[channel],
                np.float32(offset),
                out=normal[channel],
                dtype=np.float32,
                casting="unsafe",  # integers too become float32, as networks take them
            )
            normal[channel] /= np.float32(scale)
        return normal
