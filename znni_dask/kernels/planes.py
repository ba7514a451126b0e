"""Convolution of few channels by Fourier transforms of planes: the compiled stages for one tile.

Where few channels come in, the products of transforms are few, and what takes time is to bring
spectra of answers to memory and back. Here nothing does: tiles are cut along y and x alone, spectra
of a plane of the input are numbers, shared by all output channels, and along z they are summed
directly. One thread takes some stacks of planes of tiles from the input to the answer, in memory of
its own that stays in its core's caches: what one core wrote another waits long for.

1. Spectra of every plane, along x by the definition (a lane for every frequency), along y by a
   codelet.
2. Frequency by frequency products with the kernels' spectra, summed over channels and taps along z
   for some planes at once; transforms back, with bias and activation.

=========  =======================================================  ==========================
array      from outside in                                          elements
=========  =======================================================  ==========================
plain      plane (by address), y, x                                 floats
waves      x                                                        pairs of 16 frequencies
spectra    stack, channel, frequencies along x and y, plane         complex numbers
kernels    output block, frequencies along x and y, channel, tap    pairs of 16 output channels
=========  =======================================================  ==========================

Planes are found through tables of addresses, and what of a tile counts by five numbers for each
stack of planes, as in `tiles`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from znni_dask.geometry import ceil_divide
from znni_dask.kernels.axes import NUMBER_BYTES
from znni_dask.kernels.code import LANES, VECTOR_BYTES, Function
from znni_dask.kernels.compiled import Library, host, is_kept, kept_library
from znni_dask.kernels.complex_product import PAIR_BYTES
from znni_dask.kernels.lines import complex_line, restored_line
from znni_dask.kernels.memory import odd_lines
from znni_dask.kernels.tiles import STACK_BYTES, Place, Tile

CONVOLVE = "convolve"
_PLANES_AT_ONCE = {True: 4, False: 1}  # with 32 long registers, and without
_ROWS_AT_ONCE = {True: 6, False: 2}  # of transforms along x
_FLOAT_BYTES, COMPLEX_BYTES = 4, 8
_STRIDES = ("channel_stride", "row_stride", "stride")


def refusal(tile: Tile) -> str | None:
    """Why there are no such tiles; None where there are. Their length along z is the kernel's."""
    if tile.half > LANES:
        return f"tiles have at most {2 * LANES - 2} voxels along x, not {tile.size[2]}"
    return Tile((1, *tile.size[1:]), (1, *tile.kernel[1:])).refusal()


def planes_at_once() -> int:
    """Planes that are computed together here."""
    return _PLANES_AT_ONCE[host().wide]


def line_bytes(planes: int) -> int:
    """Memory of one frequency of so many planes: an odd number of cache lines, lest lines fall on
    the same ones of a cache."""
    return odd_lines(planes * COMPLEX_BYTES)


def buffer_bytes(tile: Tile) -> int:
    """Memory that a thread needs beside spectra."""
    _, ny, nx = tile.size
    planes = planes_at_once()
    read = 2 * ny * PAIR_BYTES + _aside_bytes(tile)
    return max(read, planes * (ny + tile.made[1] * tile.half) * PAIR_BYTES + nx * VECTOR_BYTES)


def waves(length: int) -> NDArray[np.float32]:
    """For every place in a row what the frequencies of its spectrum take of it."""
    angles = -2 * np.pi / length * np.outer(np.arange(length), np.arange(LANES))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@cache
def planes_library(tile: Tile, relu: bool) -> Library:
    """The compiled function for a tile, with or without ReLU after it."""
    return kept_library(planes_module, tile, relu, host().wide)


def planes_kept(tile: Tile, relu: bool) -> bool:
    """Whether they are compiled already."""
    return is_kept(planes_module, tile, relu, host().wide)


def planes_module(tile: Tile, relu: bool, wide: bool) -> ir.Module:
    """It as it is written; ``wide`` for processors with 32 long registers.

    Items are ``together`` of the ``stacked`` stacks, the last perhaps fewer. ``memory`` is the
    thread's own: their spectra, and `buffer_bytes`. Tables and strides ``out_…`` are those of the
    output, the others of the input.
    """
    module = ir.Module(f"planes {tile.size} kernel {tile.kernel} relu {relu}")
    transform = _write_spectra(module, tile, wide)
    answer = _write_answers(module, tile, relu, _PLANES_AT_ONCE[wide])
    addresses = ("table", "stacks", "waves", "out_table", "out_stacks", "kernels", "biases")
    read = ("stacked", "together", "channels", "planes", "line_bytes", *_STRIDES)
    numbers = (*read, "blocks", "made", *(f"out_{name}" for name in _STRIDES), "first", "last")
    code = Function(module, CONVOLVE, ("memory", *addresses), numbers)
    memory, table, stacks, wave, out_table, out_stacks, kernels, biases = code.addresses
    stacked, together, channels, planes, line, *strides, first, last = code.numbers
    there, (blocks, outputs, *here) = strides[: len(_STRIDES)], strides[len(_STRIDES) :]
    buffer = memory + together * channels * line * tile.columns
    groups = (outputs + (_PLANES_AT_ONCE[wide] - 1)) // _PLANES_AT_ONCE[wide]
    with code.loop(first, last) as item:
        begin = item * together
        count = (stacked - begin).at_most(together)
        place = table + begin * planes * NUMBER_BYTES, stacks + begin * STACK_BYTES
        told = channels, planes, line, *there
        code.call(transform, buffer, *place, wave, memory, *told, 0, count * channels * planes)
        place = out_table + begin * outputs * NUMBER_BYTES, out_stacks + begin * STACK_BYTES
        told = count, channels, line, outputs, *here
        last_item = blocks * count * groups
        code.call(answer, buffer, *place, memory, kernels, biases, *told, 0, last_item)
    code.finish()
    return module


def _write_spectra(module: ir.Module, tile: Tile, wide: bool) -> Function:
    """Items are (stack, channel, plane)."""
    _, ny, nx = tile.size
    along_x = _row_spectra(module, tile, wide)
    along_y = complex_line(module, ny, ny, ny)
    code = Function(
        module,
        "spectra",
        ("buffer", "table", "stacks", "waves", "spectra"),
        ("channels", "planes", "line_bytes", *_STRIDES, "first", "last"),
        inner=True,
    )
    buffer, table, stacks, wave, spectra = code.addresses
    channels, planes, line, channel_stride, row_stride, stride, first, last = code.numbers
    lines, aside = buffer + ny * PAIR_BYTES, buffer + 2 * ny * PAIR_BYTES
    with code.loop(first, last) as item:
        plane = item % planes
        target = spectra + item // planes * (tile.columns * line) + plane * COMPLEX_BYTES
        place = Place.of(table, stacks, item // (channels * planes), plane, planes)
        with code.when(place.address.equals(0)), code.loop(0, 2 * ny) as i:
            lines.store(code.vector(), i * VECTOR_BYTES)
        with code.when(place.address.differs(0)):
            corner = place.corner + item // planes % channels * channel_stride
            inside = code.all(place.height.equals(ny), place.width.equals(nx))
            rows = code.choose(inside, corner, aside)
            with code.when((place.height + place.width) < ny + nx):
                with code.loop(0, _aside_bytes(tile) // VECTOR_BYTES) as i:
                    aside.store(code.vector(), i * VECTOR_BYTES)
                with (
                    code.loop(place.top, place.bottom) as y,
                    code.loop(place.left, place.right) as x,
                ):
                    value = (corner + y * row_stride).load_floats(1, x * stride)
                    aside.store_floats(value, 1, (y * nx + x) * _FLOAT_BYTES)
            steps = (
                code.choose(inside, n, code.number(m))
                for n, m in ((row_stride, nx * _FLOAT_BYTES), (stride, _FLOAT_BYTES))
            )
            code.call(along_x, rows, wave, buffer, *steps)
            code.call(along_y, buffer, lines, PAIR_BYTES, PAIR_BYTES)
        with code.loop(0, tile.half) as q, code.loop(0, ny) as y:
            source, to = lines + y * PAIR_BYTES + q * _FLOAT_BYTES, target + (q * ny + y) * line
            for shift in (0, 1):
                value = source.load_floats(1, shift * VECTOR_BYTES)
                to.store_floats(value, 1, shift * _FLOAT_BYTES)
    return code.finish()


def _row_spectra(module: ir.Module, tile: Tile, wide: bool) -> Function:
    """All rows of a tile along x."""
    _, ny, nx = tile.size
    most = _ROWS_AT_ONCE[wide]
    together = next(n for n in range(most, 0, -1) if ny % n == 0)
    code = Function(
        module, "along_x", ("source", "waves", "target"), ("row_stride", "stride"), inner=True
    )
    (source, wave, target), (row_stride, stride) = code.addresses, code.numbers
    with code.loop(0, ny, together) as y:
        rows = [source + (y + i) * row_stride for i in range(together)]
        sums = [[code.variable(code.vector()) for _ in "ri"] for _ in rows]
        with code.loop(0, nx) as x:
            parts = [wave.load(x * PAIR_BYTES + shift) for shift in (0, VECTOR_BYTES)]
            for row, totals in zip(rows, sums, strict=True):
                value = row.spread(x * stride)
                for total, part in zip(totals, parts, strict=True):
                    total.set(total.get() + value * part)
        for i, (re, im) in enumerate(sums):
            target.store(re.get(), (y + i) * PAIR_BYTES)
            target.store(im.get(), (y + i) * PAIR_BYTES + VECTOR_BYTES)
    return code.finish()


def _write_answers(module: ir.Module, tile: Tile, relu: bool, together: int) -> Function:
    """Items are (output block, stack, some planes)."""
    (_, ny, _), (_, my, _), half = tile.size, tile.made, tile.half
    several, single = (_product(module, tile, n) for n in (together, 1))
    along_y = complex_line(module, ny, ny, my, inverse=True)
    along_x = _restored_row(module, tile, relu)
    code = Function(
        module,
        "answers",
        ("buffer", "table", "stacks", "spectra", "kernels", "biases"),
        ("stacked", "channels", "line_bytes", "made", *_STRIDES, "first", "last"),
        inner=True,
    )
    column, table, stacks, spectra, kernels, biases = code.addresses
    stacked, channels, line_bytes, made, *strides, first, last = code.numbers
    block_stride, row_stride, stride = strides
    line, row_bytes = ny * PAIR_BYTES, half * PAIR_BYTES
    restored = column + together * line
    aside = restored + together * my * row_bytes
    groups = (made + (together - 1)) // together
    with code.loop(first, last) as item:
        block, stack = item // (stacked * groups), item // groups % stacked
        begin = item % groups * together
        count = (made - begin).at_most(together)
        source = spectra + stack * channels * (tile.columns * line_bytes) + begin * COMPLEX_BYTES
        with code.loop(0, half) as q:
            kernel = kernels + (block * half + q) * channels * (tile.kernel[0] * line)
            here = source + q * ny * line_bytes
            with code.when(count.equals(together)):
                code.call(several, here, kernel, column, channels, line_bytes)
            with code.when(count < together), code.loop(0, count) as z:
                one = here + z * COMPLEX_BYTES
                code.call(single, one, kernel, column + z * line, channels, line_bytes)
            with code.loop(0, count) as z:
                to = restored + z * (my * row_bytes) + q * PAIR_BYTES
                code.call(along_y, column + z * line, to, PAIR_BYTES, row_bytes)
        with code.loop(0, count) as z:
            place = Place.of(table, stacks, stack, begin + z, made)
            rows, corner = restored + z * (my * row_bytes), place.corner + block * block_stride
            with code.when(place.address.differs(0)), code.loop(place.top, place.bottom) as y:
                addresses = rows + y * row_bytes, corner + y * row_stride
                bias = biases + block * VECTOR_BYTES
                code.call(along_x, *addresses, bias, aside, stride, place.left, place.right)
    return code.finish()


def _restored_row(module: ir.Module, tile: Tile, relu: bool) -> Function:
    """Of a row, from its spectrum, what counts, with bias and activation."""
    nx, mx = tile.size[2], tile.made[2]
    whole, part = (
        restored_line(module, nx, mx, relu=relu, streamed=streamed) for streamed in (True, False)
    )
    code = Function(
        module,
        "restored_row",
        ("source", "target", "bias", "aside"),
        ("stride", "left", "right"),
        inner=True,
    )
    (source, target, bias, aside), (stride, left, right) = code.addresses, code.numbers
    with code.when((right - left).equals(mx)):
        code.call(whole, source, target, bias, stride)
    with code.when((right - left) < mx):
        code.call(part, source, aside, bias, VECTOR_BYTES)
        with code.loop(left, right) as x:
            target.store(aside.load(x * VECTOR_BYTES), x * stride, streamed=True)
    return code.finish()


def _product(module: ir.Module, tile: Tile, together: int) -> Function:
    """Sums of products for one frequency along x, all along y, and so many planes."""
    ny, taps = tile.size[1], tile.kernel[0]
    code = Function(
        module,
        f"product_{len(module.globals)}",
        ("source", "kernels", "target"),
        ("channels", "line_bytes"),
        inner=True,
    )
    (source, kernels, target), (channels, line_bytes) = code.addresses, code.numbers
    with code.loop(0, ny) as y:
        sums = [[code.variable(code.vector()) for _ in "ri"] for _ in range(together)]
        with code.loop(0, channels) as channel:
            weight = kernels + (y * channels + channel) * (taps * PAIR_BYTES)
            here = source + (channel * tile.columns + y) * line_bytes
            for tap in range(taps):
                c, d = (weight.load(tap * PAIR_BYTES + i) for i in (0, VECTOR_BYTES))
                for z, (re, im) in enumerate(sums):
                    a, b = (here.spread((z + tap) * COMPLEX_BYTES + i) for i in (0, _FLOAT_BYTES))
                    re.set(re.get() + a * c - b * d)
                    im.set(im.get() + a * d + b * c)
        for z, (re, im) in enumerate(sums):
            target.store(re.get(), (y + z * ny) * PAIR_BYTES)
            target.store(im.get(), (y + z * ny) * PAIR_BYTES + VECTOR_BYTES)
    return code.finish()


def _aside_bytes(tile: Tile) -> int:
    """Memory of a tile of a plane, in whole vectors."""
    values = tile.size[1] * tile.size[2]
    return ceil_divide(values, LANES) * VECTOR_BYTES
