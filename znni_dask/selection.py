"""Which voxels of a volume are wanted: a box of them, those of a mask, or what both hold.

A selection chooses among the outputs and changes none of them: halos come from the volume as it
is, what is not selected is stored as 0. An output voxel is selected where the voxel of the volume
nearest its centre is (of two that are as near, the lower), so the choice is exact to the voxel
whatever the chunks, blocks and patches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from znni_dask.errors import OptionError, VolumeError
from znni_dask.geometry import AXES, Box, Size, text, triple
from znni_dask.storage.volume import Volume
from znni_dask.windows import Laid

Wanted = NDArray[np.bool_]
_HALF = Fraction(1, 2)
_RANGE = re.compile(r"\s*(\d*)\s*:\s*(\d*)\s*")


@dataclass(frozen=True, eq=False)
class Selection:
    """The voxels of a volume within ``roi`` where ``mask`` is not zero; all where both are None.

    Raises `VolumeError` where the mask cannot be one of ``volume``.
    """

    volume: Volume
    roi: Box | None = None
    mask: Volume | None = None

    def __post_init__(self) -> None:
        volume, mask = self.volume, self.mask
        if mask is None:
            return
        asked = (
            f"the mask {mask.path} (axes {mask.axes}, shape {tuple(mask.array.shape)}) is to "
            f"select voxels of {volume.path}: "
        )
        if mask.size != volume.size:
            raise VolumeError(
                f"{asked}its size z, y, x is {text(mask.size)}, the volume's {text(volume.size)}; "
                "give a mask with one voxel for each of the volume's"
            )
        if mask.channels != 1:
            raise VolumeError(f"{asked}it has {mask.channels} channels; give one with one")
        if mask.times not in (1, volume.times):
            raise VolumeError(
                f"{asked}it has {mask.times} time points, the volume {volume.times}; give one "
                "that has as many, or one for all of them"
            )

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self.roi is None and self.mask is None

    def hull(self, laid: Laid) -> Box:
        """The box of the outputs within ``roi``; raises `OptionError` where there are none."""
        if self.roi is None:
            return Box((0, 0, 0), laid.output_size)
        spans = [
            _outputs(*along)
            for along in zip(
                laid.translation,
                laid.output_stride,
                laid.output_size,
                laid.size,
                self.roi.start,
                self.roi.stop,
                strict=True,
            )
        ]
        for axis, (start, stop) in zip(AXES, spans, strict=True):
            if start >= stop:
                raise OptionError(
                    f"the roi {self.roi} holds the centre of no output voxel along {axis}: the "
                    f"output has {text(laid.output_size)} voxels, the first at z, y, x = "
                    f"{_shown(laid.translation)} of the volume, {_shown(laid.output_stride)} apart"
                )
        return Box(triple(a for a, _ in spans), triple(b for _, b in spans))

    def wanted(self, laid: Laid, block: Box, time: int) -> Wanted | None:
        """Which voxels of a block of the answer are selected; None for all of them."""
        inside = block.shared(self.hull(laid))
        if inside is None:
            return np.zeros(block.size, np.bool_)
        if self.mask is None:
            if inside == block:
                return None
            chosen = np.ones(inside.size, np.bool_)
        else:
            chosen = self._masked(self.mask, laid, inside, time)
            if inside == block:
                return None if chosen.all() else chosen
        wanted = np.zeros(block.size, np.bool_)
        wanted[inside.seen_from(block.start).slices] = chosen
        return wanted

    def _masked(self, mask: Volume, laid: Laid, box: Box, time: int) -> Wanted:
        index = [
            _nearest(*along)
            for along in zip(
                laid.translation,
                laid.output_stride,
                laid.size,
                box.start,
                box.stop,
                strict=True,
            )
        ]
        behind = Box(triple(i[0] for i in index), triple(i[-1] + 1 for i in index))
        values = mask.read(behind, time if mask.times > 1 else 0)[0]
        z, y, x = (i - i[0] for i in index)
        chosen: Wanted = (values != 0)[np.ix_(z, y, x)]
        return chosen

    def read_bytes(self, size: Size) -> int:
        """Memory that finding out what of a block is wanted takes at most, beside the result;
        ``size`` is that of the region of the volume behind it."""
        return 0 if self.mask is None else self.mask.read_bytes(size)


def roi_box(value: str | Sequence[slice], size: Size) -> Box:
    """The box that an option like ``"10:20,:,5:"`` or three slices name, of a volume of ``size``.

    Raises `OptionError` where it is malformed, empty or reaches out of the volume.
    """
    spans = _spans(value)
    if spans is None or len(spans) != 3:
        raise OptionError(
            f"roi {value!r} is no box: give three ranges of voxels z0:z1,y0:y1,x0:x1, in which "
            "ends may be left open, as in 10:20,:,5:"
        )
    filled = []
    for axis, n, (start, stop) in zip(AXES, size, spans, strict=True):
        first, last = start or 0, n if stop is None else stop
        if last > n or first >= last:
            what = "reaches out of the volume" if last > n or first >= n else "is empty"
            raise OptionError(
                f"roi {value!r}: {first}:{last} along {axis} {what}, which has {n} voxels there: "
                f"give a start below the stop, both from 0 to {n}"
            )
        filled.append((first, last))
    return Box(triple(a for a, _ in filled), triple(b for _, b in filled))


def _spans(value: str | Sequence[slice]) -> list[tuple[int | None, int | None]] | None:
    """Start and stop of every range; None where one is malformed."""
    if isinstance(value, str):
        found = [_RANGE.fullmatch(part) for part in value.split(",")]
        if not all(found):
            return None
        return [(_number(m[1]), _number(m[2])) for m in found if m]
    parts = list(value) if isinstance(value, Sequence) else []
    slices = [p for p in parts if isinstance(p, slice) and p.step in (None, 1)]
    if len(slices) < len(parts):
        return None
    ends = [(part.start, part.stop) for part in slices]
    whole = all(e is None or (isinstance(e, int | np.integer) and e >= 0) for p in ends for e in p)
    return ends if whole else None


def _number(digits: str) -> int | None:
    return int(digits) if digits else None


def _nearest(first: Fraction, step: Fraction, n: int, start: int, stop: int) -> NDArray[np.intp]:
    """For outputs ``[start, stop)``, of which that at i lies at ``first + step * i``, the nearest
    voxel along an axis of ``n``.

    >>> _nearest(Fraction(1, 2), Fraction(2), 8, 0, 3).tolist()
    [0, 2, 4]
    """
    places = (ceil(first + step * i - _HALF) for i in range(start, stop))
    return np.array([min(max(place, 0), n - 1) for place in places], np.intp)


def _outputs(
    first: Fraction, step: Fraction, outputs: int, n: int, start: int, stop: int
) -> tuple[int, int]:
    """Which of the ``outputs`` have their nearest voxel in ``[start, stop)``.

    >>> _outputs(Fraction(1, 2), Fraction(2), 4, 8, 1, 5)
    (1, 3)
    """

    def before(voxel: int) -> int:
        """How many outputs have a nearest voxel below this one."""
        if voxel in (0, n):
            return 0 if voxel == 0 else outputs
        return min(max(floor((voxel - _HALF - first) / step) + 1, 0), outputs)

    return before(start), before(stop)


def _shown(values: Sequence[Fraction]) -> str:
    return ", ".join(f"{float(value):g}" for value in values)
