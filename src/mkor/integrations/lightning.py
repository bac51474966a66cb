"""Lightning 2: a callback that logs the optimizer's figures and feeds the hybrid switch.

The optimizer itself needs none of it: return ``MKOR(self, base)`` from ``configure_optimizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from mkor.wrapper import Preconditioned

__all__ = ["MKORCallback"]


class MKORCallback(Callback):
    """Logs ``diagnostics()``, tells MKOR-H of the losses, and removes a gradient scaler's scale.

    Lightning hands ``step`` a closure whose loss the switch hears by itself; the callback reports
    the others: of accumulated micro-batches, under a gradient scaler, and in manual optimisation,
    where ``training_step`` must return it. With ``precision="16-mixed"`` it keeps the optimizer's
    ``loss_scale`` equal to the scaler's.

    Example:
        >>> from mkor.integrations.lightning import MKORCallback
        >>> callback = MKORCallback(every=100)  # Trainer(callbacks=[callback])

    Args:
        every: Steps between entries in the log.
        layers: Whether the figures of every layer are logged, or the totals only.

    Raises:
        ValueError: ``every`` is not a positive whole number.
    """

    def __init__(self, every: int = 50, layers: bool = False) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive whole number, got {every!r}")
        self.every = every
        self.layers = layers
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to log.

        Args:
            trainer: Lightning's.
            pl_module: The model.

        Raises:
            TypeError: No optimizer is of this library.
        """
        if not _wrappers(trainer):
            kinds = ", ".join(type(o).__name__ for o in trainer.optimizers)
            raise TypeError(
                f"MKORCallback needs an optimizer of mkor, the trainer's are {kinds}: return "
                "MKOR(self, base) from configure_optimizers"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how many steps were taken.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            batch: Not looked at.
            batch_idx: Not looked at.
        """
        self._steps = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Tell the optimizer what the loss was multiplied with.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            optimizer: About to step.
        """
        scaler = _scaler(trainer)
        if scaler is not None and isinstance(optimizer, Preconditioned):
            optimizer.loss_scale = scaler.get_scale()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Report the loss where no closure did, and log.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            outputs: Of ``training_step``.
            batch: Not looked at.
            batch_idx: Not looked at.
        """
        stepped = trainer.global_step > self._steps
        heard = stepped and pl_module.automatic_optimization and _scaler(trainer) is None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None and not heard:
            for optimizer in _wrappers(trainer):
                if optimizer.hybrid is not None:
                    optimizer.report_loss(loss)
        if trainer.global_step // self.every > self._steps // self.every:
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        if not (trainer.loggers and trainer.is_global_zero):
            return
        wrappers = _wrappers(trainer)
        figures: dict[str, float] = {}
        for i, optimizer in enumerate(wrappers):
            prefix = f"{i}/" if len(wrappers) > 1 else ""
            for name, value in optimizer.diagnostics().items():
                if self.layers or name.startswith("mkor/"):
                    figures[prefix + name] = value
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)


def _wrappers(trainer: Trainer) -> list[Preconditioned]:
    return [o for o in trainer.optimizers if isinstance(o, Preconditioned)]


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
