"""What an iteration does, counted under the profiler: operator calls, kernels, memory."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mkor import native
from mkor.native import loading

PARTS = (
    "forward",
    "backward",
    "step",
    "mkor.capture",
    "mkor.reduce",
    "mkor.measure",
    "mkor.update",
    "mkor.precondition",
    "mkor.base_step",
)
OPERATOR = "aten::"
# How many of the operators that take longest are kept.
SLOWEST = 20


@dataclass(frozen=True)
class Operator:
    """One kind of operator.

    Attributes:
        name: Its name.
        milliseconds: Time in itself, without what it calls, per iteration.
        calls: Per iteration, those from other operators included.
    """

    name: str
    milliseconds: float
    calls: float


@dataclass(frozen=True)
class Counts:
    """What an iteration does, the mean over the profiled ones.

    Attributes:
        operators: Calls of operators, those that operators make of each other not counted.
        operators_in: The same by part; what runs in no part is counted in none.
        kernels: Kernels run on a GPU.
        own_calls: Calls of the package's own kernels on a CPU, which are no operators.
        allocations: Pieces of memory taken.
        allocated_bytes: Their sum.
        peak_bytes: The most that was taken at a time beyond what was there before the iteration:
            activations, gradients and temporaries.
        slowest: The operators that take longest.
    """

    operators: float
    operators_in: dict[str, float]
    kernels: float
    own_calls: float
    allocations: float
    allocated_bytes: float
    peak_bytes: float
    slowest: tuple[Operator, ...]


@dataclass
class Profile:
    """One profiled iteration.

    Attributes:
        cpu: CPU seconds of the iteration.
        wall: Wall seconds of the iteration.
        parts: Wall seconds of the parts that occurred.
        operators: Calls of operators by part; those in none under the empty name.
        own: Microseconds in each operator itself.
        calls: Calls of each operator, nested ones too.
        kernels: Kernels run on a GPU.
        own_calls: Calls of the package's own kernels.
        memory: Bytes taken (positive) and given back, in their order.
    """

    cpu: float
    wall: float
    parts: dict[str, float] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)
    own: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    own_calls: int = 0
    memory: list[int] = field(default_factory=list)

    def cpu_parts(self) -> dict[str, float]:
        """CPU seconds of the parts.

        Returns:
            By part. The profiler measures wall time, of which a busy machine leaves this process
            only a share.
        """
        scale = min(1.0, self.cpu / self.wall)
        return {part: scale * seconds for part, seconds in self.parts.items()}


def profile_once(work: Callable[[], object], device: str) -> Profile:
    """Profiles a piece of work.

    Args:
        work: What is profiled.
        device: Kind of device whose memory is counted.

    Returns:
        The profile.
    """
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with (
        _counted() as own,
        profile(activities=activities, profile_memory=True, acc_events=True) as profiler,
    ):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        found = Profile(time.process_time() - cpu, time.perf_counter() - wall)
    found.own_calls = own.calls
    for event in profiler.events() or ():
        _note(found, event)
    results: Any = profiler.profiler
    pieces = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    there = DeviceType.CUDA if cuda else DeviceType.CPU
    pieces = [e for e in pieces if e.device_type() == there]
    found.memory = [e.nbytes() for e in sorted(pieces, key=lambda e: e.start_ns())]
    return found


class _Own:
    """The package's own kernels, as they are; counts how often one is taken."""

    def __init__(self, kernels: Any) -> None:
        self.calls = 0
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._kernels, name)


@contextmanager
def _counted() -> Iterator[_Own]:
    """Count calls of the package's own kernels, if they are in use."""
    own, before = _Own(loading._kernels), loading._kernels
    loading._kernels = cast(Any, own) if native.in_use() else None
    try:
        yield own
    finally:
        loading._kernels = before


def _note(found: Profile, event: Any) -> None:
    """Adds an event to a profile."""
    if event.device_type == DeviceType.CUDA:
        # Ranges that the program names are shown on the device, too.
        named = event.is_user_annotation or event.name in PARTS
        found.kernels += not (named or event.name.startswith(("Memcpy", "Memset")))
        return
    if event.name in PARTS:
        found.parts[event.name] = found.parts.get(event.name, 0.0) + 1e-6 * event.cpu_time_total
    if not event.name.startswith(OPERATOR):
        return
    found.own[event.name] += event.self_cpu_time_total
    found.calls[event.name] += 1
    above = list(_above(event))
    if not any(name.startswith(OPERATOR) for name in above):
        found.operators[next((name for name in above if name in PARTS), "")] += 1


def _above(event: Any) -> Iterable[str]:
    """The names of the events that an event lies in, from the inside out."""
    event = event.cpu_parent
    while event is not None:
        yield event.name
        event = event.cpu_parent


def peak_of(memory: Sequence[int]) -> int:
    """The most memory that is taken at a time.

    Args:
        memory: Bytes taken (positive) and given back, in their order.

    Returns:
        Bytes beyond those at the beginning.
    """
    most = present = 0
    for piece in memory:
        present += piece
        most = max(most, present)
    return most


def part_times(profiles: Sequence[Profile]) -> dict[str, float]:
    """CPU time of the parts.

    Args:
        profiles: Profiled iterations.

    Returns:
        For each part the mean over all iterations, in seconds.
    """
    return _means([each.cpu_parts() for each in profiles])


def part_walls(profiles: Sequence[Profile]) -> dict[str, float]:
    """Wall time of the parts.

    Args:
        profiles: Profiled iterations.

    Returns:
        As `part_times`.
    """
    return _means([each.parts for each in profiles])


def _means(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    names = [part for part in PARTS if any(part in each for each in rounds)]
    return {name: statistics.fmean(each.get(name, 0.0) for each in rounds) for name in names}


def summarize_counts(profiles: Sequence[Profile]) -> Counts:
    """What an iteration does.

    Args:
        profiles: Profiled iterations.

    Returns:
        Means over them.
    """
    n = len(profiles)
    operators, own, calls = Counter[str](), Counter[str](), Counter[str]()
    for each in profiles:
        operators += each.operators
        own += each.own
        calls += each.calls
    taken = [piece for each in profiles for piece in each.memory if piece > 0]
    return Counts(
        operators=operators.total() / n,
        operators_in={part: operators[part] / n for part in PARTS if operators[part]},
        kernels=sum(each.kernels for each in profiles) / n,
        own_calls=sum(each.own_calls for each in profiles) / n,
        allocations=len(taken) / n,
        allocated_bytes=sum(taken) / n,
        peak_bytes=sum(peak_of(each.memory) for each in profiles) / n,
        slowest=tuple(
            Operator(name, 1e-3 * own[name] / n, calls[name] / n)
            for name, _ in own.most_common(SLOWEST)
        ),
    )
