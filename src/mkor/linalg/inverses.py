"""Explicit inverses, and Eva's closed form: the factors of the paper and of its rivals."""

from __future__ import annotations

import torch
from torch import Tensor

from mkor.linalg import basics
from mkor.linalg.basics import times

__all__ = [
    "bilinear",
    "damped_inverse",
    "multiply_left",
    "multiply_right",
    "rank_one_coefficient",
    "rank_one_denominator",
    "rank_one_term",
]


def rank_one_term(H: Tensor, v: Tensor, gain: float, inner: float) -> Tensor:
    """The vector ``w`` with ``w w^T = |gain| H v v^T H / (1 + inner v^T H v)``.

    Every rule of the paper's factors adds or subtracts such a term. As one vector's outer product
    it keeps the factor symmetric to the last bit.

    Args:
        H: ``[B, d, d]``, symmetric.
        v: ``[B, d]``; 0 gives 0.
        gain: Coefficient of the term.
        inner: Coefficient in the denominator.

    Returns:
        ``[B, d]``; 0 where rounding left no positive denominator, or ``v`` is too large for it.
    """
    Hv = times(H, v)
    w = Hv * (abs(gain) / (1 + inner * (v * Hv).sum(-1, keepdim=True))).sqrt()
    return torch.where(w.sum(-1, keepdim=True).isfinite(), w, 0.0)


def multiply_left(H: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``H [W b]``; costs ``2 d_out^2 d_in`` operations.

    Args:
        H: ``[B, d_out, d_out]``.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias.

    Returns:
        The two blocks of the product.
    """
    return H @ W, None if b is None else times(H, b)


def multiply_right(H: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``[W b] H``; costs ``2 d_out d_in^2`` operations. No column is appended to the gradient.

    Args:
        H: ``[B, d_in, d_in]``; with the bias's row and column, if the layer has one.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias, or whose bias has no gradient.

    Returns:
        The two blocks of the product.
    """
    d = W.shape[-1]
    product = W @ H[:, :d, :d]
    if b is None:
        return product, None
    column = H[:, :d, d]
    product.baddbmm_(b.unsqueeze(-1), column.unsqueeze(-2))
    return product, times(W, column) + b * H[:, d, d].unsqueeze(-1)


def damped_inverse(S: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(S + lambda I)^-1`` by Cholesky.

    Args:
        S: ``[B, d, d]``, symmetric; only its lower triangle is read.
        damping: ``[B]``, ``lambda``.

    Returns:
        The inverses, and ``[B]`` bool, which are good; the others are undefined.
    """
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    K, failed = torch.linalg.cholesky_ex(S + damping[:, None, None] * eye)
    good = (failed == 0) & K.diagonal(dim1=1, dim2=2).sum(1).isfinite()
    # cholesky_inverse raises where a factor is singular.
    K = torch.where(good[:, None, None], K, eye)
    if not basics.readable(S):
        # Twice the operations, but cholesky_inverse waits for the device to check for errors.
        root = torch.linalg.solve_triangular(K, eye, upper=False)
        inverse = root.mT @ root
    else:
        inverse = torch.cholesky_inverse(K)
    return inverse, good & inverse.sum((1, 2)).isfinite()


def rank_one_coefficient(
    a: Tensor, g: Tensor, W: Tensor, b: Tensor | None, damping: float
) -> Tensor:
    """The number ``g^T M a / (|a|^2 |g|^2 + delta)`` of Eva's closed form.

    Args:
        a: ``[B, d_in]``, mean inputs, with the bias's 1 as last entry where there is one.
        g: ``[B, d_out]``, mean output gradients.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]`` or None.
        damping: ``delta``.

    Returns:
        ``[B]``.
    """
    d = W.shape[-1]
    Ma = times(W, a[:, :d])
    if b is not None:
        Ma = Ma + b * a[:, d:]
    return (g * Ma).sum(1) / rank_one_denominator(a, g, damping)


def rank_one_denominator(a: Tensor, g: Tensor, damping: float) -> Tensor:
    """The number ``|a|^2 |g|^2 + delta`` of Eva's closed form.

    Args:
        a: ``[B, d_in]``, mean inputs, with the bias's 1 as last entry where there is one.
        g: ``[B, d_out]``, mean output gradients.
        damping: ``delta``.

    Returns:
        ``[B]``.
    """
    return a.square().sum(1) * g.square().sum(1) + damping


def bilinear(g: Tensor, W: Tensor, a: Tensor) -> Tensor:
    """``g^T W a``; the sum over all blocks is the whole weight's.

    Args:
        g: ``[B, rows]``.
        W: ``[B, rows, columns]``.
        a: ``[B, columns]``.

    Returns:
        ``[B]``.
    """
    return (g * times(W, a)).sum(1)
