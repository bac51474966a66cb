"""The paper's factor: the inverse of a side kept as a matrix, updated by rank-1 terms.

Each update first decays the previous inverse ``H`` to ``B`` and then applies its vectors one after
the other, ``k`` in all, each divided by ``sqrt(k)``: ``B <- B +- w w^T``. The three published rules
are three rows of one table; they are different preconditioners. The stabilizer looks before each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.base import (
    Curvature,
    State,
    Statistics,
    apply_inverses,
    check_counts,
    check_dtype,
    check_fraction,
    check_positive,
    identities,
    zeros,
)
from mkor.layers.layer import GroupShape


@dataclass(frozen=True)
class Rule:
    """``B = decay H + shift I``, then ``B + gain B v v^T B / (1 + inner v^T B v)``."""

    decay: float
    shift: float
    gain: float
    inner: float


LEAST = 1e-6
"""A side's largest entry stays at or above this, or above what its dtype resolves well."""

RULES = ("exact", "paper", "release")
"""Names of the rules; see :func:`rule_of`."""


def rule_of(name: str, gamma: float) -> Rule:
    """A published rule at a given momentum.

    ``"exact"`` is Sherman-Morrison of ``gamma S + (1-gamma) v v^T``. ``"paper"`` is Algorithm 1,
    lines 7-8, as printed: the sign is plus, so it amplifies along ``v``. ``"release"`` is the
    authors' code. With ``B = gamma H`` the printed term's ``H v`` is ``B v / gamma``, hence the
    fourth power.
    """
    new = 1 - gamma
    return {
        "exact": Rule(1 / gamma, 0.0, -new, new),
        "paper": Rule(gamma, 0.0, new / gamma**4, new),
        "release": Rule(gamma, new, -1.0, 1.0),
    }[name]


@dataclass(frozen=True)
class DenseInverse(Curvature):
    """Explicit inverses by rank-1 updates (the paper, Algorithm 1, lines 5-8).

    State, per side: ``inverse [B, d, d]``, symmetric to the last bit, the identity at first; for
    both: ``updates [B]``. An update costs ``O(k d^2)``, preconditioning ``2 d_out d_in (d_out +
    d_in)`` operations.

    Where a side's vectors are small, as output gradients are, the printed rule only decays: its
    inverse would fall as ``gamma^t`` until it underflows. Its largest entry therefore stays at or
    above a millionth (in float16, two thousandths): with rescaling, nothing but the range changes.

    Attributes:
        rule: ``"exact"``, ``"paper"`` or ``"release"``.
        vectors: Vectors per update, ``k``.
        rows: Rows averaged in a vector; None for all rows, as in the paper.
        momentum: ``gamma``, in (0, 1).
        epsilon: The stabilizer acts on a side when the largest entry of its inverse, in absolute
            value, exceeds this before a vector is added; None turns it off.
        zeta: What the stabilizer keeps: ``H <- zeta H + (1-zeta) I``, in (0, 1).
        factor_dtype: Of the stored inverses; None for float32, or float64 where the weight is.
            Arithmetic accumulates in at least float32.

    Raises:
        ValueError: A number is out of its range, or there is no such rule.
        TypeError: A number or dtype has the wrong type.
    """

    rule: str = "paper"
    vectors: int = 1
    rows: int | None = None
    momentum: float = 0.95
    epsilon: float | None = 10.0
    zeta: float = 0.4
    factor_dtype: torch.dtype | None = None
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        check_counts(self, "vectors", "rows")
        check_fraction(self, "momentum", "zeta")
        if self.epsilon is not None:
            check_positive(self, "epsilon")
        check_dtype(self.factor_dtype)

    def init(self, shape: GroupShape) -> State:
        """Identities."""
        dtype = self.factor_dtype or shape.dtype
        inverses = {f"{side}_inverse": identities(shape, side, dtype) for side in shape.sides}
        return {"updates": zeros(shape, dtype=torch.int64), **inverses}

    def update(self, state: State, statistics: Statistics) -> None:
        """Stabilize, decay, and add the new vectors' terms."""
        accept, filled = statistics.accept, statistics.filled
        use = filled & accept.unsqueeze(1)
        made = filled.sum(1).clamp(min=1)[:, None, None]
        for side, vectors in statistics.vectors.items():
            inverse = state[f"{side}_inverse"]
            # A bias shows in the width: its inputs are ones.
            wide = vectors.shape[-1] != inverse.shape[-1]
            v = linalg.append_ones(vectors) if wide else vectors
            v = v.to(torch.promote_types(v.dtype, inverse.dtype))
            v = torch.where(use.unsqueeze(-1), v / made.to(v.dtype).sqrt(), 0.0)
            H = inverse.to(v.dtype)
            self._update_side(H, v, accept, use, _least(inverse.dtype))
            if H is not inverse:
                inverse.copy_(H)
        state["updates"] += accept

    def _update_side(self, H: Tensor, v: Tensor, accept: Tensor, use: Tensor, least: float) -> None:
        rule = rule_of(self.rule, self.momentum)
        sign = 1 if rule.gain > 0 else -1
        for place, one in enumerate(v.unbind(1)):
            if place == 0:
                self._move(H, accept, rule.decay, rule.shift, least)
            elif self.epsilon is not None:
                # The printed rule may double a side with each of its vectors.
                self._move(H, use[:, place], 1.0, 0.0, least)
            w = linalg.rank_one_term(H, one, rule.gain, rule.inner)
            H.addcmul_(w.unsqueeze(2), w.unsqueeze(1), value=sign)

    def _move(self, H: Tensor, accept: Tensor, decay: float, shift: float, least: float) -> None:
        """``decay (keep H + (1-keep) I) + shift I``: stabilizer and decay in one pass."""
        keep = torch.ones_like(H[:, 0, 0])
        largest = torch.linalg.vector_norm(H, float("inf"), dim=(1, 2))
        if self.epsilon is not None:
            keep = torch.where(largest > self.epsilon, self.zeta, keep)
        vanishing = (decay * largest < least) & (largest > 0)
        scale = torch.where(vanishing, least / largest, decay * keep)
        scale = torch.where(accept, scale, 1.0)
        added = torch.where(accept, decay * (1 - keep) + shift, 0.0)
        H.mul_(scale[:, None, None]).diagonal(dim1=1, dim2=2).add_(added.unsqueeze(1))

    def apply(self, prepared: State, M: Tensor, ok: Tensor) -> Tensor:
        """``L^-1 M R^-1`` in place."""
        return apply_inverses(prepared, M, ok)

    def diagnostics(self, state: State, shape: GroupShape) -> State:
        """``{side}_largest_entry``, the stabilizer's norm, and ``{side}_mean_eigenvalue``."""
        figures = {}
        for side in shape.sides:
            H = state[f"{side}_inverse"]
            figures[f"{side}_largest_entry"] = H.abs().amax((1, 2)).to(shape.dtype)
            mean = H.diagonal(dim1=1, dim2=2).to(shape.dtype).mean(1)
            figures[f"{side}_mean_eigenvalue"] = mean
        return figures


def _least(dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    return max(LEAST, float(limits.tiny / limits.eps**0.5))
