"""What a curvature is: from a layer's statistics to ``M <- L^-1 M R^-1``, for a group of layers.

A new kind of factor is a frozen record of its settings that follows :class:`Curvature`: it says how
its state begins, what an update makes of it, and how it preconditions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mkor import linalg
from mkor.layers.layer import Block, GroupShape

State = dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """One update's statistics of some layers.

    Attributes:
        mean_square: Per side ``[B]``: mean square of the used rows' entries, on the right with the
            column of ones.
        filled: ``[B, k]``, which slots hold a vector.
        accept: ``[B]``, which layers take the update; the others must stay bitwise as they are.
        vectors: Per side ``[B, k, d]``: the means of ``g`` and ``a`` (``a`` without the column of
            ones); what an empty slot holds is undefined.
        covariance: Per side ``[B, d, d]``: mean over all rows of ``g g^T`` and ``a a^T``, on the
            right with the column of ones; empty unless the curvature asks for it.
    """

    mean_square: dict[str, Tensor]
    filled: Tensor
    accept: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict)
    covariance: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Factors:
    """The factors of all groups of layers on one device.

    Attributes:
        shapes: Of the groups.
        spans: Where each group's layers are among all ``N``.
        joined: What every layer has in one shape, ``[N, ...]``, in one tensor for all groups.
        groups: Every group's state ``[B, ...]``; of what is joined, views.
        positions: ``[N]``, each layer's place in its group.
    """

    shapes: Sequence[GroupShape]
    spans: Sequence[slice]
    joined: State
    groups: list[State]
    positions: Tensor

    @property
    def sizes(self) -> list[int]:
        """Layers of each group."""
        return [span.stop - span.start for span in self.spans]


def alone(state: State, shape: GroupShape | None = None) -> Factors:
    """One group's state as the factors of all there are."""
    B, device = len(state["updates"]), state["updates"].device
    shapes = [] if shape is None else [shape]
    return Factors(shapes, [slice(0, B)], state, [state], torch.arange(B, device=device))


class Curvature(ABC):
    """A kind of factor; its settings are the fields of a frozen dataclass.

    Its state is a dict of tensors with one row per layer, for instance an average ``[B, d, d]``,
    and always ``updates [B]``, how many each has taken. Nothing in it may wait for the device.

    Attributes:
        covariance: Whether updates need the full covariance of each side, from all rows.
        gathers: Whether an update may have more than ``vectors``, from several processes.
        joined: State of one shape in all layers, which is kept in one tensor for all groups.
    """

    covariance: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    joined: ClassVar[tuple[str, ...]] = ()

    @property
    def vectors(self) -> int:
        """Vectors per update, ``k``."""
        return 1

    @property
    def rows(self) -> int | None:
        """Rows averaged in a vector; None for all."""
        return None

    @property
    def momentum(self) -> float:
        """``gamma``, also used by ``rescale="running"``."""
        return 0.95

    @abstractmethod
    def init(self, shape: GroupShape) -> State:
        """The state before the first update: every side the identity."""

    @abstractmethod
    def update(self, state: State, statistics: Statistics) -> None:
        """Take one update in place; layers that do not accept stay as they are."""

    @abstractmethod
    def apply(self, prepared: State, M: Tensor, ok: Tensor) -> Tensor:
        """``L^-1 M R^-1`` in place for ``M [B, d_out, d_in (+1)]``, with rows of what is prepared.

        Layers that are not ``ok [B]``, or whose product is not finite, stay bitwise as they are;
        returns which came through.
        """

    def prepare(self, state: State, shape: GroupShape) -> State:
        """What :meth:`apply` needs, one row per layer; called once per step."""
        return state

    def diagnostics(self, state: State, shape: GroupShape) -> State:
        """Figures for a logger, each ``[B]``."""
        return {}

    def describe(self, shape: GroupShape) -> tuple[int, int]:
        """Vectors kept per side, and operations of :meth:`apply` for one layer; here of matrices.

        These are the full width, and ``2 d_out d_in (d_out + d_in)``.
        """
        entries = shape.d_out * shape.columns
        widths = [shape.full_width(side) for side in shape.sides]
        return max(widths), sum(2 * width * entries for width in widths)

    # What follows treats groups one after the other, and shards as a whole. A curvature overrides
    # it where small operations of all groups can be one, or processes need to sum less.

    def update_all(
        self, factors: Factors, whole: Statistics, each: Iterable[tuple[int, Statistics]]
    ) -> None:
        """Update all groups: ``whole`` has the figures of all ``N`` layers, ``each`` a group's."""
        for i, statistics in each:
            self.update(factors.groups[i], statistics)

    def prepare_all(self, factors: Factors, wanted: Sequence[int]) -> Iterator[State]:
        """What each of the wanted groups needs, when it is its turn."""
        for i in wanted:
            yield self.prepare(factors.groups[i], factors.shapes[i])

    def shard_products(self, prepared: State, M: Tensor, block: Block, shape: GroupShape) -> Tensor:
        """What :meth:`apply_shard` needs, once it is summed over all blocks; here all of ``M``.

        ``M`` is ``[B, rows, d_in (+1)]`` where rows are cut. Where columns are, it is
        ``[B, d_out, columns (+1)]``, and its last column holds the block's entries of the bias's
        gradient and 0 elsewhere.
        """
        full = M.new_zeros(len(M), shape.d_out, shape.columns)
        if block.cut == "rows":
            full[:, block.rows] = M
            return full
        full[..., block.columns] = M[..., : M.shape[-1] - shape.bias]
        if shape.bias:
            full[..., -1] = M[..., -1]
        return full

    def apply_shard(
        self, prepared: State, M: Tensor, total: Tensor, ok: Tensor, block: Block, shape: GroupShape
    ) -> Tensor:
        """:meth:`apply` for a block, given the sum of all blocks' products."""
        done = self.apply(prepared, total, ok)
        M.copy_(own_part(total, block, shape))
        return done


class Inverting(Curvature):
    """A kind of factor whose inverses take long, and are renewed apart from updates.

    One process can then do it for others (:mod:`mkor.distributed.kaisa`).
    """

    @property
    def grad_worker_fraction(self) -> float:
        """Which share of the processes holds a layer's inverses."""
        return 1.0

    @property
    def inverse_every(self) -> int:
        """Updates between inversions, the first included."""
        return 1

    def due(self, update: int) -> bool:
        """Whether inverses are renewed with an update; ``update`` is the number before it."""
        return update % self.inverse_every == 0

    @abstractmethod
    def renew(self, state: State, where: Tensor) -> None:
        """Invert the averages of the layers ``where [B]``."""

    @abstractmethod
    def results(self, state: State) -> tuple[list[Tensor], list[Tensor]]:
        """What :meth:`renew` changes: the inverses, and a small status that every process has."""

    @abstractmethod
    def without_inverses(self, state: State) -> State:
        """The state of a process that leaves the layers to others: zeros without memory."""

    @abstractmethod
    def recover(self, state: State) -> None:
        """Invert anew, after loading, what the process that wrote the state left to others."""


def own_part(full: Tensor, block: Block, shape: GroupShape) -> Tensor:
    """A copy of what belongs to a block, of ``[B, d_out, d_in (+1)]`` or ``[B, r, d_in (+1)]``."""
    if block.cut == "rows":
        return full[:, block.rows]
    if not shape.bias:
        return full[..., block.columns]
    return torch.cat([full[..., block.columns], full[..., -1:]], dim=-1)


def zeros(shape: GroupShape, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """``[B, *size]`` on the group's device, of the arithmetic's dtype unless told."""
    return torch.zeros(shape.layers, *size, dtype=dtype or shape.dtype, device=shape.device)


def identities(shape: GroupShape, side: str, dtype: torch.dtype) -> Tensor:
    """``[B, d, d]``, an identity matrix of a side's full width for every layer."""
    eye = torch.eye(shape.full_width(side), dtype=dtype, device=shape.device)
    return eye.repeat(shape.layers, 1, 1)


def apply_inverses(state: State, M: Tensor, ok: Tensor) -> Tensor:
    """``L^-1 M R^-1`` in place where ``ok [B]`` and finite, by ``{side}_inverse`` of the state."""
    P = M
    if "left_inverse" in state:
        P = state["left_inverse"].to(M.dtype) @ P
    if "right_inverse" in state:
        P = P @ state["right_inverse"].to(M.dtype)
    ok = ok & P.sum((1, 2)).isfinite()
    M.copy_(linalg.where(ok, P, M))
    return ok


# --------------------------------------------------------------------------- checks of settings


def check_counts(settings: object, *names: str) -> None:
    """Refuse what is no whole number from 1; ``rows`` may be None."""
    for name in names:
        value = getattr(settings, name)
        if value is None and name == "rows":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_fraction(settings: object, *names: str) -> None:
    """Refuse what is no number between 0 and 1, exclusive."""
    for name in names:
        value = _number(settings, name)
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, exclusive, got {value}")


def check_positive(settings: object, *names: str) -> None:
    """Refuse what is no positive, finite number."""
    for name in names:
        value = _number(settings, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_dtype(dtype: object) -> None:
    """Refuse a ``factor_dtype`` that factors cannot be stored in."""
    if dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "factor_dtype must be None or a floating-point torch.dtype (float64, float32, "
            f"bfloat16, float16), got {dtype!r}"
        )


def _number(settings: object, name: str) -> float:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value
