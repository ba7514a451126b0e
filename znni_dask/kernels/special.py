"""Functions of one value that numpy lacks, compiled; in place on one-dimensional arrays."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from znni_dask.kernels.direct import OPTIONS

_HALF_ROOT = math.sqrt(0.5)


@njit(**OPTIONS)
def erf(v):
    """The error function."""
    for i in range(v.shape[0]):
        v[i] = math.erf(v[i])


@njit(**OPTIONS)
def gelu(v):
    """x times the share of a normal distribution below x (Hendrycks and Gimpel 2016)."""
    for i in range(v.shape[0]):
        v[i] = 0.5 * v[i] * (1 + math.erf(v[i] * _HALF_ROOT))


@njit(**OPTIONS)
def mish(v):
    """x · tanh(log(1 + exp x)) (Misra 2019), written so that nothing overflows."""
    for i in range(v.shape[0]):
        e = math.exp(-abs(v[i]))
        if v[i] > 0:
            ratio = (1 + 2 * e) / (1 + 2 * e + 2 * e * e)
        else:
            ratio = (e * e + 2 * e) / (e * e + 2 * e + 2)
        v[i] = np.float32(v[i] * ratio)
