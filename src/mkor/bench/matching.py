"""Steps to match: reruns with fewer steps and a whole schedule each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .match import Match, expected_steps, fewest_steps, resolution_for
from .progress import Progress
from .race import Race, Settings, mean
from .rounds import run_round
from .training import Run


def cost(runs: Sequence[Run], clock: str) -> float:
    """Time of a training step.

    Args:
        runs: A contestant's runs.
        clock: `cpu_seconds` or `wall_seconds`.

    Returns:
        Seconds a step.
    """
    total: float = sum(getattr(run, clock) for run in runs)
    return total / max(1, sum(run.steps for run in runs))


def guessed_steps(settings: Settings) -> int:
    """A guess of the steps that the search for one contestant trains.

    Args:
        settings: The race's settings.

    Returns:
        The number of steps over all seeds.
    """
    return settings.seeds * expected_steps(settings.steps, resolution_for(settings.steps))


def match(race: Race, label: str, progress: Progress) -> Match:
    """Finds how many steps a contestant needs to equal the baseline.

    Its time is that of the steps in the race itself, where all run side by side.

    Args:
        race: The race with all its runs.
        label: The contestant's label.
        progress: Where steps are reported.

    Returns:
        The match; each probe is a run with a whole schedule over every seed.
    """
    settings, resolution = race.settings, resolution_for(race.settings.steps)
    baseline, own = race.of(settings.baseline), race.of(label)
    target = mean([run.loss for run in baseline])
    trial = {label: race.tunings[label].best}

    def loss_at(steps: int) -> float:
        runs = [
            run_round(
                settings,
                trial,
                seed=seed,
                steps=steps,
                title=f"match, {steps} steps, seed {seed + 1}/{settings.seeds}",
                progress=progress,
            )[0]
            for seed in range(settings.seeds)
        ]
        return mean([run.loss for run in runs])

    if not mean([run.loss for run in own]) <= target < math.inf:
        return Match(label, target, None, resolution, None, None, None, ())
    enough, probes = fewest_steps(loss_at, target, settings.steps, resolution)
    ratio = enough / settings.steps
    cpu, wall = (
        ratio * cost(own, clock) / cost(baseline, clock)
        for clock in ("cpu_seconds", "wall_seconds")
    )
    return Match(label, target, enough, resolution, ratio, cpu, wall, tuple(probes))


def match_all(race: Race, progress: Progress) -> None:
    """Searches for all contestants but the baseline.

    Args:
        race: The race; its matches are filled in.
        progress: Where steps are reported.
    """
    settings = race.settings
    for contestant in settings.contestants:
        if contestant.label == settings.baseline:
            continue
        found = match(race, contestant.label, progress)
        race.matches[contestant.label] = found
        # The time left counted on a guess; what was really trained takes its place.
        trained = settings.seeds * sum(steps for steps, _ in found.probes)
        progress.expect(trained - guessed_steps(settings))
        steps = "more than" if found.steps is None else f"{found.steps} of"
        progress.note(
            f"match: {contestant.label} needs {steps} {settings.steps} steps to equal "
            f"{settings.baseline}'s {found.target:.4f}; resolution {found.resolution} steps"
        )
