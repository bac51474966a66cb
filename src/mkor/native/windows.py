"""The window factor: ``windows.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mkor.native.loading import address, kernels

__all__ = ["Side", "remove_bias", "remove_rows", "root", "update_window"]


class Side(NamedTuple):
    """One side of a batch of windows, with what comes to it; see :mod:`mkor.curvature.ring`.

    Attributes:
        sums: ``[B, k, d]``, over each vector's rows.
        scale: ``[B, k]``, what makes them means.
        square: ``[B]``.
        rows: ``[B, r, d]``, changed in place as all that follows.
        gram: ``[B, r, r]``.
        mean_square: ``[B]``.
    """

    sums: Tensor
    scale: Tensor
    square: Tensor
    rows: Tensor
    gram: Tensor
    mean_square: Tensor


def update_window(
    state: dict[str, Tensor],
    filled: Tensor,
    accept: Tensor,
    momentum: float,
    sides: Sequence[Side],
) -> None:
    """Age the windows of a batch and write their new vectors.

    Args:
        state: With ``updates``, ``written`` and ``weights``, changed in place.
        filled: ``[B, k]`` bool.
        accept: ``[B]`` bool; other layers stay as they are.
        momentum: ``gamma``.
        sides: Those in use.
    """
    kernels().window_update(
        *filled.shape,
        state["weights"].shape[1],
        momentum,
        *map(address, (filled, accept, state["updates"], state["written"], state["weights"])),
        tuple([(side.sums.shape[2], *map(address, side)) for side in sides]),
    )


def root(gram: Tensor, weights: Tensor, mean_square: Tensor, damping: float, one: float) -> Tensor:
    """See :func:`mkor.linalg.whitening_roots`.

    Args:
        gram: ``[B, r, r]``.
        weights: ``[B, r]``.
        mean_square: ``[B]``.
        damping: What ``lambda`` is over it.
        one: Added to the Gram matrix.

    Returns:
        ``[B, r, r]``; NaN where the factorisation fails.
    """
    B, r = weights.shape
    A = torch.empty_like(gram)
    kernels().roots(B, r, damping, one, *map(address, (gram, weights, mean_square, A)))
    return A


def remove_rows(U: Tensor, b: Tensor) -> None:
    """``b - U^T U b`` in place.

    Args:
        U: ``[B, r, d]``.
        b: ``[B, d]``.
    """
    kernels().remove_rows(*U.shape, U.data_ptr(), b.data_ptr())


def remove_bias(Y: Tensor, u: Tensor, b: Tensor) -> None:
    """``Y + b u^T``, and then ``b - Y u``, in place.

    Args:
        Y: ``[B, d, r]``.
        u: ``[B, r]``.
        b: ``[B, d]``.
    """
    B, d, r = Y.shape
    kernels().remove_bias(B, r, d, u.data_ptr(), Y.data_ptr(), b.data_ptr())
