"""Transforms along one axis of a tile in CUDA C++: functions of straight-line code, by which a
thread transforms a line in its registers.

What `kernels.codelets` adds and multiplies is written down here, statement by statement. A line is
read whole before it is written, so both may lie in the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from znni_dask.kernels.codelets import Complex, backward, backward_to_real, forward

Place = Callable[[int], str]
"""In C++, where value j of a line lies."""


class Statements:
    """Statements in the order in which they were asked for."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def value(self, expression: str) -> Value:
        """What an expression is, under a name of its own."""
        name = f"v{len(self._lines)}"
        self._lines.append(f"const float {name} = {expression};")
        return Value(self, name)

    def pair(self, place: str) -> Complex:
        """The complex number at a place."""
        re, im = (cast("Any", self.value(f"{place}.{part}")) for part in "xy")
        return Complex(re, im)

    def put(self, place: str, expression: str) -> None:
        """Write to a place."""
        self._lines.append(f"{place} = {expression};")

    def function(self, name: str, arguments: str) -> str:
        """The statements as a function."""
        body = "".join(f"    {line}\n" for line in self._lines)
        return f"static __device__ __forceinline__ void {name}({arguments})\n{{\n{body}}}\n"


@dataclass(frozen=True, eq=False)
class Value:
    """A float with a name: what `kernels.codelets` computes with."""

    code: Statements
    name: str

    def __add__(self, other: Value) -> Value:
        return self.code.value(f"{self.name} + {other.name}")

    def __sub__(self, other: Value) -> Value:
        return self.code.value(f"{self.name} - {other.name}")

    def __mul__(self, factor: float) -> Value:
        return self.code.value(f"{self.name} * {factor:.9e}f")

    def __neg__(self) -> Value:
        return self.code.value(f"-{self.name}")


def complex_line(
    name: str, arguments: str, length: int, made: int, read: Place, write: Place, *, inverse: bool
) -> str:
    """The first ``made`` values of a complex transform."""
    code = Statements()
    x = [code.pair(read(j)) for j in range(length)]
    _put(code, (backward if inverse else forward)(x)[:made], write)
    return code.function(name, arguments)


def real_line(name: str, arguments: str, length: int, line: Place) -> str:
    """The first half of the spectrum, and one, of real values, of which each two lie where complex
    numbers do; in place."""
    code = Statements()
    pairs = [code.pair(line(j)) for j in range(length // 2)]
    values: list[Any] = [part for pair in pairs for part in pair]
    _put(code, forward([Complex(part, None) for part in values])[: length // 2 + 1], line)
    return code.function(name, arguments)


def restored_line(
    name: str, arguments: str, length: int, made: int, line: Place, bias: str, *, relu: bool
) -> str:
    """The first ``made`` real values from half a spectrum, with bias and activation, of which each
    two lie where complex numbers did; in place."""
    code = Statements()
    half = [code.pair(line(j)) for j in range(length // 2 + 1)]
    values = []
    for part in backward_to_real(half, length)[:made]:
        name_of = bias if part is None else code.value(f"{_text(part)} + {bias}").name
        values.append(f"{name_of} < 0.0f ? 0.0f : {name_of}" if relu else name_of)
    for j in range(0, made, 2):
        if j + 1 < made:
            code.put(line(j // 2), f"make_float2({values[j]}, {values[j + 1]})")
        else:
            code.put(f"{line(j // 2)}.x", values[j])
    return code.function(name, arguments)


def _put(code: Statements, values: list[Complex], write: Place) -> None:
    for j, value in enumerate(values):
        code.put(write(j), f"make_float2({_text(value.re)}, {_text(value.im)})")


def _text(part: Any) -> str:
    return "0.0f" if part is None else str(part.name)
