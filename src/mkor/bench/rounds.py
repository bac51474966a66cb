"""One round: several contestants train step by step in turn, from the same start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from .progress import Progress
from .race import Settings
from .tasks import batches
from .training import Run, Training, Trial

T = TypeVar("T")


def in_turn(everyone: Sequence[T], index: int) -> Sequence[T]:
    """All of them, each first in its turn.

    Whoever comes first finds other caches than whoever comes second.

    Args:
        everyone: Those who take turns.
        index: Number of the turn.

    Returns:
        The same, rotated.
    """
    first = index % len(everyone)
    return (*everyone[first:], *everyone[:first])


def run_together(trainings: Sequence[Training], seed: int, progress: Progress) -> list[Run]:
    """Trains several runs step by step in turn, on the same batches.

    Args:
        trainings: The runs, none begun.
        seed: Seed of the stream of batches.
        progress: Where steps are reported.

    Returns:
        The finished runs in the same order.
    """
    stream = batches(trainings[0].task, seed)
    for step in range(max(training.steps for training in trainings)):
        batch = next(stream)
        for training in in_turn(trainings, step):
            if training.running:
                training.advance(batch)
                progress.advance(training.contestant.label, training.done, training.loss)
    progress.expect(sum(training.done - training.steps for training in trainings))
    return [training.result() for training in trainings]


def run_round(
    settings: Settings,
    trials: Mapping[str, Trial],
    *,
    seed: int,
    steps: int,
    title: str,
    progress: Progress,
    points: int = 1,
) -> list[Run]:
    """One run for each of some contestants, all with the same weights and batches.

    Args:
        settings: The race's settings.
        trials: Learning rate and weight decay of those who take part, by label.
        seed: Seed of weights and batches.
        steps: Length of the runs.
        title: What the round is for.
        progress: Where steps are reported.
        points: Points of each curve.

    Returns:
        The finished runs in the order of the contestants.
    """
    trainings = [
        Training(
            contestant=contestant,
            task=settings.task,
            seed=seed,
            steps=steps,
            trial=trials[contestant.label],
            warmup=settings.warmup,
            points=min(points, steps),
        )
        for contestant in settings.contestants
        if contestant.label in trials
    ]
    progress.phase(title, [training.contestant.label for training in trainings], steps)
    return run_together(trainings, seed, progress)
