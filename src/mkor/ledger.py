"""The wrapper's entries in the base's state: there for checkpoints, hidden from the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

from mkor.batches import Batch
from mkor.checkpoint import Entries, all_parameters

__all__ = ["Ledger"]


class Ledger:
    """Puts the entries into the base's state and takes them out again.

    Args:
        base: The optimizer whose state they are shown in.

    Attributes:
        entries: The present ones.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self.entries = Entries([], [], {})
        self._published = self._ended = False

    def renew(self, batches: Iterable[Batch], shared: Mapping[str, Tensor]) -> None:
        """Point the entries at the batches' state, which is new or has moved.

        Args:
            batches: The layers with factors.
            shared: What every parameter's entry holds, by name.
        """
        self.entries.take(self._base.state)
        self.entries = Entries(batches, all_parameters(self._base.param_groups), shared)
        self._ended = False
        if self._published:
            self.publish()

    def publish(self) -> None:
        """Show the entries from now on."""
        if not self._ended:
            self._published = True
            self.entries.put(self._base.state)

    def end(
        self, batches: Iterable[Batch] = (), shared: Mapping[str, Tensor] | None = None
    ) -> None:
        """Show no entries any more, but in checkpoints those of a switched hybrid.

        Args:
            batches: The layers with released factors; none once closed.
            shared: What every parameter's entry holds, by name; None once closed.
        """
        self.entries.take(self._base.state)
        parameters = () if shared is None else all_parameters(self._base.param_groups)
        self.entries = Entries(batches, parameters, shared or {})
        self._ended = True

    @contextmanager
    def withdrawn(self) -> Iterator[None]:
        """Bases initialise a parameter's state when it is empty, so theirs must be all they see.

        Yields:
            Nothing.
        """
        self.entries.take(self._base.state)
        try:
            yield
        finally:
            if self._published:
                self.publish()

    @contextmanager
    def shown(self, shared: Mapping[str, Tensor]) -> Iterator[None]:
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
