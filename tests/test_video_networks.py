"""The five networks for video are the published ones, and their answers are PyTorch's.

Each is written a second time here, in PyTorch, and given the same weights. Counts are those of
the published clip; where a network takes other sizes, answers are compared for a smaller one.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from video_networks import NETWORKS, multiply_adds
from znni_dask.importers.onnx import load
from znni_dask.network.layers import ONES, Conv, MaxPool
from znni_dask.network.network import Network
from znni_dask.patchwise import apply

SMALLER = {"resnet34": (8, 60, 52), "resnet50": (8, 60, 52), "p3d63": (16, 64, 80)}
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def conv(fan_in, fan_out, kernel, stride=1, padding=0):
    """Without bias, normalised; 2D where the kernel has two axes."""
    flat = isinstance(kernel, tuple) and len(kernel) == 2
    layer, norm = (nn.Conv2d, nn.BatchNorm2d) if flat else (nn.Conv3d, nn.BatchNorm3d)
    return nn.Sequential(
        layer(fan_in, fan_out, kernel, stride, padding, bias=False), norm(fan_out, eps=0)
    )


class Block(nn.Module):
    """A residual block; ``path`` says how the inner convolutions follow one another."""

    def __init__(self, path, *inner, shortcut=None):
        super().__init__()
        self.path = path
        self.inner = nn.ModuleList(inner)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return torch.relu(self.path(x, *self.inner) + self.shortcut(x))


def in_turn(x, *layers):
    for layer in layers[:-1]:
        x = torch.relu(layer(x))
    return layers[-1](x)


def type_b(x, reduce, in_plane, in_time, expand):
    x = torch.relu(reduce(x))
    return expand(torch.relu(torch.relu(in_plane(x)) + in_time(x)))


def type_c(x, reduce, in_plane, in_time, expand):
    x = torch.relu(in_plane(torch.relu(reduce(x))))
    return expand(torch.relu(x + in_time(x)))


def basic(fan_in, width, stride):
    inner = conv(fan_in, width, 3, stride, 1), conv(width, width, 3, 1, 1)
    return Block(in_turn, *inner, shortcut=stride > 1 and conv(fan_in, width, 1, stride))


def bottleneck(fan_in, width, stride):
    inner = conv(fan_in, width, 1), conv(width, width, 3, stride, 1), conv(width, 4 * width, 1)
    fit = fan_in != 4 * width and conv(fan_in, 4 * width, 1, stride)
    return Block(in_turn, *inner, shortcut=fit)


def pseudo_3d(path, fan_in, width, stride):
    stride = (1, stride, stride)
    inner = [
        conv(fan_in, width, 1, stride),
        conv(width, width, (1, 3, 3), 1, (0, 1, 1)),
        conv(width, width, (3, 1, 1), 1, (1, 0, 0)),
        conv(width, 4 * width, 1),
    ]
    fit = fan_in != 4 * width and conv(fan_in, 4 * width, 1, stride)
    return Block(path, *inner, shortcut=fit)


def flat(fan_in, width, stride):
    one, three = (1, 1), (3, 3)
    inner = conv(fan_in, width, one, stride), conv(width, width, three, 1, 1)
    fit = fan_in != 4 * width and conv(fan_in, 4 * width, one, stride)
    return Block(in_turn, *inner, conv(width, 4 * width, one), shortcut=fit)


class ResNet(nn.Module):
    def __init__(self, block, expansion):
        super().__init__()
        self.stem = conv(3, 64, 7, (1, 2, 2), 3)
        self.pool = nn.MaxPool3d(3, 2, 1)
        blocks, fan_in = [], 64
        for stage, (width, depth) in enumerate(STAGES):
            for index in range(depth):
                blocks.append(block(fan_in, width, 2 if stage and not index else 1))
                fan_in = expansion * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(fan_in, 400)

    def forward(self, x):
        x = self.blocks(self.pool(torch.relu(self.stem(x))))
        return self.head(functional.adaptive_avg_pool3d(x, 1).flatten(1))


class P3D(nn.Module):
    """Its last stage is 2D, on the one frame that is left."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3))
        self.pool = nn.MaxPool3d((2, 3, 3), 2, ceil_mode=True)
        self.halve = nn.MaxPool3d((2, 1, 1))
        paths = [in_turn, type_b, type_c] * 5
        stages, fan_in = [], 64
        for stage, (width, depth) in enumerate(STAGES):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                if stage < 3:
                    blocks.append(pseudo_3d(paths.pop(0), fan_in, width, stride))
                else:
                    blocks.append(flat(fan_in, width, stride))
                fan_in = 4 * width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(fan_in, 400)

    def forward(self, x):
        x = self.pool(torch.relu(self.stem(x)))
        for stage in self.stages[:3]:
            x = self.halve(stage(x))
        x = self.stages[3](x.squeeze(2))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def vgg(classes, last, flattened):
    layers, fan_in = [], 3
    pool = nn.MaxPool3d(2)
    tower = (64, nn.MaxPool3d((1, 2, 2)), 128, pool, 256, 256, pool, 512, 512, pool, 512, 512, last)
    for layer in tower:
        if isinstance(layer, int):
            layers += [nn.Conv3d(fan_in, layer, 3, padding=1), nn.ReLU()]
            fan_in = layer
        else:
            layers.append(layer)
    layers += [nn.Flatten(), nn.Linear(flattened, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes))


IN_PYTORCH = {
    "c3d": lambda: vgg(487, nn.MaxPool3d(2, ceil_mode=True), 512 * 4 * 4),
    "resnet34": lambda: ResNet(basic, 1),
    "resnet50": lambda: ResNet(bottleneck, 4),
    "vgg11": lambda: vgg(400, nn.MaxPool3d((2, 1, 1)), 512 * 7 * 7),
    "p3d63": P3D,
}


@dataclass(frozen=True)
class Case:
    """A network, the same in PyTorch on the same arrays, and PyTorch's answer for one clip."""

    name: str
    network: Network
    module: nn.Module
    clip: np.ndarray
    answer: np.ndarray


def in_pytorch(name, network):
    """The module of that name; its layers take the arrays of ``network``'s, in order."""
    with torch.device("meta"):
        module = IN_PYTORCH[name]().eval()
    layers = [(k, m) for k, m in module.named_modules() if getattr(m, "weight", None) is not None]
    arrays = [network.weights[node.name] for node in network if node.name in network.weights]
    state = {}
    for (path, layer), found in zip(layers, arrays, strict=True):
        for key, array in zip(("weight", "bias"), found.values(), strict=False):
            shape = getattr(layer, key).shape
            state[f"{path}.{key}"] = torch.from_numpy(array).reshape(shape)
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            state[f"{path}.running_mean"] = torch.zeros(layer.num_features)
            state[f"{path}.running_var"] = torch.ones(layer.num_features)
            state[f"{path}.num_batches_tracked"] = torch.tensor(0)
    module.load_state_dict(state, assign=True)
    return module


def clip_of(size):
    """Coarse shapes in three colours, with noise."""
    random = np.random.default_rng(1)
    clip = random.standard_normal((3, *(n // 4 for n in size)))
    for axis in (1, 2, 3):
        clip = clip.repeat(4, axis)
    return (clip + 0.3 * random.standard_normal(clip.shape)).astype(np.float32)


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request):
    """Built once for all tests of a network, and let go before the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    name = request.param
    network = NETWORKS[name].build()
    module = in_pytorch(name, network)
    clip = clip_of(SMALLER.get(name, NETWORKS[name].size))
    with torch.no_grad():
        answer = module(torch.from_numpy(clip)[None])[0].numpy()
    yield Case(name, network, module, clip, answer)
    del network, module
    gc.collect()
    torch.set_num_threads(threads)


def difference(got, want):
    """The largest, in standard deviations of the answer."""
    assert got.shape == (*want.shape, 1, 1, 1)
    assert got.dtype == np.float32
    return np.abs(got[:, 0, 0, 0] - want).max() / want.std()


def test_parameters_and_multiply_adds_are_the_published_ones(case):
    published = NETWORKS[case.name]
    assert round(case.network.parameters / 1e6, 3) == published.parameters
    assert round(multiply_adds(case.network, published.size) / 1e9, 3) == published.gmacs
    assert case.network.parameters == sum(p.numel() for p in case.module.parameters())


def test_answers_are_pytorchs(case):
    assert difference(apply(case.network, case.clip, threads=2), case.answer) < 1e-4


@pytest.mark.parametrize("case", ["resnet50", "p3d63"], indirect=True)
def test_what_pytorch_exports_is_the_same_network(case, tmp_path):
    path = tmp_path / "network.onnx"
    torch.onnx.export(
        case.module,
        (torch.from_numpy(case.clip)[None],),
        path,
        dynamo=False,
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,  # leaves batch normalisations unfolded
        do_constant_folding=False,
    )
    network = load(path)
    assert network.parameters == case.network.parameters
    assert difference(apply(network, case.clip, threads=2), case.answer) < 1e-4


# Planted faults: the comparison above must see them


def with_layers(network, layers):
    """The network with other layers under some names."""
    nodes = tuple(replace(node, layer=layers.get(node.name, node.layer)) for node in network)
    return Network(nodes, network.outputs, network.weights)


def rounded_up_pool_padded(network):
    """As ports of Caffe's networks have it."""
    node = next(n for n in network if isinstance(n.layer, MaxPool) and n.layer.ceil)
    layer = replace(node.layer, ceil=False, padding=((0, 1, 1), (0, 1, 1)))
    return with_layers(network, {node.name: layer})


def pool_padded_on_one_side(network):
    node = next(n for n in network if isinstance(n.layer, MaxPool))
    return with_layers(network, {node.name: replace(node.layer, padding=((0,) * 3, (2,) * 3))})


def stride_moved(network):
    """From the 3³ of one bottleneck to the 1³ before it."""
    convolutions = [node for node in network if isinstance(node.layer, Conv)][1:]
    index = next(i for i, n in enumerate(convolutions) if n.layer.stride != ONES)
    first, second = convolutions[index - 1 : index + 1]
    layers = {
        first.name: replace(first.layer, stride=second.layer.stride),
        second.name: replace(second.layer, stride=ONES),
    }
    return with_layers(network, layers)


FAULTS = {
    "resnet34": pool_padded_on_one_side,
    "resnet50": stride_moved,
    "p3d63": rounded_up_pool_padded,
}


@pytest.mark.parametrize("case", list(FAULTS), indirect=True)
def test_a_planted_fault_is_found(case):
    faulty = FAULTS[case.name](case.network)
    assert difference(apply(faulty, case.clip, threads=2), case.answer) > 1e-2
