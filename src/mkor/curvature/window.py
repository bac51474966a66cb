"""The window factor: the newest ``r`` statistics vectors of a side, inverted exactly.

After ``t`` updates a side is ``S = lambda I + sum_i w_i v_i v_i^T`` over the window, with
``w_i = (1-gamma) gamma^age / (k_i (1-gamma^t))``. With the ``v_i`` as rows of ``V [r, d]``, with
``s_i = sqrt(w_i / lambda)`` and the Cholesky factor ``K K^T = I + diag(s) V V^T diag(s)``, its
inverse is ``(I - U^T U) / lambda`` for ``U = K^-1 diag(s) V``; the constant ``1/lambda`` is
dropped. The window is a ring: the newest vectors come in over the oldest, the others lose weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.base import (
    Curvature,
    Factors,
    State,
    Statistics,
    alone,
    check_counts,
    check_dtype,
    check_fraction,
    check_positive,
    own_part,
    zeros,
)
from mkor.layers.layer import SIDES, Block, GroupShape


@dataclass(frozen=True)
class Window(Curvature):
    """Window factors.

    State, per side: ``rows [B, r, d]`` (``v_i``, without the ones of a bias) and
    ``mean_square [B]`` (running, not bias-corrected). For both sides: ``weights [B, r]``
    (``(1-gamma) gamma^age / k_i``), ``updates [B]`` (``t``) and ``written [B]`` (vectors so far).
    With float16, also per side ``scale [B, r]``: rows are stored over their largest entry, since
    gradients may lie below what float16 can hold.

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
    joined: ClassVar[tuple[str, ...]] = (
        "written",
        "weights",
        *(f"{side}_{key}" for side in SIDES for key in ("mean_square", "scale")),
    )

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

    def init(self, shape: GroupShape) -> State:
        """Empty windows."""
        r = self.rank
        state = {
            "updates": zeros(shape, dtype=torch.int64),
            "written": zeros(shape, dtype=torch.int64),
            "weights": zeros(shape, r),
        }
        for side in shape.sides:
            state[f"{side}_rows"] = zeros(shape, r, shape.width(side), dtype=self.factor_dtype)
            state[f"{side}_mean_square"] = zeros(shape)
            if self.factor_dtype == torch.float16:
                state[f"{side}_scale"] = zeros(shape, r)
        return state

    # ---------------------------------------------------------------------------------- update

    def update(self, state: State, statistics: Statistics) -> None:
        """Write the new vectors over the oldest and let the others lose weight."""
        self.update_all(alone(state), statistics, [(0, statistics)])

    def update_all(
        self, factors: Factors, whole: Statistics, each: Iterable[tuple[int, Statistics]]
    ) -> None:
        """:meth:`update` of all groups; what is a number or a row per layer, in one for all."""
        joined, accept = factors.joined, whole.accept
        places, new = self._decay_weights(joined, whole)
        for side, square in whole.mean_square.items():
            average = joined[f"{side}_mean_square"]
            moved = linalg.momentum_average(average, square, self.momentum)
            average.copy_(torch.where(accept, moved, average))
        joined["updates"] += accept
        numbers = (places + self.rank * factors.positions.unsqueeze(1)).flatten()
        sizes, k = factors.sizes, places.shape[1]
        slots = list(
            zip(
                places.split(sizes),
                numbers.split([k * size for size in sizes]),
                new.reshape(-1, 1).split([k * size for size in sizes]),
                strict=True,
            )
        )
        for i, statistics in each:
            for side, vectors in statistics.vectors.items():
                _push(factors.groups[i], side, vectors, *slots[i])

    def _decay_weights(self, joined: State, whole: Statistics) -> tuple[Tensor, Tensor]:
        """``[N, k]``: where in its ring each slot's vector goes, and whether there is one."""
        written, weights = joined["written"], joined["weights"]
        filled, accept = whole.filled, whole.accept.unsqueeze(1)
        upto = filled.cumsum(1)
        made = upto[:, -1:]
        slot = torch.arange(filled.shape[1], device=filled.device)
        # Filled slots take the next places in order; the others write back what comes after.
        order = torch.where(filled, upto - 1, made + slot - upto)
        places = (written.unsqueeze(1) + order) % self.rank
        new = filled & accept
        weights.copy_(torch.where(accept, weights * self.momentum, weights))
        # Without a vector there is no slot that takes this weight.
        fresh = (1.0 - self.momentum) / made.to(weights.dtype)
        weights.scatter_(1, places, torch.where(new, fresh, weights.gather(1, places)))
        written += new.sum(1)
        return places, new

    # --------------------------------------------------------------------------------- prepare

    def prepare(self, state: State, shape: GroupShape) -> State:
        """Whitened vectors ``U [B, r, d]`` of each side, and ``usable [B]``: whether finite."""
        return next(self.prepare_all(alone(state, shape), [0]))

    def prepare_all(self, factors: Factors, wanted: Sequence[int]) -> Iterator[State]:
        """:meth:`prepare` of the wanted groups; the ``r x r`` problems of all are one batch."""
        sides, sizes = factors.shapes[0].sides, factors.sizes
        A = self._whitening(factors, wanted, sides)
        usable = (A.sum((2, 3)).abs() < math.inf).all(0)
        good, damaged = usable.split(sizes), (~usable).view(-1, 1, 1).split(sizes)
        cut = [matrices.split(sizes) for matrices in A.unbind()]
        for i in wanted:
            # A damaged window must not reach the gradient; 0 times NaN would.
            U = {
                side: _whiten(each[i], factors.groups[i], factors.shapes[i], side)
                for side, each in zip(sides, cut, strict=True)
            }
            for vectors in U.values():
                vectors.masked_fill_(damaged[i], 0.0)
            yield {**U, "usable": good[i]}

    def _whitening(self, factors: Factors, wanted: Sequence[int], sides: Sequence[str]) -> Tensor:
        """``A [S, N, r, r]`` of :func:`mkor.linalg.whitening_matrix`, for all sides at once."""
        joined = factors.joined
        weights = joined["weights"]
        gram = weights.new_zeros(len(sides), *weights.shape, self.rank)
        for side, grams in zip(sides, gram.unbind(), strict=True):
            products = grams.split(factors.sizes)
            for i in wanted:
                V = factors.groups[i][f"{side}_rows"].to(gram.dtype)
                torch.bmm(V, V.mT, out=products[i])
            scale = joined.get(f"{side}_scale")
            if scale is not None:
                grams *= scale.unsqueeze(1) * scale.unsqueeze(2)
            for i in wanted:
                if factors.shapes[i].bias and side == "right":
                    products[i].add_(1.0)
        # Weights and mean squares are averages over the same updates: their corrections cancel.
        squares = torch.stack([joined[f"{side}_mean_square"] for side in sides])
        return linalg.whitening_matrix(gram, weights, self.damping * squares)

    # ----------------------------------------------------------------------------------- apply

    def apply(self, prepared: State, M: Tensor, ok: Tensor) -> Tensor:
        """``(I - U_L^T U_L) M (I - U_R^T U_R)`` in place, ``4 r d_out d_in`` operations a side."""
        # Every |U| is at most 1: of finite norms come finite products.
        ok = ok & prepared["usable"]
        where = linalg.per_layer(ok, M)
        if "left" in prepared:
            _apply_left(prepared["left"], M, where)
        if "right" in prepared:
            _apply_right(prepared["right"], M, where)
        return ok

    def shard_products(self, prepared: State, M: Tensor, block: Block, shape: GroupShape) -> Tensor:
        """``U_L M`` where rows are cut; where columns are, ``M U_R^T`` and the bias's gradient."""
        parts = [M.new_empty(len(M), 0)]
        if block.cut == "rows" and "left" in prepared:
            parts.append(linalg.left_products(prepared["left"][..., block.rows], M))
        if block.cut == "columns" and "right" in prepared:
            parts.append(linalg.right_products(own_part(prepared["right"], block, shape), M))
        if block.cut == "columns" and shape.bias:
            parts.append(M[..., -1])
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def apply_shard(
        self, prepared: State, M: Tensor, total: Tensor, ok: Tensor, block: Block, shape: GroupShape
    ) -> Tensor:
        """:meth:`apply` for a block: the factor across the cut by sums, the other one here."""
        ok = ok & prepared["usable"]
        left, right = prepared.get("left"), prepared.get("right")
        total, where = linalg.where(ok, total, 0.0), linalg.per_layer(ok, M)
        if block.cut == "rows":
            if left is not None:
                X = total.unflatten(1, (self.rank, shape.columns))
                linalg.remove_left(left[..., block.rows], X, M)
            if right is not None:
                _apply_right(right, M, where)
            return ok
        if shape.bias:
            # All of it is here now, and treated like a column of the block.
            M[..., -1] = linalg.where(ok, total[:, -shape.d_out :], M[..., -1])
        if right is not None:
            Y = total[:, : shape.d_out * self.rank].unflatten(1, (shape.d_out, self.rank))
            linalg.remove_right(own_part(right, block, shape), Y, M)
        if left is not None:
            _apply_left(left, M, where)
        return ok

    # -------------------------------------------------------------------------------- describe

    def describe(self, shape: GroupShape) -> tuple[int, int]:
        """The rank, and ``4 r d_out d_in`` operations per side."""
        return self.rank, 4 * self.rank * shape.d_out * shape.columns * len(shape.sides)

    def diagnostics(self, state: State, shape: GroupShape) -> State:
        """``{side}_lambda`` and ``{side}_effective_rank``.

        The effective rank ``||U||_F^2 = sum_i mu_i / (mu_i + lambda)`` counts the directions in
        which the window's eigenvalues ``mu_i`` outweigh the damping.
        """
        prepared = self.prepare(state, shape)
        figures = {}
        for side in shape.sides:
            average = state[f"{side}_mean_square"]
            steps = linalg.bias_correction(state["updates"], self.momentum, average.dtype)
            figures[f"{side}_lambda"] = self.damping * average / steps
            figures[f"{side}_effective_rank"] = prepared[side].square().sum((1, 2))
        return figures


def _push(
    state: State, side: str, arrived: Tensor, places: Tensor, numbers: Tensor, new: Tensor
) -> None:
    """Put vectors ``[B, k, d]`` into a side's ring.

    ``places [B, k]`` says where in its layer's ring each goes, ``numbers [B k]`` the same counted
    through all rings, ``new [B k, 1]`` whether it does.
    """
    ring, scale = state[f"{side}_rows"], state.get(f"{side}_scale")
    if scale is not None:
        largest = arrived.abs().amax(-1)
        largest = torch.where(largest > 0, largest, 1.0)
        known = scale.gather(1, places)
        scale.scatter_(1, places, torch.where(new.view_as(places), largest, known))
        arrived = arrived / largest.unsqueeze(-1)
    rows = ring.view(-1, ring.shape[-1])
    arrived = arrived.to(ring.dtype).flatten(0, 1)
    old = rows.index_select(0, numbers)
    rows.index_copy_(0, numbers, torch.where(new, arrived, old))


def _whiten(A: Tensor, state: State, shape: GroupShape, side: str) -> Tensor:
    """``U = A V [B, r, d]``; a bias's ones are a column of ``V``."""
    V, scale = state[f"{side}_rows"].to(A.dtype), state.get(f"{side}_scale")
    U = linalg.aligned(*A.shape[:2], shape.full_width(side), like=A)
    torch.bmm(A if scale is None else A * scale.unsqueeze(1), V, out=U[..., : V.shape[-1]])
    if U.shape[-1] > V.shape[-1]:
        U[..., -1] = A.sum(-1)
    return U


def _apply_left(U: Tensor, M: Tensor, ok: Tensor) -> None:
    """``(I - U^T U) M`` in place where ``ok [B, 1, 1]``."""
    linalg.remove_left(U, torch.where(ok, linalg.left_products(U, M), 0.0), M)


def _apply_right(U: Tensor, M: Tensor, ok: Tensor) -> None:
    """``M (I - U^T U)`` in place where ``ok [B, 1, 1]``."""
    linalg.remove_right(U, torch.where(ok, linalg.right_products(U, M), 0.0), M)
