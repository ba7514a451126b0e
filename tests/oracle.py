"""The plain oracle: every layer as loops over taps in float64, applied to whole arrays.

It shares no code with the package beyond the description of the network: padding, cropping and
dense evaluation are done here in the most obvious way.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from znni_dask.network import layers
from znni_dask.network.network import Network


def extend(volume, low, high, boundary):
    """numpy's own padding, axis by axis, repeated where the volume is thinner than the halo."""
    widths = [(0, 0)] + [(a, b) for a, b in zip(low, high, strict=True)]
    if boundary == "constant":
        return np.pad(volume, widths)
    return np.pad(volume, widths, mode={"reflect": "reflect", "nearest": "edge"}[boundary])


def whole(network: Network, x):
    """The network applied once to the array (channel, z, y, x); shapes must fit exactly."""
    values = {network.input.name: np.asarray(x, np.float64)}
    for node in network:
        if node.inputs:
            weights = {
                k: np.asarray(v, np.float64) for k, v in network.weights.get(node.name, {}).items()
            }
            values[node.name] = _apply(node.layer, [values[i] for i in node.inputs], weights)
    return values[network.output]


def dense(network: Network, x, field):
    """A sliding network at every voxel: the network itself, once for every offset of its stride,
    each time on just the voxels behind its outputs. ``field`` is what it needs for one output:
    its field of view and what it crops."""
    strides = [int(s) for s in network.spacing[network.output]]
    size = [n - f + 1 for n, f in zip(x.shape[1:], field, strict=True)]
    out = np.full((network.out_channels, *size), np.nan)
    for offset in product(*(range(min(s, n)) for s, n in zip(strides, size, strict=True))):
        count = [(n - o - 1) // s for n, o, s in zip(size, offset, strides, strict=True)]
        ends = [o + c * s + f for o, c, s, f in zip(offset, count, strides, field, strict=True)]
        here = tuple(slice(o, e) for o, e in zip(offset, ends, strict=True))
        there = tuple(slice(o, None, s) for o, s in zip(offset, strides, strict=True))
        out[(slice(None), *there)] = whole(network, x[(slice(None), *here)])
    return out


def _apply(layer, inputs, weights):
    x = inputs[0]
    match layer:
        case layers.Conv():
            return _convolve(layer, x, weights)
        case layers.ConvTranspose():
            return _transpose(layer, x, weights)
        case layers.MaxPool():
            return _pool(layer, x)
        case layers.Affine():
            return x * weights["scale"][:, None, None, None] + weights["shift"][:, None, None, None]
        case layers.Activation():
            return _activate(layer, x, weights)
        case layers.Softmax():
            e = np.exp(x - x.max(axis=0))
            return e / e.sum(axis=0)
        case layers.Add():
            return sum(inputs[1:], start=inputs[0])
        case layers.Mul():
            result = inputs[0]
            for other in inputs[1:]:
                result = result * other
            return result
        case layers.Concat():
            return np.concatenate(inputs)
        case layers.Pad():
            low, high = layer.padding
            widths = [(0, 0), *zip(low, high, strict=True)]
            return np.pad(x, widths, constant_values=layer.value)
        case layers.Crop():
            return x[
                (
                    slice(None),
                    *(
                        slice(a, n - b)
                        for a, b, n in zip(layer.low, layer.high, x.shape[1:], strict=True)
                    ),
                )
            ]
        case layers.ChannelSlice():
            return x[layer.start : layer.stop]
        case layers.Resize():
            for axis, factor in enumerate(layer.factor, start=1):
                x = np.repeat(x, factor, axis)
            return x
    raise AssertionError(f"the oracle does not know {layer}")


def _padded(layer, x, value):
    low, high = layer.padding
    return np.pad(x, [(0, 0), *zip(low, high, strict=True)], constant_values=value)


def _windows(layer, x):
    """For every tap its index and the strided view of all outputs' values under it."""
    extent = [(k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True)]
    size = [(n - e) // s + 1 for n, e, s in zip(x.shape[1:], extent, layer.stride, strict=True)]
    for tap in product(*(range(k) for k in layer.kernel)):
        start = [t * d for t, d in zip(tap, layer.dilation, strict=True)]
        index = tuple(
            slice(a, a + (n - 1) * s + 1, s)
            for a, n, s in zip(start, size, layer.stride, strict=True)
        )
        yield tap, x[(slice(None), *index)]


def _convolve(layer, x, weights):
    weight, bias = weights["weight"], weights["bias"]
    x = _padded(layer, x, 0.0)
    wide_in, wide_out = x.shape[0] // layer.groups, weight.shape[0] // layer.groups
    out = []
    for g in range(layer.groups):
        part = x[g * wide_in : (g + 1) * wide_in]
        kernels = weight[g * wide_out : (g + 1) * wide_out]
        total = 0.0
        for tap, values in _windows(layer, part):
            total = total + np.einsum(
                "oi,izyx->ozyx", kernels[(slice(None), slice(None), *tap)], values
            )
        out.append(total)
    return np.concatenate(out) + bias[:, None, None, None]


def _transpose(layer, x, weights):
    """Every input voxel scatters its kernel; then the border is trimmed."""
    weight, bias = weights["weight"], weights["bias"]
    extent = [(k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True)]
    full = [(n - 1) * s + e for n, s, e in zip(x.shape[1:], layer.stride, extent, strict=True)]
    low, high = layer.padding
    grow = [max(0, -h) for h in high]  # output padding: outputs that no input reaches
    wide_in, wide_out = x.shape[0] // layer.groups, weight.shape[1]
    out = np.zeros(
        (weight.shape[1] * layer.groups, *(f + g for f, g in zip(full, grow, strict=True)))
    )
    for g in range(layer.groups):
        part = x[g * wide_in : (g + 1) * wide_in]
        kernels = weight[g * wide_in : (g + 1) * wide_in]
        for tap in product(*(range(k) for k in layer.kernel)):
            index = tuple(
                slice(t * d, t * d + (n - 1) * s + 1, s)
                for t, d, n, s in zip(tap, layer.dilation, x.shape[1:], layer.stride, strict=True)
            )
            values = np.einsum("io,izyx->ozyx", kernels[(slice(None), slice(None), *tap)], part)
            out[(slice(g * wide_out, (g + 1) * wide_out), *index)] += values
    trimmed = tuple(
        slice(a, n - b)
        for a, b, n in zip(low, (max(0, h) for h in high), out.shape[1:], strict=True)
    )
    return out[(slice(None), *trimmed)] + bias[:, None, None, None]


def _pool(layer, x):
    x = _padded(layer, x, -np.inf)
    return np.maximum.reduce([values for _, values in _windows(layer, x)])


def _activate(layer, x, weights):
    match layer.function:
        case "relu":
            return np.where(x > 0, x, 0.0)
        case "leaky_relu":
            return np.where(x > 0, x, layer.alpha * x)
        case "prelu":
            return np.where(x > 0, x, weights["slope"][:, None, None, None] * x)
        case "elu":
            return np.where(x > 0, x, layer.alpha * np.expm1(np.minimum(x, 0)))
        case "tanh":
            return np.tanh(x)
        case "sigmoid":
            return 1 / (1 + np.exp(-x))
    raise AssertionError(layer.function)
