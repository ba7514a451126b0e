"""The patch matrix of a convolution, some of its rows at a time: for every output voxel all that
its window sees, side by side (img2row; Jiang et al. 2023, "3D-img2row").
"""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Generic, NamedTuple

from llvmlite import ir

from znni_dask.kernels.axes import Axis, N, Strides, axes_from, numbers_at, strides_from
from znni_dask.kernels.code import LANES, VECTOR_BYTES, Address, Function, Number
from znni_dask.kernels.compiled import Library, kept_library

GATHER = {False: "gather_plain", True: "gather_blocked"}


class Patches(NamedTuple, Generic[N]):
    """All that compiled code is told: ``row_bytes`` from one row of the matrix to the next."""

    z: Axis[N]
    y: Axis[N]
    x: Axis[N]
    source: Strides[N]
    channels: N
    row_bytes: N


@cache
def patches_library() -> Library:
    """The compiled functions, one for each form of the input."""
    return kept_library(patches_module)


def patches_module() -> ir.Module:
    """They as they are written. ``patches`` are `flat` numbers, items output voxels (z, y, x).

    A row holds for every block of sixteen channels, tap along z, y and x these channels; zero where
    padding is. ``zeros`` is a vector of them. A vector may be written beyond the last row.
    """
    module = ir.Module("patch matrix")
    for blocked, name in GATHER.items():
        code = Function(module, name, ("patches", "source", "zeros", "out"), ("first", "last"))
        _write(code, blocked)
    return module


def _write(code: Function, blocked: bool) -> None:
    told, source, zeros, out = code.addresses
    first, last = code.numbers
    z, y, x, strides, channels, row_bytes = _told(told)
    taps = z.taps * y.taps * x.taps
    with (
        code.loop(first, last) as item,
        code.loop(0, (channels + (LANES - 1)) // LANES) as block,
    ):
        at = (item // (x.outputs * y.outputs), item // x.outputs % y.outputs, item % x.outputs)
        starts = [axis.offset + i * axis.stride for axis, i in zip((z, y, x), at, strict=True)]
        here = source + block * strides.block + starts[2] * strides.x
        several = (channels - block * LANES).at_most(LANES)
        to = out + (item - first) * row_bytes + block * taps * VECTOR_BYTES
        with code.loop(0, z.taps) as tap_z, code.loop(0, y.taps) as tap_y:
            place_z, place_y = starts[0] + tap_z * z.dilation, starts[1] + tap_y * y.dilation
            line = here + place_z * strides.z + place_y * strides.y
            there = code.all(*_within(place_z, z), *_within(place_y, y))
            with code.loop(0, x.taps) as tap_x:
                place_x = starts[2] + tap_x * x.dilation
                known = code.all(there, *_within(place_x, x))
                voxel = code.choose(known, line + tap_x * (x.dilation * strides.x), zeros)
                number = (tap_z * y.taps + tap_y) * x.taps + tap_x
                target = to + number * (several * 4)
                if blocked:  # what is beyond the last channel is written over by the next tap
                    target.store_floats(voxel.load(), LANES)
                else:
                    step = code.choose(known, strides.channel, code.number(0))
                    with code.loop(0, several) as channel:
                        one = (voxel + channel * step).load_floats(1)
                        target.store_floats(one, 1, channel * 4)
    code.finish()


def _within(place: Number, axis: Axis[Number]) -> list[ir.Value]:
    """Whether there is an input, and not padding."""
    return [place > -1, place < axis.size]


def _told(place: Address) -> Patches[Number]:
    """The numbers of `flat`, as code."""
    numbers = numbers_at(place)
    return Patches(*axes_from(numbers), strides_from(numbers), *islice(numbers, 2))
