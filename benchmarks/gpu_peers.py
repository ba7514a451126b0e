"""PyTorch on a GPU: layers and whole networks in float32, in TF32 and in bfloat16.

Each is timed contiguous and with channels last, cuDNN choosing the fastest algorithm beforehand
(``cudnn.benchmark``). A layer of more than `PEER_FLOPS` operations is computed in part (fewer
samples, or fewer planes), and its time is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional
from torch_network import FORMATS, TorchNetwork, fragments

from gpu_device import Bench, Call, Timing, error_of
from layer import Point
from znni_dask.devices.base import Device
from znni_dask.network.layers import NO_PADDING, Conv, ConvTranspose, Layer, MaxPool
from znni_dask.network.network import Network
from znni_dask.primitives.base import Array, Problem
from znni_dask.schedule import Schedule

Made = TypeVar("Made")
PEER_FLOPS = 1e12
STEP_FLOPS = 3e11  # of a layer of a network
_PEER_VALUES = 1 << 30  # of the input of a part
FLOAT32, TF32, BF16 = "float32", "tf32", "bfloat16"
PRECISIONS = {FLOAT32: torch.float32, TF32: torch.float32, BF16: torch.bfloat16}


@contextmanager
def computing(device: Device, precision: str, benchmark: bool = True) -> Iterator[None]:
    """Have PyTorch compute so precisely, in the stream of the device; what it was told before is
    told it again."""
    told: Any = torch.backends.cudnn
    before = told.conv.fp32_precision, told.benchmark
    told.conv.fp32_precision = "tf32" if precision == TF32 else "ieee"
    told.benchmark = benchmark
    try:
        with torch.inference_mode(), _stream(device):
            yield
    finally:
        told.conv.fp32_precision, told.benchmark = before


@contextmanager
def _stream(device: Device) -> Iterator[None]:
    cuda = getattr(device.xp, "cuda", None)
    if cuda is None:
        yield
        return
    with torch.cuda.stream(torch.cuda.ExternalStream(cuda.get_current_stream().ptr)):
        yield


def seen_from(device: Device) -> str:
    """Where PyTorch has its arrays."""
    return "cuda" if hasattr(device.xp, "cuda") else "cpu"


@dataclass(frozen=True)
class Peer:
    """A layer by PyTorch: as a call, its answer, and the ``share`` of the whole layer that it
    is."""

    call: Call
    answer: Callable[[], Any]
    share: float


def convolutions(point: Point, device: Device) -> dict[str, Peer]:
    """A point by PyTorch in all precisions and formats."""
    part = point.part(PEER_FLOPS)
    where = seen_from(device)
    x, *weights = (
        torch.from_numpy(array).to(where)
        for array in (part.x, part.weights["weight"], part.weights["bias"])
    )
    share, found = part.flops / point.flops, {}
    for precision, dtype in PRECISIONS.items():
        for name, memory in FORMATS.items():
            placed = [x, weights[0]]
            arrays = [a.to(dtype).contiguous(memory_format=memory) for a in placed]
            apply = partial(_applied, point.layer, *arrays, weights[1].to(dtype))
            found[f"torch {precision}{name}"] = _peer(apply, device, precision, share)
    _settle(where)
    return found


def _settle(where: str) -> None:
    """Wait for what was placed: layers are computed in another stream."""
    if where == "cuda":
        torch.cuda.synchronize()


def _peer(apply: Callable[[], Any], device: Device, precision: str, share: float) -> Peer:
    def call() -> Any:
        with computing(device, precision):
            return apply()

    return Peer(call, call, share)


def _applied(layer: Layer, x: Any, weight: Any, bias: Any) -> Any:
    if isinstance(layer, ConvTranspose):
        return functional.conv_transpose3d(x, weight, bias, layer.stride)
    assert isinstance(layer, Conv)
    low, _ = layer.padding
    made = functional.conv3d(x, weight, bias, layer.stride, low, layer.dilation, layer.groups)
    return made.relu_() if layer.relu else made


def exact(point: Point, device: Device, size: tuple[int, int, int]) -> dict[str, Array]:
    """The first outputs of a point, in double precision; and the last, of a plain convolution. All
    its samples are the same."""
    point = replace(point, batch=1)
    found = {"first": _first(point, device, size)}
    if isinstance(point.layer, Conv) and point.layer.padding == NO_PADDING:
        read = [n + k - 1 for n, k in zip(size, point.layer.kernel, strict=True)]
        z, y, x_ = (slice(-n, None) for n in read)
        found["last"] = _in_double_precision(point, device, point.x[:, :, z, y, x_])
    return found


def _first(point: Point, device: Device, size: tuple[int, int, int]) -> Array:
    layer = point.layer
    read = [
        min(last, n)
        for last, n in zip(
            (layer.window(axis).needs(0, size[axis])[1] for axis in range(3)),
            point.shape[2:],
            strict=True,
        )
    ]
    z, y, x_ = map(slice, read)
    made = _in_double_precision(point, device, point.x[:, :, z, y, x_])
    z, y, x_ = map(slice, size)
    return made[:, z, y, x_]


def _in_double_precision(point: Point, device: Device, x: Array) -> Array:
    arrays = (np.ascontiguousarray(x), point.weights["weight"], point.weights["bias"])
    there = (torch.from_numpy(a).to(seen_from(device), torch.float64) for a in arrays)
    made: Array = _applied(point.layer, *there)[0].cpu().numpy()
    return made


def part_of(made: Any, size: tuple[int, int, int]) -> Array:
    """The first outputs of the first sample of what PyTorch made."""
    z, y, x = map(slice, size)
    found: Array = made[0, :, z, y, x].to(torch.float32).cpu().contiguous().numpy()
    return found


def pooled(layer: MaxPool, device: Device, shape: tuple[int, ...]) -> dict[str, Call]:
    """Pooling into fragments by PyTorch, in both formats."""
    x = torch.randn(shape, device=seen_from(device))

    def call(placed: Any) -> Any:
        with computing(device, FLOAT32):
            return fragments(layer, placed)

    found: dict[str, Call] = {
        f"torch float32{name}": partial(call, x.contiguous(memory_format=memory))
        for name, memory in FORMATS.items()
    }
    _settle(seen_from(device))
    return found


def steps(todo: Schedule, device: Device) -> Iterator[tuple[str, dict[str, Call], float]]:
    """Of every layer of a chain its name, calls by precision and format, and the share of the
    layer that these compute. In less than float32 only channels last, which cuDNN likes better."""
    for step in todo.steps:
        problem, name = step.problem, step.operation.node.name
        part, share = part_of_problem(problem)
        layer, where = problem.layer, seen_from(device)
        if isinstance(layer, Conv):
            calls: dict[str, Call] = {}
            fan = layer.weight_shapes()["weight"]
            for precision, dtype in PRECISIONS.items():
                for format_, memory in FORMATS.items():
                    if precision != FLOAT32 and memory is torch.contiguous_format:
                        continue
                    x = torch.randn(part, device=where).to(dtype).contiguous(memory_format=memory)
                    weight = torch.randn(fan, device=where).to(dtype)
                    weight = weight.contiguous(memory_format=memory)
                    bias = torch.zeros(fan[0], device=where, dtype=dtype)
                    apply = partial(_applied, layer, x, weight, bias)
                    peer = _peer(apply, device, precision, share)
                    calls[f"{precision}{format_}"] = peer.call
            _settle(where)
        else:
            assert isinstance(layer, MaxPool)
            calls = {
                key.removeprefix("torch "): call
                for key, call in pooled(layer, device, part).items()
            }
        yield name, calls, share


def part_of_problem(problem: Problem) -> tuple[tuple[int, ...], float]:
    """The shape of a part of a problem's input, of as many samples and planes as PyTorch is to
    compute, and its share of the work."""
    batch, channels, planes, *plane = problem.inputs[0]
    layer = problem.layer
    flops = 2 * float(layer.multiply_adds()) * prod(problem.output[2:]) * batch
    values = prod(problem.inputs[0])
    share = min(1.0, STEP_FLOPS / max(flops, 1.0), _PEER_VALUES / values)
    some = max(1, min(batch, ceil(share * batch)))
    if some > 1 or share * batch >= 1:
        return (some, channels, planes, *plane), some / batch
    extent = layer.window(0).extent
    made = max(1, round(share * batch * (planes - extent + 1)))
    depth = made + extent - 1
    if isinstance(layer, MaxPool):
        depth = min(planes, max(8, depth))
        return (1, channels, depth, *plane), depth / planes / batch
    return (1, channels, depth, *plane), made / (planes - extent + 1) / batch


def sum_of(timings: Mapping[str, Timing], share: float) -> dict[str, float]:
    """The best seconds in every precision, of the whole; pooling is as fast in all."""
    found: dict[str, float] = {}
    for precision in PRECISIONS:
        some = [t.seconds for name, t in timings.items() if name.startswith(precision) and t.rounds]
        some = some or [t.seconds for t in timings.values() if t.rounds]
        found[precision] = min(some, default=float("nan")) / share
    return found


class Whole:
    """A network by PyTorch, from and to the host's memory."""

    def __init__(self, network: Network, bench: Bench) -> None:
        self._where, self._device_free = bench.torch_device, bench.take_back
        self._networks = {
            f"torch {precision}{name}": TorchNetwork(
                network, 0, memory, device=self._where, dtype=dtype
            )
            for precision, dtype in PRECISIONS.items()
            for name, memory in FORMATS.items()
        }

    def calls(self, x: Array) -> dict[str, Call]:
        """What applies it to an array (batch, channel, z, y, x)."""
        return {name: partial(self._call, name, x) for name in self._networks}

    def _call(self, name: str, x: Array) -> Array:
        told: Any = torch.backends.cudnn
        before = told.conv.fp32_precision, told.benchmark
        told.conv.fp32_precision = "tf32" if TF32 in name else "ieee"
        told.benchmark = True
        try:
            return self._networks[name].apply(x)
        finally:
            told.conv.fp32_precision, told.benchmark = before


def precise(
    network: Network, bench: Bench, double: bool, call: Callable[[TorchNetwork], Made]
) -> Made:
    """What ``call`` does with a network that others are compared with: in double precision, or in
    whole float32 where that would take too long."""
    told: Any = torch.backends.cudnn
    before, told.conv.fp32_precision = told.conv.fp32_precision, "ieee"
    dtype = torch.float64 if double else torch.float32
    try:
        memory = torch.contiguous_format
        return call(TorchNetwork(network, 0, memory, device=bench.torch_device, dtype=dtype))
    finally:
        told.conv.fp32_precision = before
        bench.take_back()


def errors(answers: Mapping[str, Array], want: Array) -> dict[str, float]:
    """Relative errors of answers."""
    return {name: error_of(made, want) for name, made in answers.items()}
