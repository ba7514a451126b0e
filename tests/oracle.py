"""The plain oracle: every layer as loops over taps in float64, applied to whole arrays.

It shares no code with the package beyond the description of the network: padding, cropping and
dense evaluation are done here in the most obvious way.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
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
        case layers.MaxPool() | layers.AveragePool():
            return _pool(layer, x)
        case layers.Affine():
            return x * weights["scale"][:, None, None, None] + weights["shift"][:, None, None, None]
        case layers.Activation():
            return _activate(layer, x, weights)
        case layers.Softmax():
            axes = _axes(layer.axes)
            e = np.exp(x - x.max(axis=axes, keepdims=True))
            share = e / e.sum(axis=axes, keepdims=True)
            return np.log(share) if layer.log else share
        case layers.Reduce():
            return _reduce(layer.function, x, _axes(layer.axes))
        case layers.Normalize():
            grouped = x.reshape(layer.groups, -1, *x.shape[1:])
            axes = (1, *(1 + a for a in _axes(layer.space)))
            mean = grouped.mean(axis=axes, keepdims=True)
            variance = ((grouped - mean) ** 2).mean(axis=axes, keepdims=True)
            x = ((grouped - mean) / np.sqrt(variance + layer.epsilon)).reshape(x.shape)
            return x * weights["scale"][:, None, None, None] + weights["shift"][:, None, None, None]
        case layers.Arithmetic(relu=True):
            made = _apply(replace(layer, relu=False), inputs, weights)
            return np.where(made < 0, 0, made)
        case layers.Arithmetic():
            if layer.function == "where":
                return np.where(inputs[0] != 0, inputs[1], inputs[2])
            function = {
                "greater": lambda a, b: (a > b).astype(float),
                "less": lambda a, b: (a < b).astype(float),
                "equal": lambda a, b: (a == b).astype(float),
                "add": np.add,
                "sub": np.subtract,
                "mul": np.multiply,
                "div": np.divide,
                "min": np.minimum,
                "max": np.maximum,
                "pow": np.power,
            }[layer.function]
            return functools.reduce(function, inputs)
        case layers.Concat():
            return np.concatenate(inputs)
        case layers.Broadcast():
            return np.broadcast_to(x, (x.shape[0], *inputs[1].shape[1:]))
        case layers.Pad():
            low, high = layer.padding
            widths = [(0, 0), *zip(low, high, strict=True)]
            more = {"constant_values": layer.value} if layer.mode == "constant" else {}
            return np.pad(x, widths, mode=layer.mode, **more)
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
        case layers.Select():
            return x[list(layer.indices)]
        case layers.DepthToSpace():
            fz, fy, fx = layer.factor
            c, z, y, x_ = x.shape
            parts = x.reshape(c // (fz * fy * fx), fz, fy, fx, z, y, x_)
            moved = parts.transpose(0, 4, 1, 5, 2, 6, 3)
            return moved.reshape(-1, z * fz, y * fy, x_ * fx)
        case layers.Resize():
            for axis, factor in enumerate(layer.factor, start=1):
                x = _resize(layer.placing, x, factor, axis)
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
    weight, bias = weights["weight"], weights.get("bias", np.zeros(layer.out_channels))
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
    made = np.concatenate(out) + bias[:, None, None, None]
    return np.where(made < 0, 0, made) if layer.relu else made


def _transpose(layer, x, weights):
    """Every input voxel scatters its kernel; then the border is trimmed."""
    weight, bias = weights["weight"], weights.get("bias", np.zeros(layer.out_channels))
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


def _axes(names):
    return tuple("czyx".index(name) for name in names)


def _reduce(function, x, axes):
    match function:
        case "argmax":
            return x.argmax(axis=0)[None].astype(float)
        case "l1":
            return np.abs(x).sum(axis=axes, keepdims=True)
        case "l2":
            return np.sqrt((x**2).sum(axis=axes, keepdims=True))
    return getattr(np, function)(x, axis=axes, keepdims=True)


def _pool(layer, x):
    """Windows of what exists; a last window that begins inside counts where ``ceil``."""
    low, high = layer.padding
    extent = [(k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True)]
    over = [0, 0, 0]
    for axis, n in enumerate(x.shape[1:]):
        rest = (n + low[axis] + high[axis] - extent[axis]) % layer.stride[axis]
        if layer.ceil and rest:
            begin = n + low[axis] + high[axis] - extent[axis] - rest + layer.stride[axis]
            over[axis] = layer.stride[axis] - rest if begin < n + low[axis] else 0
    widths = [(0, 0), *zip(low, (h + o for h, o in zip(high, over, strict=True)), strict=True)]
    if isinstance(layer, layers.MaxPool):
        x = np.pad(x, widths, constant_values=-np.inf)
        return np.maximum.reduce([values for _, values in _windows(layer, x)])
    counted = np.ones(x.shape)
    if layer.count_padding:
        counted = np.pad(counted, [(0, 0), *zip(low, high, strict=True)], constant_values=1)
        widths_counted = [(0, 0), *((0, o) for o in over)]
    else:
        widths_counted = widths
    counted, x = np.pad(counted, widths_counted), np.pad(x, widths)
    total = sum(values for _, values in _windows(layer, x))
    return total / sum(values for _, values in _windows(layer, counted))


def _resize(placing, x, factor, axis):
    n = x.shape[axis]
    if placing == "nearest":
        return np.repeat(x, factor, axis)
    q = np.arange(n * factor)
    place = {
        "half_pixel": (q + 0.5) / factor - 0.5,
        "asymmetric": q / factor,
        "align_corners": np.linspace(0, n - 1, n * factor),
    }[placing]
    return np.apply_along_axis(lambda line: np.interp(place, np.arange(n), line), axis, x)


def _activate(layer, x, weights):
    a, b = layer.alpha, layer.beta
    negative = np.minimum(x, 0)
    match layer.function:
        case "prelu":
            return np.where(x > 0, x, weights["slope"][:, None, None, None] * x)
        case "pow":
            return x**a
        case "round":
            return np.rint(x)
        case "atan":
            return np.arctan(x)
        case "abs" | "exp" | "log" | "sqrt" | "sign" | "floor" | "ceil" | "sin" | "cos" | "tanh":
            return getattr(np, layer.function)(x)
    return {
        "relu": lambda: np.where(x > 0, x, 0.0),
        "leaky_relu": lambda: np.where(x > 0, x, a * x),
        "elu": lambda: np.where(x > 0, x, a * np.expm1(negative)),
        "selu": lambda: b * np.where(x > 0, x, a * np.expm1(negative)),
        "celu": lambda: np.where(x > 0, x, a * np.expm1(negative / a)),
        "gelu": lambda: x / 2 * (1 + _erf(x / np.sqrt(2))),
        "gelu_tanh": lambda: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": lambda: x / (1 + np.exp(-x)),
        "mish": lambda: x * np.tanh(np.log1p(np.exp(x))),
        "hard_swish": lambda: x * np.clip(x / 6 + 0.5, 0, 1),
        "hard_sigmoid": lambda: np.clip(a * x + b, 0, 1),
        "softplus": lambda: np.log1p(np.exp(x)),
        "softsign": lambda: x / (1 + np.abs(x)),
        "sigmoid": lambda: 1 / (1 + np.exp(-x)),
        "clip": lambda: np.minimum(np.maximum(x, a), b),
        "thresholded_relu": lambda: np.where(x > a, x, 0.0),
        "erf": lambda: _erf(x),
        "neg": lambda: -x,
        "reciprocal": lambda: 1 / x,
    }[layer.function]()


_erf = np.vectorize(math.erf)
