"""Whole training iterations, timed in turn; and their parts, profiled apart."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from .contestants import Contestant
from .errors import UsageError
from .optimizers import build
from .overhead_counts import (
    PARTS,
    Counts,
    Profile,
    part_times,
    part_walls,
    profile_once,
    summarize_counts,
)
from .progress import Progress
from .tasks import Batch
from .training import report_loss, state_bytes
from .wrappers import has_switch

if sys.platform != "win32":
    import resource

# Small, so that a long timing on one batch does not end in infinities or zeros.
LEARNING_RATE = 1e-4
WARMUP_ROUNDS = 5
SWITCH_WITHIN = 1000
# Work that is done every tenth step is in one of them.
PROFILED_ROUNDS = 10
STAGES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Subject:
    """What is trained while the clock runs.

    Attributes:
        name: Its name on the command line.
        sizes: Its sizes.
        build: Makes the model, the same each time.
        loss: From output and target to a mean loss.
        batch: The batch of every iteration.
        device: Kind of device that it is trained on, such as `cuda`.
        autocast: The dtype that products are computed in; None for that of the weights.
    """

    name: str
    sizes: dict[str, int]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Batch
    device: str = "cpu"
    autocast: torch.dtype | None = None

    def products(self) -> AbstractContextManager[object]:
        """The context that the forward pass runs in.

        Returns:
            Autocasting, or nothing.
        """
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)


class Worker:
    """A contestant with its own model."""

    def __init__(self, contestant: Contestant, subject: Subject) -> None:
        """Makes model and optimizer.

        Args:
            contestant: The contestant.
            subject: What is trained.
        """
        self.label = contestant.label
        self.contestant = contestant
        self.subject = subject
        self.model = subject.build().to(subject.device)
        self.batch = _moved(subject.batch, subject.device)
        self.optimizer: Optimizer = build(contestant, self.model, LEARNING_RATE, 0.0)
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.faults: list[int] = []
        # CPU and wall seconds of each stage, round by round.
        self.stages: list[dict[str, tuple[float, float]]] = []
        self.profiles: list[Profile] = []

    def iterate(self) -> None:
        """One training iteration, its three stages named for the profiler."""
        inputs, target = self.batch
        marks = [_clocks()]
        with record_function("forward"), self.subject.products():
            loss = self.subject.loss(self.model(inputs), target)
        marks.append(_clocks())
        with record_function("backward"):
            torch.autograd.backward(loss)
        marks.append(_clocks())
        with record_function("step"):
            report_loss(self.contestant, self.optimizer, loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        marks.append(_clocks())
        self.stages.append(
            {
                stage: (end[0] - begin[0], end[1] - begin[1])
                for stage, begin, end in zip(STAGES, marks, marks[1:], strict=False)
            }
        )

    def warm_up(self) -> None:
        """Untimed iterations; a contestant with a switch is brought past it."""
        for _ in range(WARMUP_ROUNDS):
            self.iterate()
        self._past_switch()
        self.stages.clear()

    def _past_switch(self) -> None:
        if not has_switch(self.contestant.wrapper):
            return
        optimizer: Any = self.optimizer
        for step in range(SWITCH_WITHIN):
            if optimizer.switched_at is not None:
                return
            # A loss that halves at every step soon no longer falls fast.
            optimizer.report_loss(2.0**-step)
            self.iterate()
        raise UsageError(f"{self.label} did not switch within {SWITCH_WITHIN} steps.")

    def timed(self) -> float:
        """One training iteration by both clocks.

        Returns:
            Its CPU time in seconds.
        """
        self._wait()
        faults, (cpu, wall) = page_faults(), _clocks()
        self.iterate()
        self._wait()
        end = _clocks()
        self.faults.append(page_faults() - faults)
        self.cpu.append(end[0] - cpu)
        self.wall.append(end[1] - wall)
        return self.times[-1]

    @property
    def times(self) -> list[float]:
        """What a round cost: CPU seconds, on a GPU wall seconds."""
        return self.cpu if self.subject.device == "cpu" else self.wall

    def profile(self) -> None:
        """One training iteration under the profiler."""
        self.profiles.append(profile_once(self._whole, self.subject.device))

    def parts(self) -> dict[str, float]:
        """The parts of an iteration, each by itself; capture happens in forward and backward.

        Returns:
            CPU time in seconds of those parts that occurred: stages as they were timed, what they
            are made of as it was profiled.
        """
        while len(self.profiles) < PROFILED_ROUNDS:
            self.profile()
        return {**part_times(self.profiles), **self._stages(0)}

    def walls(self) -> dict[str, float]:
        """The same in wall time.

        Returns:
            Seconds by part.
        """
        return {**part_walls(self.profiles), **self._stages(1)}

    def _stages(self, clock: int) -> dict[str, float]:
        """Mean seconds of the stages in the timed rounds."""
        timed = self.stages[: len(self.cpu)]
        return {
            stage: statistics.fmean(each[stage][clock] for each in timed)
            for stage in STAGES
            if timed
        }

    def _whole(self) -> None:
        self.iterate()
        self._wait()

    def _wait(self) -> None:
        if self.subject.device == "cuda":
            torch.cuda.synchronize()

    def model_bytes(self) -> int:
        """Memory of weights and gradients.

        Returns:
            Bytes.
        """
        return 2 * sum(weight.numel() * weight.element_size() for weight in self.model.parameters())


@dataclass(frozen=True)
class Timing:
    """What a contestant's iterations cost; the base is the first contestant.

    Attributes:
        contestant: Its label.
        cpu_ms: Median CPU time of an iteration in milliseconds.
        wall_ms: Median wall time.
        ratio: Median over rounds of its CPU time over the base's in the same round; on a GPU of
            the wall time.
        low: Lower quartile of that ratio.
        high: Upper quartile.
        mean_ratio: All its CPU time over all of the base's: work that is done only every so
            often shows here, and so does noise.
        wall_ratio: As `ratio`, in wall time.
        state_bytes: Memory of the optimizer's state.
        extra_memory: State beyond the base's, over the base's weights, gradients and state.
        parts_ms: Mean CPU time of the parts; those within forward, backward and step under the
            profiler, which slows them a little.
        cpu_samples: CPU seconds of each round.
        wall_samples: Wall seconds of each round.
        parts_wall_ms: Mean wall time of the parts, likewise.
        page_faults: Median number per round: memory that the system had to be asked for.
        counts: What an iteration does.
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
    parts_ms: dict[str, float]
    cpu_samples: tuple[float, ...]
    wall_samples: tuple[float, ...]
    parts_wall_ms: dict[str, float]
    page_faults: float
    counts: Counts


def _clocks() -> tuple[float, float]:
    """CPU and wall seconds."""
    return time.process_time(), time.perf_counter()


def page_faults() -> int:
    """Pages of memory that this process had to ask the system for so far.

    Returns:
        Their number; 0 where the system does not tell.
    """
    if sys.platform == "win32":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_memory() -> bool:
    """Makes the C library keep memory that is given back, as far as it is glibc.

    Else whether an iteration pays for fresh pages depends on how the memory happens to lie, and
    ratios differ by a tenth from run to run.

    Returns:
        Whether it does so from now on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def _moved(value: Any, device: str) -> Any:
    """Tensors, or tuples of them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(part, device) for part in value)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile.

    Args:
        values: At least one number.

    Returns:
        The three.
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, one contestant's time over the base's: what slows a round slows both.

    Args:
        values: The contestant's times.
        base: The base's.

    Returns:
        Their ratios.
    """
    return [value / other for value, other in zip(values, base, strict=True)]


def summarize(worker: Worker, base: Worker, parts: dict[str, float]) -> Timing:
    """What a worker's times come to.

    Args:
        worker: The worker.
        base: The worker it is compared with.
        parts: CPU seconds of its parts.

    Returns:
        The summary.
    """
    low, middle, high = quartiles(ratios(worker.times, base.times))
    own, others = state_bytes(worker.optimizer), state_bytes(base.optimizer)
    return Timing(
        contestant=worker.label,
        cpu_ms=1e3 * statistics.median(worker.cpu),
        wall_ms=1e3 * statistics.median(worker.wall),
        ratio=middle,
        low=low,
        high=high,
        mean_ratio=sum(worker.times) / sum(base.times),
        wall_ratio=statistics.median(ratios(worker.wall, base.wall)),
        state_bytes=own,
        extra_memory=(own - others) / (base.model_bytes() + others),
        parts_ms={key: 1e3 * parts[key] for key in PARTS if key in parts},
        cpu_samples=tuple(worker.cpu),
        wall_samples=tuple(worker.wall),
        parts_wall_ms={key: 1e3 * seconds for key, seconds in worker.walls().items()},
        page_faults=statistics.median(worker.faults),
        counts=summarize_counts(worker.profiles),
    )


def measure(
    contestants: Sequence[Contestant], subject: Subject, rounds: int, progress: Progress
) -> list[Timing]:
    """Times contestants in turn, then profiles them in turn.

    Args:
        contestants: The first is the base.
        subject: What is trained.
        rounds: Timed iterations of each.
        progress: Where rounds are reported.

    Returns:
        One timing for each contestant.
    """
    return summarize_all(run_all(contestants, subject, rounds, progress))


def run_all(
    contestants: Sequence[Contestant], subject: Subject, rounds: int, progress: Progress
) -> list[Worker]:
    """Times contestants in turn, then profiles them in turn.

    Args:
        contestants: The contestants.
        subject: What is trained.
        rounds: Timed iterations of each.
        progress: Where rounds are reported.

    Returns:
        The workers with their times.
    """
    workers = [Worker(contestant, subject) for contestant in contestants]
    labels = [worker.label for worker in workers]
    progress.expect((rounds + PROFILED_ROUNDS) * len(workers))
    for worker in workers:
        worker.warm_up()
    progress.phase("timing", labels, rounds, unit="ms")
    for index in range(rounds):
        for worker in _in_turn(workers, index):
            progress.advance(worker.label, index + 1, 1e3 * worker.timed())
    progress.phase("profiling", labels, PROFILED_ROUNDS, unit="ms")
    for index in range(PROFILED_ROUNDS):
        for worker in _in_turn(workers, index):
            worker.profile()
            progress.advance(worker.label, index + 1, 1e3 * worker.profiles[-1].cpu)
    return workers


def _in_turn(workers: Sequence[Worker], index: int) -> Sequence[Worker]:
    """The workers, each first in its turn."""
    first = index % len(workers)
    return (*workers[first:], *workers[:first])


def summarize_all(workers: Sequence[Worker]) -> list[Timing]:
    """What the workers' times come to.

    Args:
        workers: The first is the base.

    Returns:
        One timing for each.
    """
    return [summarize(worker, workers[0], worker.parts()) for worker in workers]
