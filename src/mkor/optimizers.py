"""The optimizers: each picks its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mkor.curvature.window import Window
from mkor.preconditioned import Preconditioned
from mkor.selection import Skip

__all__ = ["MKOR"]


class MKOR(Preconditioned):
    """Second-order steps from a window of mean vectors, over any base optimizer.

    Each layer's gradient ``M [d_out, d_in]`` becomes ``L^-1 M R^-1`` with factors built from the
    newest ``rank`` mean vectors of its inputs and output gradients. Beside the base's step that
    costs ``8 rank d_out d_in`` operations and ``rank (d_out + d_in)`` numbers per layer.

    Example:
        >>> import torch
        >>> from mkor import MKOR
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = MKOR(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [row.parameter for row in optimizer.coverage() if row.preconditioned]
        ['0.weight', '0.bias']

    Args:
        model: The model to train.
        optimizer: The base, over the model's parameters.
        rank: Vectors kept per side, ``r``.
        vectors: Vectors per update, ``k``, at most ``rank``.
        rows: Rows (tokens, images, output positions) averaged in a vector, counted over all
            micro-batches and processes; None uses every row.
        momentum: Decay of a vector's weight per update, ``gamma``.
        damping: ``lambda`` relative to the mean square of a row's entries.
        factor_dtype: Of the stored vectors; None for float32, or float64 where the weight is.
        update_every: Steps between updates of the factors.
        rescale: ``"running"``, ``"step"`` or None; see :class:`Preconditioned`.
        skip: Modules, module types and name patterns to leave to the base.
        skip_output: Leave the layers next to the loss to the base.
        sides: ``"both"``, ``"left"`` or ``"right"``. Over Muon, ``"left"`` alone is better.
        nonfinite: ``"propagate"`` or ``"skip"``; see :class:`Preconditioned`.
        process_group: For the sum of statistics; None for the default group.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rank: int = 64,
        vectors: int = 16,
        rows: int | None = 32,
        momentum: float = 0.98,
        damping: float = 0.02,
        factor_dtype: torch.dtype | None = None,
        update_every: int = 1,
        rescale: str | None = "running",
        skip: Skip = (),
        skip_output: bool = True,
        sides: str = "both",
        nonfinite: str = "propagate",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            Window(rank, vectors, rows, momentum, damping, factor_dtype),
            update_every=update_every,
            rescale=rescale,
            skip=skip,
            skip_output=skip_output,
            sides=sides,
            nonfinite=nonfinite,
            process_group=process_group,
        )
