"""How a convolution moves over images, and which part of them some of its output needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Axis", "Geometry", "Lines", "crop"]


class Axis(NamedTuple):
    """One axis of images and how a kernel moves along it.

    Attributes:
        size: Positions of an image.
        kernel: Taps of the kernel.
        stride: Of the convolution.
        dilation: Of the convolution.
        padding: Before and after.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]

    @property
    def reach(self) -> int:
        """Positions from the kernel's first tap to its last."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def outputs(self) -> int:
        """Positions of the output."""
        return (self.size + sum(self.padding) - self.reach) // self.stride + 1


class Geometry(NamedTuple):
    """How a convolution moves over images; a number for each axis.

    Attributes:
        kernel: Taps.
        stride: Between neighbouring patches.
        dilation: Between neighbouring taps.
        padding: Before and after.
        mode: ``padding_mode``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str

    def axes(self, sizes: Sequence[int]) -> list[Axis]:
        """Its axes.

        Args:
            sizes: Of an image.

        Returns:
            One for each.
        """
        rest = zip(sizes, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return [Axis(*axis) for axis in rest]

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the output.

        Args:
            sizes: Of an image.

        Returns:
            Positions along each axis.
        """
        return tuple(axis.outputs for axis in self.axes(sizes))

    def padded(self, before: int, after: int) -> Geometry:
        """The same convolution with another padding of the first axis.

        Args:
            before: Before the first position; negative to leave some out.
            after: After the last.

        Returns:
            The convolution.
        """
        return self._replace(padding=((before, after), *self.padding[1:]))


class Lines(NamedTuple):
    """Neighbouring positions of a convolution's output along its first axis.

    Attributes:
        start: The first, a tensor in compiled code.
        size: How many.
    """

    start: int | Tensor
    size: int

    def of(self, g: Tensor) -> Tensor:
        """These lines of an output.

        Args:
            g: ``[n, channels, *spatial]``.

        Returns:
            ``[n, channels, size, ...]``.
        """
        if isinstance(self.start, Tensor):
            return g.index_select(2, self.start + torch.arange(self.size, device=g.device))
        return g.narrow(2, self.start, self.size)


def crop(x: Tensor, geometry: Geometry, lines: Lines) -> tuple[Tensor, Geometry]:
    """The part of images that lies under the patches of some lines of the output.

    Args:
        x: ``[n, channels, *spatial]``.
        geometry: Of the convolution, which pads with zeros.
        lines: Of the output.

    Returns:
        A view ``[n, channels, fewer, *spatial]`` (in compiled code a copy), and the convolution
        that makes these lines, and no others, of it.
    """
    stride, (before, after), size = geometry.stride[0], geometry.padding[0], x.shape[2]
    reach = (lines.size - 1) * stride + geometry.axes(x.shape[2:])[0].reach
    start = lines.start * stride - before
    if isinstance(start, Tensor):
        edges = [0, 0] * (x.dim() - 3) + [before, after]
        places = start + before + torch.arange(reach, device=x.device)
        return F.pad(x, edges).index_select(2, places), geometry.padded(0, 0)
    low = min(max(start, 0), size - 1)
    high = max(min(start + reach, size), low + 1)
    return x.narrow(2, low, high - low), geometry.padded(low - start, start + reach - high)
