"""Eva's factor: one averaged mean vector per side, and a closed form for the whole layer.

``P = (M - (g^T M a / (|a|^2 |g|^2 + delta)) g a^T) / delta`` is ``(a a^T (x) g g^T + delta I)^-1``
applied to ``M`` (Zhang, Shi & Li, "Eva: A General Vectorized Approximation Framework for
Second-order Optimization", ICLR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.checks import check_fraction, check_positive
from mkor.curvature.contract import SIDES, BatchShape, Block, OneByOne, Statistics

__all__ = ["RankOne"]


@dataclass(frozen=True)
class RankOne(OneByOne):
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
    vectors: ClassVar[int] = 1
    rows: ClassVar[int | None] = None
    gathers: ClassVar[bool] = False
    covariance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self, "momentum")
        check_positive(self, "damping")

    def init(self, shape: BatchShape) -> dict[str, Tensor]:
        """Allocate empty averages.

        Args:
            shape: Of the batch of layers.

        Returns:
            The state.

        Raises:
            ValueError: Only one side is in use: the closed form needs both.
        """
        if shape.sides != SIDES:
            raise ValueError("Eva's closed form preconditions both sides at once: use sides='both'")
        B = shape.layers
        vectors = {
            f"{side}_vector": torch.zeros(
                B, shape.full_width(side), dtype=shape.dtype, device=shape.device
            )
            for side in shape.sides
        }
        return {"updates": torch.zeros(B, dtype=torch.int64, device=shape.device), **vectors}

    def update(self, state: dict[str, Tensor], statistics: Statistics) -> None:
        """Average the new mean vectors.

        Args:
            state: Changed in place; layers that do not accept stay as they are.
            statistics: Of this update.
        """
        accept = statistics.accept.unsqueeze(1)
        for side, vectors in statistics.vectors.items():
            average, new = state[f"{side}_vector"], vectors[:, 0]
            # A bias shows in the width: its inputs are ones.
            new = new if new.shape == average.shape else linalg.append_ones(new)
            moved = linalg.momentum_average(average, new, self.momentum)
            average.copy_(torch.where(accept, moved, average))
        state["updates"] += statistics.accept

    def prepare(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """The averages, corrected for their start.

        Args:
            state: The averages.
            shape: Of the batch of layers.

        Returns:
            ``left [B, d_out]`` and ``right [B, d_in (+ 1)]``.
        """
        steps = linalg.bias_correction(state["updates"], self.momentum, shape.dtype).unsqueeze(1)
        return {side: state[f"{side}_vector"] / steps for side in shape.sides}

    def apply(self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
        """``([W b] - c g [a 1]^T) / delta`` in place.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, d_out, d_in]``, the weight's gradient.
            b: ``[B, d_out]``, the bias's gradient, or None.
            ok: ``[B]`` bool; other layers stay as they are.

        Returns:
            ``ok`` less the layers whose vectors or product are not finite.
        """
        d_out, d_in = W.shape[1:]
        rows = slice(d_out)
        block = Block(rows, slice(d_in), rows, (d_out, d_in), "rows")
        c = linalg.rank_one_coefficient(prepared["right"], prepared["left"], W, b, self.damping)
        return self._subtract(prepared, W, b, c, linalg.largest_entry(W, b), ok, block)

    def project(
        self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, block: Block
    ) -> Tensor:
        """``g^T [W b] [a 1]`` and the largest entry, two numbers.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, rows, columns]``, the block of the weight's gradient.
            b: ``[B, bias]``, that of the bias's gradient, or None.
            block: Which part of the layers they are.

        Returns:
            ``[B, n]``, to be summed over the blocks.
        """
        a, g = prepared["right"], prepared["left"]
        product = linalg.bilinear(g[:, block.rows], W, a[:, block.columns])
        if b is not None:
            product = product + (g[:, block.bias] * b).sum(1) * a[:, -1]
        return torch.stack((product, linalg.largest_entry(W, b)), dim=1)

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
            ``ok`` less the layers whose vectors or product are not finite.
        """
        product, largest = projected.unbind(1)
        c = product / linalg.rank_one_denominator(prepared["right"], prepared["left"], self.damping)
        return self._subtract(prepared, W, b, c, largest, ok, block)

    def figures(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Norms of the averaged vectors.

        Args:
            state: The averages.
            shape: Of the batch of layers.

        Returns:
            ``{side}_norm``, each ``[B]``.
        """
        prepared = self.prepare(state, shape)
        return {f"{side}_norm": v.norm(dim=1) for side, v in prepared.items()}

    def kept(self, shape: BatchShape) -> int:
        """Vectors kept per side.

        Args:
            shape: Of the batch of layers; any.

        Returns:
            One.
        """
        return 1

    def cost(self, shape: BatchShape) -> int:
        """Operations of preconditioning one layer, ``5 d_out d_in``.

        Args:
            shape: Of the batch of layers.

        Returns:
            The number of floating-point operations.
        """
        return 5 * shape.d_out * shape.full_width("right")

    def _subtract(
        self,
        prepared: dict[str, Tensor],
        W: Tensor,
        b: Tensor | None,
        c: Tensor,
        largest: Tensor,
        ok: Tensor,
        block: Block,
    ) -> Tensor:
        """``([W b] - c g [a 1]^T) / delta`` on a block, in place, where that is finite."""
        a, g = prepared["right"], prepared["left"]
        cg = c.unsqueeze(1) * g
        # Nothing the product is made of may leave the dtype's range.
        bound = largest + cg.abs().amax(1) * a.abs().amax(1)
        ok = ok & (bound / self.damping).isfinite()
        cg = torch.where(ok.unsqueeze(1), cg, 0.0)
        a = torch.where(ok.unsqueeze(1), a, 0.0)
        scale = torch.where(ok, torch.full_like(c, 1 / self.damping), 1.0)
        W.addcmul_(cg[:, block.rows, None], a[:, None, block.columns], value=-1)
        W.mul_(scale[:, None, None])
        if b is not None:
            b.sub_(cg[:, block.bias] * a[:, -1:]).mul_(scale.unsqueeze(1))
        return ok
