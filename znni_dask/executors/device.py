"""Run a plan on a patch, on a device that computes in memory of its own.

A patch is copied there, computed, and its answer copied back, each on a lane of its own. Whoever
asks waits for the answer; of several threads that ask one fills the next patch in, and another
takes an answer out, while the device computes.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from znni_dask.closing import Closing
from znni_dask.devices.base import Device, Mark
from znni_dask.executors.lanes import Clock
from znni_dask.executors.serial import SerialExecutor
from znni_dask.executors.spent import Spent
from znni_dask.geometry import Size, add
from znni_dask.kernels.memory import floats
from znni_dask.machine import GPU
from znni_dask.network.network import Network
from znni_dask.primitives.base import Array, DevicePrimitive, Form, Primitive, Shape
from znni_dask.primitives.gpu.fragments import weave
from znni_dask.resources import SLOTS, slot_bytes
from znni_dask.schedule import Schedule, Schedules, Stored
from znni_dask.timeline import Span


class DeviceExecutor(Closing):
    """Computes patches on a device, each within ``patch`` and its layers' boxes within ``sizes``;
    prepared weights are kept between patches. Use it as a context manager, or `close` it, and with
    it the device."""

    def __init__(
        self, schedules: Schedules, sizes: Mapping[str, Size], patch: Size, device: Device
    ) -> None:
        network, arena = schedules.layout.network, schedules.arena(sizes)
        given_bytes, made_bytes = slot_bytes(schedules, sizes, patch)
        self.network, self._device = network, device
        self._seconds: defaultdict[Stored, float] = defaultdict(float)
        self._spans: list[Span] = []
        self._lock, self._clock = threading.Lock(), Clock(device)
        self._placed: dict[str, Any] = placed(network, schedules.primitives, device)
        self._places = arena.places
        self._arena = device.empty(arena.bytes)
        scratch, _ = schedules.workspace_bytes(sizes, threads=1)
        device.scratch(scratch)  # or there is no room: now
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._slots.put(_Slot(device, given_bytes, made_bytes))

    def run(
        self, todo: Schedule, volumes: Sequence[NDArray[np.generic]], outs: Sequence[Array]
    ) -> None:
        """The same as `SerialExecutor.run`; several threads may ask at once."""
        slot = self._slots.get()
        try:
            reach = [
                max(offset[axis] for offset in todo.offsets) + todo.input_shape[2 + axis]
                for axis in range(3)
            ]
            z, y, x = map(slice, reach)
            given, there = slot.given((len(volumes), len(volumes[0]), *reach))
            for sample, volume in zip(given, volumes, strict=True):
                sample[...] = volume[:, z, y, x]
            made, answer = slot.made((len(outs), *outs[0].shape))
            marks: list[tuple[Stored, Mark, Mark]] = []
            do, copy = self._clock.do, self._device.copy
            sent = do("up", partial(copy, there, given))
            work = partial(self._compute, todo, there, made, marks)
            computed = do("compute", work, [sent.end])
            back = do("down", partial(copy, answer, made), [computed.end])
            back.end.wait()
            for out, sample in zip(outs, answer, strict=True):
                out[...] = sample
        finally:
            self._slots.put(slot)
        spans = [self._clock.span(one) for one in (sent, computed, back)]
        with self._lock:
            self._spans.extend(spans)
            for array, begin, end in marks:
                self._seconds[array] += end.seconds_since(begin)

    def _compute(
        self, todo: Schedule, given: Any, made: Any, marks: list[tuple[Stored, Mark, Mark]]
    ) -> None:
        device = self._device
        source = Stored(self.network.input.name, Form.PLAIN)
        for offset in todo.offsets:
            z, y, x = (slice(o, o + n) for o, n in zip(offset, todo.input_shape[2:], strict=True))
            arrays = {source: self._view(source, todo.input_shape)}
            arrays[source][...] = given[:, :, z, y, x]
            for step in todo.steps:
                begin = device.lanes.compute.mark()
                output = step.operation.output
                arrays[output] = self._view(output, step.problem.output)
                step.primitive.apply(
                    self._placed.get(output.name),
                    step.problem,
                    [arrays[i] for i in step.operation.inputs],
                    arrays[output],
                    device,
                )
                marks.append((output, begin, device.lanes.compute.mark()))
            numbers = {add(position, offset): i for i, position in enumerate(todo.positions)}
            fragments = arrays[Stored(self.network.output, Form.PLAIN)]
            for sample, out in enumerate(made):
                weave(fragments[sample :: len(made)], numbers, todo.spacing, out, device)

    def taken(self) -> Spent:
        """The time spent since this was last asked."""
        with self._lock:
            spent = Spent(self._seconds, self._spans)
            self._seconds, self._spans = defaultdict(float), []
        return spent

    def close(self) -> None:
        """Give the device's memory back, and close it."""
        self._arena = None
        self._placed.clear()
        while not self._slots.empty():
            self._slots.get()
        self._device.close()

    def _view(self, array: Stored, shape: Shape) -> Any:
        return floats(self._arena[self._places[array] :], shape)


class _Slot:
    """Where the input of a patch and its answer lie, on both sides."""

    def __init__(self, device: Device, given_bytes: int, made_bytes: int) -> None:
        self._given = device.pinned(given_bytes), device.empty(given_bytes)
        self._made = device.empty(made_bytes), device.pinned(made_bytes)

    def given(self, shape: tuple[int, ...]) -> tuple[Array, Any]:
        """An input of this shape: on the host, on the device."""
        here, there = (floats(memory, shape) for memory in self._given)
        return here, there

    def made(self, shape: tuple[int, ...]) -> tuple[Any, Array]:
        """An answer of this shape: on the device, on the host."""
        there, here = (floats(memory, shape) for memory in self._made)
        return there, here


def placed(network: Network, primitives: Mapping[str, Primitive], device: Device) -> dict[str, Any]:
    """Of every layer what its primitive prepares of the weights, on the device."""
    found: dict[str, Any] = {}
    for node in network:
        if node.inputs:
            primitive = primitives[node.name]
            assert isinstance(primitive, DevicePrimitive)
            weights = network.weights.get(node.name, {})
            found[node.name] = primitive.placed(node.layer, weights, device)
    return found


def executor_of(
    schedules: Schedules,
    sizes: Mapping[str, Size],
    patch: Size,
    threads: int,
    device: Device | None,
) -> SerialExecutor | DeviceExecutor:
    """What computes such patches: a device, or so many threads of the CPU, perhaps with one."""
    if device is not None and all(p.device == GPU for p in schedules.primitives.values()):
        return DeviceExecutor(schedules, sizes, patch, device)
    return SerialExecutor(schedules, sizes, threads, device)
