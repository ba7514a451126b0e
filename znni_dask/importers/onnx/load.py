"""From an ONNX file to a `Network`: which sizes the graph is read for, and how often.

Shape arithmetic is read for concrete sizes of the volume. A file exported for one size is read
for that size: its constant sizes, crops and shapes become factors and borders, and the network
works at any size. A file with open sizes is read for several at once; what differs between them
depends on the size and is refused. Which remainder these sizes should leave when divided by the
network's alignment is searched for: of a U-Net without padding only some remainders lose nothing
to the rounding of its poolings, and only there its crops mean what they were meant to.
"""

from __future__ import annotations

from contextlib import suppress
from math import lcm
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, triple
from znni_dask.importers.onnx import numbers
from znni_dask.importers.onnx.assembly import Assembly, Entry
from znni_dask.importers.onnx.folding import Folder
from znni_dask.importers.onnx.graph import GraphReader
from znni_dask.importers.onnx.layouts import SPACE
from znni_dask.importers.onnx.operators import OPERATORS
from znni_dask.importers.onnx.soundness import check_graph, opset_of
from znni_dask.importers.onnx.tensors import MALFORMED, Constant, initializers, read_external
from znni_dask.network.field_of_view import sizes_of, slides
from znni_dask.network.network import Network
from znni_dask.network.rewrites import as_sliding
from znni_dask.network.window import LARGEST

_BASE = 2**7 * 3**2 * 5 * 7  # alignments divide it; the cube of it still counts as a number
_MULTIPLES = ((3, 5, 7), (4, 7, 9))  # sizes of the probes, different along every axis
_MOST_REMAINDERS = 256
_MOST_WORK = 1 << 19  # nodes to read while searching for remainders


def load(path: str | Path, size: Size | None = None) -> Network:
    """Read an ONNX file, external data beside it included.

    With ``size`` (z, y, x) axes that the file leaves open are read for that size alone: a network
    that is to be applied to windows of one size may do with it what it likes.

    Raises `NetworkError` where the file is not ONNX, is truncated, contradicts itself or uses
    what is not supported.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise NetworkError(f"{path} is no file")
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError, *MALFORMED) as error:
        raise NetworkError(f"cannot read {path} as ONNX: {error}") from None
    if not model.graph.node or not model.graph.output:
        raise NetworkError(f"{path} is not an ONNX network, or is truncated: it holds no layers")
    try:
        check_graph(model)
        read_external(model, path.parent)
        try:
            return _Model(model, size).network()
        except NetworkError:
            if size is None:
                raise
            # windows of that size may not pass; what is wrong with them is said where they are laid
            with suppress(NetworkError):
                return _Model(model, None).network()
            raise
    except NetworkError as error:
        raise NetworkError(f"{path}: {error}") from None


class _Model:
    """A model with its constants, ready to be read for any sizes."""

    def __init__(self, model: onnx.ModelProto, size: Size | None) -> None:
        self._graph = model.graph
        self._opset = opset_of(model)
        self._constants = initializers(model.graph)
        self._folder = Folder(model.opset_import, self._constants)
        self._kinds, self._channels, self._batch, declared, self._name = self._input()
        types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
        self._numbers = numbers.of_type(types[self._name])
        self._sizes = triple(n or m for n, m in zip(declared, size or (0, 0, 0), strict=True))

    def network(self) -> Network:
        """The network."""
        return self._of_one_size() if all(self._sizes) else self._of_open_size()

    def _of_one_size(self) -> Network:
        """Read for the one size there is. A pool of everything there is may be meant as such, or
        as a pool that happens to fit: the latter, unless the graph does not fit together then or
        is a classifier, whose answer is one voxel."""
        probe = self._probes((0, 0, 0))[0]
        try:
            network = self._reader((0, 0, 0)).network()
        except NetworkError:
            try:
                return self._reader((0, 0, 0), pools_of_all=True).network()
            except NetworkError:
                pass
            raise
        if _ends_in_one_voxel(network, probe):
            network = self._reader((0, 0, 0), pools_of_all=True).network()
        return as_sliding(network, probe)

    def _of_open_size(self) -> Network:
        """Of several remainders that sizes may leave, the one that loses least to rounding."""
        first = self._reader((0, 0, 0))
        network: Network | None = None
        failure = NetworkError()
        try:
            network = first.network()
            if not any(first.assembly.drops):
                return network
        except NetworkError as error:
            failure = error
        remainders: list[int | None] = [None, None, None]
        work = len(self._graph.node) + self._folder.work
        for remainder in self._remainders(network)[: _MOST_WORK // work]:
            reader = self._reader((remainder,) * 3)
            try:
                found = reader.network()
            except NetworkError:
                continue
            network = network or found
            for axis, dropped in enumerate(reader.assembly.drops):
                if not dropped and remainders[axis] is None:
                    remainders[axis] = remainder
            if None not in remainders:
                break
        if any(remainders):
            return self._reader(triple(r or 0 for r in remainders)).network()
        if network is None:
            raise failure
        return network

    @staticmethod
    def _remainders(network: Network | None) -> range:
        """What sizes may leave over when divided by the alignment."""
        spacings = network.spacing.values() if network else ()
        alignment = lcm(*(s.numerator for steps in spacings for s in steps)) if network else 32
        return range(1, min(alignment, _MOST_REMAINDERS))

    def _reader(self, remainder: Size, pools_of_all: bool = False) -> GraphReader:
        kinds, probes = self._kinds, self._probes(remainder)
        entry = Entry(self._name, kinds, self._channels, self._batch, probes, self._numbers)
        return GraphReader(
            self._graph,
            self._opset,
            Assembly(entry),
            self._constants,
            OPERATORS,
            self._folder,
            pools_of_all,
        )

    def _probes(self, remainder: Size) -> tuple[Size, ...]:
        """The sizes to read for: as declared, and several where an axis is open."""
        if all(self._sizes):
            return (triple(n or 1 for n in self._sizes),)
        return tuple(
            triple(
                fixed or multiple * _BASE + r
                for fixed, multiple, r in zip(self._sizes, multiples, remainder, strict=True)
            )
            for multiples in _MULTIPLES
        )

    def _input(self) -> tuple[str, int, int, tuple[int, int, int], str]:
        """Kinds of the input's axes, channels, batch, declared sizes (z, y, x; 0 where open), and
        its name."""
        inputs = [i for i in self._graph.input if i.name not in self._constants]
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs) or "none"
            raise NetworkError(f"a network has one input, this one has {len(inputs)}: {names}")
        name, kind = inputs[0].name, inputs[0].type
        listed = [(d.dim_value, d.HasField("dim_value")) for d in kind.tensor_type.shape.dim]
        dims = [number for number, _ in listed]
        if any(given and not 1 <= number <= LARGEST for number, given in listed):
            raise NetworkError(f"the input {name!r} of {dims} voxels is taken for a mistake")
        if not name or kind.WhichOneof("value") not in (None, "tensor_type"):
            raise NetworkError(f"the input {name!r} is no array, or has no name")
        kernels = self._first_kernels()
        rank = len(dims) or (kernels[0].ndim if kernels else 0)
        if rank not in (3, 4, 5):
            raise NetworkError(
                f"the input {name!r} has rank {rank}: wanted are (batch, channel, z, y, x), "
                "(batch, channel, y, x) or (batch, channel, x)"
            )
        dims = dims or [0] * rank
        space = "".join(SPACE[-(rank - 2) :])
        wanted = kernels[0].shape[1] * kernels[1] if kernels else 0
        # converters from TensorFlow keep channels last, and reshape where there is but one
        last = self._channels_last(name, rank) or (wanted > 0 and dims[1] != wanted == dims[-1])
        kinds = f"n{space}c" if last else f"nc{space}"
        declared = dict(zip(kinds, dims, strict=True))
        channels = declared["c"] or wanted
        if not 1 <= channels <= LARGEST:
            raise NetworkError(f"the input {name!r} does not say how many channels it has")
        sizes = tuple(declared[k] if k in space else 1 for k in SPACE)
        return kinds, channels, declared["n"] or 1, triple(sizes), name

    def _first_kernels(self) -> tuple[Constant, int] | None:
        """The kernels of the first convolution, and its groups."""
        for proto in self._graph.node:
            if proto.op_type == "Conv" and len(proto.input) > 1:
                weight = self._constants.get(proto.input[1])
                if weight is not None and weight.ndim > 2:
                    groups = [a.i for a in proto.attribute if a.name == "group"]
                    return weight, (groups or [1])[0]
        return None

    def _channels_last(self, name: str, rank: int) -> bool:
        """Whether all that reads the input first moves its last axis to the second place."""
        readers = [proto for proto in self._graph.node if name in proto.input]
        order = [0, rank - 1, *range(1, rank - 1)]
        return bool(readers) and all(
            proto.op_type == "Transpose"
            and any(a.name == "perm" and list(a.ints) == order for a in proto.attribute)
            for proto in readers
        )


def _ends_in_one_voxel(network: Network, size: Size) -> bool:
    """Whether a network that pads makes one voxel of an array of ``size``."""
    if slides(network) or max(size) == 1:
        return False
    ends = [sizes_of(network, axis, size[axis]) or {} for axis in range(3)]
    return all(end.get(node) == 1 for end in ends for node in network.outputs.values())
