"""The engine below the wrapper: capture, reduce, update, precondition; and the factors' entries."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor import checkpoint
from mkor.capture import Gate
from mkor.clipping import clip_kl
from mkor.communication import Communicator
from mkor.coverage import Coverage, report
from mkor.curvature.contract import Curvature
from mkor.diagnostics import gather
from mkor.hybrid import LossRateSwitch, Switch
from mkor.profiling import span
from mkor.selection import Skip
from mkor.watch import Watch

__all__ = ["Options", "Preconditioner"]


@dataclass(frozen=True)
class Options:
    """The wrapper's keywords; see :class:`mkor.Preconditioned`."""

    update_every: int
    rescale: str | None
    kl_clip: float | None
    skip: Skip
    skip_output: bool
    sides: str
    hybrid: LossRateSwitch | None
    process_group: Any


class Preconditioner:
    """Turns the gradients of a model into preconditioned ones, in place.

    Args:
        model: The model whose layers are watched.
        base: The optimizer that steps on the gradients.
        curvature: The kind of factor.
        options: The wrapper's keywords.
        close: Closes the wrapper when another takes the model over; held weakly.

    Attributes:
        options: The wrapper's keywords.
        gate: Shared by the hooks.
        loss_scale: What the loss was multiplied with in the backward passes.
        active: False once closed or switched: a step is then the base's alone.
        steps: Steps preconditioned.
        updates: Updates of the factors.
        switch: The hybrid's, if it is on.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        curvature: Curvature,
        options: Options,
        close: Callable[[], None],
    ) -> None:
        self.options = options
        self.active = True
        self.gate = Gate(
            curvature.vectors,
            curvature.rows,
            left=options.sides != "right",
            right=options.sides != "left",
            covariance=curvature.covariance,
        )
        self.loss_scale: float | Tensor = 1.0
        self.steps = self.updates = 0
        self._passes = 1
        self._model, self._base, self._curvature = model, base, curvature
        # A wrapper that is dropped must be freed at once, hooks and all.
        self._close = weakref.WeakMethod(close)
        self._communicator = Communicator(options.process_group)
        self._counters = checkpoint.counters()
        device = next(checkpoint.all_parameters(base.param_groups)).device
        self.switch = None if options.hybrid is None else Switch(options.hybrid, device)
        self._published = False
        # Refused updates and raw gradients of layers that were given back to the base.
        self._refused = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._watch, self._entries = self._build()
        self._begin()
        # Distributed checkpoints take a state that is not empty for complete.
        if base.state:
            self._publish()

    # ------------------------------------------------------------------------------------ phases

    def full_precision(self) -> ExitStack:
        """Autocast off, for the engine's own products, in a step taken inside it.

        Returns:
            A context manager.
        """
        stack = ExitStack()
        for kind in {batch.shape.device.type for batch in self._watch.batches}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def precondition(self) -> None:
        """Learn from the passes since the last step, and precondition their gradients."""
        self.notice_new_parameters()
        watch, options = self._watch, self.options
        if watch.decide_outputs():
            self._renew_entries()
        due = self.steps % options.update_every == 0
        if due:
            watch.check_captures()
            with span("mkor.reduce"):
                self._communicator.sum(watch.buffers)
        with span("mkor.update"):
            self._update(due)
        with span("mkor.precondition"):
            for batch in watch.batches:
                batch.precondition(due, options.rescale, options.kl_clip is not None)
            if options.kl_clip is not None:
                clip_kl(watch.batches, self._base.param_groups, options.kl_clip)
        self.steps += 1
        self.updates += due
        # Steps between updates, and steps without data, say nothing of the micro-batches.
        self._passes = self.gate.passes.most or self._passes
        watch.forget()
        self._begin()
        self._publish()

    def finish_step(self) -> None:
        """Decide, after the base's step, whether it was the last one that was preconditioned."""
        if self.switch is not None and self.switch.look(self.steps, self._communicator):
            self._release()

    def forget(self) -> None:
        """Drop what was captured since the last step."""
        self._watch.forget()

    def notice_new_parameters(self) -> None:
        """Watch the layers of a group that was added since; a part of a base may have got one."""
        if len(set(checkpoint.all_parameters(self._base.param_groups))) != len(self._entries):
            self._rebuild()

    def _update(self, due: bool) -> None:
        batches = self._watch.batches
        bad = [batch.measure() for batch in batches]
        if not (due and bad):
            return
        refuse = torch.stack([flag.to(bad[0].device) for flag in bad]).any()
        scale = 1.0 / (self.loss_scale * self._communicator.world_size)
        for batch in batches:
            batch.update(refuse.to(batch.shape.device), scale, self.updates)

    def _begin(self) -> None:
        """Prepare for the passes of the next step."""
        rows = self._curvature.rows
        if rows is not None:
            rows = max(1, rows // (self._passes * self._communicator.world_size))
        self._watch.begin(self.updates, self.steps % self.options.update_every == 0, rows)
        numbers = (checkpoint.VERSION, self.steps, self.updates, self._passes)
        self._counters.copy_(torch.tensor(numbers, device="cpu"))

    # ------------------------------------------------------------------------------------- views

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned.

        Returns:
            See :meth:`mkor.Preconditioned.coverage`.
        """
        if self.active:
            self.notice_new_parameters()
        watch, groups = self._watch, self._base.param_groups
        ended = "the wrapper is closed"
        if self.switched_at is not None:
            ended = f"left to the base since step {self.switched_at} (hybrid)"
        searching = self.gate.search is not None
        return report(self._model, watch.selection, watch.batches, searching, groups, ended)

    def diagnostics(self, skipped_steps: int) -> dict[str, float]:
        """Figures of the last step.

        Args:
            skipped_steps: Counted by the wrapper.

        Returns:
            See :meth:`mkor.Preconditioned.diagnostics`.
        """
        counters = {"steps": self.steps, "updates": self.updates, "skipped_steps": skipped_steps}
        if self.switch is not None:
            counters["switched"] = int(self.switched_at is not None)
        return gather(self._watch.batches, counters, self._refused)

    @property
    def switched_at(self) -> int | None:
        """Steps taken when the base went on alone; None before, or without the hybrid."""
        return None if self.switch is None else self.switch.switched_at

    # ------------------------------------------------------------------ layers and their entries

    def close(self) -> None:
        """Take the hooks off and free the factors."""
        self._entries.take(self._base.state)
        self.active = False
        self._watch.close()
        self._entries = checkpoint.Entries([], [], {})

    def load(self, own: dict[Tensor, dict[str, Any]]) -> None:
        """Continue with the factors of a checkpoint, before or after the switch.

        Args:
            own: The wrapper's part of it; empty to start anew.
        """
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        saved = checkpoint.read_counters(own)
        ended = self.switch is not None and self.switch.ended_in(own)
        if self.switched_at is not None and not own:
            warnings.warn(
                "the checkpoint says nothing of the hybrid's switch: preconditioning starts anew "
                "(flattened checkpoints must be loaded into an optimizer that has not switched)",
                stacklevel=4,
            )
        if own:
            self._entries.check(own, names, whole=not ended)
        if not self.active:
            self.active = True
            self._watch.close()
            self._watch, self._entries = self._build()
        for batch in self._watch.batches:
            batch.reset()
        if self.switch is not None:
            self.switch.reset()
        self._renew_entries()
        self._entries.copy_from(own)
        self.steps, self.updates, self._passes = saved
        if ended:
            self._begin()
            self._release()
            return
        self._watch.apply_decision()
        self._renew_entries()
        self._watch.forget()
        self._begin()

    def published(self) -> None:
        """Show the entries in the base's state from now on."""
        if self.active:
            self._publish()

    @contextmanager
    def withdrawn(self) -> Iterator[None]:
        """Bases initialise a parameter's state when it is empty, so theirs must be all they see.

        Yields:
            Nothing.
        """
        self._entries.take(self._base.state)
        try:
            yield
        finally:
            if self._published and self.active:
                self._entries.put(self._base.state)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The entries are in the base's state, even after the switch: a checkpoint keeps them.

        Yields:
            Nothing.
        """
        switched = self.switched_at is not None and len(self._entries)
        if switched:
            parameters = checkpoint.all_parameters(self._base.param_groups)
            self._entries.widen(parameters, self._shared)
            self._entries.put(self._base.state)
        try:
            yield
        finally:
            if switched:
                self._entries.take(self._base.state)

    def _release(self) -> None:
        """Free the factors for good; keys and shapes of their entries stay, in checkpoints only."""
        self._entries.take(self._base.state)
        self.active = False
        batches = self._watch.batches
        for batch in batches:
            batch.release()
        self._entries = self._entries_of(batches)
        self._refused = sum((b.refused.sum(1).cpu() for b in batches), self._refused)
        self._watch.close(claim=True)

    def _build(self) -> tuple[Watch, checkpoint.Entries]:
        watch = Watch(
            self._model,
            list(checkpoint.all_parameters(self._base.param_groups)),
            self._curvature,
            self.gate,
            self.options.skip,
            self.options.skip_output,
            self._communicator,
            self._close,
        )
        return watch, self._entries_of(watch.batches)

    @property
    def _shared(self) -> dict[str, Tensor]:
        hybrid = {} if self.switch is None else self.switch.entries
        return {"counters": self._counters, **hybrid}

    def _entries_of(self, batches: list[Any]) -> checkpoint.Entries:
        parameters = checkpoint.all_parameters(self._base.param_groups)
        return checkpoint.Entries(batches, parameters, self._shared)

    def _rebuild(self) -> None:
        before = self._entries
        before.take(self._base.state)
        self._watch.close()
        self._watch, self._entries = self._build()
        self._entries.copy_from(before.by_parameter)
        self._watch.apply_decision()
        self._renew_entries()
        self._begin()

    def _renew_entries(self) -> None:
        """Point the entries at the batches' state again after it moved."""
        self._entries.take(self._base.state)
        self._entries = self._entries_of(self._watch.batches)
        if self._published:
            self._publish()

    def _publish(self) -> None:
        self._published = True
        self._entries.put(self._base.state)
