"""The same number of trials for each contestant."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .contestants import Contestant
from .optimizers import BASES, centre, grid
from .progress import Progress
from .race import Race, Settings, Tuning
from .rounds import run_round
from .training import Trial

# Learning rates are chosen on a seed that is never reported.
TUNING_SEED = 1_000


def trials_of(settings: Settings, contestant: Contestant) -> list[Trial]:
    """What tuning tries for a contestant.

    Args:
        settings: The race's settings.
        contestant: The contestant.

    Returns:
        As many trials for each contestant, unless its learning rate is given.
    """
    given = settings.rates.get(contestant.label, contestant.base.options.get("lr"))
    fixed = contestant.base.options.get("weight_decay")
    decays: Sequence[float] = settings.weight_decays or [BASES[contestant.base.name].weight_decay]
    if isinstance(fixed, int | float):
        decays = [float(fixed)]
    if isinstance(given, int | float):
        rates = [float(given)]
    else:
        rates = grid(centre(contestant, settings.task.name), settings.tune)
    return [Trial(rate, decay) for decay in decays for rate in rates]


def is_edge(best: Trial, tried: Sequence[Trial]) -> bool:
    """Whether a better learning rate may lie outside what was tried.

    Args:
        best: The best trial.
        tried: All trials.

    Returns:
        True if its rate is the lowest or highest of more than one.
    """
    rates = {trial.lr for trial in tried}
    return len(rates) > 1 and best.lr in {min(rates), max(rates)}


def choose(trials: Sequence[Trial], losses: Sequence[float | None]) -> Tuning:
    """Picks the trial of the lowest loss.

    Args:
        trials: What was tried.
        losses: The held-out loss of each; None for a trial that was not run.

    Returns:
        The trials, the best of them, and whether it is at the edge.
    """
    tried = tuple(zip(trials, losses, strict=True))
    best = min(tried, key=lambda pair: math.inf if pair[1] is None else pair[1])[0]
    return Tuning(tried, best, is_edge(best, trials))


def tune(race: Race, progress: Progress) -> None:
    """Chooses every contestant's learning rate and weight decay.

    Args:
        race: The race; its tunings are filled in.
        progress: Where steps are reported.
    """
    settings = race.settings
    plans = {who.label: trials_of(settings, who) for who in settings.contestants}
    losses: dict[str, list[float | None]] = {
        label: [] if len(trials) > 1 else [None] for label, trials in plans.items()
    }
    rounds = max(map(len, plans.values()))
    for index in range(rounds) if rounds > 1 else ():
        chosen = {
            label: trials[index]
            for label, trials in plans.items()
            if len(trials) > 1 and index < len(trials)
        }
        for run in run_round(
            settings,
            chosen,
            seed=TUNING_SEED,
            steps=settings.steps,
            title=f"tuning {index + 1}/{rounds}",
            progress=progress,
        ):
            losses[run.contestant].append(run.loss)
    race.tunings.update({label: choose(plans[label], losses[label]) for label in plans})
