"""The wrapper's entries in the base's state: there for checkpoints, hidden from the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

from mkor.checkpoint import Entries, all_parameters
from mkor.step.batches import Batch

__all__ = ["Ledger"]


class Ledger:
    """Puts the entries into the base's state when somebody looks, and takes them out again.

    Bases initialise a parameter's state when it is empty, so theirs must be all they see.

    Args:
        base: The optimizer whose state they are shown in.

    Attributes:
        entries: The present ones.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self.entries = Entries([], [], {})
        # There is something to show from the first step on.
        self._begun = self._shown = self._ended = False

    def renew(self, batches: Iterable[Batch], shared: Mapping[str, Tensor]) -> None:
        """Point the entries at the batches' state, which is new or has moved.

        Args:
            batches: The layers with factors.
            shared: What every parameter's entry holds, by name.
        """
        self.hide()
        self.entries = Entries(batches, all_parameters(self._base.param_groups), shared)
        self._ended = False

    def begin(self) -> None:
        """Show the entries from now on to those who look."""
        self._begun = True

    def show(self) -> None:
        """Somebody looks at the state."""
        if self._begun and not self._ended:
            # Again, if they are there: somebody may have replaced the state since.
            self._shown = True
            self.entries.put(self._base.state)

    def hide(self) -> None:
        """The base goes to work."""
        if self._shown:
            self._shown = False
            self.entries.take(self._base.state)

    def end(
        self, batches: Iterable[Batch] = (), shared: Mapping[str, Tensor] | None = None
    ) -> None:
        """Show no entries any more, but in checkpoints those of a switched hybrid.

        Args:
            batches: The layers with released factors; none once closed.
            shared: What every parameter's entry holds, by name; None once closed.
        """
        self.hide()
        parameters = () if shared is None else all_parameters(self._base.param_groups)
        self.entries = Entries(batches, parameters, shared or {})
        self._ended = True

    @contextmanager
    def saved(self, shared: Mapping[str, Tensor]) -> Iterator[None]:
        """The entries are in the base's state, even after the switch: a checkpoint keeps them.

        Args:
            shared: What every parameter's entry holds, by name.

        Yields:
            Nothing.
        """
        hidden = self._ended and len(self.entries) > 0
        if hidden:
            self.entries.widen(all_parameters(self._base.param_groups), shared)
            self.entries.put(self._base.state)
        try:
            yield
        finally:
            if hidden:
                self.entries.take(self._base.state)
