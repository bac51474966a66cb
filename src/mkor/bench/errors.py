"""Mistakes of the person at the keyboard, told so that they can be put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """A wrong request; the message says what is wrong and what would be right."""


class UnknownNameError(UsageError):
    """A name that is not among the choices."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        """Suggests the nearest name and lists them all.

        Args:
            kind: What was named, such as "task".
            name: The name that is not known.
            choices: The names that are.
        """
        known = list(choices)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Choose from: {', '.join(known)}.")


class MissingExtraError(UsageError):
    """A package that only the bench needs is not installed."""

    def __init__(self, package: str, purpose: str) -> None:
        """Says how to install it.

        Args:
            package: The package that could not be imported.
            purpose: What it is needed for.
        """
        super().__init__(f"{purpose} needs {package}, which is missing: pip install 'mkor[bench]'")
