"""Where the sums of a batch of layers lie in a flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mkor.capture.gate import Gate
from mkor.capture.tray import META
from mkor.curvature.contract import BatchShape

__all__ = ["Slots", "slots_for"]


@dataclass(frozen=True)
class Slots:
    """Where a batch's sums lie in a flat buffer: those of ``a``, of ``g``, then counts.

    Attributes:
        buffer: Which of the flat buffers.
        start: The first number's place.
        layers: ``B``.
        widths: Length of a vector of ``a`` and of ``g``.
        rows: Vectors of ``a`` and of ``g`` per layer (with covariances, also their rows), and
            counts; 0 where a side is not captured.
    """

    buffer: int
    start: int
    layers: int
    widths: tuple[int, int]
    rows: tuple[int, int, int]

    @property
    def end(self) -> int:
        """The place after the last number."""
        return self.start + sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Numbers in each of the three stretches."""
        a, g, counts = self.rows
        d_in, d_out = self.widths
        return [self.layers * n for n in (a * d_in, g * d_out, META + counts)]

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This process's sums.

        Args:
            buffer: ``[n]``.

        Returns:
            Views ``a [B, k, d_in]``, ``g [B, k, d_out]`` and ``meta [B, 3 + k]``.
        """
        B = self.layers
        a, g, meta = self._stretches(buffer)
        return a.view(B, -1, self.widths[0]), g.view(B, -1, self.widths[1]), meta.view(B, -1)

    def joined(self, totals: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of several sets of processes, their vectors one after the other.

        Args:
            totals: ``[P, n]``, one for each flat buffer.

        Returns:
            ``a [B, P k, d_in]``, ``g [B, P k, d_out]`` and ``meta [B, 3 + P k]``.
        """
        sets = [self.views(one) for one in totals[self.buffer].unbind()]
        a, g = (torch.cat([one[place] for one in sets], dim=1) for place in (0, 1))
        heads = torch.stack([meta[:, :META] for _, _, meta in sets]).sum(0)
        return a, g, torch.cat([heads, *(meta[:, META:] for _, _, meta in sets)], dim=1)

    def _stretches(self, buffer: Tensor) -> list[Tensor]:
        ends = list(accumulate(self.sizes, initial=self.start))
        return [buffer[i:j] for i, j in pairwise(ends)]


def slots_for(shape: BatchShape, gate: Gate, buffer: int, start: int) -> Slots:
    """Lay out a batch.

    Args:
        shape: Of the batch.
        gate: Says how many parts and which sides are captured.
        buffer: Which of the flat buffers.
        start: The first number's place.

    Returns:
        Where everything goes.
    """
    a, g = (gate.vectors + d * gate.covariance for d in (shape.d_in, shape.d_out))
    rows = (a * gate.right, g * gate.left, gate.vectors)
    return Slots(buffer, start, shape.layers, (shape.d_in, shape.d_out), rows)
