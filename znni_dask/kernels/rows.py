"""Direct convolution, row of outputs by row: compiled for a number of output blocks.

Sums of some voxels of a row, for all output blocks of a group, stay in registers while the rows
of the input behind them are read once. An input row is one channel of a plain array, or a block of
channels; it is found through a table of addresses, so that rows which are padding are one row of
zeros. Work is over items, one row of outputs each.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import VECTOR_BYTES, Address, Function, Number
from znni_dask.kernels.compiled import Library, compiled_library, host

CONVOLVE = "convolve"
MOST_BLOCKS = {True: 5, False: 2}  # of output channels at once: with 32 long registers, or without
_VOXELS = {True: {1: 14, 2: 12, 3: 8, 4: 6, 5: 5}, False: {1: 4, 2: 2}}  # at once, for each
_ROW_NUMBERS = ("full_rows", "full_channels", "rest_rows", "rest_channels", "taps", "tap_step")


def most_blocks() -> int:
    """Output blocks that can be computed at once here."""
    return MOST_BLOCKS[host().wide]


@cache
def rows_library(blocks: int, relu: bool) -> Library:
    """The compiled function for so many output blocks at once."""
    return compiled_library(rows_module(blocks, relu, host().wide))


def rows_module(blocks: int, relu: bool, wide: bool) -> ir.Module:
    """It as it is written.

    ``rows`` holds for every item the addresses of its input rows: ``full_rows`` with
    ``full_channels`` each, then ``rest_rows`` with ``rest_channels``. ``places`` holds where the
    first voxel of each item goes; its blocks lie ``block_stride`` apart. ``weights`` follow the
    rows: for every one tap, channel, output block, 16 output channels.
    """
    module = ir.Module(f"rows blocks {blocks} relu {relu}")
    voxels = _VOXELS[wide][blocks]
    several, single = (_write_voxels(module, n, blocks, relu) for n in (voxels, 1))
    code = Function(
        module,
        CONVOLVE,
        ("rows", "places", "weights", "biases"),
        (*_ROW_NUMBERS, "step", "width", "block_stride", "first", "last"),
    )
    rows, places, weights, biases = code.addresses
    *fixed, step, width, block_stride, first, last = code.numbers
    with code.loop(first, last) as item:
        here, out = rows + item * (fixed[0] + fixed[2]) * 8, places.address(item * 8)
        whole = width // voxels * voxels
        for function, begin, end, many in ((several, 0, whole, voxels), (single, whole, width, 1)):
            with code.loop(begin, end, many) as x:
                to = out + x * VECTOR_BYTES
                code.call(function, here, weights, biases, to, *fixed, step, x * step, block_stride)
    code.finish()
    return module


def _write_voxels(module: ir.Module, voxels: int, blocks: int, relu: bool) -> Function:
    """So many neighbouring voxels of a row, in all blocks."""
    code = Function(
        module,
        f"voxels_{voxels}",
        ("rows", "weights", "biases", "out"),
        (*_ROW_NUMBERS, "step", "begin", "block_stride"),
        inner=True,
    )
    rows, weights, biases, out = code.addresses
    full_rows, full_channels, rest_rows, rest_channels, *numbers = code.numbers
    taps, tap_step, step, begin, block_stride = numbers
    starts = [biases.load(b * VECTOR_BYTES) for b in range(blocks)]
    sums = [[code.variable(start) for start in starts] for _ in range(voxels)]

    def add(first: Number | int, count: Number, channels: Number, taken: Address) -> None:
        with code.loop(0, count) as row:
            source = rows.address((row + first) * 8) + begin
            kernel = taken + row * taps * channels * (blocks * VECTOR_BYTES)
            with code.loop(0, taps) as tap, code.loop(0, channels) as channel:
                place = kernel + (tap * channels + channel) * (blocks * VECTOR_BYTES)
                values = [place.load(b * VECTOR_BYTES) for b in range(blocks)]
                voxel = source + tap * tap_step + channel * 4
                for number, block_sums in enumerate(sums):
                    x = voxel.spread(step * number)
                    for total, value in zip(block_sums, values, strict=True):
                        total.set(total.get() + x * value)

    add(0, full_rows, full_channels, weights)
    rest = weights + full_rows * taps * full_channels * (blocks * VECTOR_BYTES)
    add(full_rows, rest_rows, rest_channels, rest)
    zero = code.vector()
    for number, block_sums in enumerate(sums):
        for block, total in enumerate(block_sums):
            value = total.get().at_least(zero) if relu else total.get()
            (out + block_stride * block).store(value, number * VECTOR_BYTES)
    return code.finish()
