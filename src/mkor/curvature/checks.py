"""Checks of a curvature's settings, each with what would be right."""

from __future__ import annotations

import torch

__all__ = ["check_counts", "check_dtype", "check_fraction", "check_positive"]


def check_counts(settings: object, *names: str) -> None:
    """Whole numbers from 1; ``rows`` may be None.

    Args:
        settings: Holds them.
        *names: Which.

    Raises:
        TypeError: One is no whole number.
        ValueError: One is below 1.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None and name == "rows":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_fraction(settings: object, *names: str) -> None:
    """Numbers between 0 and 1, exclusive.

    Args:
        settings: Holds them.
        *names: Which.

    Raises:
        ValueError: One is out of range.
    """
    for name in names:
        value = _number(settings, name)
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, exclusive, got {value}")


def check_positive(settings: object, *names: str) -> None:
    """Positive, finite numbers.

    Args:
        settings: Holds them.
        *names: Which.

    Raises:
        ValueError: One is out of range.
    """
    for name in names:
        value = _number(settings, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_dtype(dtype: object) -> None:
    """A dtype that factors can be stored in.

    Args:
        dtype: None or a dtype.

    Raises:
        TypeError: It is neither.
    """
    if dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "factor_dtype must be None or a floating-point torch.dtype (float64, float32, "
            f"bfloat16, float16), got {dtype!r}"
        )


def _number(settings: object, name: str) -> float:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value
