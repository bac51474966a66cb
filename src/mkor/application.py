"""Preconditioning: from the layers' gradients to ``L^-1 M R^-1``, rescaled, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mkor import linalg
from mkor.batches import Batch
from mkor.communication.assignment import Assignment
from mkor.communication.lockstep import Exchange, in_lockstep
from mkor.communication.sharding import Shard

__all__ = ["Stage", "measure", "precondition", "scale"]

STACK_BELOW = 1 << 16
"""Weights with fewer entries share one batched product; larger ones would only be copied for it."""


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


@dataclass(frozen=True)
class Gradients:
    """Gradients of neighbouring layers of a batch, which are handled together.

    Attributes:
        where: Which of its layers they are.
        targets: The layers' own gradients of weights, and of biases.
        W: ``[b, d_out, d_in]``, or blocks of it: a view of one layer's, or copies of small ones.
        b: ``[b, d_out]`` likewise; None where there is none.
        alone: Whether ``W`` is large and must be copied to be multiplied, one at a time.
    """

    where: slice
    targets: tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
    W: Tensor
    b: Tensor | None
    alone: bool

    def to(self, dtype: torch.dtype) -> Gradients:
        """The same in the arithmetic's dtype."""
        if not self.alone:
            return self
        return replace(self, W=self.W.to(dtype), b=None if self.b is None else self.b.to(dtype))


@dataclass
class _Part:
    """What is needed to precondition some gradients.

    Attributes:
        batch: The layers' batch.
        gradients: The gradients.
        prepared: The layers' rows of what the curvature prepared.
        use: ``[b]``, which have factors to use in this step.
        raw: Copies of the gradients before they are preconditioned, if they will be compared.
    """

    batch: Batch
    gradients: Gradients
    prepared: dict[str, Tensor]
    use: Tensor
    raw: tuple[Tensor, Tensor | None] | None = None

    @property
    def where(self) -> slice:
        """Which of the batch's layers they are."""
        return self.gradients.where

    @property
    def alone(self) -> bool:
        """Whether they are copies that should not be kept."""
        return self.gradients.alone

    @property
    def ok(self) -> Tensor:
        """``[b]``, which gradients are to be preconditioned."""
        return self.use & self.batch.last[0, self.where].isfinite()

    def remember(self, stage: Stage) -> None:
        """Keep the raw gradients if they will be compared."""
        if stage.compare or self.batch.measured:
            W, b = self.gradients.W, self.gradients.b
            self.raw = (W.clone(), None if b is None else b.clone())

    def product(self) -> Tensor:
        """``[b]``, inner products with the raw gradients; 0 where nobody asked."""
        if self.raw is None:
            return torch.zeros_like(self.batch.last[2, self.where])
        return linalg.inner(*self.raw, self.gradients.W, self.gradients.b)


def measure(batches: Sequence[Batch]) -> list[list[Gradients]]:
    """Take the norms of the raw gradients, ``last[0]`` of every batch.

    Args:
        batches: The layers.

    Returns:
        The gradients of every batch.
    """
    found = [list(_gradients(batch)) for batch in batches]
    for batch, gradients in zip(batches, found, strict=True):
        batch.last[0] = 0.0
        for run in _neighbours(gradients):
            batch.last[0, _span(run)] = _norms(run, batch.last.dtype)
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
        for run in _neighbours(_parts(batch, found, stage)):
            done = [_apply(part, stage) for part in run]
            product = [part.product() for part in run]
            norms = _norms([part.gradients for part in run], batch.last.dtype)
            _finish(run, stage, torch.cat(done), norms, torch.cat(product))


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
    square, product = (yield torch.stack((square, part.product().double()))).unbind()
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
    parts: Sequence[_Part], stage: Stage, done: Tensor, norm: Tensor, product: Tensor
) -> None:
    """Rescale neighbours, write their gradients, and keep the figures."""
    batch, here = parts[0].batch, _span(parts)
    raw = batch.last[0, here]
    batch.last[1, here] = norm
    if parts[0].raw is not None:
        batch.last[2, here] = product
    batch.done[here] = done
    use = torch.cat([part.use for part in parts])
    batch.refused[1, here] += use & ~done
    ratio = _ratio(batch, here, raw, norm, done, stage.rescale)
    sizes = [len(part.use) for part in parts]
    for part, by in zip(parts, ratio.split(sizes), strict=True):
        _write(part.gradients, by)


def _ratio(
    batch: Batch, where: slice, raw: Tensor, norm: Tensor, keep: Tensor, rescale: str | None
) -> Tensor:
    norms = batch.state["norms"]
    old = norms[where]
    moved = linalg.momentum_average(old, torch.stack((raw, norm), 1), batch.curvature.momentum)
    moved = torch.where(keep.unsqueeze(1), moved, old)
    norms[where] = moved
    if rescale is None:
        return torch.ones_like(raw)
    if rescale == "running":
        raw, norm = moved.unbind(1)
    return torch.where(keep, linalg.norm_ratio(raw, norm), 1.0)


def _ready(batch: Batch) -> list[int]:
    """The layers that are preconditioned and have a gradient."""
    return [
        i
        for i, layer in enumerate(batch.layers)
        if not batch.skipped[i] and layer.gradients[0] is not None
    ]


def _gradients(batch: Batch) -> Iterator[Gradients]:
    pairs = [
        (None, None) if skipped else layer.gradients
        for layer, skipped in zip(batch.layers, batch.skipped, strict=True)
    ]
    ready = [i for i, (weight, _) in enumerate(pairs) if weight is not None]
    size, width = _sizes(batch)
    # Of the whole: blocks differ in size, but must be exchanged in the same order.
    small = batch.shape.d_out * batch.shape.d_in < STACK_BELOW
    for run in _runs(ready) if small else [[i] for i in ready]:
        weights, biases = zip(*(pairs[i] for i in run), strict=True)
        alone = not small and weights[0].dtype != batch.last.dtype
        dtype = weights[0].dtype if alone else batch.last.dtype
        W = _stack(weights, size, dtype)
        b = None if all(bias is None for bias in biases) else _stack(biases, width, dtype)
        yield Gradients(slice(run[0], run[-1] + 1), (weights, biases), W, b, alone)


def _parts(batch: Batch, gradients: Sequence[Gradients], stage: Stage) -> Iterator[_Part]:
    if not gradients:
        return
    use = batch.state["updates"] > 0
    if stage.due:
        use = use & batch.seen & batch.finite
    first, beyond = gradients[0].where.start, gradients[-1].where.stop
    spanned = {key: tensor[first:beyond] for key, tensor in batch.state.items()}
    prepared = batch.curvature.prepare(spanned, batch.shape)
    for some in gradients:
        spot = slice(some.where.start - first, some.where.stop - first)
        rows = {key: tensor[spot] for key, tensor in prepared.items()}
        yield _Part(batch, some.to(batch.last.dtype), rows, use[some.where])


def _neighbours(parts: Iterable[Any]) -> Iterator[list[Any]]:
    """Parts of a batch whose layers follow each other; those that need copies one by one."""
    run: list[Any] = []
    for part in parts:
        if run and (run[-1].where.stop != part.where.start or part.alone):
            yield run
            run = []
        run.append(part)
        if part.alone:
            yield run
            run = []
    if run:
        yield run


def _span(parts: Sequence[Any]) -> slice:
    return slice(parts[0].where.start, parts[-1].where.stop)


def _sizes(batch: Batch) -> tuple[torch.Size, torch.Size]:
    """Of the gradients that are here: the whole matrix and bias, or blocks."""
    d_out, d_in = batch.shape.d_out, batch.shape.d_in
    if batch.shard is None:
        return torch.Size((d_out, d_in)), torch.Size((d_out,))
    block = batch.shard.block
    rows, columns, bias = (s.stop - s.start for s in (block.rows, block.columns, block.bias))
    return torch.Size((rows, columns)), torch.Size((bias,))


def _stack(gradients: Sequence[Tensor | None], size: torch.Size, dtype: torch.dtype) -> Tensor:
    like = next(g for g in gradients if g is not None)
    rows = [
        like.new_zeros(size, dtype=dtype) if g is None else g.reshape(size).to(dtype)
        for g in gradients
    ]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _norms(gradients: Sequence[Gradients], dtype: torch.dtype) -> Tensor:
    """``[b]``, joint norms of weights and biases of neighbouring layers."""
    if len(gradients) == 1 and not gradients[0].alone:
        return linalg.joint_norm(gradients[0].W, gradients[0].b)
    norms = torch.stack(torch._foreach_norm([some.W for some in gradients], 2, dtype))
    if all(some.b is None for some in gradients):
        return norms
    biases = [norms.new_zeros(()) if some.b is None else some.b for some in gradients]
    return torch.hypot(norms, torch.stack(torch._foreach_norm(biases, 2, dtype)))


def _share_norms(batch: Batch) -> Exchange:
    square = yield batch.last[0].double().square()
    batch.last[0] = square.sqrt()


def _runs(places: list[int]) -> list[list[int]]:
    """Neighbouring places together: a slice is a view, a list of places a copy."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] + 1 == place:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _write(gradients: Gradients, ratio: Tensor) -> None:
    """Multiply what was preconditioned by ``ratio [b]`` and put it where it came from."""
    for new, targets in zip((gradients.W, gradients.b), gradients.targets, strict=True):
        if new is None:
            continue
        pairs = zip(targets, new.unbind(), strict=True)
        found = [(target, row.view(target.shape)) for target, row in pairs if target is not None]
        if len(new) == 1 and new.dtype == found[0][0].dtype:
            torch.mul(found[0][1], ratio, out=found[0][0])
            continue
        new.mul_(ratio.view(-1, *(1,) * (new.dim() - 1)))
        torch._foreach_copy_([target for target, _ in found], [row for _, row in found])
