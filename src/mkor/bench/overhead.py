"""The command `mkor overhead`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .compare import checked_contestants, sizes_of
from .errors import UnknownNameError, UsageError
from .files import FORMAT, write_record
from .machine import environment
from .memory import keep_memory
from .optimizers import check_all
from .overhead_limits import Limit, Machine, has_limits, limits_of, measure_machine
from .overhead_models import MODELS, model_subject
from .overhead_plot import draw
from .overhead_tables import print_limits, print_timings
from .places import prepare_file, prepare_picture
from .processes import processes
from .progress import make_progress
from .scaling import scaling
from .tasks import TASKS, batches, load_task, new_model
from .timing import Timing, summarize_all
from .turns import run_all
from .worker import Subject, Worker

SEED = 0


def make_subject(arguments: argparse.Namespace) -> Subject:
    """What the command line asks to be timed.

    Args:
        arguments: The parsed command line.

    Returns:
        The subject.

    Raises:
        UnknownNameError: If there is no such model.
        UsageError: If it has no such size.
    """
    subject = _named_subject(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU.")
    autocast = torch.bfloat16 if arguments.bf16 else None
    return replace(subject, device=arguments.device, autocast=autocast)


def _named_subject(arguments: argparse.Namespace) -> Subject:
    name = arguments.model
    given = {key: value for key, value in sizes_of(arguments).items() if value is not None}
    if name in MODELS:
        return model_subject(name, given | ({"rows": arguments.rows} if arguments.rows else {}))
    if name not in TASKS:
        raise UnknownNameError("model", name, [*MODELS, *TASKS])
    if arguments.rows:
        raise UsageError(f"--rows is for mlp; {name} has --batch.")
    task = load_task(name, dict(given))
    batch = next(batches(task, SEED))
    return Subject(name, dict(task.sizes), lambda: new_model(task, SEED), task.loss, batch)


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        subject: What was trained.
        rounds: Timed iterations of each contestant.
        timings: What they cost; the first is the base's.
        kept: Whether memory that was given back was kept for the next iteration.
        machine: What the machine is able to do, if bounds were wanted.
        limits: The bounds of a contestant's parts, by its label.
    """

    subject: Subject
    rounds: int
    timings: Sequence[Timing]
    kept: bool
    machine: Machine | None
    limits: dict[str, list[Limit]]


def find_limits(
    workers: Sequence[Worker], timings: Sequence[Timing], machine: Machine
) -> dict[str, list[Limit]]:
    """The bounds of those contestants that have some.

    Args:
        workers: The workers, the first of them with the base.
        timings: Their times.
        machine: What the machine is able to do.

    Returns:
        By label.
    """
    return {
        worker.label: limits_of(worker, workers[0], timing, machine)
        for worker, timing in zip(workers, timings, strict=True)
        if has_limits(worker)
    }


def write_report(report: Report, path: Path) -> None:
    """Writes all figures as JSON.

    Args:
        report: Everything that was found.
        path: The file.
    """
    subject = report.subject
    gpu = torch.cuda.get_device_name() if subject.device == "cuda" else None
    record = {
        "format": FORMAT,
        "model": {"name": subject.name, "sizes": subject.sizes},
        "rounds": report.rounds,
        "device": gpu or subject.device,
        "autocast": subject.autocast,
        "memory_kept": report.kept,
        "environment": environment(),
        "timings": [asdict(timing) for timing in report.timings],
        "machine": report.machine and asdict(report.machine),
        "limits": {
            label: [{**asdict(limit), "near": limit.near} for limit in limits]
            for label, limits in report.limits.items()
        },
    }
    write_record(record, path)


def overhead(arguments: argparse.Namespace) -> int:
    """Times contestants.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.

    Raises:
        UsageError: If the figures cannot be written where they should go, or an option of
            `--scaling` comes without it.
    """
    if arguments.processes:
        return processes(arguments)
    if arguments.scaling:
        return scaling(arguments)
    if arguments.widths:
        raise UsageError("--widths goes with --scaling.")
    torch.set_num_threads(arguments.threads)
    contestants = checked_contestants(arguments.contestants)
    record = prepare_file("--json", arguments.json)
    picture = prepare_picture("--plot", arguments.plot)
    subject = make_subject(arguments)
    check_all(contestants, subject.build)
    kept = keep_memory()
    sizes = ", ".join(f"{key} {value}" for key, value in subject.sizes.items())
    print(f"{subject.name}: {sizes}; {arguments.rounds} rounds, {arguments.threads} thread(s)\n")
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        workers = run_all(contestants, subject, arguments.rounds, progress)
        machine = measure_machine(subject.device) if arguments.limits else None
    timings = summarize_all(workers)
    print_timings(timings, sys.stdout)
    limits: dict[str, list[Limit]] = {}
    if machine:
        limits = find_limits(workers, timings, machine)
        for label, found in limits.items():
            print_limits(label, found, machine, sys.stdout)
    if record:
        write_report(Report(subject, arguments.rounds, timings, kept, machine, limits), record)
    if picture:
        draw(timings, subject, picture)
    return 0
