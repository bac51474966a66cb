"""Layers of one shape: their slots and state, and their gradients as matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mkor import linalg
from mkor.capture.buffer import LayerSlot
from mkor.curvature.base import Curvature, Inverting, State
from mkor.distributed.fsdp import Shard, sum_over_shards
from mkor.layers.layer import GroupShape, Layer
from mkor.step.table import LayerTable

CHUNK = 1 << 22
"""Entries of gradients that are worked on at a time, which bounds the memory of their copies."""


@dataclass(eq=False)
class LayerGroup:
    """Layers of one shape on one device.

    Attributes:
        layers: The layers, ``B``.
        shape: Their common shape.
        slots: Where their sums go.
        table: Where what is known of each layer is kept.
        index: Of the group in the table.
        shard: Which part of each is stored here; None for all of it.
        inverter: The process that inverts their covariances, if one does it for others.
        keeps: Whether this process keeps their inverses.
        skipped: Which layers are left to the base.
        watched: Whether inner products of raw and preconditioned gradients are to be measured.
        measured: Whether they were in the last step.
    """

    layers: list[Layer]
    shape: GroupShape
    slots: list[LayerSlot]
    table: LayerTable
    index: int
    shard: Shard | None = None
    inverter: int = 0
    keeps: bool = True
    watched: bool = False
    measured: bool = False
    skipped: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.skipped = [False] * len(self.layers)

    @property
    def span(self) -> slice:
        """Where the layers are in the table."""
        return self.table.factors.spans[self.index]

    @property
    def state(self) -> State:
        """The factors ``[B, ...]``."""
        return self.table.factors.groups[self.index]

    @property
    def is_left(self) -> bool:
        """Whether all layers are left to the base."""
        return all(self.skipped)

    def first_state(self, curvature: Curvature) -> State:
        """The factors before the first update."""
        state = curvature.init(self.shape)
        if not self.keeps and isinstance(curvature, Inverting):
            state = curvature.without_inverses(state)
        return state

    def leave(self, skipped: Sequence[bool]) -> None:
        """Leave layers to the base; if all, their factors are freed."""
        self.skipped = list(skipped)
        self.table.kept[self.span] = ~torch.tensor(self.skipped, device="cpu")
        if self.is_left:
            self.release()

    def release(self, joined: bool = False) -> None:
        """Free the factors; keys and shapes stay, as views of a single 0.

        ``joined`` says whether no other group needs what all have in one tensor.
        """
        kept = {"norms"} if joined else {"norms", *self.table.factors.joined}
        self.table.factors.groups[self.index] = {
            key: x if x.dim() == 1 or key in kept else x.new_zeros(()).expand(x.shape)
            for key, x in self.state.items()
        }

    def gradients(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Each layer's gradients of weight and bias, of the parts stored here; None if skipped."""
        return [
            (None, None) if skipped else layer.gradients
            for layer, skipped in zip(self.layers, self.skipped, strict=True)
        ]


def measure(
    tables: Sequence[LayerTable], groups: Sequence[LayerGroup]
) -> dict[LayerGroup, list[tuple[Tensor | None, Tensor | None]]]:
    """The gradients of each group; their norms, 0 without one, go to ``last[0]`` of the tables."""
    found = {group: group.gradients() for group in groups}
    for table in tables:
        pairs = [pair for group in groups if group.table is table for pair in found[group]]
        norms = [_norms([pair[i] for pair in pairs], table.last) for i in (0, 1)]
        torch.hypot(*norms, out=table.raw)
    shards = [(g.shard, g.table.last[0, g.span].double().square()) for g in groups if g.shard]
    squares = iter(sum_over_shards([(shard, square) for shard, square in shards if shard]))
    for group in groups:
        if group.shard is not None:
            group.table.last[0, group.span] = next(squares).sqrt()
    return found


def _norms(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """``[N]``, the norm of each; 0 where there is none."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return torch.zeros_like(like[0])
    norms = list(torch._foreach_norm(present, 2, like.dtype))
    if len(present) < len(gradients):
        zero, each = like.new_zeros(()), iter(norms)
        norms = [zero if gradient is None else next(each) for gradient in gradients]
    return torch.stack(norms)


@dataclass
class Chunk:
    """Gradients of neighbouring layers of a group, as matrices ``M [b, d_out, d_in (+1)]``.

    Of sharded layers ``M`` holds the block that is here: some rows, or some columns and behind them
    the bias's, whose entries are those that are here and 0 elsewhere.

    Attributes:
        group: The layers' group.
        where: Which of its layers they are.
        weights: Their gradients.
        biases: Those of their biases; empty without.
        M: The matrices, in the dtype of the arithmetic.
        raw: A copy of them before they are preconditioned, if they will be compared.
    """

    group: LayerGroup
    where: slice
    weights: list[Tensor]
    biases: list[Tensor]
    M: Tensor = field(init=False)
    raw: Tensor | None = None
    _parts: list[Tensor] = field(init=False, repr=False)

    @property
    def here(self) -> slice:
        """Which of the table's layers they are."""
        start = self.group.span.start
        return slice(start + self.where.start, start + self.where.stop)

    def load(self) -> None:
        """Copy the gradients into ``M``."""
        shape, shard = self.group.shape, self.group.shard
        rows, columns = shape.d_out, shape.d_in
        if shard is not None:
            rows = shard.block.rows.stop - shard.block.rows.start
            columns = shard.block.columns.stop - shard.block.columns.start
        size = (len(self.weights), rows, columns + shape.bias)
        self.M = linalg.aligned(*size, like=self.group.table.last)
        if shape.bias and (not self.biases or self._cuts_columns):
            self.M[..., -1] = 0.0
        self._parts = self._views()
        torch._foreach_copy_(self._parts, [*self.weights, *self.biases])

    def norm(self) -> Tensor:
        """``[b]``: the Frobenius norms of what ``M`` holds; of a block, without other entries."""
        if not (self._cuts_columns and self.group.shape.bias):
            return linalg.frobenius(self.M)
        assert self.group.shard is not None
        bias = self.M[:, self.group.shard.block.bias, -1:]
        return torch.hypot(linalg.frobenius(self.M[..., :-1]), linalg.frobenius(bias))

    def store(self, ratio: Tensor) -> None:
        """Multiply the matrices with ``ratio [b]`` and put them back in the gradients' place."""
        self.M.mul_(linalg.per_layer(ratio, self.M))
        torch._foreach_copy_([*self.weights, *self.biases], self._parts)
        del self.M, self._parts

    @property
    def _cuts_columns(self) -> bool:
        return self.group.shard is not None and self.group.shard.block.cut == "columns"

    def _views(self) -> list[Tensor]:
        """Views of ``M`` shaped like the gradients of weights and biases."""
        shape, shard = self.group.shape, self.group.shard
        W = (self.M[..., :-1] if shape.bias else self.M).unbind()
        parts = [
            w if w.shape == g.shape else w.view(g.shape)
            for w, g in zip(W, self.weights, strict=True)
        ]
        if self.biases:
            b = self.M[..., -1]
            if self._cuts_columns and shard is not None:
                b = b[:, shard.block.bias]
            parts += b.unbind()
        return parts


def chunks(
    group: LayerGroup, gradients: Sequence[tuple[Tensor | None, Tensor | None]]
) -> Iterator[Chunk]:
    """Neighbours that have gradients, with biases' or without, as many as fit in a chunk."""
    most = max(1, CHUNK // (group.shape.d_out * group.shape.columns))
    run: Chunk | None = None
    for place, (weight, bias) in enumerate(gradients):
        if run is not None:
            full = len(run.weights) == most
            if weight is None or full or (bias is None) != (not run.biases):
                yield run
                run = None
        if weight is None:
            continue
        if run is None:
            run = Chunk(group, slice(place, place), [], [])
        run.where = slice(run.where.start, place + 1)
        run.weights.append(weight)
        if bias is not None:
            run.biases.append(bias)
    if run is not None:
        yield run
