"""What a curvature is: three functions on a batch of same-shaped layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["SIDES", "BatchShape", "Curvature", "Statistics"]

SIDES = ("left", "right")


@dataclass(frozen=True)
class BatchShape:
    """``layers`` layers that compute ``y = W x (+ b)`` with one shape.

    Attributes:
        layers: ``B``.
        d_out: Rows of ``W``: the width of the left side.
        d_in: Columns of ``W``: the width of the right side, without the bias's column.
        bias: Whether the right side has a column of ones.
        sides: The sides in use.
        dtype: Of the arithmetic: float32 or float64.
        device: Where the weights are.
    """

    layers: int
    d_out: int
    d_in: int
    bias: bool
    sides: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    def width(self, side: str) -> int:
        """Length of a side's stored vectors.

        Args:
            side: ``"left"`` or ``"right"``.

        Returns:
            ``d_out`` or ``d_in``.
        """
        return self.d_out if side == "left" else self.d_in

    def full_width(self, side: str) -> int:
        """Width of a side with the column of ones of a bias.

        Args:
            side: ``"left"`` or ``"right"``.

        Returns:
            ``d_out``, or ``d_in`` plus one where there is a bias.
        """
        return self.width(side) + (self.bias and side == "right")


@dataclass(frozen=True)
class Statistics:
    """One update's statistics of a batch of layers.

    Attributes:
        vectors: Per side ``[B, k, d]``: the means of ``g`` and ``a``; what an empty slot holds is
            undefined.
        mean_square: Per side ``[B]``: mean square of the used rows' entries, on the right with the
            column of ones.
        filled: ``[B, k]``, which slots hold a vector.
        accept: ``[B]``, which layers take the update; the others must stay bitwise as they are.
        update: Updates of the optimizer before this one.
        refused: 0-dim bool: nothing of this step is to be learned from, in any layer.
        covariance: Per side ``[B, d, d]``: mean over all rows of ``g g^T`` and ``a a^T``, on the
            right with the ones of a bias as last row and column; empty unless it was asked for.
    """

    vectors: dict[str, Tensor]
    mean_square: dict[str, Tensor]
    filled: Tensor
    accept: Tensor
    update: int
    refused: Tensor | None = None
    covariance: dict[str, Tensor] = field(default_factory=dict)


class Curvature(Protocol):
    """A kind of factor. Its state is a dict of tensors with one row per layer.

    The state holds ``updates [B]``, an integer tensor: how many updates each layer has taken.
    """

    @property
    def vectors(self) -> int:
        """Vectors per update, ``k``."""

    @property
    def rows(self) -> int | None:
        """Rows per vector, ``m``; None for all."""

    @property
    def momentum(self) -> float:
        """``gamma``, also used by ``rescale="running"``."""

    @property
    def covariance(self) -> bool:
        """Whether updates need the full covariance of each side, from all rows."""

    def init(self, shape: BatchShape) -> dict[str, Tensor]:
        """Allocate the state: no update taken, every side the identity."""

    def update(self, state: dict[str, Tensor], statistics: Statistics) -> None:
        """Take one update in place, without synchronising the device."""

    def prepare(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """What :meth:`apply` needs, with one row per layer."""

    def apply(self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
        """Turn ``[W b]`` into ``L^-1 [W b] R^-1`` in place, with rows of what was prepared.

        Layers that are not ``ok [B]``, or whose product is not finite, stay bitwise as they are;
        returns which came through.
        """

    def figures(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Diagnostic numbers, each ``[B]``."""

    def kept(self, shape: BatchShape) -> int:
        """Vectors kept per side, or the full width."""

    def cost(self, shape: BatchShape) -> int:
        """Floating-point operations of :meth:`apply` for one layer."""
