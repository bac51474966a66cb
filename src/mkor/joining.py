"""Processes that run out of batches before others: what the optimizer tells torch's ``Join``."""

from __future__ import annotations

from typing import Any

import torch

from mkor.communication.uneven import Joinable, Shadow
from mkor.preconditioner import Preconditioner

__all__ = ["Joining"]


class Joining(Joinable):
    """What makes an optimizer with an engine fit for ``Join([ddp, optimizer])``."""

    _preconditioner: Preconditioner

    def join_hook(self, **_: Any) -> Shadow:
        """For ``torch.distributed.algorithms.Join([ddp, optimizer])``.

        Returns:
            What this process does once it has no more batches.

        Raises:
            ValueError: Others would need it to precondition gradients, which it does not get then.
        """
        if self._preconditioner.shares_gradients:
            raise ValueError(
                "Join needs grad_worker_fraction=1.0: with less, some layers are preconditioned by "
                "one process for others, which it cannot do once it has run out of batches"
            )
        return Shadow(self._preconditioner.shadow, self._preconditioner.share)

    @property
    def join_device(self) -> torch.device:
        """Where the first parameter is."""
        return self._preconditioner.device

    @property
    def join_process_group(self) -> Any:
        """The processes that train together."""
        return self._preconditioner.communicator.parent
