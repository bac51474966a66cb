"""What every task is made of: a model, data with a fingerprint, a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A thing to be learned, the same for all contestants.

    Attributes:
        name: The name on the command line.
        sizes: Width, depth, batch and so on, as they came out.
        steps: How long a run is unless told otherwise.
        data: One line on the data.
        sha256: The fingerprint of the data; results compare within one only.
        build: Makes a model from torch's random state.
        loss: From the model's output and the target to a mean loss.
        draw: The next training batch of a random stream.
        held_out: Batches that no run trains on.
    """

    name: str
    sizes: Mapping[str, int]
    steps: int
    data: str
    sha256: str
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[torch.Generator], Batch]
    held_out: tuple[Batch, ...]


def new_model(task: Task, seed: int) -> nn.Module:
    """The task's model, its weights a function of the seed alone.

    Args:
        task: The task.
        seed: Seed of the initial weights.

    Returns:
        The model, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build()


def batches(task: Task, seed: int) -> Iterator[Batch]:
    """An endless stream of training batches, a function of the seed alone.

    Args:
        task: The task.
        seed: Seed of the stream.

    Yields:
        Input and target of one step.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield task.draw(generator)


@torch.no_grad()
def held_out_loss(task: Task, model: nn.Module) -> float:
    """The mean loss on the held-out batches.

    Args:
        task: The task.
        model: The model; it is in training mode again afterwards.

    Returns:
        The loss, infinite where it is not finite.
    """
    model.eval()
    total = sum(float(task.loss(model(x), y)) * len(x) for x, y in task.held_out)
    model.train()
    loss = total / sum(len(x) for x, _ in task.held_out)
    return loss if math.isfinite(loss) else math.inf
