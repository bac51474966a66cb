"""The figure of the recipe `precision`: errors against updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .curves import COLOURS, GREY
from .precision_page import REFERENCE, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches of a panel, and the errors that it shows.
PANEL = (2.9, 2.4)
LOWEST, HIGHEST = 1e-8, 10.0


def draw_panel(axes: Axes, points: Sequence[Point], colours: dict[str, str]) -> None:
    """Draws one kind of factor at one width.

    Args:
        axes: The panel.
        points: Its points.
        colours: By precision.
    """
    for precision, colour in colours.items():
        line = [point for point in points if point.precision == precision]
        updates = [point.updates for point in line]
        axes.plot(updates, [p.error for p in line], "o-", color=colour, ms=3, lw=1.6)
        rescaled = [point.direction_error for point in line]
        axes.plot(updates, rescaled, color=colour, lw=1.0, ls=(0, (2, 2)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, HIGHEST)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="#999999")


def draw(points: Sequence[Point], path: Path) -> None:
    """Draws a row of panels for each width, one for each kind of factor.

    Args:
        points: Of one scale.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds, widths, precisions = (
        list(dict.fromkeys(column))
        for column in zip(*((p.kind, p.width, p.precision) for p in points), strict=True)
    )
    precisions.remove(REFERENCE)
    colours = dict(zip(precisions, (GREY, *COLOURS), strict=False))
    size = (PANEL[0] * len(kinds), PANEL[1] * len(widths) + 0.4)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(widths), len(kinds), squeeze=False, sharex=True, sharey=True)
    for row, width in zip(grid, widths, strict=True):
        row[0].set_ylabel(f"width {width:,}\nrelative error")
        for axes, kind in zip(row, kinds, strict=True):
            here = [p for p in points if (p.kind, p.width) == (kind, width)]
            draw_panel(axes, here, colours)
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind, fontsize=11, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("updates")
    handles = grid[0][0].get_lines()[::2]
    figure.legend(
        handles,
        [f"stored in {precision}" for precision in precisions],
        loc="outside upper right",
        ncols=len(precisions),
        frameon=False,
        fontsize=9,
    )
    figure.supxlabel(
        "dashed: after rescaling to one length; lines may run out at the top", fontsize=8.5
    )
    figure.savefig(path)
