"""The picture of a race: loss against steps and against time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .race import Race, mean, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, readable with colour-blind eyes; the baseline is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
GREY = "#555555"
LABEL_GAP = 0.062
LOG_RATIO = 8.0


@dataclass(frozen=True)
class Line:
    """A contestant's mean curve."""

    label: str
    colour: str
    steps: Sequence[float]
    seconds: Sequence[float]
    losses: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curve_of(race: Race, label: str, colour: str) -> Line | None:
    """The mean over seeds of a contestant's curves.

    Args:
        race: The race.
        label: The contestant's label.
        colour: The line's colour.

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
        colour=colour,
        steps=[column[0].step for column in columns],
        seconds=[mean([point.cpu_seconds for point in column]) for column in columns],
        losses=losses,
        low=[loss - width for loss, width in zip(losses, widths, strict=True)],
        high=[loss + width for loss, width in zip(losses, widths, strict=True)],
    )


def lines_of(race: Race) -> list[Line]:
    """The curves of all contestants.

    Args:
        race: The race.

    Returns:
        Those that have points.
    """
    others = [who.label for who in race.settings.contestants if who.label != race.settings.baseline]
    colours = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(others)}
    lines = (
        curve_of(race, who.label, colours.get(who.label, GREY)) for who in race.settings.contestants
    )
    return [line for line in lines if line is not None]


def dodge(places: Sequence[float], gap: float) -> list[float]:
    """Moves labels apart so that no two are nearer than a gap, each as little as need be.

    Args:
        places: Where they would like to be, from 0 to 1.
        gap: The least distance.

    Returns:
        Where they go, in the same order.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    clusters: list[list[int]] = []
    starts: list[float] = []
    for index in order:
        clusters.append([index])
        starts.append(places[index])
        while len(starts) > 1 and starts[-1] < starts[-2] + gap * len(clusters[-2]):
            # Two clusters that touch become one, centred on what its members want.
            merged = clusters[-2] + clusters.pop()
            starts.pop()
            clusters[-1] = merged
            wish = sum(places[member] - gap * rank for rank, member in enumerate(merged))
            starts[-1] = wish / len(merged)
    moved = {
        member: start + gap * rank
        for start, cluster in zip(starts, clusters, strict=True)
        for rank, member in enumerate(cluster)
    }
    return [moved[index] for index in range(len(places))]


def short_labels(labels: Sequence[str]) -> list[str]:
    """Labels without their options, where that leaves them apart.

    Args:
        labels: The contestants' labels.

    Returns:
        Short labels; those that would be alike keep their options, on a line of their own.
    """
    bare = [re.sub(r"\[[^]]*\]", "", label) for label in labels]
    return [
        short if bare.count(short) == 1 else re.sub(r",(?=[^]]*\])", ",\n", label)
        for label, short in zip(labels, bare, strict=True)
    ]


def draw_labels(axes: Axes, lines: Sequence[Line], ends: Sequence[float]) -> None:
    """Writes each contestant's name and loss at the end of its line.

    Args:
        axes: The panel, its limits final.
        lines: The curves.
        ends: Where each of them ends on the horizontal axis.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [
        to_axes.transform((end, line.losses[-1])) for end, line in zip(ends, lines, strict=True)
    ]
    if not lines:
        return
    names = short_labels([line.label for line in lines])
    gap = LABEL_GAP * max(name.count("\n") + 1 for name in names)
    heights = dodge([float(point[1]) for point in points], gap)
    for line, name, point, height in zip(lines, names, points, heights, strict=True):
        axes.annotate(
            f"{name}  {line.losses[-1]:.3f}",
            xy=(float(point[0]), float(point[1])),
            xytext=(float(point[0]) + 0.025, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.colour, "lw": 0.6, "shrinkA": 0},
        )


def draw_panel(axes: Axes, race: Race, lines: Sequence[Line], *, time: bool) -> None:
    """Draws the curves of one panel.

    Args:
        axes: The panel.
        race: The race.
        lines: The curves.
        time: Whether the horizontal axis is time.
    """
    for line in lines:
        across = line.seconds if time else line.steps
        thick = line.colour != GREY
        axes.fill_between(across, line.low, line.high, color=line.colour, alpha=0.15, lw=0)
        axes.plot(across, line.losses, color=line.colour, lw=2.0 if thick else 1.6)
        axes.plot(across[-1], line.losses[-1], "o", color=line.colour, ms=4)
    target = next((line for line in lines if line.label == race.settings.baseline), None)
    if target is not None:
        axes.axhline(target.losses[-1], color=GREY, lw=0.8, ls=(0, (2, 3)), zorder=0)
    for line in lines:
        found = race.matches.get(line.label)
        if target is None or found is None or found.steps is None:
            continue
        # A run of its own with a whole schedule, so it does not lie on the long run's curve.
        ratio = found.cpu_ratio if time else found.step_ratio
        place = (ratio or 0.0) * (target.seconds if time else target.steps)[-1]
        axes.plot(place, found.target, "D", color="white", mec=line.colour, mew=1.6, ms=6)
        axes.annotate(
            f"{ratio:.2f}x",
            (place, found.target),
            xytext=(0, -9),
            textcoords="offset points",
            color=line.colour,
            fontsize=9,
            ha="center",
            va="top",
        )


def style(axes: Axes, label: str) -> None:
    """Takes away what does not inform.

    Args:
        axes: The panel.
        label: What the horizontal axis shows.
    """
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="#999999")


def subtitle(race: Race) -> str:
    """The small print below the title.

    Args:
        race: The race.

    Returns:
        Sizes, length, seeds and how to read the marks.
    """
    settings = race.settings
    sizes = ", ".join(f"{key} {value}" for key, value in settings.task.sizes.items())
    seeds = len(race.of(settings.baseline))
    text = f"{sizes}; {settings.steps} steps; mean of {seeds} seed{'s' if seeds > 1 else ''}"
    text += ", shaded +- one standard deviation" if seeds > 1 else ""
    if any(found.steps is not None for found in race.matches.values()):
        text += f"; diamonds: shorter runs that end level with {settings.baseline}"
    return text


def draw(race: Race, path: Path) -> None:
    """Draws a race.

    Args:
        race: A race with at least one complete seed.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = lines_of(race)
    figure = Figure(figsize=(11, 4.4), dpi=160)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.87, top=0.83, bottom=0.12, wspace=0.42)
    for axes, time in ((left, False), (right, True)):
        draw_panel(axes, race, lines, time=time)
        style(axes, "training CPU seconds" if time else "training steps")
    losses = [loss for line in lines for loss in line.losses]
    if losses and min(losses) > 0 and max(losses) > LOG_RATIO * min(losses):
        left.set_yscale("log")
    left.set_ylabel("held-out loss")
    for axes, time in ((left, False), (right, True)):
        axes.set_xlim(left=0)
        draw_labels(axes, lines, [(line.seconds if time else line.steps)[-1] for line in lines])
    figure.text(0.06, 0.935, race.settings.task.name, fontsize=14, fontweight="bold")
    figure.text(0.06, 0.885, subtitle(race), fontsize=8.5, color=GREY)
    figure.savefig(path)
