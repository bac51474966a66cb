"""The wrapper's keywords, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mkor.curvature.contract import Curvature
from mkor.hybrid import LossRateSwitch
from mkor.selection import Skip

__all__ = ["Options", "parts_of"]


@dataclass(frozen=True)
class Options:
    """The wrapper's keywords; see :class:`mkor.Preconditioned`."""

    update_every: int
    rescale: str | None
    kl_clip: float | None
    skip: Skip
    skip_output: bool
    sides: str
    nonfinite: str
    hybrid: LossRateSwitch | None
    reduce: str
    process_group: Any

    def facts(self) -> dict[str, str]:
        """What must be the same on all processes, by name; what is skipped shows in the layers."""
        apart = ("skip", "process_group")
        names = (field.name for field in fields(self) if field.name not in apart)
        return {name: repr(getattr(self, name)) for name in names}


def parts_of(curvature: Curvature, reduce: str, processes: int) -> int:
    """Vectors that this process adds to in an update.

    Args:
        curvature: The kind of factor.
        reduce: ``"mean"`` or ``"gather"``.
        processes: How many train together.

    Returns:
        All of them, or its share of whole ones.

    Raises:
        ValueError: With ``"gather"``, the processes' vectors do not fit in a window, or the
            curvature takes one mean over all rows.
    """
    if reduce == "mean":
        return curvature.vectors
    share = -(-curvature.vectors // processes)
    rank = getattr(curvature, "rank", None)
    if rank is not None and share * processes > rank:
        raise ValueError(
            f"reduce='gather' gives each of {processes} processes {share} vectors per update, more "
            f"than rank={rank} in all: raise rank, or use reduce='mean'"
        )
    return share
