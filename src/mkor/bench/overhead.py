"""The command `mkor overhead`: what a training step costs beside a base optimizer's.

Contestants train in turn, one step each a round, by CPU and wall clock. Afterwards the operators
of a step are counted, and it is profiled.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .bytes_sent import Ranges, bytes_sent
from .cli import prepare_file, prepare_picture
from .contestants import Contestant, Part, check_all, checked_contestants
from .models import Marks, Subject, Worker, make_subject
from .race import in_turn, state_bytes
from .results import FORMAT, environment, write_record
from .show import COLOURS, GREY, Progress, bytes_text, make_progress, picture, print_table

STAGES = ("forward", "backward", "step")
WITHIN_STEP = ("reduce", "measure", "update", "precondition", "base_step")
PARTS = (*STAGES, *(f"mkor.{part}" for part in ("capture", *WITHIN_STEP)))
# Steps that are counted and profiled: work that is done every tenth step is in one of them.
EXAMINED = 10
SLOWEST = 10

WAITING = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero"),
        *("masked_select", "unique_dim", "unique_consecutive", "_unique2", "bincount"),
        *("repeat_interleave", "lift_fresh", "_linalg_check_errors", "_linalg_eigh"),
        *("_linalg_svd", "linalg_eig", "linalg_lstsq", "cholesky_inverse"),
    )
}
"""Operators whose result, its size or its errors the host waits for on a GPU, or whose numbers
come from the host."""
COPIES = {"aten::_to_copy", "aten::copy_"}
DRAWN = ("forward", "backward", *(f"mkor.{part}" for part in WITHIN_STEP[:-1]), "step")
NOTES = (
    """
CPU time of a training step; ratios to {base}, median over rounds (on a GPU of wall times);
mean: of all rounds, periodic work included; wall: ratio of wall times; extra memory: state beyond
the base's, over its weights, gradients and state; buffers: what else stays, where a step's
statistics are summed; peak memory: activations, gradients and temporaries, beyond what stays;
mkor-h is timed after its switch
""",
    """
operator calls: all that torch dispatches below autograd, views too; calls per layer: those beyond
the base alone, over the layers that are preconditioned; host waits: operators at which the host
would wait for a GPU (values read, masks as indices, checked decompositions, numbers of the host
made tensors), beyond the base's, which on a CPU read their own step counts; Gflop: of products,
and their ratio, which no time can be far below where products decide
""",
    """
mean CPU time; forward, backward, step as timed, the others profiled apart from that; capture is
part of forward and backward, what follows it of step; calls are counted in the innermost part""",
)
READS = ("tolist", "numpy", "__array__", "cpu")
"""Methods that copy from a GPU; on a CPU they see memory without an operator."""


class Operators(Ranges):
    """Counts operators that reach torch's dispatcher below autograd: all that run, views included.

    An operator that is made of others (`linear`, `reshape`) counts as these, one that calls others
    inside its kernel once. `calls` has them by part; `waits` are those at which the host would
    wait for a device; `flops` are of the products that `torch.utils.flop_counter` knows.
    """

    def __init__(self, device: str) -> None:
        """Starts with nothing counted; only what happens on the device makes the host wait."""
        super().__init__()
        self.device, self.flops = device, 0
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Counts an operator and runs it."""
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        result = func(*args, **kwargs)
        if space == "profiler":
            self.follow(name, args)
        elif space == "aten":
            self.calls[next((part for part in reversed(self.open) if part in PARTS), "")] += 1
            self.waits[name] += self._waits(func._schema.name, args, kwargs, result)
            packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
            if packet in flop_registry:
                self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def _waits(self, name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> bool:
        leaves = tree_leaves((args, kwargs, result))
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if name in COPIES:
            asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
            return len(places) > 1 and not asynchronous
        indices = args[1] if name.startswith(("aten::index", "aten::_index")) else ()
        masked = isinstance(indices, list | tuple) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in indices
        )
        return self.device in places and (name in WAITING or masked)


class Reads(TorchFunctionMode):
    """Adds to `waits` what reads a tensor's memory without an operator."""

    def __init__(self, waits: Counter[str]) -> None:
        """Adds to what was counted before."""
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Counts a call and makes it."""
        name = getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counts:
    """What a step does, means over the counted ones: operators by part, waits by name, flops."""

    calls: dict[str, float]
    waits: dict[str, float]
    flops: float


def count(worker: Worker, steps: int = EXAMINED) -> Counts:
    """Counts what a worker's steps do."""
    operators = Operators(worker.subject.device)
    # A running profiler makes the wrapper name its parts.
    running = torch.profiler.profile(activities=[ProfilerActivity.CPU])
    reads = Reads(operators.waits if worker.subject.device == "cpu" else Counter())
    with running, reads, operators:
        for _ in range(steps):
            worker.iterate()
    calls, waits = (
        {key: value / steps for key, value in found.items() if value}
        for found in (operators.calls, operators.waits)
    )
    return Counts(calls, waits, operators.flops / steps)


@dataclass(frozen=True)
class Profile:
    """A profiled step: CPU ms of parts and of the slowest operators, GPU kernels, peak bytes."""

    parts_ms: dict[str, float]
    slowest_ms: dict[str, float]
    kernels: float
    peak_bytes: int


def profile(worker: Worker, steps: int = EXAMINED) -> Profile:
    """Profiles a worker's steps: means over them, of memory the most beyond what stays."""
    cuda = worker.subject.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profiler:
        marks = [worker.iterate() for _ in range(steps)]
    # The profiler measures wall time, of which a busy machine leaves this process only a share.
    share = min(1.0, sum(_seconds(marks, 0)) / sum(_seconds(marks, 1)))
    scale = 1e-3 * share / steps
    averages = profiler.key_averages()
    here = [each for each in averages if each.device_type == DeviceType.CPU]
    there = [each for each in averages if each.device_type == DeviceType.CUDA]
    operators = [each for each in here if each.key.startswith("aten::")]
    operators.sort(key=lambda each: -each.self_cpu_time_total)
    return Profile(
        {each.key: scale * each.cpu_time_total for each in here if each.key in PARTS},
        {each.key: scale * each.self_cpu_time_total for each in operators[:SLOWEST]},
        sum(e.count for e in there if not e.key.startswith((*PARTS, "Memcpy", "Memset"))) / steps,
        peak_of(_pieces(profiler, worker.subject.device)),
    )


def _pieces(profiler: Any, device: str) -> list[int]:
    """Bytes taken (positive) and given back, in their order."""
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = profiler.profiler.kineto_results.events()
    pieces = [e for e in events if e.name() == "[memory]" and e.device_type() == kind]
    return [piece.nbytes() for piece in sorted(pieces, key=lambda piece: piece.start_ns())]


def peak_of(pieces: Sequence[int]) -> int:
    """The most bytes that are taken at a time beyond those at the beginning."""
    return max(0, *accumulate(pieces)) if pieces else 0


def free(worker: Worker) -> int:
    """Frees model and optimizer; the bytes of tensors that were neither weights nor state."""
    gc.collect()
    before = _storages()
    known = _storages([*worker.model.parameters(), *worker.model.buffers()])
    state = state_bytes(worker.optimizer)
    del worker.model, worker.optimizer
    gc.collect()
    freed = before.keys() - _storages().keys() - known.keys()
    return max(0, sum(before[place] for place in freed) - state)


def _storages(objects: Sequence[object] | None = None) -> dict[int, int]:
    """Bytes of the memory that tensors lie in, by address: of these, or of all that there are."""
    found = gc.get_objects() if objects is None else objects
    tensors = [each for each in found if type(each) in (Tensor, nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if isinstance(each, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def keep_memory() -> bool:
    """Makes glibc keep memory that is given back; True if it does so from now on."""
    # Else whether a step pays for fresh pages depends on how the memory happens to lie, and ratios
    # differ by a tenth from run to run.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt and mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


@dataclass(frozen=True)
class Timing:
    """What a contestant's step costs; the first contestant is the base of all ratios.

    Times are medians over rounds, ratios too, with their quartiles; `mean_ratio` is of sums, so
    that work of every so many steps shows. On a GPU all ratios are of wall times. `extra_memory`
    is state beyond the base's over the base's weights, gradients and state; `buffer_bytes` what
    stays beside weights and state. `layer_calls` are operators beyond those of the same base alone,
    over the number of preconditioned layers; `waits` are those beyond the base's.
    """

    contestant: str
    cpu_ms: float
    wall_ms: float
    ratio: float
    low: float
    high: float
    mean_ratio: float
    wall_ratio: float
    state_bytes: int
    extra_memory: float
    layers: int
    layer_calls: float | None
    waits: float | None
    counts: Counts
    profile: Profile
    cpu_samples: list[float]
    wall_samples: list[float]
    buffer_bytes: int = 0


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of at least one number."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _seconds(marks: Sequence[Marks], clock: int, begin: int = 0, end: int = -1) -> list[float]:
    """CPU (0) or wall (1) seconds of each step, or of the stage between two marks."""
    return [each[end][clock] - each[begin][clock] for each in marks]


def prepare(contestants: Sequence[Contestant], subject: Subject) -> list[Worker]:
    """Makes a worker of each contestant and warms it up."""
    workers = [Worker(contestant, subject) for contestant in contestants]
    for worker in workers:
        worker.warm_up()
    return workers


def take_turns(workers: Sequence[Worker], rounds: int, progress: Progress | None = None) -> None:
    """Times one step of each a round; each is first in its turn, since caches differ then."""
    for index in range(rounds):
        for worker in in_turn(workers, index):
            worker.marks.append(worker.iterate())
            if progress:
                progress.advance(worker.label, index + 1, 1e3 * _seconds(worker.marks, 0)[-1])


def examine(workers: Sequence[Worker], steps: int = EXAMINED) -> list[Timing]:
    """Counts, profiles and sums up what was timed; frees the workers."""
    counted = [count(worker, steps) for worker in workers]
    alone: list[tuple[Part, Counts]] = [
        (worker.contestant.base, counts)
        for worker, counts in zip(workers, counted, strict=True)
        if worker.contestant.wrapper is None
    ]
    for base in (worker.contestant.base for worker in workers):
        if base not in (part for part, _ in alone):
            (lone,) = prepare([Contestant(base.name, base)], workers[0].subject)
            alone.append((base, count(lone, steps)))
    timings = []
    for worker, counts in zip(workers, counted, strict=True):
        base_counts = next(each for part, each in alone if part == worker.contestant.base)
        timings.append(_summarize(worker, workers[0], counts, base_counts, steps))
    return [
        replace(timing, buffer_bytes=free(worker))
        for timing, worker in zip(timings, workers, strict=True)
    ]


def _summarize(worker: Worker, base: Worker, counts: Counts, alone: Counts, steps: int) -> Timing:
    """What a worker's figures come to beside those of the first, and of its own base alone."""
    profiled, layers = profile(worker, steps), len(worker.layers())
    cpu, wall = (_seconds(worker.marks, clock) for clock in (0, 1))
    base_cpu, base_wall = (_seconds(base.marks, clock) for clock in (0, 1))
    own, other = (wall, base_wall) if worker.subject.device == "cuda" else (cpu, base_cpu)
    low, ratio, high = quartiles([a / b for a, b in zip(own, other, strict=True)])
    for i, stage in enumerate(STAGES):
        profiled.parts_ms[stage] = 1e3 * statistics.fmean(_seconds(worker.marks, 0, i, i + 1))
    weights = sum(weight.numel() * weight.element_size() for weight in base.model.parameters())
    state, base_state = state_bytes(worker.optimizer), state_bytes(base.optimizer)
    beyond = sum(counts.calls.values()) - sum(alone.calls.values())
    waits = sum(counts.waits.values()) - sum(alone.waits.values())
    return Timing(
        worker.label,
        1e3 * statistics.median(cpu),
        1e3 * statistics.median(wall),
        ratio,
        low,
        high,
        sum(own) / sum(other),
        statistics.median(a / b for a, b in zip(wall, base_wall, strict=True)),
        state,
        (state - base_state) / (2 * weights + base_state),
        layers,
        beyond / layers if layers else None,
        waits if worker.contestant.wrapper else None,
        counts,
        profiled,
        cpu,
        wall,
    )


def print_timings(timings: Sequence[Timing], stream: TextIO) -> None:
    """Prints three tables: times and memory, what a step does, and its parts."""
    base = timings[0]
    rows: list[tuple[str, ...]] = [
        (
            t.contestant,
            f"{t.cpu_ms:.3g}",
            f"{t.ratio:.3f}x",
            f"{t.low:.3f}-{t.high:.3f}",
            f"{t.mean_ratio:.3f}x",
            f"{t.wall_ratio:.3f}x",
            bytes_text(t.state_bytes),
            f"{t.extra_memory:.2%}",
            bytes_text(t.buffer_bytes),
            bytes_text(t.profile.peak_bytes),
        )
        for t in timings
    ]
    times = ("ms", "ratio", "quartiles", "mean", "wall")
    memory = ("state", "extra memory", "buffers", "peak memory")
    print_table(("contestant", *times, *memory), rows, stream)
    print(NOTES[0].format(base=base.contestant), file=stream)
    gpu = any(t.profile.kernels for t in timings)
    rows = [
        (
            t.contestant,
            f"{sum(t.counts.calls.values()):.0f}",
            str(t.layers or ""),
            "" if t.layer_calls is None else f"{t.layer_calls:.1f}",
            "" if t.waits is None else f"{t.waits:.2g}",
            f"{1e-9 * t.counts.flops:.3g}",
            f"{t.counts.flops / base.counts.flops:.3f}x" if base.counts.flops else "",
            *([f"{t.profile.kernels:.0f}"] if gpu else []),
        )
        for t in timings
    ]
    headers = ("operator calls", "layers", "calls per layer", "host waits", "Gflop", "arithmetic")
    print_table(("a step's", *headers, *(["kernels"] if gpu else [])), rows, stream)
    print(NOTES[1], file=stream)
    parts = [part for part in PARTS if any(part in t.profile.parts_ms for t in timings)]
    rows = [
        (
            t.contestant,
            *(
                f"{t.profile.parts_ms[part]:.3g} ({t.counts.calls.get(part, 0.0):.0f})"
                if part in t.profile.parts_ms
                else ""
                for part in parts
            ),
        )
        for t in timings
    ]
    names = (part.removeprefix("mkor.") for part in parts)
    print_table(("ms (calls) in parts", *names), rows, stream)
    print(NOTES[2], file=stream)


def draw(timings: Sequence[Timing], title: str, path: Path) -> None:
    """Draws what the contestants' steps are made of, over the base's, as a PNG file."""
    base = timings[0]
    whole = sum(base.profile.parts_ms[stage] for stage in STAGES)
    pieces = {part: [t.profile.parts_ms.get(part, 0.0) for t in timings] for part in DRAWN}
    # Capture is part of forward and backward; the base's step is what the others leave.
    for row, timing in enumerate(timings):
        pieces["step"][row] = max(
            0.0,
            timing.profile.parts_ms["step"]
            - sum(pieces[part][row] for part in DRAWN if part.startswith("mkor.")),
        )
    left = [0.0] * len(timings)
    with picture(path, 9.0, 1.5 + 0.42 * len(timings)) as figure:
        axes = figure.subplots()
        for (name, values), colour in zip(pieces.items(), (*COLOURS, GREY), strict=False):
            widths = [value / whole for value in values]
            label = "base" if name == "step" else name.removeprefix("mkor.")
            axes.barh(range(len(timings)), widths, left=left, color=colour, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, t in enumerate(timings):
            axes.annotate(f" {t.ratio:.2f}", (left[row], row), va="center")
        axes.set_yticks(range(len(timings)), [t.contestant for t in timings])
        axes.invert_yaxis()
        axes.set_xlabel(f"mean CPU time over that of {base.contestant}; in numbers the median")
        axes.set_title(title)
        figure.legend(ncols=len(pieces), loc="outside lower left")


def overhead(arguments: argparse.Namespace) -> int:
    """Runs the command `mkor overhead` and returns the exit status."""
    torch.set_num_threads(arguments.threads)
    contestants = checked_contestants(arguments.contestants)
    if arguments.processes:
        return bytes_sent(arguments, contestants)
    record = prepare_file("--json", arguments.json)
    drawing = prepare_picture("--plot", arguments.plot)
    subject, rounds = make_subject(arguments), arguments.rounds
    check_all(contestants, subject.build)
    kept = keep_memory()
    sizes = ", ".join(f"{key} {value}" for key, value in subject.sizes.items())
    print(f"{subject.name}: {sizes}; {rounds} rounds, {arguments.threads} thread(s)\n")
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        progress.expect(rounds * len(contestants))
        progress.phase("timing", [each.label for each in contestants], rounds, unit="ms")
        workers = prepare(contestants, subject)
        take_turns(workers, rounds, progress)
        progress.note(f"counting and profiling {EXAMINED} steps of each")
        timings = examine(workers)
    print_timings(timings, sys.stdout)
    if record:
        write_record(report_of(timings, subject, kept), record)
    if drawing:
        draw(timings, f"{subject.name}: {sizes}", drawing)
    return 0


def report_of(timings: Sequence[Timing], subject: Subject, kept: bool) -> dict[str, object]:
    """All figures, as they are stored."""
    gpu = torch.cuda.get_device_name() if subject.device == "cuda" else None
    return {
        "format": FORMAT,
        "model": {"name": subject.name, "sizes": subject.sizes},
        "rounds": len(timings[0].cpu_samples),
        "device": gpu or subject.device,
        "autocast": subject.autocast,
        "memory_kept": kept,
        "environment": environment(),
        "timings": [asdict(timing) for timing in timings],
    }
