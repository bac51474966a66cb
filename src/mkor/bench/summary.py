"""What the runs of a race come to, one row for each contestant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .matching import cost
from .race import Race, mean, spread
from .training import Run, Trial


@dataclass(frozen=True)
class Summary:
    """A contestant's result over all complete seeds.

    Attributes:
        contestant: Its label.
        trial: Learning rate and weight decay.
        loss: Mean held-out loss at the end, infinite if a run diverged.
        spread: Standard deviation of the loss over seeds, None for a single one.
        cpu_ms: CPU time of a training step in milliseconds.
        wall_ms: Wall time of a training step in milliseconds.
        cpu_ratio: CPU time of a step over the baseline's.
        wall_ratio: Wall time of a step over the baseline's.
        state_bytes: The most memory that the optimizer's state took.
        switched_at: Mean step of the switch to the base over the seeds that came to it.
    """

    contestant: str
    trial: Trial
    loss: float
    spread: float | None
    cpu_ms: float
    wall_ms: float
    cpu_ratio: float
    wall_ratio: float
    state_bytes: int
    switched_at: float | None = None


def mean_switch(runs: Sequence[Run]) -> float | None:
    """When a contestant went over to its base.

    Args:
        runs: Its runs.

    Returns:
        The mean step over the runs that came to it, None if none did.
    """
    steps = [run.switched_at for run in runs if run.switched_at is not None]
    return mean(steps) if steps else None


def summarize(race: Race) -> list[Summary]:
    """Sums up a race.

    Args:
        race: A race with at least one complete seed.

    Returns:
        One summary for each contestant, in their order.
    """
    baseline = race.of(race.settings.baseline)
    base_cpu, base_wall = cost(baseline, "cpu_seconds"), cost(baseline, "wall_seconds")
    summaries = []
    for contestant in race.settings.contestants:
        runs = race.of(contestant.label)
        losses = [run.loss for run in runs]
        cpu, wall = cost(runs, "cpu_seconds"), cost(runs, "wall_seconds")
        summaries.append(
            Summary(
                contestant=contestant.label,
                trial=race.tunings[contestant.label].best,
                loss=mean(losses),
                spread=spread(losses),
                cpu_ms=1e3 * cpu,
                wall_ms=1e3 * wall,
                cpu_ratio=cpu / base_cpu,
                wall_ratio=wall / base_wall,
                state_bytes=max(run.state_bytes for run in runs),
                switched_at=mean_switch(runs),
            )
        )
    return summaries
