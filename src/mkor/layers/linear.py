"""Linear layers: every leading dimension counts rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from mkor import native
from mkor.layers.rows import Chunks, parts_of, place, sum_parts, take_parts
from mkor.layers.sums import PartSums, Pick, accumulator, choose, squares, sums_by

__all__ = ["SMALL", "LinearKind"]

SMALL = 1 << 14
"""Calls with no more entries are stacked."""


@dataclass(frozen=True)
class LinearKind:
    """``nn.Linear``: the last dimension holds features, all others count rows."""

    d_in: int
    d_out: int

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether ``[*, d_in]`` became ``[*, d_out]``; see :class:`LayerKind`.

        Args:
            x: Input of a call.
            output: Output of the call.

        Returns:
            False for anything else.
        """
        if x.is_nested or x.dim() == 0:
            return False
        return x.shape[-1] == self.d_in and output.shape == (*x.shape[:-1], self.d_out)

    def input_sums(self, x: Tensor | Sequence[Tensor], pick: Pick) -> PartSums:
        """Sums of ``a``; see :class:`LayerKind`.

        Args:
            x: ``[*, d_in]``, where one dimension is a single row; or those of several layers.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_in]``; of several layers ``[B, k, d_in]``.
        """
        return _sums(self, x, pick, 0)

    def output_sums(self, g: Tensor | Sequence[Tensor], pick: Pick) -> PartSums:
        """Sums of raw ``g``; see :class:`LayerKind`.

        Args:
            g: ``[*, d_out]``, or those of several layers.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_out]``; of several layers ``[B, k, d_out]``.
        """
        return _sums(self, g, pick, 1)

    def plan(self, x: Sequence[int], g: Sequence[int], pick: Pick) -> native.Plan:
        """How kernels sum a call; see :class:`LayerKind`.

        Args:
            x: Sizes of its input.
            g: Sizes of its output.
            pick: Which rows are used, in an update that is known.

        Returns:
            The plan.
        """
        return _plan(self, tuple(x[:-1]), pick)

    def stacks(self, x: Tensor, pick: Pick) -> bool:
        """Whether calls like this are summed together; see :class:`LayerKind`.

        Args:
            x: Its input, or the gradient of its output.
            pick: Which rows are used.

        Returns:
            Whether it is small.
        """
        return x.numel() <= SMALL

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        """All rows; see :class:`LayerKind`.

        Args:
            x: ``[*, d_in]``.

        Yields:
            ``[n, d_in]``.
        """
        yield x.reshape(-1, self.d_in)

    def output_rows(self, g: Tensor) -> Iterator[Tensor]:
        """All rows; see :class:`LayerKind`.

        Args:
            g: ``[*, d_out]``.

        Yields:
            ``[n, d_out]``.
        """
        yield g.reshape(-1, self.d_out)


def _sums(kind: LinearKind, x: Tensor | Sequence[Tensor], pick: Pick, side: int) -> PartSums:
    """Sums over rows ``[*, d]``, or over those of several layers."""
    xs = [x] if isinstance(x, Tensor) else x
    if not isinstance(pick.update, Tensor) and native.serves(*xs):
        plan = _plan(kind, xs[0].shape[:-1], pick)
        if native.pays(plan.reads):
            return sums_by(plan, side, x)
    dim = 0
    if not isinstance(x, Tensor):
        x, dim = torch.stack(list(x)), 1
    x = x.unsqueeze(dim) if x.dim() == dim + 1 else x
    samples, total = x.shape[dim], math.prod(x.shape[dim:-1])
    if pick.rows is None:
        # The cut is along the first dimension: a sequence is never divided.
        _, sizes = place(samples, pick.vectors, None)
        counts = [n * (total // samples) for n in sizes]
        runs = [run.flatten(dim + 1, -2) for run in take_parts(x, pick.vectors, None, 0, dim)]
    else:
        chunks, counts = place(total, pick.vectors, pick.rows)
        runs = _row_runs(x, pick, chunks, dim)
    # Squares first: they read memory in its order, faster, and the sums then find it cached.
    square = squares(runs, dim)
    vectors = sum_parts(runs, lambda run: run.sum(dim + 1, dtype=accumulator(x)), pick.vectors, dim)
    return PartSums(vectors, square, counts, total)


@lru_cache(maxsize=64)
def _plan(kind: LinearKind, lead: tuple[int, ...], pick: Pick) -> native.Plan:
    """Of calls whose tensors have these dimensions before the last."""
    total = math.prod(lead)
    # With all rows the cut is along the first dimension: a sequence is never divided.
    samples = total if pick.rows is not None or not lead else lead[0]
    chunks, _ = place(samples, pick.vectors, pick.rows)
    parts = parts_of(samples, pick.vectors, chunks, int(pick.update), unit=total // samples)
    return native.Plan(parts, 1, total, (kind.d_in, kind.d_out))


def _row_runs(x: Tensor, pick: Pick, chunks: Chunks | None, dim: int) -> list[Tensor]:
    if x.dim() == dim + 2:
        return choose(x, pick, chunks, dim)
    if chunks is not None and not isinstance(pick.update, Tensor) and not _flattens(x):
        # Flattening would copy the whole batch to read a few rows of it.
        return [x[_coordinates(chunks.indices(pick.update, x.device), x.shape[:-1])]]
    return choose(x.flatten(dim, -2), pick, chunks, dim)


def _coordinates(flat: Tensor, sizes: torch.Size) -> tuple[Tensor, ...]:
    """What ``unravel_index`` gives, without its tensors on the host."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(flat % size)
        flat = flat // size
    return tuple(reversed(coordinates))


def _flattens(x: Tensor) -> bool:
    """Whether the leading dimensions merge into one without a copy."""
    lead = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(lead))
