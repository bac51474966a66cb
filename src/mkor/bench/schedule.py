"""The learning rate over a run: linear warm-up, then half a cosine to the end."""

from __future__ import annotations

import math


def factor(step: int, steps: int, warmup: float) -> float:
    """The part of the peak learning rate that a step uses.

    Args:
        step: The step, 0 the first.
        steps: Steps of the whole run; a shorter run gets a whole schedule of its own.
        warmup: The share of the steps over which the rate rises.

    Returns:
        A number in (0, 1], 1 at the end of the rise, falling to nearly 0 at the last step.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))
