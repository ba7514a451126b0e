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

    With ``ceil`` a last window that begins inside counts although it reaches beyond the input.
    ``reflects``: the padding is the input mirrored. ``whole``: every output depends on the whole
    axis; with ``single`` there is only one, and an ``extent`` beyond 1 is the length the axis
    must have. ``same``: the padding is what inputs need for an output every ``stride`` of them
    (TensorFlow's "same"), which depends on their number: of other numbers there are no outputs.
    """

    extent: int = 1
    stride: int = 1
    up: int = 1
    low: int = 0
    high: int = 0
    ceil: bool = False
    reflects: bool = False
    whole: bool = False
    single: bool = False
    same: bool = False

    def size(self, n: int) -> int:
        """Outputs along the axis for ``n`` inputs; not positive where there are none."""
        if self.single:
            return 1 if self.extent in (1, n) else 0
        if self.up > 1:
            return (n - 1) * self.up + self.extent - self.low - self.high
        if self.reflects and max(self.low, self.high) >= n:
            return 0  # there is not enough to be mirrored
        if self.same and self.low + self.high != same_padding(n, self.extent, self.stride):
            return 0
        room = n + self.low + self.high - self.extent
        if not self.ceil:
            return room // self.stride + 1
        last = ceil_divide(room, self.stride)
        return last + 1 if last * self.stride < n + self.low else last

    def drops(self, n: int) -> int:
        """How many of ``n`` inputs no output looks at because the stride steps over them."""
        if self.up > 1 or self.single or self.ceil or self.same:
            return 0
        rest = (n + self.low + self.high - self.extent) % self.stride
        return max(0, rest - max(self.high, 0))

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """Inputs behind outputs ``[start, stop)``; what lies outside the input is padding.

        Of a window that is ``whole`` that is the whole axis, whose length the window does not
        know: see `within`.
        """
        if self.up > 1:
            first = ceil_divide(start + self.low - self.extent + 1, self.up)
            last = (stop - 1 + self.low) // self.up
            return first, max(first, last + 1)
        return start * self.stride - self.low, (stop - 1) * self.stride - self.low + self.extent

    def within(self, start: int, stop: int, bounds: tuple[int, int]) -> tuple[int, int]:
        """`needs` clipped to the inputs that exist, ``[low, high)``: at least one of them, and
        those that are mirrored."""
        low, high = bounds
        if self.whole:
            return low, high
        first, last = self.needs(start, stop)
        if self.reflects:
            below, above = low - first, last - high
            if below > 0:
                last = max(last, low + below + 1)
            if above > 0:
                first = min(first, high - above - 1)
        first = min(max(first, low), high - 1)
        return first, max(min(last, high), first + 1)

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
        return self.up == 1 and (self.low > 0 or self.high > 0 or self.ceil)


SAME = Window()


def same_padding(n: int, extent: int, stride: int) -> int:
    """Voxels to add to ``n`` so that there is an output for every ``stride`` of them."""
    return max((ceil_divide(n, stride) - 1) * stride + extent - n, 0)
