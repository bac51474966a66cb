"""An optimizer over another: groups, state and checkpoints are the base's, factors included."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from mkor import checkpoint
from mkor.preconditioner import Preconditioner
from mkor.validation import check_rates

__all__ = ["Wrapper"]


class Wrapper(Optimizer):
    """What makes an optimizer with an engine look like its base; subclasses say how it steps.

    Args:
        base: The optimizer whose groups and state these are.

    Attributes:
        base: The wrapped optimizer.
    """

    _preconditioner: Preconditioner

    def __init__(self, base: Optimizer) -> None:
        # Torch's constructor assigns groups and state, which must not reach the base.
        self._constructed = False
        self._closed = False
        Optimizer.__init__(self, list(checkpoint.all_parameters(base.param_groups)), {})
        self.base = base
        self.defaults = dict(base.defaults)

    def _engage(self, preconditioner: Preconditioner) -> None:
        """End construction: from here on, what is assigned goes to the base.

        Args:
            preconditioner: The engine.
        """
        self._preconditioner = preconditioner
        self._constructed = True

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
            self._preconditioner.show()
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
        if self._preconditioner.options.kl_clip is not None:
            check_rates([{**self.base.defaults, **param_group}])
        self.base.add_param_group(param_group)
        if self._preconditioner.active:
            self._preconditioner.notice_new_parameters()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics captured since the last step.

        Args:
            set_to_none: Set gradients to None rather than 0.
        """
        self.base.zero_grad(set_to_none)
        # Not every pass ends in a step: a gradient scaler skips those that overflowed.
        if self._preconditioner.active:
            self._preconditioner.forget()

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
        with self._preconditioner.ledger.saved(self._preconditioner.shared):
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
            self._preconditioner.load(own)
        self._preconditioner.ledger.hide()
        self.base.load_state_dict(base_part)
        if own:
            self._preconditioner.ledger.begin()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds hooks on its model and cannot be copied or pickled: save "
            "state_dict(), build a new one on the other model, and load it there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__getstate__()
