"""Writing compiled functions, vector by vector: a thin layer over LLVM's intermediate language.

What is written with the operators of `Number`, `Vector` and `Address` becomes code. Vectors are
sixteen floats, the channels of a block side by side (`LANES`); a machine with shorter vectors
takes several for one. Numbers are 64 bits wide, offsets are in bytes; plain Python numbers become
part of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias, TypeVar

from llvmlite import ir

LANES = 16
FLOAT_BYTES = 4
VECTOR_BYTES = FLOAT_BYTES * LANES

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_NUMBER = ir.IntType(64)
_POINTER = ir.PointerType()
_BYTE = ir.IntType(8)
_INDEX = ir.IntType(32)
_LANE_NUMBERS = ir.VectorType(_INDEX, LANES)
_FUSED = ("contract", "nsz")  # a product and a sum may be rounded once
_CLOSEST = 3  # of prefetched lines: into the first-level cache

Integer: TypeAlias = "Number | int"


@dataclass(frozen=True, eq=False)
class Number:
    """A whole number that the code computes with."""

    build: ir.IRBuilder
    value: ir.Value

    def __add__(self, other: Integer) -> Number:
        if isinstance(other, int) and other == 0:
            return self
        return self._new(self.build.add(self.value, _plain(other), flags=("nsw",)))

    __radd__ = __add__

    def __sub__(self, other: Integer) -> Number:
        return self._new(self.build.sub(self.value, _plain(other), flags=("nsw",)))

    def __mul__(self, other: Integer) -> Number:
        return self._new(self.build.mul(self.value, _plain(other), flags=("nsw",)))

    __rmul__ = __mul__

    def __floordiv__(self, other: Integer) -> Number:
        """Of numbers that are not negative."""
        return self._new(self.build.udiv(self.value, _plain(other)))

    def __mod__(self, other: Integer) -> Number:
        return self - self // other * other

    def __lt__(self, other: Integer) -> ir.Value:
        return self.build.icmp_signed("<", self.value, _plain(other))

    def __gt__(self, other: Integer) -> ir.Value:
        return self.build.icmp_signed(">", self.value, _plain(other))

    def equals(self, other: Integer) -> ir.Value:
        """Whether two numbers are the same."""
        return self.build.icmp_signed("==", self.value, _plain(other))

    def differs(self, other: Integer) -> ir.Value:
        """Whether they are not."""
        return self.build.icmp_signed("!=", self.value, _plain(other))

    def at_least(self, other: Integer) -> Number:
        """The larger of two numbers."""
        return self._new(self.build.select(self > other, self.value, _plain(other)))

    def at_most(self, other: Integer) -> Number:
        """The smaller of two numbers."""
        return self._new(self.build.select(self < other, self.value, _plain(other)))

    def _new(self, value: ir.Value) -> Number:
        return Number(self.build, value)


@dataclass(frozen=True, eq=False)
class Vector:
    """Sixteen floats."""

    build: ir.IRBuilder
    value: ir.Value

    def __add__(self, other: Vector) -> Vector:
        return self._new(self.build.fadd(self.value, other.value, flags=_FUSED))

    def __sub__(self, other: Vector) -> Vector:
        return self._new(self.build.fsub(self.value, other.value, flags=_FUSED))

    def __mul__(self, other: Vector | float) -> Vector:
        factor = other.value if isinstance(other, Vector) else ir.Constant(_VECTOR, [other] * LANES)
        return self._new(self.build.fmul(self.value, factor, flags=_FUSED))

    def __neg__(self) -> Vector:
        return self._new(self.build.fneg(self.value))

    def at_least(self, other: Vector) -> Vector:
        """The larger, lane by lane; NaN stays NaN."""
        smaller = self.build.fcmp_ordered("<", self.value, other.value)
        return self._new(self.build.select(smaller, other.value, self.value))

    def above(self, other: Vector) -> Vector:
        """The larger, lane by lane, or ``other`` where either is NaN."""
        larger = self.build.fcmp_ordered(">", self.value, other.value)
        return self._new(self.build.select(larger, self.value, other.value))

    def largest(self, other: Vector) -> Vector:
        """The larger, lane by lane; NaN where either is NaN."""
        module, name = self.build.module, f"llvm.maximum.v{LANES}f32"
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        flags = ("nsz",)  # zeros are alike
        return self._new(self.build.call(function, [self.value, other.value], fastmath=flags))

    def chosen(self, other: Vector, lanes: Sequence[int]) -> Vector:
        """For every lane one of these sixteen floats, or, from number 16 on, of the other's."""
        places = ir.Constant(_LANE_NUMBERS, list(lanes))
        return self._new(self.build.shuffle_vector(self.value, other.value, places))

    def first(self, count: Number) -> Vector:
        """The first lanes, so many; zero in the others, whatever was there."""
        lanes = ir.Constant(_LANE_NUMBERS, list(range(LANES)))
        end = _spread(self.build, self.build.trunc(count.value, _INDEX), _LANE_NUMBERS)
        taken = self.build.icmp_signed("<", lanes, end)
        return self._new(self.build.select(taken, self.value, ir.Constant(_VECTOR, None)))

    def neighbours(self, other: Vector) -> Vector:
        """Sums of each two neighbouring lanes: eight of this vector, then eight of the other."""
        even, odd = (
            ir.Constant(_LANE_NUMBERS, list(range(first, 2 * LANES, 2))) for first in (0, 1)
        )
        build, both = self.build, (self.value, other.value)
        left, right = (self._new(build.shuffle_vector(*both, lanes)) for lanes in (even, odd))
        return left + right

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.build, value)


@dataclass(frozen=True, eq=False)
class Address:
    """A place in memory."""

    build: ir.IRBuilder
    value: ir.Value

    def __add__(self, offset: Integer) -> Address:
        if isinstance(offset, int) and offset == 0:
            return self
        moved = self.build.gep(self.value, [_plain(offset)], source_etype=_BYTE)
        return Address(self.build, moved)

    def load(self, offset: Integer = 0) -> Vector:
        """The vector there."""
        return Vector(self.build, self._load(offset, _VECTOR, VECTOR_BYTES))

    def store(self, vector: Vector, offset: Integer = 0, *, streamed: bool = False) -> None:
        """Write a vector; ``streamed`` past the caches, for what is not read soon."""
        written = self.build.store(vector.value, (self + offset).value, align=VECTOR_BYTES)
        if streamed:
            mark = self.build.module.add_metadata([ir.Constant(_INDEX, 1)])
            written.set_metadata("nontemporal", mark)

    def load_floats(self, count: int, offset: Integer = 0) -> Vector:
        """The floats there, at most sixteen, in the first lanes; the others mean nothing."""
        few = self._load(offset, ir.VectorType(_FLOAT, count), 4)
        lanes = ir.Constant(_LANE_NUMBERS, [min(lane, count - 1) for lane in range(LANES)])
        return Vector(self.build, self.build.shuffle_vector(few, few, lanes))

    def store_floats(self, vector: Vector, count: int, offset: Integer = 0) -> None:
        """Write the first lanes, so many."""
        lanes = ir.Constant(ir.VectorType(_INDEX, count), list(range(count)))
        few = self.build.shuffle_vector(vector.value, vector.value, lanes)
        self.build.store(few, (self + offset).value, align=4)

    def gathered(self, apart: Integer) -> Vector:
        """The float there and fifteen others, each so many bytes after the one before."""
        value = ir.Constant(_VECTOR, ir.Undefined)
        for lane in range(LANES):
            one = self._load(apart * lane, _FLOAT, 4)
            value = self.build.insert_element(value, one, _INDEX(lane))
        return Vector(self.build, value)

    def spread(self, offset: Integer = 0) -> Vector:
        """The one float there, in all lanes."""
        return Vector(self.build, _spread(self.build, self._load(offset, _FLOAT, 4), _VECTOR))

    def number(self, offset: Integer = 0) -> Number:
        """The number there."""
        return Number(self.build, self._load(offset, _NUMBER, 8))

    def address(self, offset: Integer = 0) -> Address:
        """The address there."""
        return Address(self.build, self._load(offset, _POINTER, 8))

    def prefetch(self, offset: Integer = 0, *, written: bool = False) -> None:
        """Have the cache line there fetched: it is read soon, or ``written``."""
        module, name = self.build.module, "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [_POINTER, _INDEX, _INDEX, _INDEX])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        how = [_INDEX(int(written)), _INDEX(_CLOSEST), _INDEX(1)]
        self.build.call(function, [(self + offset).value, *how])

    def _load(self, offset: Integer, kind: ir.Type, align: int) -> ir.Value:
        return self.build.load((self + offset).value, typ=kind, align=align)


Value = TypeVar("Value", Number, Vector, Address)


class Variable:
    """A vector that changes in loops; the compiler keeps it in a register."""

    def __init__(self, build: ir.IRBuilder, entry: ir.Block, value: Vector) -> None:
        self._build = build
        with build.goto_block(entry):
            self._place = build.alloca(_VECTOR)
        self.set(value)

    def get(self) -> Vector:
        """What it is now."""
        return Vector(self._build, self._build.load(self._place, typ=_VECTOR))

    def set(self, value: Vector) -> None:
        """Change it."""
        self._build.store(value.value, self._place)


class Function:
    """A function being written: it takes addresses, then numbers.

    An ``inner`` function is for other functions of its module and is not inlined: registers are
    allotted for it alone.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        addresses: Sequence[str],
        numbers: Sequence[str],
        inner: bool = False,
    ) -> None:
        kinds = [_POINTER] * len(addresses) + [_NUMBER] * len(numbers)
        self.written = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
        if inner:
            self.written.linkage = "internal"
            self.written.attributes.add("noinline")
        for argument, label in zip(self.written.args, [*addresses, *numbers], strict=True):
            argument.name = label
        self._addresses = len(addresses)
        self._entry = self.written.append_basic_block("entry")
        self._build = ir.IRBuilder(self._entry)

    @property
    def addresses(self) -> list[Address]:
        """The addresses that the function is given."""
        return [Address(self._build, a) for a in self.written.args[: self._addresses]]

    @property
    def numbers(self) -> list[Number]:
        """The numbers that the function is given."""
        return [Number(self._build, n) for n in self.written.args[self._addresses :]]

    def finish(self) -> Function:
        """End the function."""
        self._build.ret_void()
        return self

    def call(self, other: Function, *arguments: Address | Integer) -> None:
        """Call another function of the module."""
        self._build.call(other.written, [_plain(a) for a in arguments])

    def call_at(self, place: Number, *arguments: Address | Integer) -> None:
        """Call the compiled function at a place in memory."""
        given = [_plain(a) for a in arguments]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
        self._build.call(self._build.inttoptr(place.value, kind.as_pointer()), given)

    def vector(self, value: float = 0.0) -> Vector:
        """The same number in all lanes."""
        return Vector(self._build, ir.Constant(_VECTOR, [value] * LANES))

    def number(self, value: int) -> Number:
        """A number."""
        return Number(self._build, _plain(value))

    def choose(self, condition: ir.Value, one: Value, other: Value) -> Value:
        """One of two values: the other where a condition does not hold."""
        return type(one)(self._build, self._build.select(condition, one.value, other.value))

    def all(self, *conditions: ir.Value) -> ir.Value:
        """Whether all of some conditions hold."""
        return reduce(self._build.and_, conditions)

    def least(self, relu: Number) -> Vector:
        """What answers are at least: zero where a number is not 0, or else anything."""
        return self.choose(relu.differs(0), self.vector(), self.vector(float("-inf")))

    def variable(self, value: Vector) -> Variable:
        """A place for a vector that changes in loops."""
        return Variable(self._build, self._entry, value)

    @contextmanager
    def loop(self, start: Integer, stop: Integer, step: Integer = 1) -> Iterator[Number]:
        """Repeat what is written within for every number from ``start`` to before ``stop``."""
        build = self._build
        begun = build.block
        test, body, done = (self.written.append_basic_block(n) for n in ("test", "body", "done"))
        build.branch(test)
        build.position_at_end(test)
        index = build.phi(_NUMBER)
        index.add_incoming(_plain(start), begun)
        build.cbranch(build.icmp_signed("<", index, _plain(stop)), body, done)
        build.position_at_end(body)
        yield Number(build, index)
        index.add_incoming(build.add(index, _plain(step), flags=("nsw",)), build.block)
        build.branch(test)
        build.position_at_end(done)

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        """Do what is written within only where a condition holds."""
        build = self._build
        body, done = (self.written.append_basic_block(n) for n in ("when", "done"))
        build.cbranch(condition, body, done)
        build.position_at_end(body)
        yield
        build.branch(done)
        build.position_at_end(done)


def _spread(build: ir.IRBuilder, value: ir.Value, kind: ir.Type) -> ir.Value:
    first = build.insert_element(ir.Constant(kind, ir.Undefined), value, _INDEX(0))
    return build.shuffle_vector(first, first, ir.Constant(_LANE_NUMBERS, [0] * LANES))


def _plain(value: Any) -> ir.Value:
    return ir.Constant(_NUMBER, value) if isinstance(value, int) else value.value
