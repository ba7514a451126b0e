"""The contract of a primitive: one algorithm for one kind of layer on one device.

A primitive is asked in this order: `refusal` whether it takes a layer at all, `flops` and
`memory_bytes` what a problem costs, `prepare` once per worker for what depends on the weights
alone, then `apply` for every patch. It works on any box of its input: a `Problem` says where the
outputs lie relative to the inputs given, and what lies outside those inputs is padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import log2, prod
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from znni_dask.devices.base import Device
from znni_dask.geometry import Size, ceil_divide, volume
from znni_dask.kernels.code import LANES
from znni_dask.machine import CPU, GPU
from znni_dask.network.layers import FULL, ONES, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.work import LOOPS, Work

Array = NDArray[np.float32]
Shape = tuple[int, int, int, int, int]
ITEM_BYTES = 4
FEWEST_PRODUCTS = 27  # of a sum; of fewer the sum itself is faster than transforms, and loses less
_PLANE_OVERHEAD = 64  # voxels: what starting a plane costs plain loops


class Form(Enum):
    """How an array lies in memory: (batch, channel, z, y, x), or (batch, channels / 16, z, y, x,
    16). What a blocked array holds beyond the last channel means nothing."""

    PLAIN = "plain"
    BLOCKED = "blocked"

    def stored(self, shape: Shape) -> tuple[int, ...]:
        """The shape in memory of an array of a shape."""
        if self is Form.PLAIN:
            return shape
        batch, channels, *size = shape
        return (batch, ceil_divide(channels, LANES), *size, LANES)

    def nbytes(self, shape: Shape) -> int:
        """Memory of an array of a shape."""
        return ITEM_BYTES * prod(self.stored(shape))


@dataclass(frozen=True)
class Problem:
    """One layer on one box: shapes are (batch, channel, z, y, x).

    ``offsets[i]`` is where, in input i, the first tap of output voxel 0 lies (z, y, x); of an
    up-sampling layer it counts in steps of the output's grid (`Window.offset`). ``start`` is the
    place of that voxel in the layer's whole output, ``whole`` the size of its whole first input:
    a few layers do at the edges of the whole what they do nowhere else.
    """

    layer: Layer
    inputs: tuple[Shape, ...]
    output: Shape
    offsets: tuple[Size, ...]
    start: Size
    whole: Size


class Primitive(ABC):
    """Abstract; subclasses are final, have no state and stand in `table.TABLE`.

    ``in_place``: `apply` may be given its first input as output. ``fragments``: the layer is
    evaluated at all offsets of its stride, the fragments joining the batch. ``library_bytes``: what
    a library takes that it computes with, once in a process, ``process_bytes`` beside those on a
    device; ``setup_seconds`` what this takes before the first patch. ``takes``: where `fits` holds
    not for all layers of its kind, in words. ``precision``: what it computes in. ``device``: where,
    "cpu" or "gpu". ``beside``: whether what it computes in is not all scratch memory, which others
    keep meanwhile.
    """

    name: ClassVar[str]
    layer: ClassVar[type[Layer]]
    device: ClassVar[str] = CPU
    beside: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    fragments: ClassVar[bool] = False
    library_bytes: ClassVar[int] = 0
    process_bytes: ClassVar[int] = 0
    setup_seconds: ClassVar[float] = 0.0
    takes: ClassVar[str] = ""
    precision: ClassVar[str] = FULL

    def refusal(self, layer: Layer) -> str | None:
        """Why the primitive cannot take this layer; None where it can."""
        if not isinstance(layer, self.layer):
            return f"{self.name} computes {self.layer.__name__} layers, not {layer.kind}"
        if not self.fits(layer):
            return f"{self.name} takes {self.takes}, not {layer.summary}"
        return None

    def fits(self, layer: Layer) -> bool:
        """Whether a layer of its kind is one that it takes."""
        return True

    def flops(self, problem: Problem) -> int:
        """Arithmetic operations, a multiply-add counting as two."""
        return prod(problem.output)

    def work(self, problem: Problem, threads: int) -> Work:
        """What it takes of a machine, for estimates; here that of plain loops."""
        *_, y, x = problem.output
        slowdown = 1 + _PLANE_OVERHEAD / (y * x)
        return Work({LOOPS: slowdown * self.flops(problem)})

    @property
    def family(self) -> str:
        """Its name, without what tells it from others that do the same in other sizes."""
        return self.name

    def features(self, problem: Problem) -> tuple[float, ...]:
        """What problems differ in of which some take longer than estimated: logarithms, so that 1
        is as much as makes a difference."""
        read, (batch, made, *size) = problem.inputs[0][1], problem.output
        adds = 1 + float(problem.layer.multiply_adds()) / made
        return log2(read), log2(made), log2(adds), log2(prod(size)) / 2, log2(batch) / 2

    def forms(self, layer: Layer, channels: Sequence[int]) -> tuple[Form | None, Form | None]:
        """In which form inputs of so many channels are taken, and the output is made; None: in
        either form, all inputs in the same, and in that one."""
        return Form.PLAIN, Form.PLAIN

    def is_compiled(self, layer: Layer) -> bool:
        """Whether this machine has already what is compiled for a layer; also where nothing is."""
        return True

    def prepared_bytes(self, layer: Layer) -> int:
        """Memory of what `prepare` makes."""
        return weights_bytes(layer)

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Peak memory beyond inputs and output while `apply` runs, scratch memory included."""
        return 0

    def memory_bytes(self, problem: Problem, threads: int) -> int:
        """Peak memory beyond the inputs: output and workspace."""
        channels = [shape[1] for shape in problem.inputs]
        made = self.forms(problem.layer, channels)[1] or Form.BLOCKED  # the larger
        return made.nbytes(problem.output) + self.workspace_bytes(problem, threads)

    def planes_to_keep(self, layer: Layer, axis: int) -> int:
        """Planes of its input that later outputs read again, when ``axis`` is streamed."""
        return layer.window(axis).planes_to_keep

    def fragments_of(self, layer: Layer) -> Size:
        """Fragments per axis that the layer's output falls into."""
        if not self.fragments:
            return ONES
        z, y, x = (layer.window(axis).stride for axis in range(3))
        return z, y, x

    def prepare(self, layer: Layer, weights: Weights) -> Any:
        """What depends on the weights alone; handed to every `apply`."""
        return None

    @abstractmethod
    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Any
    ) -> None:
        """Compute the problem into ``out``; inputs and ``out`` are C-contiguous, in the
        primitive's forms. Who computes is a `Team` of threads, or a `Device` with arrays of its
        own."""


class DevicePrimitive(Primitive):
    """Abstract: computes on a device, with plain arrays.

    What it computes in beyond inputs and output comes from `Device.scratch`, or is counted by
    `workspace_bytes` with it. There is one thread, that of the device.
    """

    device: ClassVar[str] = GPU

    @property
    def family(self) -> str:
        return f"{GPU} {super().family}"

    def placed(self, layer: Layer, weights: Weights, device: Device) -> Any:
        """What depends on the weights alone, in the device's memory, no more than
        `prepared_bytes`; handed to every `apply`."""
        return {key: device.put(value) for key, value in weights.items()}

    @abstractmethod
    def apply(
        self, prepared: Any, problem: Problem, inputs: Sequence[Any], out: Any, team: Device
    ) -> None: ...


def products_of(layer: Layer) -> int:
    """How many products an output of a convolution is the sum of."""
    _, *fan_in = layer.weight_shapes()["weight"]
    return prod(fan_in)


def may_transform(layer: Layer) -> bool:
    """Whether transforms may pay for a convolution: of one voxel, or of few products, the sum
    itself is faster, and loses less."""
    return products_of(layer) >= FEWEST_PRODUCTS and volume(cast("Conv", layer).kernel) > 1


def weights_bytes(layer: Layer) -> int:
    """Memory of a layer's weights, as the network has them."""
    return ITEM_BYTES * sum(map(prod, layer.weight_shapes().values()))


def direct_flops(problem: Problem) -> int:
    """Operations of a convolution whose products are summed one by one."""
    batch, _, z, y, x = problem.output
    return int(2 * problem.layer.multiply_adds() * batch * z * y * x)


def indices(*values: int) -> NDArray[np.int64]:
    """A triple as the array that compiled kernels take."""
    return np.array(values, np.int64)
