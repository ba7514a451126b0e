"""Run a plan on one patch, layer after layer: the reference for every other executor.

"Serial" is the order of the layers; each layer is computed by all threads of the team, or by a
device that lends itself sub-layer by sub-layer. One arena holds all activations; it is allocated
once and serves every patch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.devices.base import Device
from znni_dask.devices.ferry import Ferry
from znni_dask.executors.spent import Spent
from znni_dask.geometry import Size, add
from znni_dask.kernels.direct import SLACK_BYTES
from znni_dask.kernels.memory import allocate, floats
from znni_dask.kernels.team import Team
from znni_dask.machine import GPU_RAM
from znni_dask.network.network import Network
from znni_dask.primitives.base import Array, Form, Primitive, Shape
from znni_dask.primitives.fragments import recombine
from znni_dask.primitives.offloaded import Offloading, offloading
from znni_dask.schedule import Schedule, Schedules, Stored


class SerialExecutor(Closing):
    """Computes patches of one network on the CPU, whose layers' boxes lie within ``sizes``;
    prepared weights are kept between patches. Some primitives have a ``device`` compute sub-layers.

    Not for use by several threads at once. Use it as a context manager, or `close` it, and with it
    the device.
    """

    def __init__(
        self,
        schedules: Schedules,
        sizes: Mapping[str, Size],
        threads: int,
        device: Device | None = None,
    ) -> None:
        self.network, arena = schedules.layout.network, schedules.arena(sizes)
        self._seconds: defaultdict[Stored, float] = defaultdict(float)
        self._team = Team(threads)
        self._device = device
        steps = schedules.steps(sizes) if device else ()
        lent = offloading((step.primitive, step.problem) for step in steps)
        self._ferry = device and lent and ferry_to(device, self._team, lent)
        self._prepared = prepared(self.network, schedules.primitives)
        self._places = arena.places
        self._arena = allocate(arena.bytes + SLACK_BYTES)

    def run(
        self, todo: Schedule, volumes: Sequence[NDArray[np.generic]], outs: Sequence[Array]
    ) -> None:
        """Compute one patch of each of so many ``volumes`` as ``todo`` has samples.

        A volume is the extended volume within ``todo.input``, (channel, z, y, x), of any real
        dtype; its answer, (channel, z, y, x) of size ``todo.output.size``, goes into the one of
        ``outs`` at its place.
        """
        for offset in todo.offsets:
            made = self.fragments(todo, volumes, offset)
            numbers = {add(position, offset): i for i, position in enumerate(todo.positions)}
            for sample, out in enumerate(outs):
                fragments = made[sample :: len(outs)]
                recombine(fragments, numbers, todo.spacing, out, self._team)

    def fragments(
        self, todo: Schedule, volumes: Sequence[NDArray[np.generic]], offset: Size = (0, 0, 0)
    ) -> Array:
        """What the network makes of the volumes, moved by an offset: fragments (fragment and
        sample, channel, z, y, x), there until the next are made."""
        z, y, x = (slice(o, o + n) for o, n in zip(offset, todo.input_shape[2:], strict=True))
        source = Stored(self.network.input.name, Form.PLAIN)
        arrays = {source: self._view(source, todo.input_shape)}
        for sample, volume in zip(arrays[source], volumes, strict=True):
            sample[...] = volume[:, z, y, x]
        for step in todo.steps:
            begin = perf_counter()
            output = step.operation.output
            arrays[output] = self._view(output, step.problem.output)
            step.primitive.apply(
                self._prepared.get(output.name),
                step.problem,
                [arrays[i] for i in step.operation.inputs],
                arrays[output],
                self._ferry if step.primitive.device == GPU_RAM else self._team,
            )
            self._seconds[output] += perf_counter() - begin
        return arrays[Stored(self.network.output, Form.PLAIN)]

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return Spent(seconds)

    def close(self) -> None:
        """End the threads and free the arena."""
        self._team.close()
        self._ferry = None
        if self._device is not None:
            self._device.close()
        self._arena = np.empty(0, np.uint8)

    def _view(self, array: Stored, shape: Shape) -> Array:
        found: Array = floats(self._arena[self._places[array] :], array.form.stored(shape))
        return found


def ferry_to(device: Device, team: Team, lent: Offloading) -> Ferry:
    """To a device that computes sub-layers, with all memory that it will take there. Raises
    `DeviceError` where there is no room."""
    device.scratch(lent.scratch)
    ferry = Ferry(device, team, lent.load)
    device.empty(lent.kernels)  # given back at once, to the device's pool, which keeps it for them
    return ferry


def prepared(network: Network, primitives: Mapping[str, Primitive]) -> dict[str, Any]:
    """Of every layer what its primitive prepares of the weights."""
    return {
        node.name: primitives[node.name].prepare(node.layer, network.weights.get(node.name, {}))
        for node in network
        if node.inputs
    }
