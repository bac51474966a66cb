"""The engine below the wrapper: capture, reduce, update, precondition; and the factors' entries."""

from __future__ import annotations

import warnings
import weakref
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor import checkpoint
from mkor.application import Stage, measure, precondition
from mkor.clipping import clip_kl, gradients_finite
from mkor.communication.communicator import Communicator
from mkor.communication.sharding import check_sharding, reshard
from mkor.communication.uneven import share_last
from mkor.concord import Concord
from mkor.coverage import Coverage, report
from mkor.curvature.contract import Curvature
from mkor.diagnostics import gather
from mkor.gate import Gate
from mkor.gradients import Gradients
from mkor.hybrid import Switch
from mkor.learning import learn
from mkor.ledger import Ledger
from mkor.options import Options, parts_of
from mkor.profiling import span
from mkor.watch import Watch

__all__ = ["Preconditioner"]


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
        communicator: The processes that train together.
        active: False once closed or switched: a step is then the base's alone.
        steps: Steps preconditioned.
        updates: Updates of the factors.
        switch: The hybrid's, if it is on.
        ledger: The factors' entries in the base's state.
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
        self.communicator = Communicator(options.process_group)
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
        self._concord = Concord(model, base, curvature, options, self.communicator)
        self._processes = self._followed = 0
        # The tensor shows the array's memory, which is written in no time.
        self._numbers = array("q", checkpoint.counters().tolist())
        self._counters = torch.frombuffer(self._numbers, dtype=torch.int64)
        self.switch = None if options.hybrid is None else Switch(options.hybrid, self.device)
        # Refused updates and raw gradients of layers that were given back to the base.
        self._refused = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.ledger = Ledger(base)
        self._watch = self._build()
        self._renew_entries()
        self._begin()
        # Distributed checkpoints take a state that is not empty for complete.
        if base.state:
            self.ledger.begin()
        shown = weakref.WeakMethod(self.ledger.show)
        self._looks = base.register_state_dict_pre_hook(partial(_call, shown))

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
        self._concord.seek(self._watch, self.steps, self.updates)
        watch, options = self._watch, self.options
        if watch.decide_outputs():
            self._renew_entries()
        due = self.steps % options.update_every == 0
        if due:
            with span("mkor.reduce"):
                watch.reduction.finish(captured=self.gate.passes.unsent)
            for batch in watch.batches:
                batch.read(watch.reduction.totals)
            watch.check_captures()
        with span("mkor.update"):
            gradients = self._update(due)
        with span("mkor.precondition"):
            stage = Stage(due, options.rescale, compare=options.kl_clip is not None)
            precondition(watch.batches, gradients, stage, watch.assignment)
            if options.kl_clip is not None:
                clip_kl(watch.batches, self._base.param_groups, options.kl_clip)
        self.steps += 1
        self.updates += due
        # Steps between updates, and steps without data, say nothing of the micro-batches.
        self._passes = self.gate.passes.most or self._passes
        # zero_grad may never be called: the model's own, or the base's, clears the gradients too.
        watch.forget()
        self._begin()
        self.ledger.begin()

    def finish_step(self) -> None:
        """Decide, after the base's step, whether it was the last one that was preconditioned."""
        if self.switch is not None and self.switch.look(self.steps, self.communicator):
            self._release()

    @torch.no_grad()
    def shadow(self) -> None:
        """Follow a forward pass of other processes, and the step that the last of them ends."""
        self._followed += 1
        if not self.active or self._followed % self._passes:
            return
        for parameter in checkpoint.all_parameters(self._base.param_groups):
            parameter.grad = None
        self._watch.forget()
        with self.full_precision():
            self.precondition()
        self.finish_step()

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(checkpoint.all_parameters(self._base.param_groups)).device

    @property
    def shares_gradients(self) -> bool:
        """Whether some processes get preconditioned gradients from others."""
        assignment = self._watch.assignment
        return assignment is not None and assignment.shares_gradients

    def share(self, last: bool) -> None:
        """Make the factors the same on all processes after some ran out of batches.

        Args:
            last: Whether this process took every step.
        """
        entries = self.ledger.entries.by_parameter.values()
        unique = {id(t): t for entry in entries for t in entry.values()}
        # Released factors are views of a single 0.
        share_last(self.communicator, [t for t in unique.values() if t.is_contiguous()], last)

    def gradients_finite(self) -> bool:
        """Whether the base may step: no gradient holds infinities or NaN, on any process."""
        parameters = checkpoint.all_parameters(self._base.param_groups)
        return gradients_finite(parameters, self.communicator)

    def forget(self) -> None:
        """Drop what was captured since the last step."""
        self._watch.forget()

    def notice_new_parameters(self) -> None:
        """Watch the layers of a group that was added since, or of parameters that were replaced.

        A part of a base may have got the group; sharding replaces parameters.
        """
        same = self.ledger.entries.belong_to(checkpoint.all_parameters(self._base.param_groups))
        if not same or self.communicator.world_size != self._processes:
            self._rebuild()

    def _update(self, due: bool) -> list[list[Gradients]]:
        batches = self._watch.batches
        gradients = measure(batches)
        for batch in batches:
            batch.check()
        if due:
            scale = 1.0 / (self.loss_scale * self.communicator.world_size)
            learn(batches, self._curvature, scale, self.updates, self._watch.assignment)
        return gradients

    def _begin(self) -> None:
        """Prepare for the passes of the next step."""
        rows = self._curvature.rows
        if rows is not None:
            # Gathered, every process's vectors are whole; else all share in each.
            sharing = 1 if self.options.reduce == "gather" else self.communicator.world_size
            rows = max(1, rows // (self._passes * sharing))
        self._watch.begin(self.updates, self.steps % self.options.update_every == 0, rows)
        # A vote on the output layers must not come before it on one process, after it on another.
        early = self._concord.early and self.gate.search is None
        self.gate.passes.on_end = self._watch.reduction.launch if early else None
        numbers = (checkpoint.VERSION, self.steps, self.updates, self._passes)
        self._numbers[:] = array("q", numbers)

    # ------------------------------------------------------------------------------------- views

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned.

        Returns:
            See :meth:`mkor.Preconditioned.coverage`.
        """
        if self.active:
            reshard(self._model)
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
        self.active = False
        self._looks.remove()
        self.ledger.end()
        self._watch.close()

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
            self.ledger.entries.check(own, names, whole=not ended)
        if not self.active:
            self.active = True
            self._watch.close()
            self._watch = self._build()
        for batch in self._watch.batches:
            batch.reset()
        if self.switch is not None:
            self.switch.reset()
        self._renew_entries()
        self.ledger.entries.copy_from(own)
        for batch in self._watch.batches:
            batch.recover()
        self._concord.end()
        self.steps, self.updates, self._passes = saved
        if ended:
            self._begin()
            self._release()
            return
        self._watch.apply_decision()
        self._renew_entries()
        self._watch.forget()
        self._begin()

    @property
    def shared(self) -> dict[str, Tensor]:
        """What every parameter's entry holds, by name."""
        hybrid = {} if self.switch is None else self.switch.entries
        return {"counters": self._counters, **hybrid}

    def _release(self) -> None:
        """Free the factors for good; keys and shapes of their entries stay, in checkpoints only."""
        self.active = False
        batches = self._watch.batches
        for batch in batches:
            batch.release()
        self.ledger.end(batches, self.shared)
        self._refused = sum((b.refused.sum(1).cpu() for b in batches), self._refused)
        self._watch.close(claim=True)

    def _build(self) -> Watch:
        check_sharding(self._model)
        reshard(self._model)
        # Processes may be initialised after the optimizer was built.
        self._processes = self.communicator.world_size
        self.gate.vectors = parts_of(self._curvature, self.options.reduce, self._processes)
        return Watch(
            self._model,
            list(checkpoint.all_parameters(self._base.param_groups)),
            self._curvature,
            self.gate,
            self.options.skip,
            self.options.skip_output,
            self.communicator,
            self.options.reduce == "gather",
            self._close,
        )

    def _rebuild(self) -> None:
        before, captured, search = self.ledger.entries, self._watch.sums(), self.gate.search
        self._watch.close()
        self._watch = self._build()
        self._watch.take_over(captured, search)
        self._renew_entries()
        self._concord.end()
        self.ledger.entries.copy_from(before.by_parameter)
        self.ledger.entries.copy_layers(before)
        # More layers may have moved the others' inverses to other processes.
        for batch in self._watch.batches:
            batch.recover()
        self._watch.apply_decision()
        self._renew_entries()
        self._begin()

    def _renew_entries(self) -> None:
        self.ledger.renew(self._watch.batches, self.shared)


def _call(method: weakref.WeakMethod[Callable[[], None]], _: Optimizer) -> None:
    """Call a method of something that may be gone."""
    found = method()
    if found is not None:
        found()
