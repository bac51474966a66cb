"""What a race prints: its conditions before, its table after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from .match import Match
from .race import Race, Settings, Tuning
from .summary import Summary, mean_switch, summarize
from .tables import bytes_text, print_table
from .training import Run, Trial
from .tuning import trials_of


def numbers(trials: list[Trial]) -> str:
    """Trials for reading.

    Args:
        trials: Learning rates and weight decays.

    Returns:
        Both, each value once, in the order of trial.
    """
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(trial.lr for trial in trials))
    decays = ", ".join(f"{value:g}" for value in dict.fromkeys(t.weight_decay for t in trials))
    return f"lr {rates}; weight decay {decays}"


def print_conditions(settings: Settings, threads: int, stream: TextIO) -> None:
    """Says what is about to be run.

    Args:
        settings: The race's settings.
        threads: Threads that torch computes with.
        stream: Where it goes.
    """
    task = settings.task
    sizes = ", ".join(f"{key} {value}" for key, value in task.sizes.items())
    print(
        f"{task.name}: {sizes}\n"
        f"data: {task.data}\n"
        f"sha256: {task.sha256}\n"
        f"{settings.steps} steps, {settings.seeds} seed(s), {threads} thread(s), "
        f"warm-up over {settings.warmup:.0%} of the steps, then cosine",
        file=stream,
    )
    for contestant in settings.contestants:
        trials = trials_of(settings, contestant)
        verb = "tries" if len(trials) > 1 else "uses"
        print(f"{contestant.label} {verb} {numbers(trials)}", file=stream)
    print(file=stream, flush=True)


def loss_text(loss: float) -> str:
    """A loss for reading.

    Args:
        loss: The loss.

    Returns:
        Four digits, or that it diverged.
    """
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def match_cells(match: Match | None, *, baseline: bool, steps: int) -> list[str]:
    """The table's cells on steps to match.

    Args:
        match: The contestant's match, None if there is none.
        baseline: Whether the contestant is the baseline.
        steps: Length of the baseline's run.

    Returns:
        Steps, steps over the baseline's and time over the baseline's.
    """
    if baseline:
        return [str(steps), "1.00x", "1.00x"]
    if match is None:
        return ["", "", ""]
    if match.steps is None or match.step_ratio is None or match.cpu_ratio is None:
        return [f"> {steps}", "> 1.00x", ""]
    return [str(match.steps), f"{match.step_ratio:.2f}x", f"{match.cpu_ratio:.2f}x"]


HEADERS = ("contestant", "lr", "held-out loss", "+-", "cpu ms", "wall ms", "time", "state")
MATCH_HEADERS = ("match", "steps", "time")


def cells(summary: Summary) -> list[str]:
    """The table's cells on a contestant's runs.

    Args:
        summary: The contestant's summary.

    Returns:
        One text per column of `HEADERS`.
    """
    return [
        summary.contestant,
        f"{summary.trial.lr:g}",
        loss_text(summary.loss),
        "" if summary.spread is None else f"{summary.spread:.4f}",
        f"{summary.cpu_ms:.3g}",
        f"{summary.wall_ms:.3g}",
        f"{summary.cpu_ratio:.2f}x",
        bytes_text(summary.state_bytes),
    ]


def tuning_notes(label: str, tuning: Tuning) -> list[str]:
    """What tuning found, for reading.

    Args:
        label: The contestant's label.
        tuning: Its tuning.

    Returns:
        A line with every trial, and one more if the grid was too narrow; none if untuned.
    """
    if len(tuning.trials) < 2:
        return []
    many = len({trial.weight_decay for trial, _ in tuning.trials}) > 1
    tried = ", ".join(
        f"{trial.lr:g}{f'/{trial.weight_decay:g}' if many else ''}: "
        f"{'-' if loss is None else loss_text(loss)}"
        for trial, loss in sorted(tuning.trials, key=lambda pair: pair[0].lr)
    )
    lines = [f"tuning of {label}: {tried}"]
    if tuning.at_edge:
        lines.append(
            "  the best is at the edge of the grid; a larger --tune, or --lr, may do better"
        )
    return lines


def switch_note(label: str, runs: Sequence[Run]) -> str | None:
    """When a contestant went over to its base, for reading.

    Args:
        label: The contestant's label.
        runs: Its runs, in order of seeds.

    Returns:
        One line; None if it never did.
    """
    steps = [run.switched_at for run in runs]
    average = mean_switch(runs)
    if average is None:
        return None
    if len(steps) == 1:
        return f"{label} switched to the base at step {average:.0f}"
    each = ", ".join("never" if step is None else str(step) for step in steps)
    return f"{label} switched to the base at step {average:.0f} on average (by seed: {each})"


def print_report(race: Race, stream: TextIO) -> None:
    """Prints the table and what must be known to read it.

    Args:
        race: A race with at least one complete seed.
        stream: Where it goes.
    """
    settings, summaries = race.settings, summarize(race)
    seeds = len(race.of(settings.baseline))
    for label, tuning in race.tunings.items():
        for line in tuning_notes(label, tuning):
            print(line, file=stream)
    rows = [
        cells(summary)
        + (
            match_cells(
                race.matches.get(summary.contestant),
                baseline=summary.contestant == settings.baseline,
                steps=settings.steps,
            )
            if settings.match
            else []
        )
        for summary in summaries
    ]
    headers = [*HEADERS, *(MATCH_HEADERS if settings.match else ())]
    best = min(range(len(summaries)), key=lambda index: summaries[index].loss)
    print(file=stream)
    print_table(headers, rows, stream, marked=best)
    print(
        f"\nmean over {seeds} seed(s) after {settings.steps} steps; ms and time of a training "
        f"step; ratios are to {settings.baseline}, of CPU time",
        file=stream,
    )
    if settings.match:
        print(
            f"match: the fewest steps, with a whole schedule, that end level with "
            f"{settings.baseline}; then their number and their time as ratios",
            file=stream,
        )
    for contestant in settings.contestants:
        if note := switch_note(contestant.label, race.of(contestant.label)):
            print(note, file=stream)
    if race.interrupted:
        print(f"interrupted: {seeds} of {settings.seeds} seeds are complete and kept", file=stream)
