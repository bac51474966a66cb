"""Computations on shards that stop where they need sums, run side by side to sum together."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from mkor.communication.sharding import Shard

__all__ = ["Exchange", "in_lockstep"]

Exchange = Generator[Tensor, Tensor, None]
"""Yields what is to be summed over the shards, and is sent the sum."""

MOST = 1 << 24
"""Numbers that wait for a sum at most, unless one computation alone has more."""


def in_lockstep(exchanges: Iterable[tuple[Shard, Exchange]]) -> None:
    """Run all to their ends, with one collective for what they need at the same time.

    Args:
        exchanges: Each with the shard whose processes sum; the same order on all of them.
    """
    waiting: list[tuple[Shard, Exchange, Tensor]] = []
    size = 0
    for shard, exchange in exchanges:
        for needed in exchange:
            waiting.append((shard, exchange, needed))
            size += needed.numel()
            break
        if size >= MOST:
            _finish(waiting)
            waiting, size = [], 0
    _finish(waiting)


def _finish(waiting: list[tuple[Shard, Exchange, Tensor]]) -> None:
    while waiting:
        sums = _sums([(shard, needed) for shard, _, needed in waiting])
        going, waiting = waiting, []
        for (shard, exchange, _), total in zip(going, sums, strict=True):
            with suppress(StopIteration):
                waiting.append((shard, exchange, exchange.send(total)))


def _sums(needed: list[tuple[Shard, Tensor]]) -> list[Tensor]:
    """One flat buffer for each group of processes, device and dtype."""
    together: dict[object, list[int]] = {}
    for place, (shard, tensor) in enumerate(needed):
        key = (shard.groups, tensor.device, tensor.dtype)
        together.setdefault(key, []).append(place)
    sums = [tensor for _, tensor in needed]
    for places in together.values():
        flat = torch.cat([sums[place].flatten() for place in places])
        needed[places[0]][0].sum(flat)
        parts = flat.split([sums[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            sums[place] = part.view(sums[place].shape)
    return sums
