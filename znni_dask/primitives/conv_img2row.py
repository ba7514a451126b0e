"""Convolution as a product of matrices: rows of patches (img2row) times the kernels.

Jiang et al. 2023 lower convolution in three dimensions so. Only so many rows are gathered at a
time as a second-level cache holds, into memory of the thread that multiplies them: the patch
matrix is never there as a whole. For kernels of several voxels on few of them, where rows are
short and padding reaches many.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.geometry import ceil_divide, volume
from znni_dask.kernels import patch_matrix
from znni_dask.kernels.axes import Strides, flat
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.memory import odd_lines
from znni_dask.kernels.patch_matrix import Patches
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import rows
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem, direct_flops
from znni_dask.primitives.work import Rate, Work

GATHERED_BYTES = 1 << 19  # of rows that lie in the second-level cache
_LEAST_ROWS = 48  # or the kernels' way from memory would be all that counts


@final
class ConvImg2row(Primitive):
    """Convolution by products of matrices on the CPU, any stride, dilation and padding; no
    groups."""

    name: ClassVar[str] = "img2row"
    layer: ClassVar[type[Layer]] = Conv
    rate: ClassVar[Rate] = Rate("img2row", 1.6e11)  # operations
    takes: ClassVar[str] = "no groups or whole window"

    def fits(self, layer: Layer) -> bool:
        conv = cast("Conv", layer)
        return conv.groups == 1 and not conv.whole

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        return None, Form.BLOCKED

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        return rows.work_of(self.rate, problem, lanes=problem.output)

    def prepared_bytes(self, layer: Layer) -> int:
        conv = cast("Conv", layer)
        return rows.dense_bytes(conv.out_channels, [_columns(conv)])

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        parts = rows.dense_count(problem.output[1])
        return threads * _Gathered.of(problem).nbytes + 2 * parts * rows.PASS_BYTES

    def prepare(self, layer: Layer, weights: Weights) -> list[rows.Part]:
        """The kernel matrix: weights in the order of a patch's numbers."""
        return rows.dense_parts(weights["weight"], weights.get("bias"))

    def apply(
        self,
        prepared: list[rows.Part],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        conv, gathered = cast("Conv", problem.layer), _Gathered.of(problem)
        source, target = rows.Place.of(inputs[0]), rows.Place.of(out)
        (z, y, x), channels = rows.axes_of(problem, conv), problem.inputs[0][1]
        patches = Patches(z, y, x, source.strides, channels, gathered.row_bytes)
        told = np.array(flat(patches), np.int64)
        zeros = rows.kept([np.zeros(LANES, np.float32)])
        gather = patch_matrix.patches_library()[patch_matrix.GATHER[inputs[0].ndim > 5]]
        scratch = team.scratch(team.threads * gathered.nbytes).ctypes.data
        buffers = [scratch + i * gathered.nbytes for i in range(team.threads)]
        voxels, step = prod(problem.output[2:]), gathered.rows
        turns = ceil_divide(voxels, step)
        place = rows.Place(0, Strides(0, VECTOR_BYTES, 0, 0, gathered.row_bytes, ITEM_BYTES))
        products = {
            count: rows.products(prepared, count, _columns(conv), place, target, conv.relu)
            for count in {min(step, voxels - step * (turns - 1)), step}
        }

        def work(first: int, last: int) -> None:
            buffer = buffers.pop()  # there is one for every thread
            for unit in range(first, last):
                sample, turn = divmod(unit, turns)
                begin, end = step * turn, min(step * (turn + 1), voxels)
                here = source.address + sample * source.strides.batch
                gather(told.ctypes.data, here, zeros.ctypes.data, buffer, begin, end)
                moved = sample * target.strides.batch + begin * VECTOR_BYTES
                for one in products[end - begin]:
                    one._replace(source=buffer, out=one.out + moved).run(0, 1)
            buffers.append(buffer)

        team.share(work, problem.output[0] * turns)


class _Gathered(NamedTuple):
    """The rows of a patch matrix that a thread has at once."""

    rows: int
    row_bytes: int

    @classmethod
    def of(cls, problem: Problem) -> _Gathered:
        """As many as there is room for, of a sample."""
        row_bytes = odd_lines(ITEM_BYTES * _columns(problem.layer))
        most = max(_LEAST_ROWS, GATHERED_BYTES // row_bytes)
        voxels = prod(problem.output[2:])
        turns = ceil_divide(voxels, most)
        return cls(ceil_divide(voxels, turns), row_bytes)

    @property
    def nbytes(self) -> int:
        """Memory of the rows, and of a vector after the last."""
        return self.rows * self.row_bytes + VECTOR_BYTES


def _columns(layer: Layer) -> int:
    """Numbers of a patch."""
    conv = cast("Conv", layer)
    return conv.in_channels * volume(conv.kernel)
