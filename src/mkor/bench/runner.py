"""A race from beginning to end; an interruption keeps what is complete."""

from __future__ import annotations

from .matching import guessed_steps, match_all
from .progress import Progress
from .race import Race, Settings
from .rounds import run_round
from .tuning import trials_of, tune

CURVE_POINTS = 10


def run_seeds(race: Race, progress: Progress) -> None:
    """Runs every contestant over all seeds.

    Args:
        race: The race; its runs are filled in, seed by seed.
        progress: Where steps are reported.
    """
    settings = race.settings
    best = {label: tuning.best for label, tuning in race.tunings.items()}
    for seed in range(settings.seeds):
        title = f"seed {seed + 1}/{settings.seeds}"
        runs = run_round(
            settings,
            best,
            seed=seed,
            steps=settings.steps,
            title=title,
            progress=progress,
            points=CURVE_POINTS,
        )
        race.runs += runs
        losses = ", ".join(f"{run.contestant} {run.loss:.4f}" for run in runs)
        progress.note(f"{title}: held-out loss {losses}")


def planned_steps(settings: Settings) -> int:
    """The training steps that a race takes, as far as is known beforehand.

    Args:
        settings: The race's settings.

    Returns:
        The number of steps.
    """
    plans = [len(trials_of(settings, who)) for who in settings.contestants]
    tuning = sum(count for count in plans if count > 1)
    steps = (tuning + settings.seeds * len(plans)) * settings.steps
    if settings.match:
        steps += (len(plans) - 1) * guessed_steps(settings)
    return steps


def run_race(settings: Settings, progress: Progress) -> Race:
    """Runs a race; an interruption keeps what is complete.

    Args:
        settings: How it goes.
        progress: Where it is shown.

    Returns:
        What it brought.
    """
    race = Race(settings)
    progress.expect(planned_steps(settings))
    try:
        tune(race, progress)
        run_seeds(race, progress)
        if settings.match:
            match_all(race, progress)
    except KeyboardInterrupt:
        race.interrupted = True
    return race
