"""The sum of two arrays, value by value, where calling costs more than adding."""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from znni_dask.kernels.code import VECTOR_BYTES, Function
from znni_dask.kernels.compiled import Library, kept_library

ADD = "add"
LINE = 256  # vectors


@cache
def adding_library() -> Library:
    """The compiled function."""
    return kept_library(adding_module)


def adding_module() -> ir.Module:
    """It as it is written. Items are lines of ``count`` vectors; where ``relu`` is not 0, what is
    negative becomes zero. ``out`` may be one of the two."""
    module = ir.Module(ADD)
    code = Function(module, ADD, ("one", "other", "out"), ("count", "relu", "first", "last"))
    (one, other, out), (count, relu, first, last) = code.addresses, code.numbers
    least = code.least(relu)
    with code.loop(first * LINE, (last * LINE).at_most(count)) as number:
        place = number * VECTOR_BYTES
        out.store((one.load(place) + other.load(place)).at_least(least), place)
    code.finish()
    return module
