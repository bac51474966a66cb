"""Power laws: how fast something grows with a layer's width."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FIT_FROM = 512
BOTH, SENT = "both", "numbers sent"


@dataclass(frozen=True)
class Curve:
    """Something that grows with the width.

    Attributes:
        method: Whose it is.
        part: `update`, `precondition`, `both` or `numbers sent`.
        values: Median CPU seconds, or numbers per update, one for each width.
        repetitions: How often each was timed; 0 where it is counted.
        exponent: Slope of its logarithm against the width's from `FIT_FROM` up.
        exponent_all: The same over all widths.
    """

    method: str
    part: str
    values: tuple[float, ...]
    repetitions: tuple[int, ...]
    exponent: float | None
    exponent_all: float | None


def slope(widths: Sequence[int], values: Sequence[float], least: int = 0) -> float | None:
    """Fits a power law by least squares of the logarithms.

    Args:
        widths: The widths.
        values: A positive value for each.
        least: The smallest width that counts.

    Returns:
        The exponent, None if fewer than two widths count.
    """
    points = [
        (math.log(width), math.log(value))
        for width, value in zip(widths, values, strict=True)
        if width >= least
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def fitted(curve: Curve, widths: Sequence[int], width: int) -> float:
    """The power law that was fitted from `FIT_FROM` up.

    Args:
        curve: A curve that has an exponent.
        widths: Its widths.
        width: Where it is wanted.

    Returns:
        Its value; the line goes through the mean of the logarithms.
    """
    pairs = zip(widths, curve.values, strict=True)
    points = [(each, value) for each, value in pairs if each >= FIT_FROM]
    middle, height = (statistics.geometric_mean(column) for column in zip(*points, strict=True))
    return height * math.pow(width / middle, curve.exponent or 0.0)


def make_curve(
    method: str,
    part: str,
    widths: Sequence[int],
    values: Sequence[float],
    repetitions: Sequence[int] = (),
) -> Curve:
    """Values with their fitted exponents.

    Args:
        method: Whose they are.
        part: What they are.
        widths: The widths.
        values: One for each width.
        repetitions: How often each was timed; none if they are counted.

    Returns:
        The curve.
    """
    return Curve(
        method,
        part,
        tuple(values),
        tuple(repetitions) or (0,) * len(values),
        slope(widths, values, FIT_FROM),
        slope(widths, values),
    )
