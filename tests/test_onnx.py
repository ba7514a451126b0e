"""Networks as PyTorch's two exporters write them, against PyTorch on the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from test_identity import at_boxes
from znni_dask.geometry import Box, round_up
from znni_dask.importers.onnx import load
from znni_dask.network.field_of_view import geometry
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Sequential):
    """One or two convolutions with batch normalisation; one keeps deep U-Nets' view small."""

    def __init__(self, fan_in, fan_out, convolutions):
        first = [nn.Conv3d(fan_in, fan_out, 3, padding=1), nn.BatchNorm3d(fan_out), nn.ReLU()]
        second = [
            nn.Conv3d(fan_out, fan_out, 3, padding=1),
            nn.BatchNorm3d(fan_out),
            nn.LeakyReLU(0.1),
        ]
        super().__init__(*first, *(second if convolutions == 2 else []))


class UNet(nn.Module):
    def __init__(self, poolings, up):
        super().__init__()
        widths = [4 + 2 * level for level in range(poolings + 1)]
        convolutions = 2 if poolings < 4 else 1
        self.down = nn.ModuleList(
            Block(1 if level == 0 else widths[level - 1], widths[level], convolutions)
            for level in range(poolings + 1)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(widths[level + 1], widths[level], 2, 2)
            if up == "transposed"
            else nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv3d(widths[level + 1], widths[level], 1),
            )
            for level in range(poolings)
        )
        self.merge = nn.ModuleList(Block(2 * w, w, convolutions) for w in widths[:-1])
        self.head = nn.Conv3d(widths[0], 2, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.merge[level](torch.cat([self.up[level](x), skips[level]], 1))
        return self.head(x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 6, (1, 3, 3))
        self.one = nn.Conv3d(6, 6, 3, padding=1)
        self.two = nn.Conv3d(6, 6, 3)
        self.slope = nn.PReLU(6)
        self.head = nn.Conv3d(6, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        x = functional.elu(x + self.one(x))
        x = self.slope(self.two(x)) + x[:, :, 1:-1, 1:-1, 1:-1]
        return self.head(functional.pad(x, (1, 1, 1, 1, 0, 0)) * 0.5 + 0.1)


def valid_chain():
    return nn.Sequential(
        nn.Conv3d(1, 6, (2, 3, 3)),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(6, 8, 3),
        nn.Tanh(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 2, (1, 3, 3)),
    )


THOROUGH = pytest.mark.thorough
NETWORKS = {
    **{
        f"U-Net, {poolings} poolings, {up}": (lambda p=poolings, u=up: UNet(p, u))
        for poolings in (2, 3, 4)
        for up in ("transposed", "nearest")
    },
    "residual": Residual,
    "valid chain": valid_chain,
}


def trained(label):
    """The network in evaluation mode, with batch statistics that are not the default."""
    torch.manual_seed(1)
    network = NETWORKS[label]().train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 1, 32, 32, 32) * 1.5 + 0.2)
    return network.eval()


def exported(network, path, dynamo):
    sample = torch.randn(1, 1, 32, 32, 32)
    torch.onnx.export(network, (sample,), path, dynamo=dynamo, verbose=False)
    return simplify(load(path))


def patches_at_corners_and_inside(network, size):
    """Boxes of the answer: both corners, a face, and one with all that lies behind it inside."""
    patch = (13, 14, 19)
    layout = Layout(network, size, "valid")
    far = tuple(n - p for n, p in zip(layout.output_size, patch, strict=True))
    middle = tuple(f // 2 for f in far)
    corners = [(0, 0, 0), far, (0, middle[1], far[2]), middle]
    boxes = [Box(c, tuple(a + p for a, p in zip(c, patch, strict=True))) for c in corners]
    inside = layout.patch(boxes[-1]).input
    assert all(a > 0 for a in inside.start)
    assert all(b < n for b, n in zip(inside.stop, size, strict=True))
    return boxes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dynamo",
    [pytest.param(False, id="torchscript"), pytest.param(True, id="dynamo", marks=THOROUGH)],
)
@pytest.mark.parametrize("label", NETWORKS)
def test_patches_equal_pytorch_on_the_whole_volume(label, dynamo, tmp_path):
    reference = trained(label)
    network = exported(reference, tmp_path / "network.onnx", dynamo)
    found = geometry(network)
    size = tuple(
        round_up(2 * max(axis.halo) + 24 + 2 * axis.alignment, axis.alignment)
        for axis in found.axes
    )
    boxes = patches_at_corners_and_inside(network, size)
    volume = np.random.default_rng(2).standard_normal((1, *size)).astype(np.float32)
    if found.dense:
        want = dense_by_pytorch(reference, network, volume)
    else:
        with torch.no_grad():
            want = reference(torch.from_numpy(volume)[None])[0].numpy()
    got = at_boxes(network, volume, "valid", boxes)
    assert got.shape == want.shape
    made = np.isfinite(got)
    assert made.sum() > 2 * network.out_channels * boxes[0].voxels
    assert np.abs(got - want)[made].max() < 1e-4 * max(1.0, float(want.std()))


def dense_by_pytorch(reference, network, volume):
    """The sliding window: PyTorch at every offset of the network's stride, interleaved."""
    strides = [int(s) for s in network.spacing[network.output]]
    size = [
        axis.output_size(n)
        for axis, n in zip(geometry(network).axes, volume.shape[1:], strict=True)
    ]
    out = np.full((network.out_channels, *size), np.nan, np.float32)
    for z, y, x in np.ndindex(*strides):
        with torch.no_grad():
            part = reference(torch.from_numpy(volume[:, z:, y:, x:])[None])[0].numpy()
        target = out[:, z :: strides[0], y :: strides[1], x :: strides[2]]
        target[...] = part[:, : target.shape[1], : target.shape[2], : target.shape[3]]
    return out
