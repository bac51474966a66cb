"""One description per kind of layer: its matrix, and its rows as sums per part.

A layer computes ``y = W x (+ b)``. Rows are samples: every token of a sequence and every output
position of a convolution. ``a [n, d_in]`` are the inputs and ``g [n, d_out]`` the gradients of the
loss with respect to the outputs, so that ``g^T a`` summed over rows is the weight's gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from mkor import native
from mkor.layers.convolution import ConvKind
from mkor.layers.geometry import Geometry
from mkor.layers.linear import LinearKind
from mkor.layers.sums import PartSums, Pick

__all__ = ["LayerKind", "Role", "describe"]


class LayerKind(Protocol):
    """How a kind of layer reads as ``y = W x (+ b)``."""

    @property
    def d_in(self) -> int:
        """Columns of ``W``."""

    @property
    def d_out(self) -> int:
        """Rows of ``W``."""

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether input and output are what this layer takes and makes, sample by sample.

        A subclass may change them first, a hook afterwards; then there is nothing to capture.
        """

    def input_sums(self, x: Tensor | Sequence[Tensor], pick: Pick) -> PartSums:
        """Sums of ``a`` over the parts that ``pick`` chooses from the layer's input.

        Of several layers' inputs, shaped alike, vectors are ``[B, k, d]`` and squares ``[B]``.
        """

    def output_sums(self, g: Tensor | Sequence[Tensor], pick: Pick) -> PartSums:
        """Sums of raw ``g`` over the same parts, from the gradient of the layer's output."""

    def plan(self, x: Sequence[int], g: Sequence[int], pick: Pick) -> native.Plan | None:
        """How kernels sum a call whose input and output have sizes ``x`` and ``g``, if they can."""

    def stacks(self, x: Tensor, pick: Pick) -> bool:
        """Whether calls with inputs or output gradients like ``x`` are summed faster together."""

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


@dataclass(frozen=True)
class Role:
    """One matrix of a module.

    Attributes:
        kind: How it reads as ``y = W x (+ b)``.
        name: What is added to the module's name.
        holder: The submodule that holds the parameters; empty for the module itself.
        weight: Name of the weight in its holder.
        bias: Name of the bias in its holder; empty if it has none of its own.
        transposed: Whether the weight is stored as ``[d_in, d_out]``.
        hidden: Whether the product is computed without calling a module for it, so that no hook
            sees its input; it is then found in the autograd graph of the module's output.
    """

    kind: LayerKind
    name: str = ""
    holder: str = ""
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    hidden: bool = False


def describe(module: nn.Module) -> tuple[Role, ...] | str | None:
    """The matrices of a module that mkor preconditions.

    Args:
        module: Any module; subclasses of the supported ones count.

    Returns:
        Their descriptions, or the reason why a layer that is nearly one is left to the base
        optimizer, or None for everything else.
    """
    if isinstance(module, nn.Linear):
        return (Role(LinearKind(module.in_features, module.out_features)),)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolution(module)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution: not a supported kind of layer"
    # A class of a package that only its users have loaded.
    gpt2 = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if gpt2 is not None and isinstance(module, gpt2):
        d_in, d_out = module.weight.shape
        return (Role(LinearKind(d_in, d_out), transposed=True),)
    return None


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[Role, ...] | str:
    if module.groups > 1:
        return "grouped convolution: every group would need factors of its own"
    kernel = module.kernel_size
    kind = ConvKind(
        d_in=module.in_channels * math.prod(kernel),
        d_out=module.out_channels,
        geometry=Geometry(
            kernel, module.stride, module.dilation, _paddings(module), module.padding_mode
        ),
    )
    return (Role(kind),)


def _attention(module: nn.MultiheadAttention) -> tuple[Role, ...]:
    d, last = module.embed_dim, "out_proj"
    out = Role(LinearKind(d, d), last, holder=last, hidden=True)
    if module._qkv_same_embed_dim:
        packed = LinearKind(d, 3 * d)
        role = Role(packed, "in_proj", weight="in_proj_weight", bias="in_proj_bias", hidden=True)
        return role, out
    widths = {"q": d, "k": module.kdim, "v": module.vdim}
    # Their biases are parts of one parameter, which stays with the base.
    parts = [
        Role(LinearKind(width, d), f"{key}_proj", weight=f"{key}_proj_weight", bias="", hidden=True)
        for key, width in widths.items()
    ]
    return *parts, out
