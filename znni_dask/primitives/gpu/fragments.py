"""The end of a network that makes fragments, on a device: its answer in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.geometry import Size
from znni_dask.kernels.cuda.weaving import WEAVE, blocks


def weave(
    fragments: Any, numbers: Mapping[Size, int], spacing: Size, out: Any, device: Device
) -> None:
    """Interleave fragments (fragment, channel, z, y, x) to the answer (channel, z, y, x), within a
    lane.

    Fragment ``numbers[place]`` makes the voxels ``spacing`` apart that begin at ``place``; those
    of places that are not there stay as they are. ``out`` and ``fragments`` are C-contiguous.
    Which fragment makes which voxels takes 8 bytes for each place.
    """
    places = np.full(spacing, -1, np.int64)
    for place, number in numbers.items():
        places[place] = number
    told = *fragments.shape[1:], *out.shape[1:], *spacing
    device.launch(WEAVE, blocks(*out.shape), fragments, device.xp.asarray(places), out, *told)
