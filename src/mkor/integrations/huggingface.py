"""For the Hugging Face Trainer (transformers 5): a factory of optimizers, and a callback.

An optimizer that you built yourself works as it is: ``Trainer(..., optimizers=(optimizer, None))``.
With Accelerate, build the wrapper first and then ``prepare`` it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mkor.hybrid import LossRateSwitch
from mkor.wrapper import Preconditioned

__all__ = ["MKORCallback", "OptimizerFactory", "optimizer_factory"]

Wrapper = Callable[..., Preconditioned]
Base = Callable[..., Optimizer]


def optimizer_factory(
    wrapper: Wrapper, args: TrainingArguments, base: Base | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """What the Trainer takes as ``optimizer_cls_and_kwargs`` to build an optimizer of this library.

    The base follows ``args``: ``optim``, ``learning_rate``, ``weight_decay`` and what belongs to
    them. Its parameter groups are the Trainer's own, without weight decay on biases and norms, so
    that the checkpoint of a run without preconditioning can be continued with it. With an 8-bit
    ``optim`` the embeddings' state has 8 bits too; the Trainer alone would make an exception.

    Example:
        >>> from mkor import MKOR
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments(learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
        >>> how = optimizer_factory(MKOR, args, rank=32)  # Trainer(optimizer_cls_and_kwargs=how)

    Args:
        wrapper: ``mkor.MKOR`` or another optimizer of the library, called with the model, the base
            and ``options``.
        args: The Trainer's.
        base: In place of ``args.optim``: called as ``base(groups, lr=args.learning_rate)``, for
            instance ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        **options: Keywords of the wrapper, for instance ``rank=32``.

    Returns:
        A class and its keywords, in the form that the Trainer asks for.

    Raises:
        TypeError: ``wrapper`` or ``base`` cannot be called.
    """
    for name, value in (("wrapper", wrapper), ("base", base)):
        if not callable(value) and (name, value) != ("base", None):
            raise TypeError(f"{name} must be a class or function, got {value!r}")
    return OptimizerFactory, {"wrapper": wrapper, "args": args, "base": base, "options": options}


class OptimizerFactory:
    """What the Trainer instantiates and calls; see :func:`optimizer_factory`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        wrapper: Wrapper,
        args: TrainingArguments,
        base: Base | None,
        options: dict[str, Any],
    ) -> Preconditioned:
        """Build the base and wrap it.

        Args:
            model: The Trainer's.
            wrapper: See :func:`optimizer_factory`.
            args: See there.
            base: See there.
            options: See there.

        Returns:
            The optimizer.
        """
        groups = _groups(model, args.weight_decay)
        if base is None:
            return wrapper(model, _base_of(args, model, groups), **options)
        return wrapper(model, base(groups, lr=args.learning_rate), **options)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    # The method reads nothing of the Trainer that it belongs to.
    decaying = set(Trainer.get_decay_parameter_names(cast("Trainer", None), model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {
            "params": [p for name, p in trained if (name in decaying) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


def _base_of(args: TrainingArguments, model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    kind, how = Trainer.get_optimizer_cls_and_kwargs(args, cast("Any", model))
    plain = isinstance(kind, type) and issubclass(kind, Optimizer)
    if not plain or how.keys() & {"params", "model", "optimizer_dict"}:
        raise ValueError(
            f"optim={str(args.optim)!r} makes its own parameter groups and cannot be the base: "
            "choose another, or give optimizer_factory a base="
        )
    return cast("Optimizer", kind(groups, **how))


class MKORCallback(TrainerCallback):
    """Logs ``diagnostics()`` beside the loss, and tells MKOR-H of the loss.

    Add it to a Trainer that exists, ``trainer.add_callback(MKORCallback(trainer))``: the figures go
    through ``trainer.log`` to every logger that the Trainer reports to. Nothing is synchronised
    between logs. The loss that the hybrid hears of is the logged one, the mean over the steps
    since the last log and over all processes; so the Trainer must log at least as often as the
    switch looks. For a bitwise equal resume let ``save_steps`` be a multiple of ``logging_steps``:
    the Trainer forgets the losses since the last log.

    Args:
        trainer: The one it is added to.
        every: Logs of the loss between logs of the diagnostics.
        layers: Whether the figures of every layer are logged, or the totals only.

    Raises:
        ValueError: ``every`` is not a positive whole number.
    """

    def __init__(self, trainer: Trainer, every: int = 1, layers: bool = False) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive whole number, got {every!r}")
        self.trainer = trainer
        self.every = every
        self.layers = layers
        self._logs = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there is something to log, and that the hybrid will hear of the loss.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: Left alone.
            **kwargs: Holds the optimizer.

        Raises:
            ValueError: The Trainer logs the loss too seldom for the hybrid.
        """
        hybrid = _hybrid(_preconditioned(kwargs["optimizer"]))
        by_steps = args.logging_strategy == "steps"
        if hybrid is not None and not (by_steps and state.logging_steps <= hybrid.every):
            how_often = f"every {state.logging_steps} steps" if by_steps else "not by steps"
            raise ValueError(
                f"the hybrid looks at the loss every {hybrid.every} steps, but the Trainer logs it "
                f"{how_often}: set logging_strategy='steps' and logging_steps={hybrid.every}, or "
                "LossRateSwitch(every=...) to the Trainer's logging_steps"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the loss, and log the figures.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: Left alone.
            **kwargs: Holds the logs and the optimizer.
        """
        logs = kwargs["logs"]
        if "loss" not in logs:  # an evaluation, the end of the training, or our own figures
            return
        optimizer = _preconditioned(kwargs["optimizer"])
        if _hybrid(optimizer) is not None:
            optimizer.report_loss(logs["loss"])
        self._logs += 1
        if self._logs % self.every == 0:
            figures = optimizer.diagnostics()
            wanted = {k: v for k, v in figures.items() if self.layers or k.startswith("mkor/")}
            self.trainer.log(wanted)


def _preconditioned(optimizer: Optimizer) -> Preconditioned:
    # Accelerate's wrapper, which the Trainer puts around ours.
    while not isinstance(optimizer, Preconditioned) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Preconditioned):
        raise TypeError(
            f"MKORCallback needs an optimizer of mkor, the Trainer's is {type(optimizer).__name__}:"
            " pass optimizers=(optimizer, None) or optimizer_cls_and_kwargs=optimizer_factory(...)"
        )
    return optimizer


def _hybrid(optimizer: Preconditioned) -> LossRateSwitch | None:
    return optimizer.hybrid
