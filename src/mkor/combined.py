"""Several optimizers as one base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer


class Combined(Optimizer):
    """Steps several optimizers, each on its own parameters, as if they were one.

    Torch's Muon takes matrices only; give it those and AdamW the rest::

        hidden = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        base = Combined(torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-4))

    The parameter groups are the parts' own, one part after the other, so a scheduler moves every
    group's learning rate in proportion. The parts share one state.

    Args:
        optimizers: Two or more optimizers over different parameters.

    Raises:
        TypeError: An argument is not a torch optimizer.
        ValueError: There are fewer than two, or a parameter is in two of them.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"Combined takes torch optimizers, got {type(optimizer).__name__}: write "
                    "Combined(first, second)"
                )
        if len(optimizers) < 2:
            raise ValueError(f"Combined takes two optimizers or more, got {len(optimizers)}")
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("a parameter is in two of the optimizers: give each parameter to one")
        self._constructed = False
        super().__init__(parameters, {})
        self.optimizers = optimizers
        self.defaults = dict(optimizers[0].defaults)
        self._constructed = True
        self._share_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parts' groups, one part after the other."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._constructed:
            return
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            optimizer.param_groups, groups = groups[:count], groups[count:]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the group belongs to one of the parts.

        Args:
            param_group: Parameters and options.

        Raises:
            TypeError: Always, once constructed.
        """
        if self._constructed:
            raise TypeError(
                "Combined cannot know which optimizer gets the group: call "
                "combined.optimizers[i].add_param_group(...)"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every part.

        Args:
            closure: Evaluates the model and its gradients; called once, first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def train(self) -> None:
        """Put schedule-free parts into their training mode."""
        self._set_mode("train")

    def eval(self) -> None:
        """Put schedule-free parts into their evaluation mode."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        for optimizer in self.optimizers:
            change = getattr(optimizer, mode, None)
            if change is not None:
                change()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the same parts in the same order.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            ValueError: It has another number of parameter groups.
        """
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(groups)} parameter groups, this optimizer has "
                f"{len(self.param_groups)}: build it from the same parts"
            )
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            mine, groups = groups[:count], groups[count:]
            keys = {key for group in mine for key in group["params"]}
            state = {key: entry for key, entry in state_dict["state"].items() if key in keys}
            optimizer.load_state_dict({"state": state, "param_groups": mine})
        self._share_state()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "Combined cannot be copied or pickled: save state_dict(), build a new one, and load it "
            "there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__getstate__()

    def _share_state(self) -> None:
        shared: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            shared.update(optimizer.state)
        for optimizer in self.optimizers:
            optimizer.state = shared
        self.state = shared
