"""Sums over the chosen rows of one call of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mkor import native
from mkor.layers.rows import Chunks, take_parts

__all__ = ["PartSums", "Pick", "accumulator", "choose", "squares", "sums_by"]


class Pick(NamedTuple):
    """Which rows of a call are used.

    Attributes:
        vectors: Number of parts, ``k``.
        rows: Rows per part, ``m``; None for all rows.
        update: Number of updates so far: an int, or a 0-dim tensor in compiled code and in CUDA
            graphs.
    """

    vectors: int
    rows: int | None
    update: int | Tensor


class PartSums(NamedTuple):
    """Sums over the used rows of one call of a layer, for one side.

    Attributes:
        vectors: ``[k, d]``, the sum of each part's rows; 0 for an empty part.
        square: Sum of the squares of all used entries, a 0-dim tensor.
        counts: Rows in each part.
        total: Rows of the whole call, used or not.
    """

    vectors: Tensor
    square: Tensor
    counts: list[int]
    total: int

    def of(self, layer: int) -> PartSums:
        """One layer's, of the sums of several.

        Args:
            layer: Its place in the stack.

        Returns:
            Views.
        """
        return self._replace(vectors=self.vectors[layer], square=self.square[layer])


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums of a tensor are kept in.

    Args:
        x: Any tensor of numbers.

    Returns:
        float64 for float64, else float32.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def squares(runs: list[Tensor], dim: int = 0) -> Tensor:
    """Sum of all squares; part by part, since a norm over gaps between parts is slow.

    Args:
        runs: ``[..., parts, samples, ...]`` each.
        dim: Along which the parts lie; what comes before stays.

    Returns:
        ``[...]``.
    """
    norms = [
        torch.linalg.vector_norm(run, dim=tuple(range(dim + 1, run.dim())), dtype=accumulator(run))
        for run in runs
    ]
    joined = norms[0] if len(norms) == 1 else torch.cat(norms, dim)
    # Not `torch.dot`: MKL leaves the processor so that the large product that follows is slower.
    return joined.square().sum(dim)


def choose(x: Tensor, pick: Pick, chunks: Chunks | None, dim: int = 0) -> list[Tensor]:
    """The chosen samples of a call.

    Args:
        x: ``[..., samples, ...]``.
        pick: Which rows are used.
        chunks: Chosen chunks, or None for the whole batch.
        dim: Along which the samples lie.

    Returns:
        As :func:`mkor.layers.rows.take_parts` returns them.
    """
    if not isinstance(pick.update, Tensor):
        return take_parts(x, pick.vectors, chunks, pick.update, dim)
    if chunks is None:
        return take_parts(x, pick.vectors, None, 0, dim)
    indices = chunks.indices(pick.update, x.device)
    return [x.index_select(dim, indices.flatten()).unflatten(dim, indices.shape)]


def sums_by(plan: native.Plan, side: int, x: Tensor | Sequence[Tensor]) -> PartSums:
    """Sums by a kernel.

    Args:
        plan: For calls like this.
        side: 0 for inputs, 1 for output gradients.
        x: Of a call; or of several layers' calls.

    Returns:
        Vectors ``[k, d]``; of several layers ``[B, k, d]``.
    """
    found = native.side_sums(plan, side, [x] if isinstance(x, Tensor) else x)
    sums = PartSums(*found, plan.counts, plan.total)
    return sums.of(0) if isinstance(x, Tensor) else sums
