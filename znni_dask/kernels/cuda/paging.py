"""Planes copied from pages into an array in one piece, and from one into pages.

A page holds a plane of all channels of a sample. `GATHER` and `SCATTER` are told of memory that is
pages, of the number of the page of every plane (sample, plane), and of the array (sample, channel,
plane, y, x); then of samples, channels and planes, of the values of a plane of a channel, and of
those from one page to the next. A thread copies one value: neighbouring threads those that lie side
by side on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from znni_dask.geometry import ceil_divide
from znni_dask.kernels.cuda.kernel import Kernel

THREADS = 256

_SOURCE = """
typedef long long integer;

extern "C" __global__ void %(name)s(
    %(pages)sfloat *__restrict__ pages, const long long *__restrict__ numbers,
    %(array)sfloat *__restrict__ array,
    integer samples, integer channels, integer planes, integer area, integer step)
{
    int pieces = (int)((area + blockDim.x - 1) / blockDim.x);
    integer row = blockIdx.x / pieces;
    integer place = (integer)(blockIdx.x %% pieces) * blockDim.x + threadIdx.x;
    if (place >= area)
        return;
    integer plane = row %% planes, channel = row / planes %% channels;
    integer page = numbers[row / planes / channels * planes + plane];
    integer there = page * step + channel * area + place, here = row * area + place;
    %(copy)s;
}
"""


def _pairs(
    pages: Any, numbers: Any, array: Any, samples: int, channels: int, planes: int, *told: int
) -> Iterator[tuple[Any, Any]]:
    """Every plane of a sample in its page, and in the array: (channel, values)."""
    area, step = told
    rows = array.reshape(samples, channels, planes, area)
    for sample, some in enumerate(numbers.reshape(samples, planes)):
        for plane, number in enumerate(some):
            page = pages[number * step :][: channels * area]
            yield page.reshape(channels, area), rows[sample, :, plane]


def _gather(*told: Any) -> None:
    """The same in numpy."""
    for page, plane in _pairs(*told):
        plane[...] = page


def _scatter(*told: Any) -> None:
    """The same in numpy."""
    for page, plane in _pairs(*told):
        page[...] = plane


def _source(name: str, copy: str, **const: str) -> str:
    return _SOURCE % {"name": name, "copy": copy, "pages": "", "array": "", **const}


GATHER = Kernel(
    "gather", _source("gather", "array[here] = pages[there]", pages="const "), _gather, THREADS
)
SCATTER = Kernel(
    "scatter", _source("scatter", "pages[there] = array[here]", array="const "), _scatter, THREADS
)


def blocks(samples: int, channels: int, planes: int, area: int) -> int:
    """Blocks for an array."""
    return samples * channels * planes * ceil_divide(area, THREADS)
