"""Preconditioning: from the layers' gradients to ``L^-1 M R^-1``, rescaled, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mkor import linalg
from mkor.batches import Batch
from mkor.communication.assignment import Assignment
from mkor.communication.lockstep import Exchange, in_lockstep
from mkor.communication.sharding import Shard
from mkor.selection import Layer

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


@dataclass
class _Part:
    """Neighbouring layers of a batch that are handled together.

    Attributes:
        batch: Their batch.
        where: Which of its layers they are.
        layers: The layers.
        prepared: Their rows of what the curvature prepared.
        use: ``[b]``, which have factors to use in this step.
        W: ``[b, d_out, d_in]``, gradients, or blocks of them: views, or copies of small ones.
        b: ``[b, d_out]`` likewise; None where there is none.
        raw: Copies of both before they are preconditioned, if they will be compared.
    """

    batch: Batch
    where: slice
    layers: list[Layer]
    prepared: dict[str, Tensor]
    use: Tensor
    W: Tensor
    b: Tensor | None
    raw: tuple[Tensor, Tensor | None] | None = None

    @property
    def ok(self) -> Tensor:
        """``[b]``, which gradients are to be preconditioned."""
        return self.use & self.batch.last[0, self.where].isfinite()

    def remember(self, stage: Stage) -> None:
        """Keep the raw gradients if they will be compared."""
        if stage.compare or self.batch.measured:
            self.raw = (self.W.clone(), None if self.b is None else self.b.clone())

    def product(self) -> Tensor:
        """``[b]``, inner products with the raw gradients; 0 where nobody asked."""
        if self.raw is None:
            return torch.zeros_like(self.batch.last[2, self.where])
        return linalg.inner(*self.raw, self.W, self.b)


def measure(batches: Sequence[Batch]) -> None:
    """Take the norms of the raw gradients, ``last[0]`` of every batch.

    Args:
        batches: The layers.
    """
    for batch in batches:
        batch.last[0] = _raw_norms(batch)
    in_lockstep((b.shard, _share_norms(b)) for b in batches if b.shard is not None)


def precondition(
    batches: Sequence[Batch], stage: Stage, assignment: Assignment | None = None
) -> None:
    """Replace the layers' gradients by ``L^-1 M R^-1``, rescaled, in place.

    Args:
        batches: The layers, measured.
        stage: How.
        assignment: Which processes precondition which layers for others; None where each does all.
    """
    for batch in batches:
        batch.touched = bool(_ready(batch))
        batch.done = torch.zeros_like(batch.seen)
        if batch.touched:
            batch.measured = batch.watched
    in_lockstep(_exchanges(batches, stage))
    whole = (part for batch in batches if batch.shard is None for part in _parts(batch, stage))
    if assignment is None or not assignment.shares_gradients:
        for part in whole:
            part.remember(stage)
            done = part.batch.curvature.apply(part.prepared, part.W, part.b, part.ok)
            _finish(part, stage, done, linalg.joint_norm(part.W, part.b), part.product())
        return
    _assigned(list(whole), stage, assignment)


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


def _exchanges(batches: Sequence[Batch], stage: Stage) -> Iterator[tuple[Shard, Exchange]]:
    for batch in batches:
        if batch.shard is not None:
            for part in _parts(batch, stage):
                yield batch.shard, _sharded(part, batch.shard, stage)


def _sharded(part: _Part, shard: Shard, stage: Stage) -> Exchange:
    """Precondition blocks; sums what the curvature needs of the others, then the norms."""
    part.remember(stage)
    curvature, W, b = part.batch.curvature, part.W, part.b
    projected = yield curvature.project(part.prepared, W, b, shard.block)
    done = curvature.complete(part.prepared, W, b, projected, part.ok, shard.block)
    # Squares of large numbers leave the range of float32.
    square = linalg.joint_norm(W, b).double().square()
    square, product = (yield torch.stack((square, part.product().double()))).unbind()
    _finish(part, stage, done, square.sqrt().to(W.dtype), product.to(W.dtype))


def _assigned(parts: list[_Part], stage: Stage, assignment: Assignment) -> None:
    """Precondition this process's share, and take the rest from others."""
    finished = []
    for part in parts:
        part.remember(stage)
        done = torch.zeros_like(part.use)
        if assignment.preconditions(_inverter(part)):
            done = part.batch.curvature.apply(part.prepared, part.W, part.b, part.ok)
        finished.append(done)
    outcome = [
        (_inverter(part), [t for t in (part.W, part.b, done) if t is not None])
        for part, done in zip(parts, finished, strict=True)
    ]
    assignment.share_gradients(outcome)
    for part, done in zip(parts, finished, strict=True):
        _finish(part, stage, done, linalg.joint_norm(part.W, part.b), part.product())


def _inverter(part: _Part) -> int:
    """The process that inverts the layers' covariances; an assignment gives all of them one."""
    return part.batch.inverter or 0


def _finish(part: _Part, stage: Stage, done: Tensor, norm: Tensor, product: Tensor) -> None:
    """Rescale, write the gradients, and keep the figures."""
    batch, here = part.batch, part.where
    raw = batch.last[0, here]
    batch.last[1, here] = norm
    if part.raw is not None:
        batch.last[2, here] = product
    batch.done[here] = done
    batch.refused[1, here] += part.use & ~done
    ratio = _ratio(batch, here, raw, norm, done, stage.rescale).unbind()
    for i, layer in enumerate(part.layers):
        W, b = layer.gradients
        assert W is not None
        _write(W, part.W[i], ratio[i])
        if part.b is not None and b is not None:
            _write(b, part.b[i], ratio[i])


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


def _parts(batch: Batch, stage: Stage) -> Iterator[_Part]:
    ready = _ready(batch)
    if not ready:
        return
    use = batch.state["updates"] > 0
    if stage.due:
        use = use & batch.seen & batch.finite
    first, beyond = ready[0], ready[-1] + 1
    spanned = {key: tensor[first:beyond] for key, tensor in batch.state.items()}
    prepared = batch.curvature.prepare(spanned, batch.shape)
    size, width = _sizes(batch)
    small = size.numel() < STACK_BELOW
    for run in _runs(ready) if small else [[i] for i in ready]:
        layers = [batch.layers[i] for i in run]
        weights, biases = zip(*(layer.gradients for layer in layers), strict=True)
        where = slice(run[0], run[-1] + 1)
        rows = {
            key: tensor[run[0] - first : where.stop - first] for key, tensor in prepared.items()
        }
        b = None if all(bias is None for bias in biases) else _stack(biases, width, batch.last)
        yield _Part(batch, where, layers, rows, use[where], _stack(weights, size, batch.last), b)


def _sizes(batch: Batch) -> tuple[torch.Size, torch.Size]:
    """Of the gradients that are here: the whole matrix and bias, or blocks."""
    d_out, d_in = batch.shape.d_out, batch.shape.d_in
    if batch.shard is None:
        return torch.Size((d_out, d_in)), torch.Size((d_out,))
    block = batch.shard.block
    rows, columns, bias = (s.stop - s.start for s in (block.rows, block.columns, block.bias))
    return torch.Size((rows, columns)), torch.Size((bias,))


def _stack(gradients: Sequence[Tensor | None], size: torch.Size, like: Tensor) -> Tensor:
    rows = [
        like.new_zeros(size) if g is None else g.reshape(size).to(like.dtype) for g in gradients
    ]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _raw_norms(batch: Batch) -> Tensor:
    pairs = [
        (None, None) if skipped else layer.gradients
        for layer, skipped in zip(batch.layers, batch.skipped, strict=True)
    ]
    weights, biases = ([pair[place] for pair in pairs] for place in (0, 1))
    return torch.hypot(_norms(weights, batch.last), _norms(biases, batch.last))


def _norms(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    present = [gradient for gradient in gradients if gradient is not None]
    zero = like.new_zeros(())
    norms = iter(torch._foreach_norm(present, 2, zero.dtype) if present else ())
    return torch.stack([zero if g is None else next(norms) for g in gradients])


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


def _write(gradient: Tensor, new: Tensor, ratio: Tensor) -> None:
    new = new.view(gradient.shape)
    if new.dtype == gradient.dtype:
        torch.mul(new, ratio, out=gradient)
    else:
        gradient.copy_(new.mul_(ratio))
