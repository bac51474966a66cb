"""The engine below the wrapper: one step from top to bottom, and the life of what it steps with."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor import checkpoint, report
from mkor._torch import full_precision, refuse_capture, span
from mkor._warn import warn
from mkor.capture.buffer import StatisticsBuffer
from mkor.capture.passes import BackwardPasses, CaptureContext
from mkor.checkpoint import StateEntries, all_parameters
from mkor.curvature.base import Curvature, Inverting
from mkor.distributed.agreement import check_agreement
from mkor.distributed.communicator import Communicator
from mkor.distributed.fsdp import check_sharding, reshard
from mkor.hybrid import Switch
from mkor.options import Options, check_parameters, vectors_per_process
from mkor.step.groups import LayerGroup, measure
from mkor.step.precondition import clip_kl, gradients_finite, precondition
from mkor.step.table import Rescaling
from mkor.step.update import update_factors
from mkor.watched import WatchedModel


class Engine:
    """Turns the gradients of a model into preconditioned ones, in place.

    Args:
        model: The model whose layers are watched.
        base: The optimizer that steps on the gradients.
        curvature: The kind of factor.
        options: The wrapper's keywords.
        close: Closes the wrapper when another takes the model over; held weakly.

    Attributes:
        options: The wrapper's keywords.
        curvature: The kind of factor.
        active: False once closed or switched: a step is then the base's alone.
        steps: Steps preconditioned.
        updates: Updates of the factors.
        loss_scale: What the loss was multiplied with in the backward passes.
        skipped_steps: Steps of the base that were left out, with ``nonfinite="skip"``.
        communicator: The processes that train together.
        context: Shared by the hooks.
        watched: What depends on the model's present parameters.
        entries: The factors' entries in the base's state.
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
        self.options, self.curvature = options, curvature
        self.active = True
        self.steps = self.updates = self.skipped_steps = 0
        self.loss_scale: float | Tensor = 1.0
        self.communicator = Communicator(options.process_group)
        captured = options.sides != "left", options.sides != "right"
        passes = BackwardPasses(StatisticsBuffer(self.communicator, gather=False))
        self.context = CaptureContext(passes, captured, curvature.covariance)
        self._model, self._base = model, base
        # Backward passes, micro-batches, of the last step; processes; passes followed in a Join.
        self._passes, self._world, self._followed = 1, 1, 0
        # Whether the processes agree since anything changed, and may send sums before the step.
        self._agreed = self._one_pass = False
        # Whether a step was captured in a CUDA graph: the device then counts updates by itself.
        self._used_cuda_graph = False
        # A wrapper that is dropped must be freed at once, hooks and all.
        self._close = weakref.WeakMethod(close)
        # The tensor shares memory with the array, so writing needs no operator.
        self._numbers = array("q", checkpoint.counters().tolist())
        self._counters = torch.frombuffer(self._numbers, dtype=torch.int64)
        self.switch = None if options.hybrid is None else Switch(options.hybrid, self.device)
        # Refused updates and raw gradients of layers that were given back to the base.
        self._refused = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.entries = StateEntries(base)
        self.watched = self._watch()
        self._renew_entries()
        self._begin()
        # Distributed checkpoints take a state that is not empty for complete.
        if base.state:
            self.entries.begin()
        publish = weakref.WeakMethod(self.publish)
        self._state_hook = base.register_state_dict_pre_hook(partial(_call, publish))

    # ------------------------------------------------------------------------------------- one step

    @torch.no_grad()
    def step(self, loss: Any = None) -> None:
        """Learn from the passes since the last step, and precondition their gradients."""
        if self.switch is not None and loss is not None:
            self.switch.report(loss)
        with full_precision({table.device.type for table in self.watched.tables}):
            in_graph = self._prepare()
            watched, options, passes = self.watched, self.options, self.context.passes
            due = self.steps % options.update_every == 0
            totals = []
            if due:
                with span("mkor.reduce"):
                    watched.buffer.finish(captured=passes.unsent)
                    totals = watched.totals()
                if not in_graph:
                    watched.check_captures()
            with span("mkor.measure"):
                gradients = measure(watched.tables, watched.groups)
            if due:
                with span("mkor.update"):
                    scale = 1.0 / (self.loss_scale * self.communicator.world_size)
                    how = (self.curvature, scale, self.updates, watched.assignment)
                    update_factors(totals, watched.groups, *how)
            with span("mkor.precondition"):
                precondition(
                    watched.tables,
                    gradients,
                    self.curvature,
                    Rescaling(options.rescale, self.curvature.momentum),
                    due=due,
                    compare=options.kl_clip is not None,
                    assignment=watched.assignment,
                )
                if options.kl_clip is not None:
                    groups = self._base.param_groups
                    clip_kl(watched.tables, gradients, groups, options.kl_clip)
            self._count(due, in_graph)
            # zero_grad may never be called: the model's own, or the base's, clears gradients too.
            watched.drop_captures()
            self._begin()
            self.entries.begin()
        self.entries.withdraw()

    def finish_step(self) -> None:
        """Decide, after the base's step, whether it was the last one that was preconditioned."""
        if self.switch is not None and self.switch.evaluate(self.steps, self.communicator):
            self._release()

    def _prepare(self) -> bool:
        """See what has changed since the last step; whether this one goes into a CUDA graph."""
        in_graph = self.watched.in_cuda_graph
        if in_graph:
            self._check_cuda_graph()
        else:
            self._catch_up()
        self.rebuild_if_parameters_changed()
        self._agree()
        if self.watched.decide_outputs():
            self._renew_entries()
        return in_graph

    def _count(self, due: bool, in_graph: bool) -> None:
        """Count a step; one in a CUDA graph counts on the device alone, whenever it is repeated."""
        if due:
            self.watched.advance()
        if in_graph:
            self._used_cuda_graph = True
            return
        self.steps += 1
        self.updates += due
        # Steps between updates, and steps without data, say nothing of the micro-batches.
        self._passes = self.context.passes.most or self._passes

    def _begin(self) -> None:
        """Prepare for the passes of the next step."""
        rows = self.curvature.rows
        if rows is not None:
            # Gathered, every process's vectors are whole; else all share in each.
            gathers = self.options.reduce == "gather"
            sharing = 1 if gathers else self.communicator.world_size
            rows = max(1, rows // (self._passes * sharing))
        wanted = self.steps % self.options.update_every == 0
        self.watched.begin(wanted, rows, self._used_cuda_graph)
        # A vote on the output layers must not come before it on one process, after it on another.
        early = self._agreed and self._one_pass and self.context.search is None
        self.context.passes.early = early
        self._note()

    def _note(self) -> None:
        numbers = (checkpoint.VERSION, self.steps, self.updates, self._passes)
        self._numbers[:] = array("q", numbers)

    def _agree(self) -> None:
        """Compare how all processes are set up, unless nothing changed since; a collective call."""
        if self._agreed:
            return
        check_parameters(self._model, self._base.param_groups)
        if self.communicator.world_size == 1:
            self._agreed = True
            return
        facts = {
            "curvature": repr(self.curvature),
            "base": type(self._base).__name__,
            "taken": f"{self.steps} steps and {self.updates} updates",
            "factors": _fingerprint(self.watched.groups, self.curvature, self.updates),
            **self.options.facts(),
            **self.watched.selection.facts(),
        }
        check_agreement(self.communicator, facts)
        mine = self.context.passes
        passes = self.communicator.gather_objects((mine.synchronised, mine.most > 0))
        # A first step without passes says nothing of the next ones'.
        self._agreed = self.steps > 0 or any(seen for _, seen in passes)
        self._one_pass = all(count == 1 for count, _ in passes)

    def change(self, **options: Any) -> None:
        """Change options that may change while training, from the next step on."""
        self.options = replace(self.options, **options)
        self._agreed = False
        if self.active:
            self._begin()

    # ------------------------------------------------------------------------------- CUDA graphs

    def _catch_up(self) -> None:
        """Count the steps that a CUDA graph repeated; waits for the device, if there is one."""
        watched = self.watched
        if not self._used_cuda_graph or not watched.selections or watched.in_cuda_graph:
            return
        # A captured step is an update.
        repeated = int(watched.selections[0].update) - self.updates
        self.steps += repeated
        self.updates += repeated
        self._note()

    def _check_cuda_graph(self) -> None:
        """Refuse to be captured where a replay would need what the host decides."""
        options, passes = self.options, self.context.passes.most
        if options.update_every > 1:
            refuse_capture("some steps update the factors, others do not: use update_every=1")
        if self.switch is not None:
            refuse_capture("hybrid= decides on the host when the base goes on alone: leave it out")
        if options.nonfinite == "skip":
            refuse_capture('nonfinite="skip" waits for the device: use nonfinite="propagate"')
        if isinstance(self.curvature, Inverting) and self.curvature.inverse_every > 1:
            refuse_capture("some updates renew the inverses, others do not: use inverse_every=1")
        if not self.communicator.capturable:
            refuse_capture("the processes do not communicate through NCCL: use its backend")
        if not self._agreed or self.context.search is not None:
            refuse_capture(
                "the optimizer is new, or was changed, and has to take steps of its own first: "
                "train for some outside of it, as torch's recipe does"
            )
        if passes and passes != self._passes:
            refuse_capture(
                f"it has {passes} backward passes, the step before had {self._passes}, and their "
                "rows are chosen accordingly: let the steps before be like it"
            )

    # ---------------------------------------------------------------------- made, changed, released

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(all_parameters(self._base.param_groups)).device

    @property
    def switched_at(self) -> int | None:
        """Steps taken when the base went on alone; None before, or without the hybrid."""
        return None if self.switch is None else self.switch.switched_at

    @property
    def shared_entries(self) -> dict[str, Tensor]:
        """What every parameter's entry holds, by name."""
        hybrid = {} if self.switch is None else self.switch.entries
        return {"counters": self._counters, **hybrid}

    @property
    def buffer_bytes(self) -> int:
        """Memory beside the factors: where a step's sums are captured."""
        return sum(flat.nbytes for flat in self.watched.buffer.flats)

    def rebuild_if_parameters_changed(self) -> None:
        """Watch the layers of a group that was added since, or of parameters that were replaced.

        A part of a base may have got the group; sharding replaces parameters.
        """
        same = self.entries.belong_to(all_parameters(self._base.param_groups))
        if same and self.communicator.world_size == self._world:
            return
        if self.watched.in_cuda_graph:
            refuse_capture("parameters came or were replaced: take a step outside of it first")
        self._catch_up()
        before, sums, search = self.entries.snapshot(), self.watched.sums(), self.context.search
        self.watched.close()
        self.watched = self._watch()
        self.watched.take_over(sums, search)
        self._renew_entries()
        self._agreed = False
        self.entries.take_over(before)
        # More layers may have moved the others' inverses to other processes.
        self.watched.recover()
        self.watched.apply_decision()
        self._renew_entries()
        self._recount()
        self._begin()

    def publish(self) -> None:
        """The base's state is about to be read: the entries have to be there."""
        self._catch_up()
        self.entries.publish()

    def drop_captures(self) -> None:
        """Drop what was captured since the last step."""
        self.watched.drop_captures()

    def close(self) -> None:
        """Take the hooks off and free the factors."""
        self.active = False
        self._state_hook.remove()
        self.entries.end()
        self.watched.close()

    def load(self, own: dict[Tensor, dict[str, Any]]) -> None:
        """Go on with the factors of a checkpoint, of a switched hybrid too; empty to start anew."""
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        saved = checkpoint.read_counters(own)
        ended = self.switch is not None and self.switch.ended_in(own)
        if self.switched_at is not None and not own:
            warn(
                "the checkpoint says nothing of the hybrid's switch: preconditioning starts anew "
                "(flattened checkpoints must be loaded into an optimizer that has not switched)"
            )
        if own:
            self.entries.check(own, names, whole=not ended)
        if not self.active:
            self.active = True
            self.watched.close()
            self.watched = self._watch()
        self.watched.reset_factors()
        if self.switch is not None:
            self.switch.reset()
        self._renew_entries()
        self.entries.copy_from(own)
        self.watched.recover()
        self._agreed = False
        self.steps, self.updates, self._passes = saved
        self._recount()
        if ended:
            self._begin()
            self._release()
            return
        self.watched.apply_decision()
        self._renew_entries()
        self.watched.drop_captures()
        self._begin()

    def _watch(self) -> WatchedModel:
        check_sharding(self._model)
        reshard(self._model)
        # Processes may be initialised after the optimizer was built.
        self._world, options = self.communicator.world_size, self.options
        return WatchedModel(
            self._model,
            list(all_parameters(self._base.param_groups)),
            self.curvature,
            self.context,
            vectors_per_process(self.curvature, options.reduce, self._world),
            options.sides,
            options.skip,
            options.skip_output,
            self.communicator,
            options.reduce == "gather",
            self._close,
        )

    def _release(self) -> None:
        """Free the factors for good; keys and shapes of their entries stay, in checkpoints only."""
        self.active = False
        for group in self.watched.groups:
            group.release(joined=True)
        self.entries.end(self.watched.groups, self.shared_entries)
        for table in self.watched.tables:
            self._refused += table.refused.sum(1).cpu()
        self.watched.close(claim=True)

    def _renew_entries(self) -> None:
        self.entries.renew(self.watched.groups, self.shared_entries)

    def _recount(self) -> None:
        """Let the devices count on from here; the factors of older graphs are not these."""
        self._used_cuda_graph = False
        self.watched.count(self.updates)

    # ------------------------------------------------------------ processes that run out of batches

    @property
    def shares_gradients(self) -> bool:
        """Whether some processes get preconditioned gradients from others."""
        assignment = self.watched.assignment
        return assignment is not None and assignment.shares_gradients

    @torch.no_grad()
    def join_step(self) -> None:
        """Follow a forward pass of other processes, and the step that the last of them ends."""
        self._followed += 1
        if not self.active or self._followed % self._passes:
            return
        for parameter in all_parameters(self._base.param_groups):
            parameter.grad = None
        self.watched.drop_captures()
        self.step()
        self.finish_step()

    def share_factors(self, last: bool) -> None:
        """Give all processes the factors of one that took every step; ``last``: this one did."""
        unique = {id(t): t for entry in self.entries.by_parameter.values() for t in entry.values()}
        votes = torch.zeros(self.communicator.world_size, device="cpu")
        votes[self.communicator.rank] = float(last)
        source = int(self.communicator.sum_small(votes).argmax())
        # Released factors are views of a single 0.
        tensors = [t for t in unique.values() if t.is_contiguous()]
        self.communicator.broadcast(tensors, source)

    def may_step(self) -> bool:
        """Whether the base is to step, or a non-finite gradient, on any process, is skipped."""
        if self.options.nonfinite == "propagate":
            return True
        parameters = all_parameters(self._base.param_groups)
        finite = gradients_finite(parameters, self.communicator)
        self.skipped_steps += not finite
        return finite

    # -------------------------------------------------------------------------------------- reports

    def coverage(self) -> report.Coverage:
        """See :meth:`mkor.Preconditioned.coverage`."""
        if self.active:
            reshard(self._model)
            self.rebuild_if_parameters_changed()
        ended = "the wrapper is closed"
        if self.switched_at is not None:
            ended = f"left to the base since step {self.switched_at} (hybrid)"
        watched, searching = self.watched, self.context.search is not None
        return report.coverage(
            self._model,
            watched.selection,
            watched.groups,
            self.curvature,
            self._base.param_groups,
            searching=searching,
            ended=ended,
        )

    def diagnostics(self) -> dict[str, float]:
        """See :meth:`mkor.Preconditioned.diagnostics`."""
        self._catch_up()
        counters = {
            "steps": self.steps,
            "updates": self.updates,
            "skipped_steps": self.skipped_steps,
        }
        if self.switch is not None:
            counters["switched"] = int(self.switched_at is not None)
        # A graph that repeats a step measures what that step measured.
        watch, watched = not self._used_cuda_graph, self.watched
        return report.diagnostics(
            watched.tables, watched.groups, self.curvature, counters, self._refused, watch=watch
        )


def _fingerprint(groups: list[LayerGroup], curvature: Curvature, updates: int) -> str:
    """What distinguishes factors of one checkpoint from another's; inverses that follow apart."""
    if not updates:
        return "of a new optimizer"
    total = 0.0
    for group in groups:
        apart: set[int] = set()
        if isinstance(curvature, Inverting):
            inverses, status = curvature.results(group.state)
            apart = {id(tensor) for tensor in (*inverses, *status)}
        kept = [tensor for tensor in group.state.values() if id(tensor) not in apart]
        total += torch.stack([t.sum(dtype=torch.float64) for t in kept]).sum().item()
    # Threads add in different orders.
    return f"with the checksum {total:.6e}"


def _call(method: weakref.WeakMethod[Callable[[], None]], _: Optimizer) -> None:
    """Call a method of something that may be gone."""
    found = method()
    if found is not None:
        found()
