"""The table of all primitives: one row each, the default first among those of one layer kind.

Third parties add rows through the entry point group ``znni_dask.primitives``: each entry is a
`Primitive` class.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from znni_dask.machine import CPU, GPU, GPU_RAM
from znni_dask.network.layers import LOWER, Layer
from znni_dask.primitives.base import Primitive
from znni_dask.primitives.conv_depthwise import ConvDepthwise
from znni_dask.primitives.conv_direct import ConvDirect
from znni_dask.primitives.conv_direct_blocked import ConvDirectBlocked
from znni_dask.primitives.conv_direct_few import ConvDirectFew
from znni_dask.primitives.conv_direct_from_few import ConvDirectFromFew
from znni_dask.primitives.conv_fft_planes import ConvPlanesFFT
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.conv_fft_whole import ConvWholeFFT
from znni_dask.primitives.conv_img2row import ConvImg2row
from znni_dask.primitives.conv_matrix import ConvMatrix
from znni_dask.primitives.conv_torch import ConvTorch
from znni_dask.primitives.conv_transpose_blocked import ConvTransposeBlocked
from znni_dask.primitives.conv_transpose_direct import ConvTransposeDirect
from znni_dask.primitives.conv_winograd import ConvWinograd
from znni_dask.primitives.gpu.conv_cudnn import TENSOR, GpuConvCudnn
from znni_dask.primitives.gpu.conv_direct import GpuConvDirect
from znni_dask.primitives.gpu.conv_direct_few import GpuConvDirectFew
from znni_dask.primitives.gpu.conv_fft_tiles import GpuTiledFFT
from znni_dask.primitives.gpu.conv_fft_whole import GpuConvWholeFFT
from znni_dask.primitives.gpu.conv_matrix import GpuConvMatrix
from znni_dask.primitives.gpu.conv_transpose_direct import GpuConvTransposeDirect
from znni_dask.primitives.gpu.joining import GpuArithmetic, GpuBroadcasting, GpuConcatenation
from znni_dask.primitives.gpu.pointwise import GpuActivation, GpuAffine
from znni_dask.primitives.gpu.pooling import (
    GpuAveragePooling,
    GpuAveragePoolingFragments,
    GpuMaxPooling,
    GpuMaxPoolingFragments,
)
from znni_dask.primitives.gpu.rearranging import (
    GpuCropping,
    GpuLinearResizing,
    GpuNearestResizing,
    GpuPadding,
    GpuSelecting,
    GpuShufflingToSpace,
)
from znni_dask.primitives.gpu.reducing import GpuNormalization, GpuReducing, GpuSoftmax
from znni_dask.primitives.joining import ArithmeticOfInputs, Broadcasting, Concatenation
from znni_dask.primitives.offloaded import Offloaded
from znni_dask.primitives.pointwise import ActivationFunction, AffineMap
from znni_dask.primitives.pooling import (
    AveragePooling,
    AveragePoolingFragments,
    MaxPooling,
    MaxPoolingFragments,
)
from znni_dask.primitives.rearranging import (
    Cropping,
    LinearResizing,
    NearestResizing,
    Padding,
    Selecting,
    ShufflingToSpace,
)
from znni_dask.primitives.reducing import Normalization, Reducing, SoftmaxOverAxes

_OF_GPUS: tuple[Primitive, ...] = (
    GpuConvDirect(),
    GpuConvDirectFew(),
    GpuConvMatrix(),
    GpuConvWholeFFT(),
    GpuConvCudnn(),
    GpuConvCudnn(TENSOR),
    GpuConvCudnn(LOWER),
    GpuConvTransposeDirect(),
    GpuMaxPoolingFragments(),
    GpuMaxPoolingFragments("yx"),
    GpuMaxPoolingFragments("x"),
    GpuMaxPooling(),
    GpuAveragePoolingFragments(),
    GpuAveragePoolingFragments("yx"),
    GpuAveragePoolingFragments("x"),
    GpuAveragePooling(),
    GpuActivation(),
    GpuAffine(),
    GpuArithmetic(),
    GpuConcatenation(),
    GpuBroadcasting(),
    GpuCropping(),
    GpuSelecting(),
    GpuPadding(),
    GpuNearestResizing(),
    GpuLinearResizing(),
    GpuShufflingToSpace(),
    GpuReducing(),
    GpuSoftmax(),
    GpuNormalization(),
)
TABLE: tuple[Primitive, ...] = (
    ConvDirect(),
    ConvDirectBlocked(),
    ConvDirectFew(),
    ConvDirectFromFew(),
    ConvDepthwise(),
    ConvImg2row(),
    ConvWinograd(),
    ConvWholeFFT(tasks=False),
    ConvWholeFFT(tasks=True),
    ConvMatrix(),
    ConvTorch(),
    ConvTorch(lower=True),
    ConvTransposeDirect(),
    ConvTransposeBlocked(),
    MaxPoolingFragments(),
    MaxPoolingFragments("yx"),
    MaxPoolingFragments("x"),
    MaxPooling(),
    AveragePoolingFragments(),
    AveragePoolingFragments("yx"),
    AveragePoolingFragments("x"),
    AveragePooling(),
    ActivationFunction(),
    AffineMap(),
    ArithmeticOfInputs(),
    Concatenation(),
    Broadcasting(),
    Cropping(),
    Selecting(),
    Padding(),
    NearestResizing(),
    LinearResizing(),
    ShufflingToSpace(),
    Reducing(),
    SoftmaxOverAxes(),
    Normalization(),
    *_OF_GPUS,
)


@cache
def table() -> tuple[Primitive, ...]:
    """All primitives: the project's own and those of installed packages."""
    others = entry_points(group="znni_dask.primitives")
    return TABLE + tuple(entry.load()() for entry in others)


def candidates(layer: Layer, device: str = CPU) -> list[Primitive]:
    """The primitives of a device that take ``layer``, in the table's order."""
    return [p for p in table() if p.device == device and p.refusal(layer) is None]


def named(name: str, layer: Layer, device: str = CPU) -> Primitive:
    """The primitive of this name that takes ``layer`` on a device, of those "gpu+ram" the host's
    and those that have a GPU compute sub-layers; raises `KeyError` where there is none."""
    if device == GPU_RAM:
        return _with_host(name, layer)
    found = [p for p in candidates(layer, device) if p.name == name]
    in_sizes = ConvTiledFFT.of(name), ConvPlanesFFT.of(name), GpuTiledFFT.of(name)
    sized = [p for p in in_sizes if p is not None and p.device == device]
    found += [p for p in sized if p.refusal(layer) is None]
    if found:
        return found[0]
    raise KeyError(f"no primitive {name!r} takes a {layer.kind} layer on the {device}")


def _with_host(name: str, layer: Layer) -> Primitive:
    if (inner := Offloaded.inner_name(name)) is None:
        return named(name, layer)
    try:
        found = Offloaded.of(name, named(inner, layer, GPU))
    except ValueError as error:
        raise KeyError(str(error)) from None
    if (why := found.refusal(layer)) is not None:
        raise KeyError(why)
    return found
