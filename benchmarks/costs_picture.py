"""The picture of `costs.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mkor.bench.curves import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from costs_figures import Costs, Found
from costs_page import NOT_MEASURED, exact
from costs_rows import BARS, LOOKS, Bar
from costs_runs import Record

COLUMNS, PANEL_WIDTH, LANE, TOP, BOTTOM = 5, 2.3, 0.19, 0.5, 0.55
LEFT, GAP, HEAD, FOOT = 1.75, 0.3, 0.5, 0.35
GOOD, BAD, FAINT = "#00705A", "#B00020", "#EEEEEE"
ROOM = 1.55
"""By how much the axis goes on behind the largest ratio, for its text."""


def draw_lane(axes: Axes, lane: int, label: str, found: Found, bar: Bar | None) -> None:
    """A contestant: dot, whiskers, the figure, and the bar if there is one."""
    _, colour, always = LOOKS[label]
    ratio = found.ratio
    if ratio is None:
        return
    low, high = (ratio, ratio) if found.source else found.whiskers
    axes.plot([low, high], [lane, lane], color=colour, lw=1.4, zorder=2, solid_capstyle="butt")
    face = colour if always else "white"
    axes.plot([ratio], [lane], "o", color=colour, mfc=face, ms=4.8, zorder=3)
    text, ink, weight = f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.2f}", GREY, "normal"
    if bar:
        for ends in ((-0.55, -0.2), (0.2, 0.55)):
            axes.plot([bar.most] * 2, [lane + end for end in ends], color="black", lw=1.6, zorder=4)
        met = ratio <= bar.most
        text = f"{exact(ratio, bar.most, percent=False)} {'≤' if met else '>'} {bar.most:g}"
        ink, weight = (GOOD if met else BAD), "bold"
    right = max(high, ratio, bar.most if bar else 0.0)
    how: Record = {"textcoords": "offset points", "va": "center", "fontsize": 7.5}
    axes.annotate(text, (right, lane), (5, -0.5), color=ink, fontweight=weight, **how)


def draw_panel(axes: Axes, costs: Costs, lanes: Mapping[str, int]) -> None:
    """A row's contestants, one below the other."""
    found = costs.found
    # A bar is about the first run only.
    bars = {b.contestant: b for b in BARS if b.row == costs.row.name and costs.records[0]}
    for label, lane in lanes.items():
        axes.axhline(lane, color=FAINT, lw=0.7, zorder=0)
        if label in found:
            draw_lane(axes, lane, label, found[label], bars.get(label))
    axes.axvline(1.0, color=GREY, lw=0.9, ls=(0, (2, 3)), zorder=1)
    if not found:
        middle: Record = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, NOT_MEASURED, color=GREY, fontsize=9, **middle)
    sizes = ", ".join(f"{key} {size:,}" for key, size in costs.row.sizes.items())
    axes.set_title(costs.row.model, fontsize=9.5, fontweight="bold", loc="left", pad=14)
    axes.text(0, 1.02, sizes, fontsize=7.5, color=GREY, transform=axes.transAxes)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", length=3, color="#999999", labelsize=8)


def limits_of(everything: Sequence[Costs]) -> tuple[float, float]:
    """The axis that all panels share."""
    shown = [
        value
        for costs in everything
        for label, found in costs.found.items()
        if label in LOOKS and found.ratio is not None
        for value in (found.ratio, *(() if found.source else found.whiskers))
    ]
    return min([0.9, *(0.97 * value for value in shown)]), ROOM * max([1.5, *shown])


def draw(everything: Sequence[Costs], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    panels = [costs for costs in everything if costs.row.drawn]
    lanes = {label: index for index, label in enumerate(LOOKS)}
    low, high = limits_of(panels)
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    ticks = [tick for tick in ticks if tick != 1.5 or high < 8]
    lines, tall = -(-len(panels) // COLUMNS), LANE * (len(lanes) + 0.6)
    width = LEFT + COLUMNS * (PANEL_WIDTH + GAP)
    height = TOP + lines * (HEAD + tall + FOOT) + BOTTOM
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    for index, costs in enumerate(panels):
        line, column = divmod(index, COLUMNS)
        left = LEFT + column * (PANEL_WIDTH + GAP)
        bottom = height - TOP - line * (HEAD + tall + FOOT) - HEAD - tall
        place = (left / width, bottom / height, PANEL_WIDTH / width, tall / height)
        axes = figure.add_axes(place)
        axes.set_xscale("log")
        draw_panel(axes, costs, lanes)
        axes.set_xlim(low, high)
        axes.set_ylim(len(lanes) - 0.4, -0.8)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks(list(lanes.values()), [LOOKS[label][0] for label in lanes])
        for text, label in zip(axes.get_yticklabels(), lanes, strict=True):
            text.set_color(LOOKS[label][1])
        axes.tick_params(labelleft=column == 0)
    title = "CPU time of a training iteration over AdamW's"
    figure.text(0.1 / width, 1 - 0.3 / height, title, fontsize=13, fontweight="bold")
    note = (
        "median and quartiles of the rounds; hollow: works only every 10 or 50 steps, average over "
        "a cycle, with a line from the steps without that work to those with it;\n"
        "black: the most that it may be"
    )
    figure.text(0.1 / width, 0.12 / height, note, fontsize=8, color=GREY, linespacing=1.4)
    figure.savefig(path)
