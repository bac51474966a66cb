"""One contestant's run: a model, its optimizer, its clocks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from mkor.preconditioned import Preconditioned

from .contestants import Contestant
from .optimizers import build
from .schedule import factor
from .tasks import Batch, Task, held_out_loss, new_model
from .wrappers import has_switch


@dataclass(frozen=True)
class Trial:
    """What tuning chooses."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Point:
    """One point of a run's curve; times are those of the training steps alone."""

    step: int
    training_loss: float
    held_out_loss: float
    cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        contestant: The contestant's label.
        seed: Seed of weights and batches.
        steps: Length of its schedule.
        trial: Learning rate and weight decay.
        loss: Held-out loss at the end, infinite if it diverged.
        cpu_seconds: Process CPU time of all training steps.
        wall_seconds: Wall time of all training steps.
        state_bytes: The most memory that the optimizer's state was seen to take.
        curve: The points on the way.
        switched_at: The step after which the base went on alone, None if it did not come to that.
    """

    contestant: str
    seed: int
    steps: int
    trial: Trial
    loss: float
    cpu_seconds: float
    wall_seconds: float
    state_bytes: int
    curve: tuple[Point, ...]
    switched_at: int | None = None


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def report_loss(contestant: Contestant, optimizer: Optimizer, loss: Tensor) -> None:
    """Tells an optimizer the loss if it has a switch that depends on it.

    Args:
        contestant: Whose optimizer it is.
        optimizer: The optimizer.
        loss: The training loss of the step that is about to be taken.
    """
    if has_switch(contestant.wrapper):
        optimizer.report_loss(loss.detach())  # type: ignore[attr-defined]


def state_bytes(optimizer: Optimizer) -> int:
    """Memory of the tensors in an optimizer's state, shared storage counted once.

    Args:
        optimizer: The optimizer.

    Returns:
        Bytes.
    """
    storages = (tensor.untyped_storage() for tensor in _tensors(optimizer.state))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def buffer_bytes(optimizer: Optimizer) -> int:
    """Memory that a wrapper keeps beside its state: where a step's statistics are summed.

    Args:
        optimizer: The optimizer.

    Returns:
        Bytes; 0 for one that is no wrapper.
    """
    return optimizer._preconditioner.buffer_bytes if isinstance(optimizer, Preconditioned) else 0


@dataclass
class Training:
    """A run under way.

    Attributes:
        contestant: Who trains.
        task: What is learned.
        seed: Seed of the initial weights.
        steps: Length of the schedule.
        trial: Learning rate and weight decay.
        warmup: Share of the steps over which the learning rate rises.
        points: How many points the curve gets, the last at the end.
    """

    contestant: Contestant
    task: Task
    seed: int
    steps: int
    trial: Trial
    warmup: float
    points: int = 1
    done: int = 0
    loss: float = math.nan
    diverged: bool = False
    cpu: float = 0.0
    wall: float = 0.0
    peak_state: int = 0
    curve: list[Point] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Makes model and optimizer."""
        self.model = new_model(self.task, self.seed)
        self.optimizer = build(self.contestant, self.model, self.trial.lr, self.trial.weight_decay)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.stops = {round(self.steps * (index + 1) / self.points) for index in range(self.points)}

    @property
    def running(self) -> bool:
        """Whether steps are left to take."""
        return self.done < self.steps and not self.diverged

    def advance(self, batch: Batch) -> None:
        """Takes one step, and looks at the held-out loss where a point is due.

        Args:
            batch: Input and target.
        """
        rate = factor(self.done, self.steps, self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        wall, cpu = time.perf_counter(), time.process_time()
        self._step(*batch)
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        self.done += 1
        self.recent.append(self.loss)
        if self.done in self.stops and not self.diverged:
            self._look()

    def _step(self, inputs: Tensor, target: Tensor) -> None:
        loss = self.task.loss(self.model(inputs), target)
        self.loss = loss.item()
        self.diverged = not math.isfinite(self.loss)
        if self.diverged:
            return
        loss.backward()
        report_loss(self.contestant, self.optimizer, loss)
        try:
            self.optimizer.step()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Decompositions refuse the weights of a run that is about to diverge.
            self.diverged = True
        self.optimizer.zero_grad()

    def _look(self) -> None:
        held_out = held_out_loss(self.task, self.model)
        training = sum(self.recent) / len(self.recent)
        self.recent.clear()
        self.curve.append(Point(self.done, training, held_out, self.cpu, self.wall))
        self.peak_state = max(self.peak_state, state_bytes(self.optimizer))

    def result(self) -> Run:
        """The run as it ended.

        Returns:
            The finished run; its loss is infinite if it did not get to the end.
        """
        complete = self.done == self.steps and not self.diverged
        return Run(
            contestant=self.contestant.label,
            seed=self.seed,
            steps=self.steps,
            trial=self.trial,
            loss=self.curve[-1].held_out_loss if complete else math.inf,
            cpu_seconds=self.cpu,
            wall_seconds=self.wall,
            state_bytes=self.peak_state,
            curve=tuple(self.curve),
            switched_at=getattr(self.optimizer, "switched_at", None),
        )
