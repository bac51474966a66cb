"""The sums of an update's statistics over processes, begun as early as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mkor.communication.communicator import Communicator, Pending

__all__ = ["Reduction"]


class Reduction:
    """Turns every process's flat buffers into the same totals on all.

    Every update takes exactly one collective per buffer, or processes that see different passes
    would wait for each other. Where the gradients are synchronised in the backward pass itself,
    :meth:`launch` begins it at the pass's end, while the last gradients are still under way; else
    :meth:`finish` does. What is captured after a launch goes into the next update.

    Args:
        buffers: One-dimensional, filled by the hooks; the same layout on every process.
        communicator: The processes.
        gather: Whether every process's sums are kept apart instead of added.

    Attributes:
        totals: After :meth:`finish`, ``[1, n]``, the sums over all processes (the buffers
            themselves), or with ``gather`` ``[W, n]``, each process's own.
    """

    def __init__(self, buffers: Sequence[Tensor], communicator: Communicator, gather: bool) -> None:
        self.buffers = list(buffers)
        self.totals = [buffer.unsqueeze(0) for buffer in buffers]
        self._communicator = communicator
        self._gather = gather
        if gather:
            self.totals = self._apart()
        # What was launched: where it is sent from, and where it arrives.
        self._sent: list[Tensor] = []
        self._arriving: list[Tensor] = []
        self._pending: Pending | None = None
        # What was captured after the launch.
        self._late: list[Tensor] = []

    def launch(self) -> None:
        """Send what was captured so far without waiting, at most once before :meth:`finish`."""
        if not self.buffers or self._pending is not None or self._communicator.world_size == 1:
            return
        if not self._sent:
            self._sent = [torch.empty_like(buffer) for buffer in self.buffers]
            sums = [sent.unsqueeze(0) for sent in self._sent]
            self._arriving = self._apart() if self._gather else sums
        self._add_late()
        torch._foreach_copy_(self._sent, self.buffers)
        torch._foreach_zero_(self.buffers)
        self._pending = self._begin(self._sent, self._arriving)

    def finish(self, captured: bool) -> None:
        """Leave the totals of what was launched or, if nothing was, of everything captured.

        Args:
            captured: Whether anything was captured since the launch.
        """
        if not self.buffers:
            return
        if self._pending is None:
            self._add_late()
            self._begin(self.buffers, self.totals).wait()
            return
        self._pending.wait()
        self._pending = None
        if captured:
            self._late = [buffer.clone() for buffer in self.buffers]
        torch._foreach_copy_(self.totals, self._arriving)

    def recall(self) -> None:
        """Take back what was launched: the first process captured all of it, as it were."""
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        if not self._gather and self._communicator.rank == 0:
            torch._foreach_add_(self.totals, self._arriving)

    def clear(self) -> None:
        """Drop what was captured, and what of it is under way."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        if self.buffers:
            torch._foreach_zero_(self.buffers)

    def _add_late(self) -> None:
        if self._late:
            torch._foreach_add_(self.buffers, self._late)
            self._late = []

    def _begin(self, buffers: list[Tensor], totals: list[Tensor]) -> Pending:
        if self._gather:
            return self._communicator.gather(buffers, totals)
        return self._communicator.sum(buffers)

    def _apart(self) -> list[Tensor]:
        W = self._communicator.world_size
        return [buffer.new_zeros(W, len(buffer)) for buffer in self.buffers]
