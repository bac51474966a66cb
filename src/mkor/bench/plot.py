"""The picture of a race: loss against steps and against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .curves import GREY, Line, dodge, lines_of, short_labels
from .race import Race

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches.
WIDTH, HEIGHT, TOP, BOTTOM, LEFT = 11.0, 4.4, 0.75, 0.55, 0.65
LETTER, LABEL_HEIGHT, EXTRA_HEIGHT = 0.078, 0.185, 0.2
FEW = 4
LOG_RATIO = 8.0


def texts_of(lines: Sequence[Line]) -> list[str]:
    """What stands at the end of each line: name and loss.

    Args:
        lines: The curves.

    Returns:
        The texts.
    """
    names = short_labels([line.label for line in lines])
    return [f"{name}  {line.losses[-1]:.3f}" for name, line in zip(names, lines, strict=True)]


def draw_labels(axes: Axes, lines: Sequence[Line], ends: Sequence[float], height: float) -> None:
    """Writes each contestant's name and loss beside the end of its line.

    Args:
        axes: The panel, its limits final.
        lines: The curves.
        ends: Where each of them ends on the horizontal axis.
        height: The panel's height in inches.
    """
    texts = texts_of(lines)
    rooms = [LABEL_HEIGHT / height * (text.count("\n") + 1) for text in texts]
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [
        to_axes.transform((end, line.losses[-1])) for end, line in zip(ends, lines, strict=True)
    ]
    heights = dodge([float(y) for _, y in points], rooms)
    for line, text, (x, y), label_y in zip(lines, texts, points, heights, strict=True):
        # Beside the line while there are few; in a column where they would cover other lines.
        label_x = float(x) + 0.025 if len(lines) <= FEW else 1.03
        axes.annotate(
            text,
            xy=(float(x), float(y)),
            xytext=(label_x, label_y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.look.ink,
            fontsize=9,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.look.colour,
                "lw": 0.6,
                "shrinkA": 0,
                "relpos": (0, 0.5),
            },
        )


def draw_note(axes: Axes, text: str, place: tuple[float, float], colour: str) -> None:
    """Writes a number above a mark.

    Args:
        axes: The panel.
        text: What it says.
        place: Where the mark is.
        colour: The mark's colour.
    """
    axes.annotate(
        text,
        place,
        xytext=(0, 8),
        textcoords="offset points",
        color=colour,
        fontsize=9,
        ha="center",
        va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )


def draw_matches(
    axes: Axes, race: Race, lines: Sequence[Line], target: Line, *, time: bool
) -> None:
    """Marks how much of the baseline's run each contestant needs to end level with it.

    Args:
        axes: The panel.
        race: The race.
        lines: The curves.
        target: The baseline's curve.
        time: Whether the horizontal axis is time.
    """
    for line in lines:
        found = race.matches.get(line.label)
        if found is None or found.steps is None:
            continue
        # A run of its own with a whole schedule, so it does not lie on the long run's curve.
        ratio = found.cpu_ratio if time else found.step_ratio
        place = (ratio or 0.0) * (target.seconds if time else target.steps)[-1]
        axes.plot(place, found.target, "D", color="white", mec=line.look.colour, mew=1.6, ms=6)
        draw_note(axes, f"{ratio:.2f}x", (place, found.target), line.look.colour)


def draw_switch(axes: Axes, line: Line, step: float, *, time: bool) -> None:
    """Marks on a curve where the contestant went over to its base.

    Args:
        axes: The panel.
        line: The curve.
        step: The mean step of the switch.
        time: Whether the horizontal axis is time.
    """
    seconds, loss = line.at(step)
    place = (seconds if time else step, loss)
    axes.plot(*place, "v", color=line.look.colour, mec="white", mew=1.0, ms=9, zorder=4)
    if not time:
        draw_note(axes, f"switch {step:.0f}", place, line.look.ink)


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
        axes.fill_between(across, line.low, line.high, color=line.look.colour, alpha=0.15, lw=0)
        axes.plot(
            across, line.losses, color=line.look.colour, lw=line.look.width, ls=line.look.style
        )
        axes.plot(across[-1], line.losses[-1], "o", color=line.look.colour, ms=4)
    target = next((line for line in lines if line.label == race.settings.baseline), None)
    if target is not None:
        axes.axhline(target.losses[-1], color=GREY, lw=0.8, ls=(0, (2, 3)), zorder=0)
    if target is not None:
        draw_matches(axes, race, lines, target, time=time)
    for line in lines:
        if line.switched_at is not None:
            draw_switch(axes, line, line.switched_at, time=time)


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


def use_log(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of each decade.

    Args:
        axes: The panel.
    """
    from matplotlib.ticker import FuncFormatter

    def write(value: float, _: object) -> str:
        return f"{value:g}" if f"{value:.0e}"[0] in "125" else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(write))
    axes.yaxis.set_minor_formatter(FuncFormatter(write))


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
    if any(run.switched_at is not None for run in race.runs):
        text += "; triangles: from here on the base alone"
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
    letters = max((len(part) for text in texts_of(lines) for part in text.split("\n")), default=8)
    label_width = LETTER * letters + 0.25
    panel_width = (WIDTH - LEFT - 2 * label_width - 0.2) / 2
    panel_height = HEIGHT - TOP - BOTTOM + EXTRA_HEIGHT * max(0, len(lines) - 6)
    whole = panel_height + TOP + BOTTOM
    figure = Figure(figsize=(WIDTH, whole), dpi=160)
    FigureCanvasAgg(figure)
    size = (panel_width / WIDTH, panel_height / whole)
    second = LEFT + panel_width + label_width + 0.2
    left = figure.add_axes((LEFT / WIDTH, BOTTOM / whole, *size))
    right = figure.add_axes((second / WIDTH, BOTTOM / whole, *size), sharey=left)
    right.tick_params(which="both", labelleft=False)
    for axes, time in ((left, False), (right, True)):
        draw_panel(axes, race, lines, time=time)
        style(axes, "training CPU seconds" if time else "training steps")
    losses = [loss for line in lines for loss in line.losses]
    if losses and min(losses) > 0 and max(losses) > LOG_RATIO * min(losses):
        use_log(left)
    left.set_ylabel("held-out loss")
    for axes, time in ((left, False), (right, True)):
        axes.set_xlim(left=0)
        ends = [(line.seconds if time else line.steps)[-1] for line in lines]
        draw_labels(axes, lines, ends, panel_height)
    across = LEFT / WIDTH
    figure.text(across, 1 - 0.3 / whole, race.settings.task.name, fontsize=14, fontweight="bold")
    figure.text(across, 1 - 0.52 / whole, subtitle(race), fontsize=8.5, color=GREY)
    figure.savefig(path)
