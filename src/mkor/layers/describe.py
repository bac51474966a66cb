"""The table of supported modules: which matrices each has."""

from __future__ import annotations

import math
import sys

from torch import nn

from mkor._torch import is_transposed_convolution, packs_projections
from mkor.layers.layer import MatrixSpec
from mkor.layers.patches import ConvKind, Geometry
from mkor.layers.rows import LinearKind


def describe(module: nn.Module) -> tuple[MatrixSpec, ...] | str | None:
    """The matrices of a module that are preconditioned; subclasses of supported modules count.

    A string says why a layer that is nearly supported is left to the base optimizer; None stands
    for every other module.
    """
    if isinstance(module, nn.Linear):
        return (MatrixSpec(LinearKind(module.in_features, module.out_features)),)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolution(module)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if is_transposed_convolution(module):
        return "transposed convolution: not a supported kind of layer"
    # A class of a package that only its users have loaded.
    gpt2 = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if gpt2 is not None and isinstance(module, gpt2):
        d_in, d_out = module.weight.shape
        return (MatrixSpec(LinearKind(d_in, d_out), transposed=True),)
    return None


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[MatrixSpec, ...] | str:
    if module.groups > 1:
        return "grouped convolution: every group would need factors of its own"
    kernel = module.kernel_size
    geometry = Geometry(
        kernel, module.stride, module.dilation, _paddings(module), module.padding_mode
    )
    d_in = module.in_channels * math.prod(kernel)
    return (MatrixSpec(ConvKind(d_in, module.out_channels, geometry)),)


def _paddings(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Before and after each axis."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


def _attention(module: nn.MultiheadAttention) -> tuple[MatrixSpec, ...]:
    d, last = module.embed_dim, "out_proj"
    out = MatrixSpec(LinearKind(d, d), last, owner=last, functional=True)
    if packs_projections(module):
        packed = LinearKind(d, 3 * d)
        weight, bias = "in_proj_weight", "in_proj_bias"
        return MatrixSpec(packed, "in_proj", "", weight, bias, functional=True), out
    widths = {"q": d, "k": module.kdim, "v": module.vdim}
    # Their biases are parts of one parameter, which stays with the base.
    parts = [
        MatrixSpec(
            LinearKind(width, d),
            f"{key}_proj",
            weight=f"{key}_proj_weight",
            bias="",
            functional=True,
        )
        for key, width in widths.items()
    ]
    return *parts, out
