"""Field of view, halo, alignment and valid sizes of any network, derived from its graph.

A network *slides* when it neither pads nor up-samples: its output at a voxel is a function of
the field of view around that voxel alone. A sliding network that pools or strides is *dense*
here: it is evaluated at every voxel, as if every stride were 1 and every later window dilated
(Zlateski et al. 2016, section II). All other networks keep the grid of their own output.

Along each axis the extended volume is fed to the network. Output voxel 0 of the volume lies
``shift`` voxels into what the network's outputs lack on both sides, ``shrink`` in total; of a
sliding network that is the low halo, (field of view - 1) // 2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm

from znni_dask.errors import NetworkError, VolumeError
from znni_dask.geometry import AXES
from znni_dask.network.layers import Input
from znni_dask.network.network import Network, Node, not_reduced
from znni_dask.network.window import LARGEST, Window

Interval = tuple[int, int]
_LISTED = 8


@dataclass(frozen=True)
class Extension:
    """How one axis of a volume is fed to a network, and which outputs are kept.

    ``low`` voxels are added before the volume, ``size`` is the length of what the network sees;
    outputs ``first`` to ``first + outputs`` of the network are the answer.
    """

    low: int
    size: int
    first: int
    outputs: int


@dataclass(frozen=True)
class AxisGeometry:
    """The geometry of a network along one axis; lengths in voxels of the volume.

    ``origin`` is the place of the network's output 0 (its centre) in the extended volume.
    """

    field_of_view: int
    halo: Interval
    output_stride: Fraction
    alignment: int
    shrink: int
    shift: int
    origin: Fraction
    dense: bool
    windows: tuple[tuple[str, Window, tuple[str, ...]], ...]
    alike: tuple[tuple[str, str], ...] = ()

    def sizes(self, n: int) -> dict[str, int] | None:
        """Length of every layer's output for an input of ``n``; None where the graph does not
        map ``n`` exactly (a branch would not fit its neighbour, or nothing would be left)."""
        return _sizes(self.windows, n, self.alike, dense=self.dense)

    def output_size(self, n: int) -> int | None:
        """Length of the network's output for an input of ``n``, None where there is none."""
        sizes = self.sizes(n)
        return sizes[self.windows[-1][0]] if sizes else None

    def valid_sizes(self, count: int = 4) -> list[int]:
        """The ``count`` smallest inputs that the graph maps exactly."""
        found: list[int] = []
        n = 1
        while len(found) < count:
            if self.sizes(n):
                found.append(n)
            n += 1
        return found

    def extension(self, n: int, boundary: str) -> Extension:
        """How a volume of length ``n`` is extended; raises `VolumeError` where it is too thin."""
        if boundary == "valid":
            for size in range(n, 0, -1):
                if outputs := self.output_size(size):
                    return Extension(0, size, 0, outputs)
            raise VolumeError(
                f'boundary="valid" needs at least {self.valid_sizes(1)[0]} voxels, the volume has '
                f"{n}: take another boundary (reflect, nearest, constant) or a larger volume"
            )
        low = max(self.shift, 0)
        outputs = ceil(n / self.output_stride)
        first = max(-self.shift, 0) if self.output_stride == 1 else 0
        size = n + low
        while (self.output_size(size) or 0) < outputs + first:
            size += 1
        return Extension(low, size, first, outputs)


@dataclass(frozen=True)
class NetworkGeometry:
    """The geometry of a network: one `AxisGeometry` per axis, (z, y, x)."""

    axes: tuple[AxisGeometry, AxisGeometry, AxisGeometry]
    dense: bool

    @property
    def field_of_view(self) -> tuple[int, int, int]:
        """Window of the volume behind one output voxel, in voxels."""
        z, y, x = (axis.field_of_view for axis in self.axes)
        return z, y, x

    @property
    def alignment(self) -> tuple[int, int, int]:
        """What origins of patches are best multiples of, in voxels of the volume."""
        z, y, x = (axis.alignment for axis in self.axes)
        return z, y, x

    @property
    def output_stride(self) -> tuple[Fraction, Fraction, Fraction]:
        """Voxel spacing of the output, in voxels of the volume."""
        z, y, x = (axis.output_stride for axis in self.axes)
        return z, y, x


@lru_cache(maxsize=64)
def geometry(network: Network) -> NetworkGeometry:
    """Derive the geometry of a network.

    >>> from znni_dask.network.chains import n337
    >>> geometry(n337()).field_of_view
    (85, 85, 85)
    """
    if broken := network.nonlocal_layers:
        raise NetworkError(nonlocal_text(broken))
    dense = slides(network) and any(s != 1 for s in network.spacing[network.output])
    z, y, x = (_axis(network, axis, dense) for axis in range(3))
    return NetworkGeometry((z, y, x), dense)


def nonlocal_text(broken: Sequence[Node]) -> str:
    """Why a network with these layers has no answer in patches."""
    shown = [
        f"{node.name!r} ({node.layer.kind}, over "
        + "".join(AXES[axis] for axis in range(3) if node.layer.window(axis).whole)
        + ")"
        for node in broken
    ]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return (
        f"not local: every output voxel depends on the whole volume through {len(broken)} "
        f"{'layers that reduce' if len(broken) > 1 else 'layer that reduces'} over space: "
        f"{', '.join(shown[:_LISTED])}{more}. Such a network has no answer in patches; apply it "
        "window by window with --patchwise Z,Y,X, which is approximate"
    )


def sizes_of(network: Network, axis: int, n: int) -> dict[str, int] | None:
    """Length of every layer's output for an input of ``n`` to the network as it is, layers that
    reduce over space included; None where branches do not fit or nothing is left."""
    windows = [
        (
            node.name,
            node.layer.window(axis),
            not_reduced(node.inputs, network.reduced, axis),
        )
        for node in network
    ]
    return _sizes(windows, n, network.alike)


def _sizes(
    windows: Iterable[tuple[str, Window, Sequence[str]]],
    n: int,
    alike: Sequence[tuple[str, str]],
    dense: bool = False,
) -> dict[str, int] | None:
    """Length of every layer's output for an input of ``n``, of layers given by their windows and
    inputs. Where inputs differ in length, or layers that are ``alike`` do, there is none; at
    every voxel of a dense network they reach as far as the shortest."""
    found: dict[str, int] = {}
    for name, window, inputs in windows:
        sources = {found[i] for i in inputs} or {n}
        if len(sources) > 1 and not dense:
            return None
        found[name] = window.size(min(sources)) if inputs else n
        if found[name] < 1:
            return None
    return found if all(found[a] == found[b] for a, b in alike) else None


def slides(network: Network) -> bool:
    """Whether the network neither pads nor up-samples."""
    return not any(
        window.pads or window.up > 1
        for node in network
        for window in (node.layer.window(axis) for axis in range(3))
    )


def demand(
    network: Network,
    axis: int,
    output: Interval,
    *,
    bounds: Mapping[str, Interval] | None = None,
    fragmented: Collection[str] = (),
) -> dict[str, Interval]:
    """The stretch of every layer's own output behind ``output`` of the network.

    With ``bounds`` (of every layer's output) stretches are clipped to what exists; without, they
    include the padding. A layer in ``fragmented`` (of a dense network, which has no bounds) is
    evaluated at all offsets of its stride, for which its input reaches ``stride - 1`` further.
    """
    found: dict[str, Interval] = {network.output: output}
    for node in reversed(network.nodes):
        if node.name not in found:
            continue
        window = node.layer.window(axis)
        start, stop = window.needs(*found[node.name])
        if node.name in fragmented:
            stop += window.stride - 1
        for name in node.inputs:
            needed = (start, stop)
            if bounds is not None:
                needed = window.within(*found[node.name], bounds[name])
            found[name] = hull(found.get(name), needed)
    return found


def hull(a: Interval | None, b: Interval) -> Interval:
    """The smallest interval around both."""
    return b if a is None else (min(a[0], b[0]), max(a[1], b[1]))


def _axis(network: Network, axis: int, dense: bool) -> AxisGeometry:
    used = demand(network, axis, (0, 1))
    windows = tuple(
        (node.name, _window(network, node, axis, dense), node.inputs)
        for node in network
        if node.name in used
    )
    spacing = {name: value[axis] for name, value in network.spacing.items()}
    stride = Fraction(1) if dense else spacing[network.output]
    alignment = 1 if dense else lcm(*(s.numerator for s in spacing.values()))
    period = int(alignment / stride)
    source = network.input.name
    behind = [demand(network, axis, (q, q + 1))[source] for q in range(period)]
    field = max(stop - start for start, stop in behind)
    if max(alignment, field) > LARGEST:
        raise NetworkError(
            f"field of view {field} and alignment {alignment} along axis {axis} are taken for a "
            f"mistake: the most is {LARGEST}"
        )
    if dense:  # the network as it strides must fit its own field of view
        own = tuple((name, network[name].layer.window(axis), i) for name, _, i in windows)
        _shrink(
            own, network.output, spacing[network.output], lcm(*map(int, spacing.values())), field
        )
    alike = () if dense else network.alike
    shrink = _shrink(windows, network.output, stride, alignment, field, dense, alike)
    slid = slides(network) and stride == 1
    shift = behind[0][0] + (field - 1) // 2 if slid else shrink // 2
    start, stop = demand(network, axis, (0, period))[source]
    return AxisGeometry(
        field_of_view=field,
        halo=(max(shift - start, 0), max(stop - shift - alignment, 0)),
        output_stride=stride,
        alignment=alignment,
        shrink=shrink,
        shift=shift,
        origin=Fraction(shift) if stride == 1 else _origin(network, axis),
        dense=dense,
        windows=windows,
        alike=alike,
    )


def _window(network: Network, node: Node, axis: int, dense: bool) -> Window:
    window = node.layer.window(axis)
    if dense and node.inputs:
        return window.dilated(int(network.spacing[node.inputs[0]][axis]))
    return window


def _shrink(
    windows: tuple[tuple[str, Window, tuple[str, ...]], ...],
    output: str,
    stride: Fraction,
    alignment: int,
    field: int,
    dense: bool = False,
    alike: tuple[tuple[str, str], ...] = (),
) -> int:
    """Voxels that the outputs lack of the input at the sizes that the graph maps exactly.

    Where rounding down in strided layers makes that depend on the size, the smallest lack
    counts: of a network that can keep its size nothing is missing.
    """
    probe = AxisGeometry(field, (0, 0), stride, alignment, 0, 0, Fraction(0), dense, windows, alike)
    cropped = sum(max(0, -window.low) + max(0, -window.high) for _, window, _ in windows)
    begin = 4 * (field + alignment) + cropped * alignment
    lacks = [
        n - ceil(stride * outputs)
        for n in range(begin, begin + alignment)
        if (outputs := probe.output_size(n))
    ]
    if not lacks:
        raise NetworkError(
            f"no input size passes through the network: the branches that meet before {output!r} "
            "differ in length for every size"
        )
    return min((t for t in lacks if t >= 0), default=max(lacks))


def _origin(network: Network, axis: int) -> Fraction:
    """Centre of output 0 in voxels of the extended volume, carried from layer to layer."""
    found: dict[str, Fraction] = {}
    for node in network:
        if isinstance(node.layer, Input):
            found[node.name] = Fraction(0)
            continue
        source = node.inputs[0]
        centre = node.layer.window(axis).centre
        found[node.name] = found[source] + network.spacing[source][axis] * centre
    return found[network.output]
