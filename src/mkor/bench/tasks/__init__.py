"""Tasks on real data that need no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ..errors import UnknownNameError, UsageError
from .base import Batch, Task, batches, held_out_loss, new_model
from .digits import (
    AUTOENCODER_SIZES,
    CONV_SIZES,
    LARGE_SIZES,
    MLP_SIZES,
    conv_net,
    digits_autoencoder,
    digits_classes,
    digits_large,
    mlp,
)
from .text import SIZES as TEXT_SIZES
from .text import TORCH_STD, text_lm

__all__ = ["TASKS", "Batch", "Task", "batches", "held_out_loss", "load_task", "new_model"]


@dataclass(frozen=True)
class Recipe:
    """How a task is made, its sizes unless told otherwise, and the least depth."""

    make: Callable[[Mapping[str, int]], Task]
    sizes: Mapping[str, int]
    least_depth: int = 1


TASKS: Mapping[str, Recipe] = {
    "text-lm": Recipe(text_lm, TEXT_SIZES),
    "text-lm-torch-init": Recipe(partial(text_lm, embedding_std=TORCH_STD), TEXT_SIZES),
    "digits-mlp": Recipe(partial(digits_classes, name="digits-mlp", net=mlp), MLP_SIZES),
    "digits-conv": Recipe(partial(digits_classes, name="digits-conv", net=conv_net), CONV_SIZES),
    "digits-large": Recipe(digits_large, LARGE_SIZES),
    "digits-autoencoder": Recipe(digits_autoencoder, AUTOENCODER_SIZES, least_depth=2),
}


def load_task(name: str, sizes: Mapping[str, int | None] | None = None) -> Task:
    """The task of a name.

    Args:
        name: One of `TASKS`.
        sizes: Sizes that differ from the task's own; None stands for the task's own.

    Returns:
        The task with its data loaded.

    Raises:
        UnknownNameError: If there is no such task.
        UsageError: If it has no such size.
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    recipe = TASKS[name]
    wanted = {key: value for key, value in (sizes or {}).items() if value is not None}
    for key, value in wanted.items():
        if key not in recipe.sizes:
            known = ", ".join(f"--{size}" for size in recipe.sizes)
            raise UsageError(f"{name} has no --{key}; its sizes are {known}.")
        least = recipe.least_depth if key == "depth" else 1
        if value < least:
            raise UsageError(f"{name}: --{key} must be at least {least}, not {value}.")
    return recipe.make({**recipe.sizes, **wanted})
