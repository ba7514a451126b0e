"""A matrix times vectors, bound by the matrix's way from memory."""

from __future__ import annotations

import numpy as np
from numba import njit

from znni_dask.kernels.direct import OPTIONS


@njit(**OPTIONS | {"fastmath": {"contract", "nsz", "reassoc"}})
def multiply(matrix, bias, x, out, least, first, last):
    """Rows ``first`` to ``last`` of ``matrix`` times every row of ``x``, plus ``bias``, into the
    columns of ``out``. Results below ``least`` become that."""
    for row in range(first, last):
        for item in range(len(x)):
            total = np.float32(0)
            for column in range(matrix.shape[1]):
                total += matrix[row, column] * x[item, column]
            total += bias[row]
            out[item, row] = least if total < least else total
