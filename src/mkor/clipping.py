"""The whole-model stage: one factor for all preconditioned gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mkor import linalg
from mkor.batches import Batch

__all__ = ["clip_kl", "gradients_finite"]


def clip_kl(batches: Iterable[Batch], groups: Sequence[dict[str, object]], limit: float) -> None:
    """Multiply all preconditioned gradients by ``nu = min(1, sqrt(kappa / |sum lr^2 <P, M>|))``.

    KAISA's and Eva's stage in place of rescaling. The sum runs over the layers that were
    preconditioned in this step, each with the learning rate of its weight's group.

    Args:
        batches: The layers, just preconditioned.
        groups: The base's parameter groups.
        limit: ``kappa``.
    """
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    touched = [batch for batch in batches if batch.touched]
    products = []
    for batch in touched:
        lr = _tensor([rates[id(layer.weight)] for layer in batch.layers], batch.last)
        products.append(torch.where(batch.done, lr.square() * batch.last[2], 0.0).sum())
    if not products:
        return
    total = torch.stack([product.to(products[0]) for product in products]).sum()
    nu = linalg.kl_scale(total, limit)
    for batch in touched:
        batch.scale(nu.to(batch.last))


def _tensor(rates: list[object], like: Tensor) -> Tensor:
    if any(isinstance(rate, Tensor) for rate in rates):
        return torch.stack([torch.as_tensor(rate).to(like) for rate in rates])
    return torch.tensor(rates, dtype=like.dtype).to(like.device, non_blocking=True)


def gradients_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient is finite; asks each device once.

    Args:
        parameters: All that have or may have a gradient.

    Returns:
        True if no gradient holds infinities or NaN.
    """
    gradients = [p.grad for p in parameters]
    present = [g._values() if g.is_sparse else g for g in gradients if g is not None]
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in present:
        by_device.setdefault(gradient.device, []).append(gradient)
    return all(bool(_norms(group).isfinite().all()) for group in by_device.values())


def _norms(gradients: list[Tensor]) -> Tensor:
    """In at least float32: float16 overflows where its entries do not."""
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if wide else torch.float32
    return torch.stack([n.to(dtype) for n in torch._foreach_norm(gradients, 2, dtype)])
