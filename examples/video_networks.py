"""The five networks for video that Jiang et al. (TACO 2023) measure, with seeded weights.

Axes (z, y, x) stand for (time, y, x); every network takes one clip of three colours and gives a
number per class, without the softmax. Dropout is left out, as in evaluation. The command counts
parameters and multiply-adds for one clip and prints them beside those published.

    python examples/video_networks.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from znni_dask import Builder, Network
from znni_dask.geometry import Size, text
from znni_dask.network.field_of_view import sizes_of

COLOURS = 3
STAGES = (64, 128, 256, 512)  # widths of a residual network
DEPTHS = (3, 4, 6, 3)  # blocks of each stage, of 34 layers and of 50 alike
EXPANSION = 4  # of the bottleneck's last convolution
IN_PLANE: Size = (1, 2, 2)
IN_TIME: Size = (2, 1, 1)

Block = Callable[[Builder, str, int, int], str]


def c3d(classes: int = 487, seed: int = 0) -> Network:
    """C3D (Tran et al. 2015). The last pooling rounds up, as in Caffe: 7 × 7 become 4 × 4.

    PyTorch's ports of it pad that pooling by one instead, which looks at other windows.
    """
    b = Builder(COLOURS, seed)
    x = _vgg_tower(b)
    x = b.max_pool(x, 2, ceil=True)
    return _fully_connected(b, x, (1, 4, 4), classes)


def vgg11(classes: int = 400, seed: int = 0) -> Network:
    """VGG-A (Simonyan and Zisserman 2014) with kernels of 3³, of which no paper says how it ends.

    Here the first pooling leaves time as it is, the last one leaves y and x, so that VGG's
    512 × 7 × 7 remain of 16 frames of 112².
    """
    b = Builder(COLOURS, seed)
    x = b.max_pool(_vgg_tower(b), IN_TIME)
    return _fully_connected(b, x, (1, 7, 7), classes)


def resnet34(classes: int = 400, seed: int = 0) -> Network:
    """3D-ResNet-34 (Hara et al. 2018) with max-pooling and convolutions as shortcuts (type B)."""
    return _resnet(_basic, classes, seed)


def resnet50(classes: int = 400, seed: int = 0) -> Network:
    """3D-ResNet-50 (Hara et al. 2018), the same with bottlenecks, whose 3³ carry the stride."""
    return _resnet(_bottleneck, classes, seed)


def p3d63(classes: int = 400, seed: int = 0) -> Network:
    """P3D (Qiu et al. 2017) as deep as ResNet-50, a depth that only others' ports of it have.

    Blocks are those of the authors' own files: S is 1 × 3 × 3, T is 3 × 1 × 1; type A is T after
    S, B is S + T, C is S + T after S, and the sum is rectified, T before it is not (ports do).
    Type C's weights of one half are part of the convolution that follows. The first pooling
    rounds up, as in Caffe, where ports pad it by one. The last stage, which is 2D, is one of
    kernels of one frame.
    """
    b = Builder(COLOURS, seed)
    x = b.relu(_conv(b, b.input, 64, (1, 7, 7), IN_PLANE, (0, 3, 3)))
    x = b.max_pool(x, (2, 3, 3), 2, ceil=True)
    count = 0
    for stage, (width, depth) in enumerate(zip(STAGES, DEPTHS, strict=True)):
        last = stage == len(STAGES) - 1
        for block in range(depth):
            stride = IN_PLANE if stage and not block else (1, 1, 1)
            x = _pseudo_3d(b, x, width, stride, "S" if last else "ABC"[count % 3])
            count += 1
        if not last:
            x = b.max_pool(x, IN_TIME)
    return b.network(b.linear(b.reduce(x, "mean"), classes, 1))


class Published(NamedTuple):
    """A network and what is published of it: its clip (t, y, x), millions of parameters, and
    thousands of millions of multiply-adds for one clip."""

    build: Callable[[], Network]
    size: Size
    parameters: float
    gmacs: float


NETWORKS = {
    "c3d": Published(c3d, (16, 112, 112), 79.991, 38.549),
    "resnet34": Published(resnet34, (16, 112, 112), 63.719, 12.696),
    "resnet50": Published(resnet50, (16, 112, 112), 47.019, 10.069),
    "vgg11": Published(vgg11, (16, 112, 112), 148.841, 38.618),
    "p3d63": Published(p3d63, (16, 160, 160), 25.745, 8.442),
}


def multiply_adds(network: Network, size: Size) -> int:
    """Multiply-adds of convolutions and matrices for one input of ``size``."""
    lengths = [sizes_of(network, axis, n) for axis, n in enumerate(size)]
    z, y, x = (found or {} for found in lengths)
    if not (z and y and x):
        raise ValueError(f"the network does not take an input of {text(size)}")
    return int(sum(n.layer.multiply_adds() * z[n.name] * y[n.name] * x[n.name] for n in network))


def main() -> None:
    head = f"{'network':10}{'input':>14}{'layers':>8}{'parameters':>14}{'published':>11}"
    print(f"{head}{'GMACs':>9}{'published':>11}")
    for name, (build, size, parameters, gmacs) in NETWORKS.items():
        network = build()
        layers = len(network.nodes) - 1
        counted = f"{network.parameters / 1e6:12.3f} M{parameters:9.3f} M"
        work = multiply_adds(network, size) / 1e9
        print(f"{name:10}{text(size):>14}{layers:8}{counted}{work:9.3f}{gmacs:11.3f}")


def _vgg_tower(b: Builder) -> str:
    """The convolutions that C3D and VGG-A have in common, with all poolings but the last."""
    x = b.input
    for stage, widths in enumerate(((64,), (128,), (256, 256), (512, 512), (512, 512))):
        if stage:
            x = b.max_pool(x, IN_PLANE if stage == 1 else 2)
        for width in widths:
            x = b.relu(b.conv(x, width, 3, padding=1))
    return x


def _fully_connected(b: Builder, x: str, size: Size, classes: int) -> Network:
    for width, extent in ((4096, size), (4096, (1, 1, 1))):
        x = b.relu(b.linear(x, width, extent))
    return b.network(b.linear(x, classes, 1))


def _resnet(block: Block, classes: int, seed: int) -> Network:
    b = Builder(COLOURS, seed)
    x = b.relu(_conv(b, b.input, 64, (7, 7, 7), IN_PLANE, (3, 3, 3)))
    x = b.max_pool(x, 3, stride=2, padding=1)
    for stage, (width, depth) in enumerate(zip(STAGES, DEPTHS, strict=True)):
        for index in range(depth):
            x = block(b, x, width, 2 if stage and not index else 1)
    return b.network(b.linear(b.reduce(x, "mean"), classes, 1))


def _basic(b: Builder, x: str, width: int, stride: int) -> str:
    y = b.relu(_conv(b, x, width, 3, stride, 1))
    y = _conv(b, y, width, 3, 1, 1)
    return _joined(b, x, y, stride)


def _bottleneck(b: Builder, x: str, width: int, stride: int) -> str:
    y = b.relu(_conv(b, x, width, 1))
    y = b.relu(_conv(b, y, width, 3, stride, 1))
    y = _conv(b, y, EXPANSION * width, 1)
    return _joined(b, x, y, stride)


def _pseudo_3d(b: Builder, x: str, width: int, stride: Size, kind: str) -> str:
    """A bottleneck whose middle is S and T; the 1³ before them carries the stride."""

    def in_plane(y: str) -> str:
        return b.relu(_conv(b, y, width, (1, 3, 3), 1, (0, 1, 1)))

    def in_time(y: str) -> str:
        return _conv(b, y, width, (3, 1, 1), 1, (1, 0, 0))

    y = b.relu(_conv(b, x, width, 1, stride))
    s = in_plane(y)
    match kind:
        case "A":
            y = b.relu(in_time(s))
        case "B":
            y = b.relu(b.plus(s, in_time(y)))
        case "C":
            y = b.relu(b.plus(s, in_time(s)))
        case _:
            y = s
    y = _conv(b, y, EXPANSION * width, 1)
    return _joined(b, x, y, stride)


def _joined(b: Builder, x: str, y: str, stride: int | Size) -> str:
    """A block's output and its input, which a 1³ convolution fits to it where they differ."""
    if b.channels(x) != b.channels(y) or stride not in (1, (1, 1, 1)):
        x = _conv(b, x, b.channels(y), 1, stride)
    return b.relu(b.plus(x, y))


def _conv(
    b: Builder,
    x: str,
    channels: int,
    kernel: int | Size,
    stride: int | Size = 1,
    padding: int | Size = 0,
) -> str:
    """A convolution without bias, normalised."""
    x = b.conv(x, channels, kernel, stride=stride, padding=padding, bias=False)
    return b.batch_norm(x)


if __name__ == "__main__":
    main()
