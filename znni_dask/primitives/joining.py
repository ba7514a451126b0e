"""Layers with several inputs: sums, products …, concatenation, broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast, final

import numpy as np

from znni_dask.geometry import Size, ceil_divide, triple
from znni_dask.kernels.adding import ADD, LINE, adding_library
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.team import Team
from znni_dask.network.layers import Arithmetic, Broadcast, Concat, Layer
from znni_dask.primitives.base import ITEM_BYTES, Array, Form, Primitive, Problem
from znni_dask.primitives.pointwise import PIECE, ZEROS, copy_channels, crop

_BUFFER = 1 << 13  # elements that numpy casts at a time
_UFUNCS: dict[str, np.ufunc] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
    "greater": np.greater,
    "less": np.less,
    "equal": np.equal,
}


def _spread(x: Array, offset: Size, shape: tuple[int, ...]) -> Array:
    """The part of an input behind ``shape``, as a view; axes of one voxel are repeated."""
    have = triple(x.shape[2:5])
    reach = triple(map(min, shape[2:5], have))
    part = crop(x, triple(o if n > 1 else 0 for o, n in zip(offset, have, strict=True)), reach)
    return np.broadcast_to(part, shape)


@final
class ArithmeticOfInputs(Primitive):
    """Inputs combined value by value."""

    name: ClassVar[str] = "pointwise"
    layer: ClassVar[type[Layer]] = Arithmetic
    in_place: ClassVar[bool] = True

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        if len(set(channels)) > 1 or cast("Arithmetic", layer).function == "where":
            return Form.PLAIN, Form.PLAIN
        return None, None

    def flops(self, problem: Problem) -> int:
        return (len(problem.inputs) - 1) * prod(problem.output)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        # numpy's buffers where comparisons are cast, and the planes of "where"
        return threads * 3 * (prod(problem.output[3:]) + _BUFFER) * ITEM_BYTES

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        layer = cast("Arithmetic", problem.layer)
        function = layer.function
        views = [
            _spread(x, offset, out.shape) for x, offset in zip(inputs, problem.offsets, strict=True)
        ]

        def choose(first: int, last: int) -> None:
            for item in range(first, last):
                batch, channel, z = np.unravel_index(item, out.shape[:3])
                plane = [view[batch, channel, z] for view in views]
                out[batch, channel, z] = np.where(plane[0] != 0, plane[1], plane[2])
                if layer.relu:
                    np.maximum(out[batch, channel, z], 0, out=out[batch, channel, z])

        if function == "where":
            team.share(choose, prod(out.shape[:3]))
            return
        ufunc = _UFUNCS[function]

        def combine(parts: Sequence[Array], target: Array, zeros: Array) -> None:
            with np.errstate(all="ignore"):
                ufunc(parts[0], parts[1], out=target)
                for part in parts[2:]:
                    ufunc(target, part, out=target)
                if layer.relu:
                    np.maximum(target, zeros, out=target)

        if all(view.flags.c_contiguous for view in views):
            lines, line = [view.reshape(-1) for view in views], out.reshape(-1)
            if function == "add" and not any(x.ctypes.data % VECTOR_BYTES for x in (*lines, line)):
                whole = _add_vectors(lines, line, layer.relu, team)
                combine([one[whole:] for one in lines], line[whole:], ZEROS[: line.size - whole])
                return

            def pieces(first: int, last: int) -> None:
                for begin in range(first * PIECE, last * PIECE, PIECE):
                    piece = slice(begin, begin + PIECE)
                    here = line[piece]
                    combine([one[piece] for one in lines], here, ZEROS[: here.size])

            team.share(pieces, ceil_divide(out.size, PIECE))
            return

        def blocks(first: int, last: int) -> None:
            for item in range(first, last):
                at = divmod(item, out.shape[1])
                combine([view[at] for view in views], out[at], ZEROS[:1])

        team.share(blocks, out.shape[0] * out.shape[1])


def _add_vectors(lines: Sequence[Array], out: Array, relu: bool, team: Team) -> int:
    """Add up lines in whole vectors; how many values these are."""
    count = out.size // LANES
    first, *others = lines
    for number, other in enumerate(others, 1):
        places = (x.ctypes.data for x in (first, other, out))
        told = count, int(relu and number == len(others))
        team.run(adding_library()[ADD], (*places, *told), ceil_divide(count, LINE))
        first = out
    return count * LANES


@final
class Concatenation(Primitive):
    """Channels behind one another."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Concat

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        if any(n % LANES for n in channels[:-1]):
            return Form.PLAIN, Form.PLAIN  # blocks would have to be put together anew
        return None, None

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        first = 0
        for x, offset in zip(inputs, problem.offsets, strict=True):
            last = first + x.shape[1]
            copy_channels(out[:, first:last], crop(x, offset, out.shape[2:]), team)
            first = last


@final
class Broadcasting(Primitive):
    """One voxel repeated over an axis."""

    name: ClassVar[str] = "copy"
    layer: ClassVar[type[Layer]] = Broadcast

    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Array], out: Array, team: Team
    ) -> None:
        copy_channels(out, _spread(inputs[0], problem.offsets[0], out.shape), team)
