"""KAISA: which process inverts and preconditions which layer, and how the others get the results.

The processes form a grid (Pauloski et al., "KAISA", SC 2021). One process inverts a layer's
factors. Its column holds the layer's *gradient workers*: they get the inverses and precondition the
gradient. Every other process gets the result from the worker in its own row. One
column of all processes needs no sharing of gradients; one row of them needs the least memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from mkor.distributed.communicator import Communicator, Pending

LARGE = 1 << 18
"""Numbers from which a tensor travels by itself; smaller ones are put together in one buffer."""

Part = tuple[int, Sequence[Tensor]]
"""The process that inverts some layers, and tensors of theirs: of one floating dtype, or bool."""


@dataclass(frozen=True)
class Grid:
    """Processes in rows of neighbours.

    Attributes:
        height: Processes in a column: the gradient workers of a layer.
        width: Processes in a row.
    """

    height: int
    width: int

    def column(self, rank: int) -> range:
        """The processes that precondition what one of them inverts."""
        return range(rank % self.width, self.height * self.width, self.width)

    def row(self, rank: int) -> range:
        """The processes that share preconditioned gradients, one from each column."""
        start = rank - rank % self.width
        return range(start, start + self.width)


def grid(world: int, fraction: float) -> Grid:
    """Arrange the processes."""
    wanted = max(1.0, fraction * world)
    height = round(wanted)
    # A third may have been written as 0.333.
    if world % height or abs(wanted - height) > 0.01:
        fitting = ", ".join(str(Fraction(n, world)) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"grad_worker_fraction={fraction} makes {wanted:g} of {world} processes the workers of "
            f"a layer, which does not divide them evenly: {fitting} would"
        )
    return Grid(height, world // height)


def assign(costs: Sequence[float], world: int) -> list[int]:
    """Spread work evenly: the most costly first, each to whom has least to do so far."""
    loads = [(0.0, rank) for rank in range(world)]
    ranks = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = loads[0]
        ranks[place] = rank
        heapq.heapreplace(loads, (load + costs[place], rank))
    return ranks


class Assignment:
    """What this process does for others, and they for it.

    All methods that share are collective: every process calls them with the same parts in the same
    order, and tensors of the same shapes.
    """

    def __init__(self, communicator: Communicator, fraction: float) -> None:
        self._communicator = communicator
        self._world, self._rank = communicator.world_size, communicator.rank
        self._grid = grid(self._world, fraction)

    @property
    def shares_gradients(self) -> bool:
        """Whether some processes get preconditioned gradients from others."""
        return self._grid.width > 1

    def inverters(self, costs: Sequence[float]) -> list[int]:
        """Assign layers to processes."""
        return assign(costs, self._world)

    def inverts(self, inverter: int) -> bool:
        """Whether this process inverts the factors of some layers."""
        return inverter == self._rank

    def preconditions(self, inverter: int) -> bool:
        """Whether this process is one of some layers' gradient workers, with their inverses."""
        return inverter in self._grid.column(self._rank)

    def share_inverses(self, parts: Iterable[Part]) -> None:
        """Give the gradient workers of each layer what its inverter has, in place."""
        if self._grid.height == 1:
            return
        mine = [part for part in parts if self.preconditions(part[0])]
        self._broadcast(mine, self._column)

    def share_gradients(self, parts: Iterable[Part]) -> None:
        """Give every process what the gradient worker in its row has, in place."""
        if not self.shares_gradients:
            return
        row = self._grid.row(self._rank)
        workers = [(row[rank % len(row)], tensors) for rank, tensors in parts]
        self._broadcast(workers, self._row)

    def broadcast_status(self, parts: Iterable[Part]) -> None:
        """Give every process what the inverter has, in place."""
        if self._world == 1:
            return
        packs: dict[tuple[torch.device, torch.dtype], list[tuple[bool, Tensor]]] = {}
        for rank, tensors in parts:
            key = (tensors[0].device, tensors[0].dtype)
            packs.setdefault(key, []).extend((self.inverts(rank), t) for t in tensors)
        # The sum with zeros of all others is exact.
        flats = [
            _flat([t if own else torch.zeros_like(t) for own, t in pack], dtype)
            for (_, dtype), pack in packs.items()
        ]
        self._communicator.sum(flats).wait()
        for flat, pack in zip(flats, packs.values(), strict=True):
            _unpack(flat, [tensor for _, tensor in pack])

    @cached_property
    def _column(self) -> dist.ProcessGroup:
        return self._group([self._grid.column(rank) for rank in range(self._grid.width)])

    @cached_property
    def _row(self) -> dist.ProcessGroup:
        starts = range(0, self._world, self._grid.width)
        return self._group([self._grid.row(rank) for rank in starts])

    def _group(self, parts: list[range]) -> dist.ProcessGroup:
        return self._communicator.group if len(parts) == 1 else self._communicator.subgroup(parts)

    def _broadcast(self, parts: Iterable[Part], group: dist.ProcessGroup) -> None:
        """Replace tensors by those of a member of the group, all of them at once."""
        packs: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        sent: list[tuple[int, Tensor, list[Tensor]]] = []
        for rank, tensors in parts:
            for tensor in tensors:
                # What is sent by itself must not depend on strides, which are each process's own.
                if tensor.numel() >= LARGE:
                    sent.append((rank, tensor.contiguous(), [tensor]))
                else:
                    key = (rank, tensors[0].device, tensors[0].dtype)
                    packs.setdefault(key, []).append(tensor)
        sent += [(rank, _flat(pack, dtype), pack) for (rank, _, dtype), pack in packs.items()]
        members = dist.get_process_group_ranks(self._communicator.parent)
        works = [
            dist.broadcast(buffer, members[rank], group=group, async_op=True)
            for rank, buffer, _ in sent
        ]
        Pending(works).wait()
        for rank, buffer, targets in sent:
            if rank != self._rank and targets[0] is not buffer:
                _unpack(buffer.view(-1), targets)


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.flatten().to(dtype) for tensor in tensors])


def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))
