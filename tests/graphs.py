"""Networks for tests: random graphs of every family, their weights scaled layer by layer."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from znni_dask.network import layers
from znni_dask.network.build import Builder
from znni_dask.network.field_of_view import geometry
from znni_dask.network.network import Network

FUNCTIONS = ("relu", "leaky_relu", "elu", "tanh", "sigmoid")


def scaled(network: Network, shape=(24, 24, 24), seed=0) -> Network:
    """The network with every convolution scaled so that its output has standard deviation 1.

    Shapes that the graph does not map exactly are enlarged until it does.
    """
    random = np.random.default_rng(seed)
    weights = {name: dict(arrays) for name, arrays in network.weights.items()}
    found = geometry(network)
    strides = network.spacing[network.output]
    size = []
    for axis, stride, n in zip(found.axes, strides, shape, strict=True):
        if found.dense:  # what the strided network itself maps exactly
            n = axis.field_of_view + int(stride) * max(4, (n - axis.field_of_view) // int(stride))
        while not found.dense and not axis.output_size(n):
            n += 1
        size.append(n)
    values = {network.input.name: random.standard_normal((network.in_channels, *size))}
    for node in network:
        if not node.inputs:
            continue
        inputs = [values[i] for i in node.inputs]
        value = oracle._apply(node.layer, inputs, weights.get(node.name, {}))
        if isinstance(node.layer, layers.Conv | layers.ConvTranspose):
            factor = np.float32(1 / value.std())
            own = weights[node.name]
            own["weight"], own["bias"] = own["weight"] * factor, own["bias"] * factor
            value = oracle._apply(node.layer, inputs, own)
        values[node.name] = value
    return Network(network.nodes, network.outputs, weights)


def _activate(b: Builder, x: str, random) -> str:
    kind = random.choice([*FUNCTIONS, "prelu"])
    if kind == "prelu":
        width = b.channels(x)
        slope = random.uniform(-0.5, 0.5, width)
        return b.add(layers.Activation("prelu", width=width), x, weights={"slope": slope})
    return b.activation(x, str(kind), alpha=0.3 if kind in ("leaky_relu", "elu") else 0.0)


def _kernel(random, largest=3) -> tuple[int, int, int]:
    z, y, x = (int(k) for k in random.integers(1, largest + 1, 3))
    return z, y, x


def chain(seed: int) -> Network:
    """A sliding window: valid convolutions, poolings (some strided convolutions), anisotropic."""
    random = np.random.default_rng(seed)
    b = Builder(int(random.integers(1, 3)), seed)
    x = b.input
    for _ in range(int(random.integers(1, 3))):
        x = _activate(b, b.conv(x, int(random.integers(2, 6)), _kernel(random)), random)
        window = tuple(int(k) for k in random.choice([1, 2, 3], 3, p=[0.3, 0.5, 0.2]))
        if random.random() < 0.2:
            x = b.conv(x, 3, window, stride=window)
        else:
            overlap = tuple(max(1, k - int(random.random() < 0.3)) for k in window)
            x = b.max_pool(x, window, stride=overlap)
    x = _activate(b, b.conv(x, int(random.integers(2, 6)), _kernel(random)), random)
    return scaled(b.network(b.conv(x, int(random.integers(1, 4)), _kernel(random, 2))))


def residual(seed: int) -> Network:
    """Valid residual blocks: the identity is cropped; dilations and groups."""
    random = np.random.default_rng(seed)
    b = Builder(1, seed)
    x = b.conv(b.input, 4, (1, 3, 3))
    for _ in range(2):
        kernel = _kernel(random)
        dilation = int(random.integers(1, 3))
        y = b.conv(x, 4, kernel, dilation=dilation, groups=int(random.choice([1, 2, 4])))
        y = _activate(b, y, random)
        low = tuple((k - 1) * dilation // 2 for k in kernel)
        high = tuple((k - 1) * dilation - a for k, a in zip(kernel, low, strict=True))
        x = b.plus(y, b.crop(x, low, high))
    gate = b.activation(b.conv(x, 1, 1), "sigmoid")
    x = b.add(layers.Arithmetic("mul"), x, gate)
    return scaled(b.network(b.conv(x, 2, 1)))


def unet(seed: int, depth: int | None = None) -> Network:
    """Same-padded, with skips; pooling or strided convolution down, both ways up."""
    random = np.random.default_rng(seed)
    b = Builder(1, seed)
    depth = depth or int(random.integers(1, 3))
    x, skips = b.input, []
    for level in range(depth):
        kernel = tuple(int(k) for k in random.choice([1, 3], 3, p=[0.2, 0.8]))
        x = _activate(b, b.conv(x, 3 + level, kernel, padding="same"), random)
        factor = (int(random.choice([1, 2])), 2, 2)
        skips.append((x, factor))
        if random.random() < 0.3:
            x = b.conv(x, 4, factor, stride=factor)
        else:
            x = b.max_pool(x, factor)
    x = _activate(b, b.conv(x, 5, 3, padding="same"), random)
    for skip, factor in reversed(skips):
        if random.random() < 0.5:
            x = b.conv_transpose(x, 4, factor, stride=factor)
        else:
            x = b.resize(x, factor)
        x = b.concat(x, skip)
        x = _activate(b, b.conv(x, 4, 3, padding="same"), random)
    return scaled(b.network(b.conv(x, 2, 1)))


def valid_unet(seed: int) -> Network:
    """A U-Net without padding: outputs are smaller, skips are cropped."""
    b = Builder(1, seed)
    skip = b.relu(b.conv(b.input, 3, 3))
    x = b.relu(b.conv(b.max_pool(skip, 2), 4, 3))
    x = b.conv_transpose(x, 3, 2, stride=2) if seed % 2 else b.resize(x, 2)
    x = b.concat(x, b.crop(skip, 2))
    return scaled(b.network(b.conv(x, 2, (1, 3, 3))))


def strided(seed: int) -> Network:
    """Padded, with an output coarser than the volume."""
    random = np.random.default_rng(seed)
    b = Builder(1, seed)
    x = _activate(b, b.conv(b.input, 4, 3, stride=2, padding=1), random)
    x = b.max_pool(x, 3, stride=(1, 2, 2), padding=1)
    return scaled(b.network(b.conv(x, 2, 3, padding=1)), (32, 32, 32))


def finer(seed: int) -> Network:
    """An output finer than the volume."""
    b = Builder(1, seed)
    x = b.relu(b.conv(b.input, 4, 3, padding=1))
    x = b.conv_transpose(x, 4, (2, 4, 4), stride=2, padding=(0, 1, 1))
    return scaled(b.network(b.conv(x, 1, 3, padding=1)))


def flat(seed: int) -> Network:
    """A 2D network: z is 1 in every kernel."""
    b = Builder(1, seed)
    skip = b.relu(b.conv(b.input, 4, (1, 3, 3), padding="same"))
    x = b.relu(b.conv(b.max_pool(skip, (1, 2, 2)), 6, (1, 3, 3), padding="same"))
    x = b.concat(b.resize(x, (1, 2, 2)), skip)
    x = b.add(layers.Pad(((0, 1, 1), (0, 1, 1)), 0.5), x)
    x = b.conv(x, 3, (1, 3, 3))
    return scaled(b.network(b.add(layers.Softmax(), x)))


def even(seed: int) -> Network:
    """Even kernels, same-padded on one side more than on the other."""
    b = Builder(1, seed)
    x = b.relu(b.conv(b.input, 3, (2, 4, 2), padding="same"))
    x = b.add(layers.Select((1, 2)), x)
    return scaled(b.network(b.conv(x, 2, (3, 2, 4), padding="same")))


def branches(seed: int) -> Network:
    """Dense networks whose branches reach one stride by different ways, or stride differently."""
    b = Builder(1, seed)
    x = b.relu(b.conv(b.input, 2, 2))
    pairs = [
        lambda: (b.max_pool(x, (1, 4, 1)), b.max_pool(b.max_pool(x, (1, 2, 1)), (1, 2, 1))),
        lambda: (
            b.max_pool(b.max_pool(x, (1, 2, 1)), (1, 3, 1)),
            b.max_pool(b.max_pool(x, (1, 3, 1)), (1, 2, 1)),
        ),
        lambda: (b.max_pool(b.max_pool(x, (2, 1, 1)), (1, 2, 1)), b.max_pool(x, (2, 2, 1))),
        lambda: (b.conv(x, 2, (1, 2, 2), stride=(1, 2, 2)), b.max_pool(x, (1, 2, 2))),
        lambda: (b.max_pool(x, (1, 2, 2)), b.conv(x, 2, (1, 2, 2), stride=(1, 2, 2))),
        lambda: (
            b.conv(x, 2, (1, 1, 3), stride=(1, 1, 2)),
            b.crop(b.conv(x, 2, 1, stride=(1, 1, 2)), 0, (0, 0, 1)),
        ),
        lambda: (b.max_pool(x, (1, 1, 2)), b.max_pool(x, (1, 1, 3), stride=(1, 1, 2))),
        lambda: (b.max_pool(x, (1, 2, 1)), b.max_pool(b.conv(x, 2, 1), (1, 2, 1))),
    ]
    first, second = pairs[seed % len(pairs)]()
    x = b.plus(first, second) if seed % 2 else b.concat(first, second)
    return scaled(b.network(b.conv(b.max_pool(b.relu(x), (1, 1, 2)), 2, (2, 1, 1))))


FAMILIES = {
    "chain": (chain, range(12)),
    "branches": (branches, range(8)),
    "residual": (residual, range(5)),
    "unet": (unet, range(8)),
    "valid_unet": (valid_unet, range(2)),
    "strided": (strided, range(2)),
    "finer": (finer, range(1)),
    "flat": (flat, range(1)),
    "even": (even, range(1)),
}
ALL = [(family, seed) for family, (_, seeds) in FAMILIES.items() for seed in seeds]
HALF = [  # of every family, unless all are asked for
    pytest.param(family, seed, marks=[] if seed % 2 == 0 else [pytest.mark.thorough])
    for family, seed in ALL
]


def graph(family: str, seed: int) -> Network:
    """One of the random graphs."""
    make, _ = FAMILIES[family]
    return make(1000 + seed)
