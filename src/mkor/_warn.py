"""Warnings that point at the user's line, however many calls lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(file).parent) for file in (__file__, str(torch.__file__)))


def warn(message: str) -> None:
    """Warn at the innermost frame that belongs neither to this package nor to torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
