"""Results that are made once for each set of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from mkor import graphs

__all__ = ["memo"]

P = ParamSpec("P")
R = TypeVar("R")


def memo(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a function's results, except while torch traces: its tensors then hold no numbers.

    What is made while a CUDA graph is captured holds its numbers in replays only, and is not kept
    either; what was kept before serves there too.

    Args:
        maxsize: Most results that are kept.

    Returns:
        A decorator for functions of hashable arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @lru_cache(maxsize)
        def kept(*args: P.args, **kwargs: P.kwargs) -> R:
            result = function(*args, **kwargs)
            if graphs.is_capturing():
                raise _FleetingError(result)
            return result

        @wraps(function)
        def find(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or _fakes():
                return function(*args, **kwargs)
            try:
                return kept(*args, **kwargs)  # type: ignore[arg-type]
            except _FleetingError as made:
                return made.args[0]  # type: ignore[no-any-return]

        return find

    return decorate


class _FleetingError(Exception):
    """Carries a result past the memory, which keeps nothing of calls that raise."""


def _fakes() -> bool:
    """Whether tensors that are made now are fakes."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
