"""Discrete Fourier transforms of a few dozen values, written out as straight-line code.

Sixteen transforms side by side, a lane each. Values known to be zero, and results that nobody
asks for, cost nothing: they never become code. Lengths are products of small primes, split by
decimation in time with radix 4 first (Cooley and Tukey 1965); an odd prime number of values is
taken in pairs that lie opposite each other. Such pieces are the codelets of Frigo and Johnson
(2005).
"""

from __future__ import annotations

import cmath
from math import cos, log2, pi, sin
from typing import NamedTuple, TypeAlias

from znni_dask.kernels.code import Vector

LONGEST = 64
_SLOWER = {
    22: 1.5,
    26: 1.5,
    33: 1.5,
    39: 1.5,
    44: 2.0,
    52: 2.5,
    55: 2.5,  # of many products
    50: 2.0,
    54: 2.0,
    56: 2.0,
    60: 2.0,
}  # times: what tiles so long are found to take
_PRIMES = (2, 3, 5, 7, 11, 13)
_RADICES = (4, *_PRIMES)
_NOTHING = 1e-12

Part: TypeAlias = Vector | None


class Complex(NamedTuple):
    """A complex vector; None is zero."""

    re: Part
    im: Part

    @property
    def swapped(self) -> Complex:
        """Real and imaginary part exchanged."""
        return Complex(self.im, self.re)

    @property
    def conjugate(self) -> Complex:
        """The imaginary part's sign changed."""
        return Complex(self.re, _negative(self.im))


ZERO = Complex(None, None)


def refusal(length: int) -> str | None:
    """Why there is no codelet of a length; None where there is."""
    rest = length
    for prime in _PRIMES:
        while rest and rest % prime == 0:
            rest //= prime
    if rest == 1 and length <= LONGEST:
        return None
    primes = ", ".join(map(str, _PRIMES))
    return f"transforms have lengths of up to {LONGEST} that are products of {primes}, not {length}"


def operations(length: int) -> float:
    """Operations of a complex transform by the usual count, 5 n log n; more of those lengths that
    take longer than their count."""
    return 5 * length * log2(length) * _SLOWER.get(length, 1.0)


def forward(x: list[Complex]) -> list[Complex]:
    """X[k] = Σ x[j] exp(-2πi jk/n)."""
    n = len(x)
    if n == 1 or all(value == ZERO for value in x):
        return list(x)
    radix = next(r for r in _RADICES if n % r == 0)
    parts = [forward(x[j::radix]) for j in range(radix)]
    found = [ZERO] * n
    for k in range(n // radix):
        turned = [_turned(part[k], j * k, n) for j, part in enumerate(parts)]
        found[k :: n // radix] = _butterfly(turned)
    if all(value.im is None for value in x):
        for k in range(1, (n + 1) // 2):  # so that one of each pair never becomes code
            found[n - k] = found[k].conjugate
    return found


def backward(x: list[Complex]) -> list[Complex]:
    """X[k] = Σ x[j] exp(+2πi jk/n): not scaled."""
    return [value.swapped for value in forward([value.swapped for value in x])]


def backward_to_real(half: list[Complex], n: int) -> list[Part]:
    """The ``n`` real values whose spectrum begins with ``half``, n/2 + 1 values, and goes on with
    their conjugates; not scaled. ``n`` is even: even and odd values are one complex transform."""
    m = n // 2
    first, *middle, last = half
    ends = [Complex(first.re, None), *middle, Complex(last.re, None)]
    packed = []
    for k in range(m):
        a, b = ends[k], ends[m - k].conjugate
        even, odd = _plus(a, b), _turned(_minus(a, b), -k, n)
        packed.append(_minus(even, _down(odd)))
    return [part for pair in backward(packed) for part in pair]


def _butterfly(t: list[Complex]) -> list[Complex]:
    """A transform of radix 2, 4 or an odd prime."""
    if len(t) == 2:
        return [_plus(*t), _minus(*t)]
    if len(t) == 4:
        a, b = _plus(t[0], t[2]), _minus(t[0], t[2])
        c, d = _plus(t[1], t[3]), _down(_minus(t[1], t[3]))
        return [_plus(a, c), _plus(b, d), _minus(a, c), _minus(b, d)]
    return _odd_butterfly(t)


def _odd_butterfly(t: list[Complex]) -> list[Complex]:
    """Sums of opposite values go with cosines, their differences with sines."""
    r = len(t)
    pairs = range(1, (r + 1) // 2)
    sums = {j: _plus(t[j], t[r - j]) for j in pairs}
    differences = {j: _minus(t[j], t[r - j]) for j in pairs}
    found = [ZERO] * r
    found[0] = t[0]
    for j in pairs:
        found[0] = _plus(found[0], sums[j])
    for k in pairs:
        even, odd = t[0], ZERO
        for j in pairs:
            angle = 2 * pi * (j * k % r) / r
            even = _plus(even, _scaled(sums[j], cos(angle)))
            odd = _plus(odd, _scaled(differences[j], sin(angle)))
        found[k] = _plus(even, _down(odd))
        found[r - k] = _minus(even, _down(odd))
    return found


def _turned(a: Complex, power: int, n: int) -> Complex:
    """a · exp(-2πi power/n)."""
    w = cmath.exp(-2j * pi * (power % n) / n)
    c, s = w.real, w.imag
    if abs(abs(c) - abs(s)) < _NOTHING:  # an odd multiple of 45°: one product each
        right, up = (1.0 if v > 0 else -1.0 for v in (c, s))
        re = _difference(_times(a.re, right), _times(a.im, up))
        im = _sum(_times(a.re, up), _times(a.im, right))
        return _scaled(Complex(re, im), abs(c))
    return Complex(
        _difference(_times(a.re, c), _times(a.im, s)), _sum(_times(a.re, s), _times(a.im, c))
    )


def _down(a: Complex) -> Complex:
    """a · -i."""
    return Complex(a.im, _negative(a.re))


def _plus(a: Complex, b: Complex) -> Complex:
    return Complex(_sum(a.re, b.re), _sum(a.im, b.im))


def _minus(a: Complex, b: Complex) -> Complex:
    return Complex(_difference(a.re, b.re), _difference(a.im, b.im))


def _scaled(a: Complex, factor: float) -> Complex:
    return Complex(_times(a.re, factor), _times(a.im, factor))


def _times(a: Part, factor: float) -> Part:
    if a is None or abs(factor) < _NOTHING:
        return None
    if abs(abs(factor) - 1) < _NOTHING:
        return a if factor > 0 else -a
    return a * factor


def _sum(a: Part, b: Part) -> Part:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _difference(a: Part, b: Part) -> Part:
    if a is None or b is None:
        return _negative(b) if a is None else a
    return a - b


def _negative(a: Part) -> Part:
    return None if a is None else -a
