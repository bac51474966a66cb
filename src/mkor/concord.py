"""Processes that train together make sure, before they rely on it, that they are set up alike."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from mkor import native
from mkor.communication.agreement import check_agreement
from mkor.communication.communicator import Communicator
from mkor.curvature.contract import Curvature
from mkor.options import Options
from mkor.step.batches import fingerprint
from mkor.validation import check_parameters
from mkor.watch import Watch

__all__ = ["Concord"]


class Concord:
    """Whether model and optimizer were compared, with each other and over the processes.

    Args:
        model: The model whose layers are watched.
        base: The optimizer that steps.
        curvature: The kind of factor.
        options: The wrapper's keywords.
        communicator: The processes.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        curvature: Curvature,
        options: Options,
        communicator: Communicator,
    ) -> None:
        self._model, self._base, self._curvature = model, base, curvature
        self._options, self._communicator = options, communicator
        self._reached = self._one_pass = False

    @property
    def early(self) -> bool:
        """Whether sums may travel before the step: each has one pass to send them after."""
        return self._reached and self._one_pass

    @property
    def reached(self) -> bool:
        """Whether a step was taken since anything changed."""
        return self._reached

    def end(self) -> None:
        """Something changed, so it has to be sought again."""
        self._reached = False

    def seek(self, watch: Watch, steps: int, updates: int) -> None:
        """Compare, unless nothing changed since; every process must call it in the same step.

        Args:
            watch: The layers, and the passes of this step.
            steps: Taken so far.
            updates: Taken so far.
        """
        if self._reached:
            return
        check_parameters(self._model, self._base.param_groups)
        if self._communicator.world_size == 1:
            self._reached = True
            return
        facts = {
            "curvature": repr(self._curvature),
            "base": type(self._base).__name__,
            "taken": f"{steps} steps and {updates} updates",
            "kernels": _kernels(watch),
            "factors": fingerprint(watch.batches, updates),
            **self._options.facts(),
            **watch.selection.facts(),
        }
        check_agreement(self._communicator, facts)
        mine = watch.gate.passes
        passes = self._communicator.gather_objects((mine.synchronised, mine.most > 0))
        # A first step without passes says nothing of the next ones'.
        self._reached = steps > 0 or any(seen for _, seen in passes)
        self._one_pass = all(count == 1 for count, _ in passes)


def _kernels(watch: Watch) -> str:
    """Who does the small things on a CPU: all compute the same, but round differently."""
    if all(batch.shape.device.type != "cpu" for batch in watch.batches):
        return "not needed"
    version = native.version()
    if version is None:
        return "not compiled, or switched off"
    return f"compiled for {version} (MKOR_NATIVE asks for another version)"
