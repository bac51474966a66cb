"""The tables of `mkor overhead`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from .overhead_counts import PARTS
from .overhead_limits import Limit, Machine
from .tables import bytes_text, print_table
from .timing import Timing
from .worker import STAGES


def print_timings(timings: Sequence[Timing], stream: TextIO) -> None:
    """Prints three tables: whole iterations, what they do, and their parts.

    Args:
        timings: The first is the base's.
        stream: Where they go.
    """
    print_ratios(timings, stream)
    print_counts(timings, stream)
    print_parts(timings, stream)


def print_ratios(timings: Sequence[Timing], stream: TextIO) -> None:
    """Prints what whole iterations take.

    Args:
        timings: The first is the base's.
        stream: Where they go.
    """
    times = ("ms", "ratio", "quartiles", "mean", "wall")
    headers = ("contestant", *times, "state", "extra memory", "buffers")
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
            bytes_text(timing.buffer_bytes),
        )
        for timing in timings
    ]
    print_table(headers, rows, stream)
    print(
        f"\nCPU time of a training iteration; ratios to {timings[0].contestant}, median over "
        "rounds\n(on a GPU of wall times); mean: of all rounds, periodic work included; wall: "
        "ratio of wall times;\nextra memory: state beyond the base's, over its weights, gradients "
        "and state;\nbuffers: what else stays, where a step's statistics are summed; mkor-h is "
        "timed after its switch\n",
        file=stream,
    )


def print_counts(timings: Sequence[Timing], stream: TextIO) -> None:
    """Prints what iterations do.

    Args:
        timings: Of all contestants.
        stream: Where they go.
    """
    gpu = any(timing.counts.kernels for timing in timings)
    calls = ("operator calls", "own kernels")
    headers = ("an iteration's", *calls, "allocations", "their sum", "peak memory")
    rows = [
        (
            timing.contestant,
            f"{timing.counts.operators:.0f}",
            f"{timing.counts.own_calls:.0f}",
            f"{timing.counts.allocations:.0f}",
            bytes_text(timing.counts.allocated_bytes),
            bytes_text(timing.counts.peak_bytes),
            f"{timing.page_faults:.0f}",
            *([f"{timing.counts.kernels:.0f}"] if gpu else []),
        )
        for timing in timings
    ]
    print_table((*headers, "page faults", *(["kernels"] if gpu else [])), rows, stream)
    print(
        "\noperators called from Python and from the backward pass, not from other operators; own "
        "kernels:\ncalls of those of this package, on a CPU; peak memory: activations, gradients "
        "and temporaries,\nbeyond what stays from iteration to iteration\n",
        file=stream,
    )


def print_parts(timings: Sequence[Timing], stream: TextIO) -> None:
    """Prints the parts of iterations.

    Args:
        timings: Of all contestants.
        stream: Where they go.
    """
    parts = [part for part in PARTS if any(part in timing.parts_ms for timing in timings)]
    names = [part.removeprefix("mkor.") for part in parts]
    shares = [(timing.contestant, *(_cell(timing, part) for part in parts)) for timing in timings]
    print_table(("ms (calls) in parts", *names), shares, stream)
    print(
        f"\nmean CPU time; {', '.join(STAGES)} as timed, the others profiled apart from that; "
        "capture is part of\nforward and backward, what follows it of step",
        file=stream,
    )


def _cell(timing: Timing, part: str) -> str:
    if part not in timing.parts_ms:
        return ""
    calls = timing.counts.operators_in.get(part, 0.0)
    return f"{timing.parts_ms[part]:.3g} ({calls:.0f})"


def print_limits(label: str, limits: Sequence[Limit], machine: Machine, stream: TextIO) -> None:
    """Prints the bounds of a contestant's parts.

    Args:
        label: The contestant.
        limits: Its bounds.
        machine: What they were computed with.
        stream: Where they go.
    """
    rows = [
        (
            limit.part.removeprefix("mkor."),
            bytes_text(limit.bytes),
            f"{limit.bytes_ms:.3g}",
            f"{1e-6 * limit.operations:.3g}" if limit.operations else "",
            f"{limit.operations_ms:.3g}" if limit.operations else "",
            f"{limit.calls:.0f}",
            f"{limit.calls_ms:.3g}",
            f"{limit.measured_ms:.3g}",
            f"{limit.near:.0%}",
        )
        for limit in limits
    ]
    headers = ("moves", "ms", "Mflop", "ms", "calls", "ms", "measured ms", "near")
    print(file=stream)
    print_table((f"limits of {label}", *headers), rows, stream)
    slow, fast = min(machine.bandwidth.values()), max(machine.bandwidth.values())
    print(
        f"\nleast bytes at {1e-9 * slow:.3g} to {1e-9 * fast:.3g} GB/s (as measured for the size), "
        f"operations at {1e-9 * machine.operations:.3g} Gflop/s,\nand calls at "
        f"{1e6 * machine.call:.2g} us (the smallest operator), measured in the same run; "
        "near: the larger of\nthe first two over the time that was measured",
        file=stream,
    )
