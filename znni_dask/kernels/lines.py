"""Transforms along one axis of a tile, as functions: each reads a line of vectors or pairs in
memory, with a stride in bytes, and writes one.

Of ``length`` values the first ``taken`` are read, the others are zero; the first ``made`` results
are written. A pair is 16 real and 16 imaginary parts.
"""

from __future__ import annotations

from llvmlite import ir

from znni_dask.kernels.code import FLOAT_BYTES, VECTOR_BYTES, Address, Function, Integer
from znni_dask.kernels.codelets import ZERO, Complex, backward, backward_to_real, forward
from znni_dask.kernels.complex_product import PAIR_BYTES


def complex_line(
    module: ir.Module,
    length: int,
    taken: int,
    made: int,
    *,
    inverse: bool = False,
    sums: bool = False,
    streamed: bool = False,
) -> Function:
    """A complex transform (source, target, their strides). With ``sums`` every pair is followed
    by the sum of its parts; ``streamed`` writes past the caches."""
    code = _line(module)
    (source, target), (read, write) = code.addresses, code.numbers
    x = _pairs(source, read, taken) + [ZERO] * (length - taken)
    _put(code, (backward if inverse else forward)(x)[:made], target, write, sums, streamed)
    return code.finish()


def real_line(module: ir.Module, length: int, taken: int) -> Function:
    """The first half of the spectrum, and one, of real values (source, target, their strides)."""
    code = _line(module)
    (source, target), (read, write) = code.addresses, code.numbers
    x = [Complex(source.load(read * j), None) for j in range(taken)] + [ZERO] * (length - taken)
    _put(code, forward(x)[: length // 2 + 1], target, write)
    return code.finish()


def gathered_line(module: ir.Module, length: int, taken: int, scale: float) -> Function:
    """The conjugate of what `real_line` makes, times ``scale``, of sixteen lines that each lie in
    one stretch (source, target, bytes from line to line and stride of the target)."""
    code = _line(module)
    (source, target), (apart, write) = code.addresses, code.numbers
    values = [(source + FLOAT_BYTES * j).gathered(apart) * scale for j in range(taken)]
    x = [Complex(value, None) for value in values] + [ZERO] * (length - taken)
    _put(code, backward(x)[: length // 2 + 1], target, write)
    return code.finish()


def restored_line(
    module: ir.Module, length: int, made: int, *, relu: bool, streamed: bool
) -> Function:
    """Real values from half a spectrum, contiguous (source, target, bias, stride of the target),
    with bias and activation."""
    code = Function(module, _name(module), ("source", "target", "bias"), ("write",), inner=True)
    (source, target, bias), (write,) = code.addresses, code.numbers
    half = _pairs(source, PAIR_BYTES, length // 2 + 1)
    added, zero = bias.load(), code.vector()
    for j, part in enumerate(backward_to_real(half, length)[:made]):
        value = added if part is None else part + added
        target.store(value.at_least(zero) if relu else value, write * j, streamed=streamed)
    return code.finish()


def _line(module: ir.Module) -> Function:
    return Function(module, _name(module), ("source", "target"), ("read", "write"), inner=True)


def _name(module: ir.Module) -> str:
    return f"line_{len(module.globals)}"


def _pairs(source: Address, stride: Integer, length: int) -> list[Complex]:
    places = [source + stride * j for j in range(length)]
    return [Complex(place.load(), place.load(VECTOR_BYTES)) for place in places]


def _put(
    code: Function,
    values: list[Complex],
    target: Address,
    stride: Integer,
    sums: bool = False,
    streamed: bool = False,
) -> None:
    for j, value in enumerate(values):
        re, im = (code.vector() if part is None else part for part in value)
        for i, part in enumerate((re, im, re + im) if sums else (re, im)):
            target.store(part, stride * j + i * VECTOR_BYTES, streamed=streamed)
