"""From the statistics of a step to the factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mkor.communication.assignment import Assignment
from mkor.curvature.contract import Inverting
from mkor.step.batches import Batch, by_roster, counts_of
from mkor.step.renewal import renew

__all__ = ["learn"]


def learn(
    batches: Sequence[Batch],
    scale: float | Tensor,
    number: int,
    inverting: Inverting | None = None,
    assignment: Assignment | None = None,
) -> None:
    """Give the factors this step's statistics, unless those of any layer are not finite.

    Args:
        batches: The layers; their gradients have been measured.
        scale: What raw ``g`` is multiplied with beside the number of rows.
        number: Updates of the optimizer before this one.
        inverting: Their kind of factor, if it inverts apart from updating.
        assignment: Who inverts what for others; None where every process does all.
    """
    if not batches:
        return
    groups = [(roster, group, counts_of(group)) for roster, group in by_roster(batches)]
    for roster, _, counts in groups:
        roster.check(counts)
    bad = [roster.bad for roster, *_ in groups]
    refuse = bad[0] if len(bad) == 1 else torch.stack([b.to(bad[0].device) for b in bad]).any()
    for roster, group, counts in groups:
        here = refuse.to(counts.device)
        counted = roster.count(counts, here, scale)
        # One after the other: covariances are as large as the factors.
        group[0].curvature.update_all(
            (batch.state, batch.statistics(numbers, here, number))
            for batch, numbers in zip(group, counted, strict=True)
            if not all(batch.skipped)
        )
    if inverting is not None and inverting.due(number):
        renew(batches, inverting, refuse, assignment)
