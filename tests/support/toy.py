"""A kind of factor of a user's own: outputs whose mean gradient is large learn more slowly."""

from dataclasses import dataclass

import torch

import mkor


@dataclass(frozen=True)
class Toy(mkor.Curvature):
    """Divides every row of ``M`` by ``1e-3 + |average of g|``."""

    momentum: float = 0.9

    def init(self, shape):
        return {
            "updates": torch.zeros(shape.layers, dtype=torch.int64, device=shape.device),
            "average": torch.zeros(
                shape.layers, shape.d_out, dtype=shape.dtype, device=shape.device
            ),
        }

    def update(self, state, statistics):
        accept, average = statistics.accept.unsqueeze(1), state["average"]
        moved = average.lerp(statistics.vectors["left"][:, 0], 1 - self.momentum)
        average.copy_(torch.where(accept, moved, average))
        state["updates"] += statistics.accept

    def apply(self, prepared, M, ok):
        P = M / (1e-3 + prepared["average"].abs().unsqueeze(2))
        ok = ok & P.sum((1, 2)).isfinite()
        M.copy_(torch.where(ok[:, None, None], P, M))
        return ok


def toy(model, base, **options):
    """A wrapper with it."""
    return mkor.Preconditioned(model, base, Toy(), **options)
