"""The layers of a network: what is computed, with no word of how.

Every layer is a frozen value. Spatial parameters are triples in (z, y, x); ``padding`` is a pair
of triples (low, high). Weights lie beside the network under the layer's name (`weight_shapes`
says which arrays a layer wants). Names and meanings are those of ONNX operators.
"""

from znni_dask.network.layers.base import NO_PADDING, ONES, Input, Layer, Padding, extent
from znni_dask.network.layers.convolution import FULL, LOWER, PRECISIONS, Conv, ConvTranspose
from znni_dask.network.layers.joining import Arithmetic, Broadcast, Concat, Join
from znni_dask.network.layers.pointwise import FUNCTIONS, Activation, Affine, Function
from znni_dask.network.layers.pooling import AveragePool, MaxPool
from znni_dask.network.layers.rearranging import (
    Crop,
    DepthToSpace,
    Pad,
    PadMode,
    Placing,
    Resize,
    Select,
)
from znni_dask.network.layers.reducing import Normalize, Reduce, Reduction, Softmax

__all__ = [
    "FULL",
    "FUNCTIONS",
    "LOWER",
    "NO_PADDING",
    "ONES",
    "PRECISIONS",
    "Activation",
    "Affine",
    "Arithmetic",
    "AveragePool",
    "Broadcast",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Crop",
    "DepthToSpace",
    "Function",
    "Input",
    "Join",
    "Layer",
    "MaxPool",
    "Normalize",
    "Pad",
    "PadMode",
    "Padding",
    "Placing",
    "Reduce",
    "Reduction",
    "Resize",
    "Select",
    "Softmax",
    "extent",
]
