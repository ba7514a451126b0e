"""Changes of an array's form: sixteen channels side by side, or each for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, final

from znni_dask.geometry import ceil_divide
from znni_dask.kernels.blocks import BLOCK, UNBLOCK, blocks_library
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Input, Layer
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem
from znni_dask.primitives.work import Rate, Work

CHANGING = Rate("changes of form", 2e9)  # bytes made


@final
@dataclass(frozen=True)
class FormChange(Primitive):
    """Brings an array into a form. No layer is computed so: schedules put it in between."""

    into: Form
    name: ClassVar[str] = "change of form"
    layer: ClassVar[type[Layer]] = Input

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        other = Form.PLAIN if self.into is Form.BLOCKED else Form.BLOCKED
        return other, self.into

    def work(self, problem: Problem, threads: int) -> Work:
        return Work({CHANGING: self.into.nbytes(problem.output)})

    def prepared_bytes(self, layer: Layer) -> int:
        return 0

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        blocked = self.into is Form.BLOCKED
        change = blocks_library()[BLOCK if blocked else UNBLOCK]
        _, channels, *size = problem.output
        voxels = prod(size)
        groups = voxels // LANES
        aligned = voxels % LANES == 0 and out.ctypes.data % VECTOR_BYTES == 0
        fixed = (() if blocked else (int(aligned),)) + (channels, voxels * ITEM_BYTES, groups)
        for source, target in zip(inputs[0], out, strict=True):
            places = source.ctypes.data, target.ctypes.data
            team.run(change, (*places, *fixed), ceil_divide(channels, LANES) * groups)
        if voxels % LANES:
            self._change_rest(inputs[0], out, channels, groups * LANES)

    def _change_rest(self, x: Array, out: Array, channels: int, first: int) -> None:
        """The last few voxels, less than sixteen."""
        there, here = (array.reshape(*array.shape[:2], -1, *array.shape[5:]) for array in (x, out))
        for channel in range(channels):
            block, lane = divmod(channel, LANES)
            if self.into is Form.BLOCKED:
                here[:, block, first:, lane] = there[:, channel, first:]
            else:
                here[:, channel, first:] = there[:, block, first:, lane]
