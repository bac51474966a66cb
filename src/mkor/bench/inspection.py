"""The command `mkor inspect`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import torch
from torch import nn

from .compare import checked_contestants, sizes_of
from .contestants import Contestant
from .errors import UsageError
from .optimizers import build, check
from .tasks import TASKS, batches, load_task, new_model

LEARNING_RATE = 1e-3


def load_model(place: str) -> nn.Module:
    """The model that a user's factory returns.

    Args:
        place: `package.module:factory`, looked for in the working directory too.

    Returns:
        The model.

    Raises:
        UsageError: If there is no such thing, or it is no model.
    """
    module_name, _, attribute = place.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"cannot read {place!r}; write package.module:factory.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {module_name!r}: {error}.") from error
    except AttributeError as error:
        raise UsageError(f"{module_name!r} has no {attribute!r}.") from error
    model = factory if isinstance(factory, nn.Module) or not callable(factory) else factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{place} gives a {type(model).__name__}, not a torch.nn.Module.")
    return model


def task_coverage(contestant: Contestant, name: str, sizes: dict[str, int | None]) -> str:
    """The coverage of a task's model after one step, when its output layer is known.

    Args:
        contestant: Whose coverage.
        name: The task.
        sizes: Sizes that differ from the task's own.

    Returns:
        The coverage as text.
    """
    task = load_task(name, sizes)
    check(contestant, new_model(task, 0))
    model = new_model(task, 0)
    optimizer = build(contestant, model, LEARNING_RATE, 0.0)
    inputs, target = next(batches(task, 0))
    torch.autograd.backward(task.loss(model(inputs), target))
    optimizer.step()
    return str(optimizer.coverage())  # type: ignore[attr-defined]


def inspect_model(arguments: argparse.Namespace) -> int:
    """Prints what a wrapper does with a model.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.

    Raises:
        UsageError: If the contestant wraps nothing, or the model cannot be had.
    """
    contestants = checked_contestants(arguments.contestant)
    if len(contestants) != 1 or contestants[0].wrapper is None:
        raise UsageError(
            f"{arguments.contestant!r} preconditions nothing to inspect; write mkor+adamw."
        )
    sizes = sizes_of(arguments)
    if ":" not in arguments.model:
        if arguments.model not in TASKS and "." in arguments.model:
            raise UsageError(f"{arguments.model!r} lacks its factory: package.module:factory.")
        print(task_coverage(contestants[0], arguments.model, sizes))
        return 0
    if given := [f"--{key}" for key, value in sizes.items() if value is not None]:
        raise UsageError(f"{', '.join(given)}: sizes are for tasks, not for a factory of yours.")
    model = load_model(arguments.model)
    check(contestants[0], model)
    print(build(contestants[0], model, LEARNING_RATE, 0.0).coverage())  # type: ignore[attr-defined]
    return 0
