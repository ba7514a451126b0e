"""Chains of convolutions and poolings, and the four networks that the ZNNi paper measures.

The networks are those of Zlateski et al. 2016, table III, with seeded weights: 1 channel to 3,
80 in between, a ReLU after every convolution. The paper's table prints a pooling of 9³ as layer
6 of n926; its text and network files have a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size
from znni_dask.network.build import Builder
from znni_dask.network.network import Network

WIDTH = 80
OUTPUTS = 3
_MOST_WEIGHTS = 1 << 30


@dataclass(frozen=True)
class Row:
    """One layer: ``CONV`` or ``POOL``, its kernel or window, the maps of a convolution."""

    kind: str
    kernel: Size
    maps: int = 0


def chain(inputs: int, rows: Sequence[Row], seed: int = 0) -> Network:
    """The network of these rows, a ReLU after every CONV, weights drawn from ``seed``."""
    if inputs < 1 or not rows:
        raise NetworkError(f"a network needs inputs and layers, got {inputs} and {len(rows)}")
    builder = Builder(inputs, seed)
    x, maps = builder.input, inputs
    for row in rows:
        if row.kind == "CONV":
            weights = row.maps * maps * row.kernel[0] * row.kernel[1] * row.kernel[2]
            if weights > _MOST_WEIGHTS:
                raise NetworkError(f"a convolution of {weights:,} weights is taken for a mistake")
            x = builder.relu(builder.conv(x, row.maps, row.kernel))
            maps = row.maps
        else:
            x = builder.max_pool(x, row.kernel)
    return builder.network(x)


def _network(first: int, kernel: int, pools: int, convolutions: int, seed: int) -> Network:
    """``first``³ convolution, then pools of 2³ each followed by a ``kernel``³ convolution."""
    rows = [Row("CONV", (first,) * 3, WIDTH)]
    for pool in range(pools):
        rows.append(Row("POOL", (2,) * 3, 0))
        rest = convolutions - 1 - pool if pool == pools - 1 else 1
        rows += [Row("CONV", (kernel,) * 3, WIDTH)] * rest
    rows[-1] = Row("CONV", (kernel,) * 3, OUTPUTS)
    return chain(1, rows, seed)


def n337(seed: int = 0) -> Network:
    """Kernels of 2³ and 3³, three poolings, field of view 85³."""
    return _network(2, 3, pools=3, convolutions=7, seed=seed)


def n537(seed: int = 0) -> Network:
    """Kernels of 4³ and 5³, three poolings, field of view 163³."""
    return _network(4, 5, pools=3, convolutions=7, seed=seed)


def n726(seed: int = 0) -> Network:
    """Kernels of 6³ and 7³, two poolings, field of view 117³."""
    return _network(6, 7, pools=2, convolutions=6, seed=seed)


def n926(seed: int = 0) -> Network:
    """Kernels of 8³ and 9³, two poolings, field of view 155³."""
    return _network(8, 9, pools=2, convolutions=6, seed=seed)


PAPER_NETWORKS: dict[str, Callable[[], Network]] = {
    "n337": n337,
    "n537": n537,
    "n726": n726,
    "n926": n926,
}
