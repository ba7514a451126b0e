"""Convolution by PyTorch, which computes it with oneDNN: where the extra ``torch`` is installed.

Every thread of the team computes slabs of its own, on that thread alone: torch starts none, and
what it is told of threads is taken back. Its arrays are views of ours; a slab of the input is
copied, with its padding, because torch wants channels last and pads both sides alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, ClassVar, NamedTuple, cast, final

import numpy as np

from znni_dask.errors import OptionError
from znni_dask.geometry import Size, ceil_divide, round_up, triple
from znni_dask.kernels.code import LANES, VECTOR_BYTES
from znni_dask.kernels.team import Team
from znni_dask.network.layers import FULL, LOWER, Conv, Layer
from znni_dask.network.network import Weights
from znni_dask.primitives.base import (
    ITEM_BYTES,
    Array,
    Form,
    Primitive,
    Problem,
    Shape,
    direct_flops,
)
from znni_dask.primitives.work import MEMORY, Rate, Work

RATES = {FULL: Rate("torch", 8e10), LOWER: Rate(f"torch {LOWER}", 1.6e11)}  # operations, of
# copies, too
MISSING = "PyTorch, which is not installed: pip install 'znni_dask[torch]'"
LIBRARY_BYTES = 160 << 20  # memory that torch takes, with all it imports
SLAB_BYTES = 32 << 20  # of the padded input that a thread has at once
_HEAP_BYTES = 64 << 20  # of a thread, where glibc keeps for it what torch gave back


@final
@dataclass(frozen=True)
class ConvTorch(Primitive):
    """Convolution on the CPU by PyTorch, any stride, dilation, groups and padding; ``lower``: in
    bfloat16, of layers for which that was asked."""

    lower: bool = False
    layer: ClassVar[type[Layer]] = Conv
    library_bytes: ClassVar[int] = LIBRARY_BYTES
    setup_seconds: ClassVar[float] = 3.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """As the table and plans name it."""
        return f"torch {LOWER}" if self.lower else "torch"

    @property
    def precision(self) -> str:  # type: ignore[override]
        """What it computes in."""
        return LOWER if self.lower else FULL

    def refusal(self, layer: Layer) -> str | None:
        if (reason := super().refusal(layer)) is not None:
            return reason
        if not installed():
            return f"{self.name} needs {MISSING}"
        conv = cast("Conv", layer)
        if conv.whole:
            return f"{self.name} takes no whole window, not {layer.summary}"
        if self.lower and conv.precision != LOWER:
            return f"{self.name} is less than {conv.precision}, in which the layer is computed"
        return None

    def flops(self, problem: Problem) -> int:
        return direct_flops(problem)

    def work(self, problem: Problem, threads: int) -> Work:
        channels = problem.output[1] // cast("Conv", problem.layer).groups
        wasted = round_up(channels, LANES) / channels  # as groups do not share vectors
        copied = Form.PLAIN.nbytes(problem.inputs[0]) + Form.PLAIN.nbytes(problem.output)
        return Work({RATES[self.precision]: wasted * self.flops(problem), MEMORY: 4 * copied})

    def prepared_bytes(self, layer: Layer) -> int:
        return 2 * super().prepared_bytes(layer)  # as they are, while they are put in order

    def workspace_bytes(self, problem: Problem, threads: int) -> int:
        """Of every thread a slab, and what torch makes of it, in forms of its own: the slab, the
        kernels, twice, the answer, and the answer as it is copied from."""
        slab = _Slab.of(problem, threads)
        weights = super().prepared_bytes(problem.layer)
        made = Form.PLAIN.nbytes(slab.made)
        return threads * (2 * (slab.nbytes + weights + made) + _HEAP_BYTES)

    def prepare(self, layer: Layer, weights: Weights) -> tuple[Any, Any]:
        """Kernels, channels last, and biases, as tensors; raises `OptionError` where torch has no
        oneDNN."""
        import torch

        if not torch.backends.mkldnn.is_available():
            raise OptionError(
                f"torch {torch.__version__} was built without oneDNN, so its memory is not known: "
                "install another, or plan without it"
            )
        kind = getattr(torch, self.precision)
        weight, bias = (
            torch.from_numpy(np.require(array, requirements="W"))  # torch takes no other
            for array in (weights["weight"], weights.get("bias", np.zeros(0, np.float32)))
        )
        with _one_thread(torch.get_num_threads()):
            weight = weight.to(kind).contiguous(memory_format=torch.channels_last_3d)
        return weight, bias.to(kind) if len(bias) else None

    def apply(
        self,
        prepared: tuple[Any, Any],
        problem: Problem,
        inputs: Sequence[Array],
        out: Array,
        team: Team,
    ) -> None:
        import torch

        conv, slab = cast("Conv", problem.layer), _Slab.of(problem, team.threads)
        memory = team.scratch(team.threads * slab.nbytes)
        buffers = [memory[i * slab.nbytes :] for i in range(team.threads)]
        source, made = torch.from_numpy(inputs[0]), torch.from_numpy(out)
        turns = ceil_divide(problem.output[2], slab.made[2])
        threads, kind = torch.get_num_threads(), getattr(torch, self.precision)

        def work(first: int, last: int) -> None:
            buffer = buffers.pop()  # there is one for every thread
            with _one_thread(threads):
                for unit in range(first, last):
                    sample, turn = divmod(unit, turns)
                    begin = turn * slab.made[2]
                    end = min(begin + slab.made[2], problem.output[2])
                    stored = torch.from_numpy(buffer).view(kind)
                    x = slab.filled(stored, source[sample], problem, begin, end - begin)
                    found = torch.nn.functional.conv3d(
                        x, *prepared, conv.stride, 0, conv.dilation, conv.groups
                    )
                    if conv.relu:
                        found.relu_()
                    made[sample, :, begin:end].copy_(found[0])
            buffers.append(buffer)

        team.share(work, problem.output[0] * turns)


class _Slab(NamedTuple):
    """Some planes of one sample's output, and the part of the padded input behind them."""

    read: Shape
    made: Shape

    @classmethod
    def of(cls, problem: Problem, threads: int) -> _Slab:
        """As many planes as there is room for, while there is a slab for every thread."""
        batch, channels, planes, *plane = problem.output
        each = ceil_divide(planes * batch, max(threads, batch))
        read = cls._behind(problem, (1, *plane))
        room = SLAB_BYTES // (ITEM_BYTES * problem.inputs[0][1] * read[1] * read[2])
        window = problem.layer.window(0)
        made = (min(each, 1 + max(0, room - window.extent) // window.stride), *plane)
        z, y, x = cls._behind(problem, made)
        return cls((1, problem.inputs[0][1], z, y, x), (1, channels, *triple(made)))

    @staticmethod
    def _behind(problem: Problem, made: Sequence[int]) -> Size:
        windows = [problem.layer.window(axis) for axis in range(3)]
        return triple(
            (n - 1) * window.stride + window.extent for n, window in zip(made, windows, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Memory of the part of the input."""
        return round_up(Form.PLAIN.nbytes(self.read), VECTOR_BYTES)

    def filled(self, stored: Any, source: Any, problem: Problem, begin: int, planes: int) -> Any:
        """What lies behind ``planes`` planes of output from ``begin`` on, with its padding; a
        tensor in what is ``stored``, channels last."""
        size = self._behind(problem, (planes, *self.made[3:]))
        channels = self.read[1]
        slab = stored[: prod(size) * channels].reshape(1, *size, channels).permute(0, 4, 1, 2, 3)
        starts = list(problem.offsets[0])
        starts[0] += begin * problem.layer.window(0).stride
        known, there = [], []
        for start, length, n in zip(starts, size, problem.inputs[0][2:], strict=True):
            first, last = max(start, 0), max(0, min(start + length, n))
            known.append(slice(first, max(first, last)))
            there.append(slice(first - start, max(first, last) - start))
        if any(s.stop - s.start < n for s, n in zip(there, size, strict=True)):
            slab.zero_()
        slab[0, :, there[0], there[1], there[2]].copy_(source[:, known[0], known[1], known[2]])
        return slab


@contextmanager
def _one_thread(before: int) -> Iterator[None]:
    """Have torch use this thread alone; told so in one thread, it also tells threads that begin."""
    import torch

    torch.get_num_threads()  # the first call in a thread sets what was asked for in others
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def installed() -> bool:
    """Whether PyTorch is there."""
    return find_spec("torch") is not None
