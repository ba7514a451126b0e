"""Planes that lie in pages, anywhere in memory, copied to and from arrays in one piece."""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import FLOAT_BYTES, LANES, VECTOR_BYTES, Function
from znni_dask.kernels.compiled import Library, kept_library

GATHER, SCATTER = "gather", "scatter"


@cache
def pages_library() -> Library:
    """The compiled functions."""
    return kept_library(pages_module)


def pages_module() -> ir.Module:
    """They as they are written.

    Items are (sample, block, plane) of an array of so many ``blocks`` and ``planes``, a plane of
    a block being ``plane_bytes`` long. ``pages`` holds for every (sample, plane) where its first
    block lies, the others follow.
    """
    module = ir.Module("pages")
    for name in (GATHER, SCATTER):
        code = Function(
            module, name, ("pages", "array"), ("blocks", "planes", "plane_bytes", "first", "last")
        )
        (pages, array), (blocks, planes, plane_bytes, first, last) = code.addresses, code.numbers
        with code.loop(first, last) as item:
            sample, block = item // (blocks * planes), item // planes % blocks
            entry = (sample * planes + item % planes) * 8
            page = pages.address(entry) + block * plane_bytes
            here = array + item * plane_bytes
            source, target = (page, here) if name == GATHER else (here, page)
            whole = plane_bytes // VECTOR_BYTES * VECTOR_BYTES
            with code.loop(0, whole, VECTOR_BYTES) as place:
                target.store_floats(source.load_floats(LANES, place), LANES, place)
            with code.loop(whole, plane_bytes, FLOAT_BYTES) as place:
                target.store_floats(source.load_floats(1, place), 1, place)
        code.finish()
    return module
