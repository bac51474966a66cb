"""Preconditioning: from the layers' gradients to ``L^-1 M R^-1``, rescaled, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import attrgetter

import torch
from torch import Tensor

from mkor import linalg
from mkor.communication.assignment import Assignment
from mkor.communication.lockstep import Exchange, in_lockstep
from mkor.communication.sharding import Shard
from mkor.step.batches import Batch, by_roster
from mkor.step.gradients import Gradients, find, neighbours, norms, span_of, write
from mkor.step.roster import Roster

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
        done: ``[b]``, which were preconditioned.
        product: ``[b]``, inner products with the raw gradients, if they were asked for.
    """

    batch: Batch
    gradients: Gradients
    prepared: dict[str, Tensor]
    use: Tensor
    ok: Tensor
    raw: tuple[Tensor, Tensor | None] | None = None
    done: Tensor = field(init=False)
    product: Tensor | None = None

    @property
    def where(self) -> slice:
        """Which of the roster's layers they are."""
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

    def apply(self, stage: Stage) -> None:
        """Precondition them in place; what was prepared for that is then let go."""
        self.remember(stage)
        W, b = self.gradients.W, self.gradients.b
        self.done = self.batch.curvature.apply(self.prepared, W, b, self.ok)
        self.prepared = {}

    def compare(self) -> None:
        """Take the inner products with the raw gradients, if anybody asked."""
        if self.raw is not None:
            self.product = linalg.inner(*self.raw, self.gradients.W, self.gradients.b)
            self.raw = None


def measure(batches: Sequence[Batch]) -> dict[Batch, list[Gradients]]:
    """Take the norms of the raw gradients, ``last[0]`` of every roster.

    Args:
        batches: The layers.

    Returns:
        The gradients of every batch.
    """
    found = {batch: list(find(batch)) for batch in batches}
    for roster, group in by_roster(batches):
        gradients = [some for batch in group for some in found[batch]]
        if sum(some.W.shape[0] for some in gradients) < roster.seen.shape[0]:
            roster.last[0].zero_()
        for run in neighbours(gradients, apart=False):
            roster.last[0, span_of(run)] = norms(run, roster.last.dtype, raw=True)
    in_lockstep((b.shard, _share_norms(b)) for b in batches if b.shard is not None)
    return found


def precondition(
    gradients: Mapping[Batch, Sequence[Gradients]],
    stage: Stage,
    assignment: Assignment | None = None,
) -> None:
    """Replace the layers' gradients by ``L^-1 M R^-1``, rescaled, in place.

    Args:
        gradients: Of each batch, as :func:`measure` found them.
        stage: How.
        assignment: Which processes precondition which layers for others; None where each does all.
    """
    for roster, group in by_roster(list(gradients)):
        roster.done.zero_()
        for batch in group:
            if gradients[batch]:
                batch.measured = batch.watched
    sharded = {batch: found for batch, found in gradients.items() if batch.shard is not None}
    whole = {batch: found for batch, found in gradients.items() if batch.shard is None}
    in_lockstep(
        (part.batch.shard, _sharded(part, part.batch.shard, stage))
        for part in _parts(sharded, stage)
        if part.batch.shard is not None
    )
    if assignment is not None and assignment.shares_gradients:
        _assigned(list(_parts(whole, stage)), stage, assignment)
        return
    for roster, parts in groupby(_applied(_parts(whole, stage), stage), attrgetter("batch.roster")):
        for run in neighbours(parts):
            _finish(run, stage, norms([part.gradients for part in run], roster.last.dtype))


def scale(roster: Roster, batches: Sequence[Batch], factor: Tensor) -> None:
    """Multiply the gradients that were just preconditioned; the others stay as they are.

    Args:
        roster: What is known of the layers.
        batches: The layers.
        factor: 0-dim.
    """
    factors = torch.where(roster.done, factor, 1.0).unbind()
    pairs = [
        (gradient, factors[batch.span.start + i])
        for batch in batches
        for i in _ready(batch)
        for gradient in batch.layers[i].gradients
        if gradient is not None
    ]
    for dtype in dict.fromkeys(gradient.dtype for gradient, _ in pairs):
        found = [(gradient, by) for gradient, by in pairs if gradient.dtype == dtype]
        torch._foreach_mul_([g for g, _ in found], [by.to(dtype) for _, by in found])


def _applied(parts: Iterable[_Part], stage: Stage) -> Iterator[_Part]:
    for part in parts:
        part.apply(stage)
        part.compare()
        yield part


def _sharded(part: _Part, shard: Shard, stage: Stage) -> Exchange:
    """Precondition blocks; sums what the curvature needs of the others, then the norms."""
    part.remember(stage)
    curvature, W, b = part.batch.curvature, part.gradients.W, part.gradients.b
    projected = yield curvature.project(part.prepared, W, b, shard.block)
    part.done = curvature.complete(part.prepared, W, b, projected, part.ok, shard.block)
    # Squares of large numbers leave the range of float32.
    square = linalg.joint_norm(W, b).double().square()
    part.compare()
    product = torch.zeros_like(square) if part.product is None else part.product.double()
    square, product = (yield torch.stack((square, product))).unbind()
    part.product = product.to(W.dtype)
    _finish([part], stage, square.sqrt().to(W.dtype))


def _assigned(parts: Sequence[_Part], stage: Stage, assignment: Assignment) -> None:
    """Precondition this process's share, and take the rest from others."""
    for part in parts:
        if assignment.preconditions(_inverter(part)):
            part.apply(stage)
        else:
            part.remember(stage)
            part.done = torch.zeros_like(part.use)
    assignment.share_gradients(
        (_inverter(part), [t for t in (some.W, some.b, part.done) if t is not None])
        for part in parts
        for some in (part.gradients,)
    )
    for part in parts:
        part.compare()
        _finish([part], stage, linalg.joint_norm(part.gradients.W, part.gradients.b))


def _inverter(part: _Part) -> int:
    """The process that inverts the layers' covariances; an assignment gives all of them one."""
    return part.batch.inverter or 0


def _finish(parts: Sequence[_Part], stage: Stage, norm: Tensor) -> None:
    """Rescale neighbours, write their gradients, and keep the figures.

    Args:
        parts: With products.
        stage: How.
        norm: ``[b]``, of what was preconditioned.
    """
    roster, here = parts[0].batch.roster, span_of(parts)
    for part in parts:
        if part.product is not None:
            roster.last[2, part.where] = part.product
    done, use = (linalg.joined([getattr(p, mask) for p in parts]) for mask in ("done", "use"))
    how = (parts[0].batch.curvature.momentum, stage.rescale)
    write([part.gradients for part in parts], roster.conclude(here, norm, done, use, how))


def _ready(batch: Batch) -> list[int]:
    """The layers that are preconditioned and have a gradient."""
    return [
        i
        for i, layer in enumerate(batch.layers)
        if not batch.skipped[i] and layer.gradients[0] is not None
    ]


def _parts(gradients: Mapping[Batch, Sequence[Gradients]], stage: Stage) -> Iterator[_Part]:
    used = [batch for batch, found in gradients.items() if found]
    for roster, group in by_roster(used):
        use, ok = roster.usable(stage.due)
        pairs = [(_spanned(batch, gradients[batch]), batch.shape) for batch in group]
        each = group[0].curvature.prepare_all(pairs)
        # In one call each: many layers' rows taken one by one cost as much as their products.
        marks = _marks([some for batch in group for some in gradients[batch]], 0, len(use))
        uses, oks = (_cut(mask, marks) for mask in (use, ok))
        for batch, prepared in zip(group, each, strict=True):
            rows = {key: _cut(x, _marks(gradients[batch])) for key, x in prepared.items()}
            # From here on only the parts hold it, each until its product is taken.
            del prepared
            for some in gradients[batch]:
                place = some.where.start
                mine = {key: pieces.pop(place) for key, pieces in rows.items()}
                yield _Part(batch, some.to(batch.last.dtype), mine, uses[place], oks[place])


def _spanned(batch: Batch, gradients: Sequence[Gradients]) -> dict[str, Tensor]:
    """The state of a batch's layers from the first with a gradient to the last."""
    first, beyond = (
        place - batch.span.start for place in (gradients[0].where.start, gradients[-1].where.stop)
    )
    if beyond - first == len(batch.layers):
        return batch.state
    return {key: tensor[first:beyond] for key, tensor in batch.state.items()}


def _marks(gradients: Sequence[Gradients], *more: int) -> list[int]:
    """Where stretches of layers begin and end, those without gradients between others too."""
    ends = [mark for some in gradients for mark in (some.where.start, some.where.stop)]
    return sorted({*ends, *more})


def _cut(tensor: Tensor, marks: Sequence[int]) -> dict[int, Tensor]:
    """Stretches by where they begin."""
    pieces = linalg.cut(tensor, [stop - start for start, stop in pairwise(marks)])
    return dict(zip(marks, pieces, strict=False))


def _share_norms(batch: Batch) -> Exchange:
    square = yield batch.last[0].double().square()
    batch.last[0] = square.sqrt()
