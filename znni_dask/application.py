"""What is applied to what, and how: everything that defines the answer of a run.

`Application` is what a run makes, what the output's metadata tell and what a verification
repeats. How fast, in which blocks and by which plan is no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from znni_dask.errors import InputError, NetworkError, OptionError, OutputError
from znni_dask.geometry import Box, Size, triple
from znni_dask.network.layers import FULL, LOWER, PRECISIONS
from znni_dask.network.network import Network
from znni_dask.network.rewrites import computed_in, simplify
from znni_dask.normalization import Normalization, Statistics
from znni_dask.patches import Layout
from znni_dask.primitives import conv_torch
from znni_dask.selection import Selection
from znni_dask.storage.encoding import Encoding
from znni_dask.storage.volume import Volume
from znni_dask.windows import Laid, Patchwise, WindowGrid


@dataclass(frozen=True, eq=False)
class Application:
    """A network, with all its outputs, on a volume.

    ``patchwise`` and ``halo`` make the answer approximate (see `WindowGrid` and `Layout`), and so
    does a ``precision`` in which convolutions may be computed, other than float32; ``nan`` replaces
    what is not finite; what is not selected (by ``roi`` and ``mask``, see `Selection`) is
    stored as 0; ``normalization`` says how the volume is normalised, by statistics that become
    part of ``volume`` once they are known (see `normalized`). Raises `NetworkError` where network
    and volume do not fit.
    """

    network: Network
    volume: Volume
    boundary: str = "reflect"
    nan: float | None = None
    patchwise: Patchwise | None = None
    halo: Size | None = None
    roi: Box | None = None
    mask: Volume | None = None
    normalization: Normalization | None = None
    precision: str = FULL

    def __post_init__(self) -> None:
        network, volume = self.network, self.volume
        if volume.channels != network.in_channels:
            raise NetworkError(
                f"the network takes {network.in_channels} channels, the volume {volume.path} has "
                f"{volume.channels} (axes {volume.axes}, shape {tuple(volume.array.shape)}): "
                "choose them with --channels, or say what its axes mean with --axes"
            )
        if self.patchwise and self.halo:
            raise OptionError("windows have no halo: give either patchwise or halo")
        if self.precision not in PRECISIONS:
            raise OptionError(f"precision {self.precision!r}: one of {', '.join(PRECISIONS)}")
        if self.precision == LOWER and not conv_torch.installed():
            raise OptionError(f"{LOWER} needs {conv_torch.MISSING}")
        _ = self.selection

    @property
    def exact(self) -> Application:
        """The same without what was asked for to be faster and makes it approximate: a halo, a
        precision; windows are what they are."""
        return replace(self, halo=None, precision=FULL)

    @property
    def approximate(self) -> bool:
        """Whether that is another answer."""
        return self.halo is not None or self.precision != FULL

    @cached_property
    def selection(self) -> Selection:
        """Which voxels are wanted; raises `VolumeError` where the mask does not fit."""
        return Selection(self.volume, self.roi, self.mask)

    def normalized(self, statistics: Statistics) -> Application:
        """The same on the volume normalised by statistics of it."""
        return replace(self, volume=replace(self.volume, statistics=statistics))

    def laid(self, *outputs: str) -> Laid:
        """The network with these outputs, joined as channels of one, laid over the volume."""
        if outputs not in self._known:
            network = computed_in(simplify(self.network.only(*outputs)), self.precision)
            try:
                self._known[outputs] = self._laid(network)
            except InputError as error:
                if len(self.network.outputs) == 1:
                    raise
                raise type(error)(
                    f"output {'+'.join(outputs)!r}: {error} (choose outputs with --output NAME)"
                ) from None
        return self._known[outputs]

    def _laid(self, network: Network) -> Laid:
        size, boundary = self.volume.size, self.boundary
        laid: Laid = (
            WindowGrid(network, size, boundary, self.patchwise)
            if self.patchwise
            else Layout(network, size, boundary, self.halo)
        )
        self.selection.hull(laid)  # which must hold something
        return laid

    @cached_property
    def _known(self) -> dict[tuple[str, ...], Laid]:
        return {}

    def passes(self, chosen: Sequence[str] | None = None) -> list[tuple[str, ...]]:
        """The outputs, those together that lie on one grid and can be computed in one pass."""
        names = list(self.network.outputs) if chosen is None else list(dict.fromkeys(chosen))
        if not names:
            raise OptionError(f"no outputs are chosen: there are {', '.join(self.network.outputs)}")
        groups: list[list[str]] = []
        for name in names:
            group = next((g for g in groups if self._join(*g, name)), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
        return [tuple(group) for group in groups]

    def _join(self, *outputs: str) -> bool:
        """Whether outputs are the same computed together as each for itself: on one grid, and of
        a volume that is extended alike."""
        alone = [self.laid(name) for name in outputs]
        if len({_grid(laid) for laid in alone}) > 1:
            return False
        try:
            together = self.laid(*outputs)
        except NetworkError:  # no size passes through all of them
            return False
        return _grid(together) == _grid(alone[0])

    def described(self, output: str, encoding: Encoding) -> dict[str, Any]:
        """What the metadata of one output tell of how it was made; `repeated` reads it."""
        return {
            "network": self.laid(output).network.fingerprint,
            "output": output,
            "boundary": self.boundary,
            "nan": self.nan,
            "dtype": encoding.dtype,
            "range": [encoding.low, encoding.high],
            "axes": self.volume.axes,
            "channels": self.volume.chosen,
            "level": self.volume.level,
            "patchwise": asdict(self.patchwise) if self.patchwise else None,
            "halo": self.halo,
            "precision": self.precision,
            "roi": [self.roi.start, self.roi.stop] if self.roi else None,
            "mask": self.mask.path if self.mask else None,
            "normalize": self.normalization.described if self.normalization else None,
            "volume": self._fingerprint,
        }

    @property
    def _fingerprint(self) -> str:
        """Of the volume: metadata need not tell of what lies where."""
        told = json.dumps(self.defining, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def defining(self) -> dict[str, Any]:
        """What of the volume defines the answer, as a journal tells it."""
        array = self.volume.array
        return {
            "volume": self.volume.path,
            "volume shape": list(array.shape),
            "volume type": str(array.dtype),
        }

    def placed(self, output: str) -> dict[str, Any]:
        """Scale and translation (of voxel centres) and units of one output, (z, y, x)."""
        source, laid = self.volume, self.laid(output)
        return {
            "scale": tuple(
                s * float(k) for s, k in zip(source.scale, laid.output_stride, strict=True)
            ),
            "translation": tuple(
                t + s * float(d)
                for t, s, d in zip(source.translation, source.scale, laid.translation, strict=True)
            ),
            "units": source.units,
        }


def _grid(laid: Laid) -> object:
    """What outputs have in common that can be joined: where their voxels lie in the volume."""
    if isinstance(laid, WindowGrid):
        return laid.layout.output_size
    axes = laid.geometry.axes
    return (
        laid.extensions,
        *((a.output_stride, a.shrink, a.shift, a.origin, a.dense) for a in axes),
    )


def patchwise_of(made: Mapping[str, Any]) -> Patchwise | None:
    """How windows were laid, as the metadata of an output tell; raises `OutputError`."""
    told = made.get("patchwise")
    if told is None:
        return None
    try:
        step = None if told["step"] is None else triple(told["step"])
        return Patchwise(triple(told["window"]), told["overlap"], told["weights"], step)
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"the output's metadata of windows cannot be read: {error}") from None
