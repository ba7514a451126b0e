"""Compile all kernels, or load them from the cache on disk, by running each on one voxel.

Called before memory is measured: a kernel compiled in the middle of a run would add to its peak.
"""

from __future__ import annotations

import numpy as np

from znni_dask.kernels import (
    blocks,
    direct,
    fragments,
    matrix,
    phases,
    pooling,
    pooling_blocked,
    resampling,
    resampling_blocked,
    sharing,
    special,
    spectra,
    statistics,
    turns,
)


def compile_kernels() -> None:
    """Make every compiled kernel ready."""
    sharing.sharing_library()  # first: that it compiles is told before all else does
    turns.turns_library()
    x = np.zeros(1 + direct.LANES, np.float32)[:1].reshape(1, 1, 1, 1, 1)
    out = np.zeros_like(x)
    zeros, ones = np.zeros(3, np.int64), np.ones(3, np.int64)
    weight = np.zeros((1, 1, 1, 1, 1, 1, direct.CHANNELS), np.float32)
    bias = np.zeros((1, 1, direct.CHANNELS), np.float32)
    least = np.float32(0)
    direct.convolve(x, weight, bias, out, zeros, ones, ones, least, 0, 1)
    direct.convolve_strided(x, weight, bias, out, zeros, ones, ones, least, 0, 1)
    direct.convolve_transposed(x, x, np.zeros(1, np.float32), out, zeros, ones, ones, 0, 1)
    row = x.reshape(1, 1)
    matrix.multiply(row, row[0], row, out.reshape(1, 1), least, 0, 1)
    blocks.blocks_library()
    one, place = np.ones(1, np.float32), np.zeros(1, np.int64)
    apart = np.zeros((1, 1), np.int64)
    phases.take_apart(x[..., None], out[..., None], apart, apart, apart, 1, 0, 1)
    pooling.max_pool(x, out, zeros, ones, ones, ones, 0, 1)
    for mean in (False, True):
        pooling_blocked.pooling_library(mean)
    pooling.average_pool(x, out, zeros, ones, ones, ones, one, one, one, 0, 1)
    resampling.gather(x, out, place, place, place, np.float32(0), 0, 1)
    resampling_blocked.resampling_library()
    resampling.interpolate(x, out, (place,) * 3, (place,) * 3, (one,) * 3, 0, 1)
    resampling.depth_to_space(x, out, zeros, ones, 0, 1)
    spectrum = np.zeros(1, np.complex64)
    spectra.add_products(spectrum.reshape(1, 1, 1, 1), 0, 0, spectrum, spectrum.reshape(1, 1))
    fragments.fragments_library()
    double = np.zeros(1)
    statistics.moments(x.reshape(1, 1), double, double.copy(), 0, 1)
    statistics.scale_rows(x.reshape(1, 1), double, double, double, 0, 1)
    statistics.normalize_channels(x, 1, 1.0, one, one, 0, 1)
    for function in (special.erf, special.gelu, special.mish):
        function(x.reshape(-1))
