"""Controls: contestants that show what a part of the method does by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mkor


def norms(W: Tensor, b: Tensor | None) -> Tensor:
    """Frobenius norms of layers' gradients.

    Args:
        W: `[B, d_out, d_in]`, the weights' gradients.
        b: `[B, d_out]`, the biases', or None.

    Returns:
        `[B]`, of weight and bias together.
    """
    norm = torch.linalg.vector_norm(W, dim=(1, 2))
    return norm if b is None else torch.hypot(norm, torch.linalg.vector_norm(b, dim=1))


@dataclass(frozen=True)
class Rescaling:
    """A window that lends a gradient its length but not its direction.

    All else is the window's own, so that `mkor.Preconditioned` rescales by the ratio that it
    would take with that window.

    Attributes:
        window: The window.
    """

    window: mkor.Window

    def __getattr__(self, name: str) -> Any:
        # A copy under construction has no window yet and asks for special methods.
        if name == "window" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.window, name)

    def apply(self, prepared: dict[str, Tensor], W: Tensor, b: Tensor | None, ok: Tensor) -> Tensor:
        """Scales `[W b]` to the norm that the window would give it, in place.

        Args:
            prepared: Rows of what the window prepared.
            W: `[B, d_out, d_in]`, the weights' gradients.
            b: `[B, d_out]`, the biases' gradients, or None.
            ok: `[B]` bool; other layers stay as they are.

        Returns:
            What the window returns: which layers came through.
        """
        P, p = W.clone(), None if b is None else b.clone()
        ok = self.window.apply(prepared, P, p, ok)
        ratio = norms(P, p) / norms(W, b)
        ratio = torch.where(ok & ratio.isfinite(), ratio, 1.0)
        W.mul_(ratio[:, None, None])
        if b is not None:
            b.mul_(ratio[:, None])
        return ok
