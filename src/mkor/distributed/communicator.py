"""The processes that train together, and what they tell each other.

Without an initialised process group the world is one process and every call returns at once, so
the rest of the package is the same code at any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mkor._torch import all_gather, small_device, takes, timeout_of


class Pending:
    """Collectives under way."""

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
        """Divide the processes into groups; all of them must call it."""
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
                timeout=timeout_of(parent),
                backend=dist.get_backend_config(parent),
                use_local_synchronization=some,
            )
            if self.rank in ranks:
                mine.append(group)
        return mine[0]

    def sum(self, buffers: Sequence[Tensor]) -> Pending:
        """Begin to replace each buffer by its sum over all processes, in place."""
        if self.world_size == 1:
            return Pending()
        group = self.group
        return Pending([dist.all_reduce(b, group=group, async_op=True) for b in buffers])

    def gather(self, buffers: Sequence[Tensor], into: Sequence[Tensor]) -> Pending:
        """Begin to collect each buffer from all processes."""
        if self.world_size == 1:
            for buffer, whole in zip(buffers, into, strict=True):
                whole[0] = buffer
            return Pending()
        group = self.group
        pairs = zip(into, buffers, strict=True)
        return Pending([all_gather(w.view(-1), b, group=group, async_op=True) for w, b in pairs])

    def sum_small(self, votes: Tensor) -> Tensor:
        """Sum a small CPU tensor over all processes."""
        if self.world_size == 1:
            return votes
        summed = votes.to(small_device(self.group))
        dist.all_reduce(summed, group=self.group)
        return summed.cpu()

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace tensors by those of one process."""
        if self.world_size == 1:
            return
        sender = dist.get_global_rank(self.group, source)
        for tensor in tensors:
            # A backend for GPUs alone does not take the few numbers that live on the CPU.
            sent = (
                tensor if takes(self.group, tensor.device) else tensor.to(small_device(self.group))
            )
            dist.broadcast(sent, sender, group=self.group)
            if sent is not tensor:
                tensor.copy_(sent)

    def gather_objects(self, thing: object) -> list[Any]:
        """Collect a small object from all processes."""
        things: list[Any] = [thing]
        if self.world_size > 1:
            things *= self.world_size
            dist.all_gather_object(things, thing, group=self.group)
        return things


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
