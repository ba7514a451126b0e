"""Hostile ONNX files: each is a network or is refused with a message, soon and in little memory."""

from __future__ import annotations

import itertools
import pickle
import resource
import time
import zipfile
from contextlib import suppress
from random import Random

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import graphs
import hostile
import oracle
from hostile import N, model
from znni_dask import patchwise
from znni_dask.errors import NetworkError
from znni_dask.importers.onnx import load
from znni_dask.importers.onnx.folding import FOLDED
from znni_dask.importers.onnx.operators import OPERATORS
from znni_dask.importers.to_onnx import to_onnx
from znni_dask.network.field_of_view import geometry, sizes_of

SECONDS, MEBIBYTES = 10, 512
HUGE = 1 << 40


class Bounds:
    """What reading a file may take: seconds of the processor, whatever else it does."""

    def __enter__(self):
        self.start = time.thread_time()
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self

    def __exit__(self, kind, error, traceback):
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak
        assert time.thread_time() - self.start < SECONDS
        assert grown >> 10 < MEBIBYTES


def saved(proto, folder):
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def refusal(path, message=None):
    with Bounds(), pytest.raises(NetworkError, match=message) as found:
        load(path)
    assert str(path) in str(found.value)
    assert str(found.value).replace(str(path), "").strip(" :")  # and why
    return str(found.value)


def ints(*values):
    return np.array(values, np.int64)


def f4(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def changed(change, nodes=None, constants=None):
    proto = model(nodes or [N("Conv", "x w")], {"w": f4(3, 2, 1, 1, 1)} | (constants or {}))
    change(proto)
    return proto


def weight(**fields):
    """A model whose weights' tensor has these fields in place of its own."""

    def change(proto):
        tensor = proto.graph.initializer[0]
        for name, value in fields.items():
            tensor.ClearField("raw_data" if name.endswith("_data") else name)
            if isinstance(value, list):
                del getattr(tensor, name)[:]
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return changed(change)


def dims(*sizes):
    def change(proto):
        shape = proto.graph.input[0].type.tensor_type.shape
        for dim, size in zip(shape.dim, sizes, strict=True):
            dim.dim_value = size

    return changed(change)


def two_of(what):
    def change(proto):
        getattr(proto.graph, what).append(getattr(proto.graph, what)[0])

    return changed(change)


def output_named(name):
    def change(proto):
        proto.graph.output[0].name = name

    return changed(change)


def emptied(proto):
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.name = ""
    for node in proto.graph.node:
        node.name = node.op_type = ""
        node.input[:], node.output[:] = [""] * len(node.input), [""] * len(node.output)


def own_function(domain):
    def change(proto):
        proto.functions.add(name="Conv", domain=domain, output=["y"], input=["x", "w"])
        proto.graph.node[0].domain = domain
        proto.opset_import.add(domain=domain, version=17)

    return changed(change)


def sparse(proto):
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(ints(1), "s_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [HUGE]))


def opset(*pairs):
    def change(proto):
        del proto.opset_import[:]
        proto.opset_import.extend(helper.make_opsetid(*pair) for pair in pairs)

    return changed(change)


def sequence(proto):
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 2, 4, 4, 4])
    proto.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(element))


GRAPHS = {
    "a cycle": ("is made by no node", model([N("Add", "x b", "a"), N("Relu", "a", "b")], {}, "b")),
    "its own output": ("is made by no node", model([N("Add", "x y")], {})),
    "one value made twice": ("made twice", model([N("Relu", "x"), N("Tanh", "x")], {})),
    "a node that makes the input": ("made twice", model([N("Relu", "x", "x"), N("Relu", "x")], {})),
    "a node that makes a weight": (
        "made twice",
        model([N("Relu", "x", "w"), N("Relu", "w")], {"w": f4(1)}),
    ),
    "two initializers of one name": ("two initializers", two_of("initializer")),
    "two outputs of one name": ("two have the name", two_of("output")),
    "the input as output": ("is the input itself", output_named("x")),
    "an output of no node": ("does not depend", output_named("z")),
    "two inputs of one name": ("one input", two_of("input")),
    "huge sizes": ("mistake", dims(1, 2, HUGE, HUGE, HUGE)),
    "huge channels": ("mistake", dims(1, HUGE, 8, 8, 8)),
    "negative sizes": ("mistake", dims(1, 2, -8, 8, 8)),
    "sizes of zero": ("mistake", dims(1, 2, 0, 8, 8)),
    "channels by huge groups": (
        "how many channels",
        model([N("Conv", "x w", group=1 << 60)], {"w": f4(3, 2, 1, 1, 1)}, channels="c"),
    ),
    "a sequence for an input": ("no array", changed(sequence)),
    "empty strings everywhere": ("an output has no name", changed(emptied)),
    "a sparse initializer": ("sparse", changed(sparse)),
    "functions of its own": ("the_Conv", own_function("own")),
    "functions that redefine operators": ("'Conv'", own_function("")),
    "an unknown domain": (
        r"the_Conv \(other.Conv\)",
        model([N("Conv", "x w", domain="other")], {}),
    ),
    "opset 99": ("opset 99 is not known", opset(("", 99))),
    "no opset": ("too old", opset(("other", 1))),
    "two opsets": ("several opsets", opset(("", 12), ("ai.onnx", 13))),
    "negative opset": ("too old", opset(("", -1))),
}


@pytest.mark.parametrize("label", GRAPHS)
def test_an_unsound_graph_is_refused(label, tmp_path):
    message, proto = GRAPHS[label]
    refusal(saved(proto, tmp_path), message)


TENSORS = {
    "raw data": weight(dims=[HUGE], raw_data=b"1234"),
    "float data": weight(dims=[HUGE], float_data=[1.0]),
    "int64 data": weight(dims=[HUGE], data_type=TensorProto.INT64, int64_data=[1]),
    "no data": weight(dims=[1 << 20] * 3, raw_data=b""),
    "packed data": weight(dims=[HUGE], data_type=TensorProto.INT4, raw_data=b"1234"),
    "overflowing dims": weight(dims=[1 << 32, 1 << 32], raw_data=b"1234"),
    "dims of zero and more": weight(dims=[0, HUGE, HUGE], raw_data=b""),
    "negative dims": weight(dims=[-1]),
    "two negative dims": weight(dims=[-3, -2, 1, 1, 1]),
    "a hundred dims": weight(dims=[1] * 98 + [3, 2]),
    "too much data": weight(dims=[3, 1, 1, 1, 1]),
    "an unknown type": weight(data_type=77),
    "no type": weight(data_type=0),
    "text": weight(data_type=TensorProto.STRING, string_data=[b"a"] * 6, raw_data=b""),
    "complex numbers": weight(data_type=TensorProto.COMPLEX64, float_data=[0.0] * 12),
    "numbers that do not fit": weight(data_type=TensorProto.FLOAT16, int32_data=[-1] * 6),
    "segments": changed(lambda p: p.graph.initializer[0].segment.CopyFrom(TensorProto.Segment())),
}


@pytest.mark.parametrize("label", TENSORS)
def test_an_initializer_that_is_not_what_it_declares_is_refused(label, tmp_path):
    refusal(saved(TENSORS[label], tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_no_float32_numbers_are_refused(value, tmp_path):
    weights = np.full((3, 2, 1, 1, 1), value)
    refusal(saved(model([N("Conv", "x w")], {"w": weights}), tmp_path), "NaN or infinity")


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_weights_of_other_precision_are_converted(kind, tmp_path):
    def change(proto):
        values = [0.5, -2.0, 3.0, 0.25, 1.0, -1.0]
        tensor = helper.make_tensor("w", getattr(TensorProto, kind), [3, 2, 1, 1, 1], values)
        proto.graph.initializer[0].CopyFrom(tensor)

    network = load(saved(changed(change), tmp_path))
    (arrays,) = network.weights.values()
    assert arrays["weight"].ravel().tolist() == [0.5, -2.0, 3.0, 0.25, 1.0, -1.0]


def external(**entries):
    def change(proto):
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))

    return changed(change)


@pytest.fixture
def folder(tmp_path):
    """A folder with data in it and around it."""
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    data = np.arange(8, dtype=np.float32).tobytes()
    for place in (tmp_path, inside, inside / "deep"):
        (place / "data").write_bytes(data)
    (inside / "out").symlink_to(tmp_path / "data")
    (inside / "up").symlink_to(tmp_path)
    (inside / "loop").symlink_to(inside / "loop")
    return inside


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../data"},
        {"location": "deep/../../data"},
        {"location": "/etc/hostname"},
        {"location": "out"},
        {"location": "up/data"},
        {"location": "loop"},
        {"location": "deep"},
        {"location": "."},
        {"location": ""},
        {},
        {"location": "data\0"},
        {"location": "missing"},
        {"location": "a" * 5000},
        {"location": "data", "offset": 12},
        {"location": "data", "offset": 64},
        {"location": "data", "offset": -8},
        {"location": "data", "offset": "one"},
        {"location": "data", "offset": 1 << 70},
        {"location": "data", "length": 12},
        {"location": "data", "length": HUGE},
        {"location": "data", "length": -1},
        {"location": "data", "length": "9" * 9999},
    ],
)
def test_external_data_outside_the_folder_or_beyond_the_file_are_refused(entries, folder):
    refusal(saved(external(**entries), folder))


def test_external_data_are_no_way_to_fill_the_memory(folder):
    with (folder / "large").open("wb") as file:
        file.truncate(1 << 26)
    proto = external(location="large", offset=8)
    tensor = proto.graph.initializer[0]
    for number in range(200):
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[-1].name = f"w{number}"
        proto.graph.initializer[-1].dims[0] = (1 << 26) // 16
    refusal(saved(proto, folder), "more data than")


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "data"},
        {"location": "deep/data", "offset": 8},
        {"location": "data", "offset": 8, "length": 24, "checksum": "0", "mystery": "1"},
    ],
)
def test_external_data_beside_the_model_are_read(entries, folder):
    network = load(saved(external(**entries), folder))
    (arrays,) = network.weights.values()
    first = entries.get("offset", 0) // 4
    assert arrays["weight"].ravel().tolist() == list(range(first, first + 6))


def test_external_data_of_a_constant_in_a_node_are_read_and_guarded_alike(folder):
    for location, fits in (("data", True), ("../data", False)):
        tensor = external(location=location).graph.initializer[0]
        path = saved(model([N("Constant", "", "w", value=tensor), N("Conv", "x w")], {}), folder)
        if fits:
            assert load(path).out_channels == 3
        else:
            refusal(path, "outside")


def branch(*nodes):
    return helper.make_graph(nodes, "b", [], [helper.make_empty_tensor_value_info("b")])


DEEP = branch(N("Identity", "x", "b"))
for _ in range(20):
    DEEP = branch(N("If", "c", "b", then_branch=DEEP, else_branch=branch()))
BOMB = branch(N("Identity", "x", "b"))
BOMB.initializer.add(name="w", dims=[HUGE], data_type=TensorProto.INT4, raw_data=b"12")
TENSOR = onnx.TensorProto(dims=[HUGE], data_type=TensorProto.FLOAT, raw_data=b"1234")
OUTSIDE = onnx.TensorProto(
    dims=[1],
    data_type=TensorProto.FLOAT,
    data_location=TensorProto.EXTERNAL,
    external_data=[onnx.StringStringEntryProto(key="location", value="/etc/hostname")],
)
SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.ones(1, np.float32), "v"), numpy_helper.from_array(ints(1)), [HUGE]
)
IMAGE = {"r": np.zeros(0, np.float32)}


def filled(shape, then, **constants):
    """A constant of this shape that only repeats one element, and nodes that read it as ``c``."""
    return [N("ConstantOfShape", "shape", "c"), *then], {"shape": ints(*shape), **constants}


def resize(*scales, **attributes):
    return [N("Resize", "x r s", **attributes)], {**IMAGE, "s": np.array(scales, np.float32)}


def doubled(first="x", times=40):
    return [
        N("Concat", f"{a} {a}", b, axis=1)
        for a, b in zip(
            [first, *(f"d{i}" for i in range(times))],
            [*(f"d{i}" for i in range(times)), "y"],
            strict=True,
        )
    ]


def quarters(shift):
    names = ["c1", "c2", "c3", "y"]
    ends = ["c", *names]
    return [N("Add", f"{a} {shift}", b) for a, b in zip(ends, names, strict=False)]


NODES = {
    "If": ([N("If", "c", then_branch=DEEP, else_branch=DEEP)], {"c": np.array(True)}),
    "Loop": ([N("Loop", "n c x", body=DEEP)], {"n": ints(1), "c": np.array(True)}),
    "Scan": ([N("Scan", "x", body=DEEP, num_scan_inputs=1)], {}),
    "a graph where none belongs": (
        [N("Relu", "c", "d", value=BOMB), N("Add", "x d")],
        {"c": f4(2)},
    ),
    "QLinearConv": ([N("QLinearConv", "x s z w s z s z")], {"w": np.zeros((3, 2, 1), np.int8)}),
    "a huge Constant": ([N("Constant", "", "c", value=TENSOR), N("Add", "x c")], {}),
    "a huge sparse Constant": ([N("Constant", "", "c", sparse_value=SPARSE), N("Add", "x c")], {}),
    "a Constant elsewhere": ([N("Constant", "", "c", value=OUTSIDE), N("Add", "x c")], {}),
    "ConstantOfShape": filled([HUGE], [N("Add", "x c")]),
    "ConstantOfShape of huge rank": (
        [N("ConstantOfShape", "m", "s"), N("ConstantOfShape", "s", "c"), N("Add", "x c")],
        {"m": ints(HUGE)},
    ),
    "ConstantOfShape of -1": filled([-1], [N("Add", "x c")]),
    "ConstantOfShape of a huge value": (
        [N("ConstantOfShape", "s", "c", value=TENSOR), N("Add", "x c")],
        {"s": ints(1)},
    ),
    "Expand": ([N("Expand", "o s", "c"), N("Add", "x c")], {"o": f4(2), "s": ints(HUGE, 2)}),
    "Expand by a huge shape": filled([HUGE], [N("Expand", "x c")]),
    "Expand of the volume": ([N("Expand", "x s")], {"s": ints(1, HUGE, 1, 1, 1)}),
    "Expand of one channel": (
        [N("ReduceMean", "x", "m", axes=[1]), N("Expand", "m s")],
        {"s": ints(1, HUGE, 1, 1, 1)},
    ),
    "Tile": ([N("Tile", "o t", "c"), N("Add", "x c")], {"o": f4(2), "t": ints(HUGE)}),
    "Tile by negative numbers": (
        [N("Tile", "o t", "c"), N("Add", "x c")],
        {"o": f4(1, 2), "t": ints(-1, 1 << 32)},
    ),
    "Tile by a huge shape": filled([HUGE], [N("Tile", "o c", "d"), N("Add", "x d")], o=f4(2)),
    "Tile of channels": ([N("Tile", "x t")], {"t": ints(1, HUGE, 1, 1, 1)}),
    "Tile of space": ([N("Tile", "x t")], {"t": ints(1, 1, 1, 1, HUGE)}),
    "Range": (
        [N("Range", "a b c", "r"), N("Add", "x r")],
        {"a": ints(0), "b": ints(HUGE), "c": ints(1)},
    ),
    "Range from huge arrays": filled([HUGE], [N("Range", "c c c", "r"), N("Add", "x r")]),
    "Cast of a huge array": filled([HUGE], [N("Cast", "c", "d", to=7), N("Add", "x d")]),
    "Where of huge arrays": filled([1 << 20, 1 << 20], [N("Where", "c x c")]),
    "doubled again and again": (doubled("o"), {"o": f4(2, 1 << 10)}),
    "channels doubled again and again": (doubled(), {}),
    "huge constants added": filled([1, 2, 1 << 16, 1 << 16, 1 << 16], quarters("o"), o=f4(1)),
    "Reshape by a huge shape": filled([HUGE], [N("Reshape", "x c")]),
    "Slice by huge arrays": filled([HUGE], [N("Slice", "x c c")]),
    "Squeeze by huge axes": filled([1 << 34], [N("Cast", "c", "d", to=7), N("Squeeze", "x d")]),
    "ReduceMean over huge axes": filled([1 << 34], [N("ReduceMax", "x c")]),
    "bias of huge size": filled([1 << 34], [N("Conv", "x w c")], w=f4(3, 2, 1, 1, 1)),
    "statistics of huge size": filled([1 << 34], [N("BatchNormalization", "x c c c c")]),
    "Pad of channels": ([N("Pad", "x p")], {"p": ints(0, HUGE, 0, 0, 0, 0, 0, 0, 0, 0)}),
    "Pad of 2^62": ([N("Pad", "x p")], {"p": ints(0, 0, 1 << 62, 0, 0, 0, 0, 0, 0, 0)}),
    "Pad of less than there is": ([N("Pad", "x p")], {"p": ints(*[0] * 9, -(1 << 62))}),
    "Pad of an axis twice": (
        [N("Pad", "x p v a")],
        {"p": ints(1, 1, 1, 1), "v": np.float32(0), "a": ints(2, -3)},
    ),
    "Resize by 1e9": resize(1, 1, 1e9, 1e9, 1e9),
    "Resize by 1e-9": resize(1, 1, 1e-9, 1, 1),
    "Resize by 0": resize(1, 1, 0, 1, 1),
    "Resize by -1": resize(1, 1, -1, 1, 1),
    "Resize by NaN": resize(1, 1, np.nan, 1, 1),
    "Resize by infinity": resize(1, 1, np.inf, 1, 1),
    "Resize by too few": resize(1, 1, 2),
    "Resize by too many": resize(1, 1, 1, 1, 1, 2),
    "Resize to 2^40": (
        [helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="nearest")],
        {"s": ints(1, 2, HUGE, HUGE, HUGE)},
    ),
    "Resize again and again": (
        [N("Resize", f"{a} r s", b) for a, b in zip("xabcde", "abcdey", strict=True)],
        {**IMAGE, "s": np.array([1, 1, 4096, 4096, 4096], np.float32)},
    ),
    "Gather": (
        [N("Gather", "o i", "c"), N("Add", "x c")],
        {"o": f4(1 << 16), "i": np.zeros(1 << 16, np.int64)},
    ),
    "Gather of huge indices": ([N("Gather", "x i", axis=1)], {"i": ints(HUGE)}),
    "Gather of very many channels": (
        [N("Gather", "x i", axis=1)],
        {"i": np.zeros(1 << 20, np.int64)},
    ),
    "ScatterND": ([N("ScatterND", "x i u")], {"i": ints(HUGE), "u": f4(1)}),
    "Reshape to several -1": ([N("Reshape", "x s")], {"s": ints(1, -1, -1, -1, 8)}),
    "Reshape to less than -1": ([N("Reshape", "x s")], {"s": ints(1, -2, -1, 8, 8)}),
    "Reshape to overflowing products": ([N("Reshape", "x s")], {"s": ints(1 << 32, 1 << 32)}),
    "Reshape to very many ones": ([N("Reshape", "x s")], {"s": np.ones(1 << 16, np.int64)}),
    "Reshape to zero": ([N("Reshape", "x s", allowzero=1)], {"s": ints(0, 2)}),
    "Unsqueeze of very many": ([N("Unsqueeze", "x a")], {"a": np.arange(5, 1 << 16)}),
    "groups of 0": ([N("Conv", "x w", group=0)], {}),
    "groups of -1": ([N("Conv", "x w", group=-1)], {}),
    "kernel_shape of 0": ([N("Conv", "x w", kernel_shape=[0, 0, 0])], {}),
    "weights of kernel 0": ([N("Conv", "x w")], {"w": f4(3, 2, 0, 1, 1)}),
    "weights of no channel": ([N("Conv", "x w")], {"w": f4(0, 2, 1, 1, 1)}),
    "weights of rank 7": ([N("Conv", "x w")], {"w": f4(3, 2, 1, 1, 1, 1, 1)}),
    "stride 0": ([N("Conv", "x w", strides=[0, 1, 1])], {}),
    "dilation 0": ([N("Conv", "x w", dilations=[0, 1, 1])], {}),
    "negative pads": ([N("Conv", "x w", pads=[-1] * 6)], {}),
    "pads of 2^62": ([N("Conv", "x w", pads=[1 << 62] * 6)], {}),
    "output_shape of 2^62": ([N("ConvTranspose", "x w", output_shape=[1 << 62] * 3)], {}),
    "output_padding of 2^62": ([N("ConvTranspose", "x w", output_padding=[1 << 62] * 3)], {}),
    "bias of text": ([N("Conv", "x w b")], {"b": np.array(["1"] * 3, object)}),
    "bias of complex numbers": ([N("Conv", "x w b")], {"b": np.ones(3, np.complex64)}),
    "Transpose by too few": ([N("Transpose", "x", perm=[0, 1])], {}),
    "Transpose by the same twice": ([N("Transpose", "x", perm=[0, 1, 2, 3, 3])], {}),
    "Transpose by 2^62": ([N("Transpose", "x", perm=[0, 1, 2, 3, 1 << 62])], {}),
    "Slice by steps of 0": (
        [N("Slice", "x a b a a")],
        {"a": ints(0), "b": ints(2)},
    ),
    "Slice of an axis twice": (
        [N("Slice", "x a b c")],
        {"a": ints(1, 0), "b": ints(5, 3), "c": ints(2, -3)},
    ),
    "Split by negative sizes": ([N("Split", "x n", "y z", axis=1)], {"n": ints(-1, 3)}),
    "Split into 2^40": (
        [N("Split", "o", "a b", num_outputs=HUGE), N("Add", "x a")],
        {"o": f4(2)},
    ),
    "Split of the volume into 2^40": ([N("Split", "x", "y b", axis=1, num_outputs=HUGE)], {}),
    "Split by text": ([N("Split", "x n", "y z", axis=1)], {"n": np.array(["1", "1"], object)}),
    "Mean of nothing but constants": ([N("Mean", "w w")], {}),
    "DepthToSpace by 0": ([N("DepthToSpace", "x", blocksize=0)], {}),
    "DepthToSpace by 2^40": ([N("DepthToSpace", "x", blocksize=HUGE)], {}),
    "GroupNormalization of 2^62": ([N("GroupNormalization", "x w w", num_groups=1 << 62)], {}),
    "a mode that is a number": ([N("Pad", "x p", mode=3)], {"p": ints(*[0] * 9, 1)}),
    "an axis that is no whole number": ([N("Concat", "x x", axis=1.5)], {}),
    "pads that are no whole numbers": ([N("Conv", "x w", pads=[0.5] * 6)], {}),
    "an epsilon that is text": ([N("InstanceNormalization", "x v v", epsilon="x")], {"v": f4(2)}),
    "an attribute twice": ([N("Concat", "x x", axis=1)], {}),
    "more inputs than there are": ([N("Relu", "x x")], {}),
    "Dropout in training": ([N("Dropout", "x h t")], {"h": np.float32(0.5), "t": np.array(True)}),
    "a name that is no name": ([N("", "x")], {}),
}
NODES["an attribute twice"][0][0].attribute.append(NODES["an attribute twice"][0][0].attribute[0])


@pytest.mark.parametrize("size", [None, (8, 10, 12)], ids=["open", "fixed"])
@pytest.mark.parametrize("label", NODES)
def test_an_absurd_node_is_refused(label, size, tmp_path):
    nodes, constants = NODES[label]
    proto = model(nodes, {"w": f4(3, 2, 1, 1, 1)} | constants, size=size, opset=12)
    proto.opset_import[0].version = hostile.opset_for(nodes)
    refusal(saved(proto, tmp_path))


def many_of_many():
    names = ["g", *(f"v{i}" for i in range(2000)), "y"]
    nodes = [N("Add", f"{a} o", b) for a, b in itertools.pairwise(names)]
    return [N("Gather", "x i", "g", axis=1), *nodes], {
        "i": np.zeros(1 << 16, np.int64),
        "o": np.float32(1),
    }


MISREAD = {  # once read as something else
    "the network has too many channels": many_of_many(),
    "over an axis of one element": ([N("Softmax", "x", axis=0)], {}),
    "or over the batch": (
        [N("Unsqueeze", "x a", "u"), N("LogSoftmax", "u", axis=2)],
        {"a": ints(2)},
    ),
    "single places": ([N("Gather", "x i", axis=0)], {"i": ints(0, 0)}),
    "reckons with whole numbers": (
        [
            N("Round", "x", "r"),
            N("Cast", "r", "w", to=7),
            N("Div", "w i", "d"),
            N("Cast", "d", to=1),
        ],
        {"i": np.array(2)},
    ),
    "asks where numbers are not zero": (
        [N("Round", "x", "r"), N("Cast", "r", "t", to=9), N("Cast", "t", to=1)],
        {},
    ),
    "other than real numbers": ([N("CastLike", "x i")], {"i": ints(2)}),
    "mode=linear, align_corners": resize(
        *(1, 1, 2, 0.5, 1), mode="linear", coordinate_transformation_mode="align_corners"
    ),
    "single voxel": resize(
        *(1, 1, 1, 1, 1 / 12), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"
    ),
    "mirrors more": ([N("Pad", "x p", mode="reflect")], {"p": ints(*[0] * 7, 8, 0, 0)}),
    "order y, x, z": ([N("Transpose", "x", perm=[0, 1, 3, 4, 2])], {}),
    "of one that z was reduced to": (
        [N("ReduceMax", "x", "m", axes=[2]), N("Pad", "m p")],
        {"p": ints(0, 0, 1, 0, 0, 0, 0, 0, 0, 0)},
    ),
    "reduced and others at once": (
        [
            N("ReduceMax", "x", "m", axes=[2]),
            helper.make_node("Resize", ["m", "", "", "s"], ["y"], mode="nearest"),
        ],
        {"s": ints(1, 2, 8, 20, 12)},
    ),
    "different sizes": (
        [N("ReduceMax", "x", "m", axes=[2]), N("Concat", "x m", axis=1)],
        {},
    ),
    "with auto_pad=VALID": (
        [N("MaxPool", "x", kernel_shape=[2] * 3, auto_pad="VALID", ceil_mode=1)],
        {},
    ),
    "the factor 2.00": resize(1, 1, 2, 2, 2.00390625),
    "a matrix of 60000 × 60000": (
        [N("Tile", "x often", "t"), N("LRN", "t", size=3)],
        {"often": np.array([1, 30000, 1, 1, 1])},
    ),
    "a matrix of 30000 × 60000": (
        [
            N("Tile", "x often", "t"),
            N("Reshape", "t pairs", "p"),
            N("ReduceMean", "p", axes=[2]),
        ],
        {
            "often": np.array([1, 30000, 1, 1, 1]),
            "pairs": np.array([1, 30000, 2, 8, 10, 12]),
        },
    ),
    "a matrix on a part of the channels": ([N("MatMul", "x m")], {"m": f4(12, 2)}),
    "first axis is not the batch": (
        [N("Transpose", "x", "t", perm=[4, 1, 2, 3, 0]), N("GlobalAveragePool", "t")],
        {},
    ),
    "p=3": ([N("LpNormalization", "x", axis=1, p=3)], {}),
}


@pytest.mark.parametrize("message", MISREAD)
def test_what_layers_do_not_compute_is_refused(message, tmp_path):
    nodes, constants = MISREAD[message]
    refusal(saved(model(nodes, constants, size=(8, 10, 12)), tmp_path), message)


READ = {
    "the norm of a single element": [
        N("ReduceMean", "x", "m", axes=[1]),
        N("ReduceL2", "m", axes=[1]),
    ],
    "NaN is in no order": [
        N("Log", "x", "l"),
        N("LessOrEqual", "l o", "a"),
        N("GreaterOrEqual", "l o", "b"),
        N("Or", "a b", "c"),
        N("Where", "c x o"),
    ],
    "norms that are zero": [
        N("Abs", "x", "a"),
        N("Neg", "a", "n"),
        N("Relu", "n", "p"),
        N("LpNormalization", "p", "l", axis=1),
        N("Add", "l o"),
    ],
    "whole numbers that are added": [
        N("Round", "x", "n"),
        N("Cast", "n", "w", to=7),
        N("Add", "w i", "a"),
        N("Max", "a w", "b"),
        N("Cast", "b", to=1),
    ],
    "voxels left out, of two in the middle the second taken": [
        N("Resize", "x r s", nearest_mode="round_prefer_ceil")
    ],
    "one constant in several places": [
        N("Where", "t o o", "w"),
        N("Concat", "w w", "v", axis=0),
        N("ReduceMax", "v", "m"),
        N("Mul", "x m"),
    ],
}


@pytest.mark.parametrize("label", READ)
def test_what_was_once_misread_or_refused_is_what_onnx_says(label, tmp_path):
    constants = {"o": np.float32([1]), "i": np.array(2), "t": np.array([True])}
    constants |= {**IMAGE, "s": np.array([1, 1, 0.5, 1, 0.25], np.float32)}
    proto = model(READ[label], constants, size=(8, 10, 12))
    x = f4(1, 2, 8, 10, 12)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0][0]
    network = load(saved(proto, tmp_path))
    np.testing.assert_allclose(oracle.whole(network, x[0]), want, rtol=1e-4, atol=1e-5)


def test_an_int8_network_is_refused_by_its_operators_names(tmp_path):
    nodes = [
        N("QuantizeLinear", "x s z", "q"),
        N("QLinearConv", "q s z w s z s z", "r"),
        N("DequantizeLinear", "r s z"),
    ]
    constants = {"w": np.ones((3, 2, 1, 1, 1), np.int8), "s": np.float32(1), "z": np.int8(0)}
    text = refusal(saved(model(nodes, constants), tmp_path))
    for name in ("the_QuantizeLinear", "the_QLinearConv", "the_DequantizeLinear"):
        assert name in text


def test_voxels_moved_into_channels_do_not_become_millions_of_layers(tmp_path):
    nodes = [
        N("Reshape", "x split", "s"),
        N("Transpose", "s", "t", perm=[0, 1, 3, 5, 7, 2, 4, 6]),
        N("Reshape", "t joined", "j"),
        N("Relu", "j"),
    ]
    split = ints(1, 2, 4, 1024, 4, 1024, 4, 1024)
    constants = {"split": split, "joined": ints(1, 2 << 30, 4, 4, 4)}
    refusal(saved(model(nodes, constants, size=(4096,) * 3), tmp_path))


@pytest.mark.parametrize("named", ["", "same"])
@pytest.mark.parametrize(
    "step",
    [
        lambda a, b: N("Relu", a, b),
        lambda a, b: N("Conv", f"{a} w", b),
        lambda a, b: N("MaxPool", a, b, kernel_shape=[1] * 3, strides=[1, 1, 2]),
    ],
    ids=["Relu", "Conv", "MaxPool"],
)
@pytest.mark.every(5)
def test_a_chain_of_ten_thousand_nodes_is_read_in_seconds(step, named, tmp_path):
    names = ["x", *(f"v{i}" for i in range(9_999)), "y"]
    nodes = [step(a, b) for a, b in itertools.pairwise(names)]
    for node in nodes:
        node.name = named
    proto = model(nodes, {"w": np.ones((2, 2, 1, 1, 1), np.float32)}, size=(8, 10, 12))
    path = saved(proto, tmp_path)
    with Bounds():
        try:
            assert len(load(path).nodes) == 10_001
        except NetworkError:
            assert nodes[0].op_type == "MaxPool"


def test_ten_thousand_folded_nodes_are_read_in_seconds(tmp_path):
    names = ["o", *(f"v{i}" for i in range(4_999)), "c"]
    nodes = [N("Neg", a, b) for a, b in itertools.pairwise(names)]
    path = saved(model([*nodes, N("Add", "x c")], {"o": f4(2, 1, 1, 1)}), tmp_path)
    with Bounds():
        load(path)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    refusal(path)  # missing
    path.mkdir()
    refusal(path)
    path.rmdir()
    path.symlink_to(path)
    refusal(path)
    path.unlink()
    path.write_text("a network, or so it says\n" * 100)
    refusal(path)
    path.write_bytes(pickle.dumps({"weights": list(range(1000))}))
    refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    refusal(path)
    with path.open("wb") as file:
        file.truncate(100_000_000)
    refusal(path)


def test_names_that_are_no_text_are_refused(tmp_path):
    data = changed(lambda proto: None).SerializeToString()
    path = tmp_path / "m.onnx"
    for name in (b"the_Conv", b"Conv", b"x", b"w", b"y"):
        path.write_bytes(data.replace(name, b"\xff" * len(name)))
        refusal(path)


def test_graphs_nested_beyond_measure_are_refused(tmp_path):
    data = branch(N("Identity", "x", "b")).SerializeToString()
    for _ in range(5000):  # a graph in an attribute of a node of a graph
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            data = tag + hostile.varint(len(data)) + data
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x3a" + hostile.varint(len(data)) + data)
    refusal(path)


# Fuzzing: whatever a file says, it is a network or is refused; and a network computes what the
# file says.


MODELS = [*hostile.handmade()]
MODELS += [to_onnx(graphs.graph(family, 0)) for family in ("chain", "valid_unet", "residual")]
NAMES = sorted({*OPERATORS, *FOLDED, "If", "Mystery"})
MOST_VALUES = 1 << 21
LARGEST = 1e6


def small_size(network, proto):
    """The size that the model declares, or a small one that passes through the network."""
    dims = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][2:]
    fixed = [1] * (3 - len(dims)) + dims if dims else [0, 0, 0]
    chosen = []
    for axis, n in enumerate(fixed):
        tried = [n] if n else [12 * (axis + 1), 36, *range(5 + axis, 40)]
        fits = [m for m in tried if sizes_of(network, axis, m)]
        if not fits:
            return None
        chosen.append(fits[0])
    sizes = [sizes_of(network, axis, n) for axis, n in enumerate(chosen)]
    values = [
        network.channels[node.name]
        * int(np.prod([s[node.name] for s in sizes], dtype=object))
        * max(
            node.layer.multiply_adds() // network.channels[node.name],
            int(np.prod([node.layer.window(axis).extent for axis in range(3)], dtype=object)),
        )
        for node in network
    ]
    return tuple(chosen) if sum(values) < MOST_VALUES * 16 else None


def agree(got, want):
    """Whether arrays agree but for a few values that rounding may turn over."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.size != want.size:
        return False
    if [n for n in got.shape if n > 1] != [n for n in want.shape if n > 1]:
        got, want = np.sort(got, None), np.sort(want, None)  # axes that were moved
    got, want = got.ravel(), want.ravel()
    scale = 1 + np.abs(want)
    near = np.abs(got - want) <= 2e-3 * scale
    odd = ~np.isfinite(want) | ~np.isfinite(got) | (np.abs(want) > 1e30)
    return np.mean(near | odd) > 0.97


def doubtful(node, opset, open_size):
    """Where ONNX's reference departs from what ONNX says, or a layer means sizes that strides
    divide: then there is nothing to compare with."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    pads = next((list(a.ints) for a in node.attribute if a.name == "pads"), [])
    uneven = pads[: len(pads) // 2] != pads[len(pads) // 2 :]
    same = found.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
    match node.op_type:
        case "MaxPool" | "AveragePool":
            valid = found.get("auto_pad") == b"VALID"
            return uneven or same or valid or found.get("ceil_mode")
        case "Conv" | "ConvTranspose":
            return same and open_size
        case "GlobalMaxPool":
            return True
        case "LpNormalization":
            return found.get("p") == 1
        case "BatchNormalization":
            return opset < 14
        case "Softmax" | "LogSoftmax":
            return opset < 13
    return False


def reference(proto, x):
    """What ONNX's own reference makes of a sound file; None of any other."""
    opset = proto.opset_import[0].version
    open_size = not all(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[2:])
    if any(doubtful(node, opset, open_size) for node in proto.graph.node):
        return None
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        onnx.checker.check_model(inferred)
        return ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x})
    except Exception:
        return None


def check(data, folder):
    """Returns how far the file came."""
    path = folder / "m.onnx"
    path.write_bytes(data)
    try:
        with Bounds(), np.errstate(all="ignore"):
            network = load(path)
    except NetworkError:
        return "refused"
    name = next(iter(network.outputs))
    network = network.only(name)
    with Bounds(), suppress(NetworkError):
        geometry(network)
    proto = onnx.load_from_string(data)
    size = small_size(network, proto)
    if size is None or network.in_channels > 64:
        return "loaded"
    x = np.random.default_rng(0).standard_normal((network.in_channels, *size)).astype(np.float32)
    with np.errstate(all="ignore"):
        try:
            got = patchwise.apply(network, x)
        except NetworkError:
            return "not applied"
        want = oracle.whole(network, x)
        assert got.shape == want.shape
        assert agree(got, want), "the network computes something else than the oracle"
        dims = proto.graph.input[0].type.tensor_type.shape.dim
        if dims and not (dims[0].dim_value in (0, 1) and dims[1].dim_value == network.in_channels):
            return "computed"
        shape = (1, network.in_channels, *size[3 - (len(dims) or 5) + 2 :])
        made = None
        weights = [w for arrays in network.weights.values() for w in arrays.values()]
        if all(np.abs(w).max() < LARGEST for w in weights):  # else float32 overflows on the way
            made = reference(proto, x.reshape(shape))
    if made is None:
        return "computed"
    index = [output.name for output in proto.graph.output].index(name)
    assert agree(want, made[index]), "the network computes something else than the file says"
    return "compared"


def bytes_changed(random):
    return hostile.with_bytes_changed(random, random.choice(MODELS).SerializeToString())


def structure_changed(random):
    proto = random.choice(MODELS)
    return hostile.with_structure_changed(random, proto, NAMES).SerializeToString()


def chained(random):
    return hostile.Chain(random).proto().SerializeToString()


def chained_and_changed(random):
    proto = hostile.Chain(random).proto()
    return hostile.with_structure_changed(random, proto, NAMES).SerializeToString()


WAYS = {
    "bytes": (bytes_changed, 400),
    "structure": (structure_changed, 400),
    "chains": (chained, 600),
    "changed chains": (chained_and_changed, 300),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_random_file_is_refused_or_computes_what_it_says(way, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    make, examples = WAYS[way]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, (1 << 32) - 1))
    def every(seed):
        check(make(Random(seed)), folder)

    every()
