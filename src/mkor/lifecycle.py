"""Which layers are watched, and the life of their factors: made, loaded, rebuilt, released."""

from __future__ import annotations

import warnings
import weakref
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor import checkpoint, graphs
from mkor.capture.gate import Gate
from mkor.communication.communicator import Communicator
from mkor.communication.sharding import check_sharding, reshard
from mkor.concord import Concord
from mkor.curvature.contract import Curvature, Inverting
from mkor.hybrid import Switch
from mkor.ledger import Ledger
from mkor.options import Options, parts_of
from mkor.step.batches import by_roster
from mkor.watch import Watch

__all__ = ["Lifecycle"]


class Lifecycle:
    """An engine's layers and factors, from construction until it is closed or switches.

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
        # Asking a protocol whether an object follows it takes long, for every step too long.
        self._inverting = curvature if isinstance(curvature, Inverting) else None
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
        shown = weakref.WeakMethod(self.show)
        self._looks = base.register_state_dict_pre_hook(partial(_call, shown))

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(checkpoint.all_parameters(self._base.param_groups)).device

    @property
    def switched_at(self) -> int | None:
        """Steps taken when the base went on alone; None before, or without the hybrid."""
        return None if self.switch is None else self.switch.switched_at

    def notice_new_parameters(self) -> None:
        """Watch the layers of a group that was added since, or of parameters that were replaced.

        A part of a base may have got the group; sharding replaces parameters.
        """
        same = self.ledger.entries.belong_to(checkpoint.all_parameters(self._base.param_groups))
        if same and self.communicator.world_size == self._processes:
            return
        if self._watch.capturing:
            graphs.refuse("parameters came or were replaced: take a step outside of it first")
        self.catch_up()
        self._rebuild()

    def show(self) -> None:
        """Somebody looks at the base's state."""
        self.catch_up()
        self.ledger.show()

    def catch_up(self) -> None:
        """Count the steps that a CUDA graph repeated; waits for the device, if there is one."""
        if not self.gate.captured or not self._watch.ticks or self._watch.capturing:
            return
        # A captured step is an update.
        repeated = int(self._watch.ticks[0]) - self.updates
        self.steps += repeated
        self.updates += repeated
        self._note()

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
        for roster, group in by_roster(self._watch.batches):
            roster.reset()
            for batch in group:
                batch.reset()
        if self.switch is not None:
            self.switch.reset()
        self._renew_entries()
        self.ledger.entries.copy_from(own)
        for batch in self._watch.batches:
            batch.recover()
        self._concord.end()
        self.steps, self.updates, self._passes = saved
        self._recount()
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
        self._recount()
        self._begin()

    def _renew_entries(self) -> None:
        self.ledger.renew(self._watch.batches, self.shared)

    def _recount(self) -> None:
        """Let the devices count on from here; the factors of older graphs are not these."""
        self.gate.captured = False
        self._watch.count(self.updates)

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
        self._note()

    def _note(self) -> None:
        numbers = (checkpoint.VERSION, self.steps, self.updates, self._passes)
        self._numbers[:] = array("q", numbers)


def _call(method: weakref.WeakMethod[Callable[[], None]], _: Optimizer) -> None:
    """Call a method of something that may be gone."""
    found = method()
    if found is not None:
        found()
