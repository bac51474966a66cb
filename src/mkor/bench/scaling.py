"""The command `mkor overhead --scaling`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch

from .errors import UsageError
from .files import FORMAT, write_record
from .machine import environment
from .places import prepare_file, prepare_picture
from .progress import make_progress
from .scaling_fit import FIT_FROM, SENT, Curve
from .scaling_plot import draw
from .scaling_times import WIDTHS, run_scaling
from .tables import print_table

OWN_OPTIONS = {"scaling", "widths", "plot", "json", "threads", "quiet"}
NOTE = f"""
one square Linear layer without bias, float32, random statistics handed in ready (so without
capture, and for KFAC without the batch's covariance); median CPU time of repeated runs.
exponent: slope of log time against log width, by least squares from width {FIT_FROM} up; then
over all widths. By their operations, KFAC's inverse grows as d^3, and so does preconditioning with
dense or KFAC factors, two products of d x d matrices; with a window of r vectors it takes 8 r d^2
operations, with Eva 5 d^2. Where matrices outgrow the caches, times grow faster than operations;
where small ones use the processor badly, slower.
"""


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses options of the other timing.

    Args:
        arguments: The parsed command line.

    Raises:
        UsageError: If one was given.
    """
    from .cli import make_parser

    defaults = vars(make_parser().parse_args(["overhead"]))
    for name, default in defaults.items():
        if name not in OWN_OPTIONS and getattr(arguments, name) != default:
            raise UsageError(f"--scaling times one layer by itself and takes no {name}.")


def exponents_of(curve: Curve) -> tuple[str, str]:
    """The fitted exponents for reading.

    Args:
        curve: A curve.

    Returns:
        From `FIT_FROM` up, and over all widths.
    """
    first, second = (
        "" if value is None else f"{value:.2f}" for value in (curve.exponent, curve.exponent_all)
    )
    return first, second


def print_curves(curves: Sequence[Curve], widths: Sequence[int], stream: TextIO) -> None:
    """Prints two tables: CPU time, and numbers to communicate.

    Args:
        curves: The curves.
        widths: Their widths.
        stream: Where they go.
    """
    columns = (*map(str, widths), "exponent", "all widths")
    times = [
        (f"{c.method}: {c.part}", *(f"{1e3 * value:.3g}" for value in c.values), *exponents_of(c))
        for c in curves
        if c.part != SENT
    ]
    print_table(("CPU ms at width", *columns), times, stream)
    print(NOTE, file=stream)
    sent = [
        (c.method, *(f"{value:,}" for value in c.values), *exponents_of(c))
        for c in curves
        if c.part == SENT
    ]
    print_table(("numbers sent per update", *columns), sent, stream)


def write_curves(curves: Sequence[Curve], widths: Sequence[int], path: Path) -> None:
    """Writes everything as JSON.

    Args:
        curves: The curves; times are in seconds.
        widths: Their widths.
        path: The file.
    """
    record = {
        "format": FORMAT,
        "layer": "one square Linear layer without bias, float32",
        "widths": widths,
        "fit_from": FIT_FROM,
        "environment": environment(),
        "curves": [asdict(curve) for curve in curves],
    }
    write_record(record, path)


def scaling(arguments: argparse.Namespace) -> int:
    """Times one layer's curvature against its width.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.
    """
    check_options(arguments)
    record = prepare_file("--json", arguments.json)
    beside = record and record.with_suffix(".png")
    picture = prepare_picture("--plot", arguments.plot or beside)
    torch.set_num_threads(arguments.threads)
    widths = arguments.widths or WIDTHS
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        curves = run_scaling(widths, progress)
    print_curves(curves, widths, sys.stdout)
    if record:
        write_curves(curves, widths, record)
    if picture:
        draw(curves, widths, picture)
    return 0
