"""The command `mkor overhead --processes`: bytes sent, counted at real collectives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from .compare import checked_contestants
from .contestants import Contestant
from .errors import UsageError
from .files import FORMAT, write_record
from .machine import environment
from .optimizers import check_all
from .places import prepare_file
from .processes_count import KINDS
from .processes_launch import run_together
from .processes_models import subject_of
from .processes_theory import LayerSize, expected, formula
from .processes_work import Counted, Request, count_all
from .progress import make_progress
from .tables import bytes_text, print_table
from .worker import Subject

OWN_OPTIONS = {"processes", "contestants", "model", "rows", "width", "depth", "batch", "context"}
OWN_OPTIONS |= {"threads", "json", "quiet"}
TOTAL_SECONDS = 3600.0
ITEM = 4
"""Bytes of a number."""
NOTE = """
bytes that a process hands to collectives in a step, counted at torch's dispatcher (a broadcast
counts for who has the data), mean over processes and over the steps between two updates;
beside gradients: all other kinds over the gradients' bytes; theory: what these kinds should be for
the layers that are preconditioned (sums of output layers, left to the base, are sent too);
sent: what the kernel sent over TCP, and that over what the collectives make optimal algorithms
send (an all-reduce of n bytes over W processes: 2 n (W-1)/W)
"""
LAYER_NOTE = """
counted: what is handed less where one such layer is left to the base. Beside the theory it holds
counts of rows and sums of squares; for KFAC also a mean vector of each side, which takes the place
of the bias's row and column
"""


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes handed to collectives for one layer, per step and process.

    Attributes:
        size: Of the layer.
        layers: How many there are of this size.
        counted: At collectives.
        theory: By its formula.
    """

    size: LayerSize
    layers: int
    counted: float
    theory: float


@dataclass(frozen=True)
class Traffic:
    """What a contestant sends in a step, mean over processes.

    Attributes:
        contestant: Its label.
        gradients: Bytes of all gradients.
        kinds: Bytes handed to collectives, by kind.
        theory: What they should be, by kind, but for counts and mean squares.
        share: All kinds but gradients, over the gradients' bytes.
        formula: Of numbers per layer and update.
        most: All bytes handed by the process with most.
        wire: Bytes that the collectives make a process send at best.
        kernel: Bytes that the kernel sent.
        calls: Collectives.
        layers: By size.
    """

    contestant: str
    gradients: int
    kinds: dict[str, float]
    theory: dict[str, float]
    share: float
    formula: str
    most: float
    wire: float
    kernel: float | None
    calls: float
    layers: list[LayerTraffic]


def merged(contestant: Contestant, parts: Sequence[Counted]) -> Traffic:
    """Puts together what the processes counted.

    Args:
        contestant: Whose steps they counted.
        parts: What each process counted.

    Returns:
        The whole.
    """
    first, world = parts[0], len(parts)
    kinds = {
        kind: sum(part.kinds.get(kind, 0.0) for part in parts) / world
        for kind in KINDS
        if any(kind in part.kinds for part in parts)
    }
    sizes = [size for size, layers in first.sizes.items() for _ in range(layers)]
    theory = {"gradients": float(first.gradients)}
    theory |= {kind: ITEM * n for kind, n in expected(contestant, sizes, world).items()}
    kernel = [part.kernel for part in parts if part.kernel is not None]
    return Traffic(
        contestant=contestant.label,
        gradients=first.gradients,
        kinds=kinds,
        theory=theory,
        share=(sum(kinds.values()) - kinds.get("gradients", 0.0)) / first.gradients,
        formula=formula(contestant, world),
        most=max(sum(part.kinds.values()) for part in parts),
        wire=sum(part.wire for part in parts) / world,
        kernel=sum(kernel) / world if kernel else None,
        calls=first.calls,
        layers=[
            LayerTraffic(
                size,
                layers,
                sum(part.layers[size] for part in parts) / world,
                ITEM * sum(expected(contestant, [size], world).values()),
            )
            for size, layers in first.sizes.items()
        ],
    )


def print_traffic(found: Sequence[Traffic], stream: TextIO) -> None:
    """Prints two tables: whole steps, and single layers.

    Args:
        found: What the contestants send.
        stream: Where they go.
    """
    kinds = [kind for kind in KINDS if any(traffic.kinds.get(kind) for traffic in found)]
    headers = ("contestant", *kinds, "beside gradients", "theory", "sent", "of optimal")
    rows = []
    for traffic in found:
        own = sum(size for kind, size in traffic.theory.items() if kind != "gradients")
        kernel = traffic.kernel
        sent = ("", "") if kernel is None else (bytes_text(kernel), f"{kernel / traffic.wire:.4f}")
        cells = [bytes_text(traffic.kinds[k]) if k in traffic.kinds else "" for k in kinds]
        theory = f"{own / traffic.gradients:.3%}"
        rows.append((traffic.contestant, *cells, f"{traffic.share:.3%}", theory, *sent))
    print_table(headers, rows, stream)
    print(NOTE, file=stream)
    layers = [
        (
            traffic.contestant,
            f"{layer.layers} x {layer.size.d_out} x {layer.size.d_in}",
            f"{layer.counted / ITEM:,.0f}",
            f"{layer.theory / ITEM:,.0f}",
            f"{layer.counted / ITEM / layer.size.weights:.3%}",
            traffic.formula,
        )
        for traffic in found
        for layer in traffic.layers
    ]
    if layers:
        headers = ("numbers per step", "layers", "counted", "theory", "of gradient", "per update")
        print_table(headers, layers, stream)
        print(LAYER_NOTE, file=stream)


def write_traffic(found: Sequence[Traffic], subject: Subject, world: int, path: Path) -> None:
    """Writes all figures as JSON.

    Args:
        found: What the contestants send.
        subject: What was trained.
        world: By how many processes.
        path: The file.
    """
    record = {
        "format": FORMAT,
        "model": {"name": subject.name, "sizes": subject.sizes},
        "processes": world,
        "backend": "gloo",
        "environment": environment(),
        "units": "bytes per step and process; layers' sizes count the bias as an input",
        "contestants": [_record(traffic) for traffic in found],
    }
    write_record(record, path)


def _record(traffic: Traffic) -> dict[str, object]:
    layers = [
        {
            "d_out": layer.size.d_out,
            "d_in": layer.size.d_in,
            "layers": layer.layers,
            "counted": layer.counted,
            "theory": layer.theory,
        }
        for layer in traffic.layers
    ]
    return {**vars(traffic), "layers": layers}


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses options of the timings.

    Args:
        arguments: The parsed command line.

    Raises:
        UsageError: If one was given.
    """
    from .cli import make_parser

    for name, default in vars(make_parser().parse_args(["overhead"])).items():
        if name not in OWN_OPTIONS and getattr(arguments, name) != default:
            raise UsageError(f"--processes counts what is sent and takes no {name}.")


def processes(arguments: argparse.Namespace) -> int:
    """Counts what contestants send.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.

    Raises:
        UsageError: If the figures cannot be written where they should go.
    """
    check_options(arguments)
    path = prepare_file("--json", arguments.json)
    torch.set_num_threads(arguments.threads)
    contestants, world = checked_contestants(arguments.contestants), arguments.processes
    subject = subject_of(arguments)
    check_all(contestants, subject.build)
    sizes = ", ".join(f"{key} {value}" for key, value in subject.sizes.items())
    print(f"{subject.name}: {sizes}; {world} processes\n")
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        progress.expect(len(contestants))
        progress.phase("counting", [each.label for each in contestants], 1, unit="MB")
        parts = run_together(
            count_all,
            world,
            Request(contestants, arguments),
            lambda said: progress.advance(said[0], 1, said[1] / 1e6),
            TOTAL_SECONDS,
        )
    each = zip(contestants, zip(*parts, strict=True), strict=True)
    found = [merged(contestant, counts) for contestant, counts in each]
    print_traffic(found, sys.stdout)
    if path:
        write_traffic(found, subject, world, path)
    return 0
