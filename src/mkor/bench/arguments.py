"""Types of arguments of the command line, and what several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """A type of argument: whole numbers.

    Args:
        least: The smallest that is allowed.

    Returns:
        The function that reads one.
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return value

    return read


def share(text: str) -> float:
    """A type of argument: a share of the steps.

    Args:
        text: As written.

    Returns:
        A number from 0 up to, not including, 1.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write a number from 0 to below 1")
    return value


def decays(text: str) -> list[float]:
    """A type of argument: weight decays separated by commas.

    Args:
        text: As written.

    Returns:
        The numbers.

    Raises:
        argparse.ArgumentTypeError: If one is no number or negative.
    """
    try:
        values = [float(piece) for piece in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers from 0 up, such as 0,0.01")
    return values


def names(text: str) -> list[str]:
    """A type of argument: names separated by commas.

    Args:
        text: As written.

    Returns:
        The names, each once.

    Raises:
        argparse.ArgumentTypeError: If one is empty.
    """
    found = [piece.strip() for piece in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: write names separated by commas")
    return list(dict.fromkeys(found))


def scale(text: str) -> float:
    """A type of argument: a positive factor.

    Args:
        text: As written.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def widths(text: str) -> list[int]:
    """A type of argument: widths of layers separated by commas.

    Args:
        text: As written.

    Returns:
        The widths, each once, rising.
    """
    return sorted({whole(1)(piece) for piece in text.split(",")})
