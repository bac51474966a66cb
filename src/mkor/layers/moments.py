"""Second moments of all rows: what a full covariance is made of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mkor.layers.sums import PartSums

__all__ = ["moments"]


def moments(slabs: Iterable[Tensor]) -> PartSums:
    """Sums of rows and of their outer products.

    Args:
        slabs: ``[n, d]`` each, together all rows of a call; at least one.

    Returns:
        One part: its vectors are ``[1 + d, d]``, the sum of the rows above ``sum v v^T``.
    """
    remaining = iter(slabs)
    rows = next(remaining)
    summed, total = _sums(rows), len(rows)
    for rows in remaining:
        summed = summed + _sums(rows)
        total += len(rows)
    return PartSums(summed, summed[1:].diagonal().sum(), [total], total)


def _sums(rows: Tensor) -> Tensor:
    rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    # Autocast would multiply in half precision.
    with torch.autocast(rows.device.type, enabled=False):
        return torch.cat([rows.sum(0, keepdim=True), rows.mT @ rows])
