"""Linear layers: every leading dimension counts rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mkor.rows import Chunks, part_sizes, place_chunks, take_parts
from mkor.sums import PartSums, Pick, accumulator, choose

__all__ = ["LinearKind"]


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

    def input_sums(self, x: Tensor, pick: Pick) -> PartSums:
        """Sums of ``a``; see :class:`LayerKind`.

        Args:
            x: ``[*, d_in]``; one dimension is a single row.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_in]``.
        """
        return _row_sums(x, pick)

    def output_sums(self, g: Tensor, pick: Pick) -> PartSums:
        """Sums of raw ``g``; see :class:`LayerKind`.

        Args:
            g: ``[*, d_out]``.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_out]``.
        """
        return _row_sums(g, pick)

    def stacked_sums(self, x: Tensor, pick: Pick) -> PartSums:
        """Sums of several layers' inputs, or of their output gradients.

        Args:
            x: ``[B, *, d]``.
            pick: Which rows are used.

        Returns:
            Vectors ``[B, k, d]`` and squares ``[B]``.
        """
        return _stacked_sums(x, pick)

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


def _row_sums(x: Tensor, pick: Pick) -> PartSums:
    sums = _stacked_sums(x.unsqueeze(0), pick)
    return PartSums(sums.vectors.squeeze(0), sums.square.squeeze(0), sums.counts, sums.total)


def _stacked_sums(x: Tensor, pick: Pick) -> PartSums:
    x = (x.unsqueeze(1) if x.dim() == 2 else x).movedim(0, -2)
    total = math.prod(x.shape[:-2])
    if pick.rows is None:
        # The cut is along the first dimension: a sequence is never divided.
        per_sample = math.prod(x.shape[1:-2])
        counts = [n * per_sample for n in part_sizes(x.shape[0], pick.vectors)]
        runs = [run.flatten(1, -3) for run in take_parts(x, pick.vectors, None, 0)]
    else:
        chunks = place_chunks(total, pick.vectors, pick.rows)
        counts = [chunks.size] * pick.vectors if chunks else part_sizes(total, pick.vectors)
        runs = _row_runs(x, pick, chunks)
    # Reducing is fast where rows lie together: layer by layer, and part by part.
    by_layer = [run.movedim(2, 0) for run in runs]
    sums = [run.sum(2, dtype=accumulator(x)) for run in by_layer]
    norms = [_norm(run, accumulator(x)) for run in by_layer]
    square = (norms[0] if len(norms) == 1 else torch.cat(norms, dim=1)).square().sum(1)
    return PartSums(_in_slots(sums, pick.vectors), square, counts, total)


def _norm(run: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, parts, m, d]`` to ``[B, parts]``."""
    norm: Tensor = torch.linalg.vector_norm(run, dim=(2, 3), dtype=dtype)
    return norm


def _in_slots(sums: list[Tensor], count: int) -> Tensor:
    """Parts' sums one after the other, ``[B, count, d]``; slots without a part hold 0."""
    filled = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    B, n, d = filled.shape
    return filled if n == count else torch.cat([filled, filled.new_zeros(B, count - n, d)], dim=1)


def _row_runs(x: Tensor, pick: Pick, chunks: Chunks | None) -> list[Tensor]:
    if chunks is not None and not isinstance(pick.update, Tensor) and not _flattens(x):
        # Flattening would copy the whole batch to read a few rows of it.
        return [x[_coordinates(chunks.indices(pick.update, x.device), x.shape[:-2])]]
    return choose(x.flatten(0, -3), pick, chunks)


def _coordinates(flat: Tensor, sizes: torch.Size) -> tuple[Tensor, ...]:
    """What ``unravel_index`` gives, without its tensors on the host."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(flat % size)
        flat = flat // size
    return tuple(reversed(coordinates))


def _flattens(x: Tensor) -> bool:
    """Whether the leading dimensions merge into one without a copy."""
    lead = [(n, step) for n, step in zip(x.shape[:-2], x.stride()[:-2], strict=True) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(lead))
