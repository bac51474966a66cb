"""One description per kind of layer: its matrix, and its rows as sums per part.

A layer computes ``y = W x (+ b)``. Rows are samples: every token of a sequence and every output
position of a convolution. ``a [n, d_in]`` are the inputs and ``g [n, d_out]`` the gradients of the
loss with respect to the outputs, so that ``g^T a`` summed over rows is the weight's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from mkor.convolution import ConvKind
from mkor.linear import LinearKind
from mkor.sums import PartSums, Pick

__all__ = ["LayerKind", "describe"]


class LayerKind(Protocol):
    """How a kind of layer reads as ``y = W x (+ b)``."""

    @property
    def d_in(self) -> int:
        """Columns of ``W``."""

    @property
    def d_out(self) -> int:
        """Rows of ``W``."""

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether input and output of a call are this layer's; a subclass may reshape them."""

    def input_sums(self, x: Tensor, pick: Pick) -> PartSums:
        """Sums of ``a`` over the parts that ``pick`` chooses from the layer's input."""

    def output_sums(self, g: Tensor, pick: Pick) -> PartSums:
        """Sums of raw ``g`` over the same parts, from the gradient of the layer's output."""

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        """All rows of ``a``, as slabs ``[n, d_in]``."""

    def output_rows(self, g: Tensor) -> Iterator[Tensor]:
        """All rows of raw ``g``, as slabs ``[n, d_out]``."""


def _paddings(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


def describe(module: nn.Module) -> LayerKind | str | None:
    """The kind of a layer, if mkor preconditions it.

    Args:
        module: Any module; subclasses of the supported ones count.

    Returns:
        Its description, or the reason why a layer that is nearly one is left to the base
        optimizer, or None for everything else.
    """
    if isinstance(module, nn.Linear):
        return LinearKind(module.in_features, module.out_features)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            return "grouped convolution: every group would need factors of its own"
        kernel = module.kernel_size
        return ConvKind(
            d_in=module.in_channels * math.prod(kernel),
            d_out=module.out_channels,
            kernel=kernel,
            stride=module.stride,
            dilation=module.dilation,
            padding=_paddings(module),
            padding_mode=module.padding_mode,
        )
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention bypasses its layers' hooks"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution: not a supported kind of layer"
    return None
