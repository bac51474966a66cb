"""What is known of every layer in a step, one entry each, for all batches of a device together.

A net has a few shapes or dozens. Products need a batch for each shape, but what is a number or a
short row per layer does not: an operation takes the same few microseconds for one shape as for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mkor import linalg, native
from mkor.capture.tray import META
from mkor.curvature.contract import BatchShape

__all__ = ["Counted", "Roster"]


@dataclass(frozen=True)
class Counted:
    """What follows from the counts and squares of a step, for some layers.

    Attributes:
        used: ``[B]``, rows in all vectors, at least 1.
        g_scale: ``[B]``, what raw output gradients are multiplied with.
        a_means, g_means: ``[B, k]``, what sums of inputs and of raw output gradients are multiplied
            with.
        left, right: ``[B]``, mean squares of the sides.
        filled: ``[B, k]``, which slots hold a vector.
        accept: ``[B]``, which layers learn from the step.
        whole: Whether all slots of all these layers are filled and accepted, as far as that is
            known without waiting for the device.
    """

    used: Tensor
    g_scale: Tensor
    a_means: Tensor
    g_means: Tensor
    left: Tensor
    right: Tensor
    filled: Tensor
    accept: Tensor
    whole: bool


class Roster:
    """Layers of all shapes on one device, with one dtype of arithmetic.

    Args:
        shapes: Of the batches, in their order.

    Attributes:
        spans: Where each batch's layers are.
        last: ``[3, N]``: norm of the raw and of the preconditioned gradient, their inner product.
        updates: ``[N]``, how many each layer has taken; part of the batches' state, as norms are.
        norms: ``[N, 2]``, running norms of both gradients.
        kept: ``[N]``, which layers are not left to the base.
        seen: ``[N]``, which layers had data, in the last step with statistics.
        fed: ``[N]``, the same when the factors last learned.
        finite: ``[N]``, whether statistics and raw gradient were finite in that step.
        bad: 0-dim, whether any layer's were not.
        done: ``[N]``, which layers were preconditioned.
        refused: ``[2, N]``: updates refused for non-finite statistics, gradients passed raw for the
            same reason.
    """

    def __init__(self, shapes: Sequence[BatchShape]) -> None:
        sizes = [shape.layers for shape in shapes]
        ends = list(accumulate(sizes, initial=0))
        self.spans = [slice(i, j) for i, j in pairwise(ends)]
        self._sizes, N = sizes, ends[-1]
        dtype, device = shapes[0].dtype, shapes[0].device

        def each(numbers: Sequence[int]) -> Tensor:
            layers = [n for n, size in zip(numbers, sizes, strict=True) for _ in range(size)]
            return torch.tensor(layers, dtype=dtype, device=device)

        self._widths = torch.stack(
            [
                each([shape.d_out for shape in shapes]),
                each([shape.full_width("right") for shape in shapes]),
                each([shape.bias for shape in shapes]),
            ]
        )
        self._kept: list[Counted] = []
        self.last = torch.zeros(3, N, dtype=dtype, device=device)
        self.reset()
        self.seen = torch.zeros(N, dtype=torch.bool, device=device)
        self.fed, self.finite = torch.ones_like(self.seen), torch.ones_like(self.seen)
        self.done, self.kept = torch.zeros_like(self.seen), torch.ones_like(self.seen)
        self.bad = torch.zeros_like(self.seen.any())
        self.refused = torch.zeros(2, N, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Start what is part of the batches' state anew; old tensors may be about to be loaded."""
        N = self.last.shape[1]
        self.updates = self.last.new_zeros(N, dtype=torch.int64)
        self.norms = self.last.new_zeros(N, 2)

    def check(self, meta: Tensor) -> None:
        """See which layers have data, and whether statistics and gradients are finite.

        Args:
            meta: ``[N, 3 + k]``, see :class:`mkor.capture.site.Site`.
        """
        if native.serves(meta, self.last):
            native.check(meta, self.last[0], self.seen, self.finite, self.bad)
            return
        squares_a, squares_g, rows = meta[:, :META].unbind(1)
        torch.gt(rows, 0, out=self.seen)
        # None is negative, and NaN is not below infinity.
        torch.lt(squares_a + squares_g + self.last[0], math.inf, out=self.finite)
        torch.logical_not(self.finite.all(), out=self.bad)

    def count(self, meta: Tensor, refuse: Tensor, scale: float | Tensor) -> list[Counted]:
        """What follows from the counts and squares of a step, once it was checked.

        Args:
            meta: ``[N, 3 + k]``.
            refuse: 0-dim, whether the step's batch is bad and nothing is learned from it.
            scale: What raw ``g`` is multiplied with beside the number of rows.

        Returns:
            For each batch.
        """
        if native.serves(meta) and isinstance(scale, float):
            return self._counted_natively(meta, refuse, scale)
        counts = meta[:, META:]
        squares_a, squares_g, total = meta[:, :META].unbind(1)
        a_means, used = counts.clamp(min=1).reciprocal_(), counts.sum(1).clamp_(min=1)
        g_scale = total * scale
        d_out, d_in, ones = self._widths.unbind()
        left = squares_g * g_scale.square() / (used * d_out)
        right = (squares_a + used * ones) / (used * d_in)
        filled = counts > 0
        accept = self.seen & ~refuse
        whole = linalg.held(filled.all(1).logical_and_(accept))
        self.fed.copy_(self.seen)
        self._note(refuse)
        g_means = g_scale.unsqueeze(1) * a_means
        numbers = (used, g_scale, a_means, g_means, left, right, filled, accept)
        pieces = [linalg.cut(number, self._sizes) for number in numbers]
        flags = [all(whole[span]) for span in self.spans]
        return list(map(Counted, *pieces, flags))

    def usable(self, due: bool) -> tuple[Tensor, Tensor]:
        """Which layers are preconditioned in a step.

        Args:
            due: Whether the step has statistics of its own; layers without pass through then.

        Returns:
            ``[N]``, which have factors to use in this step, and ``[N]``, which of these have
            gradients that are finite as well.
        """
        known = (self.updates, self.seen, self.finite, self.last[0])
        if native.serves(self.last):
            return native.usable(due, *known)
        updates, seen, finite, norms = known
        use = (updates > 0) & seen & finite if due else updates > 0
        return use, use & (norms < math.inf)

    def conclude(
        self, here: slice, norm: Tensor, done: Tensor, use: Tensor, how: tuple[float, str | None]
    ) -> Tensor:
        """Note what was preconditioned, and rescale it.

        Args:
            here: Some neighbouring layers.
            norm: ``[b]``, of their preconditioned gradients.
            done: ``[b]``, which were preconditioned.
            use: ``[b]``, which had factors to use.
            how: ``gamma`` of the running norms, which move, and the kind of rescaling.

        Returns:
            ``[b]``, what the gradients are to be multiplied with.
        """
        momentum, rescale = how
        average, raw = self.norms[here], self.last[0, here]
        last, all_done = self.last[1, here], self.done[here]
        if rescale is not None and native.serves(average, norm):
            norms = (average, raw, norm, done, last, all_done)
            ratio, whole = native.ratio(momentum, rescale == "running", *norms)
        else:
            last.copy_(norm)
            all_done.copy_(done)
            whole = linalg.all_hold(done)
            ratio = _ratio(average, raw, norm, done, momentum, rescale)
        if not whole:
            self.refused[1, here] += use & ~done
        return ratio

    def _note(self, refuse: Tensor) -> None:
        """Count whose updates were refused."""
        if not linalg.all_hold(~refuse):
            self.refused[0] += self.seen & refuse & self.kept

    def _counted_natively(self, meta: Tensor, refuse: Tensor, scale: float) -> list[Counted]:
        """The same by a kernel, into tensors that serve again in every step."""
        N, k = meta.shape[0], meta.shape[1] - META
        if not self._kept or self._kept[0].filled.shape[1] != k:
            self._numbers = meta.new_empty((4 + 2 * k) * N)
            self._filled = torch.empty(N, k, dtype=torch.bool, device=meta.device)
            self._accept = torch.empty_like(self.seen)
            self._kept = self._views(N, k)
            self._whole = [replace(each, whole=True) for each in self._kept]
        tensors = (self._widths, self.seen, self._numbers, self._filled, self._accept, self.fed)
        if native.count(scale, refuse, meta, *tensors):
            return self._whole
        self._note(refuse)
        return self._kept

    def _views(self, N: int, k: int) -> list[Counted]:
        """Each batch's part of what the kernel fills."""
        used, g_scale, left, right = self._numbers[: 4 * N].view(4, N).unbind()
        a_means, g_means = self._numbers[4 * N :].view(2, N, k).unbind()
        numbers = (used, g_scale, a_means, g_means, left, right, self._filled, self._accept)
        pieces = [linalg.cut(number, self._sizes) for number in numbers]
        flags = [False] * len(self._sizes)
        return list(map(Counted, *pieces, flags))


def _ratio(
    average: Tensor,
    raw: Tensor,
    norm: Tensor,
    done: Tensor,
    momentum: float,
    rescale: str | None,
) -> Tensor:
    """``[b]``, what preconditioned gradients are multiplied with; the running norms move."""
    moved = linalg.momentum_average(average, torch.stack((raw, norm), 1), momentum)
    average.copy_(linalg.where(done, moved, average))
    if rescale is None:
        return torch.ones_like(raw)
    if rescale == "running":
        raw, norm = average.unbind(1)
    return linalg.where(done, linalg.norm_ratio(raw, norm), 1.0)
