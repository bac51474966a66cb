"""Applying factors whose inverses are kept as matrices; shared by the paper's rules and KFAC."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.contract import BatchShape

__all__ = ["apply_inverses", "identities", "inverse_cost"]

_HALF = (torch.float16, torch.bfloat16)
_MULTIPLY = {"left": linalg.multiply_left, "right": linalg.multiply_right}


def identities(shape: BatchShape, side: str, dtype: torch.dtype) -> Tensor:
    """One identity matrix per layer.

    Args:
        shape: Of the batch of layers.
        side: Whose width is meant.
        dtype: Of the matrices.

    Returns:
        ``[B, d, d]``, contiguous.
    """
    eye = torch.eye(shape.full_width(side), dtype=dtype, device=shape.device)
    return eye.repeat(shape.layers, 1, 1)


def inverse_cost(shape: BatchShape) -> int:
    """Operations of both products for one layer, ``2 d_out d_in (d_out + d_in)``.

    Args:
        shape: Of the batch of layers.

    Returns:
        The number of floating-point operations.
    """
    entries = shape.d_out * shape.full_width("right")
    return sum(2 * shape.full_width(side) * entries for side in shape.sides)


def apply_inverses(inverses: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
    """``L^-1 [W b] R^-1`` in place.

    Args:
        inverses: By side, ``[B, d, d]``.
        W: ``[B, d_out, d_in]``, the weight's gradient.
        b: ``[B, d_out]``, the bias's gradient, or None.
        ok: ``[B]`` bool; other layers stay as they are.

    Returns:
        ``ok`` less the layers whose product is not finite; these stay as they are too.
    """
    P, p = W, b
    for side, H in inverses.items():
        P, p = _multiply(side, H, P, p)
    ok = ok & P.sum((1, 2)).isfinite()
    if b is not None and p is not None:
        ok = ok & p.sum(1).isfinite()
        b.copy_(torch.where(ok.unsqueeze(1), p, b))
    W.copy_(torch.where(ok[:, None, None], P, W))
    return ok


def _multiply(side: str, H: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if H.dtype not in _HALF or not _multiplies(H.dtype, H.device.type):
        return _MULTIPLY[side](H.to(W.dtype), W, b)
    scale = _scale(W, b)
    low = [None if x is None else (x / _like(scale, x)).to(H.dtype) for x in (W, b)]
    assert low[0] is not None
    product = _MULTIPLY[side](H, low[0], low[1])
    P, p = (None if x is None else x.to(W.dtype) * _like(scale, x) for x in product)
    assert P is not None
    return P, p


def _scale(W: Tensor, b: Tensor | None) -> Tensor:
    """``[B]``: brings a gradient where float16 neither overflows nor loses its entries."""
    largest = linalg.largest_entry(W, b)
    # A product's entry is at most |row of H| |column of W| <= |row of H| sqrt(d) max |W|.
    scale = largest * max(W.shape[1:]) ** 0.5
    return torch.where(scale > 0, scale, 1.0)


def _like(scale: Tensor, x: Tensor) -> Tensor:
    return scale.view(-1, *([1] * (x.dim() - 1)))


@lru_cache
def _multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether the hardware multiplies a half precision, accumulating in float32."""
    if device == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
