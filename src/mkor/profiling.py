"""Named ranges in ``torch.profiler`` traces; free while no profiler runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

__all__ = ["span"]


_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A range of the trace, for instance ``mkor.update``.

    Args:
        name: Its name in the trace.

    Returns:
        A context manager that does nothing unless a profiler is running.
    """
    if profiler._is_profiler_enabled and not torch.compiler.is_compiling():
        return torch.profiler.record_function(name)
    return _NOTHING
