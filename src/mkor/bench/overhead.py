"""The command `mkor overhead`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional

from .compare import checked_contestants, sizes_of
from .errors import UnknownNameError, UsageError
from .files import FORMAT, plain
from .machine import environment
from .optimizers import check
from .processes import processes
from .progress import make_progress
from .scaling import scaling
from .tables import bytes_text, print_table
from .tasks import TASKS, batches, load_task, new_model
from .timing import Subject, Timing, measure

MLP_SIZES = {"width": 512, "depth": 4, "rows": 4096}
OUTPUTS = 16
SEED = 0


def make_mlp(width: int, depth: int) -> nn.Module:
    """Square linear layers with GELU, and a narrow output layer.

    Args:
        width: Width of the hidden layers.
        depth: Number of hidden layers.

    Returns:
        The model.
    """
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, OUTPUTS))


def mlp_subject(sizes: dict[str, int]) -> Subject:
    """Regression of random numbers on random numbers.

    Args:
        sizes: Width, depth and rows.

    Returns:
        The subject.
    """
    generator = torch.Generator().manual_seed(SEED)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return make_mlp(sizes["width"], sizes["depth"])

    def normal(columns: int) -> Tensor:
        return torch.randn(sizes["rows"], columns, generator=generator)

    batch = (normal(sizes["width"]), normal(OUTPUTS))
    return Subject("mlp", sizes, build, functional.mse_loss, batch)


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
    name = arguments.model
    given = {key: value for key, value in sizes_of(arguments).items() if value is not None}
    if name == "mlp":
        given |= {"rows": arguments.rows} if arguments.rows else {}
        for key in given:
            if key not in MLP_SIZES:
                raise UsageError(f"mlp has no --{key}; its sizes are --width, --depth, --rows.")
        return mlp_subject({**MLP_SIZES, **given})
    if name not in TASKS:
        raise UnknownNameError("model", name, ["mlp", *TASKS])
    if arguments.rows:
        raise UsageError(f"--rows is for mlp; {name} has --batch.")
    task = load_task(name, dict(given))
    batch = next(batches(task, SEED))
    return Subject(name, dict(task.sizes), lambda: new_model(task, SEED), task.loss, batch)


def print_timings(timings: Sequence[Timing], stream: TextIO) -> None:
    """Prints two tables: whole iterations, then their parts.

    Args:
        timings: The first is the base's.
        stream: Where they go.
    """
    headers = ("contestant", "ms", "ratio", "quartiles", "mean", "wall", "state", "extra memory")
    rows = [
        (
            timing.contestant,
            f"{timing.cpu_ms:.3g}",
            f"{timing.ratio:.3f}x",
            f"{timing.low:.3f}-{timing.high:.3f}",
            f"{timing.mean_ratio:.3f}x",
            f"{timing.wall_ratio:.3f}x",
            bytes_text(timing.state_bytes),
            f"{timing.extra_memory:.2%}",
        )
        for timing in timings
    ]
    print_table(headers, rows, stream)
    print(
        f"\nCPU time of a training iteration; ratios to {timings[0].contestant}, median over "
        "rounds;\nmean: of all rounds, periodic work included; wall: ratio of wall times;\n"
        "extra memory: state beyond the base's, over its weights, gradients and state;\n"
        "mkor-h is timed after its switch\n",
        file=stream,
    )
    parts = list(dict.fromkeys(part for timing in timings for part in timing.parts_ms))
    names = [part.removeprefix("mkor.") for part in parts]
    shares = [
        (
            timing.contestant,
            *(f"{timing.parts_ms[part]:.3g}" if part in timing.parts_ms else "" for part in parts),
        )
        for timing in timings
    ]
    print_table(("ms in parts", *names), shares, stream)
    print(
        "\nprofiled apart from the timing; capture is part of forward and backward, "
        "what follows it of step",
        file=stream,
    )


def write_timings(timings: Sequence[Timing], subject: Subject, rounds: int, path: Path) -> None:
    """Writes all figures as JSON.

    Args:
        timings: The timings.
        subject: What was trained.
        rounds: Timed iterations of each.
        path: The file.
    """
    record = {
        "format": FORMAT,
        "model": {"name": subject.name, "sizes": subject.sizes},
        "rounds": rounds,
        "environment": environment(),
        "timings": [asdict(timing) for timing in timings],
    }
    path.write_text(json.dumps(plain(record), indent=1) + "\n", encoding="utf-8")


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
    if arguments.widths or arguments.plot:
        raise UsageError("--widths and --plot go with --scaling.")
    torch.set_num_threads(arguments.threads)
    contestants = checked_contestants(arguments.contestants)
    path = Path(arguments.json) if arguments.json else None
    if path and not path.parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {path.parent}.")
    subject = make_subject(arguments)
    for contestant in contestants:
        check(contestant, subject.build())
    sizes = ", ".join(f"{key} {value}" for key, value in subject.sizes.items())
    print(f"{subject.name}: {sizes}; {arguments.rounds} rounds, {arguments.threads} thread(s)\n")
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        timings = measure(contestants, subject, arguments.rounds, progress)
    print_timings(timings, sys.stdout)
    if path:
        write_timings(timings, subject, arguments.rounds, path)
    return 0
