"""A race: contestants train the same model on the same batches, each tuned alike, in turn."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .cli import INTERRUPTED, UnknownNameError, prepare_folder, sizes_of
from .contestants import Contestant, build, check_all, checked_contestants, report_loss
from .results import (
    Match,
    Point,
    Race,
    Run,
    Settings,
    Trial,
    Tuning,
    mean,
    race_record,
    settings_record,
    step_seconds,
    write_curves,
    write_record,
)
from .show import Progress, Record, draw_race, make_progress, print_conditions, print_report
from .tasks import Batch, Task, batches, held_out_loss, load_task, new_model

# Learning rates are chosen on a seed that is never reported.
TUNING_SEED = 1_000
CURVE_POINTS = 10
# The search for the steps that match ends within this share of the baseline's steps.
RESOLUTION = 0.01

T = TypeVar("T")


# One run


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The part of the peak rate at a step from 0: linear warm-up, then half a cosine to the end."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, shared storage counted once."""
    leaves = tree_leaves(dict(optimizer.state))
    storages = (leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass
class Training:
    """A run under way: a contestant's model and optimizer, its clocks and its curve."""

    contestant: Contestant
    task: Task
    seed: int
    steps: int  # of the whole schedule
    trial: Trial
    warmup: float
    points: int = 1  # of the curve, the last at the end
    done: int = 0
    loss: float = math.nan
    diverged: bool = False
    cpu: float = 0.0
    wall: float = 0.0
    peak_state: int = 0
    curve: list[Point] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Makes model and optimizer."""
        self.model = new_model(self.task, self.seed)
        self.optimizer = build(self.contestant, self.model, self.trial.lr, self.trial.weight_decay)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.stops = {round(self.steps * (index + 1) / self.points) for index in range(self.points)}

    @property
    def running(self) -> bool:
        """Whether steps are left to take."""
        return self.done < self.steps and not self.diverged

    def advance(self, batch: Batch) -> None:
        """Takes one step, and looks at the held-out loss where a point is due."""
        factor = rate_factor(self.done, self.steps, self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        wall, cpu = time.perf_counter(), time.process_time()
        self._step(*batch)
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        self.done += 1
        self.recent.append(self.loss)
        if self.done in self.stops and not self.diverged:
            self._look()

    def _step(self, inputs: Tensor, target: Tensor) -> None:
        """Takes one training step, unless the loss or a decomposition shows divergence."""
        loss = self.task.loss(self.model(inputs), target)
        self.loss = loss.item()
        self.diverged = not math.isfinite(self.loss)
        if self.diverged:
            return
        loss.backward()
        report_loss(self.contestant, self.optimizer, loss)
        try:
            self.optimizer.step()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Decompositions refuse the weights of a run that is about to diverge.
            self.diverged = True
        self.optimizer.zero_grad()

    def _look(self) -> None:
        """Adds a point to the curve."""
        held_out = held_out_loss(self.task, self.model)
        training = sum(self.recent) / len(self.recent)
        self.recent.clear()
        self.curve.append(Point(self.done, training, held_out, self.cpu, self.wall))
        self.peak_state = max(self.peak_state, state_bytes(self.optimizer))

    def result(self) -> Run:
        """The run as it ended; its loss is infinite if it did not get to the end."""
        complete = self.done == self.steps and not self.diverged
        return Run(
            contestant=self.contestant.label,
            seed=self.seed,
            steps=self.steps,
            trial=self.trial,
            loss=self.curve[-1].held_out_loss if complete else math.inf,
            cpu_seconds=self.cpu,
            wall_seconds=self.wall,
            state_bytes=self.peak_state,
            curve=tuple(self.curve),
            switched_at=getattr(self.optimizer, "switched_at", None),
        )


# One round


def in_turn(everyone: Sequence[T], index: int) -> Sequence[T]:
    """All of them, each first in its turn, since who comes first finds other caches."""
    first = index % len(everyone)
    return (*everyone[first:], *everyone[:first])


def train_together(trainings: Sequence[Training], seed: int, progress: Progress) -> list[Run]:
    """Trains several runs step by step in turn, on the same stream of batches."""
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
    """One run for each contestant that has a trial, all with the same weights and batches."""
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
    return train_together(trainings, seed, progress)


# Tuning


def choose(trials: Sequence[Trial], losses: Sequence[float | None]) -> Tuning:
    """Picks the trial of the lowest loss; None is the loss of a trial that was not run."""
    tried = tuple(zip(trials, losses, strict=True))
    best = min(tried, key=lambda pair: math.inf if pair[1] is None else pair[1])[0]
    rates = {trial.lr for trial in trials}
    return Tuning(tried, best, len(rates) > 1 and best.lr in {min(rates), max(rates)})


def tune(race: Race, progress: Progress) -> None:
    """Chooses every contestant's learning rate and weight decay; fills in the race's tunings."""
    settings = race.settings
    plans = {who.label: settings.trials(who) for who in settings.contestants}
    tuned = {label: trials for label, trials in plans.items() if len(trials) > 1}
    losses: dict[str, list[float | None]] = {label: [] for label in tuned}
    rounds = max(map(len, tuned.values()), default=0)
    for index in range(rounds):
        for run in run_round(
            settings,
            {label: trials[index] for label, trials in tuned.items() if index < len(trials)},
            seed=TUNING_SEED,
            steps=settings.steps,
            title=f"tuning {index + 1}/{rounds}",
            progress=progress,
        ):
            losses[run.contestant].append(run.loss)
    for label, trials in plans.items():
        race.tunings[label] = choose(trials, losses.get(label, [None]))


# Steps to match


def fewest_steps(
    loss_at: Callable[[int], float], target: float, steps: int, resolution: int
) -> tuple[int, list[tuple[int, float]]]:
    """The fewest of `steps` with a loss of at most the target, by bisection, and all probes."""
    # The end points are multiples of the resolution apart, so that every probe is one too.
    few, enough = steps - math.ceil(steps / resolution) * resolution, steps
    probes: list[tuple[int, float]] = []
    while enough - few > resolution:
        middle = few + (enough - few) // resolution // 2 * resolution
        loss = loss_at(middle)
        probes.append((middle, loss))
        few, enough = (few, middle) if loss <= target else (middle, enough)
    return enough, probes


def resolution_for(steps: int) -> int:
    """How finely the number of steps is searched, in steps."""
    return max(1, round(RESOLUTION * steps))


def guessed_steps(settings: Settings) -> int:
    """A guess of the steps that the search for one contestant trains over all seeds."""
    probes = math.ceil(math.log2(max(2, settings.steps / resolution_for(settings.steps))))
    return settings.seeds * (probes * settings.steps // 2)


def match(race: Race, label: str, progress: Progress) -> Match:
    """Finds how many steps a contestant needs to equal the baseline."""
    settings, resolution = race.settings, resolution_for(race.settings.steps)
    baseline, own = race.of(settings.baseline), race.of(label)
    target = mean([run.loss for run in baseline])

    def loss_at(steps: int) -> float:
        # A run with a whole schedule over every seed.
        runs = [
            run_round(
                settings,
                {label: race.tunings[label].best},
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
    # The time of a step is that in the race itself, where all run side by side.
    cpu, wall = (
        ratio * step_seconds(own, clock) / step_seconds(baseline, clock)
        for clock in ("cpu_seconds", "wall_seconds")
    )
    return Match(label, target, enough, resolution, ratio, cpu, wall, tuple(probes))


def match_all(race: Race, progress: Progress) -> None:
    """Searches for all contestants but the baseline; fills in the race's matches."""
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


# The whole race


def planned_steps(settings: Settings) -> int:
    """The training steps that a race takes, as far as is known beforehand."""
    plans = [len(settings.trials(who)) for who in settings.contestants]
    tuning = sum(count for count in plans if count > 1)
    steps = (tuning + settings.seeds * len(plans)) * settings.steps
    return steps + (len(plans) - 1) * guessed_steps(settings) * settings.match


def run_seeds(race: Race, progress: Progress) -> None:
    """Runs every contestant over all seeds; fills in the race's runs, seed by seed."""
    settings = race.settings
    for seed in range(settings.seeds):
        title = f"seed {seed + 1}/{settings.seeds}"
        runs = run_round(
            settings,
            {label: tuning.best for label, tuning in race.tunings.items()},
            seed=seed,
            steps=settings.steps,
            title=title,
            progress=progress,
            points=CURVE_POINTS,
        )
        race.runs += runs
        losses = ", ".join(f"{run.contestant} {run.loss:.4f}" for run in runs)
        progress.note(f"{title}: held-out loss {losses}")


def run_race(settings: Settings, progress: Progress) -> Race:
    """Runs a race; an interruption keeps what is complete."""
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


# The command


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings of a race, everything checked that can be beforehand."""
    contestants = checked_contestants(arguments.contestants)
    labels = [contestant.label for contestant in contestants]
    baseline = "".join((arguments.baseline or labels[0]).split())
    if baseline not in labels:
        raise UnknownNameError("baseline", baseline, labels)
    for label, _ in arguments.lr:
        if label not in labels:
            raise UnknownNameError("contestant of --lr", label, labels)
    task = load_task(arguments.task, sizes_of(arguments))
    check_all(contestants, lambda: new_model(task, 0))
    return Settings(
        task=task,
        contestants=contestants,
        baseline=baseline,
        steps=arguments.steps or task.steps,
        seeds=arguments.seeds,
        tune=arguments.tune,
        weight_decays=tuple(arguments.weight_decay),
        rates=dict(arguments.lr),
        warmup=arguments.warmup,
        match=arguments.match,
    )


def write_files(race: Race, record: Record, folder: Path) -> list[Path]:
    """Writes picture, results and curves of a race with at least one complete seed."""
    files = [folder / name for name in ("curves.png", "results.json", "curves.csv")]
    picture, results, curves = files
    write_record(record, results)
    write_curves(race, curves)
    draw_race(record, picture)
    return files


def compare(arguments: argparse.Namespace) -> int:
    """Runs the command `mkor compare` and returns the exit status."""
    torch.set_num_threads(arguments.threads)
    folder = prepare_folder(arguments.out)
    settings = settings_of(arguments)
    print_conditions(settings_record(settings), arguments.threads, sys.stdout)
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        race = run_race(settings, progress)
    if not race.runs:
        print("interrupted before the first seed was complete; nothing to show", file=sys.stderr)
        return INTERRUPTED
    record = race_record(race)
    files = write_files(race, record, folder) if folder is not None else []
    print_report(record, sys.stdout)
    if files:
        print("written:", ", ".join(map(str, files)))
    return INTERRUPTED if race.interrupted else 0
