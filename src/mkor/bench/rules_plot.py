"""The figure of a task in the recipe `rules`: one panel for each base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import COLOURS, GREY
from .rules_page import label_of, summary_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
# Mean and spread.
Loss = tuple[float, float]

# Losses above this multiple of the base's are written at the edge.
FAR = 3.0
# Inches.
PANEL, ROW, TOP, BOTTOM, LEFT = 2.9, 0.27, 0.75, 0.5, 1.9


def losses_of(record: Record, base: str, arounds: Sequence[str]) -> list[Loss | None]:
    """Final losses of a race.

    Args:
        record: The race.
        base: Its base.
        arounds: What goes around the base, nothing for the base alone.

    Returns:
        Mean and spread of each; None where it diverged or did not take part.
    """
    summaries = (summary_of(record, label_of(around, base)) for around in arounds)
    return [
        None
        if summary is None or summary["loss"] is None
        else (summary["loss"], summary["spread"] or 0.0)
        for summary in summaries
    ]


def best_of(losses: Sequence[Loss | None]) -> float:
    """The lowest mean.

    Args:
        losses: Mean and spread of each.

    Returns:
        The lowest, infinite if there is none.
    """
    return min((loss[0] for loss in losses if loss), default=math.inf)


def draw_far(axes: Axes, row: int, text: str) -> None:
    """Writes what lies beyond the panel.

    Args:
        axes: The panel.
        row: The row.
        text: What it says.
    """
    across = axes.get_yaxis_transform()
    axes.text(0.99, row, text, color=GREY, fontsize=8, ha="right", va="center", transform=across)


def draw_panel(axes: Axes, base: str, losses: Sequence[Loss | None]) -> None:
    """Draws the losses over one base; those far above the base's are written, not drawn.

    Args:
        axes: The panel.
        base: The base.
        losses: Mean and spread of each row, the first that of the base alone.
    """
    best = best_of(losses)
    alone = losses[0][0] if losses[0] else best
    axes.axvline(alone, color=GREY, lw=0.8, ls=(0, (2, 3)), zorder=0)
    for row, loss in enumerate(losses):
        if loss is None or loss[0] > FAR * alone:
            draw_far(axes, row, f"{loss[0]:.3g} \N{RIGHTWARDS ARROW}" if loss else "diverged")
            continue
        colour = COLOURS[1] if loss[0] == best else COLOURS[0]
        colour = colour if row else GREY
        axes.errorbar(loss[0], row, xerr=loss[1], fmt="o", color=colour, ms=5, lw=1.4, capsize=2.5)
    axes.set_title(f"over {base}", fontsize=10, loc="left")
    axes.set_xlabel("held-out loss", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#EEEEEE", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="#999999", labelsize=8)


def draw_task(task: str, records: Mapping[str, Record], arounds: Sequence[str], path: Path) -> None:
    """Draws the final losses of a task, one panel for each base.

    Args:
        task: The task.
        records: Its races by base.
        arounds: What goes around the bases, one row each below the row of the bases alone.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = ("", *arounds)
    height = TOP + ROW * len(rows) + BOTTOM
    width = LEFT + PANEL * len(records) + 0.2
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    for index, (base, record) in enumerate(records.items()):
        place = ((LEFT + PANEL * index) / width, BOTTOM / height)
        size = ((PANEL - 0.3) / width, ROW * len(rows) / height)
        axes = figure.add_axes((*place, *size))
        draw_panel(axes, base, losses_of(record, base, rows))
        axes.set_yticks(range(len(rows)), [row or "base alone" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(labelleft=index == 0)
    seeds = next(iter(records.values()))["settings"]["seeds"]
    figure.text(0.1 / width, 1 - 0.3 / height, task, fontsize=13, fontweight="bold")
    note = f"final held-out loss, mean of {seeds} seed(s) +- one standard deviation; best in orange"
    figure.text(0.1 / width, 1 - 0.5 / height, note, fontsize=8.5, color=GREY)
    figure.savefig(path)
