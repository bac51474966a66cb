"""What a race is asked for and what it brings: records, their summary, and the files of both."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .contestants import BASES, Contestant, centre, grid, options_of
from .tasks import Task

FORMAT = 1
PACKAGES = ("mkor", "torch", "numpy", "pytorch-optimizer", "scikit-learn")


@dataclass(frozen=True)
class Trial:
    """What tuning chooses."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a race goes."""

    task: Task
    contestants: tuple[Contestant, ...]
    baseline: str  # label of the one that the others are compared with
    steps: int
    seeds: int = 3
    tune: int = 1
    # Weight decays tried for each contestant; empty for its own.
    weight_decays: tuple[float, ...] = ()
    # Learning rates that are given and not tuned, by label.
    rates: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.1
    match: bool = False  # whether to search for the steps that equal the baseline

    def trials(self, contestant: Contestant) -> list[Trial]:
        """What tuning tries: as many trials for each contestant, unless its values are given."""
        base = contestant.base
        rate = self.rates.get(contestant.label, base.options.get("lr"))
        decay = base.options.get("weight_decay")
        if isinstance(rate, int | float):
            rates = [float(rate)]
        else:
            rates = grid(centre(contestant, self.task.name), self.tune)
        if isinstance(decay, int | float):
            decays: Sequence[float] = [float(decay)]
        else:
            decays = self.weight_decays or [BASES[base.name].weight_decay]
        return [Trial(rate, decay) for decay in decays for rate in rates]


@dataclass(frozen=True)
class Tuning:
    """What a contestant tried, and what was best."""

    # Every trial with its held-out loss; a single one is not run and has none.
    trials: tuple[tuple[Trial, float | None], ...]
    best: Trial
    at_edge: bool  # whether the best learning rate is the lowest or highest tried of several


@dataclass(frozen=True)
class Point:
    """One point of a run's curve; times are those of the training steps alone."""

    step: int
    training_loss: float
    held_out_loss: float
    cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class Run:
    """A finished run."""

    contestant: str
    seed: int
    steps: int
    trial: Trial
    loss: float  # held-out loss at the end, infinite if it diverged
    cpu_seconds: float
    wall_seconds: float
    state_bytes: int  # the most memory that the optimizer's state was seen to take
    curve: tuple[Point, ...]
    # The step after which the base went on alone, None if it did not come to that.
    switched_at: int | None = None


@dataclass(frozen=True)
class Match:
    """How many steps a contestant needs to equal the baseline."""

    contestant: str
    target: float
    steps: int | None  # the fewest steps found to be enough; None if even the baseline's are not
    resolution: int  # one `resolution` fewer was found, or is taken, not to be enough
    step_ratio: float | None
    cpu_ratio: float | None  # CPU time of these steps over the baseline's whole run
    wall_ratio: float | None
    probes: tuple[tuple[int, float], ...]  # the lengths tried and the mean held-out loss of each


@dataclass
class Race:
    """What a race has brought so far; `runs` holds complete seeds only."""

    settings: Settings
    tunings: dict[str, Tuning] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    matches: dict[str, Match] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, label: str) -> list[Run]:
        """The runs of a contestant in order of seeds."""
        return [run for run in self.runs if run.contestant == label]


def mean(values: Sequence[float]) -> float:
    """The mean, infinite as soon as one value is not finite."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, None where there is none."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def step_seconds(runs: Sequence[Run], clock: str) -> float:
    """Seconds of a training step by a clock, `cpu_seconds` or `wall_seconds`."""
    total: float = sum(getattr(run, clock) for run in runs)
    return total / max(1, sum(run.steps for run in runs))


def summarize(race: Race) -> list[dict[str, Any]]:
    """Sums up the complete seeds of a race, at least one, in a row for each contestant."""
    base_cpu, base_wall = (
        step_seconds(race.of(race.settings.baseline), clock)
        for clock in ("cpu_seconds", "wall_seconds")
    )
    rows = []
    for contestant in race.settings.contestants:
        runs = race.of(contestant.label)
        losses = [run.loss for run in runs]
        cpu, wall = (step_seconds(runs, clock) for clock in ("cpu_seconds", "wall_seconds"))
        switches = [run.switched_at for run in runs if run.switched_at is not None]
        rows.append(
            {
                "contestant": contestant.label,
                "trial": asdict(race.tunings[contestant.label].best),
                "loss": mean(losses),
                "spread": spread(losses),
                "cpu_ms": 1e3 * cpu,
                "wall_ms": 1e3 * wall,
                "cpu_ratio": cpu / base_cpu,
                "wall_ratio": wall / base_wall,
                "state_bytes": max(run.state_bytes for run in runs),
                "switched_at": mean(switches) if switches else None,
            }
        )
    return rows


def package_version(name: str) -> str | None:
    """The version of an installed package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """What the processor calls itself, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Versions, machine and date of a result, without names or paths of either."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def plain(value: object) -> Any:
    """A value as JSON knows it: None for numbers that are not finite, text for the unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def settings_record(settings: Settings) -> dict[str, Any]:
    """The settings of a race: task, contestants with all their options, trials, all numbers."""
    task = settings.task
    fingerprint = {key: getattr(task, key) for key in ("name", "sizes", "data", "sha256")}
    own = {
        "task": fingerprint,
        "contestants": [asdict(who) for who in settings.contestants],
        "options": {who.label: options_of(who) for who in settings.contestants},
        "trials": {
            who.label: [asdict(trial) for trial in settings.trials(who)]
            for who in settings.contestants
        },
    }
    rest = ("baseline", "steps", "seeds", "tune", "weight_decays", "rates", "warmup", "match")
    found: dict[str, Any] = plain(own | {key: getattr(settings, key) for key in rest})
    return found


def race_record(race: Race) -> dict[str, Any]:
    """Everything about a race, as `results.json` holds it; a loss of None has diverged."""
    found: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "settings": settings_record(race.settings),
            "environment": environment(),
            "interrupted": race.interrupted,
            "tuning": {label: asdict(tuning) for label, tuning in race.tunings.items()},
            "summary": summarize(race),
            "match": {label: asdict(match) for label, match in race.matches.items()},
            "runs": [asdict(run) for run in race.runs],
        }
    )
    return found


def write_record(value: object, path: Path) -> None:
    """Writes numbers, texts, mappings and sequences of such as JSON, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(path)


def write_curves(race: Race, path: Path) -> None:
    """Writes the curves as CSV, one line per point."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = (each.name for each in fields(Point))
        writer.writerow(("contestant", "seed", *columns, "switched_at"))
        for run in race.runs:
            for point in run.curve:
                values = asdict(point).values()
                writer.writerow((run.contestant, run.seed, *values, run.switched_at))
