"""The engine below the wrapper: what a step does with what was captured."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from mkor import checkpoint, graphs
from mkor.communication.sharding import reshard
from mkor.communication.uneven import share_last
from mkor.coverage import Coverage, report
from mkor.diagnostics import gather
from mkor.lifecycle import Lifecycle
from mkor.profiling import span
from mkor.step.application import Stage, measure, precondition
from mkor.step.clipping import clip_kl, gradients_finite
from mkor.step.learning import learn

__all__ = ["Preconditioner"]


class Preconditioner(Lifecycle):
    """Turns the gradients of a model into preconditioned ones, in place."""

    def full_precision(self) -> ExitStack:
        """Autocast off, for the engine's own products, in a step taken inside it.

        Returns:
            A context manager.
        """
        stack = ExitStack()
        if not torch._C._is_any_autocast_enabled():
            return stack
        for kind in {batch.shape.device.type for batch in self._watch.batches}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def precondition(self) -> None:
        """Learn from the passes since the last step, and precondition their gradients."""
        captured = self._watch.capturing
        if captured:
            self._check_capture()
        else:
            self.catch_up()
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
            if not captured:
                watch.check_captures()
        with span("mkor.measure"):
            gradients = measure(watch.batches)
        if due:
            with span("mkor.update"):
                scale = 1.0 / (self.loss_scale * self.communicator.world_size)
                learn(watch.batches, scale, self.updates, self._inverting, watch.assignment)
        with span("mkor.precondition"):
            stage = Stage(due, options.rescale, compare=options.kl_clip is not None)
            precondition(gradients, stage, watch.assignment)
            if options.kl_clip is not None:
                clip_kl(watch.batches, self._base.param_groups, options.kl_clip)
        self._count(due, captured)
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

    @property
    def buffer_bytes(self) -> int:
        """Memory beside the factors: where a step's sums are captured."""
        return sum(buffer.nbytes for buffer in self._watch.reduction.buffers)

    def _count(self, due: bool, captured: bool) -> None:
        """Count a step, one that is captured on the device only: it is taken in replays."""
        if due:
            self._watch.advance()
        if captured:
            self.gate.captured = True
            return
        self.steps += 1
        self.updates += due
        # Steps between updates, and steps without data, say nothing of the micro-batches.
        self._passes = self.gate.passes.most or self._passes

    def _check_capture(self) -> None:
        """Refuse what the host decides in each step anew, since replays repeat one decision."""
        options, passes = self.options, self.gate.passes.most
        if options.update_every > 1:
            graphs.refuse("some steps update the factors, others do not: use update_every=1")
        if self.switch is not None:
            graphs.refuse("hybrid= decides on the host when the base goes on alone: leave it out")
        if options.nonfinite == "skip":
            graphs.refuse('nonfinite="skip" waits for the device: use nonfinite="propagate"')
        if self._inverting is not None and not all(map(self._inverting.due, (0, 1))):
            graphs.refuse("some updates renew the inverses, others do not: use inverse_every=1")
        if not self.communicator.capturable:
            graphs.refuse("the processes do not communicate through NCCL: use its backend")
        if not self._concord.reached or self.gate.search is not None:
            graphs.refuse(
                "the optimizer is new, or was changed, and has to take steps of its own first: "
                "train for some outside of it, as torch's recipe does"
            )
        if passes and passes != self._passes:
            graphs.refuse(
                f"it has {passes} backward passes, the step before had {self._passes}, and their "
                "rows are chosen accordingly: let the steps before be like it"
            )

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
        self.catch_up()
        counters = {"steps": self.steps, "updates": self.updates, "skipped_steps": skipped_steps}
        if self.switch is not None:
            counters["switched"] = int(self.switched_at is not None)
        # A graph that repeats a step measures what that step measured.
        watch = not self.gate.captured
        return gather(self._watch.batches, counters, self._refused, watch=watch)
