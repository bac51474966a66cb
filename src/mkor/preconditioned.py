"""The wrapper: capture, reduce, update, precondition, then the base optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor import checkpoint
from mkor.capture import Gate
from mkor.communication import Communicator
from mkor.coverage import Coverage, report
from mkor.curvature.contract import Curvature
from mkor.diagnostics import gather
from mkor.profiling import span
from mkor.selection import Skip
from mkor.validation import check_base, check_curvature, check_model, check_options
from mkor.watch import Watch

__all__ = ["Preconditioned"]


class Preconditioned(Optimizer):
    """Wraps an optimizer: it steps on gradients that a curvature has preconditioned.

    From construction on it is an ordinary ``torch.optim.Optimizer``. ``state`` and ``param_groups``
    are the base's own, so schedulers and checkpoints work on either; after the first step
    ``state[weight]`` also holds the weight's factors under names that begin with ``mkor_``.

    Args:
        model: The model whose layers are watched. Hooks are installed at once: wrap before the
            first call of a compiled model.
        optimizer: The base. Must hold at least one of the model's parameters.
        curvature: The kind of factor, for instance ``mkor.Window()``.
        update_every: Steps between updates of the factors.
        rescale: What gives the preconditioned gradient its length: ``"running"``, the ratio of
            running averages of the norms before and after; ``"step"``, of the norms in this step
            (the paper, Algorithm 1, lines 9-10); None leaves it.
        skip: Modules, module types and ``fnmatch`` patterns on module names to leave to the base.
        skip_output: Leave the layers next to the loss to the base. They are found in the first
            backward pass, which therefore runs compiled models eagerly.
        sides: The sides in use: ``"both"``, ``"left"`` (outputs) or ``"right"`` (inputs).
        nonfinite: ``"propagate"`` steps on non-finite gradients as PyTorch does; ``"skip"`` leaves
            weights and base state alone in such a step, at the price of one synchronisation a step.
        process_group: For the sum of statistics; None for the default group.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        curvature: Curvature,
        *,
        update_every: int = 1,
        rescale: str | None = "running",
        skip: Skip = (),
        skip_output: bool = True,
        sides: str = "both",
        nonfinite: str = "propagate",
        process_group: Any = None,
    ) -> None:
        check_model(model)
        check_base(model, optimizer, Preconditioned)
        check_curvature(curvature)
        check_options(update_every, rescale, sides, nonfinite, skip_output)
        self._constructed = False
        super().__init__(list(checkpoint.all_parameters(optimizer.param_groups)), {})
        self.base = optimizer
        self.defaults = dict(optimizer.defaults)
        self._constructed = True

        self.curvature = curvature
        self.update_every = update_every
        self.rescale = rescale
        self.nonfinite = nonfinite
        self.loss_scale: float | Tensor = 1.0
        self._model = model
        self._skip = skip if isinstance(skip, str | nn.Module | type) else tuple(skip)
        self._skip_output = skip_output
        self._communicator = Communicator(process_group)
        self._gate = Gate(
            curvature.vectors, curvature.rows, left=sides != "right", right=sides != "left"
        )
        self._steps = self._updates = self._skipped_steps = 0
        self._passes = 1
        self._counters = checkpoint.counters()
        self._published = False
        self._closed = False
        self._watch, self._entries = self._build()
        self._begin()
        # Distributed checkpoints take a state that is not empty for complete.
        if self.base.state:
            self._publish()

    # ---------------------------------------------------------------- an optimizer like any other

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._constructed:
            self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state, with the factors of preconditioned weights after the first step."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._constructed:
            self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base; layers that become trainable thereby get factors.

        Args:
            param_group: As for the base optimizer.
        """
        if not self._constructed:
            return
        self.base.add_param_group(param_group)
        if not self._closed:
            self._notice_new_parameters()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients in place and step the base.

        Args:
            closure: Evaluates the model and its gradients; called once, first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._closed:
            self.base.step()
            return loss
        self._precondition()
        if self.nonfinite == "skip" and not self._gradients_finite():
            self._skipped_steps += 1
        else:
            with self._own_entries_out(), span("mkor.base_step"):
                self.base.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics captured since the last step.

        Args:
            set_to_none: Set gradients to None rather than 0.
        """
        self.base.zero_grad(set_to_none)
        self._watch.forget()

    def state_dict(self) -> dict[str, Any]:
        """The base's state and the factors, in torch's format.

        Returns:
            ``state`` and ``param_groups`` only; loads with ``torch.load(weights_only=True)``.
        """
        packed = super().state_dict()
        packed["state"] = checkpoint.materialized(packed["state"])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint of this optimizer, or of the base alone.

        A checkpoint without factors restores the base; the factors then start anew.

        Args:
            state_dict: From :meth:`state_dict`, keyed by numbers or names.

        Raises:
            ValueError: It was written by a newer version, for another model or with other settings.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        base_part, own = checkpoint.split(state_dict, self.param_groups)
        if not self._closed:
            self._load_factors(own)
        with self._own_entries_out():
            self.base.load_state_dict(base_part)
        if own and not self._closed:
            self._publish()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds hooks on its model and cannot be copied or pickled: save "
            "state_dict(), build a new one on the other model, and load it there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__getstate__()

    # ------------------------------------------------------------------------------ its own part

    def close(self) -> None:
        """Take the hooks off and free the factors; the base is an ordinary optimizer again."""
        if self._closed:
            return
        self._entries.take(self.base.state)
        self._closed = True
        self._watch.close()
        self._entries = checkpoint.Entries([], [], self._counters)

    def no_capture(self) -> AbstractContextManager[None]:
        """Forward and backward passes inside this context do not count (gradient penalties).

        Returns:
            A context manager; it nests.
        """
        return self._gate.pause()

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned, which are not, and why.

        Returns:
            One row per parameter with rank, memory and cost; prints as a table.
        """
        if not self._closed:
            self._notice_new_parameters()
        searching = self._gate.search is not None
        watch = self._watch
        return report(self._model, watch.selection, watch.batches, searching, self.param_groups)

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step, for any logger. Synchronises the device; free when not called.

        Per preconditioned layer, as ``layer/figure``: ``cosine`` between raw and preconditioned
        gradient, measured from the step after the first call on (at the price of a copy of each
        gradient); ``norm_ratio``, the length after over before preconditioning, without
        rescaling; each side's figures (for windows ``left_lambda``, ``left_effective_rank``, ...).
        Counted from construction on: ``refused_updates``, dropped because a batch was not finite,
        and ``raw_gradients``, preconditioned gradients that were not finite and gave way to the
        raw ones. Totals are under ``mkor/``.

        Returns:
            Names and numbers.
        """
        steps = {"steps": self._steps, "updates": self._updates}
        return gather(self._watch.batches, steps | {"skipped_steps": self._skipped_steps})

    # ------------------------------------------------------------------------------------ phases

    def _precondition(self) -> None:
        self._notice_new_parameters()
        watch = self._watch
        if watch.decide_outputs():
            self._renew_entries()
        due = self._steps % self.update_every == 0
        if due:
            watch.check_captures()
            with span("mkor.reduce"):
                self._communicator.sum(watch.buffers)
        with span("mkor.update"):
            self._update(due)
        with span("mkor.precondition"):
            for batch in watch.batches:
                batch.precondition(due, self.rescale)
        self._steps += 1
        self._updates += due
        # Steps between updates, and steps without data, say nothing of the micro-batches.
        self._passes = self._gate.passes.most or self._passes
        watch.forget()
        self._begin()
        self._publish()

    def _update(self, due: bool) -> None:
        batches = self._watch.batches
        bad = [batch.measure() for batch in batches]
        if not (due and bad):
            return
        refuse = torch.stack([flag.to(bad[0].device) for flag in bad]).any()
        scale = 1.0 / (self.loss_scale * self._communicator.world_size)
        for batch in batches:
            batch.update(refuse.to(batch.shape.device), scale)

    def _begin(self) -> None:
        """Prepare for the passes of the next step."""
        rows = self.curvature.rows
        if rows is not None:
            rows = max(1, rows // (self._passes * self._communicator.world_size))
        self._watch.begin(self._updates, self._steps % self.update_every == 0, rows)
        numbers = (checkpoint.VERSION, self._steps, self._updates, self._passes)
        self._counters.copy_(torch.tensor(numbers, device="cpu"))

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for p in checkpoint.all_parameters(self.param_groups)]
        present = [g._values() if g.is_sparse else g for g in gradients if g is not None]
        norms = torch._foreach_norm(present) if present else ()
        return all(bool(norm.isfinite()) for norm in norms)

    # ------------------------------------------------------------------ layers and their entries

    def _build(self) -> tuple[Watch, checkpoint.Entries]:
        parameters = list(checkpoint.all_parameters(self.param_groups))
        watch = Watch(
            self._model,
            parameters,
            self.curvature,
            self._gate,
            self._skip,
            self._skip_output,
            self._communicator,
            self.close,
        )
        return watch, checkpoint.Entries(watch.batches, parameters, self._counters)

    def _notice_new_parameters(self) -> None:
        """A part of a combined base may have got a group of its own."""
        if len(set(checkpoint.all_parameters(self.param_groups))) != len(self._entries):
            self._rebuild()

    def _rebuild(self) -> None:
        before = self._entries
        before.take(self.base.state)
        self._watch.close()
        self._watch, self._entries = self._build()
        self._entries.copy_from(before.by_parameter)
        self._watch.apply_decision()
        self._renew_entries()
        self._begin()

    def _renew_entries(self) -> None:
        """Point the entries at the batches' state again after it moved."""
        self._entries.take(self.base.state)
        parameters = checkpoint.all_parameters(self.param_groups)
        self._entries = checkpoint.Entries(self._watch.batches, parameters, self._counters)
        if self._published:
            self._publish()

    def _load_factors(self, own: dict[Tensor, dict[str, Any]]) -> None:
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        saved = checkpoint.read_counters(own)
        if own:
            self._entries.check(own, names)
        for batch in self._watch.batches:
            batch.reset()
        self._renew_entries()
        self._entries.copy_from(own)
        self._steps, self._updates, self._passes = saved
        self._watch.apply_decision()
        self._renew_entries()
        self._watch.forget()
        self._begin()

    def _publish(self) -> None:
        self._published = True
        self._entries.put(self.base.state)

    @contextmanager
    def _own_entries_out(self) -> Iterator[None]:
        """Bases initialise a parameter's state when it is empty, so theirs must be all they see."""
        self._entries.take(self.base.state)
        try:
            yield
        finally:
            if self._published and not self._closed:
                self._entries.put(self.base.state)
