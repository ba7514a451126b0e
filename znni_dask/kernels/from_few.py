"""Direct convolution of few channels, row of outputs by row: compiled for a shape of kernels.

Where few channels come in, sums are short: what takes time is to find taps one by one, and to write
the answer. So the taps of a plane are straight-line code, and sixteen output channels of some rows
are made at once: what is written, past the caches, lies in one stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

from llvmlite import ir

from znni_dask.kernels.code import FLOAT_BYTES, VECTOR_BYTES, Function, Number
from znni_dask.kernels.compiled import Library, host, is_kept, kept_library

CONVOLVE, PAD = "convolve", "pad"
_VOXELS = {True: 14, False: 4}  # summed at once, with 32 long registers, and without
_INPUT = ("channels", "channel_bytes", "taps_z", "tap_z_bytes", "tap_y_bytes")


class Shape(NamedTuple):
    """Taps along y and x; stride and dilation along x."""

    taps_y: int
    taps_x: int
    stride: int
    dilation: int


@cache
def from_few_library(shape: Shape) -> Library:
    """The compiled functions for a shape of kernels."""
    return kept_library(from_few_module, shape, host().wide)


def from_few_kept(shape: Shape) -> bool:
    """Whether they are compiled already."""
    return is_kept(from_few_module, shape, host().wide)


def from_few_module(shape: Shape, wide: bool) -> ir.Module:
    """They as they are written."""
    module = ir.Module(f"from few {tuple(shape)}")
    _write_convolve(module, shape, _VOXELS[wide])
    _write_pad(module)
    return module


def _write_convolve(module: ir.Module, shape: Shape, most: int) -> None:
    """Items are (batch, z, some rows, output block), of ``together`` rows.

    ``source`` is plain and holds all that taps reach: how far apart taps and first taps of outputs
    are there is told, along x compiled. ``weights`` are for every output block, channel, tap along
    z, y and x: a vector. ``made`` holds for every (batch, z) where its first output block goes:
    ``rows`` of ``width`` voxels, and the next block ``block_bytes`` behind it.
    """
    sums = {voxels: _sums(module, shape, voxels) for voxels in range(1, most + 1)}
    code = Function(
        module,
        CONVOLVE,
        ("source", "weights", "biases", "made"),
        (
            *(*_INPUT, "batch_bytes", "step_z_bytes", "step_y_bytes", "block_bytes"),
            *("blocks", "planes", "rows", "width", "together", "relu", "first", "last"),
        ),
    )
    source, weights, biases, made = code.addresses
    taps, numbers = code.numbers[: len(_INPUT)], code.numbers[len(_INPUT) :]
    batch_bytes, step_z, step_y, block_bytes, *numbers = numbers
    blocks, planes, rows, width, together, relu, first, last = numbers
    channels, _, taps_z, *_ = taps
    groups = (rows + (together - 1)) // together
    row_bytes = width * VECTOR_BYTES
    weight_bytes = channels * taps_z * (shape.taps_y * shape.taps_x * VECTOR_BYTES)
    with code.loop(first, last) as item:
        plane, block = item // (blocks * groups), item % blocks
        batch, z = plane // planes, plane % planes
        begin = item // blocks % groups * together
        here = source + batch * batch_bytes + z * step_z
        weight, bias = weights + block * weight_bytes, biases + block * VECTOR_BYTES
        to = made.address(plane * 8) + block * block_bytes
        with code.loop(begin, (begin + together).at_most(rows)) as y:
            row, line = here + y * step_y, to + y * row_bytes
            for x, some in _parts(code, width, sums):
                at = row + x * (shape.stride * FLOAT_BYTES)
                code.call(some, at, weight, bias, line + x * VECTOR_BYTES, *taps, relu)
    code.finish()


def _write_pad(module: ir.Module) -> None:
    """What of a plain array lies in a box, zeros around it. Items are (batch, channel, z) of the
    box, which is ``made_…`` voxels large and begins at ``first_…`` of the ``there_…`` voxels.
    ``pages`` holds for every (batch, z) where the plane of its first channel lies, the next one
    ``channel_bytes`` behind it."""
    names = [f"{what}_{axis}" for what in ("there", "first", "made") for axis in "zyx"]
    names += ["channels", "channel_bytes"]
    code = Function(module, PAD, ("pages", "out"), (*names, "first", "last"))
    (pages, out), (*numbers, channels, channel_bytes, first, last) = code.addresses, code.numbers
    there, begins, made = numbers[:3], numbers[3:6], numbers[6:]
    inside = [
        ((begin * -1).at_least(0), (size - begin).at_most(length))
        for size, begin, length in zip(there, begins, made, strict=True)
    ]
    with code.loop(first, last) as item:
        batch, z = item // (channels * made[0]), item % made[0]
        to = out + item * (made[1] * made[2] * FLOAT_BYTES)
        channel = item // made[0] % channels
        with code.loop(0, made[1] * made[2]) as i:
            to.store_floats(code.vector(), 1, i * FLOAT_BYTES)
        with (
            code.when(code.all(z > inside[0][0] - 1, z < inside[0][1])),
            code.loop(*inside[1]) as y,
            code.loop(*inside[2]) as x,
        ):
            page = pages.address((batch * there[0] + z + begins[0]) * 8) + channel * channel_bytes
            place = (y + begins[1]) * there[2] + x + begins[2]
            value = page.load_floats(1, place * FLOAT_BYTES)
            to.store_floats(value, 1, (y * made[2] + x) * FLOAT_BYTES)
    code.finish()


def _parts(
    code: Function, width: Number, sums: dict[int, Function]
) -> Iterator[tuple[Number, Function]]:
    """Write loops over a row in as few parts as there can be, as equal as may be: where each
    begins, and the function for so many voxels."""
    parts = (width + (max(sums) - 1)) // max(sums)
    fewer = width // parts
    more = width - fewer * parts  # parts of one voxel more
    for voxels, some in sums.items():
        with code.when(fewer.equals(voxels - 1)), code.loop(0, more * voxels, voxels) as x:
            yield x, some
        begin = more * (voxels + 1)
        with code.when(fewer.equals(voxels)), code.loop(begin, width, voxels) as x:
            yield x, some


def _sums(module: ir.Module, shape: Shape, voxels: int) -> Function:
    """Of so many neighbouring voxels sixteen output channels."""
    code = Function(
        module,
        f"sums_of_{voxels}",
        ("source", "weights", "bias", "out"),
        (*_INPUT, "relu"),
        inner=True,
    )
    source, weights, bias, out = code.addresses
    channels, channel_bytes, taps_z, tap_z_bytes, tap_y_bytes, relu = code.numbers
    sums = [code.variable(code.vector()) for _ in range(voxels)]
    plane_bytes = shape.taps_y * shape.taps_x * VECTOR_BYTES
    with code.loop(0, channels) as channel, code.loop(0, taps_z) as z:
        plane = source + channel * channel_bytes + z * tap_z_bytes
        weight = weights + (channel * taps_z + z) * plane_bytes
        for y, x in product(range(shape.taps_y), range(shape.taps_x)):
            factor = weight.load((y * shape.taps_x + x) * VECTOR_BYTES)
            row = plane + tap_y_bytes * y
            for v, total in enumerate(sums):
                place = (v * shape.stride + x * shape.dilation) * FLOAT_BYTES
                total.set(total.get() + row.spread(place) * factor)
    added = bias.load()
    least = code.least(relu)
    for v, total in enumerate(sums):
        out.store((total.get() + added).at_least(least), v * VECTOR_BYTES, streamed=True)
    return code.finish()
