"""Whole training iterations, timed in turn; and their parts, profiled apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from .contestants import Contestant
from .errors import UsageError
from .optimizers import build
from .progress import Progress
from .tasks import Batch
from .training import report_loss, state_bytes
from .wrappers import has_switch

# Small, so that a long timing on one batch does not end in infinities or zeros.
LEARNING_RATE = 1e-4
WARMUP_ROUNDS = 5
SWITCH_WITHIN = 1000
PROFILED_ROUNDS = 5
PARTS = (
    "forward",
    "backward",
    "step",
    "mkor.capture",
    "mkor.reduce",
    "mkor.update",
    "mkor.precondition",
    "mkor.base_step",
)


@dataclass(frozen=True)
class Subject:
    """What is trained while the clock runs.

    Attributes:
        name: Its name on the command line.
        sizes: Its sizes.
        build: Makes the model, the same each time.
        loss: From output and target to a mean loss.
        batch: The batch of every iteration.
    """

    name: str
    sizes: dict[str, int]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Batch


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
        self.model = subject.build()
        self.optimizer: Optimizer = build(contestant, self.model, LEARNING_RATE, 0.0)
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def iterate(self) -> None:
        """One training iteration, its three stages named for the profiler."""
        inputs, target = self.subject.batch
        with record_function("forward"):
            loss = self.subject.loss(self.model(inputs), target)
        with record_function("backward"):
            torch.autograd.backward(loss)
        with record_function("step"):
            report_loss(self.contestant, self.optimizer, loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Untimed iterations; a contestant with a switch is brought past it."""
        for _ in range(WARMUP_ROUNDS):
            self.iterate()
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
        wall, cpu = time.perf_counter(), time.process_time()
        self.iterate()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return self.cpu[-1]

    def parts(self) -> dict[str, float]:
        """The parts of an iteration, each by itself; capture happens in forward and backward.

        Returns:
            CPU time in seconds of those parts that occurred.
        """
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(PROFILED_ROUNDS):
                self.iterate()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        # It measures wall time, of which a busy machine leaves this process only a part.
        scale = 1e-6 / PROFILED_ROUNDS * min(1.0, cpu / wall)
        return {
            event.key: scale * event.cpu_time_total
            for event in profiler.key_averages()
            if event.key in PARTS
        }

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
        ratio: Median over rounds of its CPU time over the base's in the same round.
        low: Lower quartile of that ratio.
        high: Upper quartile.
        mean_ratio: All its CPU time over all of the base's: work that is done only every so
            often shows here, and so does noise.
        wall_ratio: As `ratio`, in wall time.
        state_bytes: Memory of the optimizer's state.
        extra_memory: State beyond the base's, over the base's weights, gradients and state.
        parts_ms: CPU time of the parts under the profiler, which slows them a little.
        cpu_samples: CPU seconds of each round.
        wall_samples: Wall seconds of each round.
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
    low, middle, high = quartiles(ratios(worker.cpu, base.cpu))
    own, others = state_bytes(worker.optimizer), state_bytes(base.optimizer)
    return Timing(
        contestant=worker.label,
        cpu_ms=1e3 * statistics.median(worker.cpu),
        wall_ms=1e3 * statistics.median(worker.wall),
        ratio=middle,
        low=low,
        high=high,
        mean_ratio=sum(worker.cpu) / sum(base.cpu),
        wall_ratio=statistics.median(ratios(worker.wall, base.wall)),
        state_bytes=own,
        extra_memory=(own - others) / (base.model_bytes() + others),
        parts_ms={key: 1e3 * parts[key] for key in PARTS if key in parts},
        cpu_samples=tuple(worker.cpu),
        wall_samples=tuple(worker.wall),
    )


def measure(
    contestants: Sequence[Contestant], subject: Subject, rounds: int, progress: Progress
) -> list[Timing]:
    """Times contestants in turn, then profiles each.

    Args:
        contestants: The first is the base.
        subject: What is trained.
        rounds: Timed iterations of each.
        progress: Where rounds are reported.

    Returns:
        One timing for each contestant.
    """
    workers = [Worker(contestant, subject) for contestant in contestants]
    progress.expect(rounds * len(workers))
    progress.phase("timing", [worker.label for worker in workers], rounds, unit="ms")
    for worker in workers:
        worker.warm_up()
    for index in range(rounds):
        first = index % len(workers)
        for worker in (*workers[first:], *workers[:first]):
            progress.advance(worker.label, index + 1, 1e3 * worker.timed())
    return [summarize(worker, workers[0], worker.parts()) for worker in workers]
