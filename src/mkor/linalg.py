"""Pure functions, one per equation of the method. Nothing here keeps state.

Shapes, used everywhere in the package; ``B`` layers of one shape form a batch:

* ``W [B, d_out, d_in]``, ``b [B, d_out]``: gradient of weight and bias, together ``M = [W b]``;
* ``V [B, r, d]``: the newest ``r`` statistics vectors of one side, one per row;
* ``U [B, r, d]``: the whitened vectors; ``I - U^T U`` is the side's preconditioner;
* ``u [B, r]``: the column of ``U`` that belongs to the constant input 1 of a bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "age_weights",
    "bias_correction",
    "inner",
    "joint_norm",
    "momentum_average",
    "norm_ratio",
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
    ``I + diag(s) V V^T diag(s) = K K^T`` gives ``C = K^-1 diag(s)``. A layer whose damping is 0,
    or whose factorisation fails, gets ``C = 0``: its side is the identity.

    Args:
        gram: ``[B, r, r]``, the inner products ``V V^T`` of the unweighted vectors.
        weights: ``[B, r]``, ``w_i``, at least 0.
        damping: ``[B]``, ``lambda``, at least 0.

    Returns:
        ``[B, r, r]``.
    """
    positive = damping > 0
    scale = (weights / torch.where(positive, damping, 1.0).unsqueeze(-1)).sqrt()
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    K, failed = torch.linalg.cholesky_ex(eye + scale.unsqueeze(-1) * gram * scale.unsqueeze(-2))
    C = torch.linalg.solve_triangular(K, eye, upper=False) * scale.unsqueeze(-2)
    usable = positive & (failed == 0) & C.sum((-2, -1)).isfinite()
    return torch.where(usable[:, None, None], C, 0.0)


def subtract_left(U: Tensor, W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
    """Multiply ``(I - U^T U)`` with ``[W b]`` from the left, in place.

    Costs ``4 r d_out d_in`` operations.

    Args:
        U: ``[B, r, d_out]``.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias.
        ok: ``[B]`` bool; other layers stay as they are.

    Returns:
        ``ok``, less the layers whose product is not finite; these stay as they are too.
    """
    X = U @ W
    ok = ok & X.sum((1, 2)).isfinite()
    W.baddbmm_(U.mT, torch.where(ok[:, None, None], X, 0.0), alpha=-1)
    if b is not None:
        x = U @ b.unsqueeze(-1)
        b.sub_((U.mT @ torch.where(ok[:, None, None], x, 0.0)).squeeze(-1))
    return ok


def subtract_right(U: Tensor, u: Tensor, W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
    """Multiply ``(I - [U u]^T [U u])`` with ``[W b]`` from the right, in place.

    Costs ``4 r d_out d_in`` operations. Weight and bias are two blocks of one product; no column is
    appended to the gradient.

    Args:
        U: ``[B, r, d_in]``.
        u: ``[B, r]``, the bias's column; unused where ``b`` is None.
        W: ``[B, d_out, d_in]``.
        b: ``[B, d_out]``, or None for a layer without bias.
        ok: ``[B]`` bool; other layers stay as they are.

    Returns:
        ``ok``, less the layers whose product is not finite; these stay as they are too.
    """
    Y = W @ U.mT
    if b is not None:
        Y += b.unsqueeze(-1) * u.unsqueeze(-2)
    ok = ok & Y.sum((1, 2)).isfinite()
    Y = torch.where(ok[:, None, None], Y, 0.0)
    W.baddbmm_(Y, U, alpha=-1)
    if b is not None:
        b.sub_((Y @ u.unsqueeze(-1)).squeeze(-1))
    return ok


def joint_norm(W: Tensor, b: Tensor | None) -> Tensor:
    """Frobenius norm of ``[W b]``, one number per layer of the batch.

    Args:
        W: ``[B, ...]``.
        b: ``[B, ...]`` or None.

    Returns:
        ``[B]``.
    """
    norm = torch.stack(torch._foreach_norm(W.unbind()))
    return norm if b is None else torch.hypot(norm, torch.linalg.vector_norm(b, dim=1))


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
