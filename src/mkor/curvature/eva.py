"""Eva's factor: one averaged mean vector per side, and a closed form for the whole layer.

``P = (M - (g^T M a / (|a|^2 |g|^2 + delta)) g a^T) / delta`` is ``(a a^T (x) g g^T + delta I)^-1``
applied to ``M`` (Zhang, Shi & Li, "Eva: A General Vectorized Approximation Framework for
Second-order Optimization", ICLR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.base import (
    Curvature,
    State,
    Statistics,
    check_fraction,
    check_positive,
    zeros,
)
from mkor.layers.layer import SIDES, GroupShape


@dataclass(frozen=True)
class RankOne(Curvature):
    """One averaged mean vector per side.

    State, per side: ``vector [B, d]``, the average with momentum of the means over all rows, not
    bias-corrected, on the right with the 1 of a bias; for both: ``updates [B]``.

    Attributes:
        momentum: Weight of the old average, ``gamma``, in (0, 1).
        damping: ``delta``, positive.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A number has the wrong type.
    """

    momentum: float = 0.95
    damping: float = 0.03

    def __post_init__(self) -> None:
        check_fraction(self, "momentum")
        check_positive(self, "damping")

    def init(self, shape: GroupShape) -> State:
        """Empty averages."""
        if shape.sides != SIDES:
            raise ValueError("Eva's closed form preconditions both sides at once: use sides='both'")
        vectors = {f"{side}_vector": zeros(shape, shape.full_width(side)) for side in SIDES}
        return {"updates": zeros(shape, dtype=torch.int64), **vectors}

    def update(self, state: State, statistics: Statistics) -> None:
        """Average the new mean vectors."""
        accept = statistics.accept
        for side, vectors in statistics.vectors.items():
            average, new = state[f"{side}_vector"], vectors[:, 0]
            # A bias shows in the width: its inputs are ones.
            new = new if new.shape == average.shape else linalg.append_ones(new)
            moved = linalg.momentum_average(average, new, self.momentum)
            average.copy_(linalg.where(accept, moved, average))
        state["updates"] += accept

    def prepare(self, state: State, shape: GroupShape) -> State:
        """The averages, corrected for their start."""
        steps = linalg.bias_correction(state["updates"], self.momentum, shape.dtype).unsqueeze(1)
        return {side: state[f"{side}_vector"] / steps for side in SIDES}

    def apply(self, prepared: State, M: Tensor, ok: Tensor) -> Tensor:
        """``(M - c g a^T) / delta`` in place, with ``c`` of the closed form."""
        a, g = prepared["right"], prepared["left"]
        c = linalg.rank_one_coefficient(a, g, M, self.damping)
        P = (M - (c.unsqueeze(1) * g).unsqueeze(2) * a.unsqueeze(1)) / self.damping
        ok = ok & P.sum((1, 2)).isfinite()
        M.copy_(linalg.where(ok, P, M))
        return ok

    def describe(self, shape: GroupShape) -> tuple[int, int]:
        """One vector, and ``5 d_out d_in`` operations."""
        return 1, 5 * shape.d_out * shape.columns

    def diagnostics(self, state: State, shape: GroupShape) -> State:
        """``{side}_norm`` of the averaged vectors."""
        return {f"{side}_norm": v.norm(dim=1) for side, v in self.prepare(state, shape).items()}
