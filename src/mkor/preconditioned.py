"""The wrapper: capture, reduce, update, precondition, then the base optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor.communication.uneven import notify
from mkor.coverage import Coverage
from mkor.curvature.contract import Curvature
from mkor.hybrid import LossRateSwitch
from mkor.joining import Joining
from mkor.options import Options
from mkor.preconditioner import Preconditioner
from mkor.profiling import span
from mkor.selection import Skip
from mkor.validation import (
    check_base,
    check_curvature,
    check_model,
    check_options,
    check_rates,
    check_reduce,
)
from mkor.wrapper import Wrapper

__all__ = ["Preconditioned", "WrapperOptions"]


class WrapperOptions(TypedDict, total=False):
    """The keywords that every optimizer hands on to :class:`Preconditioned` as they are."""

    skip: Skip
    skip_output: bool
    sides: str
    nonfinite: str
    hybrid: LossRateSwitch | None
    reduce: str
    process_group: Any


class Preconditioned(Wrapper, Joining):
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
        check_options(
            update_every=update_every,
            rescale=rescale,
            kl_clip=kl_clip,
            sides=sides,
            nonfinite=nonfinite,
            skip_output=skip_output,
            hybrid=hybrid,
        )
        check_reduce(reduce, curvature)
        if kl_clip is not None:
            check_rates(optimizer.param_groups)
        Wrapper.__init__(self, optimizer)
        Joining.__init__(self)
        self.curvature = curvature
        self.update_every = update_every
        self.nonfinite = nonfinite
        self.hybrid = hybrid
        self._skipped_steps = 0
        modules = skip if isinstance(skip, str | nn.Module | type) else tuple(skip)
        options = Options(
            update_every,
            rescale,
            kl_clip,
            modules,
            skip_output,
            sides,
            nonfinite,
            hybrid,
            reduce,
            process_group,
        )
        self._engage(Preconditioner(model, optimizer, curvature, options, self.close))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients in place and step the base.

        Args:
            closure: Evaluates the model and its gradients; called once, first.

        Returns:
            What the closure returned.
        """
        notify(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._preconditioner.active:
            self._step(loss)
        elif self._closed or self._may_step():
            self.base.step()
        return loss

    # Compiled code would be made anew for every number that the host counts.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _step(self, loss: Any) -> None:
        engine = self._preconditioner
        if engine.switch is not None and loss is not None:
            engine.switch.report(loss)
        with engine.full_precision():
            engine.precondition()
        engine.ledger.hide()
        with span("mkor.base_step"):
            if self._may_step():
                self.base.step()
        engine.finish_step()

    def _may_step(self) -> bool:
        if self.nonfinite == "propagate":
            return True
        finite = self._preconditioner.gradients_finite()
        self._skipped_steps += not finite
        return finite

    # ------------------------------------------------------------------------------ its own part

    @property
    def loss_scale(self) -> float | Tensor:
        """What the loss is multiplied with before the backward pass; 1 without a gradient scaler.

        Set it to ``scaler.get_scale()`` in every step. A constant scale cancels in the window, and
        in all of MKOR with it; the other curvatures have to be told.
        """
        return self._preconditioner.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float | Tensor) -> None:
        self._preconditioner.loss_scale = scale

    def close(self) -> None:
        """Take the hooks off and free the factors; the base is an ordinary optimizer again."""
        if self._closed:
            return
        self._closed = True
        self._preconditioner.close()

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
        switch = self._preconditioner.switch
        if switch is None:
            raise RuntimeError(
                "report_loss feeds the hybrid switch, which is off: pass hybrid=LossRateSwitch()"
            )
        if self._preconditioner.active:
            switch.report(loss)

    @property
    def switched_at(self) -> int | None:
        """Steps taken when the hybrid handed over to the base; None before, or without it."""
        return self._preconditioner.switched_at

    def no_capture(self) -> AbstractContextManager[None]:
        """Forward and backward passes inside this context do not count (gradient penalties).

        Returns:
            A context manager; it nests.
        """
        return self._preconditioner.gate.pause()

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned, which are not, and why.

        Returns:
            One row per parameter with rank, memory and cost; prints as a table.
        """
        return self._preconditioner.coverage()

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
        return self._preconditioner.diagnostics(self._skipped_steps)
