"""Tables: drawn with rich on a terminal, aligned plain text elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

Rows = Sequence[Sequence[str]]


def plain_table(headers: Sequence[str], rows: Rows) -> str:
    """A table of plain text; the first column is flush left, the others flush right.

    Args:
        headers: One per column.
        rows: One text per column each.

    Returns:
        The lines of the table.
    """
    lines = [headers, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(headers))]

    def draw(line: Sequence[str]) -> str:
        first, *others = (
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join((first, *others)).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([draw(headers), rule, *map(draw, rows)])


def print_table(headers: Sequence[str], rows: Rows, stream: TextIO, marked: int = -1) -> None:
    """Prints a table as the stream can take it.

    Args:
        headers: One per column.
        rows: One text per column each.
        stream: Where it goes.
        marked: The row to be set in bold on a terminal.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(plain_table(headers, rows), file=stream)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(escape(header), justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if index == marked else None)
    console = Console(file=stream, highlight=False)
    # What it would measure by itself never exceeds the terminal.
    unbounded = console.options.update_width(10_000)
    fits = console.measure(table, options=unbounded).maximum <= console.width
    if stream.isatty() and fits:
        console.print(table)
    else:
        print(plain_table(headers, rows), file=stream)


def bytes_text(count: float) -> str:
    """A number of bytes for reading.

    Args:
        count: The number.

    Returns:
        Such as `3.2 MB`.
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"
