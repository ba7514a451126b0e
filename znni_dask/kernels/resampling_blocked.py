"""Padding, nearest and linear resizing of blocks of channels, as in `kernels.resampling`.

Items are (batch and block, plane of the output). Answers go past the caches: they are not read
soon.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import VECTOR_BYTES, Address, Function, Number, Vector
from znni_dask.kernels.compiled import Library, kept_library

GATHER, INTERPOLATE = "gather", "interpolate"
_SIZES = ("size_z", "size_y", "size_x", "out_z", "out_y", "out_x")


@cache
def resampling_library() -> Library:
    """The compiled functions."""
    return kept_library(resampling_module)


def resampling_module() -> ir.Module:
    """The functions as they are written."""
    module = ir.Module("resampling")
    _write_gather(module)
    _write_interpolate(module)
    return module


def _write_gather(module: ir.Module) -> None:
    """``index_z``, ``index_y``, ``index_x`` say where in the input each output is, -1 where it is
    ``value``; along x that is so before ``left`` and from ``right`` on."""
    addresses = ("x", "out", "index_z", "index_y", "index_x", "value")
    code = Function(module, GATHER, addresses, (*_SIZES, "left", "right", "first", "last"))
    x, out, index_z, index_y, index_x, value = code.addresses
    size_z, size_y, size_x, out_z, out_y, out_x, left, right, first, last = code.numbers
    filling = value.spread()

    def fill(target: Address, low: Number | int, high: Number) -> None:
        with code.loop(low, high) as i:
            target.store(filling, i * VECTOR_BYTES, streamed=True)

    with code.loop(first, last) as item, code.loop(0, out_y) as row:
        z, y = index_z.number(item % out_z * 8), index_y.number(row * 8)
        target = out + (item * out_y + row) * out_x * VECTOR_BYTES
        with code.when(z.at_most(y) < 0):
            fill(target, 0, out_x)
        with code.when(z.at_most(y) > -1):
            plane = item // out_z * size_z + z
            source = x + (plane * size_y + y) * size_x * VECTOR_BYTES
            fill(target, 0, left)
            with code.loop(left, right) as i:
                place = index_x.number(i * 8) * VECTOR_BYTES
                target.store(source.load(place), i * VECTOR_BYTES, streamed=True)
            fill(target, right, out_x)
    code.finish()


def _write_interpolate(module: ir.Module) -> None:
    """Along each axis an output lies between two inputs, whose places follow one another in
    ``places_z`` …, and ``weights_z`` … of the way from one to the other. ``line`` is the thread's
    own memory, for a row of the input."""
    tables = [f"{kind}_{axis}" for axis in "zyx" for kind in ("places", "weights")]
    code = Function(module, INTERPOLATE, ("x", "out", "line", *tables), (*_SIZES, "first", "last"))
    x, out, line, places_z, weights_z, places_y, weights_y, places_x, weights_x = code.addresses
    size_z, size_y, size_x, out_z, out_y, out_x, first, last = code.numbers
    row_bytes = size_x * VECTOR_BYTES
    with code.loop(first, last) as item, code.loop(0, out_y) as row:
        z = item % out_z
        sample = x + item // out_z * size_z * size_y * row_bytes
        planes = [sample + n * size_y * row_bytes for n in _pair(places_z, z)]
        rows = [[plane + n * row_bytes for n in _pair(places_y, row)] for plane in planes]
        far, aside = weights_z.spread(z * 4), weights_y.spread(row * 4)
        with code.loop(0, size_x) as i:
            near, other = (_between(pair, i, i, aside) for pair in rows)
            line.store(near + far * (other - near), i * VECTOR_BYTES)
        target = out + (item * out_y + row) * out_x * VECTOR_BYTES
        with code.loop(0, out_x) as i:
            a, b = _pair(places_x, i)
            value = _between([line, line], a, b, weights_x.spread(i * 4))
            target.store(value, i * VECTOR_BYTES, streamed=True)
    code.finish()


def _pair(places: Address, which: Number) -> tuple[Number, Number]:
    return places.number(which * 16), places.number(which * 16 + 8)


def _between(rows: list[Address], a: Number, b: Number, weight: Vector) -> Vector:
    """Voxel ``a`` of one row and ``b`` of the other, ``weight`` of the way."""
    begin, end = rows[0].load(a * VECTOR_BYTES), rows[1].load(b * VECTOR_BYTES)
    return begin + weight * (end - begin)
