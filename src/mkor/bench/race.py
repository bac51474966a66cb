"""What decides a race and what it brings: plain records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .contestants import Contestant
from .match import Match
from .tasks import Task
from .training import Run, Trial


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a race goes.

    Attributes:
        task: What is learned.
        contestants: Who takes part.
        baseline: Label of the one that the others are compared with.
        steps: Length of a run.
        seeds: Number of reported seeds.
        tune: Learning rates tried for each contestant.
        weight_decays: Weight decays tried for each contestant; empty for its own.
        rates: Learning rates that are given and not tuned, by label.
        warmup: Share of the steps over which the learning rate rises.
        match: Whether to search for the steps that equal the baseline.
    """

    task: Task
    contestants: tuple[Contestant, ...]
    baseline: str
    steps: int
    seeds: int = 3
    tune: int = 1
    weight_decays: tuple[float, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.1
    match: bool = False


@dataclass(frozen=True)
class Tuning:
    """What a contestant tried, and what was best.

    Attributes:
        trials: Every trial with its held-out loss; a single one is not run and has none.
        best: The trial of the lowest loss.
        at_edge: Whether the best learning rate is the lowest or highest tried of several.
    """

    trials: tuple[tuple[Trial, float | None], ...]
    best: Trial
    at_edge: bool


@dataclass
class Race:
    """What a race has brought so far.

    Attributes:
        settings: How it goes.
        tunings: By label.
        runs: Complete seeds only: every contestant has a run of each.
        matches: By label.
        interrupted: Whether it was stopped before its end.
    """

    settings: Settings
    tunings: dict[str, Tuning] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    matches: dict[str, Match] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, label: str) -> list[Run]:
        """The runs of a contestant.

        Args:
            label: The contestant's label.

        Returns:
            Its runs in order of seeds.
        """
        return [run for run in self.runs if run.contestant == label]


def mean(values: Sequence[float]) -> float:
    """The mean, infinite as soon as one value is.

    Args:
        values: Numbers, at least one.

    Returns:
        Their mean.
    """
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample.

    Args:
        values: Numbers.

    Returns:
        Their standard deviation, None where there is none.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)
