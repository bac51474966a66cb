"""The learning rates where the search of a contestant begins, by task."""

from __future__ import annotations

from collections.abc import Mapping

from .contestants import Contestant

# The best of grids a factor of two apart, at the sizes and lengths that the tasks have unless told
# otherwise. A row is looked for under the contestant as it is written, options included, then
# under the bare names `wrapper+base`, then under the base alone.
RATES: Mapping[str, Mapping[str, float]] = {
    "text-lm": {
        "lamb": 0.01,
        "mkor+adamw": 6e-3,
        "mkor+lamb": 0.02,
        "kfac+adamw": 6e-3,
        "kfac+lamb": 0.02,
    },
    "text-lm-torch-init": {
        "sgd": 0.4,
        "adamw": 6e-3,
        "soap": 0.024,
        "muon": 0.024,
    },
    "digits-mlp": {
        "sgd": 0.2,
        "adamw": 0.012,
        "soap": 0.012,
    },
    "digits-conv": {
        "adamw": 6e-3,
        "mkor+sgd": 0.05,
        "mkor+adamw": 3e-3,
        "kfac+adamw": 0.012,
    },
    "digits-large": {
        "adamw": 0.012,
        "mkor+adamw": 6e-3,
    },
    "digits-autoencoder": {
        "sgd": 0.05,
        "adamw": 0.02,
        "soap": 0.024,
        "muon": 0.024,
    },
}
# Who begins where another wrapper does, unless it has a row of its own.
LIKE: Mapping[str, str] = {"mkor-h": "mkor"}


def names_of(contestant: Contestant) -> list[str]:
    """The names under which a contestant's learning rate may stand, the best first.

    Args:
        contestant: The contestant.

    Returns:
        Its label, its bare names, those of the wrapper it is like, and its base.
    """
    base = contestant.base.name
    if contestant.wrapper is None:
        return [contestant.label, base]
    name = contestant.wrapper.name
    wrappers = [name, LIKE[name]] if name in LIKE else [name]
    return [contestant.label, *(f"{wrapper}+{base}" for wrapper in wrappers), base]


def known_rate(contestant: Contestant, task: str) -> float | None:
    """The learning rate that the table has for a contestant.

    Args:
        contestant: The contestant.
        task: The task.

    Returns:
        The learning rate, None if the table has none.
    """
    rows = RATES.get(task, {})
    return next((rows[name] for name in names_of(contestant) if name in rows), None)
