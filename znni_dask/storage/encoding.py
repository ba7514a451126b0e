"""How answers (float32) become what is stored: floats, bytes over a range, or labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import OptionError, RunError

LABELS = "labels"
DTYPES = ("float32", "float16", "uint8", LABELS)
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Encoding:
    """How the channels of one output become stored values.

    float16 and float32 are stored as they are; uint8 maps ``low`` … ``high`` to 0 … 255, clipped
    and rounded; labels are the number of the channel with the largest value, of several the
    first, in the smallest unsigned type that holds them.
    """

    dtype: str = "float32"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype {self.dtype!r} is not known: choose {', '.join(DTYPES)}")
        if not (self.low < self.high and np.isfinite([self.low, self.high]).all()):
            raise OptionError(f"the range {self.low:g}, {self.high:g} is empty: low before high")

    @property
    def labels(self) -> bool:
        """Whether channels are reduced to the number of the best one."""
        return self.dtype == LABELS

    def stored_dtype(self, channels: int) -> np.dtype[Any]:
        """The type in which an output with so many channels is stored."""
        return np.min_scalar_type(channels - 1) if self.labels else np.dtype(self.dtype)

    def stored_channels(self, channels: int) -> int:
        """How many channels are stored of so many."""
        return 1 if self.labels else channels

    def voxel_bytes(self, channels: int) -> int:
        """Bytes of a stored voxel with all its channels."""
        return self.stored_channels(channels) * self.stored_dtype(channels).itemsize

    def encoding_bytes(self, channels: int) -> int:
        """Memory that `encode` takes for a voxel beside its argument, the result included."""
        return self.voxel_bytes(channels) + (1 if self.labels else 0)

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        """Stored values for answers (channel, z, y, x); ``values`` may be overwritten.

        Raises `RunError` where an answer has no stored value.
        """
        if self.labels:
            return self._best(values)
        if self.dtype == "uint8":
            np.subtract(values, np.float32(self.low), out=values)
            np.multiply(values, np.float32(255 / (self.high - self.low)), out=values)
            np.clip(values, 0, 255, out=values)
            np.rint(values, out=values)
            if not np.isfinite(values.sum()):  # clipped values are NaN or in 0 … 255
                raise RunError("the answer holds NaN, for which uint8 has no value: choose float32")
        elif self.dtype == "float16":
            largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
            if largest > _LARGEST_HALF:
                raise RunError(
                    f"the answer holds {largest:g}, float16 ends at {_LARGEST_HALF:g}: choose "
                    "float32"
                )
        return values.astype(self.dtype, copy=False)

    def _best(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        """numpy's argmax, which would copy all channels to have them side by side."""
        largest = values[:1]
        labels = np.zeros(largest.shape, self.stored_dtype(len(values)))
        for number in range(1, len(values)):
            channel = values[number : number + 1]
            np.copyto(labels, number, where=channel > largest)
            np.maximum(largest, channel, out=largest)
        if np.isnan(largest.max(initial=0)):  # a maximum with NaN is NaN
            raise RunError("the answer holds NaN, which has no label: choose float32")
        return labels

    def step(self, largest: float) -> float:
        """Distance of neighbouring stored values (float32 counted as exact) around ``largest``;
        labels are compared by the answers they stand for, which are float32."""
        steps = {
            "uint8": (self.high - self.low) / 255,
            "float16": largest * float(np.finfo(np.float16).eps),
        }
        return steps.get(self.dtype, 0.0)

    def decode(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """The answers that stored values stand for; not of labels."""
        values = stored.astype(np.float32)
        if self.dtype == "uint8":
            values = values * np.float32((self.high - self.low) / 255) + np.float32(self.low)
        return values

    def difference(
        self, stored: NDArray[np.generic], answer: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """How far stored values (channel, z, y, x) are from those that an answer would be stored
        as, the largest over channels; of labels, how far the answer of the channel stored lies
        below that of the best one (infinitely where there is no such channel)."""
        if self.labels:
            there = np.minimum(stored, len(answer) - 1).astype(np.intp)
            chosen = np.take_along_axis(answer, there, axis=0)[0]
            apart = _apart(chosen, answer.max(axis=0))
            apart[stored[0] >= len(answer)] = np.inf
            return apart
        wanted = self.decode(self.encode(answer.copy()))
        return cast("NDArray[np.float32]", _apart(self.decode(stored), wanted).max(axis=0))


def _apart(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far values are apart; NaN and infinities that are the same are not."""
    with np.errstate(invalid="ignore"):
        apart = np.asarray(np.abs(a - b))
    apart[np.isnan(apart)] = np.inf
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    return apart
