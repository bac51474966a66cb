"""From the totals of a step to the factors: means and masks, then the curvature's update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mkor import linalg
from mkor.capture.buffer import Totals
from mkor.curvature.base import Curvature, Factors, Inverting, Statistics
from mkor.distributed.kaisa import Assignment
from mkor.step.groups import LayerGroup
from mkor.step.table import LayerTable, Normalisation


def update_factors(
    tables: Sequence[tuple[LayerTable, Totals]],
    groups: Sequence[LayerGroup],
    curvature: Curvature,
    scale: float | Tensor,
    number: int,
    assignment: Assignment | None,
) -> None:
    """Give the factors this step's statistics, unless those of any layer are not finite.

    ``scale`` is what raw ``g`` is multiplied with beside the number of rows, ``number`` the updates
    of the optimizer before this one.
    """
    if not tables:
        return
    for table, totals in tables:
        table.check(totals)
    bad = [table.bad for table, _ in tables]
    refuse = bad[0] if len(bad) == 1 else torch.stack([b.to(bad[0].device) for b in bad]).any()
    for table, totals in tables:
        norm, whole = table.normalise(totals, refuse.to(table.device), scale)
        used = [g.index for g in groups if g.table is table and not g.is_left]
        each = _each_group(totals, norm, whole, table.factors, used, curvature.covariance)
        curvature.update_all(table.factors, whole, each)
    if isinstance(curvature, Inverting) and curvature.due(number):
        renew(groups, curvature, refuse, assignment)


def renew(
    groups: Sequence[LayerGroup],
    curvature: Inverting,
    refuse: Tensor,
    assignment: Assignment | None,
) -> None:
    """Invert the averages, each process those of its layers, and hand the inverses out.

    ``refuse`` is 0-dim, whether the step's batch is bad: then old inverses stay. Without an
    assignment each process inverts all.
    """
    used = [group for group in groups if not group.is_left]
    for group in used:
        if assignment is None or assignment.inverts(group.inverter):
            # Layers without data in just this step have older averages, but good ones.
            known = group.state["updates"] > 0
            curvature.renew(group.state, known & ~refuse.to(known.device))
    if assignment is None:
        return
    results = [(group.inverter, curvature.results(group.state)) for group in used]
    assignment.share_inverses([(rank, inverses) for rank, (inverses, _) in results])
    assignment.broadcast_status([(rank, status) for rank, (_, status) in results])


def _with_ones(second: Tensor, mean: Tensor) -> Tensor:
    """The covariance of ``[a 1]`` from that of ``a [B, d, d]`` and the mean ``[B, 1, d]``."""
    full = torch.cat([second, mean], dim=1)
    return torch.cat([full, linalg.append_ones(mean).mT], dim=2)


def _each_group(
    totals: Totals,
    norm: Normalisation,
    whole: Statistics,
    factors: Factors,
    used: Sequence[int],
    covariance: bool,
) -> Iterator[tuple[int, Statistics]]:
    """Each group's statistics, one after the other: covariances are as large as the factors."""
    k, sizes = totals.counts.shape[1], factors.sizes
    means = {side: x.unsqueeze(-1).split(sizes) for side, x in norm.means.items()}
    squares = {side: x.split(sizes) for side, x in whole.mean_square.items()}
    filled, accept = whole.filled.split(sizes), whole.accept.split(sizes)
    for i in used:
        shape, span = factors.shapes[i], factors.spans[i]
        sums = {"left": totals.g[i], "right": totals.a[i]}
        first = {side: x[:, :k] if covariance else x for side, x in sums.items()}
        vectors = {side: first[side] * means[side][i] for side in shape.sides}
        second: dict[str, Tensor] = {}
        if covariance:
            rows, g_scale = norm.used[span], norm.g_scale[span]
            scale = {"left": g_scale.square() / rows, "right": rows.reciprocal()}
            for side in shape.sides:
                both = sums[side][:, k:]
                second[side] = both * linalg.per_layer(scale[side], both)
            if shape.bias and "right" in second:
                second["right"] = _with_ones(second["right"], vectors["right"])
        square = {side: squares[side][i] for side in shape.sides}
        yield i, Statistics(square, filled[i], accept[i], vectors, second)
