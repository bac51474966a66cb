"""Every equation on tensors, one pure function each.

Shapes: ``B`` layers of one shape, or ``N`` layers of any; ``M [B, d_out, d_in (+1)]`` is the
gradient of weight and bias as one matrix; ``r`` vectors ``V [B, r, d]`` make up a window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def per_layer(x: Tensor, like: Tensor) -> Tensor:
    """``x [B]`` with dimensions of size 1 behind, so that it multiplies ``like [B, ...]``."""
    return x.view(-1, *(1,) * (like.dim() - 1))


def where(mask: Tensor, x: Tensor, other: Tensor | float) -> Tensor:
    """Rows of ``x [B, ...]`` where ``mask [B]`` holds, else those of ``other``."""
    return torch.where(per_layer(mask, x), x, other)


def aligned(*size: int, like: Tensor) -> Tensor:
    """An uninitialised tensor whose rows begin at multiples of 8 entries, as fast products need."""
    *lead, columns = size
    return like.new_empty(*lead, -(-columns // 8) * 8)[..., :columns]


def times(A: Tensor, x: Tensor) -> Tensor:
    """``A x [B, m]`` for ``A [B, m, n]`` and ``x [B, n]``."""
    # As a row: batched products with a single column take several times as long.
    return torch.bmm(x.unsqueeze(1), A.mT).squeeze(1)


def momentum_average(average: Tensor, new: Tensor, momentum: float) -> Tensor:
    """``gamma * average + (1 - gamma) * new``, not bias-corrected."""
    return average.lerp(new, 1.0 - momentum)


def bias_correction(updates: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
    """``1 - gamma^t`` for integers ``t``, where 0 is read as 1 so that nothing divides by 0."""
    power = updates.clamp(min=1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    # expm1 keeps the digits that 1 - gamma^t loses when gamma is near 1.
    return -torch.expm1(power * math.log(momentum)).to(dtype)


def append_ones(vectors: Tensor) -> Tensor:
    """``[..., d + 1]``: inputs with the constant 1 that a bias multiplies."""
    return torch.cat([vectors, torch.ones_like(vectors[..., :1])], dim=-1)


# ------------------------------------------------------------------------ lengths of gradients


def frobenius(M: Tensor) -> Tensor:
    """``||M||_F [B]``."""
    norm: Tensor = torch.linalg.vector_norm(M, dim=(1, 2))
    return norm


def inner(M: Tensor, P: Tensor) -> Tensor:
    """``<M, P> [B]``."""
    return (M * P).sum((1, 2))


def norm_ratio(raw: Tensor, preconditioned: Tensor) -> Tensor:
    """``||M|| / ||P||`` (Algorithm 1, lines 9-10), 1 where that is no number."""
    return (raw / preconditioned).nan_to_num(nan=1.0, posinf=1.0)


def kl_scale(product: Tensor, limit: float) -> Tensor:
    """``nu = min(1, sqrt(kappa / |sum lr^2 <P, M>|))``, a 0-dim tensor."""
    return (limit / product.abs()).sqrt().clamp(max=1.0)


# ------------------------------------------------------------------------------- the window


def whitening_matrix(gram: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
    """``A [..., N, r, r]`` with ``S^-1 = (I - U^T U) / lambda`` for ``U = A V`` (Woodbury).

    For ``S = lambda I + sum_i w_i v_i v_i^T`` and ``s_i = sqrt(w_i / lambda)`` it is
    ``K^-1 diag(s)``, where ``K`` is the Cholesky factor of ``I + diag(s) V V^T diag(s)``, here for
    ``gram = V V^T [..., N, r, r]``, ``w [N, r]`` and ``lambda [..., N]``. Where ``lambda`` is 0,
    ``A`` is 0: the side is the identity. Where the factorisation fails, ``A`` is NaN.
    """
    damping = damping.unsqueeze(-1)
    s = torch.where(damping > 0, weights / damping, 0.0).sqrt_()
    columns = s.unsqueeze(-2)
    S = (gram * s.unsqueeze(-1)).mul_(columns)
    S.diagonal(dim1=-2, dim2=-1).add_(1.0)
    K, failed = torch.linalg.cholesky_ex(S)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    # X K^T = I, since LAPACK is two to four times slower with the unknown on the right.
    inverse: Tensor = torch.linalg.solve_triangular(K.mT, eye, upper=True, left=False).mT
    A = inverse * columns
    return A.masked_fill_((failed != 0)[..., None, None], math.nan)


def left_products(U: Tensor, M: Tensor) -> Tensor:
    """``U M [B, r, columns]``; where rows are cut, its sum over the blocks is the whole's."""
    return torch.bmm(U, M)


def right_products(U: Tensor, M: Tensor) -> Tensor:
    """``M U^T [B, rows, r]``; where columns are cut, its sum over the blocks is the whole's."""
    return torch.bmm(M, U.mT)


def remove_left(U: Tensor, X: Tensor, M: Tensor) -> None:
    """``M - U^T X`` in place: with ``X = U M`` this is ``(I - U^T U) M``."""
    M.baddbmm_(U.mT, X, alpha=-1)


def remove_right(U: Tensor, Y: Tensor, M: Tensor) -> None:
    """``M - Y U`` in place: with ``Y = M U^T`` this is ``M (I - U^T U)``."""
    M.baddbmm_(Y, U, alpha=-1)


# ------------------------------------------------------- explicit inverses, and Eva's closed form


def rank_one_term(H: Tensor, v: Tensor, gain: float, inner: float) -> Tensor:
    """``w [B, d]`` with ``w w^T = |gain| H v v^T H / (1 + inner v^T H v)`` for symmetric ``H``.

    Every rule of the paper's factors adds or subtracts such a term; as one vector's outer product
    it keeps ``H`` symmetric to the last bit. 0 where rounding left no positive denominator, or
    ``v`` is too large for it.
    """
    Hv = times(H, v)
    w = Hv * (abs(gain) / (1 + inner * (v * Hv).sum(-1, keepdim=True))).sqrt()
    return torch.where(w.sum(-1, keepdim=True).isfinite(), w, 0.0)


def damped_inverse(S: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(S + lambda I)^-1 [B, d, d]`` by Cholesky, and ``[B]`` bool, which are good.

    ``S [B, d, d]`` is symmetric, ``lambda [B]``.
    """
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    K, failed = torch.linalg.cholesky_ex(S + per_layer(damping, S) * eye)
    good = (failed == 0) & K.diagonal(dim1=1, dim2=2).sum(1).isfinite()
    # cholesky_inverse would wait for the device, to check for errors.
    root = torch.linalg.solve_triangular(where(good, K, eye), eye, upper=False)
    inverse = root.mT @ root
    return inverse, good & inverse.sum((1, 2)).isfinite()


def rank_one_coefficient(a: Tensor, g: Tensor, M: Tensor, damping: float) -> Tensor:
    """``c = g^T M a / (|a|^2 |g|^2 + delta) [B]`` of Eva's closed form."""
    return (g * times(M, a)).sum(1) / (a.square().sum(1) * g.square().sum(1) + damping)
