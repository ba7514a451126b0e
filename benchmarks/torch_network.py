"""A network by PyTorch, layer after layer, as those who know it would write it down."""

from __future__ import annotations

from itertools import product
from typing import cast

import numpy as np
import torch
from torch.nn import functional

from znni_dask.network.layers import (
    Activation,
    Arithmetic,
    Concat,
    Conv,
    ConvTranspose,
    Layer,
    MaxPool,
    Reduce,
)
from znni_dask.network.network import Network, Node
from znni_dask.primitives.base import Array

FORMATS = {"": torch.contiguous_format, " channels last": torch.channels_last_3d}


class TorchNetwork:
    """A network with its weights in one memory format, on so many threads (0: as many as PyTorch
    likes), or on a GPU."""

    def __init__(
        self,
        network: Network,
        threads: int,
        memory: torch.memory_format,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._network, self._memory = network, memory
        self._device, self._dtype = device, dtype
        if threads:
            torch.set_num_threads(threads)
        self._weights = {
            name: {key: self._placed(array) for key, array in weights.items()}
            for name, weights in network.weights.items()
        }

    def _placed(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device, self._dtype)
        return tensor.contiguous(memory_format=self._memory) if tensor.dim() == 5 else tensor

    @torch.inference_mode()
    def apply(self, x: Array) -> Array:
        """The output for an input (batch, channel, z, y, x)."""
        source, last_use = self._network.input.name, self._last_uses()
        values = {source: self._placed(x)}
        for node in self._network:
            if node.inputs:
                taken = [values[name] for name in node.inputs]
                values[node.name] = self._layer(node.layer, taken, self._weights.get(node.name, {}))
                for name in set(node.inputs):
                    if last_use[name] == node.name:
                        del values[name]
        return _on_host(values[self._network.output])

    @torch.inference_mode()
    def fragments(self, x: Array) -> list[Array]:
        """The fragments of the output for one input (1, channel, z, y, x), where the network is one
        layer after another: max-pooling is done at every offset of its stride. One fragment of
        every pooling goes to the end before the next, or memory would not suffice for large inputs;
        the order is that of fragments that join a batch."""
        layers = [node for node in self._network if node.inputs]
        return [_on_host(made) for made in self._to_the_end(layers, self._placed(x))]

    def _to_the_end(self, layers: list[Node], x: torch.Tensor) -> list[torch.Tensor]:
        for number, node in enumerate(layers):
            if isinstance(node.layer, MaxPool):
                parts = fragments(node.layer, x)
                del x
                rest = [self._to_the_end(layers[number + 1 :], part) for part in parts]
                return [made for together in zip(*rest, strict=True) for made in together]
            x = self._layer(node.layer, [x], self._weights.get(node.name, {}))
        return [x[0].contiguous()]

    def _last_uses(self) -> dict[str, str]:
        return {name: node.name for node in self._network for name in node.inputs}

    def _layer(
        self, layer: Layer, taken: list[torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        x = taken[0]
        match layer:
            case Conv():
                return convolved(layer, x, weights)
            case ConvTranspose(padding=((0, 0, 0), (0, 0, 0)), dilation=(1, 1, 1)):
                weight, bias = weights["weight"], weights.get("bias")
                return functional.conv_transpose3d(x, weight, bias, layer.stride)
            case MaxPool():
                return pooled(layer, x)
            case Activation(function="relu"):
                return x.relu_()
            case Arithmetic(function="add"):
                return (x + taken[1]).relu_() if layer.relu else x + taken[1]
            case Concat():
                return torch.cat(taken, 1)
            case Reduce(function="mean", axes="zyx"):
                return x.mean((2, 3, 4), keepdim=True)
        raise NotImplementedError(f"{layer.kind} ({layer.summary})")


def _on_host(made: torch.Tensor) -> Array:
    """As an array; bfloat16, which numpy has not, as float32."""
    wide = made.float() if made.dtype == torch.bfloat16 else made
    return cast("Array", wide.contiguous().cpu().numpy())


def convolved(layer: Conv, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A convolution, and its ReLU."""
    low, high = layer.padding
    if low != high:
        raise NotImplementedError(f"padding {layer.padding}")
    made = functional.conv3d(
        x, weights["weight"], weights.get("bias"), layer.stride, low, layer.dilation, layer.groups
    )
    return made.relu_() if layer.relu else made


def pooled(layer: MaxPool, x: torch.Tensor) -> torch.Tensor:
    """Max-pooling."""
    low, high = layer.padding
    if low != high:
        raise NotImplementedError(f"padding {layer.padding}")
    return functional.max_pool3d(x, layer.kernel, layer.stride, low, ceil_mode=layer.ceil)


def fragments(layer: MaxPool, x: torch.Tensor) -> list[torch.Tensor]:
    """Max-pooling at every offset of the stride, all of one size."""
    size = [
        (n - k + 1) // s for n, k, s in zip(x.shape[2:], layer.kernel, layer.stride, strict=True)
    ]
    ends = [(n - 1) * s + k for n, k, s in zip(size, layer.kernel, layer.stride, strict=True)]
    made = []
    for offset in product(*map(range, layer.stride)):
        z, y, x_ = (slice(o, o + n) for o, n in zip(offset, ends, strict=True))
        made.append(pooled(layer, x[:, :, z, y, x_]))
    return made
