"""The picture of `knee.py`: loss against the time of a step, and curves, a column for each knob."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkor.bench.curves import COLOURS, GREY, dodge
from mkor.bench.plot import LABEL_HEIGHT, LETTER, style
from mkor.bench.race import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
BASE = "adamw"
MEANINGS = {
    "rank": "vectors kept per side",
    "vectors": "mean vectors per step",
    "rows": "rows in each vector",
    "update_every": "steps between updates",
}

Pair = tuple[float, float]
Mark = tuple[Record, str]

# Inches.
LEFT, GAP, TOP, BOTTOM, BETWEEN = 0.65, 0.72, 1.15, 0.55, 0.65
PANEL, UPPER, LOWER, NARROWEST = 2.45, 2.6, 2.2, 10.5
# From few to many; the default and AdamW have colours of their own.
PALE, DARK, JOINING = "#8CC4E8", "#002B49", "#C9D6DF"
# Texts: beside a point, else further off with a line; distances in points of print.
BESIDE = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
SLANTED = tuple((dx, dy) for dy in (0.6, -0.6, 1.2, -1.2) for dx in (1.0, -1.0))
NEAR, FAR, ROOMY = 7.0, (16.0, 26.0), 3.0


def default_of(found: Record) -> Record:
    return next(each for each in found["settings"] if each["default"])


def mixed(part: float) -> str:
    """A colour between the pale and the dark one."""
    ends = ([int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (PALE, DARK))
    return "#" + "".join(f"{round(a + part * (b - a)):02X}" for a, b in zip(*ends, strict=True))


def marks_of(found: Record) -> list[Mark]:
    """AdamW, then the settings, with their colours."""
    settings, last = found["settings"], max(1, len(found["settings"]) - 1)
    shades = [
        COLOURS[1] if each["default"] else mixed(index / last)
        for index, each in enumerate(settings)
    ]
    base = {**found["baseline"], "text": BASE, "default": False}
    return [(base, GREY), *zip(settings, shades, strict=True)]


def place_of(figures: Record) -> Pair:
    return figures["cpu_ratio"], figures["loss"]


def bars_of(figures: Record) -> Pair:
    return spread(figures["cpu_ratios"]) or 0.0, figures["spread"] or 0.0


def draw_values(axes: Axes, marks: Sequence[Mark]) -> None:
    """Final loss against what a step costs, in the order of the values."""
    shown = [(figures, colour) for figures, colour in marks if figures["loss"] is not None]
    joined = [place_of(figures) for figures, _ in shown if figures["text"] != BASE]
    axes.plot(*zip(*joined, strict=True) if joined else ((), ()), color=JOINING, lw=1.5, zorder=1)
    for figures, colour in shown:
        axes.errorbar(
            *place_of(figures),
            xerr=bars_of(figures)[0],
            yerr=bars_of(figures)[1],
            color=colour,
            fmt="o",
            ms=8.0 if figures["default"] else 5.5,
            elinewidth=1.0,
            capsize=2.0,
            zorder=4 if figures["default"] else 3,
        )
        if figures["text"] == BASE:
            axes.axhline(figures["loss"], color=GREY, lw=0.8, ls=(0, (2, 3)), zorder=0)
    away = ", ".join(figures["text"] for figures, _ in marks if figures["loss"] is None)
    if away:
        how: Record = {"color": GREY, "fontsize": 8.5, "ha": "right", "transform": axes.transAxes}
        axes.text(0.98, 0.02, f"diverged: {away}", **how)


def draw_curves(axes: Axes, marks: Sequence[Mark]) -> None:
    """Mean loss against training time."""
    for figures, colour in marks:
        if curve := figures["curve"]:
            seconds, losses, strong = curve["cpu_seconds"], curve["losses"], figures["default"]
            how: Record = {"color": colour, "zorder": 3 if strong else 2}
            axes.plot(seconds, losses, lw=2.2 if strong else 1.3, **how)
            axes.plot(seconds[-1], losses[-1], "o", ms=3.5, **how)


def line_of(*places: Pair, pieces: int = 12) -> list[Pair]:
    """Points along a line, so that texts keep away from it."""
    return [
        (a[0] + part / pieces * (b[0] - a[0]), a[1] + part / pieces * (b[1] - a[1]))
        for a, b in pairwise(places)
        for part in range(pieces + 1)
    ]


def clearest(
    place: Pair,
    size: Pair,
    taken: Sequence[Pair],
    rivals: Sequence[Pair],
    corners: Sequence[Pair],
) -> Pair:
    """How far from its point a text goes: the nearest place with enough room, or that with most.

    Nothing that is taken is to be near, beside the point no other point nearer than its own.
    """

    def gap(shift: Pair, at: Pair) -> float:
        sides = zip(place, shift, size, at, strict=True)
        return math.hypot(*(max(abs(p + d - to) - s, 0.0) for p, d, s, to in sides))

    def room(shift: Pair) -> float:
        sides = zip(place, shift, size, *corners, strict=True)
        within = all(low < p + d - s and p + d + s < high for p, d, s, low, high in sides)
        return min(ROOMY, *(gap(shift, at) for at in taken)) if within else -1.0

    beside = [(dx * (size[0] + NEAR), dy * (size[1] + NEAR)) for dx, dy in BESIDE]
    own = [each for each in beside if all(gap(each, place) <= gap(each, at) for at in rivals)]
    off = [(dx * (size[0] + far), dy * (size[1] + far)) for far in FAR for dx, dy in SLANTED]
    return max([*own, *off], key=room)


def write_values(axes: Axes, marks: Sequence[Mark]) -> None:
    """Each value beside its point, clear of lines, bars and other texts; the limits are final."""
    scale = 72 / axes.figure.dpi

    def points(*places: Pair) -> list[Pair]:
        return [(scale * x, scale * y) for x, y in axes.transData.transform(places)]

    shown = [(figures, colour) for figures, colour in marks if figures["loss"] is not None]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    corners = points((left, low), (right, high))
    places = [points(place_of(figures))[0] for figures, _ in shown]
    joined = zip(places, shown, strict=True)
    taken = line_of(*(place for place, (figures, _) in joined if figures["text"] != BASE))
    for figures, _ in shown:
        (x, y), (dx, dy) = place_of(figures), bars_of(figures)
        taken += line_of(*points((x - dx, y), (x + dx, y)))
        taken += line_of(*points((x, y - dy), (x, y + dy)))
        if figures["text"] == BASE:
            taken += line_of(*points((left, y), (right, y)), pieces=60)
    for (x, y), (figures, colour) in zip(places, shown, strict=True):
        size = (36 * LETTER * len(figures["text"]), 4.5)
        shift = clearest((x, y), size, taken, places, corners)
        for height in (-size[1], 0.0, size[1]):
            middle, level = x + shift[0], y + shift[1] + height
            taken += line_of((middle - size[0], level), (middle + size[0], level))
        far = max(abs(shift[0]) - size[0], abs(shift[1]) - size[1]) > NEAR
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0} if far else None
        write(axes, figures, colour, xy=place_of(figures), xytext=shift, ha="center",
            textcoords="offset points", arrowprops=arrow)  # fmt: skip


def write_names(axes: Axes, marks: Sequence[Mark]) -> None:
    """Each curve's value in a column to the right; the limits are final."""
    to_axes = axes.transData + axes.transAxes.inverted()
    shown = [(figures, colour) for figures, colour in marks if figures["curve"]]
    curves = [figures["curve"] for figures, _ in shown]
    ends = [
        tuple(to_axes.transform((curve["cpu_seconds"][-1], curve["losses"][-1])))
        for curve in curves
    ]
    heights = dodge([y for _, y in ends], [LABEL_HEIGHT / LOWER] * len(ends))
    for (figures, colour), end, height in zip(shown, ends, heights, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "relpos": (0, 0.5)}
        write(axes, figures, colour, xy=end, xytext=(1.05, height), xycoords="axes fraction",
            textcoords="axes fraction", arrowprops=arrow)  # fmt: skip


def write(axes: Axes, figures: Record, colour: str, **how: Any) -> None:
    weight = "bold" if figures["default"] else "normal"
    axes.annotate(
        figures["text"],
        color=colour,
        fontsize=9,
        fontweight=weight,
        va="center",
        annotation_clip=False,
        **how,
    )


def subtitle(record: Record) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in record["task"]["sizes"].items())
    seeds = record["seeds"]
    text = f"{sizes}; {record['steps']} steps; mean of {seeds} seed{'s' if seeds > 1 else ''}"
    text += ", bars +- one standard deviation" if seeds > 1 else ""
    return f"{text}; default in orange, {BASE} in grey, all else as it is by default"


def draw(record: Record, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    knobs = record["knobs"]
    panel = max(PANEL, (NARROWEST - LEFT) / len(knobs) - GAP)
    width = LEFT + len(knobs) * (panel + GAP)
    height = TOP + UPPER + BETWEEN + LOWER + BOTTOM
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    rows: list[list[Axes]] = []
    for bottom, tall in ((BOTTOM + LOWER + BETWEEN, UPPER), (BOTTOM, LOWER)):
        row: list[Axes] = []
        for index in range(len(knobs)):
            left = (LEFT + index * (panel + GAP)) / width
            first = row[0] if row else None
            place = (left, bottom / height, panel / width, tall / height)
            row.append(figure.add_axes(place, sharex=first, sharey=first))
            row[-1].tick_params(which="both", labelleft=first is None)
        rows.append(row)
    for upper, lower, knob in zip(*rows, knobs, strict=True):
        draw_values(upper, marks_of(knobs[knob]))
        draw_curves(lower, marks_of(knobs[knob]))
        style(upper, f"CPU time of a step, {BASE} = 1")
        style(lower, "training CPU seconds")
        upper.set_title(knob, fontsize=11, fontweight="bold", loc="left", pad=18)
        upper.text(0, 1.03, MEANINGS[knob], fontsize=9, color=GREY, transform=upper.transAxes)
    rows[0][0].set_ylabel("final held-out loss")
    rows[1][0].set_ylabel("held-out loss")
    rows[0][0].margins(0.08)
    rows[1][0].set_xlim(left=0)
    # Only now that all have drawn are the shared limits final.
    for upper, lower, found in zip(*rows, knobs.values(), strict=True):
        write_values(upper, marks_of(found))
        write_names(lower, marks_of(found))
    title = f"What each knob of the window buys: {record['task']['name']}"
    figure.text(LEFT / width, 1 - 0.3 / height, title, fontsize=14, fontweight="bold")
    figure.text(LEFT / width, 1 - 0.52 / height, subtitle(record), fontsize=8.5, color=GREY)
    figure.savefig(path)
