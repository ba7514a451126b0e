"""The end of a network that makes fragments: its answer in one piece."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from znni_dask.geometry import Size
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.fragments import INTERLEAVE, fragments_library
from znni_dask.kernels.team import Each, Team
from znni_dask.primitives.base import ITEM_BYTES, Array


def recombine(
    fragments: Array, numbers: Mapping[Size, int], spacing: Size, out: Array, team: Team
) -> None:
    """Interleave fragments (fragment, channel, z, y, x) to the answer (channel, z, y, x).

    Fragment ``numbers[place]`` makes the voxels ``spacing`` apart that begin at ``place``; those
    of places that are not there stay as they are. ``out`` and each fragment are C-contiguous.
    """
    places = np.full(spacing, -1)
    for place, number in numbers.items():
        places[place] = number * fragments.strides[0]
    line_bytes = out.shape[3] * ITEM_BYTES + VECTOR_BYTES
    memory = team.scratch(team.threads * line_bytes).ctypes.data
    given = [array.ctypes.data for array in (fragments, out, places)]
    shift = out.ctypes.data // ITEM_BYTES % LANES
    fixed = *fragments.strides[1:4], *spacing, *out.shape[1:], int((places < 0).any()), shift
    told = *given, Each(memory, line_bytes), *fixed
    team.run(fragments_library()[INTERLEAVE], told, out.shape[0] * out.shape[1])
