"""The window factor: whitened vectors, and their products with a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mkor import native
from mkor.linalg.basics import cut, times, where

__all__ = [
    "left_products",
    "remove_left",
    "remove_right",
    "right_products",
    "subtract_both",
    "subtract_left",
    "subtract_right",
    "whitening_roots",
]

LARGE = 1 << 20
"""Entries of a weight that leave a processor's caches from one product to the next."""

WIDE = 1024
"""Entries of a row from which products of some rows are as fast as of all."""

CACHED, FEWEST = 1 << 18, 128
"""Of a large weight, entries that are handled at a time, and rows at least."""


def whitening_roots(
    figures: Sequence[tuple[Tensor, Tensor, Tensor]], ones: Sequence[bool], damping: float
) -> Iterator[Tensor]:
    """``A`` with ``S^-1 = (I - U^T U) / lambda`` for ``U = A V`` (Woodbury), of several batches.

    For ``S = lambda I + sum_i w_i v_i v_i^T`` and ``s_i = sqrt(w_i / lambda)`` it is
    ``K^-1 diag(s)``, where ``K`` is the Cholesky factor of ``I + diag(s) V V^T diag(s)``. A layer
    whose damping is 0 gets ``A = 0``: its side is the identity.

    Args:
        figures: Of each batch ``V V^T [B, r, r]`` of the unweighted vectors, ``w [B, r]``, at least
            0, and the mean squares ``[B]`` of its side's entries, at least 0.
        ones: Whether a batch's ``V`` has a column of ones that its ``V V^T`` lacks.
        damping: ``lambda`` over the mean square.

    Yields:
        ``[B, r, r]``, lower triangular, NaN where the factorisation fails.
    """
    if native.serves(*(figure for each in figures for figure in each)):
        for each, one in zip(figures, ones, strict=True):
            yield native.root(*each, damping, float(one))
        return
    sizes = [len(weights) for _, weights, _ in figures]
    gram, weights, squares = (torch.cat(each) for each in zip(*figures, strict=True))
    for products, one in zip(cut(gram, sizes), ones, strict=True):
        if one:
            products += 1.0
    yield from cut(_root(gram, weights, damping * squares), sizes)


def _root(gram: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
    """``A`` of one batch; overwrites ``gram``."""
    damping = damping.unsqueeze(-1)
    s = torch.where(damping > 0, weights / damping, 0.0).sqrt_()
    S = gram.mul_(s.unsqueeze(-1)).mul_(s.unsqueeze(-2))
    S.diagonal(dim1=-2, dim2=-1).add_(1.0)
    K, failed = torch.linalg.cholesky_ex(S)
    s = where(failed == 0, s, torch.nan)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    # X K^T = I, since LAPACK is two to four times slower with the unknown on the right.
    inverse: Tensor = torch.linalg.solve_triangular(K.mT, eye, upper=True, left=False).mT
    return inverse * s.unsqueeze(-2)


def subtract_both(
    left: Tensor,
    right: Tensor,
    u: Tensor | None,
    W: Tensor,
    b: Tensor | None,
    only: Tensor | None,
) -> None:
    """:func:`subtract_left`, then :func:`subtract_right`.

    Three of the four products need only some rows of a large weight at a time, which stay in a
    processor's caches until all three are done; several threads have little to share in them.

    Args:
        left: ``[B, r, d_out]``.
        right: ``[B, r, d_in]``.
        u: ``[B, r]``, the bias's column; None for a layer without bias.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias, or whose bias has no gradient.
        only: ``[B]`` bool; other layers stay as they are. None for all.
    """
    large = W.is_cpu and W.numel() >= LARGE and W.shape[2] >= WIDE
    if not large or torch.get_num_threads() > 1:
        subtract_left(left, W, b, only)
        subtract_right(right, u, W, b, only)
        return
    X, columns = _masked(torch.bmm(left, W), only), left.mT
    _subtract_from_bias(left, b, only)
    # Products read it faster along its rows.
    across = right.mT.contiguous()
    rows = max(FEWEST, CACHED // W.shape[2])
    for start in range(0, W.shape[1], rows):
        here = slice(start, start + rows)
        some = W[:, here]
        some.baddbmm_(columns[:, here], X, alpha=-1)
        _subtract_right(right, across, u, some, None if b is None else b[:, here], only)


def subtract_left(U: Tensor, W: Tensor, b: Tensor | None, only: Tensor | None) -> None:
    """Multiply ``(I - U^T U)`` with ``[W b]`` from the left, in place.

    Costs ``4 r d_out d_in`` operations.

    Args:
        U: ``[B, r, d_out]``.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias.
        only: ``[B]`` bool; other layers stay as they are. None for all.
    """
    W.baddbmm_(U.mT, _masked(torch.bmm(U, W), only), alpha=-1)
    _subtract_from_bias(U, b, only)


def _subtract_from_bias(U: Tensor, b: Tensor | None, only: Tensor | None) -> None:
    if b is None:
        return
    if only is None and native.serves(U, b):
        native.remove_rows(U, b)
    else:
        row = b.unsqueeze(1)
        row.baddbmm_(_masked(torch.bmm(row, U.mT), only), U, alpha=-1)


def subtract_right(
    U: Tensor, u: Tensor | None, W: Tensor, b: Tensor | None, only: Tensor | None
) -> None:
    """Multiply ``(I - [U u]^T [U u])`` with ``[W b]`` from the right, in place.

    Costs ``4 r d_out d_in`` operations. Weight and bias are two blocks of one product; no column is
    appended to the gradient.

    Args:
        U: ``[B, r, d_in]``.
        u: ``[B, r]``, the bias's column; None for a layer without bias.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias, or whose bias has no gradient.
        only: ``[B]`` bool; other layers stay as they are. None for all.
    """
    _subtract_right(U, U.mT, u, W, b, only)


def _subtract_right(
    U: Tensor,
    across: Tensor,
    u: Tensor | None,
    W: Tensor,
    b: Tensor | None,
    only: Tensor | None,
) -> None:
    """The same where ``U^T`` is at hand."""
    Y = torch.bmm(W, across)
    if u is None or b is None:
        W.baddbmm_(_masked(Y, only), U, alpha=-1)
        return
    if only is None and native.serves(Y, u, b):
        native.remove_bias(Y, u, b)
        W.baddbmm_(Y, U, alpha=-1)
        return
    u = u.unsqueeze(1)
    Y = _masked(Y.addcmul_(b.unsqueeze(2), u), only)
    W.baddbmm_(Y, U, alpha=-1)
    b.unsqueeze(1).baddbmm_(u, Y.mT, alpha=-1)


def _masked(x: Tensor, only: Tensor | None) -> Tensor:
    return x if only is None else where(only, x, 0.0)


def left_products(U: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``X = U [W b]``; where rows are cut, the sum over all blocks is the whole layer's.

    Args:
        U: ``[B, r, rows]``, the columns that belong to the block's rows.
        W: ``[B, rows, columns]``.
        b: ``[B, rows]`` or None.

    Returns:
        ``[B, r, columns]`` and ``[B, r]``.
    """
    return torch.bmm(U, W), None if b is None else times(U, b)


def right_products(U: Tensor, W: Tensor) -> Tensor:
    """``Y = W U^T``; where columns are cut, the sum over all blocks is the whole weight's.

    Args:
        U: ``[B, r, columns]``, the columns that belong to the block's columns.
        W: ``[B, rows, columns]``.

    Returns:
        ``[B, rows, r]``.
    """
    return torch.bmm(W, U.mT)


def remove_left(U: Tensor, X: Tensor, x: Tensor | None, W: Tensor, b: Tensor | None) -> None:
    """``[W b] - U^T [X x]`` in place: with ``[X x] = U [W b]`` this is ``(I - U^T U) [W b]``.

    Args:
        U: ``[B, r, rows]``.
        X: ``[B, r, columns]``.
        x: ``[B, r]``, None where ``b`` is.
        W: ``[B, rows, columns]``.
        b: ``[B, rows]`` or None.
    """
    W.baddbmm_(U.mT, X, alpha=-1)
    if b is not None and x is not None:
        b.sub_(times(U.mT, x))


def remove_right(U: Tensor, Y: Tensor, W: Tensor) -> None:
    """``W - Y U`` in place: with ``Y = M [U u]^T`` this is the block of ``M (I - [U u]^T [U u])``.

    Args:
        U: ``[B, r, columns]``.
        Y: ``[B, rows, r]``.
        W: ``[B, rows, columns]``.
    """
    W.baddbmm_(Y, U, alpha=-1)
