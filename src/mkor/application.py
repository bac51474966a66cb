"""Preconditioning: from the layers' gradients to ``L^-1 M R^-1``, rescaled, in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mkor import linalg
from mkor.batches import Batch
from mkor.communication.assignment import Assignment
from mkor.communication.lockstep import Exchange, in_lockstep
from mkor.communication.sharding import Shard
from mkor.gradients import Gradients, find, neighbours, norms, span_of, write

__all__ = ["Stage", "measure", "precondition", "scale"]


@dataclass(frozen=True)
class Stage:
    """How the gradients of a step are treated.

    Attributes:
        due: Whether the step has statistics of its own; layers without any pass through then.
        rescale: ``"running"``, ``"step"`` or None.
        compare: Whether the inner products of raw and preconditioned gradients are needed.
    """

    due: bool
    rescale: str | None
    compare: bool = False


@dataclass
class _Part:
    """What is needed to precondition some gradients.

    Attributes:
        batch: The layers' batch.
        gradients: The gradients.
        prepared: The layers' rows of what the curvature prepared.
        use: ``[b]``, which have factors to use in this step.
        ok: ``[b]``, which gradients are to be preconditioned: these are finite as well.
        raw: Copies of the gradients before they are preconditioned, if they will be compared.
    """

    batch: Batch
    gradients: Gradients
    prepared: dict[str, Tensor]
    use: Tensor
    ok: Tensor
    raw: tuple[Tensor, Tensor | None] | None = None

    @property
    def where(self) -> slice:
        """Which of the batch's layers they are."""
        return self.gradients.where

    @property
    def alone(self) -> bool:
        """Whether they are copies that should not be kept."""
        return self.gradients.alone

    def remember(self, stage: Stage) -> None:
        """Keep the raw gradients if they will be compared."""
        if stage.compare or self.batch.measured:
            W, b = self.gradients.W, self.gradients.b
            self.raw = (W.clone(), None if b is None else b.clone())

    def product(self) -> Tensor | None:
        """``[b]``, inner products with the raw gradients; None where nobody asked."""
        if self.raw is None:
            return None
        return linalg.inner(*self.raw, self.gradients.W, self.gradients.b)


def measure(batches: Sequence[Batch]) -> list[list[Gradients]]:
    """Take the norms of the raw gradients, ``last[0]`` of every batch.

    Args:
        batches: The layers.

    Returns:
        The gradients of every batch.
    """
    found = [list(find(batch)) for batch in batches]
    for batch, gradients in zip(batches, found, strict=True):
        if not _complete(batch, gradients):
            batch.last[0] = 0.0
        for run in neighbours(gradients):
            batch.last[0, span_of(run)] = norms(run, batch.last.dtype)
    in_lockstep((b.shard, _share_norms(b)) for b in batches if b.shard is not None)
    return found


def precondition(
    batches: Sequence[Batch],
    gradients: Sequence[list[Gradients]],
    stage: Stage,
    assignment: Assignment | None = None,
) -> None:
    """Replace the layers' gradients by ``L^-1 M R^-1``, rescaled, in place.

    Args:
        batches: The layers.
        gradients: Of each batch, as :func:`measure` found them.
        stage: How.
        assignment: Which processes precondition which layers for others; None where each does all.
    """
    for batch, found in zip(batches, gradients, strict=True):
        batch.touched = bool(found)
        batch.done = torch.zeros_like(batch.seen)
        if batch.touched:
            batch.measured = batch.watched
    pairs = list(zip(batches, gradients, strict=True))
    in_lockstep(_exchanges(pairs, stage))
    whole = [(batch, g) for batch, g in pairs if batch.shard is None]
    if assignment is not None and assignment.shares_gradients:
        _assigned(
            [part for batch, g in whole for part in _parts(batch, g, stage)], stage, assignment
        )
        return
    for batch, found in whole:
        for run in neighbours(_parts(batch, found, stage)):
            done = torch.cat([_apply(part, stage) for part in run])
            products = [product for part in run if (product := part.product()) is not None]
            norm = norms([part.gradients for part in run], batch.last.dtype)
            _finish(run, stage, done, norm, torch.cat(products) if products else None)


def scale(batch: Batch, factor: Tensor) -> None:
    """Multiply the gradients that were just preconditioned; the others stay as they are.

    Args:
        batch: The layers.
        factor: 0-dim.
    """
    factors = torch.where(batch.done, factor, 1.0).unbind()
    ready = _ready(batch)
    for place in (0, 1):
        pairs = [(batch.layers[i].gradients[place], factors[i]) for i in ready]
        found = [(gradient, by) for gradient, by in pairs if gradient is not None]
        if found:
            torch._foreach_mul_([g for g, _ in found], [by.to(g.dtype) for g, by in found])


def _apply(part: _Part, stage: Stage) -> Tensor:
    part.remember(stage)
    return part.batch.curvature.apply(part.prepared, part.gradients.W, part.gradients.b, part.ok)


def _exchanges(
    pairs: Sequence[tuple[Batch, list[Gradients]]], stage: Stage
) -> Iterator[tuple[Shard, Exchange]]:
    for batch, gradients in pairs:
        if batch.shard is not None:
            for part in _parts(batch, gradients, stage):
                yield batch.shard, _sharded(part, batch.shard, stage)


def _sharded(part: _Part, shard: Shard, stage: Stage) -> Exchange:
    """Precondition blocks; sums what the curvature needs of the others, then the norms."""
    part.remember(stage)
    curvature, W, b = part.batch.curvature, part.gradients.W, part.gradients.b
    projected = yield curvature.project(part.prepared, W, b, shard.block)
    done = curvature.complete(part.prepared, W, b, projected, part.ok, shard.block)
    # Squares of large numbers leave the range of float32.
    square = linalg.joint_norm(W, b).double().square()
    product = part.product()
    product = torch.zeros_like(square) if product is None else product.double()
    square, product = (yield torch.stack((square, product))).unbind()
    _finish([part], stage, done, square.sqrt().to(W.dtype), product.to(W.dtype))


def _assigned(parts: list[_Part], stage: Stage, assignment: Assignment) -> None:
    """Precondition this process's share, and take the rest from others."""
    outcome = []
    for part in parts:
        mine = assignment.preconditions(_inverter(part))
        done = _apply(part, stage) if mine else torch.zeros_like(part.use)
        if not mine:
            part.remember(stage)
        outcome.append((part, part.gradients, done))
    assignment.share_gradients(
        (_inverter(part), [t for t in (some.W, some.b, done) if t is not None])
        for part, some, done in outcome
    )
    for part, some, done in outcome:
        _finish([part], stage, done, linalg.joint_norm(some.W, some.b), part.product())


def _inverter(part: _Part) -> int:
    """The process that inverts the layers' covariances; an assignment gives all of them one."""
    return part.batch.inverter or 0


def _finish(
    parts: Sequence[_Part], stage: Stage, done: Tensor, norm: Tensor, product: Tensor | None
) -> None:
    """Rescale neighbours, write their gradients, and keep the figures."""
    batch, here = parts[0].batch, span_of(parts)
    raw = batch.last[0, here]
    batch.last[1, here] = norm
    if product is not None:
        batch.last[2, here] = product
    batch.done[here] = done
    if not linalg.all_hold(done):
        batch.refused[1, here] += torch.cat([part.use for part in parts]) & ~done
    ratio = _ratio(batch, here, raw, norm, done, stage.rescale)
    write([part.gradients for part in parts], ratio)


def _ratio(
    batch: Batch, where: slice, raw: Tensor, norm: Tensor, keep: Tensor, rescale: str | None
) -> Tensor:
    old = batch.state["norms"][where]
    moved = linalg.momentum_average(old, torch.stack((raw, norm), 1), batch.curvature.momentum)
    old.copy_(linalg.where(keep, moved, old))
    if rescale is None:
        return torch.ones_like(raw)
    if rescale == "running":
        raw, norm = old.unbind(1)
    return linalg.where(keep, linalg.norm_ratio(raw, norm), 1.0)


def _ready(batch: Batch) -> list[int]:
    """The layers that are preconditioned and have a gradient."""
    return [
        i
        for i, layer in enumerate(batch.layers)
        if not batch.skipped[i] and layer.gradients[0] is not None
    ]


def _parts(batch: Batch, gradients: Sequence[Gradients], stage: Stage) -> Iterator[_Part]:
    if not gradients:
        return
    use = batch.state["updates"] > 0
    if stage.due:
        use = use & batch.seen & batch.finite
    ok = use & (batch.last[0] < math.inf)
    first, beyond = gradients[0].where.start, gradients[-1].where.stop
    whole = beyond - first == len(batch.layers)
    spanned = batch.state if whole else {k: v[first:beyond] for k, v in batch.state.items()}
    prepared = batch.curvature.prepare(spanned, batch.shape)
    # In one call each: many layers' rows taken one by one cost as much as their products.
    lengths = _lengths(gradients)
    rows = {key: linalg.cut(tensor, lengths) for key, tensor in prepared.items()}
    uses, oks = (linalg.cut(mask[first:beyond], lengths) for mask in (use, ok))
    place = 0
    for some in gradients:
        place += some.where.start > first
        first = some.where.stop
        mine = {key: pieces[place] for key, pieces in rows.items()}
        yield _Part(batch, some.to(batch.last.dtype), mine, uses[place], oks[place])
        place += 1


def _lengths(gradients: Sequence[Gradients]) -> list[int]:
    """Lengths of stretches of layers, those without gradients between others too."""
    ends = [(some.where.start, some.where.stop) for some in gradients]
    marks = sorted({mark for end in ends for mark in end})
    return [stop - start for start, stop in pairwise(marks)]


def _complete(batch: Batch, gradients: Sequence[Gradients]) -> bool:
    """Whether every layer of a batch has a gradient."""
    covered: int = sum(some.where.stop - some.where.start for some in gradients)
    return covered == len(batch.layers)


def _share_norms(batch: Batch) -> Exchange:
    square = yield batch.last[0].double().square()
    batch.last[0] = square.sqrt()
