"""Arrays whose planes may lie anywhere: in pages, or one after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from znni_dask.kernels.team import Team
from znni_dask.network.layers import Layer
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem


class Planes(NamedTuple):
    """Where the planes of an array lie: ``addresses`` (sample, plane) of the first channel, or the
    first block of channels, and so many bytes from one to the next. ``shape`` is that in memory
    (`Form.stored`); a plane is in one piece."""

    addresses: NDArray[np.int64]
    step_bytes: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Array) -> Planes:
        """Where those of an array in one piece lie."""
        samples, planes = (
            np.arange(n) * step
            for n, step in zip(array.shape[:3:2], array.strides[:3:2], strict=True)
        )
        return cls(array.ctypes.data + samples[:, None] + planes, array.strides[1], array.shape)

    @property
    def row_bytes(self) -> int:
        """From one row of a plane to the next."""
        return ITEM_BYTES * prod(self.shape[4:])

    @property
    def voxel_bytes(self) -> int:
        """From one voxel of a row to the next."""
        return ITEM_BYTES * prod(self.shape[5:])


def step_bytes(shape: Sequence[int]) -> int:
    """Bytes of a plane of a channel, or of a block of channels, of an array of a shape in memory:
    in pages those of a plane follow one another."""
    return ITEM_BYTES * prod(shape[3:])


class OfPlanes(Primitive):
    """Abstract: a primitive that takes arrays whose planes lie anywhere."""

    def takes_planes(self, layer: Layer, form: Form) -> bool:
        """Whether it does for this layer and inputs in a form; else they must be in one piece."""
        return True

    @abstractmethod
    def apply_planes(
        self,
        prepared: Any,
        problem: Problem,
        inputs: Sequence[Planes],
        out: Planes,
        team: Team,
    ) -> None:
        """What `apply` does."""

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        self.apply_planes(prepared, problem, list(map(Planes.of, inputs)), Planes.of(out), team)


def takes_planes(primitive: Primitive, layer: Layer, form: Form) -> TypeGuard[OfPlanes]:
    """Whether a primitive takes planes that lie anywhere, for a layer and inputs in a form."""
    return isinstance(primitive, OfPlanes) and primitive.takes_planes(layer, form)
