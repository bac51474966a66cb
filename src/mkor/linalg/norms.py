"""Lengths and inner products of gradients ``[W b]``, and what follows from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mkor import native

__all__ = [
    "inner",
    "joint_norm",
    "kl_scale",
    "largest_entry",
    "norm_ratio",
    "row_sum_norm",
]


def joint_norm(W: Tensor, b: Tensor | None) -> Tensor:
    """Frobenius norm of ``[W b]``, one number per layer of the batch.

    Args:
        W: ``[B, ...]``.
        b: ``[B, ...]`` or None.

    Returns:
        ``[B]``.
    """
    if native.serves(W, *([] if b is None else [b])) and native.pays(W.numel()):
        return native.joint_norms((W, b))
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
    return torch.where((ratio > 0) & (ratio < math.inf), ratio, 1.0)


def kl_scale(product: Tensor, limit: float) -> Tensor:
    """``nu = min(1, sqrt(kappa / |sum lr^2 <P, M>|))``, the clip of a step's KL divergence.

    Args:
        product: 0-dim, the sum over layers of ``lr^2 <P, M>``.
        limit: ``kappa``.

    Returns:
        0-dim.
    """
    return (limit / product.abs()).sqrt().clamp(max=1.0)
