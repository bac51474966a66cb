"""The page of the recipe `precision`, and its figures as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import FORMAT, write_record
from .machine import environment
from .page import write_page

TITLE = """\
# Factors in half precision

Text outside the block is kept when the command is run again; what stands in the block is replaced.
"""
COMMAND = "mkor reproduce precision"
REFERENCE = "float64"
CONDITIONS = """\
One square layer without bias; every kind of factor with its defaults. Only what the factors are
stored in changes (float32: the control); arithmetic accumulates in float32, except for the
reference, float64 throughout. All take the same statistics: means of rows made of a mean, a few
directions and noise, of which the first two drift. They precondition one fixed gradient with
singular values 1, 1/2, 1/3, ... `positive` is the sign of the smallest eigenvalue, `unclear` where
that is 0 within the rounding of float64."""


@dataclass(frozen=True)
class Health:
    """The state of an explicit inverse, judged in float64.

    Attributes:
        finite: Whether all entries are.
        asymmetry: Largest difference between mirrored entries.
        smallest: Smallest eigenvalue.
        largest: Largest eigenvalue.
        positive: `yes`, `no`, or `unclear` where the smallest eigenvalue is 0 within the rounding
            of float64.
    """

    finite: bool
    asymmetry: float = math.nan
    smallest: float = math.nan
    largest: float = math.nan
    positive: str = "no"


@dataclass(frozen=True)
class Point:
    """What one precision made of a gradient.

    Attributes:
        kind: Of the factors.
        width: Of the layer.
        precision: What the factors are stored in.
        scale: Typical entry of the output gradients.
        updates: How many were taken.
        error: `|P - Q|_F / |Q|_F`, against float64's `Q`.
        direction_error: The same of `P / |P|` and `Q / |Q|`: what rescaling leaves.
        health: Of each side's inverse, where there is one and it was looked at.
    """

    kind: str
    width: int
    precision: str
    scale: float
    updates: int
    error: float
    direction_error: float
    health: Mapping[str, Health] | None


def number(value: float) -> str:
    """A number for a table.

    Args:
        value: The number.

    Returns:
        Such as `2.3e-04`; a dash where there is none.
    """
    return f"{value:.1e}" if math.isfinite(value) else "-"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 2) -> str:
    """A table of Markdown.

    Args:
        headers: One per column.
        rows: One text per column each.
        texts: How many columns are flush left; the others are flush right.

    Returns:
        Its lines.
    """
    rule = ["---" if place < texts else "--:" for place in range(len(headers))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *rows])


def by_factor(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points that belong in one row.

    Args:
        points: Any.

    Returns:
        Lists by kind and precision.
    """
    rows: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        rows.setdefault((point.kind, point.precision), []).append(point)
    return rows


def error_table(points: Sequence[Point]) -> str:
    """Errors against updates.

    Args:
        points: Of one width, without the reference, those to be shown.

    Returns:
        A table of Markdown.
    """
    counts = sorted({point.updates for point in points})
    headers = ["factors", "stored in", *(f"{count:,}" for count in counts), "rescaled"]
    rows = []
    for names, row in by_factor(points).items():
        errors = {point.updates: number(point.error) for point in row}
        last = max(row, key=lambda point: point.updates)
        cells = (errors.get(count, "") for count in counts)
        rows.append((*names, *cells, number(last.direction_error)))
    return table(headers, rows)


def scale_table(points: Sequence[Point]) -> str:
    """Errors after rescaling, against the size of the output gradients.

    Args:
        points: Of one width and number of updates, without the reference.

    Returns:
        A table of Markdown.
    """
    scales = sorted({point.scale for point in points}, reverse=True)
    rows = []
    for names, row in by_factor(points).items():
        errors = {point.scale: number(point.direction_error) for point in row}
        rows.append((*names, *(errors[scale] for scale in scales)))
    return table(["factors", "stored in", *(f"{scale:.0e}" for scale in scales)], rows)


def health_table(points: Sequence[Point]) -> str:
    """The state of explicit inverses.

    Args:
        points: Of one width and number of updates, the reference included.

    Returns:
        A table of Markdown.
    """
    headers = ["factors", "stored in", "side", "finite", "symmetric", "eigenvalues", "positive"]
    rows = [
        (
            point.kind,
            point.precision,
            side,
            "yes" if health.finite else "no",
            "yes" if health.asymmetry == 0 else number(health.asymmetry),
            f"{number(health.smallest)} to {number(health.largest)}",
            health.positive,
        )
        for point in points
        for side, health in (point.health or {}).items()
    ]
    return table(headers, rows, texts=5)


def width_part(points: Sequence[Point], width: int) -> str:
    """What is shown of one width.

    Args:
        points: At the usual scale.
        width: The width.

    Returns:
        Two tables of Markdown with their captions.
    """
    here = [point for point in points if point.width == width]
    last = max(point.updates for point in here)
    shown = [p for p in here if p.precision != REFERENCE and is_mark(p.updates, last)]
    return (
        f"### Width {width:,}\n\nRelative error of the preconditioned gradient after so many "
        f"updates; last column: after {last:,}, both gradients rescaled to one length.\n\n"
        f"{error_table(shown)}\n\n"
        f"Explicit inverses after {last:,} updates, judged in float64:\n\n"
        f"{health_table([point for point in here if point.updates == last])}"
    )


def is_mark(updates: int, last: int) -> bool:
    """Whether tables show this number of updates: 1, 10, 100, ... and the last.

    Args:
        updates: The number.
        last: The last there is.

    Returns:
        The answer.
    """
    return updates == last or str(updates).strip("0") == "1"


def page(points: Sequence[Point], usual: float, made: Mapping[str, Any]) -> str:
    """The block of the page.

    Args:
        points: All points.
        usual: The scale of output gradients at which widths are compared.
        made: The environment.

    Returns:
        Markdown.
    """
    main = [point for point in points if point.scale == usual]
    narrow = min(point.width for point in points)
    count = max(point.updates for point in points if point.scale != usual)
    study = [p for p in points if (p.width, p.updates) == (narrow, count)]
    study = [point for point in study if point.precision != REFERENCE]
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("mkor", "torch"))
    return "\n\n".join(
        (
            f"`{COMMAND}`, on {made['cpu']} ({made['platform']}) with {versions}",
            CONDITIONS,
            "![Error against updates](precision.png)",
            *(width_part(main, width) for width in sorted({p.width for p in main})),
            f"### Small gradients, width {narrow:,}\n\nError after {count:,} updates and "
            "rescaling, against the typical entry of the output gradients.\n\n"
            f"{scale_table(study)}",
        )
    )


def write(points: Sequence[Point], usual: float, out: Path) -> None:
    """Writes JSON and page.

    Args:
        points: All points.
        usual: The scale of output gradients at which widths are compared.
        out: The folder.
    """
    made = environment()
    record = {"format": FORMAT, "environment": made, "points": [asdict(p) for p in points]}
    write_record(record, out / "precision.json")
    write_page(out / "precision.md", TITLE, {"precision": ("", page(points, usual, made))})
