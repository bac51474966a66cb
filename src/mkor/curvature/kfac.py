"""KFAC as KAISA has it: averaged covariances of all rows, inverted every so often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.checks import check_counts, check_fraction, check_positive
from mkor.curvature.contract import SIDES, BatchShape, Statistics
from mkor.curvature.explicit import apply_inverses, identities, inverse_cost

__all__ = ["Covariance"]

GROWTH = 10.0
"""A failed factorisation multiplies a layer's damping by this; each success halves it again."""

MOST = 1e12
"""How far a damping may grow; a covariance that needs more is not finite."""


@dataclass(frozen=True)
class Covariance:
    """Kronecker factors from full covariances (Martens & Grosse 2015; Pauloski et al. 2021).

    ``A`` and ``G`` are averages of ``a a^T`` and ``g g^T`` over all rows, with momentum, corrected
    for their start; ``P = (G + lambda I)^-1 M (A + lambda I)^-1``. With the pi-correction the sides
    share the damping by their scale: ``A + pi sqrt(lambda) I`` and ``G + sqrt(lambda)/pi I`` with
    ``pi^2 = (tr A / d_A) / (tr G / d_G)``.

    State, per side: ``covariance [B, d, d]`` (not bias-corrected) and ``inverse [B, d, d]``; for
    both: ``updates [B]``, ``damping_factor [B]``, what failed factorisations made of the damping,
    and ``inverted [B]``, whether there is an inverse yet. While a factorisation fails, the last
    good inverse stays in use; a layer without any keeps its raw gradient.

    Attributes:
        momentum: ``gamma``, in (0, 1).
        damping: ``lambda``, positive, in the units of the covariances.
        inverse_every: Updates between inversions, the first included.
        pi_correction: Whether the sides share the damping; needs both sides.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A number has the wrong type.
    """

    momentum: float = 0.95
    damping: float = 0.001
    inverse_every: int = 1
    pi_correction: bool = False
    vectors: ClassVar[int] = 1
    rows: ClassVar[int | None] = None
    covariance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "inverse_every")
        check_fraction(self, "momentum")
        check_positive(self, "damping")
        if not isinstance(self.pi_correction, bool):
            raise TypeError(f"pi_correction must be True or False, got {self.pi_correction!r}")

    def init(self, shape: BatchShape) -> dict[str, Tensor]:
        """Allocate empty covariances and identities.

        Args:
            shape: Of the batch of layers.

        Returns:
            The state.

        Raises:
            ValueError: The pi-correction has only one side.
        """
        if self.pi_correction and shape.sides != SIDES:
            raise ValueError("pi_correction balances two sides: use sides='both' or turn it off")
        state = {
            "updates": torch.zeros(shape.layers, dtype=torch.int64, device=shape.device),
            "damping_factor": torch.ones(shape.layers, dtype=shape.dtype, device=shape.device),
            "inverted": torch.zeros(shape.layers, dtype=torch.bool, device=shape.device),
        }
        for side in shape.sides:
            state[f"{side}_inverse"] = identities(shape, side, shape.dtype)
            state[f"{side}_covariance"] = torch.zeros_like(state[f"{side}_inverse"])
        return state

    def update(self, state: dict[str, Tensor], statistics: Statistics) -> None:
        """Average the covariances, and invert them where it is time.

        Args:
            state: Changed in place; the averages of layers that do not accept stay as they are.
            statistics: Of this update.
        """
        accept = statistics.accept
        use = accept[:, None, None]
        for side, new in statistics.covariance.items():
            average = state[f"{side}_covariance"]
            weight = use.to(average.dtype) * (1 - self.momentum)
            average.lerp_(torch.where(use, new, 0.0), weight)
        state["updates"] += accept
        if statistics.update % self.inverse_every == 0:
            # Layers without data in just this step have older averages, but good ones.
            known = state["updates"] > 0
            refused = statistics.refused
            self._invert(state, known if refused is None else known & ~refused)

    def _invert(self, state: dict[str, Tensor], where: Tensor) -> None:
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

    def _dampings(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = {side: S.diagonal(dim1=1, dim2=2).mean(1) for side, S in averages.items()}
        if not self.pi_correction:
            return {side: torch.full_like(mean, self.damping) for side, mean in scale.items()}
        pi = (scale["right"] / scale["left"]).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, 1.0)
        root = self.damping**0.5
        return {"right": pi * root, "left": root / pi}

    def prepare(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """The inverses themselves.

        Args:
            state: The factors.
            shape: Of the batch of layers.

        Returns:
            By side, ``[B, d, d]``; and ``inverted [B]``.
        """
        inverses = {side: state[f"{side}_inverse"] for side in shape.sides}
        return {**inverses, "inverted": state["inverted"]}

    def apply(self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
        """``(G + lambda I)^-1 [W b] (A + lambda I)^-1`` in place.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, d_out, d_in]``, the weight's gradient.
            b: ``[B, d_out]``, the bias's gradient, or None.
            ok: ``[B]`` bool; other layers stay as they are.

        Returns:
            ``ok`` less the layers without an inverse, or whose product is not finite.
        """
        inverses = {side: prepared[side] for side in SIDES if side in prepared}
        return apply_inverses(inverses, W, b, ok & prepared["inverted"])

    def figures(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Mean eigenvalue of each covariance, and what failures made of the damping.

        Args:
            state: The factors.
            shape: Of the batch of layers.

        Returns:
            ``{side}_mean_eigenvalue`` and ``damping_factor``, each ``[B]``.
        """
        steps = linalg.bias_correction(state["updates"], self.momentum, shape.dtype)
        figures = {
            f"{side}_mean_eigenvalue": state[f"{side}_covariance"].diagonal(dim1=1, dim2=2).mean(1)
            / steps
            for side in shape.sides
        }
        return {**figures, "damping_factor": state["damping_factor"]}

    def kept(self, shape: BatchShape) -> int:
        """The full width: nothing is truncated.

        Args:
            shape: Of the batch of layers.

        Returns:
            The larger side's width.
        """
        return max(shape.full_width(side) for side in shape.sides)

    def cost(self, shape: BatchShape) -> int:
        """Operations of preconditioning one layer.

        Args:
            shape: Of the batch of layers.

        Returns:
            The number of floating-point operations.
        """
        return inverse_cost(shape)
