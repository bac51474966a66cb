"""Memory between this process and the system: how often it asks for some, and that it keeps it."""

from __future__ import annotations

import ctypes
import sys

if sys.platform != "win32":
    import resource


def page_faults() -> int:
    """Pages of memory that this process had to ask the system for so far.

    Returns:
        Their number; 0 where the system does not tell.
    """
    if sys.platform == "win32":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_memory() -> bool:
    """Makes the C library keep memory that is given back, as far as it is glibc.

    Else whether an iteration pays for fresh pages depends on how the memory happens to lie, and
    ratios differ by a tenth from run to run.

    Returns:
        Whether it does so from now on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))
