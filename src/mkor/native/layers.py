"""Numbers per layer, and small gradients side by side: ``layers.h`` and ``gradients.h``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mkor.native.loading import address, kernels

__all__ = ["check", "count", "finite", "gather", "joint_norms", "ratio", "scatter", "usable"]


def check(meta: Tensor, norms: Tensor, seen: Tensor, finite: Tensor, bad: Tensor) -> None:
    """See :meth:`mkor.step.roster.Roster.check`.

    Args:
        meta: ``[N, 3 + k]``.
        norms: ``[N]``, of the raw gradients.
        seen: ``[N]`` bool, overwritten.
        finite: ``[N]`` bool, overwritten.
        bad: 0-dim bool, overwritten.
    """
    tensors = (meta, norms, seen, finite, bad)
    kernels().check(*meta.shape, *map(address, tensors))


def count(
    scale: float,
    refuse: Tensor,
    meta: Tensor,
    widths: Tensor,
    seen: Tensor,
    numbers: Tensor,
    filled: Tensor,
    accept: Tensor,
    fed: Tensor,
) -> bool:
    """See :meth:`mkor.step.roster.Roster.count`.

    Args:
        scale: What raw ``g`` is multiplied with beside the number of rows.
        refuse: 0-dim bool, whether nothing is learned.
        meta: ``[N, 3 + k]``.
        widths: ``[3, N]``: ``d_out``, ``d_in`` with the column of ones, whether there is one.
        seen: ``[N]`` bool.
        numbers: ``[(4 + 2 k) N]``, overwritten with used rows, scales of raw ``g``, mean squares of
            both sides, then what makes means of the sums of ``a`` and of raw ``g``, by vector.
        filled: ``[N, k]`` bool, overwritten.
        accept: ``[N]`` bool, overwritten.
        fed: ``[N]`` bool, overwritten with ``seen``.

    Returns:
        Whether all slots of all layers are filled and accepted.
    """
    N, k = filled.shape
    tensors = (refuse, meta, widths, seen, numbers, filled, accept, fed)
    return bool(kernels().count(N, k, scale, *map(address, tensors)))


def usable(
    due: bool, updates: Tensor, seen: Tensor, finite: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """See :meth:`mkor.step.roster.Roster.usable`.

    Args:
        due: Whether the step has statistics of its own.
        updates: ``[N]``.
        seen: ``[N]`` bool.
        finite: ``[N]`` bool.
        norms: ``[N]``, of the raw gradients.

    Returns:
        Two masks ``[N]``.
    """
    use, ok = torch.empty_like(seen), torch.empty_like(seen)
    tensors = (updates, seen, finite, norms, use, ok)
    kernels().usable(len(seen), due, *map(address, tensors))
    return use, ok


def ratio(
    momentum: float,
    running: bool,
    average: Tensor,
    raw: Tensor,
    norm: Tensor,
    done: Tensor,
    last: Tensor,
    all_done: Tensor,
) -> tuple[Tensor, bool]:
    """What preconditioned gradients are multiplied with, see :mod:`mkor.step.roster`.

    Args:
        momentum: ``gamma``.
        running: Whether it is the ratio of the running norms.
        average: ``[b, 2]``, running norms, changed in place.
        raw: ``[b]``, norms of the gradients before.
        norm: ``[b]``, and after.
        done: ``[b]`` bool, which were preconditioned.
        last: ``[b]``, overwritten with the norms after.
        all_done: ``[b]`` bool, overwritten with ``done``.

    Returns:
        ``[b]``, and whether all were preconditioned.
    """
    found = torch.empty_like(raw)
    tensors = (average, raw, norm, done, last, all_done, found)
    whole = kernels().ratio(len(raw), running, momentum, *map(address, tensors))
    return found, bool(whole)


def gather(homes: Sequence[Tensor], W: Tensor, b: Tensor | None) -> Tensor:
    """Copy small gradients side by side.

    Args:
        homes: Weights' gradients, then as many of biases where there are any.
        W: ``[B, ...]``, overwritten.
        b: ``[B, d_out]`` likewise, or None.

    Returns:
        ``[B]``, their norms, see :func:`mkor.linalg.joint_norm`.
    """
    norm = W.new_empty(len(W))
    kernels().gather(*_stack(W, b), tuple(map(address, homes)), norm.data_ptr())
    return norm


def scatter(W: Tensor, b: Tensor | None, ratio: Tensor, homes: Sequence[Tensor]) -> None:
    """Multiply each layer's gradients and put them back.

    Args:
        W: ``[B, ...]``.
        b: ``[B, d_out]`` or None.
        ratio: ``[B]``.
        homes: As for :func:`gather`, overwritten.
    """
    addresses = tuple(map(address, homes))
    kernels().scatter(*_stack(W, b), addresses, ratio.data_ptr())


def finite(*tensors: Tensor) -> bool:
    """See :func:`mkor.linalg.all_finite`.

    Args:
        tensors: Any.

    Returns:
        Whether all their sums are.
    """
    return all(kernels().finite(x.data_ptr(), x.numel()) for x in tensors)


def joint_norms(*stacks: tuple[Tensor, Tensor | None]) -> Tensor:
    """See :func:`mkor.linalg.joint_norm`.

    Args:
        stacks: ``W [B, ...]`` and ``b [B, ...]`` or None, at least one pair.

    Returns:
        ``[n]``, of all layers in order.
    """
    each = tuple(_stack(W, b) for W, b in stacks)
    norm = stacks[0][0].new_empty(sum(layers for layers, *_ in each))
    kernels().joint_norms(each, norm.data_ptr())
    return norm


def _stack(W: Tensor, b: Tensor | None) -> tuple[int, int, int, int, int]:
    """Layers, entries of each and addresses."""
    B = W.shape[0]
    n, m = W.numel() // B, 0 if b is None else b.shape[1]
    return B, n, m, W.data_ptr(), 0 if b is None else b.data_ptr()
