"""The whole-model stage: one factor for all preconditioned gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mkor import linalg
from mkor.communication.communicator import Communicator
from mkor.communication.sharding import local
from mkor.step.application import scale
from mkor.step.batches import Batch, by_roster

__all__ = ["clip_kl", "gradients_finite"]


def clip_kl(batches: Sequence[Batch], groups: Sequence[dict[str, Any]], limit: float) -> None:
    """Multiply all preconditioned gradients by ``nu = min(1, sqrt(kappa / |sum lr^2 <P, M>|))``.

    KAISA's and Eva's stage in place of rescaling. The sum runs over the layers that were
    preconditioned in this step, each with the learning rate of its weight's group.

    Args:
        batches: The layers, just preconditioned.
        groups: The base's parameter groups.
        limit: ``kappa``.
    """
    owners = {id(p): group for group in groups for p in group["params"]}
    rosters = list(by_roster(batches))
    if not rosters:
        return
    products = []
    for roster, group in rosters:
        lr = _rates([owners[id(x.weight)] for batch in group for x in batch.layers], roster.last)
        products.append(torch.where(roster.done, lr.square() * roster.last[2], 0.0).sum())
    total = torch.stack([product.to(products[0]) for product in products]).sum()
    nu = linalg.kl_scale(total, limit)
    for roster, group in rosters:
        scale(roster, group, nu.to(roster.last))


def _rates(groups: Iterable[dict[str, Any]], like: Tensor) -> Tensor:
    """``[N]``, the learning rate of each layer's group; numbers are no copies from the host."""
    runs = [list(run) for _, run in groupby(groups, key=id)]
    return linalg.joined([like.new_ones(len(run)) * _rate(run[0], like) for run in runs])


def _rate(group: dict[str, Any], like: Tensor) -> float | Tensor:
    """As it can be multiplied with; a device takes numbers from the host without a copy."""
    rate: float | Tensor = group["lr"]
    return rate.to(like.device) if isinstance(rate, Tensor) and not rate.is_cpu else rate


def gradients_finite(parameters: Iterable[Tensor], communicator: Communicator) -> bool:
    """Whether every gradient is finite; asks each device once, and other processes for their parts.

    Args:
        parameters: All that have or may have a gradient.
        communicator: The processes that train together.

    Returns:
        True if no gradient holds infinities or NaN, here or where its other parts are stored.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    blocks = [local(gradient) for gradient in gradients]
    finite = _finite(blocks)
    if all(block is gradient for block, gradient in zip(blocks, gradients, strict=True)):
        return finite
    return not communicator.sum_small(torch.tensor(float(not finite), device="cpu")).item()


def _finite(gradients: list[Tensor]) -> bool:
    present = [g._values() if g.is_sparse else g for g in gradients]
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in present:
        by_device.setdefault(gradient.device, []).append(gradient)
    return all(bool(_norms(group).isfinite().all()) for group in by_device.values())


def _norms(gradients: list[Tensor]) -> Tensor:
    """In at least float32: float16 overflows where its entries do not."""
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if wide else torch.float32
    return torch.stack([n.to(dtype) for n in torch._foreach_norm(gradients, 2, dtype)])
