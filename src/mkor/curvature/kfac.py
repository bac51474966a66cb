"""KFAC as KAISA has it: averaged covariances of all rows, inverted every so often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.base import (
    Inverting,
    State,
    Statistics,
    apply_inverses,
    check_counts,
    check_fraction,
    check_positive,
    identities,
    zeros,
)
from mkor.layers.layer import SIDES, GroupShape

GROWTH = 10.0
"""A failed factorisation multiplies a layer's damping by this; each success halves it again."""

MOST = 1e12
"""How far a damping may grow; a covariance that needs more is not finite."""


@dataclass(frozen=True)
class Covariance(Inverting):
    """Kronecker factors from full covariances (Martens & Grosse 2015; Pauloski et al. 2021).

    ``A`` and ``G`` are averages of ``a a^T`` and ``g g^T`` over all rows, with momentum, corrected
    for their start; ``P = (G + lambda I)^-1 M (A + lambda I)^-1``. With the pi-correction the sides
    share the damping by their scale: ``A + pi sqrt(lambda) I`` and ``G + sqrt(lambda)/pi I`` with
    ``pi^2 = (tr A / d_A) / (tr G / d_G)``.

    State, per side: ``covariance [B, d, d]`` (not bias-corrected) and ``inverse [B, d, d]``; for
    both: ``updates [B]``, ``damping_factor [B]``, what failed factorisations made of the damping,
    and ``inverted [B]``, whether there is an inverse yet. While a factorisation fails, the last
    good inverse stays in use; a layer without any keeps its raw gradient. Averages are updated on
    every process, inverses are renewed apart from that, by one process for others; where others
    alone use them, all inverses are 0 and take no memory.

    Attributes:
        momentum: ``gamma``, in (0, 1).
        damping: ``lambda``, positive, in the units of the covariances.
        inverse_every: Updates between inversions, the first included.
        pi_correction: Whether the sides share the damping; needs both sides.
        grad_worker_fraction: Which share of the processes holds a layer's inverses and
            preconditions its gradient, over 0 to 1.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A number has the wrong type.
    """

    momentum: float = 0.95
    damping: float = 0.001
    inverse_every: int = 1
    pi_correction: bool = False
    grad_worker_fraction: float = 1.0
    covariance: ClassVar[bool] = True
    joined: ClassVar[tuple[str, ...]] = ("damping_factor", "inverted")

    def __post_init__(self) -> None:
        check_counts(self, "inverse_every")
        check_fraction(self, "momentum")
        check_positive(self, "damping", "grad_worker_fraction")
        if self.grad_worker_fraction > 1:
            raise ValueError(
                "grad_worker_fraction must be at most 1, all processes, got "
                f"{self.grad_worker_fraction}"
            )
        if not isinstance(self.pi_correction, bool):
            raise TypeError(f"pi_correction must be True or False, got {self.pi_correction!r}")

    def init(self, shape: GroupShape) -> State:
        """Empty covariances and identities."""
        if self.pi_correction and shape.sides != SIDES:
            raise ValueError("pi_correction balances two sides: use sides='both' or turn it off")
        state = {
            "updates": zeros(shape, dtype=torch.int64),
            "damping_factor": zeros(shape) + 1,
            "inverted": zeros(shape, dtype=torch.bool),
        }
        for side in shape.sides:
            state[f"{side}_inverse"] = identities(shape, side, shape.dtype)
            state[f"{side}_covariance"] = torch.zeros_like(state[f"{side}_inverse"])
        return state

    def update(self, state: State, statistics: Statistics) -> None:
        """Average the covariances; their inverses wait for :meth:`renew`."""
        accept = statistics.accept[:, None, None]
        for side, new in statistics.covariance.items():
            average = state[f"{side}_covariance"]
            weight = accept.to(average.dtype) * (1 - self.momentum)
            average.lerp_(torch.where(accept, new, 0.0), weight)
        state["updates"] += statistics.accept

    def renew(self, state: State, where: Tensor) -> None:
        """Invert the averages."""
        factor = state["damping_factor"]
        steps = linalg.bias_correction(state["updates"], self.momentum, factor.dtype)
        sides = [side for side in SIDES if f"{side}_covariance" in state]
        averages = {side: state[f"{side}_covariance"] / steps[:, None, None] for side in sides}
        dampings = self._dampings(averages)
        found = {
            side: linalg.damped_inverse(averages[side], dampings[side] * factor) for side in sides
        }
        good = torch.stack([well for _, well in found.values()]).all(0)
        for side, (inverse, _) in found.items():
            old = state[f"{side}_inverse"]
            old.copy_(torch.where((where & good)[:, None, None], inverse, old))
        changed = torch.where(good, (factor / 2).clamp(min=1.0), (factor * GROWTH).clamp(max=MOST))
        factor.copy_(torch.where(where, changed, factor))
        state["inverted"] |= where & good

    def results(self, state: State) -> tuple[list[Tensor], list[Tensor]]:
        """What :meth:`renew` changes: inverses of one dtype, and the status of each layer."""
        inverses = [tensor for key, tensor in state.items() if key.endswith("_inverse")]
        return inverses, [state["damping_factor"], state["inverted"]]

    def without_inverses(self, state: State) -> State:
        """The same keys and shapes; zeros without memory for the inverses."""
        return {
            key: tensor.new_zeros(()).expand(tensor.shape) if key.endswith("_inverse") else tensor
            for key, tensor in state.items()
        }

    def recover(self, state: State) -> None:
        """Invert anew after loading what the process that wrote the state left to others.

        Averages are still those of the checkpoint, so the inverses are the lost ones if they were
        renewed in its last update. The damping stays: other processes have nothing to invert.
        """
        inverses, _ = self.results(state)
        # The diagonal of an inverse is positive. A checkpoint may mix tensors of several processes.
        empty = [(H.diagonal(dim1=1, dim2=2) == 0).all(1) for H in inverses]
        lost = state["inverted"] & torch.stack(empty).any(0)
        if lost.any():
            damping_factor = state["damping_factor"].clone()
            state["inverted"] &= ~lost
            self.renew(state, lost)
            state["damping_factor"].copy_(damping_factor)

    def _dampings(self, averages: State) -> State:
        scale = {side: S.diagonal(dim1=1, dim2=2).mean(1) for side, S in averages.items()}
        if not self.pi_correction:
            return {side: torch.full_like(mean, self.damping) for side, mean in scale.items()}
        pi = (scale["right"] / scale["left"]).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, 1.0)
        root = self.damping**0.5
        return {"right": pi * root, "left": root / pi}

    def apply(self, prepared: State, M: Tensor, ok: Tensor) -> Tensor:
        """``(G + lambda I)^-1 M (A + lambda I)^-1`` in place, where there is an inverse."""
        return apply_inverses(prepared, M, ok & prepared["inverted"])

    def diagnostics(self, state: State, shape: GroupShape) -> State:
        """``{side}_mean_eigenvalue`` of each covariance, and what failures made of the damping."""
        steps = linalg.bias_correction(state["updates"], self.momentum, shape.dtype)
        figures = {
            f"{side}_mean_eigenvalue": state[f"{side}_covariance"].diagonal(dim1=1, dim2=2).mean(1)
            / steps
            for side in shape.sides
        }
        return {**figures, "damping_factor": state["damping_factor"]}
