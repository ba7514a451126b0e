"""Build a network in a few lines of Python.

Every method adds a layer and returns its name, which later layers read. Weights that are not
given are drawn from a seeded generator (He et al. 2015, so that activations keep their scale).

>>> b = Builder(channels=1, seed=0)
>>> x = b.relu(b.conv(b.input, 8, kernel=3))
>>> x = b.max_pool(x, 2)
>>> x = b.conv(x, 2, kernel=3)
>>> b.network(x)
<Network of 4 layers, 1 → 2 channels, 658 parameters>
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, triple
from znni_dask.network import layers
from znni_dask.network.layers import NO_PADDING, Activation, Function, Layer, Padding
from znni_dask.network.network import Network, Node, without_unused

Extent = int | tuple[int, int, int]


def sizes(value: Extent) -> Size:
    """A triple in (z, y, x); one number stands for all three axes."""
    return (value, value, value) if isinstance(value, int) else triple(value)


class Builder:
    """Collects the layers of a network whose volume has ``channels`` channels."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        self.input = "input"
        self._nodes: list[Node] = []
        self._weights: dict[str, dict[str, NDArray[np.generic]]] = {}
        self._channels: dict[str, int] = {}
        self._random = np.random.default_rng(seed)
        self.add(layers.Input(channels), name=self.input)

    def add(
        self,
        layer: Layer,
        *inputs: str,
        name: str | None = None,
        weights: Mapping[str, ArrayLike] | None = None,
    ) -> str:
        """Add any layer; ``weights`` are its arrays by name. Returns the layer's name."""
        name = name or f"{layer.kind.lower()}_{len(self._nodes)}"
        unknown = [i for i in inputs if i not in self._channels]
        if unknown:
            raise NetworkError(f"layer {name!r} reads {unknown[0]!r}, which was not added before")
        self._channels[name] = layer.channels([self._channels[i] for i in inputs])
        self._nodes.append(Node(name, layer, tuple(inputs)))
        self._weights[name] = {k: np.asarray(v) for k, v in (weights or {}).items()}
        return name

    def channels(self, name: str) -> int:
        """Channels of a layer added before."""
        return self._channels[name]

    def conv(
        self,
        x: str,
        channels: int,
        kernel: Extent,
        *,
        stride: Extent = 1,
        dilation: Extent = 1,
        padding: Extent | str = 0,
        groups: int = 1,
        weight: ArrayLike | None = None,
        bias: ArrayLike | bool | None = None,
    ) -> str:
        """Convolution. ``padding`` is a number of voxels per axis, or ``"same"``; with ``bias``
        False there is none."""
        spacing = sizes(dilation)
        layer = layers.Conv(
            self._channels[x],
            channels,
            sizes(kernel),
            sizes(stride),
            spacing,
            _padding(padding, sizes(kernel), spacing),
            groups,
            bias=bias is not False,
        )
        return self.add(layer, x, weights=self._filters(layer, weight, bias))

    def conv_transpose(
        self,
        x: str,
        channels: int,
        kernel: Extent,
        *,
        stride: Extent = 1,
        padding: Extent = 0,
        groups: int = 1,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> str:
        """Transposed convolution; ``padding`` voxels are trimmed from each side of the output."""
        trim = sizes(padding)
        layer = layers.ConvTranspose(
            self._channels[x],
            channels,
            sizes(kernel),
            sizes(stride),
            padding=(trim, trim),
            groups=groups,
        )
        return self.add(layer, x, weights=self._filters(layer, weight, bias))

    def max_pool(
        self,
        x: str,
        kernel: Extent,
        stride: Extent | None = None,
        padding: Extent = 0,
        *,
        ceil: bool = False,
    ) -> str:
        """Max-pooling; the stride is the kernel unless given. With ``ceil`` a last window that
        reaches beyond the input counts."""
        pad = sizes(padding)
        stride = kernel if stride is None else stride
        layer = layers.MaxPool(sizes(kernel), sizes(stride), padding=(pad, pad), ceil=ceil)
        return self.add(layer, x)

    def average_pool(
        self, x: str, kernel: Extent, stride: Extent | None = None, padding: Extent = 0
    ) -> str:
        """Average pooling; the stride is the kernel unless given, padding counts as zeros."""
        pad = sizes(padding)
        stride = kernel if stride is None else stride
        return self.add(
            layers.AveragePool(
                sizes(kernel), sizes(stride), padding=(pad, pad), count_padding=True
            ),
            x,
        )

    def reduce(self, x: str, function: layers.Reduction, axes: str = "zyx") -> str:
        """Mean, sum, maximum … over channels ("c") or axes of space."""
        return self.add(layers.Reduce(function, axes), x)

    def linear(self, x: str, channels: int, size: Extent) -> str:
        """A matrix on all voxels and channels of an array of ``size``: flattening, then linear."""
        layer = layers.Conv(self._channels[x], channels, sizes(size), whole="zyx")
        return self.add(layer, x, weights=self._filters(layer, None, None))

    def batch_norm(self, x: str) -> str:
        """A batch normalisation as it is in evaluation, one factor and one shift per channel."""
        width = self._channels[x]
        weights = {
            "scale": self._random.uniform(0.5, 1.5, width),
            "shift": 0.1 * self._random.standard_normal(width),
        }
        return self.add(layers.Affine(width), x, weights=weights)

    def normalize(self, x: str, groups: int, space: str = "zyx", epsilon: float = 1e-5) -> str:
        """Instance (as many groups as channels), group or layer (one group) normalisation."""
        width = self._channels[x]
        weights = {
            "scale": self._random.uniform(0.5, 1.5, width),
            "shift": 0.1 * self._random.standard_normal(width),
        }
        return self.add(layers.Normalize(width, groups, space, epsilon), x, weights=weights)

    def activation(self, x: str, function: Function, alpha: float = 0.0, beta: float = 0.0) -> str:
        """A function of every value; its parameters are rounded to float32, as ONNX does."""
        layer = Activation(function, float(np.float32(alpha)), float(np.float32(beta)))
        return self.add(layer, x)

    def relu(self, x: str) -> str:
        """max(x, 0)."""
        return self.activation(x, "relu")

    def concat(self, *inputs: str) -> str:
        """Channels behind one another."""
        return self.add(layers.Concat(), *inputs)

    def plus(self, *inputs: str) -> str:
        """Sum."""
        return self.add(layers.Arithmetic("add"), *inputs)

    def resize(self, x: str, factor: Extent, placing: layers.Placing = "nearest") -> str:
        """Up-sampling, by repeating voxels or by linear interpolation (see `layers.Resize`)."""
        return self.add(layers.Resize(sizes(factor), placing), x)

    def crop(self, x: str, low: Extent, high: Extent | None = None) -> str:
        """Drop ``low`` first and ``high`` (as many unless given) last voxels per axis."""
        return self.add(layers.Crop(sizes(low), sizes(low if high is None else high)), x)

    def network(self, output: str | Mapping[str, str]) -> Network:
        """The network that ends in the layer ``output``, or in several, each under its name;
        layers that they do not depend on are left out."""
        outputs = {"output": output} if isinstance(output, str) else output
        return without_unused(self._nodes, outputs, self._weights)

    def _filters(
        self,
        layer: layers.Conv | layers.ConvTranspose,
        weight: ArrayLike | None,
        bias: ArrayLike | bool | None,
    ) -> dict[str, ArrayLike]:
        shapes = layer.weight_shapes()
        if weight is None:
            per_output = float(layer.multiply_adds() / layer.out_channels)
            deviation = np.float32(np.sqrt(2 / max(per_output, 1)))
            weight = self._random.standard_normal(shapes["weight"], np.float32) * deviation
        if not layer.bias:
            return {"weight": weight}
        if bias is None or bias is True:
            bias = np.float32(0.1) * self._random.standard_normal(shapes["bias"], np.float32)
        return {"weight": weight, "bias": bias}


def _padding(padding: Extent | str, kernel: Size, dilation: Size) -> Padding:
    if padding == "same":
        total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        low = triple(n // 2 for n in total)
        return low, triple(n - n // 2 for n in total)
    if isinstance(padding, str):
        raise NetworkError(f'padding is a number of voxels or "same", not {padding!r}')
    both = sizes(padding)
    return NO_PADDING if both == (0, 0, 0) else (both, both)
