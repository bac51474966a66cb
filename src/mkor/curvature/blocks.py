"""Window factors on blocks of layers that several processes store: one sum of them is enough.

With ``M = [W b]`` the preconditioned gradient is ``(I - U_L^T U_L) M (I - [U_R u]^T [U_R u])``.

* Where rows are cut, the left factor needs ``U_L M [r, d_in (+ 1)]``, summed over the blocks; the
  right one treats every row by itself.
* Where columns are cut, the right factor needs ``M [U_R u]^T [d_out, r]``; the left one treats
  every column by itself, except that ``b``, which is cut like rows, needs ``U_L b [r]``.

One more number is the largest entry: what it bounds decides alike on all processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.contract import Block

__all__ = ["complete_window", "project_window"]

Prepared = dict[str, Tensor]


def project_window(prepared: Prepared, W: Tensor, b: Tensor | None, block: Block) -> Tensor:
    """What the factors need of all blocks.

    Args:
        prepared: Whitened vectors: ``left [B, r, d_out]``, ``right [B, r, d_in]``, ``bias [B, r]``.
        W: ``[B, rows, columns]``.
        b: ``[B, bias]`` or None.
        block: Which part of the layers they are.

    Returns:
        ``[B, n]``, to be summed over the blocks.
    """
    parts: list[Tensor | None] = [linalg.largest_entry(W, b).unsqueeze(1)]
    if block.cut == "rows":
        if "left" in prepared:
            parts += linalg.left_products(prepared["left"][..., block.rows], W, b)
    else:
        if "right" in prepared:
            Y = linalg.right_products(prepared["right"][..., block.columns], W)
            if b is not None:
                Y[:, block.bias] += b.unsqueeze(2) * prepared["bias"].unsqueeze(1)
            parts.append(Y)
        if "left" in prepared and b is not None:
            parts.append(linalg.times(prepared["left"][..., block.bias], b))
    return torch.cat([part.flatten(1) for part in parts if part is not None], dim=1)


def complete_window(
    prepared: Prepared, W: Tensor, b: Tensor | None, projected: Tensor, ok: Tensor, block: Block
) -> Tensor:
    """Both factors on a block, in place.

    Args:
        prepared: As for :func:`project_window`, and ``usable [B]`` unless all are.
        W: ``[B, rows, columns]``.
        b: ``[B, bias]`` or None.
        projected: ``[B, n]``, summed over the blocks.
        ok: ``[B]`` bool; other layers stay as they are.
        block: Which part of the layers they are.

    Returns:
        ``ok`` less the layers whose window or products are not finite; these stay as they are too.
    """
    # At least twice the norm of M, which no intermediate result exceeds: every |U| is at most 1.
    bound = projected[:, 0] * (2 * math.sqrt(block.shape[0] * (block.shape[1] + 1)))
    ok = ok & bound.isfinite() & projected.sum(1).isfinite()
    if "usable" in prepared:
        ok = ok & prepared["usable"]
    sums = torch.where(ok.unsqueeze(1), projected[:, 1:], 0.0)
    if block.cut == "rows":
        _complete_rows(prepared, W, b, sums, ok, block)
    else:
        _complete_columns(prepared, W, b, sums, ok, block)
    return ok


def _complete_rows(
    prepared: Prepared, W: Tensor, b: Tensor | None, sums: Tensor, ok: Tensor, block: Block
) -> None:
    if "left" in prepared:
        U = prepared["left"]
        r, d = U.shape[1], W.shape[2]
        X, x = sums[:, : r * d].unflatten(1, (r, d)), sums[:, r * d :]
        linalg.remove_left(U[..., block.rows], X, None if b is None else x, W, b)
    if "right" in prepared:
        U = prepared["right"]
        u = prepared["bias"] if b is not None else U.new_zeros(U.shape[:-1])
        linalg.subtract_right(U, u, W, b, ok)


def _complete_columns(
    prepared: Prepared, W: Tensor, b: Tensor | None, sums: Tensor, ok: Tensor, block: Block
) -> None:
    # What is taken off the whole b: the right factor's part at once, then the left one's.
    off = sums.new_zeros(len(W), block.shape[0], 1)
    if "right" in prepared:
        U = prepared["right"]
        r, d = U.shape[1], block.shape[0]
        Y, sums = sums[:, : d * r].unflatten(1, (d, r)), sums[:, d * r :]
        linalg.remove_right(U[..., block.columns], Y, W)
        if b is not None:
            off = Y @ prepared["bias"].unsqueeze(2)
            b.sub_(off[:, block.bias, 0])
    if "left" in prepared:
        U = prepared["left"]
        linalg.subtract_left(U, W, None, ok)
        if b is not None:
            x = sums.unsqueeze(2) - U @ off
            b.sub_((U[..., block.bias].mT @ x).squeeze(2))
