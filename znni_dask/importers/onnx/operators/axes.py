"""What only moves axes, or takes parts along them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx

from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx.assembly import UnsupportedNode, check_channels
from znni_dask.importers.onnx.graph import END, GraphReader, Operator
from znni_dask.importers.onnx.layouts import SPACE, Lengths, Piece, Value
from znni_dask.importers.onnx.operators.attributes import attributes_of, finite, listed_axes, text
from znni_dask.importers.onnx.operators.joining import repeated
from znni_dask.network import layers
from znni_dask.network.layers import ONES, PadMode
from znni_dask.network.window import LARGEST

_PAD_MODES: dict[str, PadMode] = {"constant": "constant", "edge": "edge", "reflect": "reflect"}


def _transpose(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    order = attributes_of(proto).get("perm", list(range(value.rank))[::-1])
    return value.permuted([reader.axis(value, int(i)) for i in order])


def _lengths(reader: GraphReader, value: Value) -> list[Lengths]:
    return [reader.assembly.lengths(value, i) for i in range(value.rank)]


def _reshape(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    wanted = [list(dim) for dim in reader.whole_numbers(proto, 1)]
    have = _lengths(reader, value)
    keeps_zero = bool(attributes_of(proto).get("allowzero"))
    for probe in range(reader.assembly.probes):
        dims = [dim[probe] for dim in wanted]
        if min(dims, default=0) < -1 or dims.count(-1) > 1:
            raise UnsupportedNode(f"reshaping to {dims}")
        if not keeps_zero:
            dims = [have[i][probe] if d == 0 else d for i, d in enumerate(dims)]
        if -1 in dims:
            rest = -prod(dims)
            total = prod(lengths[probe] for lengths in have)
            if rest < 1 or total % rest:
                raise UnsupportedNode(f"reshaping {total} elements to {dims}")
            dims = [total // rest if d == -1 else d for d in dims]
        for i, d in enumerate(dims):
            wanted[i][probe] = d
    return value.reshaped([tuple(dim) for dim in wanted])


def _flatten(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    number = int(attributes_of(proto).get("axis", 1))
    axis = number if number == value.rank else reader.axis(value, number)
    have = _lengths(reader, value)
    halves = [have[:axis], have[axis:]]
    return value.reshaped(
        [tuple(prod(n[p] for n in half) for p in range(reader.assembly.probes)) for half in halves]
    )


def _squeeze(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    listed = listed_axes(reader, proto)
    single = [i for i, n in enumerate(_lengths(reader, value)) if set(n) == {1}]
    gone = single if listed is None else [reader.axis(value, a) for a in listed]
    if not set(gone) <= set(single):
        raise UnsupportedNode("takes away an axis of more than one element")
    return replace(value, axes=tuple(a for i, a in enumerate(value.axes) if i not in gone))


def _unsqueeze(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    listed = listed_axes(reader, proto) or []
    rank = value.rank + len(listed)
    new = {a % rank for a in listed}
    if any(not -rank <= a < rank for a in listed) or len(new) < len(listed):
        raise UnsupportedNode(f"axes {listed} of arrays of rank {rank}")
    old = iter(value.axes)
    return replace(value, axes=tuple(() if i in new else next(old) for i in range(rank)))


def selected(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, axis: int, indices: list[int]
) -> Value:
    """Some of the channels, which lie on ``axis``."""
    length = reader.assembly.lengths(value, axis)[0]
    if indices == list(range(length)):
        return value
    name = reader.add(proto, layers.Select(tuple(indices)), [value.layer])
    piece = Piece("c", (len(indices),) * reader.assembly.probes)
    return Value(name, tuple((piece,) if i == axis else a for i, a in enumerate(value.axes)))


def _of_channels(reader: GraphReader, proto: onnx.NodeProto, value: Value, axis: int) -> bool:
    """Whether an axis is that of the channels, all of them."""
    if value.kinds_of(axis) == {"c"}:
        if reader.assembly.lengths(value, axis)[0] != reader.assembly.channels(value):
            raise UnsupportedNode("its channels lie on several axes")
        return True
    return not value.kinds_of(axis) and not value.pieces("c") and value.kinds()[axis] == "c"


def _split(reader: GraphReader, proto: onnx.NodeProto) -> list[Value]:
    attributes = attributes_of(proto)
    value = reader.settled(proto, reader.given(proto))
    axis = reader.axis(value, int(attributes.get("axis", 0)))
    if not _of_channels(reader, proto, value, axis):
        raise UnsupportedNode("only channels can be split")
    total, parts = reader.assembly.channels(value), len(proto.output)
    if attributes.get("num_outputs", parts) != parts:
        raise UnsupportedNode(f"num_outputs={attributes['num_outputs']} for {parts} outputs")
    sizes = attributes.get("split")
    if sizes is None and len(proto.input) > 1:
        found = reader.constant(proto, 1)
        sizes = None if found is None else found.ravel().tolist()
    if sizes is None:
        each = -(-total // parts)
        sizes = [min(each, total - i * each) for i in range(parts)]
    if sum(sizes) != total or len(sizes) != parts:
        raise UnsupportedNode(f"{total} channels do not fall into parts of {list(sizes)}")
    starts = np.cumsum([0, *sizes])
    return [
        selected(reader, proto, value, axis, list(range(int(a), int(a) + int(n))))
        for a, n in zip(starts, sizes, strict=False)
    ]


def _gather(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.settled(proto, reader.given(proto))
    axis = reader.axis(value, int(attributes_of(proto).get("axis", 0)))
    indices = reader.weights(proto, 1)
    check_channels(indices.size)
    if indices.ndim > 1:
        raise UnsupportedNode(f"gathers by indices of shape {list(indices.shape)}")
    lengths = reader.assembly.lengths(value, axis)
    if _of_channels(reader, proto, value, axis):
        found = [int(i) for i in indices.ravel().tolist()]
        chosen = [i + lengths[0] if i < 0 else i for i in found]
        value = selected(reader, proto, value, axis, chosen)
    elif set(lengths) != {1} or indices.size != 1 or indices.ravel()[0] not in (0, -1):
        raise UnsupportedNode("takes single places of an axis of space")
    if indices.ndim == 0:
        return replace(value, axes=tuple(a for i, a in enumerate(value.axes) if i != axis))
    return value


def _slice(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.settled(proto, reader.given(proto))
    starts, ends = (reader.whole_numbers(proto, i) for i in (1, 2))
    axes, steps = reader.constant(proto, 3), reader.constant(proto, 4)
    chosen = range(len(starts)) if axes is None else [int(a) for a in axes.ravel()]
    strides = [1] * len(starts) if steps is None else [int(s) for s in steps.ravel()]
    if len({reader.axis(value, number) for number in chosen}) < len(chosen):
        raise UnsupportedNode(f"an axis is named twice in {list(chosen)}")
    borders: dict[str, tuple[int, int]] = {}
    every: dict[str, int] = {}
    for number, start, end, step in zip(chosen, starts, ends, strides, strict=True):
        axis = reader.axis(value, number)
        lengths = reader.assembly.lengths(value, axis)
        spans = [
            slice(a, None if step < 0 and b < -n else b, step).indices(n)
            for a, b, n in zip(start, end, lengths, strict=True)
        ]
        if all(span == (0, n, 1) for span, n in zip(spans, lengths, strict=True)):
            continue
        if _of_channels(reader, proto, value, axis):
            value = selected(reader, proto, value, axis, list(range(*spans[0])))
            continue
        kind = value.kinds()[axis]
        if kind not in SPACE:
            raise UnsupportedNode(f"axis {axis} cannot be sliced")
        if step < 0:
            raise UnsupportedNode("turns an axis of space round, which depends on its whole length")
        low, high = {s[0] for s in spans}, {n - s[1] for s, n in zip(spans, lengths, strict=True)}
        if len(low) > 1 or len(high) > 1:
            raise UnsupportedNode(
                f"{start[0]}:{'' if end[0] >= END else end[0]} of axis {axis} is a place that "
                "depends on the volume's size: write it like 2:-2"
            )
        borders[kind] = (low.pop(), high.pop())
        every[kind] = step
    return _cropped(reader, proto, value, borders, every)


def _cropped(
    reader: GraphReader,
    proto: onnx.NodeProto,
    value: Value,
    borders: dict[str, tuple[int, int]],
    every: dict[str, int],
) -> Value:
    low, high = (triple(borders.get(k, (0, 0))[i] for k in SPACE) for i in range(2))
    if any(low + high):
        value = reader.layer(proto, layers.Crop(low, high), [value])
    step = triple(every.get(k, 1) for k in SPACE)
    if step != ONES:
        value = reader.layer(proto, layers.MaxPool(ONES, step), [value])
    return value


def _pad(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.settled(proto, reader.given(proto))
    pads = reader.whole_numbers(proto, 1)
    axes = reader.constant(proto, 3)
    chosen = (
        list(range(value.rank))
        if axes is None
        else [reader.axis(value, int(a)) for a in axes.ravel()]
    )
    if len(pads) != 2 * len(chosen) or len(set(chosen)) < len(chosen):
        raise UnsupportedNode(f"{len(pads)} pads for {len(chosen)} axes")
    if any(len(set(p)) > 1 for p in pads):
        raise UnsupportedNode("how much it pads depends on the volume's size")
    low, high = dict.fromkeys(SPACE, 0), dict.fromkeys(SPACE, 0)
    for index, axis in enumerate(chosen):
        below, above = pads[index][0], pads[len(chosen) + index][0]
        kind = value.kinds()[axis]
        if (below or above) and _of_channels(reader, proto, value, axis):
            value = _with_channels(reader, proto, value, axis, below, above)
        elif kind not in SPACE and (below or above):
            raise UnsupportedNode("the batch cannot be padded")
        if kind in low:
            low[kind], high[kind] = below, above
    if max(map(abs, (*low.values(), *high.values()))) > LARGEST:
        raise UnsupportedNode(f"{pads} is taken for a mistake: the most is {LARGEST}")
    return _padded(reader, proto, value, *(triple(s[k] for k in SPACE) for s in (low, high)))


def _filling(reader: GraphReader, proto: onnx.NodeProto) -> float:
    """The value that padding is filled with."""
    number = reader.constant(proto, 2)
    return 0.0 if number is None or number.size == 0 else finite(number.ravel()[0], "its value")


def _with_channels(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, axis: int, below: int, above: int
) -> Value:
    """Constant channels before and behind those of a value."""
    if min(below, above) < 0 or text(attributes_of(proto).get("mode"), "constant") != "constant":
        raise UnsupportedNode("channels can only be padded with a constant")
    check_channels(below + above)
    parts = [value.layer]
    for count, place in ((below, 0), (above, len(parts) + 1)):
        if count:
            name = reader.add(proto, layers.Select((0,) * count), [value.layer])
            weights = {"scale": np.zeros(count), "shift": np.full(count, _filling(reader, proto))}
            parts.insert(place, reader.add(proto, layers.Affine(count), [name], weights))
    joined = reader.add(proto, layers.Concat(), parts)
    return reader.assembly.value(joined, value.kinds(), value)


def _padded(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, low: Size, high: Size
) -> Value:
    """Padding, and cropping where it is negative."""
    mode = text(attributes_of(proto).get("mode"), "constant")
    if min(*low, *high) < 0:
        cropped = triple(max(0, -p) for p in low), triple(max(0, -p) for p in high)
        value = reader.layer(proto, layers.Crop(*cropped), [value])
    padding = triple(max(0, p) for p in low), triple(max(0, p) for p in high)
    if padding == layers.NO_PADDING:
        return value
    if mode not in _PAD_MODES:
        raise UnsupportedNode(f"mode={mode} is not supported: it reads the far end of the volume")
    thinnest = [min(size[axis] for size in reader.assembly.sizes(value)) for axis in range(3)]
    if mode == "reflect" and any(
        max(low, high) >= n for low, high, n in zip(*padding, thinnest, strict=True) if low or high
    ):
        raise UnsupportedNode("mirrors more than there is")
    layer = layers.Pad(padding, _filling(reader, proto), _PAD_MODES[mode])
    return reader.layer(proto, layer, [value])


def _expand(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.given(proto)
    wanted = reader.whole_numbers(proto, 1)
    value = replace(value, axes=((),) * (len(wanted) - value.rank) + value.axes)
    wanted = [(1,) * reader.assembly.probes] * (value.rank - len(wanted)) + wanted
    for axis, target in enumerate(wanted):
        have = reader.assembly.lengths(value, axis)
        if set(target) == {1} or target == have:
            continue
        if set(have) != {1}:
            raise UnsupportedNode(f"expands an axis of {have[0]} elements to {target[0]}")
        value = _grown(reader, proto, value, axis, target)
    return value


def _grown(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, axis: int, target: Lengths
) -> Value:
    """One axis of a single element, ``target`` long."""
    kind = value.kinds()[axis]
    if _is_extra(reader, value, axis) and len(set(target)) == 1:
        return _doubled(reader, value, axis, target[0])
    if len(set(target)) == 1 and not value.pieces("c") and kind not in SPACE:
        return repeated(reader, proto, value, axis, target[0])
    if kind not in SPACE or not reader.assembly.reduced(value)[SPACE.index(kind)]:
        raise UnsupportedNode(f"expands axis {axis}, which is no voxel of a reduced axis")
    number = SPACE.index(kind)
    sizes = tuple(
        triple(t if i == number else n for i, n in enumerate(size))
        for size, t in zip(reader.assembly.sizes(value), target, strict=True)
    )
    return broadcast(reader, proto, value, sizes)


def broadcast(
    reader: GraphReader, proto: onnx.NodeProto, value: Value, sizes: tuple[Size, ...]
) -> Value:
    """A value reduced to one voxel, repeated to ``sizes``."""
    like = reader.assembly.of_size(sizes)
    name = reader.add(proto, layers.Broadcast(), [value.layer, like])
    return reader.assembly.relaid(value, name)


def _tile(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value = reader.settled(proto, reader.given(proto))
    listed = reader.whole_numbers(proto, 1)
    if len(listed) != value.rank:
        raise UnsupportedNode(f"{len(listed)} numbers for {value.rank} axes")
    for axis, times in enumerate(listed):
        if set(times) == {1}:
            continue
        if _is_extra(reader, value, axis) and len(set(times)) == 1:
            value = _doubled(reader, value, axis, times[0])
            continue
        if not _of_channels(reader, proto, value, axis):
            raise UnsupportedNode("only channels can be repeated")
        length = reader.assembly.lengths(value, axis)[0]
        if length == 1:
            value = repeated(reader, proto, value, axis, times[0])
        else:
            check_channels(length * times[0])
            value = selected(reader, proto, value, axis, list(range(length)) * times[0])
    return value


def _is_extra(reader: GraphReader, value: Value, axis: int) -> bool:
    """Whether an axis stands for nothing: one that was put in to repeat what lies before it,
    where all axes of the input have their place elsewhere."""
    present = {p.kind for pieces in value.axes for p in pieces}
    everything = set(reader.assembly.entry.kinds) <= present
    return not value.axes[axis] and (everything or value.kinds()[axis] == "")


def _doubled(reader: GraphReader, value: Value, axis: int, times: int) -> Value:
    """An axis that stands for nothing, ``times`` long; merged with the axis before it, it repeats
    every voxel, as `numpy.repeat` does."""
    piece = Piece("c", (times,) * reader.assembly.probes, stride=0)
    return replace(
        value, axes=tuple((piece,) if i == axis else a for i, a in enumerate(value.axes))
    )


def _depth_to_space(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    attributes = attributes_of(proto)
    value, b = reader.given(proto), int(attributes["blocksize"])
    n, c, y, x = _lengths(reader, value)
    wide = (c[0] // (b * b),) * reader.assembly.probes
    block = (b,) * reader.assembly.probes
    if text(attributes.get("mode"), "DCR") == "DCR":
        split = value.reshaped([n, block, block, wide, y, x]).permuted([0, 3, 4, 1, 5, 2])
    else:
        split = value.reshaped([n, wide, block, block, y, x]).permuted([0, 1, 4, 2, 5, 3])
    longer = [tuple(b * k for k in axis) for axis in (y, x)]
    return reader.settled(proto, split.reshaped([n, wide, *longer]))


def _space_to_depth(reader: GraphReader, proto: onnx.NodeProto) -> Value:
    value, b = reader.given(proto), int(attributes_of(proto)["blocksize"])
    n, c, y, x = _lengths(reader, value)
    block = (b,) * reader.assembly.probes
    shorter = [tuple(k // b for k in axis) for axis in (y, x)]
    split = value.reshaped([n, c, shorter[0], block, shorter[1], block])
    moved = split.permuted([0, 3, 5, 1, 2, 4])
    return moved.reshaped([n, tuple(b * b * k for k in c), *shorter])


OPERATORS: dict[str, Operator] = {
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
