"""The processes that train together, and what they tell each other.

Without an initialised process group the world is one process and every call returns at once, so
the rest of the package is the same code at any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Communicator", "Pending"]

# Its name before torch 2.13 or so.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Pending:
    """Collectives under way.

    Args:
        works: Their handles.
    """

    def __init__(self, works: Sequence[Any] = ()) -> None:
        self._works = list(works)

    def wait(self) -> None:
        """Wait until all are done; on a GPU, make the current stream wait."""
        for work in self._works:
            work.wait()
        self._works.clear()


class Communicator:
    """The processes that train together, in a process group of the optimizer's own.

    Its collectives must not queue behind those of the gradients, and their order among themselves
    is then all that has to be the same everywhere. The group is made at the first use, which is
    the first step; all processes must take part in it.

    Args:
        group: The group whose processes it joins; None for the default group once it is
            initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._parent = group
        self._own: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of processes; 1 without ``torch.distributed``."""
        return dist.get_world_size(self._parent) if _initialised() else 1

    @property
    def rank(self) -> int:
        """This process's place among them, from 0."""
        return dist.get_rank(self._parent) if _initialised() else 0

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph repeats what the processes tell each other: NCCL's calls alone."""
        return self.world_size == 1 or "cuda:nccl" in dist.get_backend_config(self.parent)

    @property
    def parent(self) -> dist.ProcessGroup:
        """The group whose processes train together."""
        group = self._parent or dist.group.WORLD
        if group is None:
            raise RuntimeError("torch.distributed is not initialised: call init_process_group")
        return group

    @property
    def group(self) -> dist.ProcessGroup:
        """The optimizer's own process group; made at the first use, by all processes together."""
        if self._own is None:
            self._own = self.subgroup([range(self.world_size)])
        return self._own

    def subgroup(self, parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """Divide the processes into groups; all of them must call it.

        Args:
            parts: Their places among the processes that train together, group by group.

        Returns:
            The new group that this process is in, with the parent's backend and time-out.
        """
        parent = self.parent
        members = dist.get_process_group_ranks(parent)
        # Processes that do not train here cannot be waited for.
        some = parent is not dist.group.WORLD
        mine: list[dist.ProcessGroup] = []
        for ranks in parts:
            if some and self.rank not in ranks:
                continue
            group = dist.new_group(
                [members[rank] for rank in ranks],
                timeout=_timeout(parent),
                backend=dist.get_backend_config(parent),
                use_local_synchronization=some,
            )
            if self.rank in ranks:
                mine.append(group)
        return mine[0]

    def sum(self, buffers: Sequence[Tensor]) -> Pending:
        """Begin to replace each buffer by its sum over all processes, in place.

        Args:
            buffers: Contiguous, of the same layout on every process.

        Returns:
            What to wait for before they are read.
        """
        if self.world_size == 1:
            return Pending()
        group = self.group
        return Pending([dist.all_reduce(b, group=group, async_op=True) for b in buffers])

    def gather(self, buffers: Sequence[Tensor], into: Sequence[Tensor]) -> Pending:
        """Begin to collect each buffer from all processes.

        Args:
            buffers: ``[n]``, contiguous, of the same layout on every process.
            into: ``[W, n]`` each.

        Returns:
            What to wait for before they are read.
        """
        if self.world_size == 1:
            for buffer, whole in zip(buffers, into, strict=True):
                whole[0] = buffer
            return Pending()
        group = self.group
        pairs = zip(into, buffers, strict=True)
        return Pending([_gather_into(w.view(-1), b, group=group, async_op=True) for w, b in pairs])

    def sum_small(self, votes: Tensor) -> Tensor:
        """Sum a small CPU tensor over all processes.

        Args:
            votes: Of the same shape on every process.

        Returns:
            The sum, on the CPU.
        """
        if self.world_size == 1:
            return votes
        summed = votes.to(_device(self.group))
        dist.all_reduce(summed, group=self.group)
        return summed.cpu()

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace tensors by those of one process.

        Args:
            tensors: Of the same shapes on every process; changed in place.
            source: The process's rank.
        """
        if self.world_size == 1:
            return
        sender = dist.get_global_rank(self.group, source)
        for tensor in tensors:
            # A backend for GPUs alone does not take the few numbers that live on the CPU.
            takes = torch.device(tensor.device.type) in self.group._device_types
            sent = tensor if takes else tensor.to(_device(self.group))
            dist.broadcast(sent, sender, group=self.group)
            if sent is not tensor:
                tensor.copy_(sent)

    def gather_objects(self, thing: object) -> list[Any]:
        """Collect a small object from all processes.

        Args:
            thing: Can be pickled.

        Returns:
            Every process's, by rank.
        """
        things: list[Any] = [thing]
        if self.world_size > 1:
            things *= self.world_size
            dist.all_gather_object(things, thing, group=self.group)
        return things


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes small tensors from: the CPU if it can."""
    kinds = group._device_types
    return torch.device("cpu") if torch.device("cpu") in kinds else kinds[0]


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The group's time-out, which groups made from it do not take over by themselves."""
    options = getattr(group._get_backend(_device(group)), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None
