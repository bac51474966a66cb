"""What should pass between processes: numbers per layer and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .contestants import Contestant
from .optimizers import options_of

_SIDES = {"both": (1, 1), "left": (0, 1), "right": (1, 0)}


@dataclass(frozen=True)
class LayerSize:
    """One size of preconditioned layers.

    Attributes:
        d_out: Its outputs.
        d_in: Its inputs, with one more for a bias.
    """

    d_out: int
    d_in: int

    @property
    def weights(self) -> int:
        """Numbers in its gradient."""
        return self.d_out * self.d_in

    def vectors(self, sides: str = "both") -> int:
        """Numbers in a vector of each side.

        Args:
            sides: `both`, `left` or `right`.

        Returns:
            Their sum.
        """
        right, left = _SIDES[sides]
        return right * self.d_in + left * self.d_out

    def matrices(self, sides: str = "both") -> int:
        """Numbers in a square matrix of each side.

        Args:
            sides: `both`, `left` or `right`.

        Returns:
            Their sum.
        """
        right, left = _SIDES[sides]
        return right * self.d_in**2 + left * self.d_out**2


def options_around(contestant: Contestant) -> dict[str, Any]:
    """All options of a contestant's wrapper.

    Args:
        contestant: The contestant.

    Returns:
        Empty for a base alone.
    """
    return options_of(contestant).get("wrapper", {})


def period(contestant: Contestant) -> int:
    """Steps after which what is sent repeats itself.

    Args:
        contestant: The contestant.

    Returns:
        The steps.
    """
    options = options_around(contestant)
    return int(options.get("inverse_every") or options.get("update_every") or 1)


def formula(contestant: Contestant, processes: int) -> str:
    """What a layer should send per update, in words.

    Args:
        contestant: The contestant.
        processes: How many train together.

    Returns:
        Such as `4 (d_in + d_out)`; empty for a base alone.
    """
    if contestant.wrapper is None:
        return ""
    if contestant.wrapper.name != "kfac":
        k = _vectors(contestant, processes)
        return "d_in + d_out" if k == 1 else f"{k} (d_in + d_out)"
    workers = _workers(contestant, processes)
    parts = ["d_in^2 + d_out^2"]
    if workers > 1:
        parts.append(f"(d_in^2 + d_out^2)/{processes}")
    if workers < processes:
        parts.append(f"{workers}/{processes} d_in d_out")
    return " + ".join(parts)


def expected(
    contestant: Contestant, sizes: Iterable[LayerSize], processes: int
) -> Mapping[str, float]:
    """Numbers that a process hands to collectives in a step, on average over both.

    Covariances count whole, as they are sent. KAISA (Pauloski et al., SC 2021): a layer's inverses
    are broadcast by the process that made them if several processes are to precondition the layer,
    its preconditioned gradient by each of those if some are not.

    Args:
        contestant: The contestant.
        sizes: Of its preconditioned layers, each as often as it occurs.
        processes: How many train together.

    Returns:
        By kind, without what a layer sends whatever its width: counts and mean squares.
    """
    layers, options = list(sizes), options_around(contestant)
    if contestant.wrapper is None:
        return {}
    updates = int(options.get("update_every") or 1)
    sides = str(options.get("sides") or "both")
    vectors = sum(size.vectors(sides) for size in layers)
    if contestant.wrapper.name != "kfac":
        return {"statistics": _vectors(contestant, processes) * vectors / updates}
    matrices = sum(size.matrices(sides) for size in layers)
    workers = _workers(contestant, processes)
    inverting = int(options.get("inverse_every") or updates)
    weights = sum(size.weights for size in layers)
    found = {"statistics": matrices / updates}
    if workers > 1:
        found["inverses"] = matrices / processes / inverting
    if workers < processes:
        found["preconditioned"] = workers / processes * weights
    return found


def _vectors(contestant: Contestant, processes: int) -> int:
    """Vectors per side that a process sends in an update."""
    options = options_around(contestant)
    # Eva has no such option: it takes one mean.
    k = int(options.get("vectors") or 1)
    return -(-k // processes) if options.get("reduce") == "gather" else k


def _workers(contestant: Contestant, processes: int) -> int:
    """KAISA's gradient workers of a layer."""
    fraction = float(options_around(contestant).get("grad_worker_fraction") or 1.0)
    return max(1, round(fraction * processes))
