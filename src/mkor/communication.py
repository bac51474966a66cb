"""Sums over processes. The only module that talks to other processes.

Without an initialised process group the world is one process and every call returns at once, so
the rest of the package is the same code at any world size.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["Communicator"]


class Communicator:
    """The processes that train together.

    Args:
        group: A process group, or None for the default group once it is initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def world_size(self) -> int:
        """Number of processes; 1 without ``torch.distributed``."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def sum(self, buffers: list[Tensor]) -> None:
        """Replace each buffer by its sum over all processes, in place.

        Args:
            buffers: One-dimensional tensors of the same layout on every process.
        """
        if self.world_size == 1:
            return
        pending = [dist.all_reduce(buffer, group=self.group, async_op=True) for buffer in buffers]
        for work in pending:
            work.wait()

    def sum_small(self, votes: Tensor) -> Tensor:
        """Sum a small CPU tensor over all processes.

        Args:
            votes: Of the same shape on every process.

        Returns:
            The sum, on the CPU.
        """
        if self.world_size == 1:
            return votes
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        summed = votes.to(device)
        dist.all_reduce(summed, group=self.group)
        return summed.cpu()
