"""Processes that train together must be set up alike: a difference is named, not waited on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from mkor.distributed.communicator import Communicator

SHOWN = 5
"""Differences in a message."""


def check_agreement(communicator: Communicator, facts: Mapping[str, str]) -> None:
    """Compare, by name, how every process set up its optimizer; a collective call.

    Raises a RuntimeError on every process if any two differ, which says which and in what.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(communicator.gather_objects(digest))) == 1:
        return
    found = differences(communicator.gather_objects(dict(facts)))
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise RuntimeError(
        "the processes that train together have set up their optimizers differently: "
        + "; ".join(found[:SHOWN])
        + more
        + ". Build model, base optimizer and wrapper alike on every process, and load the same "
        "checkpoint on all of them"
    )


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """One sentence for each difference of a process from the first."""
    first = facts[0]
    return [
        f"process {rank} has {_shown(name, theirs)}, process 0 has {_shown(name, first)}"
        for rank, theirs in enumerate(facts)
        for name in dict.fromkeys((*theirs, *first))
        if theirs.get(name) != first.get(name)
    ]


def _shown(name: str, facts: Mapping[str, str]) -> str:
    return f"{name} {facts[name]}" if name in facts else f"no {name}"
