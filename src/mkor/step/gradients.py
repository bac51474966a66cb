"""Gradients of a batch's layers: found, measured, and written back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mkor import linalg, native
from mkor.step.batches import Batch

__all__ = ["Gradients", "find", "neighbours", "norms", "span_of", "write"]

STACK_BELOW = 1 << 16
"""Weights with fewer entries share one batched product; larger ones would only be copied for it."""

Pair = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of neighbouring layers of a batch, which are handled together.

    Attributes:
        where: Which of the roster's layers they are.
        W: ``[b, d_out, d_in]``, or blocks of it: a view of one layer's, or copies of small ones.
        b: ``[b, d_out]`` likewise; None where there is none.
        targets: The layers' own gradients: of one layer, or of those that were copied.
        alone: Whether ``W`` is large and must be copied to be multiplied, one at a time.
        copies: Rows of copied ``W`` and ``b``, one for each target; none for a view.
        raw: ``[b]``, norms of what a kernel copied, which will put it back.
    """

    where: slice
    W: Tensor
    b: Tensor | None
    targets: list[Tensor]
    alone: bool = False
    copies: list[Tensor] = field(default_factory=list)
    raw: Tensor | None = None

    @property
    def in_place(self) -> bool:
        """Whether ``W`` of one layer is a view of its target, be that transposed or not."""
        target = self.targets[0]
        viewed = target.is_contiguous() or target.shape == self.W.shape[1:]
        return self.W.dtype == target.dtype and viewed

    def to(self, dtype: torch.dtype) -> Gradients:
        """The same in the arithmetic's dtype."""
        if not self.alone:
            return self
        return replace(self, W=self.W.to(dtype), b=None if self.b is None else self.b.to(dtype))


def find(batch: Batch) -> Iterator[Gradients]:
    """The gradients of a batch's layers that are preconditioned and have one.

    Args:
        batch: The layers.

    Yields:
        Neighbours that share one product, in order.
    """
    found = [
        (None, None) if skipped else layer.gradients
        for layer, skipped in zip(batch.layers, batch.skipped, strict=True)
    ]
    pairs = [None if weight is None else (weight, bias) for weight, bias in found]
    size, width = _sizes(batch)
    # Of the whole: blocks differ in size, but must be exchanged in the same order.
    small = batch.shape.d_out * batch.shape.d_in < STACK_BELOW
    for start, run in _runs(pairs, joined=small):
        first = batch.span.start + start
        where = slice(first, first + len(run))
        if len(run) > 1:
            yield _copied(where, run, size, width, batch.last.dtype)
        else:
            (weight, bias) = run[0]
            W = _shaped(weight, size).unsqueeze(0)
            b = None if bias is None else _shaped(bias, width).unsqueeze(0)
            targets = [weight] if bias is None else [weight, bias]
            # Wide copies are not kept: memory would double.
            alone = weight.dtype != batch.last.dtype
            some = Gradients(where, W, b, targets, alone)
            yield replace(some.to(batch.last.dtype), alone=False) if small else some


def _copied(
    where: slice, run: Sequence[Pair], size: torch.Size, width: torch.Size, dtype: torch.dtype
) -> Gradients:
    """Small gradients side by side."""
    weights, biases = [weight for weight, _ in run], [bias for _, bias in run if bias is not None]
    W = weights[0].new_empty(len(run), *size, dtype=dtype)
    b = W.new_empty(len(run), *width) if biases else None
    targets = [*weights, *biases]
    if native.serves(W, *targets):
        return Gradients(where, W, b, targets, raw=native.gather(targets, W, b))
    copies = [_like(row, w) for row, w in zip(W.unbind(), weights, strict=True)]
    if b is not None:
        rows = zip(b.unbind(), run, strict=True)
        copies += [_like(row, bias) for row, (_, bias) in rows if bias is not None]
    torch._foreach_copy_(copies, targets)
    return Gradients(where, W, b, targets, copies=copies)


def norms(gradients: Sequence[Gradients], dtype: torch.dtype, *, raw: bool = False) -> Tensor:
    """Joint norms of the weights and biases of layers.

    Args:
        gradients: Of the layers.
        dtype: Of the arithmetic.
        raw: Whether they are as they were found.

    Returns:
        ``[b]``, in their order.
    """
    lone = [some for some in gradients if some.W.shape[0] == 1]
    if len(lone) == len(gradients):
        return _norms_of(lone, dtype)
    each = iter(_norms_of(lone, dtype).split(1) if lone else ())
    return linalg.joined(
        [next(each) if some.W.shape[0] == 1 else _norms(some, raw) for some in gradients]
    )


def _norms(some: Gradients, raw: bool) -> Tensor:
    """Those of several layers."""
    known = some.raw if raw else None
    return linalg.joint_norm(some.W, some.b) if known is None else known


def _norms_of(gradients: Sequence[Gradients], dtype: torch.dtype) -> Tensor:
    """Those of one layer each, in one call for all, by a kernel where that pays for each."""
    blocks = [some.W for some in gradients]
    biases = [some.b for some in gradients if some.b is not None]
    if native.serves(*blocks, *biases) and all(native.pays(W.numel()) for W in blocks):
        return native.joint_norms(*((some.W, some.b) for some in gradients))
    if not biases:
        return torch.stack(torch._foreach_norm(blocks, 2, dtype))
    blocks += [some.W.new_zeros(()) if some.b is None else some.b for some in gradients]
    return torch.hypot(*torch.stack(torch._foreach_norm(blocks, 2, dtype)).view(2, -1))


def write(gradients: Sequence[Gradients], ratio: Tensor) -> None:
    """Multiply what was preconditioned and put it where it came from.

    Args:
        gradients: Of neighbouring layers.
        ratio: ``[b]``.
    """
    scaled: list[Tensor] = []
    factors: list[Tensor] = []
    sizes = [some.where.stop - some.where.start for some in gradients]
    for some, by in zip(gradients, linalg.cut(ratio, sizes), strict=True):
        if some.raw is not None:
            native.scatter(some.W, some.b, by, some.targets)
        elif some.copies:
            some.W.mul_(by.view(-1, 1, 1))
            if some.b is not None:
                some.b.mul_(by.unsqueeze(1))
            torch._foreach_copy_(some.targets, some.copies)
        elif some.in_place:
            scaled += some.targets
            factors += [by] * len(some.targets)
        else:
            for new, target in zip((some.W, some.b), some.targets, strict=False):
                if new is not None:
                    target.copy_(_like(new[0].mul_(by), target))
    if scaled:
        torch._foreach_mul_(scaled, factors)


def neighbours(parts: Iterable[Any], *, apart: bool = True) -> Iterator[list[Any]]:
    """Join parts whose layers follow each other in their roster, of several batches too.

    Args:
        parts: In order, each with ``where`` and ``alone``.
        apart: Whether those that need copies are kept apart.

    Yields:
        Runs.
    """
    run: list[Any] = []
    for part in parts:
        alone = apart and part.alone
        if run and (run[-1].where.stop != part.where.start or alone):
            yield run
            run = []
        run.append(part)
        if alone:
            yield run
            run = []
    if run:
        yield run


def span_of(parts: Sequence[Any]) -> slice:
    """The layers of neighbouring parts.

    Args:
        parts: In order, each with ``where``.

    Returns:
        From the first to the last.
    """
    return slice(parts[0].where.start, parts[-1].where.stop)


def _sizes(batch: Batch) -> tuple[torch.Size, torch.Size]:
    """Of the gradients that are here: the whole matrix and bias, or blocks."""
    d_out, d_in = batch.shape.d_out, batch.shape.d_in
    if batch.shard is None:
        return torch.Size((d_out, d_in)), torch.Size((d_out,))
    block = batch.shard.block
    rows, columns, bias = (s.stop - s.start for s in (block.rows, block.columns, block.bias))
    return torch.Size((rows, columns)), torch.Size((bias,))


def _runs(
    pairs: Sequence[tuple[Tensor, Tensor | None] | None], joined: bool
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor | None]]]]:
    """Neighbours that have gradients, of biases too or none, and the first one's place."""
    run: list[tuple[Tensor, Tensor | None]] = []
    for place, pair in enumerate([*pairs, None]):
        alike = run and pair is not None and (pair[1] is None) == (run[0][1] is None)
        if run and not (joined and alike):
            yield place - len(run), run
            run = []
        if pair is not None:
            run.append(pair)


def _like(row: Tensor, target: Tensor) -> Tensor:
    """A contiguous row shaped as a gradient; in a net of many layers, calls for nothing add up."""
    return row if row.shape == target.shape else row.view(target.shape)


def _shaped(gradient: Tensor, size: torch.Size) -> Tensor:
    """A gradient as a matrix or vector: a view if it is contiguous, else perhaps a copy."""
    return gradient if gradient.shape == size else gradient.reshape(size)
