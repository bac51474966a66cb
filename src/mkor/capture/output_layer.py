"""Finds the output layers: those with no other supported layer between them and the loss.

Their mean gradient is the signal itself rather than noise to divide by, so they are left to the
base optimizer. The search follows the autograd graph of the passes before the first step, and keeps
nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from mkor._torch import backward_pass


class OutputSearch:
    """Which layers feed which, seen while forward and backward passes run.

    Layers are identified by any hashable key, here their name. Autograd nodes carry it themselves:
    holding nodes here would tie the search to the graph in a cycle that is never collected.
    """

    def __init__(self) -> None:
        self._mark = f"mkor-{id(self)}"
        self._fed: dict[Hashable, set[Hashable]] = {}
        self._reached: set[Hashable] = set()
        self._not_last: set[Hashable] = set()
        self._replaying = self._opened = False
        self._opening: set[Hashable] = set()

    def forward(self, layer: Hashable, inputs: Iterable[Tensor], output: Tensor) -> None:
        """Note that a layer ran."""
        for x in inputs:
            for producer in self._upstream(x):
                self._fed.setdefault(producer, set()).add(layer)
        node: Any = output.grad_fn
        if node is not None:
            node.metadata[self._mark] = layer
        if backward_pass() == -1:
            self._replaying = self._opened = False
            self._opening.clear()
        else:
            self._replaying = True
            if not self._opened:
                self._opening.add(layer)

    def backward(self, layer: Hashable) -> None:
        """Note that the loss depends on a layer."""
        # Reentrant checkpointing replays segments in the backward pass, cut off from the rest of
        # the graph. What is reached from then on lies further from the loss, but for the first.
        if self._replaying and layer not in self._opening:
            self._not_last.add(layer)
        self._opened = True
        self._reached.add(layer)

    @property
    def reached(self) -> set[Hashable]:
        """The layers that a backward pass has reached."""
        return self._reached

    def outputs(self) -> set[Hashable]:
        """The layers that reach the loss through no other layer than themselves."""
        return {
            layer
            for layer in self._reached - self._not_last
            if not (self._fed.get(layer, set()) & self._reached) - {layer}
        }

    def _upstream(self, x: Tensor) -> set[Hashable]:
        found: set[Hashable] = set()
        seen: set[Any] = set()
        pending: list[Any] = [x.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if self._mark in node.metadata:
                found.add(node.metadata[self._mark])
            else:
                pending.extend(parent for parent, _ in node.next_functions)
        return found


class EagerUntilFound:
    """Runs compiled models eagerly while a search is on.

    Compiled code has no autograd graph to follow, and a hook traced during the search would have to
    be compiled again afterwards. Nested searches share one stance, which the last one lifts.
    """

    _active = 0
    _stance: Any = None

    def __init__(self) -> None:
        self._held = True
        if EagerUntilFound._active == 0:
            EagerUntilFound._stance = torch.compiler.set_stance("force_eager")
        EagerUntilFound._active += 1

    def release(self) -> None:
        """Let compiled code run again; safe to call twice."""
        if not self._held:
            return
        self._held = False
        EagerUntilFound._active -= 1
        if EagerUntilFound._active == 0:
            EagerUntilFound._stance.__exit__(None, None, None)
            EagerUntilFound._stance = None
