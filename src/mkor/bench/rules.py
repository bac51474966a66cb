"""The recipe `rules`: the paper's rules beside windows, KFAC and Eva, over bases and tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UnknownNameError
from .page import write_page
from .progress import Progress
from .races import RESULTS, Plan, run_all
from .rules_page import TITLE, conditions, environments, task_block
from .rules_plot import draw_task

INTERRUPTED = 130
TASKS = ("text-lm", "digits-conv", "digits-autoencoder")
BASES = ("sgd", "adamw", "lamb")
# What goes around each base, beside the base alone; their learning rates begin as `rates.py` says.
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

Record = dict[str, Any]


def chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of the recipe's tasks or bases that are asked for.

    Args:
        kind: What they are.
        wanted: Their names; None for all.
        known: The recipe's.

    Returns:
        Those that are wanted, in the recipe's order.

    Raises:
        UnknownNameError: If one is not the recipe's.
    """
    for name in wanted or ():
        if name not in known:
            raise UnknownNameError(f"{kind} of this recipe", name, known)
    return [name for name in known if wanted is None or name in wanted]


def plans_of(arguments: argparse.Namespace) -> list[Plan]:
    """The races that are asked for.

    Args:
        arguments: The parsed command line.

    Returns:
        One plan for each task and base.
    """
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


def stored(folder: Path) -> dict[str, dict[str, Record]]:
    """The races that are stored.

    Args:
        folder: The folder of races.

    Returns:
        What their files hold, by task and base, tasks without any left out.
    """
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
    """Writes the page and the figures from the races that are stored.

    Args:
        out: The folder of results.
        command: The command that made them.
    """
    records = stored(out / "rules")
    everything = [record for found in records.values() for record in found.values()]
    blocks = {"conditions": ("", f"{conditions(command)}\n\n{environments(everything)}")}
    for task, found in records.items():
        figure = out / "rules" / f"{task}.png"
        draw_task(task, found, AROUND, figure)
        link = figure.relative_to(out).as_posix()
        blocks[task] = (f"## {task}", task_block(task, found, AROUND, link))
    write_page(out / "rules.md", TITLE, blocks)


def command_of(arguments: argparse.Namespace) -> str:
    """The command with those options that decide the results.

    Args:
        arguments: The parsed command line.

    Returns:
        The command.
    """
    words = ["mkor reproduce rules", f"--seeds {arguments.seeds}", f"--tune {arguments.tune}"]
    for option, names in (("--tasks", arguments.tasks), ("--bases", arguments.bases)):
        words += [f"{option} {','.join(names)}"] if names else []
    if arguments.steps_scale != 1:
        words.append(f"--steps-scale {arguments.steps_scale:g}")
    if arguments.jobs > 1:
        words.append(f"--jobs {arguments.jobs}")
    return " ".join(words)


def reproduce(out: Path, progress: Progress, arguments: argparse.Namespace) -> int:
    """Runs those races that are not stored yet, then writes page and figures.

    Args:
        out: The folder of results.
        progress: Where races are shown.
        arguments: The parsed command line.

    Returns:
        The exit status.
    """
    done = run_all(
        plans_of(arguments), out / "rules", progress, arguments.jobs, quiet=arguments.quiet
    )
    write(out, command_of(arguments))
    return 0 if done else INTERRUPTED
