"""The zoo: small networks of every family that people bring, from PyTorch and MONAI.

Every network is tiny, seeded and in evaluation mode, with batch statistics that are not the
default. ``ENTRIES`` is the table; `Entry.export` writes a network as ONNX.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.networks import blocks, nets
from monai.networks.nets import vnet
from torch import nn
from torch.nn import functional

TORCHSCRIPT, DYNAMO = "torchscript", "dynamo"


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    ``size`` is what it is exported at, ``step`` what sizes must be multiples of, for all axes or
    for each. ``breaks`` are the operators, as patterns, that keep a network from being local and
    that its refusal must name; none where it is local. ``refused``: it cannot be computed at all,
    patchwise neither. ``window``: it takes its own size only, as a classifier of windows does.
    ``sized``: it reckons with the sizes of arrays, so that they stand in its graph.
    ``exporters`` can write it, those in ``no_dynamic`` not with its sizes left open; with
    ``named`` false they find out themselves what sizes it takes.
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...] = (16, 20, 24)
    step: int | tuple[int, ...] = 1
    channels: int = 1
    breaks: tuple[str, ...] = ()
    refused: bool = False
    window: bool = False
    sized: bool = False
    exporters: tuple[str, ...] = (TORCHSCRIPT, DYNAMO)
    no_dynamic: tuple[str, ...] = ()
    named: bool = True
    outputs: tuple[str, ...] = ("y",)

    @property
    def rank(self) -> int:
        """Spatial axes, 2 or 3."""
        return len(self.size)

    @property
    def steps(self) -> tuple[int, ...]:
        """``step`` for every axis."""
        return (self.step,) * self.rank if isinstance(self.step, int) else self.step

    @property
    def local(self) -> bool:
        """Whether every output depends on a bounded field of view alone."""
        return not self.breaks

    def make(self) -> nn.Module:
        """The network, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, self.name)))
            network = self.build()
            with torch.no_grad():
                _randomise(network)
                _run_in(network, (2, self.channels, *self.size))
        return network.eval()

    def sample(self, size: tuple[int, ...] | None = None) -> torch.Tensor:
        """A seeded volume, (1, c, ...)."""
        generator = torch.Generator().manual_seed(7)
        return torch.randn(1, self.channels, *(size or self.size), generator=generator)

    @property
    def ways(self) -> list[tuple[str, bool]]:
        """Exporters and whether sizes are left open: all that PyTorch can do with it."""
        closed = self.exporters if self.window else self.no_dynamic
        ways = [(exporter, dynamic) for exporter in self.exporters for dynamic in (False, True)]
        return [way for way in ways if not (way[1] and way[0] in closed)]

    def export(self, path: Path, exporter: str, dynamic: bool, opset: int | None = None) -> Path:
        """Write the network as ONNX, its sizes left open with ``dynamic``."""
        options: dict[str, object] = {}
        if dynamic and exporter == TORCHSCRIPT:
            options["dynamic_axes"] = {"volume": dict(enumerate(self._axes, 2))}
        elif dynamic:
            options["dynamic_shapes"] = (dict(enumerate(self._dimensions(), 2)),)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self.make(),
                (self.sample(),),
                path,
                input_names=["volume"],
                output_names=list(self.outputs),
                dynamo=exporter == DYNAMO,
                opset_version=opset,
                verbose=False,
                **options,
            )
        return path

    @property
    def _axes(self) -> tuple[str, ...]:
        return ("z", "y", "x")[-self.rank :]

    def _dimensions(self) -> list[object]:
        """Sizes as `torch.export` wants them declared."""
        if not self.named:
            return [torch.export.Dim.DYNAMIC] * self.rank
        dims = [torch.export.Dim(name, min=2) for name in self._axes]
        return [step * dim if step > 1 else dim for step, dim in zip(self.steps, dims, strict=True)]


def _randomise(network: nn.Module) -> None:
    """Weights of a scale that deep networks keep; normalisations and slopes not the default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (1.5 / fan_in) ** 0.5)
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(0.05, 0.6)
        elif (
            isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim == 1
        ):
            weight.uniform_(0.6, 1.4)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.normal_(0, 0.2)


def _run_in(network: nn.Module, shape: tuple[int, ...]) -> None:
    """Let batch statistics see a few shifted volumes."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        return
    network.train()
    for _ in range(4):
        network(torch.randn(shape) * 1.5 + 0.3)


# Pieces


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


class Branches(nn.Module):
    """Several modules side by side over the same input, concatenated."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Around(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


def conv(fan_in, fan_out, kernel=3, rank=3, **options):
    return (nn.Conv3d if rank == 3 else nn.Conv2d)(fan_in, fan_out, kernel, **options)


def norm(channels, rank=3, **options):
    return (nn.BatchNorm3d if rank == 3 else nn.BatchNorm2d)(channels, **options)


def same(fan_in, fan_out, kernel=3, rank=3, **options):
    return conv(fan_in, fan_out, kernel, rank, padding=kernel // 2, **options)


def block(fan_in, fan_out, rank=3):
    return nn.Sequential(
        same(fan_in, fan_out, rank=rank, bias=False), norm(fan_out, rank), nn.ReLU()
    )


def seq(*modules):
    return nn.Sequential(*(m if isinstance(m, nn.Module) else Lambda(m) for m in modules))


def centre(x, like):
    """The middle of x, as large as another array: the original U-Net's crop."""
    starts = [(a - b) // 2 for a, b in zip(x.shape[2:], like.shape[2:], strict=True)]
    for axis, (start, array) in enumerate(zip(starts, like.shape[2:], strict=True), 2):
        x = x.narrow(axis, start, array)
    return x


def centre_by_slices(x, like):
    """The same, as most people write it."""
    z, y, x_ = ((a - b) // 2 for a, b in zip(x.shape[2:], like.shape[2:], strict=True))
    d, h, w = like.shape[2:]
    return x[:, :, z : z + d, y : y + h, x_ : x_ + w]


def pad_to(x, like):
    """x padded to the size of its skip: what implementations for any size do."""
    pads = []
    for axis in range(x.ndim - 1, 1, -1):
        missing = like.shape[axis] - x.shape[axis]
        pads += [missing // 2, missing - missing // 2]
    return functional.pad(x, pads)


def cut_to(x, like):
    """x without what it has more than its skip: the other way to take any size."""
    return x[:, :, : like.shape[2], : like.shape[3], : like.shape[4]]


class UNet(nn.Module):
    """A U-Net. ``up(fan_in, fan_out, rank)`` makes what up-samples; it is called with the skip
    as well where ``sees_skip``. ``join`` crops the skip to what comes from below, ``fit`` makes
    what comes from below as large as the skip."""

    def __init__(
        self, up, *, poolings=2, rank=3, width=4, valid=False, join=None, fit=None, **options
    ):
        super().__init__()
        self.sees_skip, self.join, self.fit = options.pop("sees_skip", False), join, fit
        self.pool = options.pop("pool", (nn.MaxPool3d if rank == 3 else nn.MaxPool2d)(2))
        self.gates = options.pop("gates", None)
        widths = [width + 2 * level for level in range(poolings + 1)]
        stage = self.valid if valid else block
        self.down = nn.ModuleList(
            stage(widths[level - 1] if level else 1, widths[level], rank)
            for level in range(poolings + 1)
        )
        self.up = nn.ModuleList(
            up(widths[level + 1], widths[level], rank) for level in range(poolings)
        )
        self.merge = nn.ModuleList(stage(2 * w, w, rank) for w in widths[:-1])
        self.head = conv(width, 2, 1, rank)

    @staticmethod
    def valid(fan_in, fan_out, rank):
        return seq(conv(fan_in, fan_out, 3, rank), nn.ReLU())

    def forward(self, x):
        skips = []
        for level, down in enumerate(self.down):
            x = down(self.pool(x) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            skip = skips[level]
            x = self.up[level](x, skip) if self.sees_skip else self.up[level](x)
            if self.gates is not None:
                skip = self.gates[level](skip, x)
            if self.fit:
                x = self.fit(x, skip)
            if self.join:
                skip = self.join(skip, x)
            x = self.merge[level](torch.cat([skip, x], 1))
        return self.head(x)


def transposed(fan_in, fan_out, rank=3):
    return (nn.ConvTranspose3d if rank == 3 else nn.ConvTranspose2d)(fan_in, fan_out, 2, 2)


def upsampled(mode, **options):
    def make(fan_in, fan_out, rank=3):
        return seq(
            nn.Upsample(scale_factor=2, mode=mode, **options), conv(fan_in, fan_out, 1, rank)
        )

    return make


class ToSkip(nn.Module):
    """Interpolate to the size of the skip."""

    def __init__(self, fan_in, fan_out, rank, **options):
        super().__init__()
        self.options, self.conv = options, conv(fan_in, fan_out, 1, rank)

    def forward(self, x, skip):
        return self.conv(functional.interpolate(x, size=skip.shape[2:], **self.options))


def to_skip(**options):
    return lambda fan_in, fan_out, rank=3: ToSkip(fan_in, fan_out, rank, **options)


def interpolated(**options):
    def make(fan_in, fan_out, rank=3):
        up = Lambda(lambda x: functional.interpolate(x, scale_factor=2, **options))
        return nn.Sequential(conv(fan_in, fan_out, 1, rank), up)

    return make


# Sliding windows, without padding


def valid_pools():
    return nn.Sequential(
        *(conv(1, 6, (2, 3, 3)), nn.ReLU(), nn.MaxPool3d((1, 2, 2))),
        *(conv(6, 8, 3), nn.Tanh(), nn.MaxPool3d(2)),
        conv(8, 2, (1, 3, 3)),
    )


def valid_average():
    return nn.Sequential(
        *(conv(1, 6, 3), nn.ReLU(), nn.AvgPool3d(2)),
        *(conv(6, 6, 3), nn.ReLU(), nn.AvgPool3d((3, 2, 2), stride=(1, 2, 2))),
        conv(6, 2, (1, 2, 2)),
    )


def valid_strided():
    return nn.Sequential(
        *(conv(1, 6, (1, 5, 5), stride=(1, 2, 2)), norm(6), nn.ReLU()),
        *(conv(6, 8, 3, stride=2, bias=False), norm(8), nn.ReLU()),
        conv(8, 2, 2),
    )


def valid_dilated():
    layers = [conv(1, 4, 3), nn.ReLU()]
    for dilation in (2, 4):
        layers += [conv(4, 4, 3, dilation=(1, dilation, dilation)), nn.ReLU()]
    return nn.Sequential(*layers, conv(4, 2, 1))


def valid_overlapping_pools():
    return nn.Sequential(
        *(conv(1, 4, 3), nn.ReLU(), nn.MaxPool3d(3, stride=2)),
        *(conv(4, 4, 2), nn.ReLU(), nn.MaxPool3d(2, stride=1, dilation=2)),
        conv(4, 2, 1),
    )


def valid_2d():
    return nn.Sequential(
        *(conv(1, 6, 4, 2), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv(6, 6, 3, 2), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv(6, 8, 3, 2), nn.ReLU(), conv(8, 2, 1, 2), nn.Softmax(1)),
    )


class ValidResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(1, 4), conv(4, 4), conv(4, 4, (1, 3, 3))
        self.head = conv(4, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.one(x).relu() + x[:, :, 1:-1, 1:-1, 1:-1]
        y = self.two(x)
        return self.head(y.relu() + centre_by_slices(x, y))


class ValidInception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = seq(conv(1, 4), nn.ReLU(), nn.MaxPool3d((1, 2, 2)))
        self.branches = nn.ModuleList([conv(4, 3, k) for k in (1, 3, 5)])
        self.pool = nn.MaxPool3d(3, stride=1)
        self.head = conv(13, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        parts = [branch(x) for branch in self.branches]
        small = parts[-1]
        parts = [centre(p, small) for p in [*parts, self.pool(x)]]
        return self.head(torch.cat(parts, 1).relu())


def valid_classifier():
    """A classifier of windows of 12 x 20 x 20 voxels."""
    return nn.Sequential(
        *(conv(1, 4, (3, 5, 5)), nn.ReLU(), nn.MaxPool3d(2)),
        *(conv(4, 6, 3), nn.ReLU(), nn.MaxPool3d((1, 2, 2))),
        *(nn.Flatten(), nn.Linear(6 * 3 * 3 * 3, 10), nn.ReLU(), nn.Dropout()),
        nn.Linear(10, 3),
    )


class ViewClassifier(nn.Module):
    """The same with x.view(x.size(0), -1)."""

    def __init__(self):
        super().__init__()
        self.features = seq(conv(1, 4, 3), nn.ReLU(), nn.MaxPool3d(2), conv(4, 4), nn.ReLU())
        self.one, self.two = nn.Linear(4 * 2 * 3 * 3, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return functional.softmax(self.two(self.one(x).relu()), dim=1)


def valid_pooled_classifier():
    """Averages over all that is left of a window."""
    return nn.Sequential(
        *(conv(1, 4, 3), nn.ReLU(), nn.MaxPool3d(2), conv(4, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def valid_classifier_2d():
    return nn.Sequential(
        *(conv(1, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv(4, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, 3)),
    )


# U-Nets and their kin


class Residual(nn.Module):
    """A residual block; ``stride`` > 1 makes its shortcut a convolution."""

    def __init__(self, fan_in, fan_out, stride=1):
        super().__init__()
        self.inner = seq(
            *(same(fan_in, fan_out, stride=stride, bias=False), norm(fan_out), nn.ReLU(True)),
            *(same(fan_out, fan_out, bias=False), norm(fan_out)),
        )
        self.short = (
            nn.Identity()
            if stride == 1 and fan_in == fan_out
            else seq(conv(fan_in, fan_out, 1, stride=stride, bias=False), norm(fan_out))
        )

    def forward(self, x):
        return functional.relu(self.inner(x) + self.short(x), inplace=True)


class ResidualUNet(nn.Module):
    """Strided residual blocks down, sums instead of concats on the way up."""

    def __init__(self):
        super().__init__()
        self.stem = conv(1, 4, (1, 5, 5), padding=(0, 2, 2))
        self.one, self.two = Residual(4, 4), Residual(4, 6, stride=2)
        self.up, self.last = nn.ConvTranspose3d(6, 4, 2, 2), Residual(4, 4)
        self.head = conv(4, 2, 1)

    def forward(self, x):
        x = self.one(self.stem(x))
        x = x + self.up(self.two(x))
        return torch.sigmoid(self.head(self.last(x)))


class DenseNet(nn.Module):
    def __init__(self, valid=False):
        super().__init__()
        self.valid = valid
        self.stages = nn.ModuleList(
            seq(norm(c), nn.ReLU(), conv(c, 3, 3, padding=0 if valid else 1)) for c in (1, 4, 7)
        )
        self.head = conv(10, 2, 1)

    def forward(self, x):
        for stage in self.stages:
            y = stage(x)
            x = torch.cat([centre(x, y) if self.valid else x, y], 1)
        return self.head(x)


class GlobalContext(nn.Module):
    """The image pooling of ASPP: mean of everything, spread again."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, 3, 1)

    def forward(self, x):
        y = self.conv(functional.adaptive_avg_pool3d(x, 1)).relu()
        return functional.interpolate(y, size=x.shape[2:], mode="nearest")


def aspp(*extra):
    branches = [seq(same(4, 3, 1), nn.ReLU())]
    branches += [
        seq(conv(4, 3, 3, padding=d, dilation=d, bias=False), norm(3), nn.ReLU()) for d in (1, 2, 4)
    ]
    return seq(block(1, 4), Branches(*branches, *extra), conv(12 + 3 * len(extra), 2, 1))


class AttentionGate(nn.Module):
    def __init__(self, channels, rank=3):
        super().__init__()
        self.gate, self.skip = (seq(conv(channels, 3, 1), norm(3)) for _ in range(2))
        self.psi = seq(conv(3, 1, 1), norm(1), nn.Sigmoid())

    def forward(self, skip, gate):
        return skip * self.psi(functional.relu(self.gate(gate) + self.skip(skip)))


def attention_unet():
    return UNet(transposed, gates=nn.ModuleList([AttentionGate(4), AttentionGate(6)]))


class LinkNet(nn.Module):
    """Encoder and decoder of strided and transposed convolutions; skips are added."""

    def __init__(self):
        super().__init__()
        self.stem = seq(conv(1, 4, 4, stride=2, padding=1), nn.ReLU())
        self.down = seq(conv(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose3d(6, 4, 3, 2, padding=1, output_padding=1)
        self.last = nn.ConvTranspose3d(4, 2, 4, 2, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(functional.relu(x + self.up(self.down(x))))


def transposed_kernels():
    """Kernels of 3 and 4, odd strides, an anisotropic one, groups."""
    return nn.Sequential(
        *(conv(1, 4, 3, stride=(1, 2, 3), padding=1), nn.ELU()),
        nn.ConvTranspose3d(4, 4, (3, 4, 3), stride=(1, 2, 3), padding=(1, 1, 0), groups=2),
        *(nn.ELU(), nn.ConvTranspose3d(4, 4, 3, padding=1, dilation=1), nn.ELU(), conv(4, 2, 1)),
    )


def shuffle(x, groups=2):
    n, c, *size = x.shape
    return x.view(n, groups, c // groups, *size).transpose(1, 2).reshape(n, c, *size)


def mobile():
    """Separable, depthwise and grouped convolutions with a channel shuffle."""
    return seq(
        *(same(1, 4), norm(4), nn.ReLU6(), same(4, 4, groups=4, bias=False), norm(4), nn.ReLU6()),
        *(
            conv(4, 8, 1),
            norm(8),
            nn.ReLU6(),
            same(8, 8, groups=2),
            Lambda(shuffle),
            nn.Hardswish(),
        ),
        Around(conv(8, 16, 1), norm(16), nn.ReLU6(), same(16, 16, groups=16), conv(16, 8, 1)),
        *(same(8, 8, 5, groups=8), conv(8, 4, 1, groups=4), conv(4, 2, 1)),
    )


def pixel_shuffle_3d(x, r=2):
    n, c, d, h, w = x.shape
    x = x.view(n, c // r**3, r, r, r, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(n, c // r**3, d * r, h * r, w * r)


def space_to_depth_3d(x, r=2):
    n, c, d, h, w = x.shape
    x = x.reshape(n, c, d // r, r, h // r, r, w // r, r).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(n, c * r**3, d // r, h // r, w // r)


def sub_pixel():
    return seq(
        *(same(1, 4, stride=2), nn.ReLU(), same(4, 16), Lambda(pixel_shuffle_3d)),
        *(nn.ReLU(), same(2, 2)),
    )


def space_to_depth():
    return seq(space_to_depth_3d, same(8, 4), nn.ReLU(), same(4, 8, 1), pixel_shuffle_3d)


def sub_pixel_2d():
    return seq(
        *(same(1, 3, rank=2), nn.PixelUnshuffle(2), same(12, 8, rank=2), nn.ReLU()),
        *(nn.PixelShuffle(2), conv(2, 2, 1, 2)),
    )


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, linear=True):
        super().__init__()
        self.pool, self.linear = nn.AdaptiveAvgPool3d(1), linear
        self.inner = (
            seq(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid())
            if linear
            else seq(conv(channels, 2, 1), nn.ReLU(), conv(2, channels, 1), nn.Hardsigmoid())
        )

    def forward(self, x):
        if not self.linear:
            return x * self.inner(self.pool(x))
        n, c = x.shape[:2]
        return x * self.inner(self.pool(x).view(n, c)).view(n, c, 1, 1, 1)


class ChannelAttention(nn.Module):
    """CBAM's first half: mean and maximum over all voxels."""

    def __init__(self, channels):
        super().__init__()
        self.inner = seq(conv(channels, 2, 1, bias=False), nn.ReLU(), conv(2, channels, 1))

    def forward(self, x):
        mean = functional.adaptive_avg_pool3d(x, 1)
        top = functional.adaptive_max_pool3d(x, 1)
        return x * torch.sigmoid(self.inner(mean) + self.inner(top))


class SpatialAttention(nn.Module):
    """CBAM's second half: mean and maximum over channels."""

    def __init__(self):
        super().__init__()
        self.conv = same(2, 1, 5, bias=False)

    def forward(self, x):
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(both))


class FeaturePyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([block(1, 4), block(4, 6), block(6, 8)])
        self.lateral = nn.ModuleList([conv(c, 4, 1) for c in (4, 6, 8)])
        self.head = same(4, 2)

    def forward(self, x):
        found = []
        for stage in self.stages:
            x = stage(functional.avg_pool3d(x, 2) if found else x)
            found.append(x)
        x = self.lateral[2](found[2])
        for level in (1, 0):
            up = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.lateral[level](found[level]) + up
        return self.head(x)


class HighResolution(nn.Module):
    """Two resolutions side by side that are exchanged, as in HRNet."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = block(1, 4), block(4, 6)
        self.down, self.up = conv(4, 6, 3, stride=2, padding=1), conv(6, 4, 1)
        self.two_fine, self.two_coarse = block(4, 4), block(6, 6)
        self.head = conv(10, 2, 1)

    def forward(self, x):
        fine = self.fine(x)
        coarse = self.coarse(functional.max_pool3d(fine, 3, stride=2, padding=1))
        up = {"scale_factor": 2, "mode": "trilinear", "align_corners": False}
        fine, coarse = (
            self.two_fine(fine + functional.interpolate(self.up(coarse), **up)),
            self.two_coarse(coarse + self.down(fine)),
        )
        return self.head(torch.cat([fine, functional.interpolate(coarse, **up)], 1))


class ImagePyramid(nn.Module):
    """The volume itself at two resolutions, as a second input to the coarse level."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = block(1, 4), block(6, 6)
        self.up, self.head = transposed(6, 4), conv(8, 2, 1)

    def forward(self, x):
        fine = self.fine(x)
        half = [
            functional.interpolate(x, scale_factor=0.5, mode="nearest"),
            functional.interpolate(x, scale_factor=0.5, mode="trilinear", align_corners=False),
        ]
        coarse = self.coarse(torch.cat([functional.max_pool3d(fine, 2), *half], 1))
        return self.head(torch.cat([fine, self.up(coarse)], 1))


class DeepLab(nn.Module):
    """Dilated convolutions at a quarter of the resolution, spread back to the input's size."""

    def __init__(self):
        super().__init__()
        self.stem = seq(same(1, 4, 3, 2, stride=2), norm(4, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.context = seq(conv(4, 4, 3, 2, padding=2, dilation=2), nn.ReLU(), conv(4, 2, 1, 2))

    def forward(self, x):
        y = self.context(self.stem(x))
        return functional.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


# Single operators


def activations(*functions, rank=3):
    """Each over a convolution of its own, so that each stands alone in the output."""
    return Branches(*(seq(same(1, 2, rank=rank), function) for function in functions))


class ChannelsLast(nn.Module):
    """A module that wants channels last, between two permutations."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def layer_norm(channels):
    return ChannelsLast(nn.LayerNorm(channels, eps=1e-6))


class LayerNormFirst(nn.Module):
    """The same by hand with channels first."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None, None] * x + self.bias[:, None, None, None]


class ConvNeXt(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.deep, self.norm = same(channels, channels, 5, groups=channels), nn.LayerNorm(channels)
        self.one, self.two = nn.Linear(channels, 8), nn.Linear(8, channels)
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 4, 1))
        y = self.gamma * self.two(functional.gelu(self.one(y)))
        return x + y.permute(0, 4, 1, 2, 3)


class LinearHead(nn.Module):
    """A multi-layer perceptron at every voxel."""

    def __init__(self):
        super().__init__()
        self.stem = same(1, 4)
        self.head = seq(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x):
        return torch.movedim(self.head(torch.movedim(self.stem(x), 1, 4)), 4, 1)


class Pieces(nn.Module):
    """Channels in pieces: chunk, split, slices, an index, stack and flip."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = same(2, 8), same(12, 2, 1)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        c, d, e = torch.split(a, [1, 1, 2], 1)
        f = b[:, ::2] * e
        g = torch.stack([c, d], 1).flatten(1, 2)
        return self.head(torch.cat([f, g, b[:, 1:3], b[:, -1:], x[:, 0:1], a.flip(1)], 1))


class Arithmetic(nn.Module):
    """All that can be written between two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = same(1, 4), same(1, 4), conv(11, 2, 1)
        self.register_buffer("shift", torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1))

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        c = 1.0 - torch.exp(-a.abs()) / (2.0 + b.pow(2))
        d = torch.minimum(a, b) * torch.maximum(c, -a) + 0.5
        e = torch.sqrt(a * a + 1e-3) - torch.log1p(b.abs()) + torch.log(2 + b**2)
        f = torch.where(a > b, c, d) * (b >= 0.1).float() + 3 / (1 + e.square())
        g = (d - self.shift).clamp(-1.5, 1.5) + torch.sin(a) * torch.cos(b).neg() + a.sign() * 0.1
        h = torch.cat([f, g + (a.mean(1, keepdim=True) - b.sum(1, keepdim=True) / 4)], 1)
        norms = [
            h.norm(dim=1, keepdim=True),
            h.amax(1, True) - h.amin(1, True),
            h.var(1, keepdim=True),
        ]
        return self.head(torch.cat([h, *norms], 1))


class Standardised(nn.Conv3d):
    """A convolution whose weights are standardised in every call."""

    def forward(self, x):
        w = self.weight
        w = w - w.mean(dim=(1, 2, 3, 4), keepdim=True)
        w = w / (w.flatten(1).std(1).view(-1, 1, 1, 1, 1) + 1e-5)
        return functional.conv3d(x, w * 0.2, self.bias, self.stride, self.padding)


class Coordinates(nn.Module):
    """CoordConv: every voxel is told where it stands."""

    def __init__(self):
        super().__init__()
        self.conv = same(4, 2)

    def forward(self, x):
        axes = [torch.linspace(-1, 1, size) for size in x.shape[2:]]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        return self.conv(torch.cat([x, grid], 1))


class SelfAttention(nn.Module):
    """Every voxel looks at all others: a non-local block."""

    def __init__(self):
        super().__init__()
        self.stem = seq(conv(1, 4, 4, stride=4), nn.ReLU())
        self.qkv, self.up = conv(4, 12, 1), nn.ConvTranspose3d(4, 2, 4, 4)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / 2.0, -1)
        return self.up(x + (v @ weights.transpose(1, 2)).view_as(x))


class Shared(nn.Module):
    """One convolution applied several times, as recurrent nets do."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.head = same(1, 4), same(4, 4), conv(4, 2, 1)

    def forward(self, x):
        x = start = self.stem(x)
        for _ in range(3):
            x = torch.tanh(self.again(x)) + start
        return self.head(x)


class ScaledInput(nn.Module):
    """The training's normalisation of intensities within the network."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, -0.2]).view(1, 2, 1, 1, 1))
        self.register_buffer("deviation", torch.tensor([1.5, 0.7]).view(1, 2, 1, 1, 1))
        self.net = seq(same(2, 4), nn.ReLU(), nn.Dropout3d(), same(4, 2))

    def forward(self, x):
        x = (x - self.mean) / self.deviation
        return self.net(x.clamp(min=-2.0)) * 0.5 + x


class DeepSupervision(nn.Module):
    """Three outputs, each coarser by two than the one before."""

    def __init__(self):
        super().__init__()
        self.net = UNet(transposed)
        self.heads = nn.ModuleList([conv(c, 2, 1) for c in (4, 6, 8)])

    def forward(self, x):
        found = []
        for level, down in enumerate(self.net.down):
            x = down(self.net.pool(x) if level else x)
            found.append(x)
        outputs = [self.heads[2](x)]
        for level in (1, 0):
            x = self.net.merge[level](torch.cat([found[level], self.net.up[level](x)], 1))
            outputs.append(self.heads[level](x))
        return tuple(reversed(outputs))


class TwoHeads(nn.Module):
    """Probabilities and vectors from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = UNet(transposed, poolings=1)
        self.one, self.two = seq(same(2, 3), nn.Softmax(1)), seq(nn.ReLU(), conv(2, 3, (1, 3, 3)))

    def forward(self, x):
        x = self.trunk(x)
        return self.one(x), self.two(x)


def normalised(make):
    """A network of two convolutions with a normalisation of 4 channels between them."""
    return seq(same(1, 4), make, nn.ReLU(), same(4, 2))


class Style(nn.Module):
    """The mean of everything as a vector that steers the decoder, as in Cellpose."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.full = same(1, 4, rank=2), same(4, 2, rank=2), nn.Linear(4, 4)

    def forward(self, x):
        x = functional.relu(self.one(x))
        style = functional.avg_pool2d(x, kernel_size=(x.shape[-2], x.shape[-1])).flatten(1)
        style = style / torch.sum(style**2, dim=1, keepdim=True) ** 0.5
        return self.two(x + self.full(style).unsqueeze(-1).unsqueeze(-1))


class InstanceStatistics(nn.Module):
    """Normalises a volume by its own mean and deviation, divided by n or by n - 1."""

    def __init__(self, unbiased):
        super().__init__()
        self.unbiased, self.conv = unbiased, same(1, 2)

    def forward(self, x):
        over = {"dim": (2, 3, 4), "keepdim": True}
        deviation = x.std(**over, unbiased=self.unbiased)
        return self.conv((x - x.mean(**over)) / (deviation + 1e-5))


class WholeLayerNorm(nn.Module):
    """nn.LayerNorm over channels and space."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = same(1, 4), nn.LayerNorm((4, 16, 20, 24)), same(4, 2)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).relu())


def padded_classifier():
    """A small 3D ResNet: one answer for a patch."""
    return nn.Sequential(
        *(conv(1, 4, 5, stride=2, padding=2, bias=False), norm(4), nn.ReLU()),
        *(nn.MaxPool3d(3, 2, 1), Residual(4, 4), Residual(4, 6, 2)),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def c3d():
    """Convolutions, poolings and fully connected layers over a padded patch."""
    return nn.Sequential(
        *(same(1, 4), nn.ReLU(), nn.MaxPool3d((1, 2, 2))),
        *(same(4, 6), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten()),
        *(nn.Linear(6 * 4 * 4 * 4, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


# MONAI


class VNet(nn.Module):
    """MONAI's V-Net of its own blocks, with one level instead of four."""

    def __init__(self):
        super().__init__()
        act = ("elu", {"inplace": True})
        self.stem = vnet.InputTransition(3, 1, 16, act=act)
        self.down = vnet.DownTransition(3, 16, 1, act=act)
        self.up = vnet.UpTransition(3, 32, 32, 1, act=act)
        self.head = vnet.OutputTransition(3, 32, 2, act=act)

    def forward(self, x):
        fine = self.stem(x)
        return self.head(self.up(self.down(fine), fine))


def monai_unet(**options):
    return nets.UNet(3, 1, 2, channels=(4, 6, 8), strides=(2, 2), **options)


def dynunet(**options):
    return nets.DynUNet(
        *(3, 1, 2, ((1, 3, 3), 3, 3), (1, (1, 2, 2), 2), ((1, 2, 2), 2)),
        filters=(4, 6, 8),
        **options,
    )


def high_res_net():
    layers = [
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
        {"name": "res_2", "n_features": 6, "kernels": (3, 3), "repeat": 1},
        {"name": "conv_1", "n_features": 6, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    ]
    return nets.HighResNet(3, 1, 2, layer_params=layers)


FEATURES = (4, 4, 6, 6, 8, 4)
UNETPP = (4, 4, 4, 4, 4, 4)

INSTANCE = ("InstanceNormalization",)
GROUP = ("GroupNormalization",)
MEAN = ("GlobalAveragePool|mean",)

ENTRIES = [
    # sliding windows
    Entry("valid_pools", valid_pools, (16, 26, 30)),
    Entry("valid_average", valid_average, (16, 24, 26)),
    Entry("valid_strided", valid_strided, (16, 33, 29)),
    Entry("valid_dilated", valid_dilated, (12, 22, 26)),
    Entry("valid_overlapping_pools", valid_overlapping_pools, (16, 18, 24)),
    Entry("valid_2d", valid_2d, (37, 41)),
    Entry("valid_residual", ValidResidual, (12, 16, 18), sized=True),
    Entry("valid_inception", ValidInception, (12, 20, 24), sized=True),
    Entry("valid_dense_net", lambda: DenseNet(valid=True), (12, 16, 18), sized=True),
    Entry("valid_classifier", valid_classifier, (12, 20, 20), window=True),
    Entry("valid_view_classifier", ViewClassifier, (10, 12, 12), window=True),
    Entry("valid_pooled_classifier", valid_pooled_classifier, (12, 14, 16), window=True),
    Entry("valid_classifier_2d", valid_classifier_2d, (16, 20), window=True),
    # U-Nets
    Entry("unet_transposed", lambda: UNet(transposed), step=4),
    Entry("unet_nearest", lambda: UNet(upsampled("nearest")), step=4),
    Entry("unet_trilinear", lambda: UNet(upsampled("trilinear", align_corners=False)), step=4),
    Entry(
        "unet_trilinear_corners", lambda: UNet(upsampled("trilinear", align_corners=True)), step=4
    ),
    Entry("unet_interpolate", lambda: UNet(interpolated(mode="trilinear")), step=4),
    Entry(
        "unet_to_skip_nearest",
        lambda: UNet(to_skip(mode="nearest"), sees_skip=True),
        step=4,
        sized=True,
    ),
    Entry(
        "unet_to_skip_trilinear",
        lambda: UNet(to_skip(mode="trilinear"), sees_skip=True),
        step=4,
        sized=True,
    ),
    Entry(
        "unet_to_skip_corners",
        lambda: UNet(to_skip(mode="trilinear", align_corners=True), sees_skip=True, poolings=1),
        step=2,
        sized=True,
    ),
    Entry("unet_2d", lambda: UNet(transposed, poolings=3, rank=2), (24, 40), step=8),
    Entry(
        "unet_2d_bilinear",
        lambda: UNet(upsampled("bilinear", align_corners=False), rank=2),
        (24, 40),
        step=4,
    ),
    Entry(
        "unet_2d_to_skip",
        lambda: UNet(to_skip(mode="bilinear"), rank=2, sees_skip=True),
        (24, 40),
        step=4,
        sized=True,
    ),
    Entry(
        "unet_valid", lambda: UNet(transposed, valid=True, join=centre), (26, 30, 34), sized=True
    ),
    Entry(
        "unet_valid_slices",
        lambda: UNet(transposed, valid=True, join=centre_by_slices),
        (26, 30, 34),
        sized=True,
    ),
    Entry("unet_pad_to_skip", lambda: UNet(transposed, fit=pad_to), (16, 20, 24), sized=True),
    Entry("unet_pad_to_skip_odd", lambda: UNet(transposed, fit=pad_to), (18, 21, 27), sized=True),
    Entry(
        "unet_anisotropic",
        lambda: UNet(
            lambda i, o, _: nn.ConvTranspose3d(i, o, (1, 2, 2), (1, 2, 2)),
            pool=nn.MaxPool3d((1, 2, 2)),
        ),
        (9, 20, 24),
        step=(1, 4, 4),
    ),
    Entry(
        "unet_ceil",
        lambda: UNet(transposed, fit=cut_to, pool=nn.MaxPool3d(2, ceil_mode=True)),
        (17, 20, 23),
        sized=True,
    ),
    Entry("image_pyramid", ImagePyramid, step=4),
    Entry("deeplab_2d", DeepLab, (24, 32), step=4, sized=True),
    Entry("residual_unet", ResidualUNet, step=2),
    Entry("dense_net", DenseNet),
    Entry("aspp", aspp),
    Entry("attention_unet", attention_unet, step=4),
    Entry("link_net", LinkNet, step=4),
    Entry("transposed_kernels", transposed_kernels, (12, 16, 18), step=(1, 2, 3)),
    Entry("mobile", mobile, sized=True),
    Entry("sub_pixel", sub_pixel, step=2, sized=True),
    Entry("space_to_depth", space_to_depth, step=2, sized=True),
    Entry("sub_pixel_2d", sub_pixel_2d, (20, 24), step=2, sized=True),
    Entry("spatial_attention", lambda: seq(block(1, 4), SpatialAttention(), conv(4, 2, 1))),
    Entry("feature_pyramid", FeaturePyramid, step=4),
    Entry("high_resolution", HighResolution, step=2),
    # padding
    Entry(
        "padding_same",
        lambda: seq(
            conv(1, 4, (3, 5, 3), padding="same", dilation=2),
            nn.ReLU(),
            conv(4, 2, 3, padding="same"),
        ),
    ),
    Entry(
        "padding_same_even",
        lambda: seq(
            conv(1, 4, (2, 4, 4), padding="same"), nn.ReLU(), conv(4, 2, 2, padding="same")
        ),
    ),
    Entry(
        "even_kernels",
        lambda: seq(
            conv(1, 4, 4, padding=2),
            nn.ReLU(),
            conv(4, 4, 2, padding=1),
            nn.ReLU(),
            conv(4, 2, (1, 2, 4)),
        ),
    ),
    Entry(
        "padding_reflect",
        lambda: seq(
            same(1, 4, padding_mode="reflect"), nn.ReLU(), same(4, 2, 5, padding_mode="reflect")
        ),
    ),
    Entry(
        "padding_replicate",
        lambda: seq(
            same(1, 4, padding_mode="replicate"), nn.ReLU(), same(4, 2, 5, padding_mode="replicate")
        ),
    ),
    Entry(
        "pads",
        lambda: seq(
            nn.ReflectionPad3d((1, 2, 0, 1, 1, 0)),
            conv(1, 4),
            nn.ReLU(),
            nn.ReplicationPad3d(1),
            conv(4, 4),
            nn.ReLU(),
            nn.ConstantPad3d((1, 1, 2, 0, 1, 1), 0.7),
            conv(4, 4),
            nn.ZeroPad3d(1),
            conv(4, 2),
        ),
    ),
    Entry(
        "reflect_2d_strided",
        lambda: seq(
            nn.ReflectionPad2d(3),
            conv(1, 4, 7, 2),
            nn.ReLU(),
            conv(4, 6, 3, 2, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1),
            nn.ReLU(),
            nn.ReflectionPad2d(2),
            conv(4, 2, 5, 2),
        ),
        (20, 28),
        step=2,
    ),
    Entry(
        "pool_average_padded",
        lambda: seq(
            same(1, 4),
            nn.ReLU(),
            nn.AvgPool3d(3, 2, padding=1, count_include_pad=False),
            same(4, 4),
            nn.ReLU(),
            nn.AvgPool3d(3, 1, padding=1),
            conv(4, 2, 1),
        ),
        step=2,
    ),
    Entry(
        "pool_ceil",
        lambda: seq(
            same(1, 4),
            nn.ReLU(),
            nn.MaxPool3d(2, ceil_mode=True),
            same(4, 4),
            nn.ReLU(),
            nn.AvgPool3d(3, 2, ceil_mode=True),
            conv(4, 2, 1),
        ),
        (15, 18, 21),
        named=False,
    ),
    # activations and arithmetic
    Entry(
        "rectifiers",
        lambda: activations(
            nn.ReLU(),
            nn.ReLU6(),
            nn.LeakyReLU(0.2),
            nn.PReLU(2),
            nn.PReLU(),
            lambda x: x.clamp_min(0.2),
        ),
    ),
    Entry("random_rectifier", lambda: activations(nn.RReLU()), exporters=(TORCHSCRIPT,)),
    Entry("threshold", lambda: activations(nn.Threshold(0.1, -0.3)), exporters=(DYNAMO,)),
    Entry(
        "rms_norm",
        lambda: seq(same(1, 4), ChannelsLast(nn.RMSNorm(4)), conv(4, 2, 1)),
        exporters=(DYNAMO,),
    ),
    Entry(
        "exponentials",
        lambda: activations(
            nn.ELU(0.7),
            nn.SELU(),
            nn.CELU(0.5),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.SiLU(),
            nn.Mish(),
            nn.Softplus(),
            nn.Softplus(2),
        ),
    ),
    Entry(
        "hard",
        lambda: activations(
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.Hardtanh(-0.5, 0.7),
            lambda x: x.clamp(-1.0, 0.5),
            nn.Hardshrink(0.3),
            nn.Softshrink(0.3),
            lambda x: x * functional.relu6(x + 3) / 6,
        ),
    ),
    Entry(
        "saturating",
        lambda: activations(
            nn.Softsign(),
            nn.Tanh(),
            nn.Sigmoid(),
            nn.LogSigmoid(),
            nn.Tanhshrink(),
            torch.atan,
            torch.erf,
            lambda x: torch.rsqrt(x * x + 1),
        ),
    ),
    Entry(
        "over_channels",
        lambda: activations(
            nn.Softmax(1),
            nn.LogSoftmax(1),
            nn.GLU(1),
            nn.Softmin(1),
            lambda x: functional.normalize(x, dim=1),
            lambda x: functional.normalize(x, p=1.0, dim=-4),
        ),
        sized=True,
    ),
    Entry(
        "activations_2d",
        lambda: activations(
            nn.PReLU(2), nn.Softmax(1), nn.Softmax2d(), nn.GELU(), nn.GLU(1), nn.Hardswish(), rank=2
        ),
        (20, 24),
    ),
    Entry(
        "layer_norm_channels",
        lambda: seq(
            same(1, 4), layer_norm(4), nn.GELU(), same(4, 4), LayerNormFirst(4), same(4, 2)
        ),
    ),
    Entry(
        "conv_next",
        lambda: seq(
            conv(1, 4, 2, stride=2),
            layer_norm(4),
            ConvNeXt(4),
            ConvNeXt(4),
            nn.ConvTranspose3d(4, 2, 2, 2),
        ),
        step=2,
    ),
    Entry(
        "normalise",
        lambda: seq(same(1, 4), lambda x: functional.normalize(x, dim=1), same(4, 2)),
        sized=True,
    ),
    Entry("pieces", Pieces, channels=2, sized=True),
    Entry("arithmetic", Arithmetic, sized=True),
    Entry(
        "standardised",
        lambda: seq(Standardised(1, 4, 3, padding=1), nn.ReLU(), Standardised(4, 2, 3)),
    ),
    Entry(
        "batch_norms",
        lambda: seq(
            norm(1),
            same(1, 4),
            norm(4, affine=False),
            nn.ReLU(),
            norm(4),
            same(4, 4),
            nn.ReLU(),
            norm(4, eps=0.1),
            nn.MaxPool3d(2),
            norm(4),
            nn.ConvTranspose3d(4, 2, 2, 2),
            norm(2),
        ),
        step=2,
    ),
    Entry("linear_head", LinearHead),
    Entry("shared", Shared),
    Entry("scaled_input", ScaledInput, channels=2),
    Entry("argmax", lambda: seq(block(1, 4), same(4, 3), lambda x: x.argmax(1, keepdim=True))),
    # several outputs
    Entry("deep_supervision", DeepSupervision, step=4, outputs=("fine", "middle", "coarse")),
    Entry("two_heads", TwoHeads, step=2, outputs=("classes", "vectors")),
    # MONAI
    Entry("monai_unet_batch", lambda: monai_unet(norm="batch"), step=4),
    Entry(
        "monai_unet_residual",
        lambda: monai_unet(norm="batch", num_res_units=2, act="LEAKYRELU"),
        step=4,
    ),
    Entry(
        "monai_basic_unet_batch",
        lambda: nets.BasicUNet(2, 1, 2, FEATURES, norm="batch"),
        (32, 48),
        step=16,
    ),
    Entry(
        "monai_basic_unet_pixelshuffle",
        lambda: nets.BasicUNet(2, 1, 2, FEATURES, norm="batch", upsample="pixelshuffle"),
        (32, 48),
        step=16,
        sized=True,
    ),
    Entry(
        "monai_basic_unet_nontrainable",
        lambda: nets.BasicUNet(2, 1, 2, FEATURES, norm="batch", upsample="nontrainable"),
        (32, 48),
        step=16,
    ),
    Entry("monai_dynunet_batch", lambda: dynunet(norm_name="batch", res_block=True), step=4),
    Entry("monai_vnet", VNet, (8, 10, 12), step=2),
    Entry(
        "monai_unet_plus_plus_batch",
        lambda: nets.BasicUNetPlusPlus(2, 1, 2, UNETPP, norm="batch"),
        (32, 48),
        step=16,
    ),
    Entry("monai_high_res_net", high_res_net),
    Entry(
        "monai_subpixel_upsample",
        lambda: seq(same(1, 4, stride=2), blocks.SubpixelUpsample(3, 4, 2, 2)),
        step=2,
        sized=True,
    ),
    # not local, or not computed at all
    Entry("instance_norm", lambda: normalised(nn.InstanceNorm3d(4)), breaks=INSTANCE),
    Entry(
        "instance_norm_affine",
        lambda: normalised(nn.InstanceNorm3d(4, affine=True)),
        breaks=INSTANCE,
    ),
    Entry("group_norm", lambda: normalised(nn.GroupNorm(2, 4)), breaks=GROUP, sized=True),
    Entry("group_norm_one", lambda: normalised(nn.GroupNorm(1, 4)), breaks=("LayerNormalization",)),
    Entry(
        "layer_norm_all",
        WholeLayerNorm,
        breaks=("LayerNormalization",),
        refused=True,
        window=True,
    ),
    Entry("instance_statistics", lambda: InstanceStatistics(False), breaks=MEAN, sized=True),
    Entry(
        "instance_statistics_unbiased",
        lambda: InstanceStatistics(True),
        breaks=MEAN,
        no_dynamic=(TORCHSCRIPT, DYNAMO),  # what it divides by would be the number of voxels
    ),
    Entry("squeeze_excitation", lambda: normalised(SqueezeExcitation(4)), breaks=MEAN),
    Entry("squeeze_excitation_conv", lambda: normalised(SqueezeExcitation(4, False)), breaks=MEAN),
    Entry("channel_attention", lambda: normalised(ChannelAttention(4)), breaks=MEAN),
    Entry("aspp_global", lambda: aspp(GlobalContext(4)), breaks=MEAN, sized=True),
    Entry(
        "style",
        Style,
        (20, 24),
        breaks=("AveragePool|mean",),
        no_dynamic=(TORCHSCRIPT, DYNAMO),
    ),
    Entry(
        "local_response",
        lambda: seq(same(1, 4), nn.ReLU(), nn.LocalResponseNorm(3, 0.5), conv(4, 2, 1)),
        breaks=("AveragePool|Pad|If",),
        refused=True,
        sized=True,
    ),
    Entry(
        "coordinates",
        Coordinates,
        breaks=("Concat|Unsqueeze",),
        refused=True,
        no_dynamic=(DYNAMO,),
        sized=True,
    ),
    Entry("self_attention", SelfAttention, step=4, breaks=("MatMul",), refused=True, sized=True),
    Entry(
        "circular",
        lambda: same(1, 2, padding_mode="circular"),
        breaks=("Concat|Pad",),
        refused=True,
    ),
    Entry("monai_unet_instance", monai_unet, step=4, breaks=INSTANCE),
    Entry(
        "monai_attention_unet",  # its merging convolutions normalise
        lambda: nets.AttentionUnet(3, 1, 2, (4, 6, 8), (2, 2)),
        step=4,
        breaks=INSTANCE,
    ),
    Entry(
        "monai_basic_unet",
        lambda: nets.BasicUNet(2, 1, 2, FEATURES),
        (32, 48),
        step=16,
        breaks=INSTANCE,
    ),
    Entry("monai_dynunet", dynunet, step=4, breaks=INSTANCE),
    Entry(
        "monai_segresnet",
        lambda: nets.SegResNet(
            3, 4, 1, 2, norm=("GROUP", {"num_groups": 2}), blocks_down=(1, 1), blocks_up=(1,)
        ),
        step=2,
        breaks=GROUP,
        sized=True,
    ),
    Entry(
        "monai_unet_plus_plus",
        lambda: nets.BasicUNetPlusPlus(2, 1, 2, UNETPP),
        (32, 48),
        step=16,
        breaks=INSTANCE,
    ),
    Entry("padded_classifier", padded_classifier, (16, 20, 24), breaks=MEAN, window=True),
    Entry("c3d", c3d, (8, 16, 16), breaks=("Gemm|linear",), window=True),
]
BY_NAME = {entry.name: entry for entry in ENTRIES}
