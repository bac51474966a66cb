"""Pure functions, one per equation of the method. Nothing here keeps state.

Shapes, used everywhere in the package; ``B`` layers of one shape form a batch:

* ``W [B, d_out, d_in]``, ``b [B, d_out]``: gradient of weight and bias, together ``M = [W b]``;
* ``V [B, r, d]``: the newest ``r`` statistics vectors of one side, one per row;
* ``U [B, r, d]``: the whitened vectors; ``I - U^T U`` is the side's preconditioner;
* ``u [B, r]``: the column of ``U`` that belongs to the constant input 1 of a bias;
* ``H [B, d, d]``: the explicit inverse of one side, symmetric.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "age_weights",
    "append_ones",
    "bias_correction",
    "bilinear",
    "damped_inverse",
    "inner",
    "joint_norm",
    "kl_scale",
    "largest_entry",
    "left_products",
    "momentum_average",
    "multiply_left",
    "multiply_right",
    "norm_ratio",
    "rank_one_coefficient",
    "rank_one_denominator",
    "rank_one_term",
    "remove_left",
    "remove_right",
    "right_products",
    "row_sum_norm",
    "subtract_left",
    "subtract_right",
    "whitening",
]


def momentum_average(average: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Exponential average ``gamma * average + (1 - gamma) * new`` (not bias-corrected).

    Args:
        average: The running value.
        new: The new value, of the same shape.
        momentum: ``gamma``, in (0, 1).

    Returns:
        The new running value.
    """
    return average.lerp(new, 1.0 - momentum)


def bias_correction(updates: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
    """The sum ``1 - gamma^t`` of the weights of an exponential average after ``t`` updates.

    Args:
        updates: ``t``, an integer tensor of any shape; 0 is read as 1, so nothing divides by 0.
        momentum: ``gamma``, in (0, 1).
        dtype: Of the result.

    Returns:
        A tensor shaped like ``updates``.
    """
    power = updates.clamp(min=1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    # expm1 keeps the digits that 1 - gamma^t loses when gamma is near 1.
    return -torch.expm1(power * math.log(momentum)).to(dtype)


def age_weights(raw: Tensor, updates: Tensor, momentum: float) -> Tensor:
    """Weights ``w_i = (1-gamma) gamma^age / (k_i (1-gamma^t))`` of a window's vectors.

    Args:
        raw: ``[B, r]``, the uncorrected ``(1-gamma) gamma^age / k_i``; 0 marks an empty place.
        updates: ``[B]``, the number ``t`` of updates so far.
        momentum: ``gamma``, in (0, 1).

    Returns:
        ``[B, r]``.
    """
    return raw / bias_correction(updates, momentum, raw.dtype).unsqueeze(-1)


def whitening(gram: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
    """The ``r x r`` matrix ``C`` with ``S^-1 = (I - (C V)^T (C V)) / lambda`` (Woodbury).

    For ``S = lambda I + sum_i w_i v_i v_i^T`` and ``s_i = sqrt(w_i / lambda)``, the Cholesky factor
    ``I + diag(s) V V^T diag(s) = K K^T`` gives ``C = K^-1 diag(s)``. A layer whose damping is 0
    gets ``C = 0``: its side is the identity.

    Args:
        gram: ``[B, r, r]``, the inner products ``V V^T`` of the unweighted vectors.
        weights: ``[B, r]``, ``w_i``, at least 0.
        damping: ``[B]``, ``lambda``, at least 0.

    Returns:
        ``[B, r, r]``, NaN where the factorisation fails.
    """
    damping = damping.unsqueeze(-1)
    scale = torch.where(damping > 0, weights / damping, 0.0).sqrt()
    S = (gram * scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
    S.diagonal(dim1=-2, dim2=-1).add_(1.0)
    K, failed = torch.linalg.cholesky_ex(S)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    # X K^T = I, since LAPACK is two to three times slower with the identity on the right.
    inverse: Tensor = torch.linalg.solve_triangular(K.mT, eye, upper=True, left=False).mT
    return inverse * torch.where(failed.unsqueeze(-1) == 0, scale, torch.nan).unsqueeze(-2)


def subtract_left(U: Tensor, W: Tensor, b: Tensor | None, ok: Tensor) -> None:
    """Multiply ``(I - U^T U)`` with ``[W b]`` from the left, in place.

    Costs ``4 r d_out d_in`` operations.

    Args:
        U: ``[B, r, d_out]``.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias.
        ok: ``[B]`` bool; other layers stay as they are.
    """
    ok = ok[:, None, None]
    W.baddbmm_(U.mT, torch.where(ok, U @ W, 0.0), alpha=-1)
    if b is not None:
        b = b.unsqueeze(-1)
        b.baddbmm_(U.mT, torch.where(ok, U @ b, 0.0), alpha=-1)


def subtract_right(U: Tensor, u: Tensor, W: Tensor, b: Tensor | None, ok: Tensor) -> None:
    """Multiply ``(I - [U u]^T [U u])`` with ``[W b]`` from the right, in place.

    Costs ``4 r d_out d_in`` operations. Weight and bias are two blocks of one product; no column is
    appended to the gradient.

    Args:
        U: ``[B, r, d_in]``.
        u: ``[B, r]``, the bias's column; unused where ``b`` is None.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias.
        ok: ``[B]`` bool; other layers stay as they are.
    """
    Y = W @ U.mT
    if b is not None:
        Y.addcmul_(b.unsqueeze(-1), u.unsqueeze(-2))
    Y = torch.where(ok[:, None, None], Y, 0.0)
    W.baddbmm_(Y, U, alpha=-1)
    if b is not None:
        b.unsqueeze(-1).baddbmm_(Y, u.unsqueeze(-1), alpha=-1)


def left_products(U: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``X = U [W b]``; where rows are cut, the sum over all blocks is the whole layer's.

    Args:
        U: ``[B, r, rows]``, the columns that belong to the block's rows.
        W: ``[B, rows, columns]``.
        b: ``[B, rows]`` or None.

    Returns:
        ``[B, r, columns]`` and ``[B, r]``.
    """
    return U @ W, None if b is None else (U @ b.unsqueeze(-1)).squeeze(-1)


def right_products(U: Tensor, W: Tensor) -> Tensor:
    """``Y = W U^T``; where columns are cut, the sum over all blocks is the whole weight's.

    Args:
        U: ``[B, r, columns]``, the columns that belong to the block's columns.
        W: ``[B, rows, columns]``.

    Returns:
        ``[B, rows, r]``.
    """
    return W @ U.mT


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
        b.sub_((U.mT @ x.unsqueeze(-1)).squeeze(-1))


def remove_right(U: Tensor, Y: Tensor, W: Tensor) -> None:
    """``W - Y U`` in place: with ``Y = M [U u]^T`` this is the block of ``M (I - [U u]^T [U u])``.

    Args:
        U: ``[B, r, columns]``.
        Y: ``[B, rows, r]``.
        W: ``[B, rows, columns]``.
    """
    W.baddbmm_(Y, U, alpha=-1)


def joint_norm(W: Tensor, b: Tensor | None) -> Tensor:
    """Frobenius norm of ``[W b]``, one number per layer of the batch.

    Args:
        W: ``[B, ...]``.
        b: ``[B, ...]`` or None.

    Returns:
        ``[B]``.
    """
    norm: Tensor = torch.linalg.vector_norm(W, dim=tuple(range(1, W.dim())))
    return norm if b is None else torch.hypot(norm, torch.linalg.vector_norm(b, dim=1))


def largest_entry(W: Tensor, b: Tensor | None) -> Tensor:
    """Largest absolute entry of ``[W b]``, one number per layer of the batch; 0 if there is none.

    Args:
        W: ``[B, rows, columns]``, where a block of the layer is here, which may be empty.
        b: ``[B, bias]`` or None.

    Returns:
        ``[B]``.
    """
    blocks = [x for x in (W, b) if x is not None and x.numel()]
    if not blocks:
        return W.new_zeros(len(W))
    norms = [torch.linalg.vector_norm(x, float("inf"), dim=(1, 2)[: x.dim() - 1]) for x in blocks]
    return norms[0] if len(norms) == 1 else torch.maximum(*norms)


def row_sum_norm(H: Tensor) -> Tensor:
    """Largest sum of a row's absolute entries: ``H`` enlarges no vector's largest entry by more.

    Args:
        H: ``[B, d, d]``.

    Returns:
        ``[B]``, at least float32.
    """
    dtype = torch.promote_types(H.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(H, 1, dim=2, dtype=dtype)
    return sums.amax(1)


def inner(W: Tensor, b: Tensor | None, W2: Tensor, b2: Tensor | None) -> Tensor:
    """Inner product of ``[W b]`` and ``[W2 b2]``, one number per layer of the batch.

    Args:
        W: ``[B, ...]``.
        b: ``[B, ...]`` or None.
        W2: Shaped like ``W``.
        b2: Shaped like ``b``.

    Returns:
        ``[B]``.
    """
    rows = zip(W.flatten(1), W2.flatten(1), strict=True)
    product = torch.stack([torch.dot(row, row2) for row, row2 in rows])
    return product if b is None or b2 is None else product + (b * b2).sum(1)


def norm_ratio(raw: Tensor, preconditioned: Tensor) -> Tensor:
    """Rescaling factor ``||M|| / ||P||`` (Algorithm 1, lines 9-10), 1 where it is not a number.

    Args:
        raw: Norm of the gradient.
        preconditioned: Norm of the preconditioned gradient.

    Returns:
        A tensor shaped like ``raw``.
    """
    ratio = raw / preconditioned
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


def append_ones(vectors: Tensor) -> Tensor:
    """Mean inputs with the constant 1 that a bias multiplies.

    Args:
        vectors: ``[..., d_in]``.

    Returns:
        ``[..., d_in + 1]``.
    """
    return torch.cat([vectors, torch.ones_like(vectors[..., :1])], dim=-1)


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
    Hv = (H @ v.unsqueeze(-1)).squeeze(-1)
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
    return H @ W, None if b is None else (H @ b.unsqueeze(-1)).squeeze(-1)


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
    return product, (W @ column.unsqueeze(-1)).squeeze(-1) + b * H[:, d, d].unsqueeze(-1)


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
    if S.is_cuda:
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
    Ma = (W @ a[:, :d].unsqueeze(-1)).squeeze(-1)
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
    return (g * (W @ a.unsqueeze(-1)).squeeze(-1)).sum(1)


def kl_scale(product: Tensor, limit: float) -> Tensor:
    """``nu = min(1, sqrt(kappa / |sum lr^2 <P, M>|))``, the clip of a step's KL divergence.

    Args:
        product: 0-dim, the sum over layers of ``lr^2 <P, M>``.
        limit: ``kappa``.

    Returns:
        0-dim.
    """
    return (limit / product.abs()).sqrt().clamp(max=1.0)
