"""Train the two example networks, `boundary_valid` and `boundary_unet`, and write them as ONNX.

Needed only to make the networks anew; their weights lie in `networks/`. Both find the membranes
between cells in electron microscopy, from raw grey values 0-255 to a probability. They learn from
the volume of `sample.py` and from a real one, mixed in every batch:

    python examples/train.py --real train-volume.tif train-labels.tif --minutes 4

The real one is the training stack of the ISBI 2012 challenge (30 sections of 512x512 pixels of
4x4x50 nm, ventral nerve cord of a Drosophila larva; 0 is membrane in the labels):
A. Cardona, S. Saalfeld, S. Preibisch, B. Schmid, A. Cheng, J. Pulokas, P. Tomancak, V. Hartenstein,
"An integrated micro- and macroarchitectural analysis of the Drosophila brain by computer-assisted
serial section electron microscopy", PLoS Biology 8(10), 2010. Its last ten sections are held out:
no network sees them before it is scored on them. The training time is a limit on the clock, so
weights repeat from a seed only as far as the machine does as many steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sample import generate
from score import average_precision, best_baseline
from znni_dask.geometry import triple

Size = tuple[int, int, int]
CHANNELS_LAST = torch.channels_last_3d  # several times faster on a CPU, with few channels
HELD_OUT = slice(20, 30)
HELD_OUT_SAMPLE_SHAPE = (16, 256, 256)
SAMPLE_SEED, HELD_OUT_SAMPLE_SEED = 1000, 2000


@dataclass(frozen=True)
class Volume:
    """Raw grey values and the truth (1 on membranes), both (z, y, x) float32."""

    raw: Tensor
    truth: Tensor


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: the patch it sees, and the voxels of it that it answers for."""

    network: nn.Module
    patch: Size
    answered: tuple[slice, slice, slice]
    patches_per_volume: int
    learning_rate: float


class InputNormalisation(nn.BatchNorm3d):
    """A fixed affine map from grey values to mean 0 and deviation 1, never trained."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__(1, affine=False)
        self.running_mean = torch.tensor([mean])
        self.running_var = torch.tensor([deviation**2])
        self.eval()

    def train(self, mode: bool = True) -> InputNormalisation:
        return super().train(False)


def valid_network(normalisation: nn.Module) -> nn.Sequential:
    """A sliding-window classifier as in the ZNN papers: no padding, one answer per window."""

    def convolution(inputs: int, outputs: int, kernel: Size) -> list[nn.Module]:
        bare = nn.Conv3d(inputs, outputs, kernel, bias=False)
        return [bare, nn.BatchNorm3d(outputs), nn.ReLU()]

    flat = (1, 3, 3)
    return nn.Sequential(
        normalisation,
        *convolution(1, 16, (3, 3, 3)),
        *convolution(16, 16, flat),
        nn.MaxPool3d((1, 2, 2)),
        *convolution(16, 24, flat),
        *convolution(24, 24, flat),
        nn.MaxPool3d((1, 2, 2)),
        *convolution(24, 32, flat),
        *convolution(32, 32, flat),
        *convolution(32, 32, flat),
        *convolution(32, 32, (1, 1, 1)),
        nn.Conv3d(32, 1, 1),
    )


VALID_FIELD_OF_VIEW = (3, 40, 40)
VALID_STRIDE = 4


def folded(network: nn.Sequential) -> nn.Sequential:
    """The same network with every batch normalisation folded into the convolution before it."""
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(network).eval():
        if isinstance(layer, nn.BatchNorm3d) and layers and isinstance(layers[-1], nn.Conv3d):
            layers[-1] = nn.utils.fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def densified(network: nn.Sequential) -> nn.Sequential:
    """The same network at every voxel: each stride becomes dilation of the layers after it."""
    layers: list[nn.Module] = []
    spacing = (1, 1, 1)
    for layer in copy.deepcopy(network):
        if isinstance(layer, nn.MaxPool3d):
            kernel: Size = layer.kernel_size  # type: ignore[assignment]
            layer = nn.MaxPool3d(kernel, stride=1, dilation=spacing)
            spacing = (spacing[0] * kernel[0], spacing[1] * kernel[1], spacing[2] * kernel[2])
        elif isinstance(layer, nn.Conv3d):
            layer.dilation = spacing
        layers.append(layer)
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A padded U-Net of four levels; sizes must be multiples of (2, 8, 8)."""

    WIDTHS = (12, 24, 48, 64)
    POOLS: tuple[Size, ...] = ((1, 2, 2), (1, 2, 2), (2, 2, 2))

    def __init__(self, normalisation: nn.Module) -> None:
        super().__init__()
        flat, full = (1, 3, 3), (3, 3, 3)
        first, *deeper = self.WIDTHS
        self.normalisation = normalisation
        self.down = nn.ModuleList([self._pair(1, first, full, flat)])
        self.pool, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for above, width, step in zip(self.WIDTHS, deeper, self.POOLS, strict=False):
            self.pool.append(nn.MaxPool3d(step))
            self.down.append(self._pair(above, width, flat, full))
            self.up.append(nn.ConvTranspose3d(width, above, step, stride=step))
            self.merge.append(self._pair(2 * above, above, flat, flat))
        self.head = nn.Conv3d(first, 1, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int, first: Size, second: Size) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width, kernel in ((inputs, first), (outputs, second)):
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            bare = nn.Conv3d(width, outputs, kernel, padding=padding, bias=False)
            layers += [bare, nn.BatchNorm3d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, volume: Tensor) -> Tensor:
        x = self.down[0](self.normalisation(volume))
        skips = []
        for pool, down in zip(self.pool, self.down[1:], strict=True):
            skips.append(x)
            x = down(pool(x))
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


def recipes(normalisation: nn.Module) -> dict[str, Recipe]:
    """Both networks, without their last sigmoid.

    The sliding-window network trains in its strided form, on windows at random places: a sample of
    the dense answers with the same mean gradient, for a sixth of the arithmetic per area.
    """
    windows = 24
    low = [(view - 1) // 2 for view in VALID_FIELD_OF_VIEW]
    side = VALID_FIELD_OF_VIEW[1] + VALID_STRIDE * (windows - 1)
    grid = slice(low[1], low[1] + VALID_STRIDE * windows, VALID_STRIDE)
    valid = Recipe(
        network=valid_network(normalisation),
        patch=(VALID_FIELD_OF_VIEW[0], side, side),
        answered=(slice(low[0], low[0] + 1), grid, grid),
        patches_per_volume=8,
        learning_rate=4e-3,
    )
    everything = slice(None)
    unet = Recipe(
        network=UNet(normalisation),
        patch=(8, 96, 96),
        answered=(everything, everything, everything),
        patches_per_volume=4,
        learning_rate=4e-3,
    )
    return {"boundary_valid": valid, "boundary_unet": unet}


def batches(
    volumes: list[Volume], recipe: Recipe, random: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (patch, channel, z, y, x) with as many patches from every volume."""
    chosen = [volume for volume in volumes for _ in range(recipe.patches_per_volume)]
    while True:
        patches = [augmented_patch(volume, recipe.patch, random) for volume in chosen]
        raw = torch.stack([patch.raw for patch in patches])[:, None]
        truth = torch.stack([patch.truth[recipe.answered] for patch in patches])[:, None]
        yield raw, truth


def augmented_patch(volume: Volume, shape: Size, random: np.random.Generator) -> Volume:
    """A random patch: turned, mirrored, sometimes zoomed, with other brightness and contrast."""
    zoomed = random.random() < 0.5
    side = math.ceil(shape[1] * 1.65) if zoomed else shape[1]
    box = (shape[0], side, side)
    start = [random.integers(n - m + 1) for n, m in zip(volume.raw.shape, box, strict=True)]
    crop = tuple(slice(s, s + m) for s, m in zip(start, box, strict=True))
    both = torch.stack([volume.raw[crop], volume.truth[crop]])
    if zoomed:
        both = turned_and_zoomed(both, shape[1], random)
    both = torch.rot90(both, int(random.integers(4)), (2, 3))
    both = both.flip([axis for axis in (1, 2, 3) if random.random() < 0.5])
    contrast, brightness = random.uniform(0.75, 1.3), random.uniform(-22, 22)
    noise = torch.from_numpy(random.standard_normal(shape, np.float32)) * random.uniform(0, 12)
    raw = (both[0] - 126) * contrast + 126 + brightness + noise
    return Volume(raw, (both[1] > 0.5).float())


def turned_and_zoomed(both: Tensor, side: int, random: np.random.Generator) -> Tensor:
    """Cut a `side`-wide square out of the middle of (2, z, y, x), at any angle, 0.87-1.25 large."""
    angle, zoom = random.uniform(-math.pi, math.pi), random.uniform(0.8, 1.15)
    scale = zoom * side / both.shape[-1]
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    matrix = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
    sections = both.flatten(0, 1)[None]
    grid = functional.affine_grid(matrix, [1, sections.shape[1], side, side], align_corners=False)
    cut = functional.grid_sample(sections, grid, align_corners=False)
    return cut.reshape(*both.shape[:2], side, side)


def train(recipe: Recipe, volumes: list[Volume], minutes: float, seed: int) -> int:
    """Train in place for so many minutes of wall clock; returns the number of steps."""
    network = recipe.network.to(memory_format=CHANNELS_LAST).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=1e-3)
    begin, steps = time.monotonic(), 0
    for raw, truth in batches(volumes, recipe, np.random.default_rng(seed)):
        done = (time.monotonic() - begin) / (60 * minutes)
        if done >= 1:
            break
        cosine, warm_up = (1 + math.cos(math.pi * done)) / 2, min(1.0, 20 * done + 0.05)
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * warm_up * cosine
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(raw.contiguous(memory_format=CHANNELS_LAST))
        loss = functional.binary_cross_entropy_with_logits(logits.float(), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    network.eval()
    return steps


@torch.no_grad()
def predict_valid(network: nn.Sequential, raw: Tensor, wanted: slice) -> NDArray[np.float32]:
    """Logits (z, y, x) at every voxel of some sections of `raw`; the volume is extended by
    reflection."""
    dense = densified(folded(network)).to(memory_format=CHANNELS_LAST)
    low_high = [((view - 1) // 2, view // 2) for view in VALID_FIELD_OF_VIEW]
    extended = torch.from_numpy(np.pad(raw.numpy(), low_high, mode="reflect"))
    depth = VALID_FIELD_OF_VIEW[0]
    sections = [dense(extended[None, None, z : z + depth])[0, 0] for z in range(len(raw))[wanted]]
    return torch.cat(sections).numpy()


@torch.no_grad()
def predict_unet(network: UNet, raw: Tensor, wanted: slice) -> NDArray[np.float32]:
    """Logits (z, y, x) of some sections, the whole volume being seen at once."""
    logits: NDArray[np.float32] = network(raw[None, None])[0, 0].numpy()
    return logits[wanted]


def export(network: nn.Module, path: Path) -> None:
    """Write the network, with a last sigmoid, as ONNX; batch, z, y and x may have any size."""
    shape = VALID_FIELD_OF_VIEW if isinstance(network, nn.Sequential) else (8, 48, 48)
    if isinstance(network, nn.Sequential):
        network = folded(network)
    complete = nn.Sequential(network, nn.Sigmoid()).to(memory_format=torch.contiguous_format).eval()
    axes = {0: "batch", 2: "z", 3: "y", 4: "x"}
    torch.onnx.export(
        complete,
        (torch.zeros(1, 1, *shape),),
        path,
        input_names=["volume"],
        output_names=["boundary"],
        dynamic_axes={"volume": axes, "boundary": axes},
        opset_version=17,
        dynamo=False,
    )


def made_up(shape: Size, seed: int) -> Volume:
    raw, membranes = generate(shape, seed)
    return Volume(torch.from_numpy(raw).float(), torch.from_numpy(membranes).float())


def real(volume_path: Path, labels_path: Path) -> Volume:
    raw, labels = tifffile.imread(volume_path), tifffile.imread(labels_path)
    if raw.shape != labels.shape or raw.ndim != 3 or len(raw) < HELD_OUT.stop:
        raise SystemExit(f"needs two stacks (30, y, x) of one shape: {raw.shape}, {labels.shape}")
    return Volume(torch.from_numpy(raw).float(), torch.from_numpy(labels == 0).float())


def main() -> None:
    # oneDNN of PyTorch 2.13 crashes in the backward pass of convolutions in bfloat16 on AMX
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--real", type=Path, nargs=2, required=True, metavar=("VOLUME", "LABELS"))
    parser.add_argument("--minutes", type=float, default=4.0, help="training time per network")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "networks")
    parser.add_argument("--networks", nargs="+", default=["boundary_valid", "boundary_unet"])
    parser.add_argument(
        "--generated",
        type=int,
        nargs=3,
        default=(40, 512, 512),
        metavar=("Z", "Y", "X"),
        help="size of the generated volume that they also learn from",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)

    stack = real(*arguments.real)
    seen = Volume(stack.raw[: HELD_OUT.start], stack.truth[: HELD_OUT.start])
    size = triple(arguments.generated)
    volumes = [seen, made_up(size, SAMPLE_SEED)]
    fresh = made_up(triple(map(min, size, HELD_OUT_SAMPLE_SHAPE)), HELD_OUT_SAMPLE_SEED)
    tests = {"real": (stack, HELD_OUT), "made-up": (fresh, slice(None))}
    for place, (volume, sections) in tests.items():
        best = best_baseline(volume.raw[sections].numpy(), volume.truth[sections].numpy())
        print(f"{place}, held out: {best.name} (sigma {best.sigma:g}) {best.average_precision:.3f}")

    grey = torch.cat([volume.raw.flatten() for volume in volumes])
    normalisation = InputNormalisation(float(grey.mean()), float(grey.std()))
    predictors: dict[str, Callable[..., NDArray[np.float32]]] = {
        "boundary_valid": predict_valid,
        "boundary_unet": predict_unet,
    }
    for name, recipe in recipes(normalisation).items():
        if name not in arguments.networks:
            continue
        steps = train(recipe, volumes, arguments.minutes, arguments.seed)
        print(f"{name}: {steps} steps in {arguments.minutes:g} minutes")
        export(recipe.network, arguments.output / f"{name}.onnx")
        for place, (volume, sections) in tests.items():
            logits = predictors[name](recipe.network, volume.raw, sections)
            reached = average_precision(logits, volume.truth[sections].numpy())
            print(f"{name}, {place}, held out: {reached:.3f}")


if __name__ == "__main__":
    main()
