"""How few steps are enough: bisection over whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

RESOLUTION = 0.01


@dataclass(frozen=True)
class Match:
    """How many steps a contestant needs to equal the baseline.

    Attributes:
        contestant: The contestant's label.
        target: The held-out loss to be equalled.
        steps: The fewest steps found to be enough; None if even the baseline's are not.
        resolution: One `resolution` fewer was found, or is taken, not to be enough.
        step_ratio: Steps over the baseline's.
        cpu_ratio: CPU time of these steps over the baseline's whole run.
        wall_ratio: The same in wall time.
        probes: The lengths tried and the mean held-out loss of each.
    """

    contestant: str
    target: float
    steps: int | None
    resolution: int
    step_ratio: float | None
    cpu_ratio: float | None
    wall_ratio: float | None
    probes: tuple[tuple[int, float], ...]


def resolution_for(steps: int) -> int:
    """How finely the number of steps is searched.

    Args:
        steps: Length of the baseline's run.

    Returns:
        A fiftieth of it, at least one step.
    """
    return max(1, round(RESOLUTION * steps))


def expected_steps(steps: int, resolution: int) -> int:
    """A guess of the steps that one search trains.

    Args:
        steps: Length of the baseline's run.
        resolution: How finely is searched.

    Returns:
        The number of probes times half the length.
    """
    return math.ceil(math.log2(max(2, steps / resolution))) * steps // 2


def fewest_steps(
    loss_at: Callable[[int], float], target: float, steps: int, resolution: int
) -> tuple[int, list[tuple[int, float]]]:
    """Finds by bisection the fewest steps whose loss is no larger than the target.

    Args:
        loss_at: The loss of a whole run of so many steps; taken to fall with the steps.
        target: The loss to be equalled.
        steps: A length known to be enough.
        resolution: The search ends when enough and too few are no further apart.

    Returns:
        The fewest steps found to be enough, and each probe with its loss.
    """
    # The end points are multiples of the resolution apart, so that every probe is one too.
    few, enough = steps - math.ceil(steps / resolution) * resolution, steps
    probes: list[tuple[int, float]] = []
    while enough - few > resolution:
        middle = few + (enough - few) // resolution // 2 * resolution
        loss = loss_at(middle)
        probes.append((middle, loss))
        few, enough = (few, middle) if loss <= target else (middle, enough)
    return enough, probes
