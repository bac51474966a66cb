"""The window factor: the newest ``r`` statistics vectors of a side, inverted exactly.

After ``t`` updates a side is ``S = lambda I + sum_i w_i v_i v_i^T`` over the window, with
``w_i = (1-gamma) gamma^age / (k_i (1-gamma^t))``. With the ``v_i`` as rows of ``V [r, d]``, with
``s_i = sqrt(w_i / lambda)`` and the Cholesky factor ``K K^T = I + diag(s) V V^T diag(s)``, its
inverse is ``(I - U^T U) / lambda`` for ``U = K^-1 diag(s) V``; the constant ``1/lambda`` is
dropped. The window is a ring buffer; its Gram matrix ``V V^T`` is kept up to date: an update costs
``2 k r d`` operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.blocks import complete_window, project_window
from mkor.curvature.checks import check_counts, check_dtype, check_fraction, check_positive
from mkor.curvature.contract import BatchShape, Block, Statistics
from mkor.curvature.ring import turn

__all__ = ["Window"]

TOGETHER = 1 << 20
"""Most entries of ``r x r`` matrices factored together, unless one batch alone has more."""


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
        self.update_all([(state, statistics)])

    def update_all(self, pairs: Iterable[tuple[dict[str, Tensor], Statistics]]) -> None:
        """:meth:`update` for batches of several shapes; what is small is done for all at once.

        Args:
            pairs: Each batch's state, changed in place, and its statistics; all have as many slots.
        """
        turn(list(pairs), self.momentum)

    def prepare(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Whitened vectors ``U = K^-1 diag(s) V`` of each side, a bias's ones a column of ``V``.

        Args:
            state: The windows.
            shape: Of the batch of layers.

        Returns:
            ``left [B, r, d_out]``, ``right [B, r, d_in]``, for a bias ``bias [B, r]``, and unless
            all are known to be finite ``usable [B]``: whether they are; where not, they are 0.
        """
        return next(self.prepare_all([(state, shape)]))

    def prepare_all(
        self, pairs: Sequence[tuple[dict[str, Tensor], BatchShape]]
    ) -> Iterator[dict[str, Tensor]]:
        """:meth:`prepare` for batches of several shapes; their ``r x r`` problems are one batch.

        Args:
            pairs: Each batch's windows and shape.

        Yields:
            What :meth:`prepare` returns.
        """
        stretch: list[tuple[dict[str, Tensor], BatchShape]] = []
        entries = 0
        for state, shape in pairs:
            size = len(state["updates"]) * len(shape.sides) * self.rank**2
            if stretch and entries + size > TOGETHER:
                yield from self._prepare_stretch(stretch)
                stretch, entries = [], 0
            stretch.append((state, shape))
            entries += size
        if stretch:
            yield from self._prepare_stretch(stretch)

    def _prepare_stretch(
        self, pairs: Sequence[tuple[dict[str, Tensor], BatchShape]]
    ) -> Iterator[dict[str, Tensor]]:
        roots = self._roots(pairs)
        for state, shape in pairs:
            yield self._whiten(state, shape, {side: next(roots) for side in shape.sides})

    def _roots(
        self, pairs: Sequence[tuple[dict[str, Tensor], BatchShape]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """``A`` of each side of each batch (:func:`mkor.linalg.whitening_root`), and its bias's."""
        each = [(state, shape, side) for state, shape in pairs for side in shape.sides]
        ones = [shape.bias and side == "right" for _, shape, side in each]
        # Weights and mean squares are averages over the same updates: their corrections cancel.
        figures = [
            (state[f"{side}_gram"], state["weights"], state[f"{side}_mean_square"])
            for state, _, side in each
        ]
        roots = linalg.whitening_roots(figures, ones, self.damping)
        for (state, _, side), one, A in zip(each, ones, roots, strict=True):
            u = A.sum(-1) if one else None
            scale = state.get(f"{side}_scale")
            yield A if scale is None else A * scale.unsqueeze(-2), u

    def _whiten(
        self,
        state: dict[str, Tensor],
        shape: BatchShape,
        roots: dict[str, tuple[Tensor, Tensor | None]],
    ) -> dict[str, Tensor]:
        """What :meth:`prepare` returns, from what :meth:`_roots` yields."""
        U = {
            side: torch.bmm(A, state[f"{side}_rows"].to(A.dtype)) for side, (A, _) in roots.items()
        }
        finite = linalg.all_finite(*U.values())
        usable = None if finite else torch.stack([rows.sum((1, 2)) for rows in U.values()]).sum(0)
        u = roots["right"][1] if "right" in roots else None
        if u is not None:
            U["bias"] = u
        if usable is None:
            return U
        usable = usable.abs() < math.inf
        # A damaged window must not reach the gradient; 0 times NaN would.
        U = {key: linalg.where(usable, rows, 0.0) for key, rows in U.items()}
        return {**U, "usable": usable}

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
        if "usable" in prepared:
            ok = ok & prepared["usable"]
        only = None if linalg.all_hold(ok) else ok
        left, right, u = (prepared.get(key) for key in ("left", "right", "bias"))
        if left is not None and right is not None:
            linalg.subtract_both(left, right, u, W, b, only)
        elif left is not None:
            linalg.subtract_left(left, W, b, only)
        elif right is not None:
            linalg.subtract_right(right, u, W, b, only)
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

    def _damping(self, state: dict[str, Tensor], side: str) -> Tensor:
        average = state[f"{side}_mean_square"]
        steps = linalg.bias_correction(state["updates"], self.momentum, average.dtype)
        return self.damping * average / steps
