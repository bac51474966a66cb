"""Statistics like those of a long training: a few directions that drift, and noise; seeded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

from mkor.curvature.contract import SIDES, BatchShape, Curvature, Statistics

DIRECTIONS = 8
# Per update: how far mean and directions turn, and the parts of a row's entries.
TURN = 0.05
MEAN, NOISE = 0.5, 0.5
# Rows behind a vector where the curvature averages them all.
ALL_ROWS = 1024


def square_shape(width: int, dtype: torch.dtype) -> BatchShape:
    """One square layer without bias.

    Args:
        width: Its width.
        dtype: Of the arithmetic.

    Returns:
        Its shape.
    """
    return BatchShape(1, width, width, False, SIDES, dtype, torch.device("cpu"))


def gradient_of(width: int, seed: int) -> Tensor:
    """A gradient whose singular values fall as 1, 1/2, 1/3, ...

    Args:
        width: Of the layer.
        seed: Decides its singular vectors.

    Returns:
        `[1, width, width]`, float64, of norm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    U, V = torch.linalg.qr(normal).Q
    values = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    M = (U * values) @ V.mT
    return torch.as_tensor(M / M.norm()).unsqueeze(0)


class _Side:
    """The distribution of one side's rows: `mean + directions . normal + noise`."""

    def __init__(self, width: int, scale: float, generator: torch.Generator) -> None:
        self.width, self.scale, self.generator = width, scale, generator
        self.mean = self._normal(width)
        self.directions = self._normal(DIRECTIONS, width)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def turn(self) -> None:
        """Moves mean and directions a little; their size stays."""
        keep = math.sqrt(1 - TURN**2)
        for moving in (self.mean, self.directions):
            moving.mul_(keep).add_(self._normal(*moving.shape), alpha=TURN)

    def means(self, count: int, rows: int) -> Tensor:
        """Means of rows: the mean stays, the rest averages out.

        Args:
            count: How many.
            rows: Rows behind each.

        Returns:
            `[1, count, width]`.
        """
        along = self._normal(count, DIRECTIONS) @ self.directions / math.sqrt(DIRECTIONS)
        rest = (along + NOISE * self._normal(count, self.width)) / math.sqrt(rows)
        return (self.scale * (MEAN * self.mean + rest)).unsqueeze(0)

    def mean_square(self) -> Tensor:
        """Mean square of the entries of single rows.

        Returns:
            `[1]`.
        """
        return torch.full((1,), self.scale**2 * (MEAN**2 + 1 + NOISE**2), dtype=torch.float64)


def drifting(
    curvature: Curvature, width: int, scales: Mapping[str, float], seed: int
) -> Iterator[Statistics]:
    """The statistics of successive updates of one layer, without end.

    Args:
        curvature: Says how many vectors, and how many rows behind each.
        width: Of the layer.
        scales: Typical entries of each side's rows.
        seed: Decides all of them.

    Yields:
        Statistics in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = {side: _Side(width, scales[side], generator) for side in SIDES}
    k, rows = curvature.vectors, curvature.rows or ALL_ROWS
    for number in count():
        yield Statistics(
            vectors={side: source.means(k, rows) for side, source in sides.items()},
            mean_square={side: source.mean_square() for side, source in sides.items()},
            filled=torch.ones(1, k, dtype=torch.bool),
            accept=torch.ones(1, dtype=torch.bool),
            update=number,
        )
        for source in sides.values():
            source.turn()


def cast(statistics: Statistics, dtype: torch.dtype) -> Statistics:
    """Statistics as a layer of another dtype sees them.

    Args:
        statistics: Without covariances.
        dtype: Of the layer's arithmetic.

    Returns:
        The same, rounded.
    """
    return Statistics(
        {side: vectors.to(dtype) for side, vectors in statistics.vectors.items()},
        {side: square.to(dtype) for side, square in statistics.mean_square.items()},
        statistics.filled,
        statistics.accept,
        statistics.update,
    )
