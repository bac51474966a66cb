"""The page of the recipe `rules`: tables made from stored races."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .wrappers import departures

Record = Mapping[str, Any]

# From here on a loss is written with an exponent.
HUGE = 1e4
TITLE = """\
# The rules, compared

Text between the blocks is kept when the command is run again; what stands in a block is replaced.
"""
LEGEND = (
    "Each cell of the tables: mean held-out loss over the seeds +- one standard deviation, the "
    "lowest of a column in bold; best learning rate, with \\* where it is the lowest or highest "
    "that was tried; CPU time of a training step and memory of the optimizer's state, both over "
    "those of the base alone."
)


def conditions(command: str) -> str:
    """How the results were made.

    Args:
        command: The command.

    Returns:
        A few lines of Markdown.
    """
    return (
        f"`{command}`\n\n"
        "All contestants of a race begin with the same weights, see the same batches and take "
        "their steps in turn. Each tries the same number of learning rates, a factor of two apart, "
        "on a seed that is not reported. Schedules run to their end. Options are the library's "
        f"defaults but for those that a label names, and for these: {departures()}.\n\n{LEGEND}"
    )


def environment_line(environment: Record) -> str:
    """What a race was run with.

    Args:
        environment: From its record.

    Returns:
        One line.
    """
    packages = [f"{name} {version}" for name, version in environment["packages"].items() if version]
    return (
        f"{environment['cpu']}, {environment['platform']}, {environment['cores']} cores, "
        f"{environment['threads']} thread(s) a race; python {environment['python']}, "
        f"{', '.join(packages)}"
    )


def environments(records: Iterable[Record]) -> str:
    """What races were run with.

    Args:
        records: The races.

    Returns:
        One line for each different one.
    """
    lines = dict.fromkeys(environment_line(record["environment"]) for record in records)
    return "\n".join(f"- {line}" for line in lines)


def label_of(around: str, base: str) -> str:
    """A contestant's label.

    Args:
        around: What goes around the base; nothing for the base alone.
        base: The base.

    Returns:
        The label.
    """
    return f"{around}+{base}" if around else base


def summary_of(record: Record, label: str) -> Record | None:
    """A contestant's summary.

    Args:
        record: The race.
        label: The contestant's label.

    Returns:
        The summary, None if it did not take part.
    """
    return next((each for each in record["summary"] if each["contestant"] == label), None)


def loss_text(record: Record, summary: Record) -> str:
    """A contestant's final loss for reading.

    Args:
        record: The race.
        summary: The contestant's summary.

    Returns:
        Mean and spread, or in how many seeds it diverged.
    """
    if summary["loss"] is None:
        losses = [
            run["loss"] for run in record["runs"] if run["contestant"] == summary["contestant"]
        ]
        return f"diverged ({losses.count(None)} of {len(losses)})"
    spread = summary["spread"]
    digits = ".4f" if summary["loss"] < HUGE else ".3g"
    return f"{summary['loss']:{digits}}" + ("" if spread is None else f" +- {spread:{digits}}")


def over(value: float, base: float) -> str:
    """A ratio for reading.

    Args:
        value: A number.
        base: What it is divided by.

    Returns:
        The ratio, a dash where there is none.
    """
    return f"{value / base:.2f}x" if base else "-"


def cell(record: Record | None, around: str, base: str) -> str:
    """A cell of a task's table.

    Args:
        record: The race, if there is one.
        around: What goes around the base.
        base: The base.

    Returns:
        Loss, learning rate, time and memory.
    """
    summary = summary_of(record, label_of(around, base)) if record else None
    alone = summary_of(record, base) if record else None
    if record is None or summary is None or alone is None:
        return "-"
    loss = loss_text(record, summary)
    found = [each["loss"] for each in record["summary"] if each["loss"] is not None]
    if found and summary["loss"] == min(found):
        loss = f"**{loss}**"
    edge = "\\*" if record["tuning"][summary["contestant"]]["at_edge"] else ""
    return (
        f"{loss}<br>lr {summary['trial']['lr']:g}{edge}, "
        f"time {over(summary['cpu_ms'], alone['cpu_ms'])}, "
        f"state {over(summary['state_bytes'], alone['state_bytes'])}"
    )


def table(records: Mapping[str, Record], arounds: Sequence[str]) -> str:
    """The table of a task.

    Args:
        records: Its races by base.
        arounds: What goes around the bases, one row each after the row of the bases alone.

    Returns:
        A table in Markdown.
    """
    bases = list(records)
    rows = [
        [around or "base alone", *(cell(records[base], around, base) for base in bases)]
        for around in ("", *arounds)
    ]
    lines = [["", *bases], ["---"] * (len(bases) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_line(base: str, record: Record) -> str:
    """How a race went.

    Args:
        base: The base.
        record: The race.

    Returns:
        One line, the base's name left out where it is empty.
    """
    settings = record["settings"]
    sizes = ", ".join(f"{key} {value}" for key, value in settings["task"]["sizes"].items())
    return (
        f"{base}{': ' if base else ''}{sizes}; {settings['steps']} steps, {settings['seeds']} "
        f"seed(s), {settings['tune']} learning rate(s) each. Data: {settings['task']['data']}."
    )


def task_block(
    task: str, records: Mapping[str, Record], arounds: Sequence[str], figure: str
) -> str:
    """What the page says of a task.

    Args:
        task: The task.
        records: Its races by base.
        arounds: What goes around the bases.
        figure: Where the figure is, from the page.

    Returns:
        Markdown: settings, figure, table, links to the curves.
    """
    lines = {settings_line("", record) for record in records.values()}
    if len(lines) > 1:
        told = "\n".join(f"- {settings_line(base, record)}" for base, record in records.items())
    else:
        told = lines.pop()
    picture = f"![Held-out loss of each contestant on {task}, grouped by base]({figure})"
    stem = figure.removesuffix(".png")
    races = ", ".join(f"[{base}]({stem}-{base}/curves.png)" for base in records)
    return "\n\n".join((told, picture, table(records, arounds), f"Curves: {races}."))
