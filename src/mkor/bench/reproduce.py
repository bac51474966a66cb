"""The command `mkor reproduce`: stored results, made again. It imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .arguments import names, scale, whole
from .places import prepare_folder

DEFAULT_FOLDER = "results"


def add_races(parser: argparse.ArgumentParser) -> None:
    """Adds what decides a set of races.

    Args:
        parser: The parser of a recipe.
    """
    add = parser.add_argument
    add("--tasks", type=names, metavar="A,B", help="only these tasks (all)")
    add("--bases", type=names, metavar="A,B", help="only over these bases (all)")
    add("--seeds", type=whole(1), default=3, metavar="K", help="reported seeds (3)")
    add(
        "--tune",
        type=whole(1),
        default=3,
        metavar="N",
        help="learning rates tried for each contestant, a factor of two apart (3)",
    )
    add(
        "--steps-scale",
        type=scale,
        default=1.0,
        metavar="X",
        help="length of a run over the task's own (1)",
    )
    add("--jobs", type=whole(1), default=1, metavar="N", help="races at a time (1)")


@dataclass(frozen=True)
class Recipe:
    """How stored results are made.

    Attributes:
        module: The module of the bench with the function `reproduce(out, progress)`.
        help: One line.
        add: Adds the recipe's own options; they are handed on as `reproduce(..., arguments)`.
    """

    module: str
    help: str
    add: Callable[[argparse.ArgumentParser], None] | None = None


RECIPES: Mapping[str, Recipe] = {
    "rules": Recipe(
        "rules", "the paper's rules, windows, KFAC and Eva, over several bases and tasks", add_races
    ),
    "precision": Recipe("precision", "errors of factors in half precision"),
}


def add_reproduce(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `reproduce`.

    Args:
        commands: Where commands are added.
    """
    summary = "make the results again that the documentation shows"
    parser = commands.add_parser("reproduce", help=summary, description=f"{summary.capitalize()}.")
    recipes = parser.add_subparsers(title="results", metavar="NAME", required=True)
    for name, recipe in RECIPES.items():
        own = recipes.add_parser(name, help=recipe.help, description=f"Shows {recipe.help}.")
        own.add_argument(
            "--out",
            default=DEFAULT_FOLDER,
            metavar="DIR",
            help=f"write {name}.md there and what belongs to it ({DEFAULT_FOLDER})",
        )
        if recipe.add:
            recipe.add(own)
        own.add_argument("--quiet", action="store_true", help="no progress, only the result")
        own.set_defaults(run="reproduce:reproduce", recipe=name)


def reproduce(arguments: argparse.Namespace) -> int:
    """Makes stored results again.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.
    """
    import sys

    import torch

    from .progress import make_progress

    torch.set_num_threads(1)
    recipe = RECIPES[arguments.recipe]
    function = importlib.import_module(f"{__package__}.{recipe.module}").reproduce
    folder = prepare_folder(arguments.out) or Path(DEFAULT_FOLDER)
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        own = (arguments,) if recipe.add else ()
        status: int | None = function(folder, progress, *own)
    print("written:", folder / f"{arguments.recipe}.md")
    return status or 0
