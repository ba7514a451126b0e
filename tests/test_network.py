"""Networks as values: sound or refused, the same after a rewrite or a trip to disk."""

from __future__ import annotations

import numpy as np
import pytest

import graphs
import oracle
from znni_dask.errors import NetworkError
from znni_dask.importers import load_network, onnx, znni
from znni_dask.importers.to_onnx import save
from znni_dask.network import layers
from znni_dask.network.build import Builder
from znni_dask.network.chains import PAPER_NETWORKS
from znni_dask.network.field_of_view import geometry
from znni_dask.network.network import Network, Node
from znni_dask.network.rewrites import simplify


def test_a_few_lines_of_python_build_a_network():
    b = Builder(channels=1)
    x = b.relu(b.conv(b.input, 8, kernel=3))
    x = b.max_pool(x, 2)
    network = b.network(b.conv(x, 2, kernel=(1, 3, 3)))
    assert network.out_channels == 2
    assert geometry(network).field_of_view == (4, 8, 8)
    assert geometry(network).dense


def test_layers_that_nothing_reads_are_left_out():
    b = Builder(1)
    x = b.conv(b.input, 2, 3)
    b.relu(x)
    assert len(b.network(x).nodes) == 2


@pytest.mark.parametrize(
    ("nodes", "output", "message"),
    [
        ([], "x", "begins with its Input"),
        ([Node("a", layers.Activation("relu"))], "a", "begins with its Input"),
        ([Node("i", layers.Input(1)), Node("a", layers.Activation("relu"), ("b",))], "a", "'b'"),
        ([Node("i", layers.Input(1)), Node("i", layers.Activation("relu"), ("i",))], "i", "two"),
        ([Node("i", layers.Input(1))], "z", "not a layer"),
        (
            [
                Node("i", layers.Input(1)),
                Node("j", layers.Input(1)),
                Node("a", layers.Arithmetic("add"), ("i", "j")),
            ],
            "a",
            "second Input",
        ),
        (
            [Node("i", layers.Input(1)), Node("a", layers.Activation("relu"), ("i",))],
            "i",
            "nothing reads the layer 'a'",
        ),
        (
            [Node("i", layers.Input(3)), Node("a", layers.Select((1, 4)), ("i",))],
            "a",
            "1, 4 chosen out of 3",
        ),
    ],
)
def test_an_unsound_graph_is_refused(nodes, output, message):
    with pytest.raises(NetworkError, match=message):
        Network(tuple(nodes), {"y": output}, {})


def test_weights_of_the_wrong_shape_type_or_value_are_refused():
    nodes = (Node("i", layers.Input(1)), Node("c", layers.Conv(1, 2, (1, 1, 1)), ("i",)))
    good = {"weight": np.zeros((2, 1, 1, 1, 1), "f4"), "bias": np.zeros(2, "f4")}
    Network(nodes, {"y": "c"}, {"c": good})
    with pytest.raises(NetworkError, match="wants weights"):
        Network(nodes, {"y": "c"}, {"c": {**good, "bias": np.zeros(3, "f4")}})
    with pytest.raises(NetworkError, match="float64"):
        Network(nodes, {"y": "c"}, {"c": {**good, "bias": np.zeros(2)}})
    with pytest.raises(NetworkError, match="NaN"):
        Network(nodes, {"y": "c"}, {"c": {**good, "bias": np.full(2, np.nan, "f4")}})


def test_branches_of_different_sampling_are_refused():
    b = Builder(1)
    with pytest.raises(NetworkError, match="down- and up-sampled alike"):
        b.network(b.plus(b.max_pool(b.input, 2), b.input))


def test_branches_that_never_fit_are_refused():
    b = Builder(1)
    network = b.network(b.plus(b.conv(b.input, 1, 3), b.input))
    with pytest.raises(NetworkError, match="no input size"):
        geometry(network)


def test_strided_branches_that_never_fit_are_refused_though_dense_ones_would():
    b = Builder(1)
    network = b.network(b.plus(b.conv(b.input, 1, 3, stride=2), b.conv(b.input, 1, 1, stride=2)))
    with pytest.raises(NetworkError, match="no input size"):
        geometry(network)


def test_a_crop_larger_than_the_field_of_view_is_no_reason_to_refuse():
    b = Builder(1)
    x = b.max_pool(b.max_pool(b.input, 2), 2)
    assert geometry(b.network(b.crop(x, 3))).field_of_view == (4, 4, 4)
    b = Builder(1)
    x = b.crop(b.conv(b.input, 1, 3, padding="same"), 10)
    assert geometry(b.network(x)).axes[0].shrink == 20


def test_padding_by_nothing_changes_nothing():
    b = Builder(1)
    x = b.add(layers.Pad(((0, 0, 0), (0, 0, 0))), b.conv(b.input, 1, 3))
    assert geometry(b.network(b.max_pool(x, 2))).dense


@pytest.mark.parametrize(
    "make",
    [
        lambda b: b.conv(b.input, 3, 3, groups=2),
        lambda b: b.conv(b.input, 4, 3, stride=0),
        lambda b: b.conv(b.input, 4, 3, dilation=1 << 40),
        lambda b: b.conv_transpose(b.input, 3, 2, groups=2),
        lambda b: b.max_pool(b.input, 2, padding=2),
        lambda b: b.max_pool(b.input, (0, 2, 2)),
    ],
)
def test_layers_that_make_no_sense_are_refused(make):
    with pytest.raises(NetworkError):
        make(Builder(2))


def test_absurd_alignments_are_refused_at_once():
    b = Builder(1)
    x = b.input
    for stride in (997, 991, 983):
        x = b.max_pool(x, stride, padding=1)
    with pytest.raises(NetworkError, match="taken for a mistake"):
        geometry(b.network(x))


@pytest.mark.parametrize(
    ("name", "field", "weights"),
    [
        ("n337", 85, 871_603),
        ("n537", 163, 4_035_603),
        ("n726", 117, 8_880_803),
        ("n926", 155, 18_878_723),
    ],
)
def test_the_papers_networks_have_the_published_fields_of_view(name, field, weights):
    network = PAPER_NETWORKS[name]()
    assert geometry(network).field_of_view == (field,) * 3
    assert (network.in_channels, network.out_channels) == (1, 3)
    assert network.parameters == weights
    assert network.fingerprint == PAPER_NETWORKS[name]().fingerprint


def depends_on(network, axis, size):
    """By trial: which inputs along ``axis`` change which outputs (the oracle, one voxel wide)."""
    shape = [geometry(network).axes[a].valid_sizes(1)[0] for a in range(3)]
    shape[axis] = size
    random = np.random.default_rng(0)
    x = random.standard_normal((network.in_channels, *shape))
    field = [axis.shrink + 1 for axis in geometry(network).axes]

    def apply(network, x):
        if geometry(network).dense:
            return oracle.dense(network, x, field)
        return oracle.whole(network, x)

    base = apply(network, x)
    pairs = []
    for i in range(size):
        y = x.copy()
        np.moveaxis(y, 1 + axis, 0)[i] += random.standard_normal(
            y.shape[:1] + tuple(n for a, n in enumerate(shape) if a != axis)
        )
        change = np.abs(apply(network, y) - base).max(
            axis=tuple(a for a in range(4) if a != 1 + axis)
        )
        pairs += [(i, int(q)) for q in np.nonzero(change)[0]]
    return pairs


def linear(network):
    """The network without what can hide a dependence: no pooling maximum, no dead ReLU."""
    nodes, weights = [], {}
    for node in network:
        layer = node.layer
        if isinstance(layer, layers.Activation):
            layer = layers.Activation("tanh")
        nodes.append(Node(node.name, layer, node.inputs))
        weights[node.name] = {
            k: np.abs(w) for k, w in network.weights.get(node.name, {}).items() if k != "slope"
        }
    return Network(tuple(nodes), network.outputs, {k: v for k, v in weights.items() if v})


@pytest.mark.parametrize(
    ("family", "seed"),
    [("chain", 1), ("residual", 2), ("unet", 0), ("valid_unet", 0), ("strided", 0), ("even", 0)],
)
@pytest.mark.parametrize("axis", [0, 2])
def test_the_field_of_view_is_what_trial_finds(family, seed, axis):
    network = linear(graphs.graph(family, seed))
    found = geometry(network).axes[axis]
    size = found.valid_sizes(1)[0]
    while size < found.field_of_view + 2 * found.alignment or not found.output_size(size):
        size += 1
    pairs = depends_on(network, axis, size)
    reach = {}
    for i, q in pairs:
        low, high = reach.get(q, (i, i))
        reach[q] = (min(low, i), max(high, i))
    assert max(high - low + 1 for low, high in reach.values()) <= found.field_of_view
    if family in ("residual", "even"):  # no maximum hides anything: exactly
        assert max(high - low + 1 for low, high in reach.values()) == found.field_of_view


@pytest.mark.parametrize("n", range(1, 80))
def test_valid_sizes_are_those_that_the_oracle_maps(n):
    network = graphs.graph("valid_unet", 0)
    axis = geometry(network).axes[0]
    try:
        shape = oracle.whole(network, np.zeros((1, n, 24, 20))).shape
        fits = min(shape) > 0
    except ValueError:
        fits = False
    assert bool(axis.output_size(n)) == fits
    if fits:
        assert axis.output_size(n) == shape[1]


@pytest.mark.parametrize(("family", "seed"), graphs.ALL[::3])
def test_a_network_is_the_same_after_a_trip_through_onnx(family, seed, tmp_path):
    network = graphs.graph(family, seed)
    save(network, tmp_path / "network.onnx")
    back = load_network(tmp_path / "network.onnx")
    assert back.nodes == network.nodes
    assert back.fingerprint == network.fingerprint


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_normalisation_and_relu_fold_into_the_convolution_before_them(transposed, groups):
    b = Builder(4, seed=1)
    x = (b.conv_transpose if transposed else b.conv)(b.input, 6, 2, stride=2, groups=groups)
    random = np.random.default_rng(0)
    scale, shift = random.uniform(0.5, 2, 6), random.standard_normal(6)
    x = b.add(layers.Affine(6), x, weights={"scale": scale, "shift": shift})
    network = b.network(b.relu(x))
    folded = simplify(network)
    assert len(folded.nodes) == len(network.nodes) - (1 if transposed else 2)
    volume = random.standard_normal((4, 4, 6, 8))
    np.testing.assert_allclose(
        oracle.whole(folded, volume), oracle.whole(network, volume), rtol=1e-5, atol=1e-6
    )


def test_relu_folds_into_the_sum_before_it_where_that_has_no_other_reader(tmp_path):
    for others in (False, True):
        b = Builder(3)
        x = b.plus(b.input, b.conv(b.input, 3, 1))
        y = b.relu(x)
        network = b.network(b.plus(x, y) if others else y)
        folded = simplify(network)
        assert len(folded.nodes) == len(network.nodes) - (not others)
        volume = np.random.default_rng(0).standard_normal((3, 2, 3, 4))
        np.testing.assert_allclose(
            oracle.whole(folded, volume), oracle.whole(network, volume), rtol=1e-6
        )
        save(folded, tmp_path / "folded.onnx")
        assert simplify(load_network(tmp_path / "folded.onnx")).nodes[-1].layer == (
            folded.nodes[-1].layer
        )


def test_an_affine_map_stays_where_its_convolution_has_another_reader():
    b = Builder(1)
    x = b.conv(b.input, 2, 1)
    y = b.add(layers.Affine(2), x, weights={"scale": [2, 3], "shift": [0, 1]})
    network = b.network(b.concat(x, y))
    assert simplify(network).nodes == network.nodes


ZNNI = "INPUTS:1, LAYERS:4\nCONV 2,2,2 8\nFOOL 2,2,2\nCONV 3,3,3 8\nCONV 1,3,3 3\n"


def test_znni_text_files(tmp_path):
    path = tmp_path / "small.znni"
    path.write_text(ZNNI)
    network = load_network(path)
    kinds = [node.layer.kind for node in network]
    assert kinds == ["Input", "Conv", "relu", "MaxPool", "Conv", "relu", "Conv", "relu"]
    assert geometry(network).field_of_view == (7, 11, 11)
    assert network.fingerprint == znni.load(path, seed=0).fingerprint
    assert network.fingerprint != znni.load(path, seed=1).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("hello\n", "first line"),
        ("INPUTS:1, LAYERS:2\nCONV 3,3,3 8\n", "LAYERS:2 promised, 1 layers found"),
        ("INPUTS:1, LAYERS:1\nCONV 3,3 8\n", "line 2"),
        ("INPUTS:1, LAYERS:1\nCONV 0,3,3 8\n", "size of zero"),
        ("INPUTS:0, LAYERS:1\nCONV 3,3,3 8\n", "needs inputs"),
        ("INPUTS:1, LAYERS:1\nCONV 999,999,999 99999\n", "taken for a mistake"),
    ],
)
def test_a_bad_znni_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "bad.znni"
    path.write_text(text)
    with pytest.raises(NetworkError, match=message):
        load_network(path)


def test_a_missing_or_foreign_network_is_refused(tmp_path):
    with pytest.raises(NetworkError, match="no network at"):
        load_network(tmp_path / "none.onnx")
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n not a network at all")
    with pytest.raises(NetworkError, match=r"foreign\.onnx"):
        load_network(foreign)
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    with pytest.raises(NetworkError, match="no network at"):
        load_network(folder)


def test_a_truncated_onnx_file_is_refused_wherever_it_is_cut(tmp_path):
    whole = tmp_path / "whole.onnx"
    save(graphs.graph("unet", 0), whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.onnx"
    for length in [0, 1, 7, *range(20, len(data), len(data) // 40), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(NetworkError, match=r"cut\.onnx"):
            onnx.load(cut)
