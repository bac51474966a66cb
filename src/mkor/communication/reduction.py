"""The sums of an update's statistics over processes, begun as early as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mkor.communication.communicator import Communicator, Pending

__all__ = ["Reduction"]


class Reduction:
    """Turns every process's flat buffers into the same totals on all.

    One collective per buffer and update. Where the gradients of a backward pass are synchronised
    in the pass itself, :meth:`launch` sends its statistics at the pass's end, while the last
    gradients are still under way; else :meth:`finish` does all of it. Several such passes before
    a step are sent one by one and added.

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
        # What arrived of earlier launches in this step.
        self._arrived: list[Tensor] = []

    def launch(self) -> None:
        """Send what was captured so far without waiting, and begin to capture anew."""
        if not self.buffers or self._communicator.world_size == 1:
            return
        if not self._sent:
            self._sent = [torch.empty_like(buffer) for buffer in self.buffers]
            sums = [sent.unsqueeze(0) for sent in self._sent]
            self._arriving = self._apart() if self._gather else sums
        if self._pending is not None:
            self._pending.wait()
            earlier = self._arrived or [torch.zeros_like(t) for t in self._arriving]
            self._arrived = list(torch._foreach_add(earlier, self._arriving))
        torch._foreach_copy_(self._sent, self.buffers)
        torch._foreach_zero_(self.buffers)
        self._pending = self._begin(self._sent, self._arriving)

    def finish(self, captured: bool) -> None:
        """Leave the totals of everything since the last step.

        Args:
            captured: Whether anything was captured since the last launch; must be the same on all
                processes.
        """
        if not self.buffers:
            return
        if self._pending is None:
            self._begin(self.buffers, self.totals).wait()
            return
        if captured:
            self._begin(self.buffers, self.totals).wait()
        elif self._gather:
            torch._foreach_zero_(self.totals)
        self._pending.wait()
        for landed in (self._arriving, self._arrived):
            if landed:
                torch._foreach_add_(self.totals, landed)
        self._pending, self._arrived = None, []

    def clear(self) -> None:
        """Drop what was captured, and what of it is under way."""
        if self._pending is not None:
            self._pending.wait()
        self._pending, self._arrived = None, []
        if self.buffers:
            torch._foreach_zero_(self.buffers)

    def _begin(self, buffers: list[Tensor], totals: list[Tensor]) -> Pending:
        if self._gather:
            return self._communicator.gather(buffers, totals)
        return self._communicator.sum(buffers)

    def _apart(self) -> list[Tensor]:
        W = self._communicator.world_size
        return [buffer.new_zeros(W, len(buffer)) for buffer in self.buffers]
