"""The command `mkor reproduce rules`: stored races, and the page and figures made of them.

Races are stored one by one and not run again while their settings are the same. What stands
outside the marked blocks of the page is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cli import INTERRUPTED, UnknownNameError, UsageError, prepare_folder
from .contestants import check_all, departures, parse_contestants
from .race import run_race
from .results import Settings, race_record, settings_record, write_record
from .show import (
    COLOURS,
    GREY,
    Progress,
    Record,
    draw_race,
    make_progress,
    picture,
    sizes_text,
)
from .tasks import load_task, new_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASKS = ("text-lm", "digits-conv", "digits-autoencoder")
BASES = ("sgd", "adamw", "lamb")
# What goes around each base, beside the base alone; `RATES` says where their rates begin.
AROUND = (
    "mkor",
    "dense-mkor[exact]",
    "dense-mkor[paper]",
    "dense-mkor[release]",
    "kfac[inverse_every=1]",
    "kfac[inverse_every=10]",
    "kfac[inverse_every=50]",
    "eva",
    "rescale",
)
RESULTS = "results.json"
# Seconds between lines of progress while several races speak at once.
LINE_SECONDS = 30.0
# From here on a loss is written with an exponent.
HUGE = 1e4
# Losses above this multiple of the base's are written at the edge of the figure.
FAR = 3.0
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


# Races


@dataclass(frozen=True)
class Plan:
    """A race in plain numbers and texts, so that another process can be told of it.

    The first contestant is the baseline; `name` is that of the race's folder too.
    """

    name: str
    task: str
    contestants: tuple[str, ...]
    seeds: int
    tune: int
    steps_scale: float = 1.0


def settings_of(plan: Plan) -> Settings:
    """The settings of a planned race, whose contestants are known to be ones that can be made."""
    task = load_task(plan.task)
    contestants = tuple(parse_contestants(",".join(plan.contestants)))
    check_all(contestants, lambda: new_model(task, 0))
    return Settings(
        task=task,
        contestants=contestants,
        baseline=contestants[0].label,
        steps=max(1, round(plan.steps_scale * task.steps)),
        seeds=plan.seeds,
        tune=plan.tune,
    )


def is_complete(path: Path, settings: Settings) -> bool:
    """Whether a file holds the whole of a race that was run with these settings."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = json.loads(json.dumps(settings_record(settings)))
    return record.get("interrupted") is False and record.get("settings") == wanted


def run_plan(plan: Plan, folder: Path, progress: Progress) -> bool:
    """Runs a race and stores it in a folder of its own; False, and no file, if interrupted."""
    race = run_race(settings_of(plan), progress)
    if race.interrupted:
        return False
    own, record = folder / plan.name, race_record(race)
    own.mkdir(parents=True, exist_ok=True)
    draw_race(record, own / "curves.png")
    # A race with this file is complete, so it comes last.
    write_record(record, own / RESULTS)
    return True


def run_apart(plan: Plan, folder: Path, quiet: bool) -> bool:
    """Runs a race in a process of its own, with one thread; False if it was interrupted."""
    torch.set_num_threads(1)
    spoken = Progress(sys.stderr, f"{plan.name}: ", LINE_SECONDS)
    return run_plan(plan, folder, Progress() if quiet else spoken)


def run_side_by_side(
    plans: Sequence[Plan], folder: Path, progress: Progress, jobs: int, *, quiet: bool
) -> bool:
    """Runs races in `jobs` processes; False if one was interrupted, and none begins after that."""
    context = multiprocessing.get_context("spawn")
    ahead, count = list(reversed(plans)), 0
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: dict[Future[bool], Plan] = {}
        try:
            while ahead or running:
                # No more than run at once: what waits in the pool itself cannot be called back.
                while ahead and len(running) < jobs:
                    plan = ahead.pop()
                    running[pool.submit(run_apart, plan, folder, quiet)] = plan
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    if not future.result():
                        return False
                    count += 1
                    name = running.pop(future).name
                    progress.note(f"race {count}/{len(plans)} is complete: {name}")
        except KeyboardInterrupt:
            # Ctrl-C interrupted the processes too; they end by themselves.
            return False
        except BrokenProcessPool as error:
            raise UsageError(
                "a process was killed, perhaps for want of memory; complete races are kept: repeat "
                "the command, with fewer --jobs."
            ) from error
    return True


def run_all(
    plans: Sequence[Plan], folder: Path, progress: Progress, jobs: int, *, quiet: bool
) -> bool:
    """Runs those races that are not stored yet; False if one was interrupted."""
    pending = []
    for plan in plans:
        if is_complete(folder / plan.name / RESULTS, settings_of(plan)):
            progress.note(f"{plan.name} is there already")
        else:
            pending.append(plan)
    if jobs > 1 and len(pending) > 1:
        return run_side_by_side(pending, folder, progress, jobs, quiet=quiet)
    for index, plan in enumerate(pending):
        progress.note(f"race {index + 1}/{len(pending)}: {plan.name}")
        if not run_plan(plan, folder, progress):
            return False
    return True


def chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of the known tasks or bases that are wanted, in their order; None stands for all."""
    for name in wanted or ():
        if name not in known:
            raise UnknownNameError(f"{kind} of this recipe", name, known)
    return [name for name in known if wanted is None or name in wanted]


def plans_of(arguments: argparse.Namespace) -> list[Plan]:
    """The races that are asked for, one for each task and base."""
    return [
        Plan(
            name=f"{task}-{base}",
            task=task,
            contestants=(base, *(f"{around}+{base}" for around in AROUND)),
            seeds=arguments.seeds,
            tune=arguments.tune,
            steps_scale=arguments.steps_scale,
        )
        for task in chosen("task", arguments.tasks, TASKS)
        for base in chosen("base", arguments.bases, BASES)
    ]


# The page


def put_block(text: str, name: str, content: str, heading: str = "") -> str:
    """Replaces a block of a page, or appends it with a heading; all else stays as it was."""
    begin, end = f"<!-- begin {name}: made by a command -->", f"<!-- end {name} -->"
    block = f"{begin}\n{content.strip()}\n{end}"
    if begin not in text and end not in text:
        parts = (text.rstrip(), heading.strip(), block)
        return "\n\n".join(part for part in parts if part) + "\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UsageError(f"the page needs both {begin!r} and, after it, {end!r}, or neither.")
    return before + block + after


def environment_line(environment: Record) -> str:
    """What a race was run with, in one line."""
    packages = [f"{name} {version}" for name, version in environment["packages"].items() if version]
    return (
        f"- {environment['cpu']}, {environment['platform']}, {environment['cores']} cores, "
        f"{environment['threads']} thread(s) a race; python {environment['python']}, "
        f"{', '.join(packages)}"
    )


def conditions(command: str, records: Sequence[Record]) -> str:
    """How the results were made: the command, the rules of a race, each different environment."""
    lines = dict.fromkeys(environment_line(record["environment"]) for record in records)
    return "\n".join(
        (
            f"`{command}`\n\n"
            "All contestants of a race begin with the same weights, see the same batches and take "
            "their steps in turn. Each tries the same number of learning rates, a factor of two "
            "apart, on a seed that is not reported. Schedules run to their end. Options are the "
            "library's defaults but for those that a label names, and for these: "
            f"{departures()}.\n\n{LEGEND}\n",
            *lines,
        )
    )


def label_of(around: str, base: str) -> str:
    """The label of a contestant; nothing goes around a base alone."""
    return f"{around}+{base}" if around else base


def summary_of(record: Record, label: str) -> Record | None:
    """A contestant's summary, None if it did not take part."""
    return next((each for each in record["summary"] if each["contestant"] == label), None)


def final_loss_text(record: Record, summary: Record) -> str:
    """Mean and spread of a contestant's final loss, or in how many seeds it diverged."""
    if summary["loss"] is None:
        losses = [
            run["loss"] for run in record["runs"] if run["contestant"] == summary["contestant"]
        ]
        return f"diverged ({losses.count(None)} of {len(losses)})"
    spread = summary["spread"]
    digits = ".4f" if summary["loss"] < HUGE else ".3g"
    return f"{summary['loss']:{digits}}" + ("" if spread is None else f" +- {spread:{digits}}")


def over(value: float, base: float) -> str:
    """A ratio for reading, a dash where there is none."""
    return f"{value / base:.2f}x" if base else "-"


def cell(record: Record | None, around: str, base: str) -> str:
    """A cell of a task's table: loss, learning rate, time and memory; a dash if not run."""
    summary = summary_of(record, label_of(around, base)) if record else None
    alone = summary_of(record, base) if record else None
    if record is None or summary is None or alone is None:
        return "-"
    loss = final_loss_text(record, summary)
    found = [each["loss"] for each in record["summary"] if each["loss"] is not None]
    if found and summary["loss"] == min(found):
        loss = f"**{loss}**"
    edge = "\\*" if record["tuning"][summary["contestant"]]["at_edge"] else ""
    return (
        f"{loss}<br>lr {summary['trial']['lr']:g}{edge}, "
        f"time {over(summary['cpu_ms'], alone['cpu_ms'])}, "
        f"state {over(summary['state_bytes'], alone['state_bytes'])}"
    )


def table(records: Mapping[str, Record]) -> str:
    """The table of a task in Markdown: a column for each base, a row for what goes around it."""
    lines = [["", *records], ["---"] * (len(records) + 1)]
    for around in ("", *AROUND):
        cells = (cell(record, around, base) for base, record in records.items())
        lines.append([around or "base alone", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_line(record: Record) -> str:
    """How a race went, in one line."""
    settings = record["settings"]
    return (
        f"{sizes_text(settings)}; {settings['steps']} steps, {settings['seeds']} seed(s), "
        f"{settings['tune']} learning rate(s) each. Data: {settings['task']['data']}."
    )


def task_block(task: str, records: Mapping[str, Record], figure: str) -> str:
    """What the page says of a task, in Markdown: settings, figure, table, links to the curves."""
    lines = {base: settings_line(record) for base, record in records.items()}
    if len(set(lines.values())) > 1:
        told = "\n".join(f"- {base}: {line}" for base, line in lines.items())
    else:
        told = next(iter(lines.values()))
    image = f"![Held-out loss of each contestant on {task}, grouped by base]({figure})"
    stem = figure.removesuffix(".png")
    races = ", ".join(f"[{base}]({stem}-{base}/curves.png)" for base in records)
    return "\n\n".join((told, image, table(records), f"Curves: {races}."))


# The figures


def draw_panel(axes: Axes, base: str, summaries: Sequence[Record | None]) -> None:
    """Draws final losses over a base, the base's own first; those far above it are written."""
    losses = [each["loss"] if each else None for each in summaries]
    best = min((loss for loss in losses if loss is not None), default=math.inf)
    alone = losses[0] if losses[0] is not None else best
    across = axes.get_yaxis_transform()
    axes.axvline(alone, color=GREY, lw=0.8, ls=":", zorder=0)
    for row, (loss, each) in enumerate(zip(losses, summaries, strict=True)):
        if each is None or loss is None or loss > FAR * alone:
            text = f"{loss:.3g} \N{RIGHTWARDS ARROW}" if loss else "diverged" if each else "-"
            axes.text(0.99, row, text, color=GREY, ha="right", va="center", transform=across)
            continue
        colour = GREY if not row else COLOURS[1] if loss == best else COLOURS[0]
        spread = each["spread"] or 0.0
        axes.errorbar(loss, row, xerr=spread, fmt="o", color=colour, ms=5, lw=1.4, capsize=2.5)
    axes.set_title(f"over {base}")
    axes.set_xlabel("held-out loss")


def draw_task(task: str, records: Mapping[str, Record], path: Path) -> None:
    """Draws the final losses of a task, one panel for each base."""
    rows = ("", *AROUND)
    with picture(path, 2.0 + 2.9 * len(records), 1.2 + 0.27 * len(rows)) as figure:
        panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
        for axes, (base, record) in zip(panels, records.items(), strict=True):
            draw_panel(axes, base, [summary_of(record, label_of(row, base)) for row in rows])
        panels[0].set_yticks(range(len(rows)), [row or "base alone" for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        seeds = next(iter(records.values()))["settings"]["seeds"]
        note = f"mean of {seeds} seed(s) +- one standard deviation; best in orange"
        figure.suptitle(f"{task}: final held-out loss, {note}", x=0.01, ha="left")


# The command


def stored(folder: Path) -> dict[str, dict[str, Record]]:
    """The records of stored races by task and base, tasks without any left out."""
    records = {
        task: {
            base: json.loads(path.read_text(encoding="utf-8"))
            for base in BASES
            if (path := folder / f"{task}-{base}" / RESULTS).exists()
        }
        for task in TASKS
    }
    return {task: found for task, found in records.items() if found}


def write(out: Path, command: str) -> None:
    """Writes the page and the figures from the races that are stored."""
    page, records = out / "rules.md", stored(out / "rules")
    text = page.read_text(encoding="utf-8") if page.exists() else TITLE
    everything = [record for found in records.values() for record in found.values()]
    text = put_block(text, "conditions", conditions(command, everything))
    for task, found in records.items():
        draw_task(task, found, out / "rules" / f"{task}.png")
        text = put_block(text, task, task_block(task, found, f"rules/{task}.png"), f"## {task}")
    page.write_text(text, encoding="utf-8")


def command_of(arguments: argparse.Namespace) -> str:
    """The command with those options that decide the results."""
    words = ["mkor reproduce rules", f"--seeds {arguments.seeds}", f"--tune {arguments.tune}"]
    for option, names in (("--tasks", arguments.tasks), ("--bases", arguments.bases)):
        words += [f"{option} {','.join(names)}"] if names else []
    if arguments.steps_scale != 1:
        words.append(f"--steps-scale {arguments.steps_scale:g}")
    if arguments.jobs > 1:
        words.append(f"--jobs {arguments.jobs}")
    return " ".join(words)


def rules(arguments: argparse.Namespace) -> int:
    """Runs the command `mkor reproduce rules` and returns the exit status."""
    torch.set_num_threads(1)
    folder = prepare_folder(arguments.out) or Path()
    plans = plans_of(arguments)
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        done = run_all(plans, folder / "rules", progress, arguments.jobs, quiet=arguments.quiet)
        write(folder, command_of(arguments))
    print("written:", folder / "rules.md")
    return 0 if done else INTERRUPTED
