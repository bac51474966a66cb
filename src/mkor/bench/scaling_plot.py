"""The picture of `mkor overhead --scaling`: cost against width, both logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .curves import COLOURS, GREY
from .scaling_fit import FIT_FROM, SENT, Curve, fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (12.0, 4.6)
PANELS = {
    "update": ("updating the factors", 1e3, "CPU ms"),
    "precondition": ("preconditioning a gradient", 1e3, "CPU ms"),
    SENT: ("communication", 1.0, "numbers sent per update"),
}
# What only part of an update costs, beside the whole.
PARTIAL = "KFAC, no inverse"
MARKERS = "os^D"

Look = tuple[str, str]


def looks_of(curves: Sequence[Curve]) -> dict[str, Look]:
    """Colour and marker of each method, the same in all panels.

    Args:
        curves: The curves.

    Returns:
        By method.
    """
    names = [name for name in dict.fromkeys(c.method for c in curves) if name != PARTIAL]
    looks = zip(COLOURS, MARKERS, strict=False)
    return {PARTIAL: (GREY, "x"), **dict(zip(names, looks, strict=False))}


def label_of(curve: Curve) -> str:
    """A curve's name with its slope.

    Args:
        curve: The curve.

    Returns:
        Such as `Eva  1.98`.
    """
    slope = "" if curve.exponent is None else f"   $d^{{\\,{curve.exponent:.2f}}}$"
    return f"{curve.method}{slope}"


def draw_curve(axes: Axes, curve: Curve, widths: Sequence[int], look: Look, factor: float) -> None:
    """Draws measured points, and the fitted power law through those that count.

    Args:
        axes: The panel.
        curve: The curve.
        widths: Its widths.
        look: Colour and marker.
        factor: From its values to the panel's unit.
    """
    colour, marker = look
    values = [factor * value for value in curve.values]
    # Hollow, since some methods cost the same.
    axes.plot(widths, values, marker, color=colour, mfc="none", ms=6, label=label_of(curve))
    ends = [width for width in widths if width >= FIT_FROM]
    if curve.exponent is None:
        return
    line = [factor * fitted(curve, widths, width) for width in ends]
    style = (0, (3, 2)) if curve.method == PARTIAL else "solid"
    axes.plot(ends, line, color=colour, lw=1.6, ls=style, zorder=1)


def style(axes: Axes, widths: Sequence[int], title: str, unit: str) -> None:
    """Titles, scales and grid of a panel.

    Args:
        axes: The panel.
        widths: The widths.
        title: What it shows.
        unit: Of the vertical axis.
    """
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("width d")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color="#999999")
    axes.legend(frameon=False, fontsize=9)


def draw(curves: Sequence[Curve], widths: Sequence[int], path: Path) -> None:
    """Draws all curves.

    Args:
        curves: The curves.
        widths: Their widths.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    looks = looks_of(curves)
    for axes, (part, (title, factor, unit)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        shown = (curve for curve in curves if curve.part == part)
        # Largest first, as the curves end.
        for curve in sorted(shown, key=lambda curve: -curve.values[-1]):
            draw_curve(axes, curve, widths, looks[curve.method], factor)
        style(axes, widths, title, unit)
    figure.supxlabel(
        f"one square layer; lines and exponents fitted from width {FIT_FROM} up", fontsize=8.5
    )
    figure.savefig(path)
