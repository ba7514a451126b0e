"""What is to be known of a network before it is run: `znni info`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod

from znni_dask.choices import choose_primitives
from znni_dask.geometry import Box, Size, round_up, triple, volume
from znni_dask.network.field_of_view import NetworkGeometry, geometry, nonlocal_text, sizes_of
from znni_dask.network.network import Network
from znni_dask.network.rewrites import simplify
from znni_dask.network.window import SAME
from znni_dask.patches import Layout
from znni_dask.resources import computing_bytes
from znni_dask.schedule import Schedules
from znni_dask.windows import WholeWindow

_PATCH = 64  # voxels along the edges of the patch whose needs are told
_WINDOWS = (96, 64, 128, 48, 32, 24, 16)  # lengths of windows to tell of, most usual first
_LONGEST = 1024


@dataclass(frozen=True)
class Facts:
    """One output of a network.

    ``geometry`` is None where the network is not local; ``locality`` says why. Multiply-adds and
    activation memory are those per voxel of the volume where patches are large. ``needed_bytes``
    is what a process needs beside its own to compute ``patch`` voxels of output at once; of a
    network that is not local that is a window, None where none passes through it.
    """

    output: str
    channels: int
    geometry: NetworkGeometry | None
    locality: str
    multiply_adds: Fraction
    activation_bytes: float
    patch: Size | None
    needed_bytes: int


def facts(network: Network, threads: int, window: Size | None = None) -> tuple[Facts, ...]:
    """The facts of every output of a network; with ``window`` what it takes to apply it to
    windows of that size."""
    return tuple(
        _facts(simplify(network.only(name)), name, threads, window) for name in network.outputs
    )


def _facts(network: Network, name: str, threads: int, window: Size | None) -> Facts:
    if network.nonlocal_layers:
        return _of_windows(network, name, threads, window)
    found = geometry(network)
    edges = [1 if _flat(network, axis) else _PATCH for axis in range(3)]
    size = triple(
        n if n == 1 else round_up(n + 4 * axis.field_of_view, axis.alignment)
        for n, axis in zip(edges, found.axes, strict=True)
    )
    layout = Layout(network, size, "reflect")
    schedules = Schedules(layout, choose_primitives(layout))
    patch = triple(min(p, n) for p, n in zip(edges, layout.output_size, strict=True))
    corner = triple((n - p) // 2 for n, p in zip(layout.output_size, patch, strict=True))
    box = Box(corner, triple(a + p for a, p in zip(corner, patch, strict=True)))
    large = [round_up(n, axis.alignment) for n, axis in zip(edges, found.axes, strict=True)]
    if found.dense:
        large = [round_up(n, s) for n, s in zip(edges, layout.fragments, strict=True)]
    own = {
        name: triple(max(1, int(n / s)) for n, s in zip(large, spacing, strict=True))
        for name, spacing in network.spacing.items()
    }
    return Facts(
        output=name,
        channels=network.out_channels,
        geometry=found,
        locality="local",
        multiply_adds=multiply_adds(network, found.dense),
        activation_bytes=schedules.arena(own).bytes / prod(large),
        patch=patch,
        needed_bytes=computing_bytes(schedules, schedules.sizes(box), patch, threads),
    )


def _of_windows(network: Network, name: str, threads: int, window: Size | None) -> Facts:
    window = window or _window(network)
    spread, needed = 0.0, 0
    if window is not None:
        layout = WholeWindow(network, window)
        schedules = Schedules(layout, choose_primitives(layout))
        spread = schedules.arena(layout.sizes).bytes / volume(window)
        needed = computing_bytes(schedules, layout.sizes, layout.output_size, threads)
    return Facts(
        output=name,
        channels=network.out_channels,
        geometry=None,
        locality=nonlocal_text(network.nonlocal_layers),
        multiply_adds=multiply_adds(network, dense=False),
        activation_bytes=spread,
        patch=window,
        needed_bytes=needed,
    )


def multiply_adds(network: Network, dense: bool) -> Fraction:
    """Multiply-adds per voxel of the volume; of a dense network every layer counts at every voxel.
    What was reduced to single voxels costs nothing in comparison."""
    total = Fraction(0)
    for node in network:
        if not any(network.reduced[node.name]):
            share = 1 if dense else 1 / prod(network.spacing[node.name], start=Fraction(1))
            total += node.layer.multiply_adds() * share
    return total


def _flat(network: Network, axis: int) -> bool:
    """Whether the network looks at every place of an axis by itself."""
    return all(node.layer.window(axis) == SAME for node in network)


def _window(network: Network) -> Size | None:
    """A window that passes through the network: of a usual length, else the shortest there is."""
    found = []
    for axis in range(3):
        lengths = (1,) if _flat(network, axis) else (*_WINDOWS, *range(1, _LONGEST))
        fitting = next((n for n in lengths if sizes_of(network, axis, n)), None)
        if fitting is None:
            return None
        found.append(fitting)
    return triple(found)
