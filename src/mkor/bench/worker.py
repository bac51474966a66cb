"""Training iterations by the clock: a contestant trains a model of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from .contestants import Contestant
from .errors import UsageError
from .memory import page_faults
from .optimizers import build
from .overhead_counts import Profile, part_times, part_walls, profile_once
from .tasks import Batch
from .training import report_loss
from .wrappers import has_switch

# Small, so that a long timing on one batch does not end in infinities or zeros.
LEARNING_RATE = 1e-4
SWITCH_WITHIN = 1000
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
    """A contestant with its own model.

    Attributes:
        warmup_rounds: Untimed iterations before the first that is timed.
        profiled_rounds: Iterations that are profiled.
    """

    warmup_rounds: ClassVar[int] = 5
    # Work that is done every tenth step is in one of them.
    profiled_rounds: ClassVar[int] = 10

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
        for _ in range(self.warmup_rounds):
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
        while len(self.profiles) < self.profiled_rounds:
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


def _clocks() -> tuple[float, float]:
    """CPU and wall seconds."""
    return time.process_time(), time.perf_counter()


def _moved(value: Any, device: str) -> Any:
    """Tensors, or tuples of them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(part, device) for part in value)
