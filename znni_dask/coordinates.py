"""Where the voxels of an answer lie, as coordinates of xarray."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.storage.stored import Three, Units
from znni_dask.windows import Laid

if TYPE_CHECKING:
    import xarray


def of_answer(source: xarray.DataArray, dims: Mapping[str, Any], laid: Laid) -> xarray.Coordinates:
    """The coordinates of ``source`` at the voxel centres of the answer.

    ``dims`` names the dimension of each axis letter. What lies along channels is left out, as
    those of the answer are others. Where the answer has a grid of its own, coordinates are taken
    at its voxels, or interpolated (and at the ends extrapolated) between the source's; what can
    only be taken, such as dates, is left out where it would have to be interpolated.
    """
    found = source.coords.to_dataset()
    if "c" in dims:
        along = [name for name, line in found.variables.items() if dims["c"] in line.dims]
        found = found.drop_vars(along)
    grid = zip("zyx", laid.translation, laid.output_stride, laid.output_size, strict=True)
    for letter, first, step, count in grid:
        if letter not in dims:
            continue
        dim = dims[letter]
        places = [first + step * i for i in range(count)]
        n = source.sizes[dim]
        if places == list(range(n)):
            continue
        if all(p.denominator == 1 and 0 <= p < n for p in places):
            found = found.isel({dim: [int(p) for p in places]}, missing_dims="ignore")
        else:
            found = _interpolated(found, dim, places)
    return found.coords


def _interpolated(found: xarray.Dataset, dim: str, places: list[Fraction]) -> xarray.Dataset:
    along = {n: line for n, line in found.variables.items() if dim in line.dims}
    at = np.array([float(p) for p in places])
    made = {
        name: (dim, _between(line.values, at), line.attrs)
        for name, line in along.items()
        if line.dims == (dim,) and line.dtype.kind in "iuf" and line.size > 1 and not line.chunks
    }
    return found.drop_vars(list(along)).assign_coords(made)


def _between(values: NDArray[Any], at: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.clip(np.floor(at).astype(int), 0, len(values) - 2)
    share = at - low
    return np.asarray(values[low] * (1 - share) + values[low + 1] * share)


def of_stored(axes: str, sizes: tuple[int, ...], placed: Mapping[str, Any]) -> dict[str, Any]:
    """Coordinates of an answer to a stored volume: z, y, x in its units, as
    `Application.placed` tells."""
    scale: Three = placed["scale"]
    translation: Three = placed["translation"]
    units: Units = placed["units"]
    found = {}
    for letter, step, first, unit in zip("zyx", scale, translation, units, strict=True):
        if letter in axes:
            places = first + step * np.arange(sizes[axes.index(letter)])
            found[letter] = (letter, places, {"units": unit} if unit else {})
    return found
