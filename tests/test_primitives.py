"""Every row of the table passes the same contract: shapes, oracle, refusals, memory."""

from __future__ import annotations

from functools import cache, partial
from itertools import chain, product
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

import oracle
from peaks import traced_peak
from znni_dask.geometry import Box, tiles
from znni_dask.kernels import compiled, from_few, patch_matrix, winograd
from znni_dask.kernels import planes as planes_kernel
from znni_dask.kernels import rows as rows_kernel
from znni_dask.kernels import tiles as tiles_kernel
from znni_dask.kernels.code import LANES
from znni_dask.kernels.direct import SLACK_BYTES
from znni_dask.kernels.memory import allocate, allocated_bytes
from znni_dask.kernels.team import Team
from znni_dask.machine import CPU
from znni_dask.network import layers
from znni_dask.network.layers import NO_PADDING
from znni_dask.primitives import (
    conv_fft_tiles,
    conv_img2row,
    conv_winograd,
    pointwise,
    pooling,
    reducing,
)
from znni_dask.primitives import rows as rows_of_outputs
from znni_dask.primitives.base import Form, Problem
from znni_dask.primitives.conv_fft_planes import ConvPlanesFFT
from znni_dask.primitives.conv_fft_tiles import ConvTiledFFT
from znni_dask.primitives.conv_winograd import ConvWinograd
from znni_dask.primitives.forms import FormChange
from znni_dask.primitives.fragments import recombine
from znni_dask.primitives.table import TABLE, candidates, named, table

SIZE = (9, 14, 37)
ODD = ((1, 0, 2), (0, 2, 1))
JOINS = get_args(layers.Join)
REDUCTIONS = get_args(layers.Reduction)
LAYERS = {
    "conv": (layers.Conv(3, 5, (3, 3, 3)), 1),
    "conv even": (layers.Conv(2, 3, (2, 4, 2)), 1),
    "conv padded": (layers.Conv(3, 6, (3, 3, 3), padding=((1, 1, 1), (1, 1, 1))), 1),
    "conv odd padding": (layers.Conv(1, 2, (2, 3, 4), padding=ODD), 1),
    "conv strided": (layers.Conv(2, 4, (3, 3, 3), stride=(2, 1, 3), padding=ODD), 1),
    "conv strided by more than taps": (layers.Conv(5, 2, (1, 2, 7), stride=(2, 3, 2)), 1),
    "conv strided dilated": (
        layers.Conv(19, 18, (3, 3, 4), (2, 1, 2), (1, 2, 3), ODD, relu=True),
        1,
    ),
    "conv dilated": (layers.Conv(2, 3, (2, 3, 3), dilation=(3, 2, 4)), 1),
    "conv dilated padded": (
        layers.Conv(2, 3, (1, 3, 5), dilation=(1, 2, 3), padding=((0, 2, 6), (0, 2, 6))),
        1,
    ),
    "conv mostly of padding": (
        layers.Conv(18, 20, (3, 3, 3), dilation=(9, 14, 1), padding=((9, 14, 2), (9, 14, 2))),
        1,
    ),
    "conv grouped": (layers.Conv(6, 9, (1, 3, 3), groups=3), 1),
    "conv in groups of blocks": (layers.Conv(96, 64, (2, 3, 1), groups=2, padding=ODD), 1),
    "conv in groups of parts of blocks": (layers.Conv(20, 25, (1, 3, 2), groups=5, relu=True), 1),
    "conv depthwise": (layers.Conv(4, 4, (3, 3, 1), groups=4, padding=ODD), 1),
    "conv depthwise blocks": (
        layers.Conv(21, 21, (2, 3, 3), (1, 2, 1), (1, 1, 2), ODD, groups=21, relu=True),
        1,
    ),
    "conv 1": (layers.Conv(7, 11, (1, 1, 1)), 1),
    "conv blocks": (layers.Conv(17, 33, (3, 2, 3), padding=ODD, relu=True), 1),
    "conv in parts": (layers.Conv(20, 40, (2, 3, 5), padding=ODD), 1),
    "conv to few": (layers.Conv(35, 3, (2, 3, 3), padding=ODD, relu=True), 1),
    "conv 1 padded": (layers.Conv(18, 4, (1, 1, 1), padding=ODD), 1),
    "conv strided relu": (layers.Conv(2, 5, (3, 3, 3), (1, 2, 2), padding=ODD, relu=True), 1),
    "conv 5 wide": (layers.Conv(1, 1, (1, 1, 5)), 1),
    "transposed": (layers.ConvTranspose(3, 4, (2, 2, 2), stride=(2, 2, 2)), 1),
    "transposed overlapping": (
        layers.ConvTranspose(4, 6, (3, 4, 5), (1, 2, 3), padding=((1, 1, 0), (0, 1, 2)), groups=2),
        1,
    ),
    "transposed gaps": (layers.ConvTranspose(2, 2, (1, 2, 2), stride=(2, 3, 2)), 1),
    "transposed dilated": (
        layers.ConvTranspose(2, 3, (2, 2, 3), stride=(2, 1, 2), dilation=(2, 3, 1)),
        1,
    ),
    "transposed blocks": (
        layers.ConvTranspose(18, 33, (3, 2, 4), (2, 1, 3), padding=((1, 0, 1), (0, 1, 2))),
        1,
    ),
    "transposed output padding": (
        layers.ConvTranspose(2, 2, (3, 3, 3), stride=(2, 2, 2), padding=((1, 1, 1), (0, 0, -1))),
        1,
    ),
    "pool": (layers.MaxPool((2, 2, 2), (2, 2, 2)), 1),
    "pool overlapping": (layers.MaxPool((3, 2, 3), (2, 1, 2)), 1),
    "pool padded": (layers.MaxPool((3, 3, 3), (2, 2, 2), padding=((1, 1, 1), (1, 1, 1))), 1),
    "pool dilated": (layers.MaxPool((2, 2, 2), (1, 2, 1), dilation=(2, 1, 3)), 1),
    "pool dilated padded": (
        layers.MaxPool((2, 3, 3), (1, 1, 2), dilation=(1, 2, 2), padding=((0, 1, 2), (1, 1, 0))),
        1,
    ),
    "pool of five": (layers.MaxPool((5, 1, 5), (2, 1, 3)), 1),
    "pool rounded up": (
        layers.MaxPool((2, 3, 2), (2, 2, 3), padding=((0, 1, 0), (0, 0, 1)), ceil=True),
        1,
    ),
    "mean": (layers.AveragePool((2, 2, 3), (2, 1, 3)), 1),
    "mean along all axes": (layers.AveragePool((2, 2, 2), (2, 2, 2)), 1),
    "mean overlapping": (layers.AveragePool((3, 2, 3), (2, 1, 2), dilation=(1, 3, 2)), 1),
    "mean padded": (layers.AveragePool((3, 3, 3), (2, 2, 1), padding=((1, 1, 1), (1, 0, 1))), 1),
    "mean of padding": (
        layers.AveragePool(
            (3, 3, 3), (2, 2, 1), padding=((1, 1, 1), (1, 0, 1)), count_padding=True
        ),
        1,
    ),
    "mean rounded up": (layers.AveragePool((3, 2, 3), (2, 3, 2), ceil=True), 1),
    "mean of padding rounded up": (
        layers.AveragePool(
            (3, 2, 3), (2, 3, 2), padding=((1, 0, 1), (1, 1, 1)), ceil=True, count_padding=True
        ),
        1,
    ),
    "affine": (layers.Affine(4), 1),
    **{
        name: (layers.Activation(name, 0.7, 1.1, width=3 if name == "prelu" else 0), 1)
        for name in layers.FUNCTIONS
    },
    "cubed": (layers.Activation("pow", 3.0), 1),
    "softmax": (layers.Softmax(), 1),
    "log softmax": (layers.Softmax(log=True), 1),
    "softmax over space": (layers.Softmax("yx"), 1),
    "log softmax over space": (layers.Softmax("zyx", log=True), 1),
    **{
        name: (layers.Arithmetic(name), 3 if name in ("add", "max", "where") else 2)
        for name in JOINS
    },
    "sum of three, relu": (layers.Arithmetic("add", relu=True), 3),
    "where, relu": (layers.Arithmetic("where", relu=True), 3),
    "concat": (layers.Concat(), 3),
    "broadcast": (layers.Broadcast(), 2),
    "pad": (layers.Pad(ODD, -1.5), 1),
    "pad edge": (layers.Pad(((2, 1, 3), (0, 2, 4)), mode="edge"), 1),
    "pad reflect": (layers.Pad(((2, 1, 3), (3, 2, 4)), mode="reflect"), 1),
    "crop": (layers.Crop((1, 0, 3), (2, 5, 0)), 1),
    "channels": (layers.Select((1, 2)), 1),
    "channels shuffled": (layers.Select((3, 0, 0, 2, 1)), 1),
    "nearest": (layers.Resize((1, 2, 3)), 1),
    "linear": (layers.Resize((2, 1, 3), "half_pixel"), 1),
    "linear by 4": (layers.Resize((1, 5, 4), "half_pixel"), 1),
    "linear asymmetric": (layers.Resize((1, 3, 2), "asymmetric"), 1),
    "linear corners": (layers.Resize((2, 3, 4), "align_corners"), 1),
    "depth to space": (layers.DepthToSpace((1, 2, 2)), 1),
    "depth to space by 4": (layers.DepthToSpace((1, 4, 1)), 1),
    **{f"{name} of channels": (layers.Reduce(name, "c"), 1) for name in REDUCTIONS},
    **{f"{name} of space": (layers.Reduce(name, "zyx"), 1) for name in REDUCTIONS[:-1]},
    "mean of planes": (layers.Reduce("mean", "yx"), 1),
    "instance norm": (layers.Normalize(4, 4, "zyx"), 1),
    "instance norm of planes": (layers.Normalize(4, 4, "yx", 0.1), 1),
    "group norm": (layers.Normalize(6, 3, "zyx"), 1),
    "layer norm": (layers.Normalize(4, 1, "zyx"), 1),
    "layer norm of voxels": (layers.Normalize(4, 1, ""), 1),
    "group norm of voxels": (layers.Normalize(6, 2, ""), 1),
    "whole": (layers.Conv(3, 4, SIZE, whole="zyx"), 1),
    "whole with relu": (layers.Conv(3, 4, SIZE, whole="zyx", bias=False, relu=True), 1),
    "whole sections": (layers.Conv(3, 4, (1, *SIZE[1:]), whole="yx"), 1),
    "conv without bias": (layers.Conv(2, 3, (1, 1, 3), bias=False), 1),
    "transposed without bias": (
        layers.ConvTranspose(2, 3, (1, 1, 2), stride=(1, 1, 2), bias=False),
        1,
    ),
}
POSITIVE = ("log", "sqrt", "pow", "reciprocal", "div")
TILES = (
    *(ConvTiledFFT((5, 8, 12)), ConvTiledFFT((10, 15, 28)), ConvTiledFFT((1, 6, 8))),
    ConvTiledFFT((5, 12, 10), remade=True),
    *(ConvPlanesFFT((8, 12)), ConvPlanesFFT((15, 28))),
)


def rows(layer):
    """All primitives that take a layer; of those that come in sizes a few."""
    return candidates(layer) + [sized for sized in TILES if sized.refusal(layer) is None]


CASES = [
    (label, primitive.name) for label, (layer, _) in LAYERS.items() for primitive in rows(layer)
]
LONG = [  # transforms of arrays that are mostly padding, or of many channels
    *(("conv in groups of blocks", "whole fft"), ("conv mostly of padding", "whole fft")),
]
SHORTER = [
    pytest.param(*case, 3, marks=[pytest.mark.thorough])
    if any(case[0] == label and case[1].startswith(name) for label, name in LONG)
    else (*case, 3)
    for case in CASES
]
ONE_OF_EACH = list({named(n, LAYERS[label][0]): (label, n) for label, n in CASES}.values())
"""How many threads there are has to do with the primitive alone: of each, one case has one."""


def forms_of(primitive, layer, channels):
    """The forms of input and output in which a primitive can be asked: one pair, or both."""
    takes, makes = primitive.forms(layer, channels)
    if takes is not None:
        return [(takes, makes)]
    return [(form, makes or form) for form in Form]


def slack(array):
    """A copy that may be read a little beyond its end, as arrays in an arena may."""
    memory = allocate(array.nbytes + SLACK_BYTES)
    copy = memory[: array.nbytes].view(np.float32).reshape(array.shape)
    copy[...] = array
    return copy


def formed(forms, arrays, out):
    """Inputs in the form that a primitive takes, beyond their channels NaN; and what takes the
    output."""
    takes, makes = forms
    given = []
    for array in arrays:
        stored = np.full(takes.stored(array.shape), np.nan, np.float32)
        if takes is Form.PLAIN:
            stored[...] = array
        else:
            for c in range(array.shape[1]):
                stored[:, c // LANES, ..., c % LANES] = array[:, c]
        given.append(slack(stored))
    return given, slack(np.full(makes.stored(out), np.nan, np.float32))


def plain(stored, shape):
    """What a primitive made, as a plain array."""
    if stored.ndim == 5:
        return stored
    channels = [stored[:, c // LANES, ..., c % LANES] for c in range(shape[1])]
    return np.stack(channels, axis=1)


def cut(array, parts):
    """The part of an input; of an axis of one voxel, that voxel."""
    parts = [p if n > 1 else slice(None) for p, n in zip(parts, array.shape[2:], strict=True)]
    return array[(slice(None), slice(None), *parts)]


def weights_of(layer, random):
    return {
        key: random.standard_normal(shape).astype(np.float32)
        for key, shape in layer.weight_shapes().items()
    }


def problem_of(layer, primitive, batch, channels, size, box):
    """The problem of making ``box`` of the layer's output: inputs cut to what it needs."""
    windows = [layer.window(axis) for axis in range(3)]
    parts, starts = [], []
    for axis, window in enumerate(windows):
        first, last = window.within(box.start[axis], box.stop[axis], (0, size[axis]))
        last = min(last + primitive.fragments_of(layer)[axis] - 1, size[axis])
        parts.append(slice(first, last))
        starts.append(first)
    offset = tuple(w.offset(box.start[a], starts[a]) for a, w in enumerate(windows))
    shape = tuple(p.stop - p.start for p in parts)
    fragments = int(np.prod(primitive.fragments_of(layer)))
    output = (batch * fragments, layer.channels(channels), *box.size)
    inputs = tuple((batch, c, *shape) for c in channels)
    return Problem(layer, inputs, output, (offset,) * len(channels), box.start, size), parts


def inputs_of(layer, count, random, batch=2):
    few = 3 if isinstance(layer, layers.MaxPool | layers.AveragePool) else 4  # in either form
    told = getattr(layer, "in_channels", 0), getattr(layer, "width", 0), few
    wide = next(n for n in told if n)
    narrow = isinstance(layer, layers.Arithmetic)
    channels = [1 if narrow and i == 1 else wide for i in range(count)]
    arrays = [random.standard_normal((batch, c, *SIZE)).astype(np.float32) for c in channels]
    if layer.kind in POSITIVE:
        arrays = [np.abs(a) + np.float32(0.1) for a in arrays]
    if layer.kind in ("equal", "where"):
        arrays[0] = np.rint(arrays[0])
        arrays[1] = np.rint(arrays[1])
    if isinstance(layer, layers.Broadcast):
        arrays[0] = arrays[0][..., :1, :1, :1]
    return channels, arrays


def expected(layer, arrays, weights, offset=(0, 0, 0)):
    z, y, x = offset
    return np.stack(
        [
            oracle._apply(
                layer,
                [a[sample, :, z:, y:, x:].astype(np.float64) for a in arrays],
                {k: v.astype(np.float64) for k, v in weights.items()},
            )
            for sample in range(arrays[0].shape[0])
        ]
    )


@pytest.mark.parametrize(
    ("label", "name", "threads"),
    [*SHORTER, *((*case, 1) for case in ONE_OF_EACH)],
)
def test_any_box_of_the_output_equals_the_oracle(label, name, threads):
    layer, count = LAYERS[label]
    primitive = named(name, layer)
    random = np.random.default_rng(3)
    channels, arrays = inputs_of(layer, count, random)
    weights = weights_of(layer, random)
    prepared = primitive.prepare(layer, weights)
    stride = [layer.window(axis).stride for axis in range(3)]
    offsets = list(np.ndindex(*primitive.fragments_of(layer)))
    wants = [expected(layer, arrays, weights, offset) for offset in offsets]
    size = np.min([w.shape[2:] for w in wants], axis=0)  # what all fragments have
    assert all(s >= 1 for s in stride)
    with Team(threads) as team:
        whole = [layer.window(axis).whole for axis in range(3)]  # not to be had in parts
        part = tuple(int(n) if w else t for n, w, t in zip(size, whole, (3, 5, 20), strict=True))
        boxes = tiles(tuple(int(n) for n in size), part)
        for box, forms in product(boxes, forms_of(primitive, layer, channels)):
            problem, parts = problem_of(layer, primitive, 2, channels, SIZE, box)
            given, out = formed(forms, [cut(a, parts) for a in arrays], problem.output)
            before = [g.copy() for g in given]
            primitive.apply(prepared, problem, given, out, team)
            got = plain(out, problem.output)
            got = got.reshape(len(offsets), 2, *problem.output[1:])
            for part, want in zip(got, wants, strict=True):
                whole = want[(slice(None), slice(None), *box.slices)]
                np.testing.assert_allclose(part, whole, rtol=1e-5, atol=2e-5 * max(1, want.std()))
            for a, b in zip(given, before, strict=True):
                np.testing.assert_array_equal(a, b)


IN_ROWS = [
    *(("conv in parts", "direct blocked"), ("conv to few", "direct to few channels")),
    *(("conv depthwise blocks", "direct depthwise"), ("conv in parts", "img2row")),
    *(("transposed blocks", "direct transposed blocked"), ("conv blocks", "winograd")),
]


def remembering_nothing(told):
    return SimpleNamespace(of=partial(told.of.__wrapped__, told))


@pytest.mark.parametrize("near_bytes", [1, 1 << 30])
@pytest.mark.parametrize(("label", "name"), IN_ROWS)
def test_rows_are_the_same_in_parts_and_turns_of_any_size(label, name, near_bytes, monkeypatch):
    monkeypatch.setattr(rows_of_outputs, "PART_BYTES", near_bytes)
    monkeypatch.setattr(rows_of_outputs, "SHARED_BYTES", near_bytes)
    monkeypatch.setattr(rows_of_outputs, "Told", remembering_nothing(rows_of_outputs.Told))
    monkeypatch.setattr(conv_img2row, "GATHERED_BYTES", near_bytes)
    monkeypatch.setattr(conv_winograd, "CACHED_BYTES", near_bytes)
    monkeypatch.setattr(conv_winograd, "_told", conv_winograd._told.__wrapped__)
    test_any_box_of_the_output_equals_the_oracle(label, name, 3)


IN_TILES = [
    (label, tiled.name)
    for label in ("conv padded", "conv dilated padded", "conv blocks", "conv in parts")
    for tiled in TILES
    if tiled.refusal(LAYERS[label][0]) is None
]


FROM_FEW = [("conv strided", "direct from few channels")]


@pytest.mark.parametrize(("label", "name"), IN_ROWS + IN_TILES + FROM_FEW)
@pytest.mark.every(3)
def test_processors_with_short_vectors_make_the_same(label, name, monkeypatch, tmp_path):
    triple = compiled.host().triple
    cpu = "x86-64-v3" if triple.startswith("x86_64") else "generic"
    other = compiled.Target(triple, cpu)
    assert not other.wide
    monkeypatch.setenv("ZNNI_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_LIBRARIES", {})
    for module in (compiled, from_few, planes_kernel, rows_kernel, tiles_kernel):
        monkeypatch.setattr(module, "host", lambda: other)
    libraries = ((rows_kernel, "rows_library"), (tiles_kernel, "stages"))
    others = (
        *((patch_matrix, "patches_library"), (planes_kernel, "planes_library")),
        *((winograd, "winograd_library"), (from_few, "from_few_library")),
    )
    for module, library in (*libraries, *others):
        anew = cache(getattr(module, library).__wrapped__)  # nothing compiled for this processor
        monkeypatch.setattr(module, library, anew)
    monkeypatch.setattr(conv_winograd, "_told", conv_winograd._told.__wrapped__)
    layer = LAYERS[label][0]
    primitive = named(name, layer)
    assert primitive.is_compiled(layer) == ((label, name) in IN_ROWS)
    test_any_box_of_the_output_equals_the_oracle(label, name, 1)
    assert list(tmp_path.iterdir())
    assert primitive.is_compiled(layer)
    monkeypatch.setattr(compiled, "_LIBRARIES", {})  # as another process finds it
    assert primitive.is_compiled(layer)


@pytest.mark.parametrize(
    ("label", "name"),
    [(label, name) for label, name in CASES if named(name, LAYERS[label][0]).in_place],
)
def test_in_place_gives_the_same(label, name):
    layer, count = LAYERS[label]
    primitive = named(name, layer)
    random = np.random.default_rng(4)
    channels, arrays = inputs_of(layer, count, random)
    weights = weights_of(layer, random)
    box = Box((0, 0, 0), SIZE)
    problem, _ = problem_of(layer, primitive, 2, channels, SIZE, box)
    want = expected(layer, arrays, weights)
    given = [slack(a) for a in arrays]
    with Team(2) as team:
        primitive.apply(primitive.prepare(layer, weights), problem, given, given[0], team)
    np.testing.assert_allclose(given[0], want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("label", "name", "threads"),
    [*((*case, 2) for case in CASES), *((*case, 1) for case in ONE_OF_EACH)],
)
def test_memory_measured_stays_within_memory_predicted(label, name, threads):
    layer, count = LAYERS[label]
    primitive = named(name, layer)
    random = np.random.default_rng(5)
    channels, arrays = inputs_of(layer, count, random, batch=1)
    size = SIZE if label.startswith("whole") else (16, 40, 60)
    arrays = [
        slack(np.ones((1, a.shape[1], *(size if a.shape[-1] > 1 else (1, 1, 1))), np.float32))
        for a in arrays
    ]
    n = [layer.window(axis).size(size[axis]) for axis in range(3)]
    if primitive.fragments:
        n = [k - 1 for k in n]
    problem, parts = problem_of(layer, primitive, 1, channels, size, Box((0, 0, 0), tuple(n)))
    forms = forms_of(primitive, layer, channels)[-1]
    given, out = formed(forms, [cut(a, parts) for a in arrays], problem.output)
    prepared = primitive.prepare(layer, weights_of(layer, random))
    with Team(threads) as team:
        primitive.apply(prepared, problem, given, out, team)
        objects = 64 << 10  # python's own: views, closures, futures
        allowed = primitive.workspace_bytes(problem, threads) + objects - team.scratch_bytes
        peak = traced_peak(lambda: primitive.apply(prepared, problem, given, out, team), allowed)
        scratch = team.scratch_bytes
    assert peak + scratch <= primitive.workspace_bytes(problem, threads) + objects
    assert primitive.memory_bytes(problem, threads) == (
        out.nbytes + primitive.workspace_bytes(problem, threads)
    )
    assert primitive.flops(problem) > 0


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("direct blocked", layers.Conv(70, 90, (3, 3, 3))),
        ("direct to few channels", layers.Conv(70, 9, (5, 5, 5))),
        ("direct depthwise", layers.Conv(70, 70, (9, 9, 9), groups=70)),
        ("direct blocked", layers.Conv(144, 144, (5, 5, 5), groups=9)),
        ("img2row", layers.Conv(70, 90, (3, 3, 3))),
        ("direct transposed blocked", layers.ConvTranspose(70, 90, (3, 3, 3), (2, 2, 2))),
    ],
)
def test_what_is_prepared_takes_the_memory_that_is_predicted(name, layer):
    primitive = named(name, layer)
    weights = weights_of(layer, np.random.default_rng(0))
    prepared = primitive.prepare(layer, weights)
    several = list(prepared.values() if isinstance(prepared, dict) else prepared)
    parts = chain(*several) if isinstance(several[0], list) else several
    kept = sum(array.nbytes for part in parts for array in (part.weights, part.biases))
    peak = traced_peak(lambda: primitive.prepare(layer, weights))
    assert kept >= 4 * sum(w.size for w in weights.values())
    assert peak <= primitive.prepared_bytes(layer) + (16 << 10) <= 4 * kept


def allocate_traced(nbytes):
    """What `allocate` gives, as memory that Python keeps account of."""
    memory = np.empty(allocated_bytes(nbytes), np.uint8)
    return memory[-memory.ctypes.data % 64 :][:nbytes]


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize(
    "layer", [layers.Conv(128, 64, (3, 5, 7)), layers.Conv(40, 70, (5, 4, 6), stride=(2, 1, 2))]
)
def test_spectra_are_prepared_in_the_memory_that_is_predicted(layer, remade, monkeypatch):
    primitive = ConvTiledFFT((16, 16, 16), remade)
    weights = weights_of(layer, np.random.default_rng(0))
    monkeypatch.setattr(conv_fft_tiles, "allocate", allocate_traced)
    kept = primitive.prepare(layer, weights).kernels.nbytes
    peak = traced_peak(lambda: primitive.prepare(layer, weights))
    assert peak <= primitive.prepared_bytes(layer) + (16 << 10)
    assert kept <= primitive.prepared_bytes(layer) <= 1.4 * kept + (6 << 20)


def test_values_at_points_take_the_memory_that_is_predicted():
    layer, primitive = layers.Conv(70, 90, (3, 2, 3)), ConvWinograd()
    weights = weights_of(layer, np.random.default_rng(0))
    kept = sum(array.nbytes for array in primitive.prepare(layer, weights))
    assert kept == 4 * 96 * (4**3 * 70 + 1)
    peak = traced_peak(lambda: primitive.prepare(layer, weights))
    assert peak <= primitive.prepared_bytes(layer) + (16 << 10) <= 4 * kept


@pytest.mark.parametrize(
    "primitive", [*TABLE, TILES[0]], ids=lambda p: f"{p.layer.__name__}-{p.name}"
)
def test_a_layer_of_another_kind_is_refused_with_a_reason(primitive):
    other = layers.Softmax() if primitive.layer is not layers.Softmax else layers.Concat()
    reason = primitive.refusal(other)
    assert reason is not None
    assert other.kind in reason


def test_fragments_refuse_padding():
    padded = layers.MaxPool((3, 3, 3), (2, 2, 2), padding=((1, 1, 1), (1, 1, 1)))
    assert [p.name for p in candidates(padded)] == ["pooling"]
    assert "pad" in named("fragments", layers.MaxPool((2, 2, 2), (2, 2, 2))).refusal(padded)


def test_every_kind_of_layer_has_a_primitive_and_every_primitive_a_case():
    covered = {primitive for label, name in CASES for primitive in [named(name, LAYERS[label][0])]}
    rows = {p for p in table() if p.device == CPU and p.precision == layers.FULL}
    assert covered == rows | {*TILES}


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (2, 2, 1), (3, 2, 2), (1, 3, 1)]
)
def test_planes_to_keep_are_those_that_later_outputs_read_again(kernel, stride, dilation):
    layer = layers.Conv(1, 1, (kernel,) * 3, (stride,) * 3, (dilation,) * 3, NO_PADDING)
    window = layer.window(0)
    _, read = window.needs(0, 5)  # inputs read once outputs 0 to 4 are made
    first, _ = window.needs(5, 6)
    assert candidates(layer)[0].planes_to_keep(layer, 0) == max(0, read - first)


@pytest.mark.parametrize("label", ["pool overlapping", "pool dilated padded", "mean padded"])
def test_pooling_in_strips_of_rows_is_pooling(label, monkeypatch):
    layer, _ = LAYERS[label]
    x = np.random.default_rng(11).standard_normal((1, 17, *SIZE)).astype(np.float32)
    want = expected(layer, [x], {})
    offset = tuple(layer.window(axis).offset(0, 0) for axis in range(3))
    problem = Problem(layer, (x.shape,), want.shape, (offset,), (0, 0, 0), SIZE)
    for strip in (1, 2):
        monkeypatch.setattr(pooling, "_STRIP_BYTES", 0)
        monkeypatch.setattr(pooling, "_LEAST_STRIP", strip)
        given, out = formed((Form.BLOCKED, Form.BLOCKED), [x], problem.output)
        with Team(2) as team:
            named("pooling", layer).apply(None, problem, given, out, team)
        np.testing.assert_allclose(plain(out, problem.output), want, rtol=1e-5, atol=1e-5)


def test_a_value_in_any_piece_is_taken_over_and_computed():
    layer, shape = layers.Activation("relu"), (1, 1, 1, 2, pointwise.PIECE - 7)
    x = np.random.default_rng(12).standard_normal(shape).astype(np.float32)
    problem = Problem(layer, (shape,), shape, ((0, 0, 0),), (0, 0, 0), shape[2:])
    out = np.full_like(x, np.nan)
    with Team(2) as team:
        named("pointwise", layer).apply(None, problem, [x], out, team)
    np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_a_value_in_any_piece_is_summed():
    layer, shape = layers.Arithmetic("add", relu=True), (1, 1, 1, 2, pointwise.PIECE - 7)
    random = np.random.default_rng(13)
    a, b, c = (random.standard_normal(shape).astype(np.float32) for _ in range(3))
    places = ((0, 0, 0),) * 3
    problem = Problem(layer, (shape,) * 3, shape, places, (0, 0, 0), shape[2:])
    with Team(2) as team:
        named("pointwise", layer).apply(None, problem, [a, b, c], out := np.empty_like(a), team)
    np.testing.assert_array_equal(out, np.maximum(a + b + c, 0))


@pytest.mark.parametrize("form", Form)
def test_max_pooling_passes_nan_on(form):
    layer = layers.MaxPool((1, 1, 3), (1, 1, 1))
    x = np.zeros((1, 1, 1, 1, 6), np.float32)
    x[..., 2] = np.nan
    problem = Problem(layer, (x.shape,), (1, 1, 1, 1, 4), ((0, 0, 0),), (0, 0, 0), (1, 1, 6))
    given, out = formed((form, form), [x], problem.output)
    with Team(1) as team:
        named("pooling", layer).apply(None, problem, given, out, team)
    found = plain(out, problem.output)
    assert np.array_equal(np.isnan(found).ravel(), [True, True, True, False])


def test_whole_blocks_of_channels_are_joined_as_they_are():
    layer, random = layers.Concat(), np.random.default_rng(6)
    primitive = named("copy", layer)
    arrays = [random.standard_normal((2, c, *SIZE)).astype(np.float32) for c in (32, 16, 5)]
    shapes = tuple(a.shape for a in arrays)
    problem = Problem(layer, shapes, (2, 53, *SIZE), ((0, 0, 0),) * 3, (0, 0, 0), SIZE)
    assert forms_of(primitive, layer, (32, 16, 5)) == [(form, form) for form in Form]
    assert forms_of(primitive, layer, (5, 16)) == [(Form.PLAIN, Form.PLAIN)]
    given, out = formed((Form.BLOCKED, Form.BLOCKED), arrays, problem.output)
    with Team(2) as team:
        primitive.apply(None, problem, given, out, team)
    np.testing.assert_array_equal(plain(out, problem.output), np.concatenate(arrays, axis=1))


def test_a_team_runs_every_item_once_and_passes_errors_on():
    seen = np.zeros(1000, int)

    def work(first, last):
        seen[first:last] += 1

    def fail(first, last):
        if first <= 500 < last:
            raise ZeroDivisionError

    with Team(4) as team:
        team.share(work, 1000)
        with pytest.raises(ZeroDivisionError):
            team.share(fail, 1000)
    assert (seen == 1).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_spectra_that_are_remade_take_a_fraction_of_the_memory(threads):
    layer = layers.Conv(80, 80, (5, 5, 5))
    problem = Problem(
        layer, ((1, 80, 28, 28, 28),), (1, 80, 24, 24, 24), ((0, 0, 0),), (0, 0, 0), (28, 28, 28)
    )
    kept, remade = ConvTiledFFT((16, 16, 16)), ConvTiledFFT((16, 16, 16), remade=True)
    assert remade.prepared_bytes(layer) < kept.prepared_bytes(layer) / 4
    spectra = kept.prepared_bytes(layer) - remade.prepared_bytes(layer)
    more = remade.workspace_bytes(problem, threads) - kept.workspace_bytes(problem, threads)
    assert more < spectra / 4
    assert remade.flops(problem) > kept.flops(problem)


def test_a_patch_matrix_is_never_there_as_a_whole():
    layer, output = layers.Conv(80, 80, (3, 3, 3)), (4, 80, 32, 32, 32)
    zero, size = (0, 0, 0), (34, 34, 34)
    problem = Problem(layer, ((4, 80, *size),), output, (zero,), zero, size)
    whole = 4 * 32**3 * 80 * 27 * 4
    assert named("img2row", layer).workspace_bytes(problem, threads=2) < whole / 500


@pytest.mark.parametrize(
    ("channels", "kernel", "transforms"),
    [
        *((1, 5, ConvTiledFFT((20,) * 3)), (16, 3, ConvTiledFFT((16,) * 3))),
        *((16, 7, ConvTiledFFT((24,) * 3)), (1, 3, ConvPlanesFFT((16, 16)))),
        *((1, 8, ConvPlanesFFT((24, 24))), (16, 3, ConvWinograd()), (16, 2, ConvWinograd())),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("deviation", [1, 50])
@pytest.mark.parametrize("balanced", [False, True], ids=["random", "zero-sum"])
@pytest.mark.every(3)
def test_raw_grey_values_lose_no_more_by_transforms_than_directly(
    channels, kernel, transforms, deviation, balanced
):
    layer = layers.Conv(channels, 16, (kernel,) * 3, bias=False)
    size = 2 * getattr(transforms, "tile", (16,))[-1] - kernel
    random, made = np.random.default_rng(7), size - kernel + 1
    x = 1000 + deviation * random.standard_normal((1, channels, *(size,) * 3), np.float32)
    weights = weights_of(layer, random)
    if balanced:
        weights["weight"] -= weights["weight"].mean(axis=(1, 2, 3, 4), keepdims=True)
    box = Box((2, 3, 1), (2 + made // 2, made, made))
    errors = []
    for primitive in (transforms, named("direct blocked", layer)):
        problem, parts = problem_of(layer, primitive, 1, [channels], (size,) * 3, box)
        forms = forms_of(primitive, layer, [channels])[-1]
        given, out = formed(forms, [cut(x, parts)], problem.output)
        with Team(1) as team:
            primitive.apply(primitive.prepare(layer, weights), problem, given, out, team)
        want = expected(layer, [cut(x, parts)], weights)
        errors.append(np.linalg.norm(plain(out, problem.output) - want))
    by_transforms, directly = errors
    assert by_transforms <= 2 * directly


@pytest.mark.parametrize("rows_at_once", [0, 3, 100])
def test_reductions_over_space_are_the_same_in_pieces_of_any_size(rows_at_once, monkeypatch):
    monkeypatch.setattr(reducing, "PIECE", rows_at_once * int(np.prod(SIZE)))
    test_any_box_of_the_output_equals_the_oracle("mean of space", "reduction", 3)


@pytest.mark.parametrize("channels", [1, 3, 16, 37])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (3, 4, 8), (5, 7, 9)])
def test_changes_of_form_keep_every_value(channels, size):
    shape = (2, channels, *size)
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    problem = Problem(layers.Input(channels), (shape,), shape, ((0, 0, 0),), (0, 0, 0), size)
    (blocked,), out = formed((Form.BLOCKED, Form.PLAIN), [x], shape)
    made = slack(np.full_like(blocked, np.nan))
    with Team(3) as team:
        FormChange(Form.PLAIN).apply(None, problem, [blocked], out, team)
        FormChange(Form.BLOCKED).apply(None, problem, [slack(x)], made, team)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(plain(made, shape), x)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (1, 3, 4), (2, 1, 5), (1, 1, 8)])
@pytest.mark.parametrize("size", [(3, 4, 7), (5, 6, 50), (2, 3, 171)])
@pytest.mark.parametrize("missing", [False, True])
def test_recombined_fragments_lie_interleaved_and_leave_other_places_alone(spacing, size, missing):
    random = np.random.default_rng(8)
    want = random.standard_normal((3, *size)).astype(np.float32)
    places = list(np.ndindex(*spacing))[missing:]
    parts = [-(-n // s) for n, s in zip(size, spacing, strict=True)]
    fragments = np.full((len(places), 3, *parts), np.nan, np.float32)
    for fragment, place in zip(fragments, places, strict=True):
        part = want[
            (slice(None), *(slice(p, None, s) for p, s in zip(place, spacing, strict=True)))
        ]
        fragment[(slice(None), *(slice(n) for n in part.shape[1:]))] = part
    out = slack(np.full_like(want, 7))
    numbers = {place: i for i, place in enumerate(places)}
    with Team(3) as team:
        recombine(slack(fragments), numbers, spacing, out, team)
    if missing:
        want[(slice(None), *(slice(None, None, s) for s in spacing))] = 7
    np.testing.assert_array_equal(out, want)
