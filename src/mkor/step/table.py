"""One number per layer, for all layers of a device: what a step knows of each, without waiting.

A net has a few shapes or dozens. Products need a group for each shape, but what is a number or a
short row per layer does not: an operation takes the same few microseconds for one as for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mkor import linalg
from mkor.capture.buffer import Totals
from mkor.curvature.base import Curvature, Factors, State, Statistics
from mkor.layers.layer import GroupShape


@dataclass(frozen=True)
class Normalisation:
    """What makes means of the sums of a step.

    Attributes:
        used: ``[N]``, rows in all vectors, at least 1.
        g_scale: ``[N]``, what raw output gradients are multiplied with.
        means: Per side ``[N, k]``, what sums of raw ``g`` and of ``a`` are multiplied with.
    """

    used: Tensor
    g_scale: Tensor
    means: dict[str, Tensor]


@dataclass(frozen=True)
class Rescaling:
    """What gives preconditioned gradients their length.

    Attributes:
        kind: ``"running"``, ``"step"`` or None.
        momentum: Of the running norms, ``gamma``.
    """

    kind: str | None
    momentum: float


class Rows(NamedTuple):
    """Some layers' part of a table, ``[b]`` or ``[b, 2]``; see :class:`LayerTable`."""

    raw: Tensor
    norm: Tensor
    inner: Tensor
    average: Tensor
    done: Tensor
    refused: Tensor


class LayerTable:
    """Layers of all shapes on one device, with one dtype of arithmetic.

    Args:
        shapes: Of the groups, in order.
        curvature: The kind of factor.

    Attributes:
        factors: Of all groups.
        norms: ``[N, 2]``, running norms of raw and preconditioned gradients.
        output: ``[N]``, whether each is an output layer; -1 before that is known.
        kept: ``[N]``, which layers are not left to the base.
        has_data: ``[N]``, which layers had rows in the last update.
        finite: ``[N]``, whether statistics and raw gradient were finite in it.
        bad: 0-dim, whether those of any layer here were not.
        raw: ``[N]``, norm of the raw gradient, a view of ``last``.
        last: ``[3, N]``: norm of the raw and of the preconditioned gradient, their inner product.
        done: ``[N]``, which layers were preconditioned in the last step.
        refused: ``[2, N]``: updates refused for non-finite statistics, gradients passed raw for the
            same reason.
    """

    def __init__(self, shapes: Sequence[GroupShape], curvature: Curvature) -> None:
        ends = list(accumulate((shape.layers for shape in shapes), initial=0))
        spans = [slice(i, j) for i, j in pairwise(ends)]
        N, dtype, device = ends[-1], shapes[0].dtype, shapes[0].device
        self._curvature = curvature

        def each(numbers: Sequence[int], dtype: torch.dtype = dtype) -> Tensor:
            pairs = zip(numbers, shapes, strict=True)
            layers = [n for n, shape in pairs for _ in range(shape.layers)]
            return torch.tensor(layers, dtype=dtype, device=device)

        self._d_out = each([shape.d_out for shape in shapes])
        self._columns = each([shape.columns for shape in shapes])
        self._ones = each([shape.bias for shape in shapes])
        first = each([span.start for span in spans], torch.int64)
        positions = torch.arange(N, device=device) - first
        self.factors = Factors(shapes, spans, {}, [], positions)
        self.norms = torch.zeros(N, 2, dtype=dtype, device=device)
        self.output = torch.full((N,), -1, dtype=torch.int8, device=device)
        self.last = torch.zeros(3, N, dtype=dtype, device=device)
        self.has_data = torch.zeros(N, dtype=torch.bool, device=device)
        self.done, self.bad = torch.zeros_like(self.has_data), self.has_data.any()
        self.finite, self.kept = torch.ones_like(self.has_data), torch.ones_like(self.has_data)
        self.refused = torch.zeros(2, N, dtype=torch.int64, device=device)
        self.raw, self._refused_updates = self.last[0], self.refused[0]
        self._rows: dict[tuple[int, int], Rows] = {}

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self.last.device

    @property
    def updates(self) -> Tensor:
        """``[N]``, how many each layer has taken."""
        return self.factors.joined["updates"]

    def begin_factors(self, states: Sequence[State]) -> None:
        """Take the groups' first states; old tensors, which may be about to be loaded, stay."""
        factors = self.factors
        names = [key for key in ("updates", *self._curvature.joined) if key in states[0]]
        factors.joined = {key: torch.cat([state[key] for state in states]) for key in names}
        self.norms = torch.zeros_like(self.norms)
        self.output = self.output.clone()
        self._rows.clear()
        rest = {"norms": self.norms, "output": self.output}
        shared = {**factors.joined, **rest}
        factors.groups = [
            {**state, **{key: tensor[span] for key, tensor in shared.items()}}
            for state, span in zip(states, factors.spans, strict=True)
        ]

    def check(self, totals: Totals) -> None:
        """See which layers have data, and whether statistics and gradients are finite."""
        squares_a, squares_g, rows = totals.scalars.unbind(1)
        torch.gt(rows, 0, out=self.has_data)
        # None is negative, and NaN is not below infinity.
        torch.lt(squares_a + squares_g + self.raw, math.inf, out=self.finite)
        torch.logical_not(self.finite.all(), out=self.bad)

    def normalise(
        self, totals: Totals, refuse: Tensor, scale: float | Tensor
    ) -> tuple[Normalisation, Statistics]:
        """What follows from the counts and squares of a step, once it was checked.

        ``refuse`` is 0-dim: the step's batch is bad and nothing is learned from it. Raw ``g`` is
        multiplied with ``scale`` beside the number of rows.
        """
        squares_a, squares_g, total = totals.scalars.unbind(1)
        counts = totals.counts
        per_row, used = counts.clamp(min=1).reciprocal_(), counts.sum(1).clamp_(min=1)
        g_scale = total * scale
        wanted = self.has_data & self.kept
        self._refused_updates += wanted & refuse
        accept = wanted & ~refuse
        # A column of ones adds `used` squares.
        square = {
            "left": squares_g * g_scale * g_scale / (used * self._d_out),
            "right": torch.addcmul(squares_a, used, self._ones) / (used * self._columns),
        }
        means = {"left": g_scale.unsqueeze(1) * per_row, "right": per_row}
        sides = self.factors.shapes[0].sides
        whole = Statistics({side: square[side] for side in sides}, counts > 0, accept)
        return Normalisation(used, g_scale, means), whole

    def usable(self, due: bool) -> tuple[Tensor, Tensor]:
        """``[N]``, which layers have factors to use in this step, and whose gradient is finite too.

        ``due`` says whether the step has statistics of its own; layers without pass through then.
        """
        use = self.updates > 0
        if not due:
            return use, use & (self.raw < math.inf)
        # What is finite includes the raw gradient.
        use = use & self.has_data & self.finite
        return use, use

    def rows(self, here: slice) -> Rows:
        """Views of some neighbouring layers' part, which stay the same from step to step."""
        key = here.start, here.stop
        if key not in self._rows:
            raw, norm, inner = self.last[:, here].unbind()
            average, done = self.norms[here], self.done[here]
            self._rows[key] = Rows(raw, norm, inner, average, done, self.refused[1, here])
        return self._rows[key]

    def conclude(
        self, rows: Rows, norm: Tensor, done: Tensor, use: Tensor, how: Rescaling
    ) -> Tensor:
        """``[b]``: what preconditioned gradients of norm ``norm`` are to be multiplied with.

        Notes which were ``done``, of those that had factors to ``use``, and moves their running
        norms.
        """
        rows.norm.copy_(norm)
        rows.done.copy_(done)
        rows.refused.add_(use & ~done)
        raw, average = rows.raw, rows.average
        moved = linalg.momentum_average(average, torch.stack((raw, norm), 1), how.momentum)
        average.copy_(linalg.where(done, moved, average))
        if how.kind is None:
            return torch.ones_like(raw)
        if how.kind == "running":
            raw, norm = average.unbind(1)
        return torch.where(done, linalg.norm_ratio(raw, norm), 1.0)
