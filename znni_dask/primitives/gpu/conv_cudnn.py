"""Convolution by cuDNN, through PyTorch: where the extra ``torch`` is installed.

Both libraries look at the same arrays (DLPack), and work in the same stream. A slab of the input is
copied where its padding is not the same at both sides, and every slab's answer from where torch
made it. What torch takes beyond that is its own to decide: cuDNN chooses an algorithm by its
heuristics, with a workspace that cannot be asked for; should there be no room, torch tries the
next one. So slabs are small, and `workspace_bytes` has room for what most algorithms take; torch
keeps what it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.devices.base import Device
from znni_dask.errors import OptionError
from znni_dask.geometry import ceil_divide
from znni_dask.network.layers import FULL, LOWER, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives import conv_torch
from znni_dask.primitives.base import ITEM_BYTES, DevicePrimitive, Problem, direct_flops
from znni_dask.primitives.gpu.rates import PRODUCTS, traffic
from znni_dask.primitives.work import Rate, Work

TENSOR = "tfloat32"  # 10 bits of a number's 23, 3 more than LOWER has
RATES = {
    FULL: PRODUCTS,
    TENSOR: Rate(f"gpu cudnn {TENSOR}", 1.5e14),
    LOWER: Rate(f"gpu cudnn {LOWER}", 3e14),
}  # operations
LIBRARY_BYTES = 600 << 20  # of the device's memory, for torch's and cuDNN's code
SLAB_BYTES = 256 << 20  # of input and output at once
_WORKSPACES = 3  # as large as a slab, weights included: cuDNN's, and orders of its own


@final
@dataclass(frozen=True)
class GpuConvCudnn(DevicePrimitive):
    """Convolution on the GPU by cuDNN, any stride, dilation, groups and padding; in less than
    float32 of layers for which that was asked."""

    precision: str = FULL  # type: ignore[misc]
    layer: ClassVar[type[Layer]] = Conv
    beside: ClassVar[bool] = True
    library_bytes: ClassVar[int] = LIBRARY_BYTES
    process_bytes: ClassVar[int] = conv_torch.LIBRARY_BYTES
    setup_seconds: ClassVar[float] = 5.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """As the table and plans name it."""
        return "cudnn" if self.precision == FULL else f"cudnn {self.precision}"

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        if not conv_torch.installed():
            return f"{self.name} needs {conv_torch.MISSING}"
        conv = cast("Conv", layer)
        if conv.whole:
            return f"{self.name} takes no whole window, not {layer.summary}"
        if self.precision != FULL and conv.precision != LOWER:
            return f"{self.name} is less than {conv.precision}, in which the layer is computed"
        return None

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        """Products, and copies of what is read and made."""
        slabs = problem.output[0] * ceil_divide(problem.output[2], _Slab.of(problem).made[2])
        copied = traffic(problem, passes=3, launches=8 * slabs).amounts
        return Work({RATES[self.precision]: self.flops(problem), **copied})

    def prepared_bytes(self, layer: Layer) -> int:
        return 2 * super().prepared_bytes(layer)  # as they are, while they are made less precise

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """A slab of the input with its padding, what is made of it, and as much and the weights
        for cuDNN, several times."""
        slab = _Slab.of(problem)
        copied = ITEM_BYTES * prod(slab.read)
        taken = copied + ITEM_BYTES * prod(slab.made) + super().prepared_bytes(problem.layer)
        return copied + ITEM_BYTES * prod(slab.made) + _WORKSPACES * taken

    def placed(self, layer: Layer, weights: Weights, device: Device) -> tuple[Any, Any]:
        """Kernels and biases, as tensors; they keep the memory that they lie in. Raises
        `OptionError` where torch knows of no GPU, and the device is one."""
        import torch

        if hasattr(device.xp, "cuda") and not torch.cuda.is_available():
            raise OptionError(
                f"torch {torch.__version__} cannot use this GPU: install another, or plan without "
                f"{self.name}"
            )
        kind = getattr(torch, LOWER) if self.precision == LOWER else torch.float32
        found = [device.put(weights["weight"])]
        if "bias" in weights:
            found.append(device.put(weights["bias"]))
        tensors: list[Any] = []

        def take() -> None:
            with _stream(device):
                tensors.extend(torch.from_dlpack(array).to(kind) for array in found)

        device.lanes.compute.do(take).wait()
        weight, *bias = tensors
        return weight, bias[0] if bias else None

    def apply(
        self,
        prepared: tuple[Any, Any],
        problem: Problem,
        inputs: Sequence[Any],
        out: Any,
        team: Device,
    ) -> None:
        import torch

        weight, bias = prepared
        conv, slab = cast("Conv", problem.layer), _Slab.of(problem)
        memory = team.scratch(ITEM_BYTES * prod(slab.read)).view(np.float32)
        with _stream(team), _settings(self.precision):
            stored, source, made = map(torch.from_dlpack, (memory, inputs[0], out))
            for begin in range(0, out.shape[2], slab.made[2]):
                end = min(begin + slab.made[2], out.shape[2])
                for sample in range(len(out)):
                    x, padding = slab.seen(problem, stored, source[sample], begin, end)
                    found = torch.nn.functional.conv3d(
                        *(x.to(weight.dtype), weight, bias, conv.stride, padding),
                        *(conv.dilation, conv.groups),
                    )
                    made[sample, :, begin:end].copy_(found[0])
                    del x, found  # before the next one is made
            if conv.relu:
                made.relu_()


class _Slab(NamedTuple):
    """Some planes of one sample's output, and the part of the padded input behind them."""

    read: tuple[int, ...]
    made: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem) -> _Slab:
        """As many planes as there is room for."""
        _, channels, planes, *plane = problem.output
        conv = cast("Conv", problem.layer)
        z, *extents = (conv.window(axis) for axis in range(3))
        behind = [
            (n - 1) * window.stride + window.extent
            for n, window in zip(plane, extents, strict=True)
        ]
        each = ITEM_BYTES * (channels * prod(plane) + z.stride * conv.in_channels * prod(behind))
        made = min(planes, max(1, SLAB_BYTES // each))
        made = ceil_divide(planes, ceil_divide(planes, made))  # all of one size, nearly
        read = (made - 1) * z.stride + z.extent
        return cls((1, conv.in_channels, read, *behind), (1, channels, made, *plane))

    def seen(
        self, problem: Problem, stored: Any, source: Any, begin: int, end: int
    ) -> tuple[Any, Any]:
        """What lies behind planes of a sample's output, and the padding that it lacks: the input
        itself, or with all its padding in what is ``stored``."""
        conv = cast("Conv", problem.layer)
        places, low, high = [], [], []
        wanted = (end - begin, *self.made[3:])
        for axis, (first, length) in enumerate(
            zip(problem.offsets[0], problem.inputs[0][2:], strict=True)
        ):
            window = conv.window(axis)
            first += begin * window.stride if axis == 0 else 0
            last = first + (wanted[axis] - 1) * window.stride + window.extent
            start = min(max(first, 0), length)
            stop = max(start, min(last, length))
            places.append(slice(start, stop))
            low.append(min(start - first, last - first))
            high.append(last - first - low[-1] - (stop - start))
        part = source[(slice(None), *places)]
        if low == high and part.numel():
            return part[None], tuple(low)
        size = [a + s.stop - s.start + b for a, s, b in zip(low, places, high, strict=True)]
        slab = stored[: conv.in_channels * prod(size)].reshape(1, -1, *size)
        slab.zero_()
        there = (slice(a, n - b) for a, b, n in zip(low, high, size, strict=True))
        slab[(0, slice(None), *there)].copy_(part)
        return slab, 0


@contextmanager
def _stream(device: Device) -> Iterator[None]:
    """Have torch work in the stream of the device's arrays, if it has any."""
    cuda = getattr(device.xp, "cuda", None)
    if cuda is None:
        yield
        return
    import torch

    here = torch.cuda.ExternalStream(cuda.get_current_stream().ptr, device=cuda.Device().id)
    with torch.cuda.stream(here):
        yield


@contextmanager
def _settings(precision: str) -> Iterator[None]:
    """Have cuDNN compute so; what it was told before is told it again."""
    import torch

    told: Any = torch.backends.cudnn
    name, wanted = "allow_tf32", cast("Any", precision == TENSOR)
    if hasattr(told, "conv"):  # from torch 2.9 on
        told, name = told.conv, "fp32_precision"
        wanted = "tf32" if precision == TENSOR else "ieee"
    before = getattr(told, name)
    setattr(told, name, wanted)
    try:
        with torch.no_grad():
            yield
    finally:
        setattr(told, name, before)
