"""Results that are made once for each set of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["memo"]

P = ParamSpec("P")
R = TypeVar("R")


def memo(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a function's results, except while torch traces: its tensors then hold no numbers.

    Args:
        maxsize: Most results that are kept.

    Returns:
        A decorator for functions of hashable arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kept = lru_cache(maxsize)(function)

        @wraps(function)
        def find(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or _fakes():
                return function(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        return find

    return decorate


def _fakes() -> bool:
    """Whether tensors that are made now are fakes."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
