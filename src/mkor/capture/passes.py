"""When a backward pass ends, how many there were, and whether it synchronised the gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Passes", "graph_is_kept"]


def graph_is_kept() -> bool:
    """Whether the backward pass that is running may be followed by another through its graph.

    Returns:
        False once and for all where it frees what the graph saved.
    """
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


class Passes:
    """Counts a step's backward passes, which are its micro-batches, and sees them end.

    Passes are counted by layer: an expert without tokens sees fewer. Gradients that are sharded
    (FSDP2) accumulate only in passes that synchronise them, so there the layers' own hooks count.

    Attributes:
        on_end: Called when the first pass of a step has ended that synchronised the gradients with
            those of other processes; None where nobody needs to know.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[], None] | None = None
        self.unsent = False
        self.synchronised = 0
        self._counts: dict[Hashable, int] = {}
        self._last: dict[Hashable, int] = {}
        self._open: set[int] = set()
        self._to_do: dict[Callable[[], None], None] = {}
        self._ended = self._sharded = False
        self._ddp: weakref.ref[DistributedDataParallel] | None = None

    @property
    def most(self) -> int:
        """Passes through the layer that saw most."""
        return max(self._counts.values(), default=0)

    def forget(self) -> None:
        """Begin a new step."""
        self.unsent = False
        self.synchronised = 0
        self._counts.clear()
        self._last.clear()
        # A pass that raised never ended.
        self._open.clear()
        self._to_do.clear()
        self._ended = self._sharded = False

    def see_forward(self) -> None:
        """Note, in a layer's forward pass, which ``DistributedDataParallel`` it runs in."""
        if self._ddp is not None and self._ddp() is not None:
            return
        ddp = DistributedDataParallel._active_ddp_module
        self._ddp = None if ddp is None else weakref.ref(ddp)

    def count(self, key: Hashable) -> None:
        """Count a pass at most once, from the hook of a layer's output.

        Args:
            key: Of the layer.
        """
        task = torch._C._current_graph_task_id()
        self.unsent = True
        if self._last.get(key) != task:
            self._last[key] = task
            self._counts[key] = self._counts.get(key, 0) + 1
        self._wait_for_end(task)

    def accumulated(self, key: Hashable, sharded: bool) -> None:
        """Note that a weight's gradient was accumulated.

        Args:
            key: Of the layer.
            sharded: Whether it is the gradient of a shard, and so was synchronised.
        """
        task = torch._C._current_graph_task_id()
        if sharded:
            if not self._ended:
                # A layer without rows has no hook that would.
                self._wait_for_end(task)
            self._sharded = True
            if self._ended:
                self._end()
            return
        self.unsent = True
        self._counts[key] = self._counts.get(key, 0) + 1
        self._wait_for_end(task)

    def at_end(self, do: Callable[[], None]) -> None:
        """Call something once, when the backward pass that is running ends, before ``on_end``.

        Args:
            do: What; the same thing is called once, however often it is asked for.
        """
        task = torch._C._current_graph_task_id()
        if task < 0:
            do()
            return
        self._to_do[do] = None
        self._wait_for_end(task)

    def _wait_for_end(self, task: int) -> None:
        if task < 0 or task in self._open:
            return
        if not self._open:
            self._ended = self._sharded = False
        self._open.add(task)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(self._close, task))

    def _close(self, task: int) -> None:
        self._open.discard(task)
        for do in self._to_do:
            do()
        self._to_do.clear()
        # Reentrant checkpointing runs passes inside the pass.
        if not self._open:
            self._ended = True
            self._end()

    def _end(self) -> None:
        ddp = None if self._ddp is None else self._ddp()
        synchronised = self._sharded or (ddp is not None and ddp.require_backward_grad_sync)
        if not synchronised:
            return
        self._ended = self._sharded = False
        self.synchronised += 1
        if self.on_end is not None and self.synchronised == 1:
            self.unsent = False
            self.on_end()
