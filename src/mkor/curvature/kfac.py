"""KFAC as KAISA has it: averaged covariances of all rows, inverted every so often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.checks import check_counts, check_fraction, check_positive
from mkor.curvature.contract import SIDES, BatchShape, Block, OneByOne, Statistics
from mkor.curvature.explicit import (
    apply_inverses,
    complete_inverses,
    identities,
    inverse_cost,
    place_block,
)

__all__ = ["Covariance"]

GROWTH = 10.0
"""A failed factorisation multiplies a layer's damping by this; each success halves it again."""

MOST = 1e12
"""How far a damping may grow; a covariance that needs more is not finite."""


@dataclass(frozen=True)
class Covariance(OneByOne):
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
    vectors: ClassVar[int] = 1
    rows: ClassVar[int | None] = None
    gathers: ClassVar[bool] = False
    covariance: ClassVar[bool] = True

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
        """Average the covariances; their inverses wait for :meth:`renew`.

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

    def due(self, update: int) -> bool:
        """Whether inverses are to be renewed with an update.

        Args:
            update: Updates of the optimizer before it.

        Returns:
            Whether it is time.
        """
        return update % self.inverse_every == 0

    def renew(self, state: dict[str, Tensor], where: Tensor) -> None:
        """Invert the averages, without synchronising the device.

        Args:
            state: Changed in place.
            where: ``[B]`` bool, the layers it is for; they must have taken an update.
        """
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

    def shared(self, state: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What :meth:`renew` changes.

        Args:
            state: The factors.

        Returns:
            Of one dtype: the inverses; and what is known of them on every process, small.
        """
        inverses = [tensor for key, tensor in state.items() if key.endswith("_inverse")]
        return inverses, [state["damping_factor"], state["inverted"]]

    def without_inverses(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a process that leaves the layers to others.

        Args:
            state: The factors.

        Returns:
            The same keys and shapes; zeros without memory for the inverses.
        """
        return {
            key: tensor.new_zeros(()).expand(tensor.shape) if key.endswith("_inverse") else tensor
            for key, tensor in state.items()
        }

    def recover(self, state: dict[str, Tensor]) -> None:
        """Invert anew after loading what the process that wrote the state left to others.

        Averages are still those of the checkpoint, so the inverses are the lost ones if they were
        renewed in its last update. The damping stays: other processes have nothing to invert.

        Args:
            state: As it was loaded; changed in place.
        """
        inverses, _ = self.shared(state)
        # The diagonal of an inverse is positive. A checkpoint may mix tensors of several processes.
        empty = [(H.diagonal(dim1=1, dim2=2) == 0).all(1) for H in inverses]
        lost = state["inverted"] & torch.stack(empty).any(0)
        if lost.any():
            damping_factor = state["damping_factor"].clone()
            state["inverted"] &= ~lost
            self.renew(state, lost)
            state["damping_factor"].copy_(damping_factor)

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

    def project(
        self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, block: Block
    ) -> Tensor:
        """The whole gradient, of which a block is here.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, rows, columns]``, the block of the weight's gradient.
            b: ``[B, bias]``, that of the bias's gradient, or None.
            block: Which part of the layers they are.

        Returns:
            ``[B, n]``, to be summed over the blocks.
        """
        return place_block(W, b, block)

    def complete(
        self,
        prepared: dict[str, Tensor],
        W: Tensor,
        b: Tensor | None,
        projected: Tensor,
        ok: Tensor,
        block: Block,
    ) -> Tensor:
        """The block of what :meth:`apply` makes of the whole, in place.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, rows, columns]``.
            b: ``[B, bias]``, or None.
            projected: ``[B, n]``, summed over the blocks.
            ok: ``[B]`` bool; other layers stay as they are.
            block: Which part of the layers they are.

        Returns:
            ``ok`` less the layers without an inverse, or whose products may not be finite.
        """
        inverses = {side: prepared[side] for side in SIDES if side in prepared}
        ok = ok & prepared["inverted"]
        return complete_inverses(inverses, W, b, projected, ok, block)

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
