"""The table of ONNX operators: how each becomes layers, and when it cannot.

2D networks (arrays of rank 4) become 3D ones with z = 1 in every kernel, 1D ones likewise.
"""

from __future__ import annotations

from znni_dask.importers.onnx.graph import Operator
from znni_dask.importers.onnx.operators import (
    axes,
    convolution,
    joining,
    matrices,
    normalization,
    pointwise,
    pooling,
    resizing,
)

OPERATORS: dict[str, Operator] = {
    **axes.OPERATORS,
    **convolution.OPERATORS,
    **joining.OPERATORS,
    **matrices.OPERATORS,
    **normalization.OPERATORS,
    **pointwise.OPERATORS,
    **pooling.OPERATORS,
    **resizing.OPERATORS,
}
