"""MKOR: second-order training for the price of first order, over any PyTorch optimizer.

``MKOR(model, optimizer)`` wraps the optimizer you already use; see :class:`mkor.MKOR`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkor.combined import Combined
    from mkor.curvature.base import Curvature
    from mkor.curvature.dense import DenseInverse
    from mkor.curvature.eva import RankOne
    from mkor.curvature.kfac import Covariance
    from mkor.curvature.window import Window
    from mkor.hybrid import LossRateSwitch
    from mkor.optimizers import KFAC, MKOR, DenseMKOR, Eva
    from mkor.report import Coverage, CoverageRow
    from mkor.wrapper import Preconditioned

__version__ = "0.1.0"
__all__ = [
    "KFAC",
    "MKOR",
    "Combined",
    "Covariance",
    "Coverage",
    "CoverageRow",
    "Curvature",
    "DenseInverse",
    "DenseMKOR",
    "Eva",
    "LossRateSwitch",
    "Preconditioned",
    "RankOne",
    "Window",
]

_HOMES = {
    "KFAC": "mkor.optimizers",
    "MKOR": "mkor.optimizers",
    "Combined": "mkor.combined",
    "Covariance": "mkor.curvature.kfac",
    "Coverage": "mkor.report",
    "CoverageRow": "mkor.report",
    "Curvature": "mkor.curvature.base",
    "DenseInverse": "mkor.curvature.dense",
    "DenseMKOR": "mkor.optimizers",
    "Eva": "mkor.optimizers",
    "LossRateSwitch": "mkor.hybrid",
    "Preconditioned": "mkor.wrapper",
    "RankOne": "mkor.curvature.eva",
    "Window": "mkor.curvature.window",
}


def __getattr__(name: str) -> Any:
    # Public names are imported when first used: the command line must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'mkor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
