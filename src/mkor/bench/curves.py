"""What a picture shows: mean curves with their colours, and labels kept apart."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .contestants import Contestant
from .race import Race, mean, spread
from .summary import mean_switch

# Okabe and Ito's palette, readable with colour-blind eyes; the baseline is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
GREY = "#555555"
# By how much a base without wrapper is lighter, and how lines of one colour differ.
LIGHTER = 0.45
STYLES = ("solid", (0, (5, 1.5)), (0, (1.5, 1)))

Style = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """How a contestant's line and, in ink, its label are drawn."""

    colour: str
    ink: str
    style: Style
    width: float


@dataclass(frozen=True)
class Line:
    """A contestant's mean curve over its seeds, and the mean step of its switch to the base."""

    label: str
    look: Look
    steps: Sequence[float]
    seconds: Sequence[float]
    losses: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    switched_at: float | None = None

    def at(self, step: float) -> tuple[float, float]:
        """The place of a step on the curve.

        Args:
            step: The step; before the first point it counts as the first point's.

        Returns:
            Seconds and loss, in proportion between neighbouring points.
        """
        steps = self.steps
        step = min(max(step, steps[0]), steps[-1])
        after = next(index for index, known in enumerate(steps) if known >= step)
        before = max(0, after - 1)
        width = steps[after] - steps[before]
        share = (step - steps[before]) / width if width else 0.0
        seconds, loss = (
            values[before] + share * (values[after] - values[before])
            for values in (self.seconds, self.losses)
        )
        return seconds, loss


def lighter(colour: str) -> str:
    """A colour mixed with white.

    Args:
        colour: Such as `#0072B2`.

    Returns:
        The lighter colour.
    """
    parts = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return "#" + "".join(f"{round(part + LIGHTER * (255 - part)):02X}" for part in parts)


def families_of(contestants: Sequence[Contestant]) -> dict[str, str]:
    """Which contestants share a colour.

    Args:
        contestants: All that are drawn.

    Returns:
        The base by label; if all have the same, the wrapper, and for the base by itself the first.
    """
    if len({who.base.name for who in contestants}) > 1:
        return {who.label: who.base.name for who in contestants}
    first = next((who.wrapper.name for who in contestants if who.wrapper), "")
    return {who.label: who.wrapper.name if who.wrapper else first for who in contestants}


def looks(race: Race) -> dict[str, Look]:
    """How each contestant's line looks.

    One colour for each base: light and thin by itself, full and thick where it is wrapped. Where
    all have the same base, one for each wrapper.

    Args:
        race: The race.

    Returns:
        The looks by label.
    """
    contestants = race.settings.contestants
    families = families_of(contestants)
    order = list(dict.fromkeys(families.values()))
    used: dict[str, int] = {}
    chosen: dict[str, Look] = {}
    for who in contestants:
        full = COLOURS[order.index(families[who.label]) % len(COLOURS)]
        colour = full if who.wrapper else lighter(full)
        if who.label == race.settings.baseline:
            colour = GREY
        style = STYLES[used.get(colour, 0) % len(STYLES)]
        used[colour] = used.get(colour, 0) + 1
        ink = GREY if colour == GREY else full
        chosen[who.label] = Look(colour, ink, style, 2.0 if who.wrapper else 1.5)
    return chosen


def curve_of(race: Race, label: str, look: Look) -> Line | None:
    """The mean over seeds of a contestant's curves.

    Args:
        race: The race.
        label: The contestant's label.
        look: How its line looks.

    Returns:
        The curve, None if no finite point is common to all seeds.
    """
    columns = [
        column
        for column in zip(*(run.curve for run in race.of(label)), strict=False)
        if all(math.isfinite(point.held_out_loss) for point in column)
    ]
    if not columns:
        return None
    losses = [mean([point.held_out_loss for point in column]) for column in columns]
    widths = [spread([point.held_out_loss for point in column]) or 0.0 for column in columns]
    return Line(
        label=label,
        look=look,
        steps=[column[0].step for column in columns],
        seconds=[mean([point.cpu_seconds for point in column]) for column in columns],
        losses=losses,
        low=[loss - width for loss, width in zip(losses, widths, strict=True)],
        high=[loss + width for loss, width in zip(losses, widths, strict=True)],
        switched_at=mean_switch(race.of(label)),
    )


def lines_of(race: Race) -> list[Line]:
    """The curves of all contestants.

    Args:
        race: The race.

    Returns:
        Those that have points.
    """
    lines = (curve_of(race, label, look) for label, look in looks(race).items())
    return [line for line in lines if line is not None]


def _rising(values: Sequence[float]) -> list[float]:
    # Isotonic regression: neighbours that fall are pooled into their mean.
    pools: list[tuple[float, int]] = []
    for value in values:
        pool, count = value, 1
        while pools and pools[-1][0] > pool:
            other, others = pools.pop()
            pool = (pool * count + other * others) / (count + others)
            count += others
        pools.append((pool, count))
    return [pool for pool, count in pools for _ in range(count)]


def dodge(places: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Moves labels apart so that none covers another, all together as little as need be.

    Args:
        places: Where their middles would like to be, from 0 to 1.
        heights: How much room each of them takes.

    Returns:
        Where their middles go, in the same order, from 0 to 1 if they fit.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    rooms = [(heights[a] + heights[b]) / 2 for a, b in pairwise(order)]
    offsets = list(accumulate(rooms, initial=0.0))
    free = _rising([places[i] - offset for i, offset in zip(order, offsets, strict=False)])
    moved = {
        index: min(max(place, 0.0), 1.0 - offsets[-1]) + offset
        for index, place, offset in zip(order, free, offsets, strict=False)
    }
    return [moved[index] for index in range(len(places))]


def short_labels(labels: Sequence[str]) -> list[str]:
    """Labels without their options, where that leaves them apart.

    Args:
        labels: The contestants' labels.

    Returns:
        Short labels; those that would be alike keep their options, on lines of their own.
    """
    bare = [re.sub(r"\[[^]]*\]", "", label) for label in labels]
    return [
        short if bare.count(short) == 1 else re.sub(r",(?=[^]]*\])|\](?=\+)", r"\g<0>\n", label)
        for label, short in zip(labels, bare, strict=True)
    ]
