"""How a layer maps indices along one axis: the arithmetic under every halo and patch.

The four lines of `size` and `needs` are all the geometry there is; fields of view, halos,
valid sizes and the boxes of a patch follow from them for any graph of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from znni_dask.geometry import ceil_divide

LARGEST = 1 << 16  # voxels: a kernel, stride, padding or alignment beyond it is a mistake


@dataclass(frozen=True)
class Window:
    """One axis of a layer: a sliding window, or an up-sampling one where ``up`` > 1.

    ``extent`` is the window's length including dilation, (kernel - 1) · dilation + 1.
    ``low`` and ``high`` pad the input (negative values crop it); of an up-sampling window
    they trim the output instead, as the padding of a transposed convolution does.
    """

    extent: int = 1
    stride: int = 1
    up: int = 1
    low: int = 0
    high: int = 0

    def size(self, n: int) -> int:
        """Outputs along the axis for ``n`` inputs; not positive where there are none."""
        if self.up > 1:
            return (n - 1) * self.up + self.extent - self.low - self.high
        return (n + self.low + self.high - self.extent) // self.stride + 1

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """Inputs behind outputs ``[start, stop)``; what lies outside the input is padding."""
        if self.up > 1:
            first = ceil_divide(start + self.low - self.extent + 1, self.up)
            last = (stop - 1 + self.low) // self.up
            return first, max(first, last + 1)
        return start * self.stride - self.low, (stop - 1) * self.stride - self.low + self.extent

    def offset(self, output: int, input_start: int) -> int:
        """Place of output ``output``'s first tap relative to an input that begins at
        ``input_start``; for an up-sampling window, in steps of the output's grid."""
        if self.up > 1:
            return output + self.low - input_start * self.up
        return output * self.stride - self.low - input_start

    @property
    def step(self) -> Fraction:
        """Distance between outputs, in inputs."""
        return Fraction(self.stride, self.up)

    @property
    def centre(self) -> Fraction:
        """Where the centre of output 0 lies, in inputs."""
        middle = Fraction(self.extent - 1, 2)
        return (self.low - middle) / self.up if self.up > 1 else middle - self.low

    @property
    def planes_to_keep(self) -> int:
        """Inputs already seen that later outputs read again, when the axis is streamed."""
        if self.up > 1:
            return (self.extent - 1) // self.up
        return max(0, self.extent - self.stride)

    def dilated(self, factor: int) -> Window:
        """The window at stride 1 with its taps ``factor`` apart: what a strided layer, and every
        layer after it, becomes where a network is evaluated at every voxel."""
        return Window(
            (self.extent - 1) * factor + 1, low=self.low * factor, high=self.high * factor
        )

    @property
    def pads(self) -> bool:
        """Whether outputs exist whose window reaches beyond the input."""
        return self.up == 1 and (self.low > 0 or self.high > 0)


SAME = Window()
