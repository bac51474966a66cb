"""What a curvature is: three functions on a batch of same-shaped layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "SIDES",
    "BatchShape",
    "Block",
    "Curvature",
    "Inverting",
    "Means",
    "OneByOne",
    "Statistics",
]

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


class Means(Mapping[str, Tensor]):
    """Means as what they are made of; a side's product is taken when it is first asked for.

    Args:
        sums: Per side ``[B, k, d]``.
        scales: Per side ``[B, k]``, what makes them means.
    """

    def __init__(self, sums: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        self.sums, self.scales = sums, scales
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, side: str) -> Tensor:
        if side not in self._made:
            self._made[side] = self.sums[side] * self.scales[side].unsqueeze(-1)
        return self._made[side]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


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
        whole: Whether all slots are filled and all layers accept, as far as that is known without
            waiting for the device.
    """

    vectors: Mapping[str, Tensor]
    mean_square: dict[str, Tensor]
    filled: Tensor
    accept: Tensor
    update: int
    refused: Tensor | None = None
    covariance: dict[str, Tensor] = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True)
class Block:
    """Which part of ``[W b]`` is here, where several processes each store one.

    The other parts of ``W [d_out, d_in]`` lie above and below it, or beside it. It may be empty.

    Attributes:
        rows: Rows of ``W``.
        columns: Columns of ``W``.
        bias: Entries of ``b``, the same as ``rows`` where rows are cut; empty without a bias.
        shape: ``d_out`` and ``d_in`` of the whole.
        cut: ``"rows"`` or ``"columns"``, the same for all parts: one part may be everything.
    """

    rows: slice
    columns: slice
    bias: slice
    shape: tuple[int, int]
    cut: str

    def __hash__(self) -> int:
        # Slices have none before Python 3.12.
        places = (self.rows, self.columns, self.bias)
        return hash((*((s.start, s.stop) for s in places), self.shape, self.cut))


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

    @property
    def gathers(self) -> bool:
        """Whether an update may have more than ``vectors``, from several processes."""

    def init(self, shape: BatchShape) -> dict[str, Tensor]:
        """Allocate the state: no update taken, every side the identity."""

    def update(self, state: dict[str, Tensor], statistics: Statistics) -> None:
        """Take one update in place, without synchronising the device."""

    def update_all(self, pairs: Iterable[tuple[dict[str, Tensor], Statistics]]) -> None:
        """:meth:`update` for batches of several shapes on one device."""

    def prepare(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """What :meth:`apply` needs, with one row per layer."""

    def prepare_all(
        self, pairs: Sequence[tuple[dict[str, Tensor], BatchShape]]
    ) -> Iterator[dict[str, Tensor]]:
        """:meth:`prepare` for batches of several shapes on one device, each when it is its turn."""

    def apply(self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
        """Turn ``[W b]`` into ``L^-1 [W b] R^-1`` in place, with rows of what was prepared.

        Layers that are not ``ok [B]``, or whose product is not finite, stay bitwise as they are;
        returns which came through.
        """

    def project(
        self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, block: Block
    ) -> Tensor:
        """``[B, n]``: what :meth:`complete` needs to know, once it is summed over all blocks.

        ``W [B, rows, columns]`` and ``b [B, bias]`` are the block's parts of the gradients; ``b``
        is None where layers have no bias, or its gradient is not there. The numbers are of the
        arithmetic's dtype, and as many on every process.
        """

    def complete(
        self,
        prepared: dict[str, Tensor],
        W: Tensor,
        b: Tensor | None,
        projected: Tensor,
        ok: Tensor,
        block: Block,
    ) -> Tensor:
        """Turn a block into its part of what :meth:`apply` makes of the whole, in place.

        ``projected`` is the sum over all blocks. Layers that are not ``ok [B]``, or whose product
        is not finite, or nearly leaves the dtype's range, in any block, stay bitwise as they are
        in all of them; returns which came through, the same for every block.
        """

    def figures(self, state: dict[str, Tensor], shape: BatchShape) -> dict[str, Tensor]:
        """Diagnostic numbers, each ``[B]``."""

    def kept(self, shape: BatchShape) -> int:
        """Vectors kept per side, or the full width."""

    def cost(self, shape: BatchShape) -> int:
        """Floating-point operations of :meth:`apply` for one layer."""


class OneByOne:
    """Batches of several shapes one after the other, for kinds of factor whose work is products."""

    def update_all(self: Curvature, pairs: Iterable[tuple[dict[str, Tensor], Statistics]]) -> None:
        """Take an update of every batch.

        Args:
            pairs: Each batch's state, changed in place, and its statistics.
        """
        for state, statistics in pairs:
            self.update(state, statistics)

    def prepare_all(
        self: Curvature, pairs: Sequence[tuple[dict[str, Tensor], BatchShape]]
    ) -> Iterator[dict[str, Tensor]]:
        """What applying needs.

        Args:
            pairs: Each batch's state and shape.

        Yields:
            What :meth:`Curvature.prepare` returns.
        """
        for state, shape in pairs:
            yield self.prepare(state, shape)


@runtime_checkable
class Inverting(Curvature, Protocol):
    """A kind of factor whose inverses take long, and are renewed apart from updates.

    One process can then do it for others; see :class:`mkor.communication.assignment.Assignment`.
    """

    @property
    def grad_worker_fraction(self) -> float:
        """Which share of the processes holds a layer's inverses."""

    def due(self, update: int) -> bool:
        """Whether inverses are renewed with an update; ``update`` is the number before it."""

    def renew(self, state: dict[str, Tensor], where: Tensor) -> None:
        """Invert the averages of the layers ``where [B]``, without synchronising the device."""

    def shared(self, state: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What :meth:`renew` changes: the inverses, and small notes that every process has."""

    def without_inverses(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a process that leaves the layers to others: zeros without memory."""

    def recover(self, state: dict[str, Tensor]) -> None:
        """Invert anew, after loading, what the process that wrote the state left to others."""
