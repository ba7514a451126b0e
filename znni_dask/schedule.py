"""A plan spelt out for its patches: problems in order, and where every array lies in memory.

Arithmetic on shapes only. The planner reads memory and operations from it and the executor runs
it, so that what is predicted is what is done. Where a primitive takes an array in another form
than the one it was made in, a step of its own brings it into that form. All arrays share one
arena whose layout is made once for the largest patch: an array's place is free again after the
step that reads it last, and a layer that can work in place takes the place of an input that
nobody else reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Protocol

from znni_dask.geometry import Box, Size, add, round_up, triple
from znni_dask.kernels.memory import allocated_bytes
from znni_dask.network.field_of_view import Interval
from znni_dask.network.network import Network, Node
from znni_dask.network.window import SAME, Window
from znni_dask.patches import Fragmented, Patch
from znni_dask.primitives.base import Form, Primitive, Problem, Shape
from znni_dask.primitives.forms import FormChange

ALIGN = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Stored:
    """A layer's output in one form."""

    name: str
    form: Form


@dataclass(frozen=True)
class Operation:
    """A layer computed, or its output brought into another form, whatever the patch."""

    node: Node
    primitive: Primitive
    inputs: tuple[Stored, ...]
    output: Stored


@dataclass(frozen=True)
class Step:
    """One operation to compute for a patch."""

    operation: Operation
    problem: Problem

    @property
    def primitive(self) -> Primitive:
        """What computes it."""
        return self.operation.primitive


@dataclass(frozen=True)
class Arena:
    """The byte at which each array lies, and the bytes of all together."""

    places: Mapping[Stored, int]
    bytes: int


@dataclass(frozen=True)
class Schedule:
    """What an executor does for one patch, or for as many samples at once as ``input_shape`` says.

    The volume within ``input`` is taken once per entry of ``offsets``, moved by it and cut to
    ``input_shape``. Fragment i of the output belongs at ``positions[i]`` plus that offset within
    the patch, its voxels ``spacing`` apart. Of arrays of several fragments the samples of the
    first come first.
    """

    output: Box
    input: Box
    input_shape: Shape
    steps: tuple[Step, ...]
    offsets: tuple[Size, ...]
    positions: tuple[Size, ...]
    spacing: Size


class Arrangement(Protocol):
    """How a network lies over what it is applied to: `patches.Layout`, `windows.WholeWindow`."""

    @property
    def network(self) -> Network:
        """The network."""

    @property
    def strided(self) -> frozenset[str]:
        """Layers that are evaluated at all offsets of their stride."""

    @property
    def fragments(self) -> Size:
        """Fragments per axis that the output falls into."""

    def patch(self, output: Box) -> Patch:
        """The boxes of all layers for ``output``, every such layer fragmented."""

    def patch_with(self, output: Box, fragmented: Fragmented) -> Patch:
        """The same with only some of them fragmented."""

    def stretch(self, axis: int, span: Interval, fragmented: frozenset[str]) -> dict[str, Interval]:
        """One axis of it, for outputs ``span``."""

    def whole(self, name: str, boxes: Mapping[str, Box]) -> Size:
        """Size of a layer's whole output."""


@dataclass(frozen=True, eq=False)
class Schedules:
    """The schedules of all patches of one layout, each layer computed by its primitive, of
    ``samples`` patches of one size at once."""

    layout: Arrangement
    primitives: Mapping[str, Primitive]
    samples: int = 1

    def schedule(self, output: Box) -> Schedule:
        """The schedule of the patch that makes ``output``."""
        patch = self.patch(output)
        source = self.layout.network.input.name
        return Schedule(
            output=output,
            # every offset must find what it reads, which is what all fragments together read
            input=self.layout.patch(output).input,
            input_shape=self._shape(source, patch.boxes[source].size),
            steps=self._steps(patch.boxes),
            offsets=self.offsets(output.size),
            positions=self.positions[self.layout.network.output],
            spacing=self.layout.fragments,
        )

    def offsets(self, size: Size) -> tuple[Size, ...]:
        """The moves of the input after each of which a patch of a size is computed."""
        return tuple(o for o in self._offsets if all(a < n for a, n in zip(o, size, strict=True)))

    def patch(self, output: Box) -> Patch:
        """The boxes of all layers for ``output``, for one offset."""
        return self.layout.patch_with(output, self.fragmented)

    def envelope(self, spans: Sequence[Iterable[Interval]]) -> dict[str, Size]:
        """For every layer the smallest size that holds its box for any patch whose extent along
        axis i is one of ``spans[i]`` (start, stop)."""
        lengths: list[dict[str, int]] = []
        for axis in range(3):
            longest: dict[str, int] = {}
            for span in spans[axis]:
                stretch = self.layout.stretch(axis, span, self.fragmented[axis])
                for name, (start, stop) in stretch.items():
                    longest[name] = max(longest.get(name, 0), stop - start)
            lengths.append(longest)
        return {name: triple(axis[name] for axis in lengths) for name in lengths[0]}

    def sizes(self, output: Box) -> dict[str, Size]:
        """The size of every layer's box for one patch."""
        return self.envelope([[span] for span in zip(output.start, output.stop, strict=True)])

    def arena(self, sizes: Mapping[str, Size]) -> Arena:
        """A place for every layer's output, none larger than its entry of ``sizes``.

        Places go to the largest arrays first, each at the lowest byte that no array alive at
        the same time covers (Pisarchyk and Lee 2020, "greedy by size").
        """
        nbytes = {array: self._bytes(array, sizes[array.name]) for array in self._lives}
        places: dict[Stored, int] = {}
        for array in sorted(nbytes, key=lambda n: (-nbytes[n], self._lives[n])):
            born, dies = self._lives[array]
            taken = sorted(
                (places[other], places[other] + nbytes[other])
                for other in places
                if self._lives[other][0] <= dies and born <= self._lives[other][1]
            )
            place = 0
            for start, stop in taken:
                if place + nbytes[array] <= start:
                    break
                place = max(place, stop)
            places[array] = place
        total = max(places[array] + nbytes[array] for array in places)
        return Arena({array: places[owner] for array, owner in self._owners.items()}, total)

    def alive_bytes(self, sizes: Mapping[str, Size]) -> list[int]:
        """Memory of the arrays that are needed at each operation: written by it or before, and read
        by it or after."""
        nbytes = {array: self._bytes(array, sizes[array.name]) for array in self._lives}
        return [
            sum(nbytes[a] for a, (born, dies) in self._lives.items() if born <= step <= dies)
            for step in range(1, len(self.operations) + 1)
        ]

    def spent_bytes(self, sizes: Mapping[str, Size], threads: int) -> int:
        """Memory of what the primitives prepare of the weights, of the libraries that they compute
        with, and of the largest workspace of any on boxes of ``sizes``, of those beside the scratch
        memory once more; also of fewer samples, of which one may compute more in a pass."""
        largest, beside = self.workspace_bytes(sizes, threads)
        return self.prepared_bytes + allocated_bytes(largest) + beside

    def workspace_bytes(self, sizes: Mapping[str, Size], threads: int) -> tuple[int, int]:
        """The largest workspace, and that of those beside the scratch memory."""
        workspaces = [
            (step.primitive.beside, step.primitive.workspace_bytes(step.problem, threads))
            for some in (self, *(replace(self, samples=n) for n in range(1, self.samples)))
            for step in some.steps(sizes)
        ]
        beside = (nbytes for apart, nbytes in workspaces if apart)
        return max((nbytes for _, nbytes in workspaces), default=0), max(beside, default=0)

    @property
    def prepared_bytes(self) -> int:
        """Memory of what primitives prepare of the weights, and of libraries they compute with."""
        libraries = {type(p): p.library_bytes for p in self.primitives.values()}
        return sum(libraries.values()) + sum(
            self.primitives[node.name].prepared_bytes(node.layer)
            for node in self.layout.network
            if node.inputs
        )

    def steps(self, sizes: Mapping[str, Size]) -> tuple[Step, ...]:
        """The layers to compute on boxes of ``sizes``, for what depends on sizes alone."""
        return self._steps({name: Box((0, 0, 0), size) for name, size in sizes.items()})

    @property
    def repeats(self) -> int:
        """How often a patch is computed: once per offset that is left to plain striding."""
        return len(self._offsets)

    def largest_layer(self, sizes: Mapping[str, Size]) -> str:
        """The layer whose inputs and output together are largest."""
        network = self.layout.network
        return max(
            (node for node in network if node.inputs),
            key=lambda node: sum(
                self._bytes(array, sizes[array.name])
                for array in self._lives
                if array.name in {*node.inputs, node.name}
            ),
            default=network.input,
        ).name

    def _bytes(self, array: Stored, size: Size) -> int:
        return round_up(array.form.nbytes(self._shape(array.name, size)), ALIGN)

    @cached_property
    def fragmented(self) -> Fragmented:
        """Along every axis the strided layers that make fragments."""
        network = self.layout.network
        strided = self.layout.strided
        apart = {n: self.primitives[n].fragments_of(network[n].layer) for n in strided}
        z, y, x = (frozenset(n for n in apart if apart[n][axis] > 1) for axis in range(3))
        return z, y, x

    @cached_property
    def positions(self) -> dict[str, tuple[Size, ...]]:
        """For every layer the place of each of its fragments, in voxels of the answer."""
        network = self.layout.network
        found: dict[str, tuple[Size, ...]] = {network.input.name: ((0, 0, 0),)}
        for node in network:
            if not node.inputs:
                continue
            found[node.name] = found[node.inputs[0]]
            if node.name in self.layout.strided:
                apart = self.primitives[node.name].fragments_of(node.layer)
                moves = _moves(self.layout, node, apart)
                found[node.name] = tuple(
                    triple(a + b for a, b in zip(move, position, strict=True))
                    for move in moves
                    for position in found[node.inputs[0]]
                )
        return found

    @cached_property
    def joins_agree(self) -> bool:
        """Whether everywhere that branches meet they bring the same fragments in one order."""
        return all(
            len({self.positions[name] for name in node.inputs}) <= 1 for node in self.layout.network
        )

    @cached_property
    def _offsets(self) -> tuple[Size, ...]:
        """The moves of the input that make the voxels that fragments leave out.

        Moved by any offset the network makes the voxels of its fragments, moved as much; so the
        moves are those that lay the fragments' positions over every voxel of a stride once.
        """
        positions = self.positions[self.layout.network.output]
        covered: set[Size] = set()
        moves: list[Size] = []
        for place in product(*(range(s) for s in self.layout.fragments)):
            offset = triple(place)
            if offset not in covered:
                moves.append(offset)
                covered |= {add(offset, position) for position in positions}
        return tuple(moves)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """What is computed, in order: every layer, and where the next one takes another form of
        an array the change into that."""
        network = self.layout.network
        forms = {network.input.name: Form.PLAIN}
        made = {Stored(network.input.name, Form.PLAIN)}
        found: list[Operation] = []

        def bring(name: str, form: Form) -> Stored:
            wanted = Stored(name, form)
            if wanted not in made:
                made.add(wanted)
                there = Stored(name, forms[name])
                found.append(Operation(network[name], FormChange(form), (there,), wanted))
            return wanted

        for node in network:
            if not node.inputs:
                continue
            primitive = self.primitives[node.name]
            takes, makes = primitive.forms(node.layer, [network.channels[i] for i in node.inputs])
            if takes is None:
                takes = forms[node.inputs[0]]
            inputs = tuple(bring(name, takes) for name in node.inputs)
            forms[node.name] = makes or takes
            output = Stored(node.name, forms[node.name])
            made.add(output)
            found.append(Operation(node, primitive, inputs, output))
        bring(network.output, Form.PLAIN)
        return tuple(found)

    @cached_property
    def _owners(self) -> dict[Stored, Stored]:
        """The array whose place each array takes: its own, or its operation's first input's."""
        network = self.layout.network
        source = Stored(network.input.name, Form.PLAIN)
        readers = Counter(array for operation in self.operations for array in operation.inputs)
        owners = {source: source}
        for operation in self.operations:
            first, output = operation.inputs[0], operation.output
            owners[output] = output
            alike = (network.channels[first.name], network.reduced[first.name], first.form) == (
                network.channels[output.name],
                network.reduced[output.name],
                output.form,
            )
            asked = first == Stored(network.output, Form.PLAIN)
            if operation.primitive.in_place and readers[first] == 1 and alike and not asked:
                owners[output] = owners[first]
        return owners

    @cached_property
    def _lives(self) -> dict[Stored, tuple[int, int]]:
        """For every place's owner the steps at which it is written first and read last."""
        network = self.layout.network
        lives = {Stored(network.input.name, Form.PLAIN): (0, 0)}
        for step, operation in enumerate(self.operations, start=1):
            owner = self._owners[operation.output]
            lives[owner] = (lives.get(owner, (step, step))[0], step)
            for array in operation.inputs:
                read = self._owners[array]
                lives[read] = (lives[read][0], step)
        last = self._owners[Stored(network.output, Form.PLAIN)]
        lives[last] = (lives[last][0], len(self.operations) + 1)
        return lives

    def _steps(self, boxes: Mapping[str, Box]) -> tuple[Step, ...]:
        return tuple(
            Step(operation, self._problem(operation, boxes)) for operation in self.operations
        )

    def _problem(self, operation: Operation, boxes: Mapping[str, Box]) -> Problem:
        node = operation.node
        made, reads = boxes[node.name], [boxes[array.name] for array in operation.inputs]
        whole = self.layout.whole(operation.inputs[0].name, boxes)
        return self.problem(operation, made, reads, whole)

    def problem(
        self,
        operation: Operation,
        made: Box,
        reads: Sequence[Box],
        whole: Size,
        branches: int = 1,
    ) -> Problem:
        """An operation that makes the box ``made`` from the boxes that it ``reads``, with one of so
        many ``branches`` of all samples."""
        node, changed = operation.node, isinstance(operation.primitive, FormChange)
        names = [array.name for array in operation.inputs]
        shapes = (
            self._shape(name, box.size, branches) for name, box in zip(names, reads, strict=True)
        )
        windows = [SAME if changed else node.layer.window(axis) for axis in range(3)]
        return Problem(
            layer=node.layer,
            inputs=tuple(shapes),
            output=self._shape(node.name, made.size, branches),
            offsets=tuple(
                triple(map(Window.offset, windows, made.start, box.start)) for box in reads
            ),
            start=made.start,
            whole=made.size if changed else whole,
        )

    def _shape(self, name: str, size: Size, branches: int = 1) -> Shape:
        batch = self.samples * len(self.positions[name]) // branches
        return (batch, self.layout.network.channels[name], *size)


def _moves(layout: Arrangement, node: Node, stride: Size) -> list[Size]:
    """All offsets of a layer's stride, in voxels of the volume."""
    spacing = layout.network.spacing[node.inputs[0]]
    return [
        triple(int(o * s) for o, s in zip(offset, spacing, strict=True))
        for offset in product(*(range(s) for s in stride))
    ]
