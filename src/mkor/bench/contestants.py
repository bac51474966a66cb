"""Contestants as they are written: `adamw`, `mkor[sides=left]+muon`, `dense-mkor[release]+sgd`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import UsageError

Value = object
_WORDS: Mapping[str, Value] = {"none": None, "true": True, "false": False}
# The option that a bare word in a name's brackets stands for.
_BARE: Mapping[str, str] = {"dense-mkor": "rule"}


@dataclass(frozen=True)
class Part:
    """One name with the options in its brackets."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A base optimizer, or a wrapper over one.

    Attributes:
        label: The contestant as it was written, without blanks.
        base: The base optimizer.
        wrapper: What is wrapped around it, if anything.
    """

    label: str
    base: Part
    wrapper: Part | None = None


def split_outside(text: str, separator: str) -> list[str]:
    """Splits at a separator, but not within brackets.

    Args:
        text: The text.
        separator: One character.

    Returns:
        The pieces.

    Raises:
        UsageError: If brackets do not match.
    """
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if depth < 0:
            break
        if character == separator and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth:
        raise UsageError(
            f"the brackets of {text!r} do not match; write it like mkor[rank=32]+adamw."
        )
    return pieces


def parse_value(text: str) -> Value:
    """An option's value.

    Args:
        text: A number, a tuple, none, true, false or a word.

    Returns:
        What the text stands for; a word stands for itself.
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value: Value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value


def parse_part(text: str) -> Part:
    """A name with or without options, such as `mkor[rank=32]`.

    Args:
        text: The text, without blanks.

    Returns:
        Name and options.

    Raises:
        UsageError: If it is not written so.
    """
    name, bracket, rest = text.partition("[")
    if not name or (bracket and not rest.endswith("]")):
        raise UsageError(f"cannot read {text!r}; write a name, or name[option=value,...].")
    options: dict[str, Value] = {}
    for item in split_outside(rest[:-1], ",") if rest[:-1] else []:
        if item.isidentifier() and name.lower() in _BARE:
            item = f"{_BARE[name.lower()]}={item}"
        key, equals, value = item.partition("=")
        if not (key.isidentifier() and equals and value):
            raise UsageError(f"cannot read the option {item!r} of {name!r}; write option=value.")
        if key in options:
            raise UsageError(f"the option {key!r} of {name!r} is given twice.")
        options[key] = parse_value(value)
    return Part(name.lower(), options)


def parse_contestant(text: str) -> Contestant:
    """One contestant: a base, or a wrapper, a plus and a base.

    Args:
        text: The text.

    Returns:
        The contestant; whether its names exist is not looked at here.

    Raises:
        UsageError: If it is not written so.
    """
    label = "".join(text.split())
    parts = [parse_part(piece) for piece in split_outside(label, "+")]
    if len(parts) > 2:
        raise UsageError(
            f"{label!r} has {len(parts)} parts; write a base, or one wrapper over a base, "
            "such as mkor+adamw."
        )
    return Contestant(label, parts[-1], parts[0] if len(parts) == 2 else None)


def parse_contestants(text: str) -> list[Contestant]:
    """Contestants separated by commas.

    Args:
        text: Such as `adamw,mkor[rank=32]+adamw`.

    Returns:
        The contestants in order.

    Raises:
        UsageError: If one is empty or appears twice.
    """
    contestants = [parse_contestant(piece) for piece in split_outside(text, ",")]
    labels = [contestant.label for contestant in contestants]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"the contestant {label!r} appears twice.")
    return contestants
