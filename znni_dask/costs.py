"""Estimated seconds of a schedule, before anything was measured.

The figures are those of two cores with 512-bit vectors (`make bench`). They rank plans; they
promise nothing about another machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import cast

from znni_dask.geometry import ceil_divide, round_up
from znni_dask.kernels.code import LANES
from znni_dask.network.layers import FULL, LOWER, Conv, Layer
from znni_dask.primitives.base import ITEM_BYTES, Form, Primitive, Problem
from znni_dask.primitives.conv_depthwise import ConvDepthwise
from znni_dask.primitives.conv_direct_blocked import ConvDirectBlocked, groups_together
from znni_dask.primitives.conv_direct_few import ConvDirectFew
from znni_dask.primitives.conv_direct_from_few import ConvDirectFromFew
from znni_dask.primitives.conv_fft_planes import ConvPlanesFFT
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.conv_fft_whole import ConvWholeFFT
from znni_dask.primitives.conv_img2row import ConvImg2row
from znni_dask.primitives.conv_matrix import ConvMatrix
from znni_dask.primitives.conv_torch import ConvTorch
from znni_dask.primitives.conv_transpose_blocked import ConvTransposeBlocked
from znni_dask.primitives.conv_winograd import ConvWinograd
from znni_dask.primitives.forms import FormChange
from znni_dask.schedule import Step

FLOPS_PER_SECOND = 1.6e10  # of plain loops on one core
DIRECT_FLOPS_PER_SECOND: dict[type[Primitive], float] = {  # of blocks of channels, on one core
    ConvDirectBlocked: 2e11,
    ConvDirectFew: 1.8e11,
    ConvTransposeBlocked: 1.6e11,
    ConvDepthwise: 8e10,
    ConvImg2row: 1.6e11,
}
FROM_FEW_FLOPS_PER_SECOND = 2.2e11  # of few channels directly, on one core
TRANSFORMS_PER_SECOND = 8e10  # operations of transforms, on one core
PRODUCTS_PER_SECOND = 2.6e11  # operations of their products, on one core
PLANES_TRANSFORMS_PER_SECOND = 1.6e11  # of planes of tiles, which stay in the caches, on one core
PLANES_PRODUCTS_PER_SECOND = 2.4e11  # operations of their products, on one core
WINOGRAD_SUMS_PER_SECOND = 2e10  # of its transforms, to and from the caches, on one core
WINOGRAD_PRODUCTS_PER_SECOND = 1.9e11  # operations of its products, on one core
WHOLE_FLOPS_PER_SECOND = 2e10  # of transforms of whole images and their products, on one core
CALL_SECONDS = 3e-6  # of each of their calls from Python, which do not run side by side
SHARE_SECONDS = 4e-5  # sharing work among threads
TORCH_FLOPS_PER_SECOND = {FULL: 8e10, LOWER: 1.6e11}  # by PyTorch, on one core, copies included
TORCH_SECONDS = 3.0  # importing it
BYTES_PER_SECOND = 1.5e10  # to and from memory, on one core
MATRIX_FLOPS_PER_SECOND = 2e10  # of a matrix and several vectors, on one core
STREAMED_BYTES_PER_SECOND = 3e10  # past the caches in long stretches, on one core
FORM_BYTES_PER_SECOND = 2e9  # of changes of form, on one core
RUN_OVERHEAD = 64  # voxels: what starting a plane costs, in voxels of that plane
STEP_SECONDS = 5e-5  # calling a primitive
COMPILE_SECONDS = 2.0  # of a size of tile that was never used on a machine
PLANNING_SECONDS = 1.5  # of transforms of whole images, their library included


def estimated_seconds(steps: Iterable[Step], threads: int) -> float:
    """Seconds to compute these steps once."""
    return sum(step_seconds(step.primitive, step.problem, threads) for step in steps)


def setup_seconds(primitive: Primitive, layer: Layer) -> float:
    """Seconds before a layer can be computed for the first time."""
    if isinstance(primitive, (ConvTiledFFT, ConvPlanesFFT, ConvDirectFromFew, ConvWinograd)):
        return COMPILE_SECONDS + primitive.prepared_bytes(layer) / BYTES_PER_SECOND
    if isinstance(primitive, ConvTorch):
        return TORCH_SECONDS
    return PLANNING_SECONDS if isinstance(primitive, ConvWholeFFT) else 0.0


def step_seconds(primitive: Primitive, problem: Problem, threads: int) -> float:
    """Seconds of one step."""
    if isinstance(primitive, ConvTiledFFT):
        work = primitive.work(problem)
        seconds = (
            work.transforms / TRANSFORMS_PER_SECOND
            + work.products / PRODUCTS_PER_SECOND
            + work.traffic_bytes / BYTES_PER_SECOND
        )
    elif isinstance(primitive, ConvPlanesFFT):
        in_planes = primitive.work(problem, threads)
        seconds = max(
            in_planes.transforms / PLANES_TRANSFORMS_PER_SECOND
            + in_planes.products / PLANES_PRODUCTS_PER_SECOND,
            in_planes.traffic_bytes / BYTES_PER_SECOND,
        )
    elif isinstance(primitive, ConvDirectFromFew):
        wasted = round_up(problem.output[1], LANES) / problem.output[1]
        read, made = Form.PLAIN.nbytes(problem.inputs[0]), Form.BLOCKED.nbytes(problem.output)
        seconds = max(
            wasted * primitive.flops(problem) / FROM_FEW_FLOPS_PER_SECOND,
            (read + made) / STREAMED_BYTES_PER_SECOND,
        )
    elif (rate := DIRECT_FLOPS_PER_SECOND.get(type(primitive))) is not None:
        lanes = problem.inputs[0] if isinstance(primitive, ConvDirectFew) else problem.output
        wasted = prod(Form.BLOCKED.stored(lanes)) / prod(lanes)
        if isinstance(primitive, ConvDirectBlocked):
            wasted *= groups_together(cast("Conv", problem.layer))
        if isinstance(problem.layer, Conv):
            wasted *= _share_inside(problem.layer, problem)
        traffic = Form.BLOCKED.nbytes(problem.inputs[0]) + Form.BLOCKED.nbytes(problem.output)
        traffic += _weights_bytes(problem.layer)
        seconds = max(wasted * primitive.flops(problem) / rate, traffic / BYTES_PER_SECOND)
    elif isinstance(primitive, ConvWholeFFT):
        whole = primitive.work(problem, threads)
        together = whole.calls * CALL_SECONDS + (threads > 1) * whole.shared * SHARE_SECONDS
        seconds = threads * (whole.operations / WHOLE_FLOPS_PER_SECOND / whole.threads + together)
    elif isinstance(primitive, ConvTorch):
        channels = problem.output[1] // cast("Conv", problem.layer).groups
        wasted = round_up(channels, LANES) / channels  # as groups do not share vectors
        copied = Form.PLAIN.nbytes(problem.inputs[0]) + Form.PLAIN.nbytes(problem.output)
        seconds = wasted * primitive.flops(problem) / TORCH_FLOPS_PER_SECOND[primitive.precision]
        seconds += 4 * copied / BYTES_PER_SECOND
    elif isinstance(primitive, ConvWinograd):
        at_points = primitive.work(problem, threads)
        seconds = (
            at_points.transforms / WINOGRAD_SUMS_PER_SECOND
            + at_points.products / WINOGRAD_PRODUCTS_PER_SECOND
            + at_points.traffic_bytes / BYTES_PER_SECOND
        )
    elif isinstance(primitive, ConvMatrix):
        seconds = max(
            _weights_bytes(problem.layer) / BYTES_PER_SECOND,
            primitive.flops(problem) / MATRIX_FLOPS_PER_SECOND,
        )
    elif isinstance(primitive, FormChange):
        seconds = primitive.into.nbytes(problem.output) / FORM_BYTES_PER_SECOND
    else:
        *_, y, x = problem.output
        slowdown = 1 + RUN_OVERHEAD / (y * x)
        seconds = slowdown * primitive.flops(problem) / FLOPS_PER_SECOND
    return STEP_SECONDS + seconds / threads


def _weights_bytes(layer: Layer) -> int:
    """Which are read once, however many samples there are."""
    return ITEM_BYTES * sum(map(prod, layer.weight_shapes().values()))


def _share_inside(conv: Conv, problem: Problem) -> float:
    """Of all products those behind which is not only padding: direct convolution leaves the others
    out."""
    share = 1.0
    for axis in range(3):
        taps, stride, n = conv.kernel[axis], conv.stride[axis], problem.output[2 + axis]
        inside = 0
        for tap in range(taps):
            first = problem.offsets[0][axis] + tap * conv.dilation[axis]
            end = ceil_divide(problem.inputs[0][2 + axis] - first, stride)
            inside += max(0, min(end, n) - max(0, ceil_divide(-first, stride)))
        share *= inside / (taps * n)
    return share
