"""Functions of one value: what `layers.Activation` names, and maps with numbers of each channel.

Arrays may be the same: every value is read before it is written, by the thread that writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.geometry import ceil_divide
from znni_dask.kernels import special
from znni_dask.kernels.cuda.kernel import Kernel

Array = NDArray[np.float32]
Function = Callable[[Array, float, float], Any]
_THREADS, _EACH = 256, 4
PIECE = _THREADS * _EACH  # values of a block
PLAIN_PIECE = 1 << 14  # values that numpy computes at a time
PLAIN_BYTES = 6 * 4 * PLAIN_PIECE  # of its temporaries

_OF_VALUES = """
extern "C" __global__ void apply_FUNCTION(
    const float *x, float *out, long long count, float alpha, float beta)
{
    const long long first = (long long)blockIdx.x * PIECE + threadIdx.x;
    float values[EACH];
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const long long i = first + k * THREADS;
        values[k] = i < count ? x[i] : 0;
    }
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const long long i = first + k * THREADS;
        const float v = values[k];
        if (i < count)
            out[i] = RESULT;
    }
}
"""

_OF_CHANNELS = """
extern "C" __global__ void apply_FUNCTION(
    const float *x, float *out, const float *scale, const float *shift,
    long long channels, long long voxels, long long pieces)
{
    const long long row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
    const float a = scale[row % channels], b = shift[row % channels];
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const long long voxel = piece * PIECE + k * THREADS + threadIdx.x;
        if (voxel < voxels) {
            const float v = x[row * voxels + voxel];
            out[row * voxels + voxel] = RESULT;
        }
    }
}
"""

# Comparisons are such that NaN stays NaN.
_RESULTS = {
    "relu": "v < 0 ? 0 : v",
    "leaky_relu": "v < 0 ? v * alpha : v",
    "elu": "v > 0 ? v : alpha * expm1f(v)",
    "selu": "beta * (v > 0 ? v : alpha * expm1f(v))",
    "celu": "v > 0 ? v : alpha * expm1f(v / alpha)",
    "gelu": "0.5f * v * erfcf(v * -0.70710678f)",
    "gelu_tanh": "0.5f * v * (1 + tanhf(0.79788456f * v * (1 + 0.044715f * v * v)))",
    "silu": "v / (1 + expf(-v))",
    "mish": "mish(v)",
    "hard_swish": "v * bounded(v * (1 / 6.f) + 0.5f, 0, 1)",
    "hard_sigmoid": "bounded(v * alpha + beta, 0, 1)",
    "softplus": "fmaxf(v, 0) + log1pf(expf(-fabsf(v)))",
    "softsign": "v / (1 + fabsf(v))",
    "tanh": "tanhf(v)",
    "sigmoid": "1 / (1 + expf(-v))",
    "clip": "bounded(v, alpha, beta)",
    "thresholded_relu": "v <= alpha ? 0 : v",
    "erf": "erff(v)",
    "exp": "expf(v)",
    "log": "logf(v)",
    "sqrt": "sqrtf(v)",
    "pow": "powf(v, alpha)",
    "abs": "fabsf(v)",
    "neg": "-v",
    "reciprocal": "1 / v",
    "sign": "v > 0 ? 1 : v < 0 ? -1 : v",
    "floor": "floorf(v)",
    "ceil": "ceilf(v)",
    "round": "rintf(v)",
    "sin": "sinf(v)",
    "cos": "cosf(v)",
    "atan": "atanf(v)",
}
_RESULTS_OF_CHANNELS = {"prelu": "v < 0 ? v * a : v", "affine": "v * a + b"}
_WORDS = {
    "bounded": """
__device__ __forceinline__ float bounded(float v, float low, float high)
{
    return v < low ? low : v > high ? high : v;
}
""",
    "mish": """
__device__ __forceinline__ float mish(float v)
{
    const float e = expf(-fabsf(v)), above = 1 + 2 * e, below = e * e + 2 * e;
    return v * (v > 0 ? above / (above + 2 * e * e) : below / (below + 2));
}
""",
}


def _computed(function: Callable[[Array], None]) -> Function:
    """A function that works in place, as one that makes something new."""

    def made(v: Array, a: float, b: float) -> Array:
        values = v.copy()
        function(values)
        return values

    return made


def _gelu_tanh(v: Array, a: float, b: float) -> Array:
    inner = np.tanh(np.float32(0.79788456) * v * (1 + np.float32(0.044715) * v * v))
    return np.asarray(np.float32(0.5) * v * (1 + inner))


_PLAIN: dict[str, Function] = {
    "relu": lambda v, a, b: np.maximum(v, 0),
    "leaky_relu": lambda v, a, b: np.where(v < 0, v * a, v),
    "elu": lambda v, a, b: np.where(v > 0, v, a * np.expm1(v)),
    "selu": lambda v, a, b: b * np.where(v > 0, v, a * np.expm1(v)),
    "celu": lambda v, a, b: np.where(v > 0, v, a * np.expm1(v / a)),
    "gelu": _computed(special.gelu),
    "gelu_tanh": _gelu_tanh,
    "silu": lambda v, a, b: v / (1 + np.exp(-v)),
    "mish": _computed(special.mish),
    "hard_swish": lambda v, a, b: v * np.clip(v * np.float32(1 / 6) + np.float32(0.5), 0, 1),
    "hard_sigmoid": lambda v, a, b: np.clip(v * a + b, 0, 1),
    "softplus": lambda v, a, b: np.logaddexp(v, np.float32(0)),
    "softsign": lambda v, a, b: v / (1 + np.abs(v)),
    "tanh": lambda v, a, b: np.tanh(v),
    "sigmoid": lambda v, a, b: 1 / (1 + np.exp(-v)),
    "clip": lambda v, a, b: np.clip(v, a, b),
    "thresholded_relu": lambda v, a, b: np.where(v <= a, np.float32(0), v),
    "erf": _computed(special.erf),
    "exp": lambda v, a, b: np.exp(v),
    "log": lambda v, a, b: np.log(v),
    "sqrt": lambda v, a, b: np.sqrt(v),
    "pow": lambda v, a, b: v**a,
    "abs": lambda v, a, b: np.abs(v),
    "neg": lambda v, a, b: -v,
    "reciprocal": lambda v, a, b: 1 / v,
    "sign": lambda v, a, b: np.sign(v),
    "floor": lambda v, a, b: np.floor(v),
    "ceil": lambda v, a, b: np.ceil(v),
    "round": lambda v, a, b: np.rint(v),
    "sin": lambda v, a, b: np.sin(v),
    "cos": lambda v, a, b: np.cos(v),
    "atan": lambda v, a, b: np.arctan(v),
}
_PLAIN_OF_CHANNELS: dict[str, Function] = {
    "prelu": lambda v, a, b: np.where(v < 0, v * a, v),
    "affine": lambda v, a, b: v * a + b,
}


@cache
def of_values(function: str) -> Kernel:
    """``out[i] = function(x[i], alpha, beta)`` for ``count`` values, `blocks_of` them."""
    plain = _PLAIN[function]

    def in_pieces(x: Array, out: Array, count: int, alpha: float, beta: float) -> None:
        _in_pieces(plain, x.reshape(-1), out.reshape(-1), count, alpha, beta)

    return Kernel(f"apply_{function}", _source(_OF_VALUES, function, _RESULTS), in_pieces)


@cache
def of_channels(function: str) -> Kernel:
    """The same of rows of so many ``voxels``, in so many ``pieces`` each, with the ``scale`` and
    the ``shift`` of its channel for each row."""
    plain = _PLAIN_OF_CHANNELS[function]

    def by_row(
        x: Array, out: Array, scale: Array, shift: Array, channels: int, voxels: int, pieces: int
    ) -> None:
        rows = zip(x.reshape(-1, voxels), out.reshape(-1, voxels), strict=True)
        for row, (source, target) in enumerate(rows):
            channel = row % channels
            _in_pieces(plain, source, target, voxels, scale[channel], shift[channel])

    source = _source(_OF_CHANNELS, function, _RESULTS_OF_CHANNELS)
    return Kernel(f"apply_{function}", source, by_row)


def blocks_of(values: int) -> int:
    """Blocks that compute so many values, of a row."""
    return ceil_divide(values, PIECE)


def _source(template: str, function: str, results: dict[str, str]) -> str:
    result = results[function]
    words = [text for word, text in _WORDS.items() if f"{word}(" in result]
    text = "".join([*words, template]).replace("FUNCTION", function).replace("RESULT", result)
    for word, number in (("PIECE", PIECE), ("THREADS", _THREADS), ("EACH", _EACH)):
        text = text.replace(word, str(number))
    return text


def _in_pieces(function: Function, x: Array, out: Array, count: int, a: Any, b: Any) -> None:
    with np.errstate(all="ignore"):  # infinities are what such functions have there
        for first in range(0, count, PLAIN_PIECE):
            piece = slice(first, min(first + PLAIN_PIECE, count))
            out[piece] = function(x[piece], a, b)
