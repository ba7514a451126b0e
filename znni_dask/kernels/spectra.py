"""Compiled loop over spectra of whole images."""

from __future__ import annotations

from numba import njit

from znni_dask.kernels.direct import OPTIONS


@njit(**OPTIONS)
def add_products(spectra, image, block, kernel, sums):
    """Add to every sample's ``sums`` the product of a block of its image's spectrum and the
    conjugate of a kernel's.

    ``spectra`` is (batch, image, block, frequency), ``kernel`` (frequency), ``sums`` (batch,
    frequency); complex64, contiguous.
    """
    for sample in range(spectra.shape[0]):
        values, total = spectra[sample, image, block], sums[sample]
        for i in range(values.size):
            total[i] += values[i] * kernel[i].conjugate()
