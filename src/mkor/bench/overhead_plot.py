"""The picture of `mkor overhead`: iterations over the base's, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .curves import COLOURS, GREY
from .timing import Timing
from .worker import Subject

WIDTH, ROW, FRAME = 9.0, 0.42, 1.5
OWN = ("mkor.reduce", "mkor.measure", "mkor.update", "mkor.precondition")
# Without capture, which is part of the first two; the base's is what is left of the step.
PIECES = ("forward", "backward", *OWN, "base")


def pieces_of(timing: Timing) -> dict[str, float]:
    """Parts that do not overlap.

    Args:
        timing: A contestant's.

    Returns:
        Milliseconds: forward and backward with capture in them, the parts of a wrapper's step, and
        the rest of the step, which is the base's.
    """
    parts = timing.parts_ms
    own = {part: parts[part] for part in OWN if part in parts}
    rest = max(0.0, parts["step"] - sum(own.values()))
    return {"forward": parts["forward"], "backward": parts["backward"], **own, "base": rest}


def draw(timings: Sequence[Timing], subject: Subject, path: Path) -> None:
    """Draws all contestants.

    Args:
        timings: The first is the base's.
        subject: What was trained.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = FRAME + ROW * len(timings)
    figure = Figure(figsize=(WIDTH, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    found = [pieces_of(timing) for timing in timings]
    whole = sum(found[0].values())
    left = [0.0] * len(timings)
    names = [name for name in PIECES if any(name in pieces for pieces in found)]
    for name, colour in zip(names, (*COLOURS, GREY), strict=False):
        widths = [pieces.get(name, 0.0) / whole for pieces in found]
        axes.barh(range(len(found)), widths, left=left, color=colour, label=name.split(".")[-1])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, timing in enumerate(timings):
        axes.annotate(
            f"{timing.ratio:.2f}", (left[row], row), (4, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1.0, color=GREY, lw=0.8, ls=(0, (2, 3)))
    axes.set_yticks(range(len(timings)), [timing.contestant for timing in timings])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, color="#999999")
    axes.set_xlabel(f"mean CPU time over that of {timings[0].contestant}; in numbers the median")
    sizes = ", ".join(f"{key} {value}" for key, value in subject.sizes.items())
    axes.set_title(f"{subject.name}: {sizes}", fontsize=11, loc="left")
    axes.legend(
        frameon=False, fontsize=9, ncols=len(names), loc="upper left", bbox_to_anchor=(0, -0.2)
    )
    figure.savefig(path)
