"""The window factor: the newest ``r`` statistics vectors of a side, inverted exactly.

After ``t`` updates a side is ``S = lambda I + sum_i w_i v_i v_i^T`` over the window, with
``w_i = (1-gamma) gamma^age / (k_i (1-gamma^t))``. Its inverse is ``(I - U^T U) / lambda`` with
``U = C V`` and an ``r x r`` matrix ``C``; the constant ``1/lambda`` is dropped. The window is a
ring buffer; its Gram matrix ``V V^T`` is kept up to date: an update costs ``2 k r d`` operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.blocks import complete_window, project_window
from mkor.curvature.checks import check_counts, check_dtype, check_fraction, check_positive
from mkor.curvature.contract import BatchShape, Block, Statistics

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """Window factors.

    State, per side: ``rows [B, r, d]`` (``v_i``), ``gram [B, r, r]`` (``V V^T``, without the ones
    of a bias) and ``mean_square [B]`` (running, not bias-corrected). For both sides:
    ``weights [B, r]`` (``(1-gamma) gamma^age / k_i``), ``updates [B]`` (``t``) and
    ``written [B]`` (vectors so far). With float16, also per side ``scale [B, r]``: rows are stored
    over their largest entry, since gradients may lie below what float16 can hold.

    Attributes:
        rank: Vectors per side, ``r``.
        vectors: Vectors per update, ``k``, at most ``rank``.
        rows: Rows averaged in a vector, ``m``; None for all rows.
        momentum: Decay per update, ``gamma``, in (0, 1).
        damping: ``lambda`` over the running mean square of a side's entries, positive.
        factor_dtype: Of the stored vectors; None for float32, or float64 where the weight is.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A number or dtype has the wrong type.
    """

    rank: int = 64
    vectors: int = 16
    rows: int | None = 32
    momentum: float = 0.98
    damping: float = 0.02
    factor_dtype: torch.dtype | None = None
    gathers: ClassVar[bool] = True
    covariance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "rank", "vectors", "rows")
        if self.rank < self.vectors:
            raise ValueError(
                f"rank={self.rank} cannot hold the {self.vectors} vectors of one update: "
                f"use rank >= {self.vectors} or fewer vectors"
            )
        check_fraction(self, "momentum")
        check_positive(self, "damping")
        check_dtype(self.factor_dtype)

    def init(self, shape: BatchShape) -> dict[str, Tensor]:
        """Allocate an empty window.

        Args:
            shape: Of the batch of layers.

        Returns:
            The state.
        """
        B, r = shape.layers, self.rank

        def zeros(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=shape.device)

        state = {
            "updates": zeros(B, dtype=torch.int64),
            "written": zeros(B, dtype=torch.int64),
            "weights": zeros(B, r),
        }
        for side in shape.sides:
            width = shape.width(side)
            state[f"{side}_rows"] = zeros(B, r, width, dtype=self.factor_dtype or shape.dtype)
            state[f"{side}_gram"] = zeros(B, r, r)
            state[f"{side}_mean_square"] = zeros(B)
            if self.factor_dtype == torch.float16:
                state[f"{side}_scale"] = zeros(B, r)
        return state

    def update(self, state: dict[str, Tensor], statistics: Statistics) -> None:
        """Write the new vectors over the oldest and let the others age.

        Args:
            state: Changed in place; layers that do not accept stay as they are.
            statistics: Of this update.
        """
        accept, filled = statistics.accept, statistics.filled
        made = filled.sum(1)
        slot = torch.arange(filled.shape[1], device=accept.device)
        # Filled slots take the next places in order; the others write back what is after them.
        upto = filled.cumsum(1)
        order = torch.where(filled, upto - 1, made.unsqueeze(1) + slot - upto)
        places = (state["written"].unsqueeze(1) + order) % self.rank
        new = filled & accept.unsqueeze(1)

        weights = state["weights"]
        aged = torch.where(accept.unsqueeze(1), weights * self.momentum, weights)
        fresh = (1.0 - self.momentum) / made.clamp(min=1).to(aged.dtype).unsqueeze(1)
        weights.copy_(aged.scatter_(1, places, torch.where(new, fresh, aged.gather(1, places))))
        for side, vectors in statistics.vectors.items():
            self._write(state, side, vectors, places, new, accept)
            average = state[f"{side}_mean_square"]
            moved = linalg.momentum_average(average, statistics.mean_square[side], self.momentum)
            average.copy_(torch.where(accept, moved, average))
        state["updates"] += accept
        state["written"] += torch.where(accept, made, 0)

    def _write(
        self,
        state: dict[str, Tensor],
        side: str,
        arrived: Tensor,
        places: Tensor,
        new: Tensor,
        accept: Tensor,
    ) -> None:
        """Put ``arrived [B, k, d]`` into a side's ring, and its products into the Gram matrix."""
        ring, gram = state[f"{side}_rows"], state[f"{side}_gram"]
        scale = state.get(f"{side}_scale")
        if scale is not None:
            largest = arrived.abs().amax(-1)
            largest = torch.where(largest > 0, largest, 1.0)
            scale.scatter_(1, places, torch.where(new, largest, scale.gather(1, places)))
            arrived = arrived / largest.unsqueeze(-1)
        # By number, whole rows are copied much faster than single entries.
        B, r, d = ring.shape
        numbers = (places + r * torch.arange(B, device=places.device).unsqueeze(1)).flatten()
        old = ring.view(B * r, d).index_select(0, numbers).view(B, -1, d)
        written = torch.where(new.unsqueeze(-1), arrived.to(ring.dtype), old)
        ring.view(B * r, d).index_copy_(0, numbers, written.flatten(0, 1))
        products = written.to(gram.dtype) @ ring.to(gram.dtype).mT
        if scale is not None:
            products = products * scale.unsqueeze(1) * scale.gather(1, places).unsqueeze(2)
        old = gram.view(B * r, r).index_select(0, numbers).view(B, -1, r)
        products = torch.where(accept[:, None, None], products, old)
        gram.view(B * r, r).index_copy_(0, numbers, products.flatten(0, 1))
        columns = places.unsqueeze(1).expand(-1, r, -1)
        gram.scatter_(2, columns, products.mT)

    def prepare(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Whitened vectors ``U = C V`` of each side.

        Args:
            state: The windows.
            shape: Of the batch of layers.

        Returns:
            ``left [B, r, d_out]``, ``right [B, r, d_in]``, for a bias ``bias [B, r]``, and
            ``usable [B]``: whether they are finite; where not, they are 0.
        """
        sides, bias = shape.sides, shape.bias
        # Both sides' r x r problems are solved as one batch.
        gram = torch.cat(
            [state[f"{side}_gram"] + float(bias and side == "right") for side in sides]
        )
        weights = linalg.age_weights(state["weights"], state["updates"], self.momentum)
        damping = torch.cat([self._damping(state, side) for side in sides])
        C = linalg.whitening(gram, weights.repeat(len(sides), 1), damping)
        parts = dict(zip(sides, C.chunk(len(sides)), strict=True))
        U = {side: self._whitened(state, side, parts[side]) for side in sides}
        usable = torch.stack([U[side].sum((1, 2)) for side in sides]).sum(0).isfinite()
        # A damaged window must not reach the gradient; 0 times NaN would.
        prepared = {side: torch.where(usable[:, None, None], U[side], 0.0) for side in sides}
        if bias and "right" in sides:
            prepared["bias"] = torch.where(usable[:, None], parts["right"].sum(-1), 0.0)
        return {**prepared, "usable": usable}

    def apply(self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
        """``(I - U_L^T U_L) [W b] (I - U_R^T U_R)``, in place.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, d_out, d_in]``, the weight's gradient.
            b: ``[B, d_out]``, the bias's gradient, or None.
            ok: ``[B]`` bool, layers whose gradient has a finite norm; others stay as they are.

        Returns:
            ``ok`` less the layers whose window is not finite.
        """
        # Every |U| is at most 1: of finite norms come finite products.
        ok = ok & prepared["usable"]
        if "left" in prepared:
            linalg.subtract_left(prepared["left"], W, b, ok)
        if "right" in prepared:
            U = prepared["right"]
            u = prepared["bias"] if "bias" in prepared else U.new_zeros(U.shape[:-1])
            linalg.subtract_right(U, u, W, b, ok)
        return ok

    def project(
        self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, block: Block
    ) -> Tensor:
        """``U_L [W b]`` where rows are cut, ``[W b] [U_R u]^T`` where columns are.

        Args:
            prepared: Rows of what :meth:`prepare` returned.
            W: ``[B, rows, columns]``, the block of the weight's gradient.
            b: ``[B, bias]``, that of the bias's gradient, or None.
            block: Which part of the layers they are.

        Returns:
            ``[B, n]``, to be summed over the blocks.
        """
        return project_window(prepared, W, b, block)

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
            ``ok`` less the layers whose window or products are not finite.
        """
        return complete_window(prepared, W, b, projected, ok, block)

    def figures(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Damping and effective rank of each side.

        The effective rank ``||U||_F^2 = sum_i mu_i / (mu_i + lambda)`` counts the directions in
        which the window's eigenvalues ``mu_i`` outweigh the damping.

        Args:
            state: The windows.
            shape: Of the batch of layers.

        Returns:
            ``{side}_lambda`` and ``{side}_effective_rank``, each ``[B]``.
        """
        prepared = self.prepare(state, shape)
        figures = {}
        for side in shape.sides:
            rank = prepared[side].square().sum((1, 2))
            if side == "right" and "bias" in prepared:
                rank = rank + prepared["bias"].square().sum(1)
            figures[f"{side}_lambda"] = self._damping(state, side)
            figures[f"{side}_effective_rank"] = rank
        return figures

    def kept(self, shape: BatchShape) -> int:
        """Vectors kept per side.

        Args:
            shape: Of the batch of layers; any.

        Returns:
            The rank.
        """
        return self.rank

    def cost(self, shape: BatchShape) -> int:
        """Operations of preconditioning one layer: ``4 r d_out d_in`` per side.

        Args:
            shape: Of the batch of layers.

        Returns:
            The number of floating-point operations.
        """
        return 4 * self.rank * shape.d_out * (shape.d_in + shape.bias) * len(shape.sides)

    def _whitened(self, state: dict[str, Tensor], side: str, C: Tensor) -> Tensor:
        scale = state.get(f"{side}_scale")
        C = C if scale is None else C * scale.unsqueeze(1)
        return C @ state[f"{side}_rows"].to(C.dtype)

    def _damping(self, state: dict[str, Tensor], side: str) -> Tensor:
        average = state[f"{side}_mean_square"]
        steps = linalg.bias_correction(state["updates"], self.momentum, average.dtype)
        return self.damping * average / steps


def _over(places: Tensor, rows: Tensor) -> Tensor:
    """Places ``[B, k]`` as indices of whole rows ``[B, k, d]``."""
    return places.unsqueeze(-1).expand(-1, -1, rows.shape[-1])
