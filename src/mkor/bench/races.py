"""Several races, one after the other or side by side, each stored and not run again."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from .contestants import parse_contestants
from .files import plain, settings_record, write_json
from .optimizers import check_all
from .progress import PlainProgress, Progress
from .race import Settings
from .runner import run_race
from .tasks import load_task, new_model

RESULTS, PICTURE = "results.json", "curves.png"
# Between lines of progress while several races speak at once.
LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Plan:
    """A race as plain numbers and texts, so that another process can be told of it.

    Attributes:
        name: Name of the race and of its folder.
        task: Name of the task.
        contestants: As they are written; the first is the baseline.
        seeds: Number of reported seeds.
        tune: Learning rates tried for each contestant.
        steps_scale: Length of a run over the task's own.
    """

    name: str
    task: str
    contestants: tuple[str, ...]
    seeds: int
    tune: int
    steps_scale: float = 1.0


def settings_of(plan: Plan) -> Settings:
    """The settings of a planned race.

    Args:
        plan: The plan.

    Returns:
        The settings; every contestant is known to be one that can be made.
    """
    task = load_task(plan.task)
    contestants = tuple(parse_contestants(",".join(plan.contestants)))
    check_all(contestants, lambda: new_model(task, 0))
    return Settings(
        task=task,
        contestants=contestants,
        baseline=contestants[0].label,
        steps=max(1, round(plan.steps_scale * task.steps)),
        seeds=plan.seeds,
        tune=plan.tune,
    )


def is_complete(path: Path, settings: Settings) -> bool:
    """Whether a file holds the whole of a race.

    Args:
        path: The file of results.
        settings: The race's settings.

    Returns:
        True if it is there, was not interrupted and was run with the same settings.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = json.loads(json.dumps(plain(settings_record(settings))))
    return record.get("interrupted") is False and record.get("settings") == wanted


def run_plan(plan: Plan, folder: Path, progress: Progress) -> bool:
    """Runs a race and stores it.

    Args:
        plan: The plan.
        folder: The folder of all races; this one gets its own in it.
        progress: Where it is shown.

    Returns:
        False if it was interrupted; nothing is stored then.
    """
    from .plot import draw

    race = run_race(settings_of(plan), progress)
    if race.interrupted:
        return False
    own = folder / plan.name
    own.mkdir(parents=True, exist_ok=True)
    draw(race, own / PICTURE)
    # A file of this name is complete, so it comes last and at once.
    unfinished = own / f"{RESULTS}.part"
    write_json(race, unfinished)
    unfinished.replace(own / RESULTS)
    return True


def run_apart(plan: Plan, folder: Path, quiet: bool) -> bool:
    """Runs a race in a process of its own, with one thread.

    Args:
        plan: The plan.
        folder: The folder of all races.
        quiet: Whether to show no progress.

    Returns:
        False if it was interrupted.
    """
    torch.set_num_threads(1)
    spoken = PlainProgress(sys.stderr, f"{plan.name}: ", LINE_SECONDS)
    return run_plan(plan, folder, Progress() if quiet else spoken)


def run_in_turn(plans: Sequence[Plan], folder: Path, progress: Progress) -> bool:
    """Runs races one after the other.

    Args:
        plans: The races.
        folder: Where they are stored.
        progress: Where they are shown.

    Returns:
        False if one was interrupted; the rest is not run then.
    """
    for index, plan in enumerate(plans):
        progress.note(f"race {index + 1}/{len(plans)}: {plan.name}")
        if not run_plan(plan, folder, progress):
            return False
    return True


def run_side_by_side(
    plans: Sequence[Plan], folder: Path, progress: Progress, jobs: int, *, quiet: bool
) -> bool:
    """Runs races in several processes.

    Args:
        plans: The races.
        folder: Where they are stored.
        progress: Where finished races are told of.
        jobs: Races at a time.
        quiet: Whether the processes show no progress of their own.

    Returns:
        False if one was interrupted; none is begun after that.
    """
    context = multiprocessing.get_context("spawn")
    ahead, count = list(reversed(plans)), 0
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: dict[Future[bool], Plan] = {}
        try:
            while ahead or running:
                # No more than run at once: what waits in the pool itself cannot be called back.
                while ahead and len(running) < jobs:
                    plan = ahead.pop()
                    running[pool.submit(run_apart, plan, folder, quiet)] = plan
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    if not future.result():
                        return False
                    count += 1
                    name = running.pop(future).name
                    progress.note(f"race {count}/{len(plans)} is complete: {name}")
        except KeyboardInterrupt:
            # Whoever pressed the keys interrupted the processes too; they end by themselves.
            return False
    return True


def run_all(
    plans: Sequence[Plan], folder: Path, progress: Progress, jobs: int, *, quiet: bool
) -> bool:
    """Runs those races that are not stored yet.

    Args:
        plans: The races.
        folder: Where they are stored.
        progress: Where they are shown.
        jobs: Races at a time.
        quiet: Whether to show no progress.

    Returns:
        False if one was interrupted; those that are complete are kept.
    """
    pending = []
    for plan in plans:
        if is_complete(folder / plan.name / RESULTS, settings_of(plan)):
            progress.note(f"{plan.name} is there already")
        else:
            pending.append(plan)
    if jobs > 1 and len(pending) > 1:
        return run_side_by_side(pending, folder, progress, jobs, quiet=quiet)
    return run_in_turn(pending, folder, progress)
