"""The wrapper: an optimizer over another, whose groups, state and checkpoints are the base's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from mkor import checkpoint
from mkor._torch import span
from mkor.curvature.base import Curvature
from mkor.engine import Engine
from mkor.hybrid import LossRateSwitch
from mkor.layers.selection import Skip
from mkor.options import (
    Options,
    check_base,
    check_choice,
    check_curvature,
    check_model,
    check_rates,
    check_update_every,
)
from mkor.report import Coverage


class Preconditioned(Optimizer, Joinable):
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
        kl_clip: In place of ``rescale``, one factor for all preconditioned gradients ``P``:
            ``min(1, sqrt(kl_clip / |sum lr^2 <P, M>|))`` (KAISA's and Eva's); None for none.
        skip: Modules, module types and ``fnmatch`` patterns on module names to leave to the base.
        skip_output: Leave the layers next to the loss to the base. They are found in the first
            backward pass, which therefore runs compiled models eagerly.
        sides: The sides in use: ``"both"``, ``"left"`` (outputs) or ``"right"`` (inputs).
        nonfinite: ``"propagate"`` steps on non-finite gradients as PyTorch does; ``"skip"`` leaves
            weights and base state alone in such a step, at the price of one synchronisation a step.
        hybrid: A :class:`mkor.LossRateSwitch` to go on with the base alone, for good, when the loss
            no longer falls fast (MKOR-H); None never does. It hears of the loss from ``step``'s
            closure or :meth:`report_loss`.
        reduce: How processes share an update's vectors: ``"mean"``, all average their rows into
            each, ``m`` rows in all; ``"gather"``, each contributes whole vectors of ``m`` rows,
            ``ceil(k / W)`` of them.
        process_group: Whose processes train together; None for the default group. Statistics
            travel in a group of their own with the same processes.

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
        kl_clip: float | None = None,
        skip: Skip = (),
        skip_output: bool = True,
        sides: str = "both",
        nonfinite: str = "propagate",
        hybrid: LossRateSwitch | None = None,
        reduce: str = "mean",
        process_group: Any = None,
    ) -> None:
        check_model(model)
        check_base(model, optimizer, Preconditioned)
        check_curvature(curvature)
        options = Options(
            update_every,
            rescale,
            kl_clip,
            skip if isinstance(skip, str | nn.Module | type) else tuple(skip),
            skip_output,
            sides,
            nonfinite,
            hybrid,
            reduce,
            process_group,
        )
        options.check(curvature)
        if kl_clip is not None:
            check_rates(optimizer.param_groups)
        # Torch's constructor assigns groups and state, which must not reach the base.
        self._constructed = self._closed = False
        Optimizer.__init__(self, list(checkpoint.all_parameters(optimizer.param_groups)), {})
        Joinable.__init__(self)
        self.base = optimizer
        self.defaults = dict(optimizer.defaults)
        self._engine = Engine(model, optimizer, curvature, options, self.close)
        self._constructed = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients in place and step the base.

        Args:
            closure: Evaluates the model and its gradients; called once, first.

        Returns:
            What the closure returned.
        """
        Join.notify_join_context(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(loss)
        return loss

    # Compiled code would be made anew for every number that the host counts.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self, loss: Any) -> None:
        engine = self._engine
        preconditions = engine.active
        if preconditions:
            engine.step(loss)
        with span("mkor.base_step"):
            if self._closed or engine.may_step():
                self.base.step()
        if preconditions:
            engine.finish_step()

    # ------------------------------------------------------------------- an optimizer like its base

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
        if self._constructed:
            self._engine.publish()
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
        if self._engine.options.kl_clip is not None:
            check_rates([{**self.base.defaults, **param_group}])
        self.base.add_param_group(param_group)
        if self._engine.active:
            self._engine.rebuild_if_parameters_changed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics captured since the last step.

        Args:
            set_to_none: Set gradients to None rather than 0.
        """
        self.base.zero_grad(set_to_none)
        # Not every pass ends in a step: a gradient scaler skips those that overflowed.
        if self._engine.active:
            self._engine.drop_captures()

    def train(self) -> None:
        """Put a schedule-free base into its training mode; another base has no modes."""
        self._set_mode("train")

    def eval(self) -> None:
        """Put a schedule-free base into its evaluation mode; another base has no modes."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        change = getattr(self.base, mode, None)
        if change is not None:
            change()

    def state_dict(self) -> dict[str, Any]:
        """The base's state and the factors, in torch's format.

        Returns:
            ``state`` and ``param_groups`` only; loads with ``torch.load(weights_only=True)``.
        """
        with self._engine.entries.saved(self._engine.shared_entries):
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
            self._engine.load(own)
        self._engine.entries.withdraw()
        self.base.load_state_dict(base_part)
        if own:
            self._engine.entries.begin()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds hooks on its model and cannot be copied or pickled: save "
            "state_dict(), build a new one on the other model, and load it there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__getstate__()

    # --------------------------------------------------------------------------------- its own part

    @property
    def loss_scale(self) -> float | Tensor:
        """What the loss is multiplied with before the backward pass; 1 without a gradient scaler.

        Set it to ``scaler.get_scale()`` in every step. A constant scale cancels in the window, and
        in all of MKOR with it; the other curvatures have to be told.
        """
        return self._engine.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float | Tensor) -> None:
        self._engine.loss_scale = scale

    def close(self) -> None:
        """Take the hooks off and free the factors; the base is an ordinary optimizer again."""
        if self._closed:
            return
        self._closed = True
        self._engine.close()

    def report_loss(self, loss: float | Tensor) -> None:
        """Tell the hybrid switch of a loss, where :meth:`step` gets no closure.

        Call it after each backward pass, on every process with its own loss. It does not
        synchronise the device; the losses are averaged over steps and processes when the switch
        looks at them. Losses that are not finite do not count; after the switch none does.

        Args:
            loss: A number, or a tensor with one; it may require gradients.

        Raises:
            RuntimeError: There is no switch to tell.
            TypeError: ``loss`` is no number.
        """
        switch = self._engine.switch
        if switch is None:
            raise RuntimeError(
                "report_loss feeds the hybrid switch, which is off: pass hybrid=LossRateSwitch()"
            )
        if self._engine.active:
            switch.report(loss)

    @property
    def switched_at(self) -> int | None:
        """Steps taken when the hybrid handed over to the base; None before, or without it."""
        return self._engine.switched_at

    def no_capture(self) -> AbstractContextManager[None]:
        """Forward and backward passes inside this context do not count (gradient penalties).

        Returns:
            A context manager; it nests.
        """
        return self._engine.context.pause()

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned, which are not, and why.

        Returns:
            One row per parameter with rank, memory and cost; prints as a table.
        """
        return self._engine.coverage()

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step, for any logger. Synchronises the device; free when not called.

        Per preconditioned layer, as ``layer/figure``: ``cosine`` between raw and preconditioned
        gradient, measured from the step after the first call on (at the price of a copy of each
        gradient); ``norm_ratio``, the length after over before preconditioning, without
        rescaling; each side's figures (for windows ``left_lambda``, ``left_effective_rank``, ...).
        Counted from construction on: ``refused_updates``, dropped because a batch was not finite,
        and ``raw_gradients``, preconditioned gradients that were not finite and gave way to the
        raw ones. Totals are under ``mkor/``; with ``hybrid``, ``mkor/switched`` is 0 or 1.

        Returns:
            Names and numbers.
        """
        return self._engine.diagnostics()

    @property
    def curvature(self) -> Curvature:
        """The kind of factor."""
        return self._engine.curvature

    @property
    def hybrid(self) -> LossRateSwitch | None:
        """The rule of the hybrid; None without."""
        return self._engine.options.hybrid

    @property
    def update_every(self) -> int:
        """Steps between updates of the factors; may be changed at any time."""
        return self._engine.options.update_every

    @update_every.setter
    def update_every(self, steps: int) -> None:
        check_update_every(steps)
        self._engine.change(update_every=steps)

    @property
    def nonfinite(self) -> str:
        """``"propagate"`` or ``"skip"``; may be changed at any time."""
        return self._engine.options.nonfinite

    @nonfinite.setter
    def nonfinite(self, how: str) -> None:
        check_choice("nonfinite", how, "propagate", "skip")
        self._engine.change(nonfinite=how)

    # ------------------------------------------------------ processes that run out of batches early

    def join_hook(self, **_: Any) -> JoinHook:
        """For ``torch.distributed.algorithms.Join([ddp, optimizer])``.

        Returns:
            What this process does once it has no more batches.

        Raises:
            ValueError: Others would need it to precondition gradients, which it does not get then.
        """
        if self._engine.shares_gradients:
            raise ValueError(
                "Join needs grad_worker_fraction=1.0: with less, some layers are preconditioned by "
                "one process for others, which it cannot do once it has run out of batches"
            )
        return _JoinHook(self._engine)

    @property
    def join_device(self) -> torch.device:
        """Where the first parameter is."""
        return self._engine.device

    @property
    def join_process_group(self) -> Any:
        """The processes that train together."""
        return self._engine.communicator.parent


class _JoinHook(JoinHook):
    """What a process without batches does while others go on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def main_hook(self) -> None:
        """Follow one step of the others."""
        self._engine.join_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Make all processes alike again."""
        self._engine.share_factors(is_last_joiner)
