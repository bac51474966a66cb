"""Where results go, checked before anything runs: no figure is to be lost at the end."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from .errors import MissingExtraError, UsageError


def check_pictures(purpose: str) -> None:
    """Checks that pictures can be drawn.

    Args:
        purpose: What asks for one.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingExtraError("matplotlib", purpose) from error


def prepare_folder(out: str | None) -> Path | None:
    """Makes the folder of results.

    Args:
        out: The folder, or None.

    Returns:
        The folder.

    Raises:
        MissingExtraError: If the picture cannot be drawn.
        UsageError: If the folder cannot be made.
    """
    if out is None:
        return None
    check_pictures("--out with its picture")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}.") from error
    return folder


def prepare_file(option: str, name: str | Path | None) -> Path | None:
    """The file of results.

    Args:
        option: What asks for it on the command line, such as "--json".
        name: The file; None or nothing if it is not wanted.

    Returns:
        The same, if it is wanted.

    Raises:
        UsageError: If it cannot be written.
    """
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{option} {path}: this is a folder, name a file in it.")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: this cannot be written.")
    return path


def prepare_picture(option: str, name: str | Path | None) -> Path | None:
    """The file of a picture.

    Args:
        option: What asks for it on the command line, such as "--plot".
        name: The file; None or nothing if it is not wanted.

    Returns:
        The same, if it is wanted.

    Raises:
        MissingExtraError: If it cannot be drawn.
        UsageError: If it cannot be written.
    """
    path = prepare_file(option, name)
    if path:
        check_pictures(option)
    return path
