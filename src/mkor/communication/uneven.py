"""Processes that run out of batches before others (``torch.distributed.algorithms.Join``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from mkor.communication.communicator import Communicator

__all__ = ["Joinable", "Shadow", "notify", "share_last"]


class Shadow(JoinHook):
    """What a process without batches does while others go on.

    Args:
        step: Takes part in the others' collectives with nothing to add.
        share: Told whether this process was among the last, once all are done.
    """

    def __init__(self, step: Callable[[], None], share: Callable[[bool], None]) -> None:
        self._step, self._share = step, share

    def main_hook(self) -> None:
        """Follow one step of the others."""
        self._step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Make all processes alike again.

        Args:
            is_last_joiner: Whether this process was among the last to run out.
        """
        self._share(is_last_joiner)


def notify(joinable: Any) -> None:
    """Tell processes that ran out of batches that another step begins.

    Args:
        joinable: The optimizer.
    """
    Join.notify_join_context(joinable)


def share_last(communicator: Communicator, tensors: list[Tensor], last: bool) -> None:
    """Give all processes the tensors of one that took every step.

    Args:
        communicator: The processes.
        tensors: The same on every process but for their values; changed in place.
        last: Whether this process took every step.
    """
    votes = torch.zeros(communicator.world_size, device="cpu")
    votes[communicator.rank] = float(last)
    source = int(communicator.sum_small(votes).argmax())
    communicator.broadcast(tensors, source)
