"""ONNX in: every operator, every refusal, and PyTorch's two exporters against PyTorch itself."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional

import oracle
from test_identity import at_boxes
from znni_dask.errors import NetworkError
from znni_dask.geometry import Box, round_up
from znni_dask.importers.onnx import load
from znni_dask.network.field_of_view import geometry
from znni_dask.network.rewrites import simplify
from znni_dask.patches import Layout

RANDOM = np.random.default_rng(0)


def model(nodes, constants, *, rank=5, channels=2, opset=17, inputs=1, outputs=1):
    names = [f"x{i}" if i else "x" for i in range(inputs)]
    shape = ["n", channels, *(f"d{i}" for i in range(rank - 2))]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names]
    made = [
        helper.make_tensor_value_info(f"y{i}" if i else "y", onnx.TensorProto.FLOAT, None)
        for i in range(outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", values, made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(operator, inputs, output="y", **attributes):
    return helper.make_node(
        operator, inputs.split(), output.split(), f"the_{operator}", **attributes
    )


def loaded(proto, tmp_path):
    onnx.save(proto, tmp_path / "m.onnx")
    return load(tmp_path / "m.onnx")


def f4(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


W3, W2, B = f4(3, 2, 3, 3, 3), f4(3, 2, 3, 3), f4(3)
T3 = f4(2, 3, 2, 2, 2)
END = np.iinfo(np.int64).max
OPERATORS = {
    "Conv": ([node("Conv", "x w b", pads=[1] * 6)], {"w": W3, "b": B}),
    "Conv strided": (
        [node("Conv", "x w", strides=[1, 2, 2], dilations=[2, 1, 1])],
        {"w": W3},
    ),
    "Conv grouped": ([node("Conv", "x w", group=2)], {"w": f4(4, 1, 1, 3, 3)}),
    "Conv same upper": ([node("Conv", "x w", auto_pad="SAME_UPPER")], {"w": f4(3, 2, 2, 4, 3)}),
    "Conv same lower": ([node("Conv", "x w", auto_pad="SAME_LOWER")], {"w": f4(3, 2, 2, 4, 3)}),
    "ConvTranspose": ([node("ConvTranspose", "x w", strides=[2, 2, 2])], {"w": T3}),
    "ConvTranspose output_padding": (
        [
            node(
                "ConvTranspose",
                "x w",
                strides=[2, 2, 2],
                pads=[1, 1, 1, 0, 0, 0],
                output_padding=[0, 1, 1],
            )
        ],
        {"w": f4(2, 3, 3, 3, 3)},
    ),
    "MaxPool": (
        [node("MaxPool", "x", kernel_shape=[1, 2, 2], strides=[1, 2, 2])],
        {},
    ),
    "MaxPool padded": (
        [node("MaxPool", "x", kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6)],
        {},
    ),
    "BatchNormalization": (
        [node("BatchNormalization", "x s b m v", epsilon=1e-3)],
        {"s": f4(2), "b": f4(2), "m": f4(2), "v": np.abs(f4(2)) + 0.1},
    ),
    "Relu": ([node("Relu", "x")], {}),
    "LeakyRelu": ([node("LeakyRelu", "x", alpha=0.2)], {}),
    "LeakyRelu default": ([node("LeakyRelu", "x")], {}),
    "PRelu": ([node("PRelu", "x s")], {"s": f4(2, 1, 1, 1)}),
    "PRelu one slope": ([node("PRelu", "x s")], {"s": f4(1)}),
    "Elu": ([node("Elu", "x", alpha=0.7)], {}),
    "Tanh": ([node("Tanh", "x")], {}),
    "Sigmoid": ([node("Sigmoid", "x")], {}),
    "Softmax": ([node("Softmax", "x", axis=1)], {}),
    "Softmax negative axis": ([node("Softmax", "x", axis=-4)], {}),
    "Add": ([node("Relu", "x", "r"), node("Add", "x r")], {}),
    "Add constant": ([node("Add", "c x")], {"c": f4(1, 2, 1, 1, 1)}),
    "Sub constant": ([node("Sub", "x c")], {"c": np.float32(3)}),
    "Mul": ([node("Tanh", "x", "r"), node("Mul", "x r")], {}),
    "Mul constant": ([node("Mul", "x c")], {"c": f4(2, 1, 1, 1)}),
    "Div constant": ([node("Div", "x c")], {"c": np.float32(255)}),
    "Concat": ([node("Relu", "x", "r"), node("Concat", "x r x", axis=1)], {}),
    "Pad": (
        [node("Pad", "x p v")],
        {"p": np.array([0, 0, 1, 0, 2, 0, 0, 0, 1, 1]), "v": np.float32(0.5)},
    ),
    "Crop": (
        [node("Slice", "x s e a")],
        {"s": np.array([1, 2]), "e": np.array([-2, END]), "a": np.array([3, 4])},
    ),
    "Slice channels": (
        [node("Slice", "x s e a")],
        {"s": np.array([1]), "e": np.array([2]), "a": np.array([1])},
    ),
    "Resize asymmetric": (
        [
            node(
                "Resize",
                "x  s".replace("  ", " r "),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        ],
        {"s": np.array([1, 1, 1, 2, 3], np.float32), "r": np.zeros(0, np.float32)},
    ),
    "Resize half pixel": (
        [node("Resize", "x r s", mode="nearest")],
        {"s": np.array([1, 1, 2, 2, 3], np.float32), "r": np.zeros(0, np.float32)},
    ),
    "Identity, Dropout": ([node("Identity", "x", "i"), node("Dropout", "i")], {}),
    "Slice to the 32-bit end": (
        [node("Slice", "x s e a")],
        {"s": np.array([1]), "e": np.array([2**31 - 1]), "a": np.array([-1])},
    ),
    "Pad nothing": ([node("Pad", "x p")], {"p": np.zeros(10, np.int64)}),
    "constants folded": (
        [
            node("Concat", "p q", "c", axis=0),
            node("Cast", "c", "pads", to=7),
            node("Pad", "x pads"),
        ],
        {"p": np.array([0, 0, 1, 1, 1], np.int32), "q": np.array([0, 0, 0, 2, 0], np.int32)},
    ),
}


def test_resize_honours_its_axes(tmp_path):
    """opset 18 lets scales name their axes, in any order."""
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
    resize = node("Resize", "x r s", nearest_mode="floor", axes=[4, 2, 3], **nearest)
    constants = {"r": np.zeros(0, np.float32), "s": np.array([3, 1, 2], np.float32)}
    network = loaded(model([resize], constants, opset=18), tmp_path)
    assert network.nodes[-1].layer.factor == (1, 2, 3)


MALFORMED = {
    "MaxPool without kernel_shape": [node("MaxPool", "x")],
    "Concat without axis": [node("Concat", "x x")],
    "kernel_shape a number": [node("MaxPool", "x", kernel_shape=2)],
    "strides too few": [node("Conv", "x w", strides=[1, 1])],
    "group a string": [node("Conv", "x w", group="two")],
    "groups that do not divide": [node("Conv", "x u", group=2)],
    "kernel_shape of another size": [node("Conv", "x w", kernel_shape=[5, 5, 5])],
    "no output": [helper.make_node("Relu", ["x"], [], "none")],
    "pooling windows in the padding": [node("MaxPool", "x", kernel_shape=[2] * 3, pads=[2] * 6)],
    "kernel of zero": [node("MaxPool", "x", kernel_shape=[0, 2, 2])],
    "huge window": [node("MaxPool", "x", kernel_shape=[1 << 40] * 3)],
    "huge dilation": [node("Conv", "x w", dilations=[1 << 40] * 3)],
    "slice of axis 9": [node("Slice", "x one two nine")],
    "slice of axis -9": [node("Slice", "x one two minus")],
    "pads too few": [node("Pad", "x one")],
    "infinite scale": [node("Resize", "x r inf")],
    "sum of three": [node("Add", "x o o")],
    "alpha not a number": [node("LeakyRelu", "x", alpha=float("nan"))],
    "text for weights": [node("Conv", "x text")],
    "statistics of unequal length": [node("BatchNormalization", "x o o o w")],
    "endless range": [node("Range", "zero many tiny", "c"), node("Add", "x c")],
}


@pytest.mark.parametrize("label", MALFORMED)
def test_malformed_nodes_are_refused_with_a_message(label, tmp_path):
    constants = {
        **CONSTANTS,
        "u": f4(3, 1, 1, 1, 1),
        "nine": np.array([9]),
        "minus": np.array([-9]),
        "inf": np.array([1, 1, np.inf, 1, 1], np.float32),
        "text": np.array(["a"] * 4, object),
        "zero": np.float64(0),
        "many": np.float64(1),
        "tiny": np.float64(1e-12),
    }
    with pytest.raises(NetworkError, match="layers are not supported"):
        loaded(model(MALFORMED[label], constants), tmp_path)


def test_reasons_behind_a_failed_node_are_listed_too(tmp_path):
    nodes = [
        helper.make_node("Clip", ["x"], ["a"], "first"),
        helper.make_node("MaxPool", ["a"], ["b"], "second", kernel_shape=[2] * 3, ceil_mode=1),
        helper.make_node("Conv", ["b", "w"], ["c"], "fine"),
        helper.make_node("Resize", ["c", "r", "s"], ["y"], "third", mode="cubic"),
    ]
    with pytest.raises(NetworkError) as found:
        loaded(model(nodes, CONSTANTS), tmp_path)
    text = str(found.value)
    assert "3 layers" in text
    for name in ("first (Clip)", "second (MaxPool): ceil_mode", "third (Resize): mode=cubic"):
        assert name in text


@pytest.mark.parametrize("label", OPERATORS)
def test_every_operator_means_what_onnx_says(label, tmp_path):
    nodes, constants = OPERATORS[label]
    proto = model(nodes, constants)
    network = loaded(proto, tmp_path)
    x = f4(1, 2, 8, 10, 12)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0][0]
    np.testing.assert_allclose(oracle.whole(network, x[0]), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(oracle.whole(simplify(network), x[0]), want, rtol=1e-4, atol=1e-5)


def test_negative_pads_crop(tmp_path):
    pads = np.array([0, 0, 1, -1, 0, 0, 0, 0, -2, 1])
    network = loaded(model([node("Pad", "x p")], {"p": pads}), tmp_path)
    x = f4(2, 8, 10, 12)
    want = np.pad(x[:, :, 1:-2], [(0, 0), (1, 0), (0, 0), (0, 1)])
    np.testing.assert_array_equal(oracle.whole(network, x), want)


def test_a_2d_network_becomes_a_3d_one_of_flat_kernels(tmp_path):
    proto = model(
        [
            node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
            node("MaxPool", "c", kernel_shape=[2, 2], strides=[2, 2]),
        ],
        {"w": W2, "b": B},
        rank=4,
    )
    network = loaded(proto, tmp_path)
    x = f4(1, 2, 8, 10)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0][0]
    np.testing.assert_allclose(
        oracle.whole(network, x[0][:, None])[:, 0], want, rtol=1e-4, atol=1e-5
    )
    assert geometry(network).field_of_view[0] == 1


UNSUPPORTED = {
    "ceil_mode": [node("MaxPool", "x", kernel_shape=[2] * 3, ceil_mode=1)],
    "mode=linear": [node("Resize", "x r s", mode="linear")],
    "factors": [node("Resize", "x r h", mode="nearest")],
    "mode=reflect": [node("Pad", "x p", mode="reflect")],
    "depends on the size": [node("Slice", "x one five two")],
    "steps other": [node("Slice", "x one five two two")],
    "only channels": [node("Concat", "x x", axis=2)],
    "only channels from": [node("Softmax", "x", axis=2)],
    "SAME_UPPER with a stride": [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2] * 3)],
    "output_shape": [node("ConvTranspose", "x t", output_shape=[4, 4, 4])],
    "training_mode": [node("BatchNormalization", "x o o o o", "y a b", training_mode=1)],
    "does not go by channels": [node("Add", "x s")],
    "of two arrays": [node("Sub", "x x")],
    "constant first": [node("Div", "h x")],
    "operator not supported": [node("Erf", "x")],
    "must be a constant": [node("Conv", "x x")],
}
CONSTANTS = {
    "r": np.zeros(0, np.float32),
    "s": np.array([1, 1, 2, 2, 2], np.float32),
    "h": np.array([1, 1, 1.5, 2, 2], np.float32),
    "p": np.zeros(10, np.int64),
    "one": np.array([1]),
    "two": np.array([2]),
    "five": np.array([5]),
    "w": W3,
    "t": T3,
    "o": np.ones(2, np.float32),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name_with_its_reason(reason, tmp_path):
    nodes = UNSUPPORTED[reason]
    with pytest.raises(NetworkError) as found:
        loaded(model(nodes, CONSTANTS), tmp_path)
    assert reason in str(found.value)
    assert f"the_{nodes[0].op_type} ({nodes[0].op_type})" in str(found.value)


def test_everything_unsupported_is_listed_at_once(tmp_path):
    nodes = [
        helper.make_node("Erf", ["x"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "fine"),
        helper.make_node("Cosh", ["b"], ["c"], "second"),
        helper.make_node("Mystery", ["c"], ["y"], "third", domain="com.example"),
    ]
    with pytest.raises(NetworkError) as found:
        loaded(model(nodes, {}), tmp_path)
    text = str(found.value)
    assert "3 layers are not supported" in text
    for name in ("first (Erf)", "second (Cosh)", "third (com.example.Mystery)"):
        assert name in text
    assert "fine" not in text


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (model([node("Add", "x x1")], {}, inputs=2), "one input, this one has 2: 'x', 'x1'"),
        (
            model([node("Relu", "x"), node("Tanh", "x", "y1")], {}, outputs=2),
            r"2 outputs \(y, y1\), one is wanted",
        ),
        (model([node("Relu", "x")], {}, opset=9), "opset 9 is too old"),
        (model([node("Relu", "x")], {}, rank=3), "rank 3"),
        (model([node("Relu", "x")], {}, channels="c"), "how many channels"),
        (model([node("Relu", "c")], {"c": f4(1, 2, 3, 3, 3)}), "constant where the volume"),
        (model([node("Conv", "x w")], {"w": f4(3, 5, 1, 1, 1)}), "wants 5 channels"),
        (
            model(
                [node("ConstantOfShape", "s", "c"), node("Add", "x c")], {"s": np.array([1 << 40])}
            ),
            "makes a constant of",
        ),
    ],
)
def test_a_network_of_another_form_is_refused(proto, message, tmp_path):
    with pytest.raises(NetworkError, match=message):
        loaded(proto, tmp_path)


# PyTorch


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
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
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
