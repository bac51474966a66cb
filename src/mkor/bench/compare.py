"""The command `mkor compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .contestants import Contestant, parse_contestants
from .errors import UnknownNameError, UsageError
from .files import write_csv, write_json
from .optimizers import check_all, check_names
from .places import prepare_folder
from .progress import make_progress
from .race import Race, Settings
from .report import print_conditions, print_report
from .runner import run_race
from .tasks import Task, load_task, new_model

INTERRUPTED = 130


def sizes_of(arguments: argparse.Namespace) -> dict[str, int | None]:
    """The sizes given on the command line.

    Args:
        arguments: The parsed command line.

    Returns:
        None for each that is not given.
    """
    return {key: getattr(arguments, key) for key in ("width", "depth", "batch", "context")}


def checked_contestants(text: str) -> tuple[Contestant, ...]:
    """Contestants whose names and options exist.

    Args:
        text: As written on the command line.

    Returns:
        The contestants.
    """
    contestants = tuple(parse_contestants(text))
    for contestant in contestants:
        check_names(contestant)
    return contestants


def rates_of(pairs: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The learning rates given on the command line.

    Args:
        pairs: Texts `NAME=VALUE`.
        labels: The contestants.

    Returns:
        Learning rates by label.

    Raises:
        UnknownNameError: If a name is not a contestant's.
        UsageError: If a value is not a positive number.
    """
    rates = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        label = "".join(name.split())
        if label not in labels:
            raise UnknownNameError("contestant of --lr", label or pair, labels)
        try:
            rates[label] = float(value)
        except ValueError:
            rates[label] = 0.0
        if not 0 < rates[label] < float("inf"):
            raise UsageError(f"--lr {pair}: {value!r} is no positive number.")
    return rates


def settings_of(arguments: argparse.Namespace, task: Task | None = None) -> Settings:
    """The settings of a race, everything checked that can be beforehand.

    Args:
        arguments: The parsed command line.
        task: The task, if it is loaded already.

    Returns:
        The settings.

    Raises:
        UnknownNameError: If the baseline does not take part.
    """
    contestants = checked_contestants(arguments.contestants)
    labels = [contestant.label for contestant in contestants]
    baseline = "".join((arguments.baseline or labels[0]).split())
    if baseline not in labels:
        raise UnknownNameError("baseline", baseline, labels)
    rates = rates_of(arguments.lr, labels)
    task = task or load_task(arguments.task, sizes_of(arguments))
    check_all(contestants, lambda: new_model(task, 0))
    return Settings(
        task=task,
        contestants=contestants,
        baseline=baseline,
        steps=arguments.steps or task.steps,
        seeds=arguments.seeds,
        tune=arguments.tune,
        weight_decays=tuple(arguments.weight_decay),
        rates=rates,
        warmup=arguments.warmup,
        match=arguments.match,
    )


def write_files(race: Race, folder: Path) -> Mapping[str, Path]:
    """Writes the results of a race.

    Args:
        race: A race with at least one complete seed.
        folder: Where the files go.

    Returns:
        The files by kind.
    """
    from .plot import draw

    files = {
        "picture": folder / "curves.png",
        "results": folder / "results.json",
        "curves": folder / "curves.csv",
    }
    write_json(race, files["results"])
    write_csv(race, files["curves"])
    draw(race, files["picture"])
    return files


def compare(arguments: argparse.Namespace) -> int:
    """Races optimizers against each other.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.
    """
    torch.set_num_threads(arguments.threads)
    folder = prepare_folder(arguments.out)
    settings = settings_of(arguments)
    print_conditions(settings, arguments.threads, sys.stdout)
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        race = run_race(settings, progress)
    if not race.runs:
        print("interrupted before the first seed was complete; nothing to show", file=sys.stderr)
        return INTERRUPTED
    files = write_files(race, folder) if folder is not None else {}
    print_report(race, sys.stdout)
    if files:
        print("written:", ", ".join(str(path) for path in files.values()))
    return INTERRUPTED if race.interrupted else 0
