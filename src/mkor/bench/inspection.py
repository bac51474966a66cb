"""The command `mkor inspect`: which parameters of a model are preconditioned."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import torch
from torch import nn
from torch.optim import Optimizer

from .cli import UsageError, sizes_of
from .contestants import Contestant, build, check, checked_contestants
from .tasks import TASKS, batches, load_task, new_model


def load_model(place: str) -> nn.Module:
    """The model that a user's `package.module:factory` is or returns."""
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


def wrap(contestant: Contestant, model: nn.Module) -> Optimizer:
    """A contestant's optimizer for a model that is not trained."""
    return build(contestant, model, 1e-3, 0.0)


def after_one_step(contestant: Contestant, name: str, sizes: dict[str, int | None]) -> Optimizer:
    """A contestant's optimizer on a task after one step, when the output layer is known."""
    task = load_task(name, sizes)
    check(contestant, new_model(task, 0))
    model = new_model(task, 0)
    optimizer = wrap(contestant, model)
    inputs, target = next(batches(task, 0))
    torch.autograd.backward(task.loss(model(inputs), target))
    optimizer.step()
    return optimizer


def inspect_model(arguments: argparse.Namespace) -> int:
    """Runs the command `mkor inspect` and returns the exit status."""
    contestants = checked_contestants(arguments.contestant)
    if len(contestants) != 1 or contestants[0].wrapper is None:
        raise UsageError(
            f"{arguments.contestant!r} preconditions nothing to inspect; write mkor+adamw."
        )
    sizes = sizes_of(arguments)
    if ":" not in arguments.model:
        if arguments.model not in TASKS and "." in arguments.model:
            raise UsageError(f"{arguments.model!r} lacks its factory: package.module:factory.")
        optimizer = after_one_step(contestants[0], arguments.model, sizes)
    else:
        if given := [f"--{key}" for key, value in sizes.items() if value is not None]:
            raise UsageError(
                f"{', '.join(given)}: sizes are for tasks, not for a factory of yours."
            )
        model = load_model(arguments.model)
        check(contestants[0], model)
        optimizer = wrap(contestants[0], model)
    print(optimizer.coverage())  # type: ignore[attr-defined]
    return 0
