"""Results as files: JSON with everything, CSV with the curves."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from .machine import environment
from .optimizers import options_of
from .race import Race, Settings
from .summary import summarize
from .tuning import trials_of

FORMAT = 1
COLUMNS = (
    "contestant",
    "seed",
    "step",
    "training_loss",
    "held_out_loss",
    "cpu_seconds",
    "wall_seconds",
    "switched_at",
)


def plain(value: object) -> object:
    """A value as JSON knows it.

    Args:
        value: Numbers, texts, mappings and sequences of such.

    Returns:
        The same, with None for numbers that are not finite and texts for the unknown.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def write_record(value: object, path: Path) -> None:
    """Writes numbers, texts, mappings and sequences of such as JSON.

    Args:
        value: The record.
        path: The file.
    """
    path.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def settings_record(settings: Settings) -> dict[str, object]:
    """The settings of a race.

    Args:
        settings: The settings.

    Returns:
        Task, contestants with all their options, what tuning tries, and all numbers.
    """
    task = settings.task
    return {
        "task": {
            "name": task.name,
            "sizes": task.sizes,
            "data": task.data,
            "sha256": task.sha256,
        },
        "contestants": [asdict(contestant) for contestant in settings.contestants],
        "options": {who.label: options_of(who) for who in settings.contestants},
        "trials": {
            who.label: [asdict(trial) for trial in trials_of(settings, who)]
            for who in settings.contestants
        },
        "baseline": settings.baseline,
        "steps": settings.steps,
        "seeds": settings.seeds,
        "tune": settings.tune,
        "weight_decays": settings.weight_decays,
        "rates": settings.rates,
        "warmup": settings.warmup,
        "match": settings.match,
    }


def record(race: Race) -> object:
    """Everything about a race.

    Args:
        race: The race.

    Returns:
        What `results.json` holds; a loss of null has diverged.
    """
    return plain(
        {
            "format": FORMAT,
            "settings": settings_record(race.settings),
            "environment": environment(),
            "interrupted": race.interrupted,
            "tuning": {label: asdict(tuning) for label, tuning in race.tunings.items()},
            "summary": [asdict(summary) for summary in summarize(race)],
            "match": {label: asdict(match) for label, match in race.matches.items()},
            "runs": [asdict(run) for run in race.runs],
        }
    )


def write_json(race: Race, path: Path) -> None:
    """Writes everything about a race.

    Args:
        race: The race.
        path: The file.
    """
    write_record(record(race), path)


def write_csv(race: Race, path: Path) -> None:
    """Writes the curves, one line per point.

    Args:
        race: The race.
        path: The file.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in race.runs:
            for point in run.curve:
                writer.writerow(
                    (run.contestant, run.seed, *asdict(point).values(), run.switched_at)
                )
