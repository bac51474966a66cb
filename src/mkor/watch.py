"""A model under watch: which layers are hooked, where their sums go, which are outputs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from mkor import graphs
from mkor.capture.gate import Gate
from mkor.capture.hidden import HiddenHook
from mkor.capture.hooks import AccumulationHook, ForwardHook, InertHook
from mkor.capture.output_layer import EagerUntilFound, OutputSearch
from mkor.capture.site import Site
from mkor.communication.communicator import Communicator
from mkor.communication.reduction import Reduction
from mkor.curvature.contract import Curvature
from mkor.selection import Layer, Skip, select
from mkor.step.layout import allocate
from mkor.step.renewal import assignment_for

__all__ = ["Watch"]

PATIENCE = 10
"""Steps without a capture before the device is asked whether compiled code captured any."""

_watches: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watch]] = weakref.WeakKeyDictionary()


class Watch:
    """Hooks on the layers of a model, and the batches their statistics go to.

    Args:
        model: The model.
        parameters: The base optimizer's.
        curvature: The kind of factor.
        gate: Shared by the hooks.
        skip: What the user leaves to the base.
        skip_output: Whether the layers next to the loss are left to the base.
        communicator: The processes that train together.
        gather: Whether every process contributes vectors of its own.
        close: Closes the owner of this watch, if it lives, when another takes its layers over.

    Attributes:
        selection: What was chosen in the model.
        batches: The preconditioned layers by shape.
        ticks: On each of their devices, the number of updates so far.
        reduction: Their sums, by this process and by all.
        assignment: Who inverts what for others; None where every process inverts all it needs.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        curvature: Curvature,
        gate: Gate,
        skip: Skip,
        skip_output: bool,
        communicator: Communicator,
        gather: bool,
        close: weakref.WeakMethod[Callable[[], None]],
    ) -> None:
        self.gate = gate
        self._skip_output = skip_output
        self._communicator = communicator
        self._handles: list[Any] = []
        self._eager: EagerUntilFound | None = None
        self._silent = 0
        self._just_decided = False
        self.selection = select(model, parameters, skip)
        chosen = [layer for layer in self.selection.layers if not layer.reason]
        self.assignment = assignment_for(curvature, communicator)
        self.batches, buffers = allocate(chosen, curvature, gate, self.assignment)
        self.ticks = list(dict.fromkeys(batch.tick for batch in self.batches))
        self.reduction = Reduction(buffers, communicator, gather)
        self._close_owner = close
        self._closed = False
        self._claim()
        if not chosen:
            warnings.warn(
                "no layer of this model is preconditioned; print(optimizer.coverage()) says why",
                stacklevel=5,
            )
        elif skip_output:
            gate.search = OutputSearch()
            self._eager = EagerUntilFound()
        # Else compiled code is shared with models of the same class that have no hooks.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self._install()
        self._finalizer = weakref.finalize(self, _release, self._handles, gate, self._eager)

    @property
    def capturing(self) -> bool:
        """Whether a step that is taken now is captured in a CUDA graph."""
        return any(graphs.is_capturing(tick) for tick in self.ticks)

    def count(self, updates: int) -> None:
        """Tell the devices how many updates there were, where they cannot know.

        Args:
            updates: So far.
        """
        for tick in self.ticks:
            tick.fill_(updates)

    def advance(self) -> None:
        """Count an update on the devices themselves, for replays of a CUDA graph count there."""
        for tick in self.ticks:
            tick.add_(1)

    def forget(self) -> None:
        """Drop what was captured since the last step."""
        self.gate.forget()
        self.reduction.clear()
        for batch in self.batches:
            batch.tray.drop()

    def sums(self) -> dict[str, list[Tensor]]:
        """What was captured since the last step.

        Returns:
            Sums by layer.
        """
        self.reduction.recall()
        return {
            layer.name: [site.a, site.g, site.meta]
            for batch in self.batches
            for layer, site in zip(batch.layers, batch.sites, strict=True)
        }

    def take_over(self, sums: dict[str, list[Tensor]], search: OutputSearch | None) -> None:
        """Go on with what another watch of the model captured in the passes of this step.

        Args:
            sums: By layer; layers may have come, gone, or got other weights since.
            search: Its search for the output layers, if that was still on.
        """
        for name, mine in self.sums().items():
            for new, old in zip(mine, sums.get(name, ()), strict=False):
                if new.shape == old.shape:
                    new.copy_(old)
        if self.gate.search is not None and search is not None:
            self.gate.search = search

    def begin(self, updates: int, wanted: bool, rows: int | None) -> None:
        """Prepare the hooks for the passes of the next step.

        Args:
            updates: Updates so far.
            wanted: Whether the step takes an update.
            rows: Rows per vector and micro-batch; None for all.
        """
        self.gate.begin(updates, rows)
        for batch in self.batches:
            if wanted:
                batch.plan(self.gate.now)
        self.gate.want(wanted)

    def check_captures(self) -> None:
        """Notice hooks that never run, without asking the device in every step.

        Raises:
            RuntimeError: Several steps had gradients, but nothing was captured.
        """
        if self._silent < 0 or not self.gate.passes.most:
            return
        if self.gate.calls:
            # The search ran eagerly, so it says nothing of what compiled code captures.
            self._silent = 0 if self._just_decided else -1
            self._just_decided = False
            return
        self._silent += 1
        if self._silent < PATIENCE:
            return
        if any(bool(batch.meta.any()) for batch in self.batches):
            self._silent = -1
            return
        raise RuntimeError(
            f"{PATIENCE} updates had gradients but not one layer's hook ran: wrap the optimizer "
            "before the first call of a compiled model, or of another of its class (or call "
            "torch.compiler.reset() and compile again), and do not remove the model's forward hooks"
        )

    def decide_outputs(self) -> bool:
        """Find the output layers once a backward pass has run, the same on all processes.

        Returns:
            Whether they were found just now.
        """
        search = self.gate.search
        if search is None:
            return False
        names = [layer.name for layer in self.selection.layers]
        outputs = search.outputs()
        votes = [[float(name in search.reached), float(name in outputs)] for name in names]
        reached, output = self._communicator.sum_small(torch.tensor(votes, device="cpu")).T.tolist()
        if not any(reached):
            return False
        # Unanimous among the processes that used the layer.
        seen = {n for n, r in zip(names, reached, strict=True) if r}
        decided = {n for n, r, o in zip(names, reached, output, strict=True) if r == o > 0}
        for batch in self.batches:
            before = batch.state["output"].tolist()
            flags = [
                int(layer.name in decided) if layer.name in seen else max(0, known)
                for layer, known in zip(batch.layers, before, strict=True)
            ]
            batch.state["output"].copy_(torch.tensor(flags, device="cpu"))
        self._just_decided = True
        self.apply_decision()
        return True

    def apply_decision(self) -> None:
        """Act on the decision recorded in the batches' state, if there is one."""
        flags = [batch.state["output"].tolist() for batch in self.batches]
        if not flags or any(flag < 0 for group in flags for flag in group):
            return
        for batch, group in zip(self.batches, flags, strict=True):
            batch.leave([self._skip_output and bool(flag) for flag in group])
        if all(all(batch.skipped) for batch in self.batches):
            warnings.warn(
                "no layer of this model is preconditioned: all that could be are next to the "
                "loss; pass skip_output=False to include them",
                stacklevel=5,
            )
        self._end_search()
        self._install()

    def close(self, claim: bool = False) -> None:
        """Take the hooks off and free the factors.

        Args:
            claim: Whether the layers still belong to the owner, who has switched to its base.
        """
        self._closed = not claim
        self._finalizer.detach()
        _release(self._handles, self.gate, None)
        self._end_search()
        self.batches, self.ticks = [], []
        self.reduction = Reduction([], self._communicator, gather=False)

    def _claim(self) -> None:
        """Be the only watch of these layers."""
        chosen = (layer for layer in self.selection.layers if not layer.reason)
        for module in (m for layer in chosen for m in layer.modules):
            reference = _watches.get(module)
            other = None if reference is None else reference()
            mine = other is None or other is self or other._closed
            close = None if other is None or mine else other._close_owner()
            if close is not None:
                warnings.warn(
                    "another wrapper already watches this model; it is closed and the new one "
                    "takes over",
                    stacklevel=6,
                )
                close()
            _watches[module] = weakref.ref(self)

    def _install(self) -> None:
        _remove(self._handles)
        sites = {
            layer.name: site
            for batch in self.batches
            for layer, site, skipped in zip(batch.layers, batch.sites, batch.skipped, strict=True)
            if not skipped
        }
        for layer in self.selection.layers:
            site = sites.get(layer.name)
            if site is None and self.gate.search is None:
                continue
            for module in layer.modules:
                self._hook(module, self._hook_of(layer, site))
            if site is not None and layer.weight.requires_grad:
                counter = AccumulationHook(self.gate, layer.name, site.sharded)
                self._handles.append(layer.weight.register_post_accumulate_grad_hook(counter))
        if self.gate.search is not None:
            for name, module in self.selection.others.items():
                self._hook(module, ForwardHook(self.gate, name, None))

    def _hook_of(self, layer: Layer, site: Site | None) -> InertHook:
        if layer.role.hidden:
            return HiddenHook(self.gate, layer, site, last=layer.role.name == "out_proj")
        return ForwardHook(self.gate, layer.name, site)

    def _hook(self, module: nn.Module, hook: Any) -> None:
        # fully_shard's own hook takes the whole weights away, by which products are recognised.
        first = isinstance(hook, HiddenHook)
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
        self._handles.append(handle)

    def _end_search(self) -> None:
        self.gate.search = None
        if self._eager is not None:
            self._eager.release()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _release(handles: list[Any], gate: Gate, eager: EagerUntilFound | None) -> None:
    _remove(handles)
    gate.want(False)
    gate.search = None
    gate.passes.on_end = None
    if eager is not None:
        eager.release()
