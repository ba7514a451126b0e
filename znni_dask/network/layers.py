"""The layers of a network: what is computed, with no word of how.

Every layer is a frozen value. Spatial parameters are triples in (z, y, x); ``padding`` is a pair
of triples (low, high). Weights lie beside the network under the layer's name (`weight_shapes`
says which arrays a layer wants). Names and meanings are those of ONNX operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from znni_dask.errors import NetworkError
from znni_dask.geometry import Size, text
from znni_dask.network.window import LARGEST, SAME, Window

Padding = tuple[Size, Size]
ONES: Size = (1, 1, 1)
NO_PADDING: Padding = ((0, 0, 0), (0, 0, 0))


def extent(kernel: int, dilation: int) -> int:
    """Length of a dilated window."""
    return (kernel - 1) * dilation + 1


class Layer(ABC):
    """One operation on arrays (batch, channel, z, y, x)."""

    @abstractmethod
    def channels(self, inputs: Sequence[int]) -> int:
        """Channels of the output; raises `NetworkError` where the inputs' do not fit."""

    def window(self, axis: int) -> Window:
        """The layer's window along axis 0 (z), 1 (y) or 2 (x)."""
        return SAME

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of weights."""
        return {}

    def multiply_adds(self) -> int:
        """Multiply-adds for one output voxel with all its channels."""
        return 0

    @property
    def kind(self) -> str:
        """The layer's word in tables and messages."""
        return type(self).__name__

    @property
    def summary(self) -> str:
        """The parameters as shown in a table."""
        return ""


def _one(layer: Layer, inputs: Sequence[int]) -> int:
    if len(inputs) != 1:
        raise NetworkError(f"{layer.kind} takes one input, {len(inputs)} are given")
    return inputs[0]


def _alike(layer: Layer, inputs: Sequence[int]) -> int:
    if len(inputs) < 2:
        raise NetworkError(f"{layer.kind} takes at least two inputs, {len(inputs)} are given")
    wide = max(inputs)
    if any(c not in (1, wide) for c in inputs):
        raise NetworkError(
            f"{layer.kind} of arrays with {', '.join(map(str, inputs))} channels: "
            "they must be equal, or 1"
        )
    return wide


@final
@dataclass(frozen=True)
class Input(Layer):
    """The volume."""

    width: int

    def channels(self, inputs: Sequence[int]) -> int:
        if inputs:
            raise NetworkError("Input takes no inputs")
        return self.width


@final
@dataclass(frozen=True)
class Conv(Layer):
    """Cross-correlation with ``weight`` (out, in / groups, z, y, x), plus ``bias`` (out,)."""

    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size = ONES
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    groups: int = 1

    def channels(self, inputs: Sequence[int]) -> int:
        return _channels_of_convolution(self, self.in_channels, self.out_channels, inputs)

    def window(self, axis: int) -> Window:
        return Window(
            extent(self.kernel[axis], self.dilation[axis]),
            stride=self.stride[axis],
            low=self.padding[0][axis],
            high=self.padding[1][axis],
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "weight": (self.out_channels, self.in_channels // self.groups, *self.kernel),
            "bias": (self.out_channels,),
        }

    def multiply_adds(self) -> int:
        kz, ky, kx = self.kernel
        return self.out_channels * self.in_channels // self.groups * kz * ky * kx

    @property
    def summary(self) -> str:
        return _summary_of_window(
            self.kernel, self.stride, self.dilation, self.padding, self.groups
        )


@final
@dataclass(frozen=True)
class ConvTranspose(Layer):
    """Transposed convolution with ``weight`` (in, out / groups, z, y, x), plus ``bias`` (out,).

    ``padding`` trims the output; ONNX's ``output_padding`` is subtracted from its high side.
    """

    in_channels: int
    out_channels: int
    kernel: Size
    stride: Size = ONES
    dilation: Size = ONES
    padding: Padding = NO_PADDING
    groups: int = 1

    def channels(self, inputs: Sequence[int]) -> int:
        return _channels_of_convolution(self, self.in_channels, self.out_channels, inputs)

    def window(self, axis: int) -> Window:
        length = extent(self.kernel[axis], self.dilation[axis])
        low, high = self.padding[0][axis], self.padding[1][axis]
        if self.stride[axis] == 1:  # an ordinary convolution with the kernel turned round
            return Window(length, low=length - 1 - low, high=length - 1 - high)
        return Window(length, up=self.stride[axis], low=low, high=high)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "weight": (self.in_channels, self.out_channels // self.groups, *self.kernel),
            "bias": (self.out_channels,),
        }

    def multiply_adds(self) -> int:
        kernel = self.kernel[0] * self.kernel[1] * self.kernel[2]
        stride = self.stride[0] * self.stride[1] * self.stride[2]
        return self.out_channels * self.in_channels // self.groups * kernel // stride

    @property
    def summary(self) -> str:
        return _summary_of_window(
            self.kernel, self.stride, self.dilation, self.padding, self.groups
        )


@final
@dataclass(frozen=True)
class MaxPool(Layer):
    """Largest value of each window; padding never wins."""

    kernel: Size
    stride: Size
    dilation: Size = ONES
    padding: Padding = NO_PADDING

    def channels(self, inputs: Sequence[int]) -> int:
        _check_window(self)
        for axis in range(3):
            if max(self.padding[0][axis], self.padding[1][axis]) >= self.window(axis).extent:
                raise NetworkError(f"MaxPool ({self.summary}): a window lies in the padding alone")
        return _one(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(
            extent(self.kernel[axis], self.dilation[axis]),
            stride=self.stride[axis],
            low=self.padding[0][axis],
            high=self.padding[1][axis],
        )

    @property
    def summary(self) -> str:
        return _summary_of_window(self.kernel, self.stride, self.dilation, self.padding, 1)


@final
@dataclass(frozen=True)
class Affine(Layer):
    """``scale`` · x + ``shift``, one of each per channel: a batch normalisation that could not
    be folded into a convolution, or a product or sum with constants."""

    width: int

    def channels(self, inputs: Sequence[int]) -> int:
        found = _one(self, inputs)
        if found != self.width:
            raise NetworkError(f"Affine has {self.width} channels, its input {found}")
        return found

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scale": (self.width,), "shift": (self.width,)}


Function = Literal["relu", "leaky_relu", "prelu", "elu", "tanh", "sigmoid"]


@final
@dataclass(frozen=True)
class Activation(Layer):
    """A function of every value. ``alpha`` is the slope of leaky_relu and the scale of elu;
    prelu has a weight ``slope`` per channel (``width`` of them)."""

    function: Function
    alpha: float = 0.0
    width: int = 0

    def channels(self, inputs: Sequence[int]) -> int:
        found = _one(self, inputs)
        if self.function == "prelu" and found != self.width:
            raise NetworkError(f"PRelu has {self.width} slopes, its input {found} channels")
        return found

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"slope": (self.width,)} if self.function == "prelu" else {}

    @property
    def kind(self) -> str:
        return self.function

    @property
    def summary(self) -> str:
        return f"alpha {self.alpha:g}" if self.function in ("leaky_relu", "elu") else ""


@final
@dataclass(frozen=True)
class Softmax(Layer):
    """Exponentials over the channels of each voxel, divided by their sum."""

    def channels(self, inputs: Sequence[int]) -> int:
        return _one(self, inputs)


@final
@dataclass(frozen=True)
class Add(Layer):
    """Sum; an input with one channel counts for all channels."""

    def channels(self, inputs: Sequence[int]) -> int:
        return _alike(self, inputs)


@final
@dataclass(frozen=True)
class Mul(Layer):
    """Product; an input with one channel counts for all channels."""

    def channels(self, inputs: Sequence[int]) -> int:
        return _alike(self, inputs)


@final
@dataclass(frozen=True)
class Concat(Layer):
    """The inputs' channels behind one another."""

    def channels(self, inputs: Sequence[int]) -> int:
        if not inputs:
            raise NetworkError("Concat takes at least one input")
        return sum(inputs)


@final
@dataclass(frozen=True)
class Pad(Layer):
    """``value`` put around the input."""

    padding: Padding
    value: float = 0.0

    def channels(self, inputs: Sequence[int]) -> int:
        return _one(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(low=self.padding[0][axis], high=self.padding[1][axis])

    @property
    def summary(self) -> str:
        return f"{_padding_text(self.padding)} with {self.value:g}"


@final
@dataclass(frozen=True)
class Crop(Layer):
    """The input without ``low`` first and ``high`` last voxels per axis."""

    low: Size
    high: Size

    def channels(self, inputs: Sequence[int]) -> int:
        return _one(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(low=-self.low[axis], high=-self.high[axis])

    @property
    def summary(self) -> str:
        return _padding_text((self.low, self.high))


@final
@dataclass(frozen=True)
class ChannelSlice(Layer):
    """Channels ``start`` to ``stop`` of the input."""

    start: int
    stop: int

    def channels(self, inputs: Sequence[int]) -> int:
        found = _one(self, inputs)
        if not 0 <= self.start < self.stop <= found:
            raise NetworkError(f"slice of channels {self.start}:{self.stop} out of {found}")
        return self.stop - self.start

    @property
    def summary(self) -> str:
        return f"{self.start}:{self.stop}"


@final
@dataclass(frozen=True)
class Resize(Layer):
    """Every voxel repeated ``factor`` times per axis (nearest neighbour)."""

    factor: Size

    def channels(self, inputs: Sequence[int]) -> int:
        return _one(self, inputs)

    def window(self, axis: int) -> Window:
        return Window(self.factor[axis], up=self.factor[axis])

    @property
    def summary(self) -> str:
        return f"nearest {text(self.factor)}"


def _channels_of_convolution(
    layer: Conv | ConvTranspose, in_channels: int, out_channels: int, inputs: Sequence[int]
) -> int:
    found = _one(layer, inputs)
    _check_window(layer)
    if found != in_channels:
        raise NetworkError(f"{layer.kind} wants {in_channels} channels, its input has {found}")
    if layer.groups < 1 or in_channels % layer.groups or out_channels % layer.groups:
        raise NetworkError(
            f"{layer.kind} from {in_channels} to {out_channels} channels cannot have "
            f"{layer.groups} groups: both must be whole numbers of groups"
        )
    return out_channels


def _check_window(layer: Conv | ConvTranspose | MaxPool) -> None:
    sizes = (*layer.kernel, *layer.stride, *layer.dilation)
    if min(sizes) < 1:
        raise NetworkError(f"{layer.kind} ({layer.summary}): sizes must be positive")
    if max(*sizes, *map(abs, (*layer.padding[0], *layer.padding[1]))) > LARGEST:
        raise NetworkError(f"{layer.kind} ({layer.summary}): sizes beyond {LARGEST} are a mistake")


def _padding_text(padding: Padding) -> str:
    low, high = padding
    return text(low) if low == high else f"{text(low)} to {text(high)}"


def _summary_of_window(
    kernel: Size, stride: Size, dilation: Size, padding: Padding, groups: int
) -> str:
    parts = [text(kernel)]
    if stride != ONES:
        parts.append(f"stride {text(stride)}")
    if dilation != ONES:
        parts.append(f"dilation {text(dilation)}")
    if padding != NO_PADDING:
        parts.append(f"pad {_padding_text(padding)}")
    if groups > 1:
        parts.append(f"{groups} groups")
    return ", ".join(parts)
