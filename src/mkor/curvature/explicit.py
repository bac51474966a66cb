"""Applying factors whose inverses are kept as matrices; shared by the paper's rules and KFAC."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.contract import BatchShape, Block

__all__ = ["apply_inverses", "complete_inverses", "identities", "inverse_cost", "place_block"]

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


def place_block(W: Tensor, b: Tensor | None, block: Block) -> Tensor:
    """The whole ``[W b]``, zero where other processes have it.

    Args:
        W: ``[B, rows, columns]``.
        b: ``[B, bias]`` or None.
        block: Which part of the layers they are.

    Returns:
        ``[B, d_out (d_in (+ 1))]``.
    """
    d_out, d_in = block.shape
    M = W.new_zeros(len(W), d_out, d_in + (b is not None))
    M[:, block.rows, block.columns] = W
    if b is not None:
        M[:, block.bias, d_in] = b
    return M.flatten(1)


def complete_inverses(
    inverses: dict[str, Tensor],
    W: Tensor,
    b: Tensor | None,
    projected: Tensor,
    ok: Tensor,
    block: Block,
) -> Tensor:
    """A block of ``L^-1 [W b] R^-1``, in place; no other block is computed.

    Args:
        inverses: By side, ``[B, d, d]``.
        W: ``[B, rows, columns]``.
        b: ``[B, bias]`` or None.
        projected: The sum over all blocks of what :func:`place_block` returns.
        ok: ``[B]`` bool; other layers stay as they are.
        block: Which part of the layers they are.

    Returns:
        ``ok`` less the layers whose product may not be finite; these stay as they are too.
    """
    M = projected.unflatten(1, (block.shape[0], -1))
    L, R = inverses.get("left"), inverses.get("right")
    if R is not None:
        R = R[:, : M.shape[2], : M.shape[2]]
    # No process sees all of the product, so its size is bounded before it is made.
    bound = 2 * linalg.largest_entry(M, None)
    for H in (L, R):
        if H is not None:
            bound = bound * linalg.row_sum_norm(H).clamp(min=1)
    ok = ok & bound.isfinite()
    if block.cut == "rows":
        P = _some_rows(L, M, R, block.rows, last=False)
    else:
        P = _some_rows(R, M.mT, L, block.columns, last=b is not None).mT
    if b is not None:
        p = P[:, :, -1] if block.cut == "rows" else P[:, block.bias, -1]
        b.copy_(torch.where(ok.unsqueeze(1), p, b))
    W.copy_(torch.where(ok[:, None, None], P[..., : W.shape[2]], W))
    return ok


def _some_rows(H: Tensor | None, M: Tensor, K: Tensor | None, rows: slice, *, last: bool) -> Tensor:
    """Those rows of ``H M K``, and the last if asked for; None stands for the identity."""
    first = M if H is None else H
    picked = first[:, rows]
    if last:
        picked = torch.cat([picked, first[:, -1:]], dim=1)
    P = picked if H is None else _multiply("left", picked, M, None)[0]
    return P if K is None else _multiply("right", K, P, None)[0]


def _multiply(side: str, H: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if H.dtype not in _HALF or not _multiplies(H.dtype, H.device.type):
        return _MULTIPLY[side](H.to(W.dtype), W, b)
    scale = _scale(W, b)
    low = None if b is None else _lowered(b, scale, H.dtype)
    P, p = _MULTIPLY[side](H, _lowered(W, scale, H.dtype), low)
    return _raised(P, scale, W.dtype), None if p is None else _raised(p, scale, W.dtype)


def _lowered(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x / _like(scale, x)).to(dtype)


def _raised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) * _like(scale, x)


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
